"""An image that is a part of a file, or whose file is an image, beside qemu-img.

Appliances come as tar archives whose members are opened where they are.
"""

import contextlib
import json
import subprocess

import pytest

from nbdqcow.block.open import open_image
from nbdqcow.errors import BlockError, ImageError
from tests.conftest import find_tool
from tests.interop.img_beside_qemu import VARYING
from tests.interop.img_programs import run_ours, run_theirs

MiB = 1 << 20
START = 1536


@pytest.fixture
def directory(tmp_path):
    img = find_tool("qemu-img")
    (tmp_path / "disk.raw").write_bytes(b"disk" * (MiB // 8) + bytes(MiB // 2))
    for words in ("", "-c"):
        name = f"disk{words}.qcow2"
        line = [img, "convert", *words.split(), "-O", "qcow2", "disk.raw", name]
        subprocess.run(line, cwd=tmp_path, check=True)
        member = (tmp_path / name).read_bytes()
        (tmp_path / f"archive{words}").write_bytes(
            bytes(START) + member + b"next" * 1000
        )
    return tmp_path


def member(directory, archive="archive", **more):
    """Return the name of the disk in an archive."""
    size = (directory / archive.replace("archive", "disk")).with_suffix(".qcow2")
    window = {"driver": "raw", "offset": START, "size": size.stat().st_size}
    file = {**window, "file": {"driver": "file", "filename": archive}}
    return "json:" + json.dumps({"driver": "qcow2", **more, "file": file})


@pytest.mark.parametrize("archive", ["archive", "archive-c"])
@pytest.mark.parametrize(
    "line",
    [
        "info {}",
        "info --output=json {}",
        "check {}",
        "map --output=json {}",
        "measure -O qcow2 {}",
        "compare -F raw {} disk.raw",
        "convert -O raw {} out",
        "snapshot -l {}",
        "create -f qcow2 -F qcow2 -b {} overlay",
        "check --image-opts driver=qcow2,file.driver=raw,file.offset=1536,"
        "file.file.filename=archive",
        "compare --image-opts driver=qcow2,file.driver=raw,"
        "file.file.filename=disk.qcow2"
        " driver=raw,file.driver=qcow2,file.file.filename=disk.qcow2",
        "convert --image-opts -O raw driver=raw,offset=64k,file.driver=qcow2,"
        "file.file.filename=disk.qcow2 out",
        "info --image-opts file.driver=raw,file.offset=1T,file.file.filename=archive",
        "info --image-opts driver=qcow2,file.driver=raw,file.offset=0",
    ],
)
def test_as_qemu_img(directory, archive, line):
    line = line.format(f"'{member(directory, archive)}'")
    ours, theirs = run_ours(line, directory), run_theirs(line, directory)
    # Of what is refused, QEMU names the file by a number of its own.
    assert ours == theirs or (ours[0] == theirs[0] == 1 and not ours[1])


@pytest.mark.asyncio
async def test_writes_stay_in_the_window(directory, monkeypatch):
    monkeypatch.chdir(directory)
    before = (directory / "archive").read_bytes()
    size = (directory / "disk.qcow2").stat().st_size
    async with open_image(member(directory)) as node:
        await node.pwrite(1000, b"changed")
        await node.flush()
    after = (directory / "archive").read_bytes()
    assert len(after) == len(before)
    assert (after[:START], after[START + size :]) == (
        before[:START],
        before[START + size :],
    )
    status, out, _ = run_theirs(f"check '{member(directory)}'", directory)
    assert (status, b"No errors" in out) == (0, True)
    async with open_image(member(directory), read_only=True) as node:
        assert bytes(await node.pread(998, 11)) == b"skchangedkd"


WINDOW = "driver=qcow2,file.driver=raw,file.file.filename=archive,file.offset=1536"


@pytest.mark.parametrize("window", ["", ",file.size=393216", ",file.size=397312"])
@pytest.mark.parametrize(
    "line",
    [
        "bench -w -c 12 -s 64k -S 64k --image-opts {}",
        "convert -n --target-image-opts full.raw {}",
        "resize --preallocation=falloc --image-opts {} 2M",
        "resize --preallocation=full --image-opts {} 2M",
        "resize --image-opts {} 900G",
        "snapshot -c s --image-opts {}",
        "resize --image-opts driver=raw,offset=1536,file.filename=archive{} 2M",
    ],
)
def test_grows_where_its_file_ends(tmp_path, line, window):
    """What is behind a window of a certain size is never written to."""
    (tmp_path / "full.raw").write_bytes(b"full" * (MiB // 4))
    (tmp_path / "half.raw").write_bytes(b"half" * (MiB // 64) + bytes(MiB * 15 // 16))
    run_theirs("convert -O qcow2 half.raw half.qcow2", tmp_path)
    image = (tmp_path / "half.qcow2").read_bytes()
    assert len(image) == 393216
    behind = b"next" * 1024 if window else b""
    if "driver=raw,offset" in line:
        line = line.format(window.replace("file.", ""))
    line = line.format(WINDOW + window)
    said = []
    for run in (run_theirs, run_ours):
        (tmp_path / "archive").write_bytes(bytes(START) + image + behind)
        status, out, err = run(line, tmp_path)
        after = (tmp_path / "archive").read_bytes()
        assert after[:START] == bytes(START)
        if window == ",file.size=393216":
            assert after[START + len(image) :] == behind
        check = run_theirs(f"check --image-opts {WINDOW}{window}", tmp_path)
        assert check[0] == 0 or (status and check[0] == 3)
        said.append((status, VARYING.sub(b"", out), err))
    assert said[1][:2] == said[0][:2]
    # What failed within qcow2, QEMU says more closely.
    assert bool(said[1][2]) == bool(said[0][2])
    if "driver=qcow2" not in line or not line.startswith("resize"):
        assert said[1][2].splitlines()[:1] == said[0][2].splitlines()[:1]


@pytest.mark.asyncio
async def test_an_image_that_needs_more_than_its_window(directory, monkeypatch):
    """Small writes, which take new clusters and are done at once where they can be."""
    monkeypatch.chdir(directory)
    before = (directory / "archive").read_bytes()
    size = (directory / "disk.qcow2").stat().st_size
    node = await open_image(member(directory))
    with pytest.raises(OSError, match="No space left"):
        for offset in range(MiB // 2, MiB, 64 << 10):
            data = b"more" * 1000
            if not node.try_pwrite(offset, data):
                await node.pwrite(offset, data)
    await node.close()
    after = (directory / "archive").read_bytes()
    assert after[:START] == before[:START]
    assert after[START + size :] == before[START + size :]
    assert run_theirs(f"check '{member(directory)}'", directory)[0] == 0


@pytest.mark.asyncio
async def test_what_was_written_before_a_window_was_full(directory, monkeypatch):
    """It can be flushed: no table is where it can't be written."""
    monkeypatch.chdir(directory)
    line = "create -q -f qcow2 -o cluster_size=512 disk.qcow2 4M"
    assert run_theirs(line, directory)[0] == 0
    image = (directory / "disk.qcow2").read_bytes()
    (directory / "disk.qcow2").write_bytes(image + bytes(40 << 10))
    content = bytes(START) + image + bytes(40 << 10) + b"next" * 1000
    (directory / "archive").write_bytes(content)
    written = {}
    async with open_image(member(directory)) as node:
        # Each takes a table, too.
        for number in range(60):
            data = bytes([number + 1]) * 512
            with contextlib.suppress(BlockError):
                await node.pwrite(number << 16, data)
                written[number << 16] = data
        assert 20 < len(written) < 60
        await node.flush()
        # What is given up makes room for others, and for a bitmap at the end.
        for number in range(8):
            await node.discard(number << 16, 1 << 16)
            written[number << 16] = bytes(512)
        await node.flush()
        await node.driver.tasks.settle()
        written[512] = b"more" * 128
        await node.pwrite(512, written[512])
        node.driver.bitmap_add("changes")
    status, out, _ = run_theirs(f"check '{member(directory)}'", directory)
    assert (status, b"No errors" in out) == (0, True)
    async with open_image(member(directory), read_only=True) as node:
        assert "changes" in node.dirty_bitmaps
        for offset, data in written.items():
            assert await node.pread(offset, 512) == data
    assert (directory / "archive").read_bytes().endswith(b"next" * 1000)


@pytest.mark.asyncio
async def test_an_image_names_a_window_only_of_an_allowed_file(directory, monkeypatch):
    monkeypatch.chdir(directory)
    run_ours(
        f"create -qu -f qcow2 -F qcow2 -b '{member(directory)}' overlay 1M", directory
    )
    async with open_image("overlay", allowed_paths=[str(directory)]) as node:
        assert bytes(await node.pread(0, 8)) == b"diskdisk"
    with pytest.raises(ImageError, match="outside the allowed paths"):
        await open_image("overlay", allowed_paths=[str(directory / "overlay")])


@pytest.mark.asyncio
async def test_an_image_names_no_disk_of_another_format_as_its_file(
    directory, monkeypatch
):
    monkeypatch.chdir(directory)
    below = {"driver": "qcow2", "file": {"driver": "file", "filename": "disk.qcow2"}}
    name = "json:" + json.dumps({"driver": "raw", "file": below})
    run_ours(f"create -qu -f qcow2 -F raw -b '{name}' overlay 1M", directory)
    with pytest.raises(ImageError, match="an image can't name"):
        await open_image("overlay")
    async with open_image("overlay", images_name_filters=True) as node:
        assert bytes(await node.pread(0, 8)) == b"diskdisk"

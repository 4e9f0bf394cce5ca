"""Where the files of images end: other programs read whole clusters, or sectors."""

import os

import pytest

from nbdqcow.block.open import open_image
from tests.interop.img_programs import run_ours, run_theirs

KiB, MiB = 1 << 10, 1 << 20


@pytest.mark.parametrize("options", ["", "-c", "-o cluster_size=512", "-o compat=0.10"])
@pytest.mark.parametrize("length", [3, 1_000_003, 1_000_448, MiB])
def test_converted_as_by_qemu_img(tmp_path, options, length):
    (tmp_path / "raw").write_bytes(os.urandom(length))
    line = f"convert -f raw -O qcow2 {options} raw "
    assert run_ours(line + "ours", tmp_path) == run_theirs(line + "theirs", tmp_path)
    ours, theirs = ((tmp_path / name).stat().st_size for name in ("ours", "theirs"))
    if options == "-c":
        # Streams of other compressors have other lengths.
        assert ours % 512 == theirs % 512 == 0
    else:
        assert ours == theirs


@pytest.mark.parametrize("size", ["", "2M"])
@pytest.mark.parametrize("last", [b"", b"x"])
def test_the_last_sector_of_a_backing_file(tmp_path, last, size):
    """All of it is that file's."""
    with (tmp_path / "raw").open("wb") as file:
        file.truncate(1_000_003 - len(last))
        file.seek(0, os.SEEK_END)
        file.write(last)
    for line in (
        f"create -f qcow2 -b raw -F raw middle {size}",
        "create -f qcow2 -b middle -F qcow2 top 3M",
        "map --output=json middle",
        "map --output=json top",
        "map --output=json -s 1000002 -l 2 top",
        "map --output=json -s 1000003 top",
        "map top",
    ):
        assert run_ours(line, tmp_path) == run_theirs(line, tmp_path), line


def test_a_table_ends_the_file(tmp_path):
    """As with QEMU, of whose last cluster nothing but the table is there."""
    for name, run in (("ours", run_ours), ("theirs", run_theirs)):
        for line in (
            f"create -f qcow2 -o cluster_size=2M {name} 2T",
            f"bitmap --add --granularity 512 -f qcow2 {name} b1",
            f"bitmap --add -g 2M -f qcow2 {name} b2",
        ):
            assert run(line, tmp_path)[0] == 0
    ours, theirs = ((tmp_path / name).stat().st_size for name in ("ours", "theirs"))
    assert ours == theirs


@pytest.mark.asyncio
@pytest.mark.parametrize("cache", ["writeback", "none"])
async def test_written_to(tmp_path, cache):
    run_theirs("create -f qcow2 image 64M", tmp_path)
    path = tmp_path / "image"
    async with open_image(path, cache=cache) as node:
        await node.pwrite(5 * MiB, b"some data")
        await node.flush()
    length = path.stat().st_size
    assert length % (64 * KiB) == 0
    # Whoever writes nothing, or in place, leaves it.
    os.truncate(path, length - 60 * KiB)
    async with open_image(path, cache=cache) as node:
        await node.pwrite(5 * MiB, b"same data")
    assert path.stat().st_size == length - 60 * KiB


@pytest.mark.asyncio
async def test_what_was_cut_off_stays_so(tmp_path):
    run_theirs("create -f qcow2 image 64M", tmp_path)
    path = tmp_path / "image"
    before = path.stat().st_size
    async with open_image(path) as node:
        await node.pwrite(MiB, bytes([7]) * 4 * MiB)
        await node.resize(MiB)
        await node.flush()
    assert path.stat().st_size < before + MiB
    assert run_theirs("check image", tmp_path)[0] == 0


@pytest.mark.asyncio
async def test_a_data_file_has_no_say(tmp_path):
    run_theirs("create -f qcow2 -o data_file=data image 64M", tmp_path)
    path = tmp_path / "image"
    async with open_image(path) as node:
        await node.pwrite(MiB, b"some data")
    assert path.stat().st_size < MiB
    assert run_theirs("check image", tmp_path)[0] == 0

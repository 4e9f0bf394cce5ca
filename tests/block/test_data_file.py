"""External data files: QEMU's images here, ours there, and what is refused."""

import asyncio
import errno
import json
import logging
import os
import random
import re
import subprocess
import sys

import pytest

from nbdqcow import open_image
from nbdqcow.cli.img import main as nbdqcow_img
from nbdqcow.errors import BlockError, ImageError, ImageInUse, NotSupported
from tests.interop.img_versions import text_as_7_2_says

MiB = 1 << 20


def run(*words, fails=False):
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def create(path, size, options="", *, data_file="data", by="qemu"):
    text = f"data_file={data_file}" + (options and f",{options}")
    words = ["create", "-q", "-f", "qcow2", "-o", text, path.name, str(size)]
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        if by == "qemu":
            run("qemu-img", *words)
        else:
            assert nbdqcow_img(words) == 0
    finally:
        os.chdir(here)
    return path


def qemu_content(path, tmp_path):
    """Return what QEMU finds on the disk, having checked the image."""
    subprocess.run(["qemu-img", "check", "-q", path.name], check=True, cwd=path.parent)
    subprocess.run(
        ["qemu-img", "convert", "-O", "raw", path.name, tmp_path / "flat"],
        check=True,
        cwd=path.parent,
    )
    return (tmp_path / "flat").read_bytes()


@pytest.mark.parametrize("options", ["", "extended_l2=on"])
def test_what_is_allocated_is_counted_as_qemu_counts_it(tmp_path, options):
    """The first cluster, at offset 0 of the data file, too."""
    data_file = tmp_path / "data"
    path = create(tmp_path / "a", 4 * MiB, options, data_file=data_file)
    found = []
    for command in ("write 0 200k", "write -z 0 64k", "write -zu 64k 64k"):
        run("qemu-io", "-f", "qcow2", "-c", command, path)
        counts = []
        for program in (["qemu-img"], [sys.executable, "-m", "nbdqcow.cli.img"]):
            text = run(*program, "check", "--output=json", path)
            counts.append(json.loads(text)["allocated-clusters"])
        assert counts[0] == counts[1], command
        found.append(counts[0])
    assert len(set(found)) > 1


async def change_at_random(node, model, rnd, nb_operations):
    size, cluster_size = node.size, node.driver.cluster_size
    for _ in range(nb_operations):
        kind = rnd.randrange(5)
        offset = rnd.randrange(size // 512) * 512
        length = min(size - offset, rnd.randrange(1, 300) * 512)
        data = bytes(length)
        if kind < 3:
            data = rnd.randbytes(length)
            if not node.try_pwrite(offset, data):
                await node.pwrite(offset, data)
        elif kind == 3:
            await node.write_zeroes(offset, length, may_unmap=rnd.random() < 0.5)
        else:
            end = (offset + length) // cluster_size * cluster_size
            offset = -(-offset // cluster_size) * cluster_size
            data = bytes(max(0, end - offset))
            await node.discard(offset, len(data))
        model[offset : offset + len(data)] = data
        if rnd.random() < 0.05:
            await node.flush()


OPTIONS = pytest.mark.parametrize(
    "options",
    [
        "",
        "data_file_raw=on",
        "cluster_size=512",
        "extended_l2=on",
        "extended_l2=on,data_file_raw=on",
        "preallocation=metadata,refcount_bits=1",
    ],
)


@OPTIONS
@pytest.mark.parametrize("by", ["qemu", "us"])
def test_random_changes(tmp_path, seed, options, by):
    path = create(tmp_path / "disk", 4 * MiB + 512, options, by=by)
    rnd = random.Random(seed)
    model = bytearray(4 * MiB + 512)

    async def run_ours():
        async with open_image(path) as node:
            await change_at_random(node, model, rnd, 120)
            assert bytes(await node.pread(0, node.size)) == model

    for _ in range(2):
        asyncio.run(run_ours())
        assert qemu_content(path, tmp_path) == model
        if "raw" in options:
            # QEMU rounds its length up to whole clusters.
            assert (tmp_path / "data").read_bytes()[: len(model)] == model
        # QEMU goes on where we left.
        subprocess.run(
            ["qemu-io", "-d", "unmap", "-c", "write -P 5 100k 1M", "-c",
             "discard 2M 512k", "-c", "write -z 3M 100k", path.name],
            check=True, stdout=subprocess.DEVNULL, cwd=tmp_path,
        )  # fmt: skip
        model[100 << 10 : (100 << 10) + MiB] = b"\x05" * MiB
        model[2 * MiB : 2 * MiB + (512 << 10)] = bytes(512 << 10)
        model[3 * MiB : 3 * MiB + (100 << 10)] = bytes(100 << 10)


def test_a_new_image_is_as_qemu_makes_it(tmp_path):
    for name, options in (("a", "data_file_raw=on"), ("b", "preallocation=full")):
        theirs = create(tmp_path / f"{name}1", 3 * MiB, options)
        ours = create(tmp_path / f"{name}2", 3 * MiB, options, by="us")
        length = min(ours.stat().st_size, theirs.stat().st_size)
        assert ours.read_bytes()[:length] == theirs.read_bytes()[:length]
        assert (tmp_path / "data").stat().st_size == 3 * MiB


def test_the_data_file_is_beside_the_image_wherever_we_are(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    words = ["-f", "qcow2", "-o", "data_file=d", "sub/disk", "1M"]
    assert nbdqcow_img(["create", "-q", *words]) == 0
    assert (tmp_path / "sub" / "d").stat().st_size == MiB
    monkeypatch.chdir("/")

    async def use():
        async with open_image(tmp_path / "sub" / "disk") as node:
            await node.pwrite(0, b"here")
            assert node.driver.data.filename == str(tmp_path / "sub" / "d")

    asyncio.run(use())
    assert (tmp_path / "sub" / "d").read_bytes()[:4] == b"here"


def test_block_status_and_offsets(tmp_path):
    path = create(tmp_path / "disk", MiB)

    async def use():
        async with open_image(path) as node:
            await node.pwrite(0, b"x" * 65536)
            await node.pwrite(3 * 65536, b"x" * 131072)
            await node.write_zeroes(3 * 65536, 65536, may_unmap=True)
            # The place in the data file is the guest's.
            assert node.driver.try_map(100, 200) == (0, 100, 200)
            assert node.driver.try_map(4 * 65536, 65536) == (0, 4 * 65536, 65536)
            assert node.driver.try_map_write(200, 10) == 200
            extents = await node.block_status(0, MiB)
            return [int(length) for length in extents.lengths]

    lengths = asyncio.run(use())
    assert lengths[0] == 65536
    assert sum(lengths) == MiB


def test_backing_files_show_through(tmp_path):
    run("qemu-img", "create", "-qf", "qcow2", tmp_path / "base", "1M")
    run("qemu-io", "-c", "write -P 9 0 1M", tmp_path / "base")
    path = create(tmp_path / "disk", MiB, "backing_file=base,backing_fmt=qcow2")

    async def use():
        async with open_image(path) as node:
            await node.pwrite(1000, b"abc")
            await node.discard(65536, 65536)

    asyncio.run(use())
    expected = bytearray(b"\x09" * MiB)
    expected[1000:1003] = b"abc"
    expected[65536:131072] = bytes(65536)
    assert qemu_content(path, tmp_path) == expected


def test_encrypted(tmp_path, seed):
    secret = ("--object", "secret,id=s,data=pass")
    text = "data_file=data,encrypt.format=aes,encrypt.key-secret=s"
    subprocess.run(
        ["qemu-img", "create", "-qf", "qcow2", *secret, "-o", text, "disk", "1M"],
        check=True, cwd=tmp_path,
    )  # fmt: skip
    data = random.Random(seed).randbytes(MiB)

    async def use():
        options = {"secret": b"pass"}
        async with open_image(tmp_path / "disk", driver_options=options) as node:
            await node.pwrite(0, data)
            assert bytes(await node.pread(0, MiB)) == data

    asyncio.run(use())
    assert data[:512] not in (tmp_path / "data").read_bytes()
    subprocess.run(
        ["qemu-img", "convert", *secret, "--image-opts",
         "driver=qcow2,file.filename=disk,encrypt.key-secret=s", "-O", "raw", "flat"],
        check=True, cwd=tmp_path,
    )  # fmt: skip
    assert (tmp_path / "flat").read_bytes() == data


def test_a_data_file_outside_the_allowed_paths_is_not_opened(tmp_path):
    # Opening a pipe without a writer would wait for ever.
    pipe = tmp_path / "pipe"
    path = create(tmp_path / "disk", MiB)
    (tmp_path / "data").unlink()
    os.mkfifo(pipe)
    (tmp_path / "data").symlink_to(pipe)

    async def use(allowed, **options):
        async with open_image(path, allowed_paths=allowed, **options) as node:
            return bytes(await node.pread(0, 4))

    with pytest.raises(ImageError, match="outside the allowed paths"):
        asyncio.run(use([str(path)]))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"data" + bytes(MiB))
    # Who opens the image may say where the data is.
    given = {"data_file": str(elsewhere)}
    asyncio.run(use([str(path)], driver_options=given))
    (tmp_path / "data").unlink()
    (tmp_path / "data").symlink_to(elsewhere)
    asyncio.run(use([str(tmp_path)]))


def patch(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def opened(path, **options):
    async def use():
        async with open_image(path, **options) as node:
            return bytes(await node.pread(0, 65536))

    return asyncio.run(use())


@pytest.mark.parametrize("name", ["nbd:1:22", "nbd://ho", "json:{}.", "fuse:abc"])
def test_a_name_in_an_image_is_a_path(tmp_path, monkeypatch, name):
    """Whoever wrote the image does not choose what is connected to."""
    path = create(tmp_path / "disk", MiB, data_file="placehol")
    patch(path, path.read_bytes().index(b"placehol"), name.encode())
    os.makedirs((tmp_path / name).parent, exist_ok=True)
    os.rename(tmp_path / "placehol", tmp_path / name)
    assert opened(path) == bytes(65536)
    monkeypatch.chdir(tmp_path)
    for command in ("map", "check", "info"):
        expected = text_as_7_2_says(run("qemu-img", command, "disk"))
        assert run(sys.executable, "-m", "nbdqcow.cli.img", command, "disk") == expected
    (tmp_path / name).unlink()
    with pytest.raises(ImageError, match=re.escape(f"{name}': No such file")):
        opened(path)
    for command in ("map", "check"):
        words = [sys.executable, "-m", "nbdqcow.cli.img", command, "disk"]
        assert "No such file or directory" in run(*words, fails=True)


def test_what_can_not_be_opened(tmp_path):
    path = create(tmp_path / "disk", MiB)
    os.rename(tmp_path / "data", tmp_path / "moved")
    with pytest.raises(ImageError, match=r"Could not open '.*/data': No such file"):
        opened(path)
    os.rename(tmp_path / "moved", tmp_path / "data")
    image = path.read_bytes()
    at = image.index(b"DATA\0\0\0\x04data")
    patch(path, at, b"none")
    with pytest.raises(ImageError, match="'data-file' is required for this image"):
        opened(path)
    given = {"data_file": str(tmp_path / "data")}
    assert opened(path, driver_options=given) == bytes(65536)
    path.write_bytes(image)
    patch(path, at + 8, b"disk")
    with pytest.raises(ImageError, match="it is the image itself"):
        opened(path, lock=False)
    plain = tmp_path / "plain"
    run("qemu-img", "create", "-qf", "qcow2", plain, "1M")
    with pytest.raises(ImageError, match="'data-file' can only be set for images with"):
        opened(plain, driver_options=given)
    with pytest.raises(ImageError, match="'data-file' can only be set for images with"):
        opened(plain, format="raw", driver_options=given)
    patch(plain, 88 + 7, b"\x02")
    with pytest.raises(ImageError, match="data-file-raw requires a data file"):
        opened(plain)


def locked_bytes(path):
    """Return the bytes of a file that this process has locked."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            if not os.path.samestat(os.stat(f"/proc/self/fd/{fd}"), os.stat(path)):
                continue
            with open(f"/proc/self/fdinfo/{fd}") as info:
                lines = [line.split() for line in info if line.startswith("lock:")]
        except OSError:
            continue
        for words in lines:
            found |= set(range(int(words[-2]), int(words[-1]) + 1))
    return found


def test_the_data_file_is_locked_as_qemu_does_it(tmp_path):
    path = create(tmp_path / "disk", MiB)
    data = tmp_path / "data"

    async def use():
        async with open_image(path) as node:
            await node.pwrite(0, b"x")
            assert locked_bytes(data) == {100, 101, 103, 203}
            text = run("qemu-img", "resize", "-f", "raw", data, "2M", fails=True)
            assert "lock" in text
            with pytest.raises(ImageInUse):
                await open_image(data, format="raw")
        assert not locked_bytes(data)
        async with open_image(path, read_only=True):
            assert locked_bytes(data) == {100, 203}

    asyncio.run(use())
    run("qemu-img", "resize", "-f", "raw", data, "2M")


def test_what_an_image_with_a_data_file_does_not_do(tmp_path):
    path = create(tmp_path / "disk", MiB)

    async def use():
        async with open_image(path) as node:
            with pytest.raises(NotSupported, match="Operation not supported"):
                await node.pwrite_compressed(0, b"x" * 65536)
            for operation in ("create", "apply", "delete"):
                with pytest.raises(NotSupported, match="snapshots"):
                    await getattr(node.driver, f"snapshot_{operation}")("s")

    asyncio.run(use())


def l2_entry(path, index):
    """Return where the L2 entry of a guest cluster is in the file."""
    image = path.read_bytes()
    l1_offset = int.from_bytes(image[40:48])
    l2_offset = int.from_bytes(image[l1_offset : l1_offset + 8]) & ~(1 << 63)
    return l2_offset + 8 * index


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (1 << 63 | 5 << 16, "does not match guest cluster offset"),
        (5 << 16, "does not match guest cluster offset"),
        (1 << 62 | 5 << 16, "Compressed cluster entry found"),
        (1 << 63 | 1 << 55, "does not match guest cluster offset|unaligned"),
    ],
)
def test_entries_that_can_not_be(tmp_path, entry, text):
    path = create(tmp_path / "disk", MiB, "data_file_raw=on")
    patch(tmp_path / "data", 0, b"x" * MiB)
    patch(path, l2_entry(path, 3), entry.to_bytes(8))

    async def read():
        async with open_image(path, read_only=True) as node:
            assert node.try_pread(3 << 16, 100) is None
            with pytest.raises(BlockError, match=text):
                await node.pread(3 << 16, 100)
            assert bytes(await node.pread(4 << 16, 100)) == b"x" * 100

    asyncio.run(read())

    async def write():
        async with open_image(path) as node:
            if entry >> 63:
                with pytest.raises(BlockError, match=text):
                    await node.pwrite(3 << 16, b"y" * 100)
                # The image is marked, and takes no more writes.
                with pytest.raises(BlockError):
                    await node.pwrite(4 << 16, b"y" * 100)
            assert not node.driver.in_flight

    asyncio.run(write())


@pytest.mark.parametrize("size", [MiB, MiB + 512])
@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
def test_what_was_appended_to_a_raw_data_file(tmp_path, seed, preallocation, size):
    """Right behind the disk, which may end within a cluster."""
    path = create(tmp_path / "disk", size, "data_file_raw=on")
    data = random.Random(seed).randbytes(2 * MiB + 5000)
    (tmp_path / "data").write_bytes(data)

    async def use():
        async with open_image(path) as node:
            await node.resize(3 * MiB, preallocation=preallocation)

    asyncio.run(use())
    expected = data.ljust(3 * MiB, b"\0")
    assert qemu_content(path, tmp_path) == expected
    assert (tmp_path / "data").read_bytes() == expected


def test_what_was_appended_stays_if_the_disk_can_not_grow(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    path = create(tmp_path / "disk", MiB, "data_file_raw=on")
    patch(tmp_path / "data", MiB, b"appended" * 1000)
    data = (tmp_path / "data").read_bytes()

    async def grow(nb_flushes):
        async with open_image(path) as node:
            storage = node.driver.storage
            flush, left = storage.flush, nb_flushes

            async def flush_or_fail():
                nonlocal left
                left -= 1
                if left == -1:
                    raise OSError(errno.ENOSPC, "full")
                await flush()

            storage.flush = flush_or_fail
            try:
                await node.resize(2 * MiB)
            finally:
                storage.flush = flush

    nb_flushes = 0
    while True:
        try:
            asyncio.run(grow(nb_flushes))
            break
        except OSError:
            found = (tmp_path / "data").read_bytes()
            assert found == data.ljust(len(found), b"\0"), nb_flushes
            nb_flushes += 1
    assert nb_flushes > 3
    assert qemu_content(path, tmp_path) == data.ljust(2 * MiB, b"\0")


@pytest.mark.parametrize("raw", ["off", "on"])
def test_resize(tmp_path, seed, raw):
    path = create(tmp_path / "disk", MiB, f"data_file_raw={raw}")
    rnd = random.Random(seed)
    data = rnd.randbytes(MiB)
    # The data file may be longer than the disk. Of a raw one that is the disk's.
    patch(tmp_path / "data", MiB, b"stale" * 100)
    behind = (b"stale" * 100 if raw == "on" else b"").ljust(MiB + 512, b"\0")

    async def use():
        async with open_image(path) as node:
            await node.pwrite(0, data)
            await node.resize(2 * MiB + 512)
            assert bytes(await node.pread(0, node.size)) == data + behind
            assert (tmp_path / "data").stat().st_size == 2 * MiB + 512
            await node.pwrite(2 * MiB, b"end" * 100)
            await node.resize(512 * 1024)
            assert (tmp_path / "data").stat().st_size == 512 * 1024
            await node.resize(MiB, preallocation="metadata")

    asyncio.run(use())
    expected = data[: 512 * 1024] + bytes(512 * 1024)
    assert qemu_content(path, tmp_path) == expected
    if raw == "on":
        assert (tmp_path / "data").read_bytes() == expected


def test_a_size_that_is_refused_leaves_the_data_file(tmp_path):
    path = create(tmp_path / "disk", MiB, "cluster_size=512")

    async def grow():
        async with open_image(path) as node:
            await node.resize(1 << 40)

    with pytest.raises(BlockError, match="Failed to grow the L1 table"):
        asyncio.run(grow())
    assert (tmp_path / "data").stat().st_size == MiB

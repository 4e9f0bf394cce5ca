"""qcow images whose L1 table is too large to be in memory as a whole."""

import subprocess

import pytest

from nbdqcow import open_image
from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow1 import l1_table
from nbdqcow.formats.qcow1.create import CreateOptions, create
from nbdqcow.storage.file import FileStorage
from tests.qcow1_image import check

MIB, TIB = 1 << 20, 1 << 40


async def make(path, size):
    path.touch()
    storage = await FileStorage.open(str(path))
    await create(storage, CreateOptions(size=size))
    await storage.close()
    return path


def qemu_io(path, *commands):
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(
        ["qemu-io", "-f", "qcow", *words, path], check=True, stdout=subprocess.DEVNULL
    )


async def status(node):
    offset, found = 0, []
    while offset < node.size:
        extents = await node.block_status(offset, node.size - offset)
        for length, state in zip(extents.lengths, extents.states, strict=True):
            length, state = int(length), int(state)
            if found and found[-1][1] == state:
                found[-1] = found[-1][0] + length, state
            else:
                found.append((length, state))
            offset += length
    return found


@pytest.mark.asyncio
async def test_a_disk_of_20_tib(tmp_path):
    path = await make(tmp_path / "image", 20 * TIB)
    qemu_io(path, f"write -P 1 {19 * TIB} 64k")
    async with open_image(path, format="qcow") as node:
        assert bytes(await node.pread(19 * TIB, 65536)) == b"\1" * 65536
        await node.pwrite(3 * TIB, b"2" * 65536)
        await node.flush()
        await node.pwrite(20 * TIB - 4096, b"3" * 4096)
        assert await status(node) == [
            (3 * TIB, 3), (65536, 0), (16 * TIB - 65536, 3), (65536, 0),
            (TIB - 65536 - 4096, 3), (4096, 0),
        ]  # fmt: skip
    qemu_io(
        path,
        f"read -P 1 {19 * TIB} 64k",
        f"read -P 0x32 {3 * TIB} 64k",
        f"read -P 0x33 {20 * TIB - 4096} 4k",
    )
    async with open_image(path, format="qcow") as node:
        await node.driver.make_empty()
        assert await status(node) == [(20 * TIB, 3)]
        await node.pwrite(5 * TIB, b"4")
    qemu_io(path, f"read -P 0x34 {5 * TIB} 1", f"read -P 0 {19 * TIB} 64k")


@pytest.mark.asyncio
async def test_memory_is_bounded_by_what_is_in_use(tmp_path, monkeypatch):
    """Tables of a page are enough to be many here."""
    monkeypatch.setattr(l1_table, "MAX_L1_MEMORY", 3 * 4096)
    path = await make(tmp_path / "image", 64 << 30)
    step = 2 * MIB * 512
    async with open_image(path, format="qcow") as node:
        for index in range(0, 9, 3):
            await node.pwrite(index * step, b"%d" % index)
    check(path)
    async with open_image(path, format="qcow") as node:
        for index in range(0, 9, 3):
            assert bytes(await node.pread(index * step, 1)) == b"%d" % index
        await node.pwrite(20 * step, b"x")
    check(path)
    with pytest.raises(ImageError, match="Image too large"):
        await open_image(path, format="qcow")

"""LUKS containers as disks."""

import errno
import random

import pytest

from nbdqcow import open_image
from nbdqcow.block.registry import format_tool, probe_format
from nbdqcow.crypto import luks
from nbdqcow.errors import BlockError, ImageError
from nbdqcow.storage.blocking import BlockingLocalFile

SIZE = 1 << 20
SECRET = {"secret": b"one"}


@pytest.fixture
def container(tmp_path, monkeypatch):
    """Return the path of a new container; the passphrase is ``one``."""
    monkeypatch.setattr(luks, "_CALIBRATION_SECONDS", 1e-4)
    tool = format_tool("luks")
    values = {"key-secret": "s", "iter-time": 1, "size": SIZE}
    plan = tool.prepare(values, secrets={"s": b"one"}.__getitem__)
    path = tmp_path / "disk"
    file = BlockingLocalFile.create(str(path))
    tool.create(file, plan)
    file.close()
    return path


@pytest.mark.asyncio
async def test_random_requests(container, seed):
    rng = random.Random(seed)
    assert probe_format(container.read_bytes()[:2048]) == "luks"
    model = bytearray(rng.randbytes(SIZE))
    async with open_image(container, driver_options=SECRET) as node:
        assert (node.format_name, node.size) == ("luks", SIZE)
        await node.pwrite(0, bytes(model))
        for _ in range(100):
            offset = rng.randrange(SIZE)
            data = rng.randbytes(rng.choice((1, 512, 5000, 70_000)))[: SIZE - offset]
            if rng.random() < 0.2:
                data = bytes(len(data))
                await node.write_zeroes(offset, len(data))
            elif not node.try_pwrite(offset, data):
                await node.pwrite(offset, data)
            model[offset : offset + len(data)] = data
        await node.discard(0, SIZE)
        assert await node.pread(0, SIZE) == model
    assert bytes(model[:512]) not in container.read_bytes()
    async with open_image(container, read_only=True, driver_options=SECRET) as node:
        assert await node.pread(0, SIZE) == model
        with pytest.raises(BlockError):
            await node.pwrite(0, b"x")


@pytest.mark.asyncio
async def test_resize(container):
    async with open_image(container, driver_options=SECRET) as node:
        await node.pwrite(0, b"y" * 1024)
        await node.pwrite(SIZE - 512, b"x" * 512)
        await node.resize(SIZE + 5120)
        assert node.size == SIZE + 5120
        assert await node.pread(SIZE - 1, 5121) == b"x" + bytes(5120)
        await node.resize(1024)
        await node.resize(SIZE)
        assert await node.pread(0, SIZE) == b"y" * 1024 + bytes(SIZE - 1024)
        with pytest.raises(BlockError, match="no multiple of 512"):
            await node.resize(SIZE + 1)


@pytest.mark.asyncio
async def test_a_disk_that_can_not_grow(container):
    """Its size is the file's: what is not zeroed would be noise on a larger disk."""
    length = container.stat().st_size
    async with open_image(container, driver_options=SECRET) as node:

        async def fail(*args, **options):
            raise OSError(errno.ENOSPC, "full")

        node.driver.data.write_zeroes = fail
        with pytest.raises(OSError, match="full"):
            await node.resize(2 * SIZE)
        assert node.size == SIZE
    assert container.stat().st_size == length


@pytest.mark.asyncio
async def test_passphrases(container):
    with pytest.raises(ImageError, match="a passphrase is required"):
        await open_image(container)
    with pytest.raises(ImageError, match="Invalid password"):
        await open_image(container, driver_options={"secret": b"two"})
    add = {"state": "active", "new-secret": "t", "iter-time": 1}
    async with open_image(container, driver_options=SECRET) as node:
        await node.driver.amend_keys(add, {"t": b"two"}.__getitem__)
        await node.pwrite(7, b"content")
    async with open_image(
        container, read_only=True, driver_options={"secret": b"two"}
    ) as node:
        with pytest.raises(BlockError, match="read-only"):
            await node.driver.amend_keys(add, {"t": b"two"}.__getitem__)
        assert await node.pread(7, 7) == b"content"


@pytest.mark.asyncio
@pytest.mark.parametrize("length", [0, 8, 500, 600, 300_000, 2_000_000])
async def test_cut_off(container, length):
    with container.open("r+b") as file:
        file.truncate(length)
    with pytest.raises(ImageError):
        await open_image(container, format="luks", driver_options=SECRET)

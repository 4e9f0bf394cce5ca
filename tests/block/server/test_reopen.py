"""An image that turns read-only and back under its clients, and is emptied."""

import asyncio
import errno
import os

import pytest

from nbdqcow import open_image
from nbdqcow.block.rename import rename_image
from nbdqcow.errors import BlockError
from nbdqcow.nbd import constants as nbd
from nbdqcow.storage.file import FileStorage
from tests.block.server.support import serving
from tests.qcow1_image import Image, Plain, check

KiB, MiB = 1 << 10, 1 << 20


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    clusters = {i: Plain(b"%03d " % i * 1024) for i in range(100)}
    path.write_bytes(Image(MiB, clusters=clusters).build())
    return path


@pytest.mark.asyncio
async def test_clients_see_a_read_only_image_and_a_writable_one_again(tmp_path, image):
    async with (
        open_image(image, format="qcow") as node,
        serving(tmp_path, node) as served,
    ):
        client, other = await served.connect(), await served.connect()
        assert await client.write(0, b"1" * 4096) == 0
        await node.reopen(read_only=True)
        assert await client.write(0, b"2" * 4096) == nbd.EPERM
        assert await other.call(nbd.CMD_WRITE_ZEROES, 0, 4096) == nbd.EPERM
        assert await other.call(nbd.CMD_FLUSH) == 0
        assert await other.read(0, 4096) == b"1" * 4096
        late = await served.connect()
        assert await late.write(8192, b"3") == nbd.EPERM
        # Another program reads the same file meanwhile.
        reader = await FileStorage.open(str(image), read_only=True)
        await reader.close()
        await node.reopen(read_only=False)
        assert await late.write(8192, b"3" * 512) == 0
        assert await client.read(8192, 512) == b"3" * 512
    check(image)


@pytest.mark.asyncio
async def test_renaming_and_emptying_under_clients(tmp_path, image):
    moved = tmp_path / "moved"
    async with (
        open_image(image, format="qcow") as node,
        serving(tmp_path, node) as served,
    ):
        readers = [await served.connect() for _ in range(3)]
        gone = asyncio.Event()

        async def read_on(client) -> None:
            last = False
            while not last:
                last = gone.is_set()
                for offset in range(0, 400 * KiB, 100 * KiB):
                    data = await client.read(offset, 100 * KiB)
                    # Each cluster is as it was, or empty: nothing else.
                    for i in range(25):
                        cluster = data[i * 4096 : (i + 1) * 4096]
                        was = b"%03d " % (offset // 4096 + i) * 1024
                        assert cluster in (was, bytes(4096))

        reading = [asyncio.create_task(read_on(client)) for client in readers]
        await rename_image(node, str(moved))
        await node.driver.make_empty()
        late = await served.connect()
        assert await late.read(0, 4096) == bytes(4096)
        gone.set()
        await asyncio.gather(*reading)
    assert check(moved) == 0
    assert moved.stat().st_size < 4096


@pytest.mark.asyncio
async def test_a_file_that_keeps_its_name_gets_no_second_one(image, monkeypatch):
    moved = image.with_name("moved")
    unlink = os.unlink

    def refuse(path):
        if path == str(image):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        unlink(path)

    async with open_image(image, format="qcow") as node:
        monkeypatch.setattr(os, "unlink", refuse)
        with pytest.raises(BlockError, match="Could not rename"):
            await rename_image(node, str(moved))
        monkeypatch.undo()
        assert image.exists()
        assert not moved.exists()
        await rename_image(node, str(moved))
        assert not image.exists()
    check(moved)

"""Large writes whose data is written while the rest of it is under way."""

import asyncio
import random

import pytest

from nbdqcow.nbd import constants as nbd
from tests.block.server.support import EIO_ERROR, FakeNode, serving, settle

KiB, MiB = 1 << 10, 1 << 20
pytestmark = pytest.mark.asyncio
OFFSET = 1536


def pieces(node: FakeNode) -> list[tuple[int, int]]:
    """Return where each inline write began and ended."""
    writes = [entry for entry in node.log if entry[0] == "try_pwrite"]
    return [(offset, offset + length) for _, offset, length in writes]


async def send_part(client, data: bytes, flags: int = 0, offset: int = OFFSET) -> None:
    """Send a write's header and all of its data but the last 100 bytes."""
    head = client.request(nbd.CMD_WRITE, offset, len(data), flags)
    client.writer.write(head + data[:-100])
    await client.writer.drain()


@pytest.mark.parametrize("length", [100_000, MiB, 2 * MiB + 77])
async def test_data_is_written_as_it_arrives(tmp_path, seed, length):
    node = FakeNode(4 * MiB)
    data = random.Random(seed).randbytes(length)
    before = bytes(node.data)
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        await send_part(client, data)
        last = (OFFSET + length - 100) // 4096 * 4096
        await settle(lambda: pieces(node) and pieces(node)[-1][1] > last - 64 * KiB)
        written = pieces(node)
        assert written[-1][1] % 4096 == 0, "a sector half of this write"
        stop = written[-1][1]
        assert node.data[OFFSET:stop] == data[: stop - OFFSET]
        assert node.data[stop:] == before[stop:]
        client.writer.write(data[-100:])
        assert await client.reply() == (client.nb_cookies, 0, b"")
        assert node.data[OFFSET : OFFSET + length] == data
        written = pieces(node)
        assert [start for start, _ in written[1:]] == [end for _, end in written[:-1]]
        assert all(end - start <= 256 * KiB for start, end in written)
        assert not any(entry[0] == "pwrite" for entry in node.log)


async def test_what_must_wait_after_all_is_written_as_a_whole(tmp_path, seed):
    node = FakeNode(4 * MiB)
    data = random.Random(seed).randbytes(MiB)
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        await send_part(client, data)
        await settle(lambda: pieces(node))
        node.inline = False
        client.writer.write(data[-100:])
        assert await client.reply() == (client.nb_cookies, 0, b"")
        assert node.data[OFFSET : OFFSET + MiB] == data
        assert node.log[-1] == ("pwrite", OFFSET, MiB, False)
        # And the next one begins at its beginning.
        node.inline = True
        other = data[::-1]
        assert await client.write(2 * MiB, other) == 0
        assert node.data[2 * MiB : 3 * MiB] == other


@pytest.mark.parametrize(
    ("flags", "offset", "error"),
    [(0, 4 * MiB - 512, nbd.ENOSPC), (nbd.CMD_FLAG_NO_HOLE, 0, nbd.EINVAL)],
)
async def test_a_bad_write_writes_nothing(tmp_path, flags, offset, error):
    node = FakeNode(4 * MiB)
    before = bytes(node.data)
    data = b"x" * MiB
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        await send_part(client, data, flags, offset)
        await asyncio.sleep(0.02)
        client.writer.write(data[-100:])
        assert await client.reply() == (client.nb_cookies, error, b"")
        assert node.data == before
        assert await client.write(0, data) == 0
        assert node.data[:MiB] == data


async def test_fua_is_left_to_the_coroutine(tmp_path):
    node = FakeNode(4 * MiB)
    data = b"x" * MiB
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        assert await client.write(OFFSET, data, nbd.CMD_FLAG_FUA) == 0
        assert node.log == [("pwrite", OFFSET, MiB, True)]


async def test_a_failure_is_told_once(tmp_path):
    node = FakeNode(4 * MiB)
    data = b"x" * MiB
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        node.failure = EIO_ERROR
        await send_part(client, data)
        await settle(lambda: node.log)
        client.writer.write(data[-100:])
        assert await client.reply() == (client.nb_cookies, nbd.EIO, b"")
        node.failure = None
        assert await client.write(OFFSET, data) == 0
        assert node.data[OFFSET : OFFSET + MiB] == data


async def test_a_client_that_goes_amid_its_data(tmp_path):
    """What it was told nothing about may be there in part; others go on."""
    node = FakeNode(4 * MiB)
    async with serving(tmp_path, node) as served:
        client, other = await served.connect(), await served.connect()
        await send_part(client, b"x" * MiB)
        await settle(lambda: pieces(node))
        client.writer.transport.abort()
        assert await other.write(2 * MiB, b"y" * MiB) == 0
        assert node.data[2 * MiB : 3 * MiB] == b"y" * MiB

"""How requests of one connection share it: order, limits, slow clients."""

import asyncio
import random
import struct

import pytest

from nbdqcow.nbd import constants as nbd
from nbdqcow.server.options import ServerOptions
from tests.block.server.support import EIO_ERROR, FakeNode, serving, settle

KiB, MiB = 1 << 10, 1 << 20
pytestmark = pytest.mark.asyncio


def conversation(client, node, rng, nb_requests):
    """Return random good and bad requests as bytes, and what must come back:
    cookie to (error, data). Writes go to the first half, reads to the second,
    so that they may be served in any order."""
    half = node.size // 2
    stream, expected = bytearray(), {}
    for _ in range(nb_requests):
        kind = rng.choice(["read", "read", "write", "write", "flush", "bad", "over"])
        length = rng.choice([1, 512, 4096, 65536, 65537, 150_000])
        if kind == "read":
            offset = half + rng.randrange(half - length)
            stream += client.request(nbd.CMD_READ, offset, length)
            answer = (0, bytes(node.data[offset : offset + length]))
        elif kind == "write":
            offset = rng.randrange(half - length)
            stream += client.request(nbd.CMD_WRITE, offset, length)
            stream += rng.randbytes(length)
            answer = (0, b"")
        elif kind == "over":
            stream += client.request(nbd.CMD_WRITE, node.size, length) + bytes(length)
            answer = (nbd.ENOSPC, b"")
        elif kind == "flush":
            stream += client.request(nbd.CMD_FLUSH)
            answer = (0, b"")
        else:
            stream += client.request(rng.choice([7, 8, 99]), 1, length)
            answer = (nbd.EINVAL, b"")
        expected[client.nb_cookies] = answer
    return stream, expected


async def check_replies(client, expected):
    while expected:
        head = await client.reader.readexactly(16)
        magic, error, cookie = struct.unpack(">IIQ", head)
        assert magic == nbd.SIMPLE_REPLY_MAGIC
        wanted_error, data = expected.pop(cookie)
        assert error == wanted_error
        assert await client.reader.readexactly(len(data)) == data


@pytest.mark.parametrize("inline", [True, False, None])
@pytest.mark.parametrize("piece", [1 << 30, 10_000, 4097, 29])
async def test_pipelines_in_pieces(tmp_path, seed, inline, piece):
    rng = random.Random(seed)
    node = FakeNode()
    if inline is None:
        # Now this way, now that.
        node = SometimesInline(rng)
    else:
        node.inline = inline
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        stream, expected = conversation(client, node, rng, 200 if piece > 100 else 20)
        checking = asyncio.create_task(check_replies(client, expected))
        for start in range(0, len(stream), piece):
            client.writer.write(stream[start : start + piece])
            await client.writer.drain()
            await asyncio.sleep(0)
        await asyncio.wait_for(checking, 60)


class SometimesInline(FakeNode):
    def __init__(self, rng):
        self.rng = rng
        super().__init__()

    @property
    def inline(self):
        return self.rng.random() < 0.5

    @inline.setter
    def inline(self, value):
        pass


async def test_byte_by_byte(tmp_path):
    node = FakeNode()
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        stream = (
            client.request(nbd.CMD_READ, 5, 5)
            + client.request(nbd.CMD_WRITE, 7, 3)
            + b"abc"
            + client.request(nbd.CMD_WRITE, 1 << 20, 3)
            + b"abc"
            + client.request(nbd.CMD_READ, 7, 3)
        )
        for byte in stream:
            client.writer.write(bytes([byte]))
            await asyncio.sleep(0.001)
        old = bytes(node.data[5:7])
        assert (await client.reply(5))[2][:2] == old
        assert await client.reply() == (2, 0, b"")
        assert await client.reply() == (3, nbd.ENOSPC, b"")
        assert await client.reply(3) == (4, 0, b"abc")


@pytest.mark.parametrize("nb_requests", [1, 300])
async def test_requests_behind_the_handshake(tmp_path, nb_requests):
    node = FakeNode()
    async with serving(tmp_path, node) as served:
        client = await served.connect_raw()
        await client.greet()
        trailing = b"".join(
            client.request(nbd.CMD_READ, offset, 100) for offset in range(nb_requests)
        )
        await client.go("", trailing + trailing[:10])
        for offset in range(nb_requests):
            cookie, error, data = await client.reply(100)
            assert (cookie, error) == (offset + 1, 0)
            assert data == node.data[offset : offset + 100]


async def test_many_requests_in_one_read(tmp_path):
    """More of them than one callback serves."""
    node = FakeNode()
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        client.writer.write(
            b"".join(client.request(nbd.CMD_READ, n, 64) for n in range(5000))
        )
        for n in range(5000):
            assert await client.reply(64) == (n + 1, 0, node.data[n : n + 64])


async def test_a_busy_client_lets_others_have_a_turn(tmp_path):
    node = FakeNode()
    async with serving(tmp_path, node) as served:
        busy = await served.connect()
        other = await served.connect()
        busy.writer.write(
            b"".join(busy.request(nbd.CMD_READ, 0, 1) for _ in range(9000))
        )
        other.writer.write(other.request(nbd.CMD_READ, 77, 7))
        await other.reply(7)
        mine = [entry for entry in node.log if entry[1] == 0]
        index = node.log.index(("try_pread", 77, 7))
        assert index < 9000
        await settle(lambda: len(node.log) == 9001)
        assert len(mine) <= 9000


async def test_slow_requests_do_not_hold_up_others(tmp_path):
    node = FakeNode()
    node.inline = False
    node.delays = {0: 0.05}
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        client.writer.write(
            client.request(nbd.CMD_READ, 0, 10) + client.request(nbd.CMD_READ, 10, 10)
        )
        assert await client.reply(10) == (2, 0, node.data[10:20])
        assert await client.reply(10) == (1, 0, node.data[:10])


async def test_requests_in_flight_are_limited(tmp_path):
    node = FakeNode()
    node.inline = False
    node.gate.clear()
    options = ServerOptions(max_requests=4)
    async with serving(tmp_path, node, options=options) as served:
        client = await served.connect()
        client.writer.write(
            b"".join(client.request(nbd.CMD_READ, n, 10) for n in range(50))
        )
        await settle(lambda: node.nb_waiting == 4)
        await asyncio.sleep(0.02)
        assert node.nb_waiting == 4
        node.gate.set()
        cookies = {(await client.reply(10))[0] for _ in range(50)}
        assert cookies == set(range(1, 51))
        assert node.max_waiting == 4


async def test_bytes_in_flight_are_limited(tmp_path):
    node = FakeNode()
    node.inline = False
    node.gate.clear()
    options = ServerOptions(max_bytes=MiB)
    async with serving(tmp_path, node, options=options) as served:
        client = await served.connect()

        async def send():
            for _ in range(40):
                client.writer.write(client.request(nbd.CMD_WRITE, 0, 300 * KiB))
                client.writer.write(bytes(300 * KiB))
                await client.writer.drain()

        sending = asyncio.create_task(send())
        await settle(lambda: node.nb_waiting == 4)
        await asyncio.sleep(0.05)
        assert node.nb_waiting == 4
        assert not sending.done()
        node.gate.set()
        for _ in range(40):
            assert (await client.reply())[1] == 0
        await sending
        assert node.max_waiting == 4


async def test_all_connections_share_a_limit(tmp_path):
    node = FakeNode()
    node.inline = False
    node.gate.clear()
    options = ServerOptions(max_total_bytes=MiB)
    async with serving(tmp_path, node, options=options) as served:
        clients = [await served.connect() for _ in range(4)]
        for client in clients:
            for _ in range(2):
                client.writer.write(client.request(nbd.CMD_READ, 0, 600 * KiB))
            await asyncio.sleep(0.02)
        # The first has two, every other one must have a chance.
        assert node.nb_waiting == 5
        node.gate.set()
        for client in clients:
            for _ in range(2):
                assert (await client.reply(600 * KiB))[1] == 0


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("length", [4 * KiB, 512 * KiB])
async def test_a_client_that_reads_nothing(tmp_path, inline, length):
    node = FakeNode()
    node.inline = inline
    options = ServerOptions(max_bytes=4 * MiB)
    async with serving(tmp_path, node, options=options) as served:
        client = await served.connect()
        client.reader._transport.pause_reading()
        nb_requests = 512 * MiB // length

        async def send():
            for n in range(nb_requests):
                client.writer.write(client.request(nbd.CMD_READ, n % 512, length))
                await client.writer.drain()

        sending = asyncio.create_task(send())
        nb_served = -1
        while nb_served != len(node.log):
            nb_served = len(node.log)
            await asyncio.sleep(0.1)
        assert nb_served * length <= 24 * MiB
        # Others do not care, and it gets everything once it reads.
        other = await served.connect()
        assert await other.read(3, 4) == node.data[3:7]
        client.reader._transport.resume_reading()
        for n in range(0, nb_served, 7):
            for m in range(n, min(n + 7, nb_served)):
                cookie, error, data = await client.reply(length)
                assert error == 0
                start = (cookie - 1) % 512
                assert data == node.data[start : start + length]
                assert inline is False or cookie == m + 1
        sending.cancel()


async def test_a_killed_client_that_reads_nothing(tmp_path):
    node = FakeNode()
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        client.reader._transport.pause_reading()
        for n in range(64):
            client.writer.write(client.request(nbd.CMD_READ, n, 512 * KiB))
        await settle(lambda: node.tokens)
        client.writer.transport.abort()
        await settle(lambda: not served.server._connections)
        assert not node.tokens


async def test_a_client_killed_with_requests_in_flight(tmp_path):
    node = FakeNode()
    node.inline = False
    node.gate.clear()
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        client.writer.write(
            client.request(nbd.CMD_READ, 0, 100)
            + client.request(nbd.CMD_WRITE, 0, 100)
            + bytes(100)
            # This one is never completed.
            + client.request(nbd.CMD_WRITE, 0, MiB)
            + bytes(1000)
        )
        await settle(lambda: node.nb_waiting == 2)
        client.writer.transport.abort()
        await asyncio.sleep(0.02)
        assert len(served.server._connections) == 1
        node.failure = EIO_ERROR
        node.gate.set()
        await settle(lambda: not served.server._connections)
        assert not served.server._shared.tasks
        assert served.server._shared.nb_bytes == 0


async def test_disconnect_waits_for_requests_in_flight(tmp_path):
    node = FakeNode()
    node.inline = False
    node.gate.clear()
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        client.writer.write(
            client.request(nbd.CMD_WRITE, 0, 4)
            + b"last"
            + client.request(nbd.CMD_DISC)
            + client.request(nbd.CMD_WRITE, 0, 4)
            + b"late"
        )
        await settle(lambda: node.nb_waiting == 1)
        node.gate.set()
        assert await client.reply() == (1, 0, b"")
        assert await client.reader.read() == b""
        assert node.data[:4] == b"last"


@pytest.mark.parametrize("inline", [True, False])
async def test_a_client_that_closes_its_sending_side(tmp_path, inline):
    node = FakeNode()
    node.inline = inline
    options = ServerOptions(max_requests=4)
    async with serving(tmp_path, node, options=options) as served:
        client = await served.connect()
        client.writer.write(
            b"".join(client.request(nbd.CMD_READ, n, 4096) for n in range(2000))
        )
        client.writer.write_eof()
        cookies = {(await client.reply(4096))[0] for _ in range(2000)}
        assert cookies == set(range(1, 2001))
        assert await client.reader.read() == b""


@pytest.mark.parametrize("garbage", [b"\0" * 28, b"\x25\x60\x95\x14" + b"\0" * 24])
async def test_garbage_closes_the_connection(tmp_path, caplog, garbage):
    node = FakeNode()
    node.inline = False
    node.gate.clear()
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        client.writer.write(client.request(nbd.CMD_READ, 0, 10) + garbage)
        await settle(lambda: "bad request magic" in caplog.text)
        node.gate.set()
        assert (await client.reply(10))[0] == 1
        assert await client.reader.read() == b""
        assert "client on a unix socket closed: bad request magic 0x" in caplog.text


async def test_flush_comes_after_answered_writes(tmp_path):
    node = FakeNode()
    async with serving(tmp_path, node) as served:
        first, second = await served.connect(), await served.connect()
        node.inline = False
        assert await first.write(0, b"one") == 0
        node.inline = True
        assert await first.write(3, b"two") == 0
        assert await second.call(nbd.CMD_FLUSH) == 0
        assert [entry[0] for entry in node.log] == ["pwrite", "try_pwrite", "flush"]


async def test_payload_buffers_are_recycled(tmp_path):
    node = FakeNode(8 * MiB)
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        pool = served.server._shared.pool
        for inline in (True, False):
            node.inline = inline
            for n in range(8):
                assert await client.write(n * MiB, bytes([n]) * MiB) == 0
        assert pool._nb_idle_bytes == MiB
        for n in range(8):
            assert await client.read(n * MiB, MiB) == bytes([n]) * MiB

"""Structured and extended replies as a server gives them."""

import asyncio

import numpy as np
import pytest

from nbdqcow.nbd import constants as nbd
from nbdqcow.server import connection as connection_module
from tests.block.server.support import EIO_ERROR, FakeNode, serving

MiB = 1 << 20
KiB = 1 << 10
pytestmark = pytest.mark.asyncio
both = pytest.mark.parametrize("extended", [False, True], ids=["32", "64"])

DF, REQ_ONE, PAYLOAD = (
    nbd.CMD_FLAG_DF,
    nbd.CMD_FLAG_REQ_ONE,
    nbd.CMD_FLAG_PAYLOAD_LEN,
)
BASE, DEPTH = "base:allocation", "qemu:allocation-depth"
STATUS = [(4096, 0, 1), (8192, 3, 1), (8192, 3, 2), (512, 0, 2), (1 << 19, 3, 0)]


def striped(*, read_only=False):
    """A node whose status has data and holes; what is a hole is zero."""
    node = FakeNode(sum(row[0] for row in STATUS), read_only=read_only)
    node.status = STATUS
    position = 0
    for length, state, _ in STATUS:
        if state:
            node.data[position : position + length] = bytes(length)
        position += length
    return node


class Bitmap:
    """A bitmap in which every second 4 KiB are dirty."""

    async def extents(self, offset, length, limit):
        nb_extents = min(limit, max(1, length // 4096))
        lengths = np.full(nb_extents, 4096, np.uint64)
        return lengths, np.arange(nb_extents) % 2 == 1


def write_flags(extended):
    return PAYLOAD if extended else 0


@both
@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("length", [1, 4096, 65535, 65536, 300_000])
async def test_read_and_write(tmp_path, extended, inline, length):
    node = FakeNode()
    node.inline = inline
    async with serving(tmp_path, node) as served:
        client = await served.connect_chunked(extended=extended)
        assert client.flags & nbd.FLAG_SEND_DF
        for flags in (0, DF, nbd.CMD_FLAG_FUA):
            reply = await client.ask_chunks(nbd.CMD_READ, 13, length, flags)
            assert reply.data(13, length) == node.data[13 : 13 + length]
        data = b"x" * length
        flags = write_flags(extended)
        reply = await client.ask_chunks(nbd.CMD_WRITE, 7, length, flags, data)
        assert not reply.error
        assert node.data[7 : 7 + length] == data
        for command in (nbd.CMD_TRIM, nbd.CMD_CACHE, nbd.CMD_WRITE_ZEROES):
            assert not (await client.ask_chunks(command, 0, 4096)).error
        assert not (await client.ask_chunks(nbd.CMD_FLUSH)).error
        assert not (await client.ask_chunks(nbd.CMD_READ, 5, 0)).pieces
        await client.disconnect()


@both
async def test_holes_are_not_sent_as_data(tmp_path, extended):
    node = striped()
    node.inline = False
    async with serving(tmp_path, node) as served:
        client = await served.connect_chunked(extended=extended)
        reply = await client.ask_chunks(nbd.CMD_READ, 0, 40_000)
        assert reply.data(0, 40_000) == node.data[:40_000]
        assert [offset for offset, _ in reply.pieces] == [0, 4096, 20480, 20992]
        assert [type(piece) for _, piece in reply.pieces] == [bytes, int, bytes, int]
        reply = await client.ask_chunks(nbd.CMD_READ, 0, 40_000, DF)
        assert reply.pieces == [(0, bytes(node.data[:40_000]))]


@both
async def test_an_error_within_a_read(tmp_path, extended):
    node = striped()
    node.inline = False
    node.broken_from = 20480
    async with serving(tmp_path, node) as served:
        client = await served.connect_chunked(extended=extended)
        reply = await client.ask_chunks(nbd.CMD_READ, 100, 40_000)
        assert reply.data(100, 20380) == node.data[100:20480]
        assert (reply.error, reply.text) == (nbd.EIO, "the disk is broken")
        assert reply.error_offset == 20480
        reply = await client.ask_chunks(nbd.CMD_READ, 100, 40_000, DF)
        assert (reply.pieces, reply.error, reply.error_offset) == ([], nbd.EIO, 100)
        # The connection goes on.
        reply = await client.ask_chunks(nbd.CMD_READ, 0, 4096)
        assert reply.data(0, 4096) == node.data[:4096]


@both
@pytest.mark.parametrize("inline", [True, False])
async def test_errors_say_why(tmp_path, extended, inline):
    node = FakeNode()
    node.inline = inline
    async with serving(tmp_path, node, FakeNode(9, read_only=True)) as served:
        client = await served.connect_chunked(extended=extended)
        data_flag = write_flags(extended)

        async def error(command, offset=0, length=0, flags=0, payload=b""):
            reply = await client.ask_chunks(command, offset, length, flags, payload)
            assert not reply.pieces
            assert reply.text.isprintable()
            assert reply.text
            return reply.error

        assert await error(nbd.CMD_READ, MiB, 1) == nbd.EINVAL
        assert await error(nbd.CMD_WRITE, MiB, 1, data_flag, b"x") == nbd.ENOSPC
        assert await error(nbd.CMD_READ, 0, 32 * MiB + 1) == nbd.EOVERFLOW
        assert await error(nbd.CMD_READ, 0, 32 * MiB + 1, DF) == nbd.EOVERFLOW
        assert await error(nbd.CMD_READ, 0, 1, REQ_ONE) == nbd.EINVAL
        assert await error(nbd.CMD_WRITE_ZEROES, 0, 4096, DF) == nbd.EINVAL
        assert await error(nbd.CMD_FLUSH, 5, 0) == nbd.EINVAL
        assert await error(nbd.CMD_RESIZE, 0, 5) == nbd.EINVAL
        assert await error(0xFFFF, 0, 5) == nbd.EINVAL
        assert await error(nbd.CMD_BLOCK_STATUS, 0, 4096) == nbd.EINVAL
        zero = nbd.CMD_FLAG_FAST_ZERO
        assert await error(nbd.CMD_WRITE_ZEROES, 0, 100, zero) == nbd.ENOTSUP
        node.failure = EIO_ERROR
        assert await error(nbd.CMD_READ, 0, 4096) == nbd.EIO
        assert await error(nbd.CMD_READ, 0, 70_000) == nbd.EIO
        assert await error(nbd.CMD_WRITE, 0, 1, data_flag, b"x") == nbd.EIO
        node.failure = None
        client = await served.connect_chunked(extended=extended, name="1")
        assert await error(nbd.CMD_WRITE, 0, 1, data_flag, b"x") == nbd.EPERM
        assert await error(nbd.CMD_TRIM, 0, 1) == nbd.EPERM


@both
async def test_replies_of_concurrent_requests(tmp_path, extended, seed):
    node = striped()
    node.inline = False
    for offset in range(0, 20_000, 512):
        node.delays[offset] = (offset * 7919 + seed) % 13 / 1000
    async with serving(tmp_path, node) as served:
        client = await served.connect_chunked(BASE, extended=extended)
        requests, wanted = b"", {}
        for offset in range(0, 20_000, 512):
            requests += client.request(nbd.CMD_READ, offset, 20_000)
            wanted[client.nb_cookies] = offset
            requests += client.request(nbd.CMD_BLOCK_STATUS, offset, 20_000)
        client.writer.write(requests)
        replies = await client.replies(2 * len(wanted))
    for cookie, offset in wanted.items():
        data = replies[cookie].data(offset, 20_000)
        assert data == node.data[offset : offset + 20_000]
        status = replies[cookie + 1].contexts[0]
        assert sum(length for length, _ in status) == 20_000
    assert list(replies) != sorted(replies)


# -- block status ------------------------------------------------------------------


@both
async def test_block_status(tmp_path, extended):
    node = striped()
    node.dirty_bitmaps["b0"] = Bitmap()
    bitmap = "qemu:dirty-bitmap:b0"
    async with serving(tmp_path, node) as served:
        client = await served.connect_chunked(BASE, DEPTH, bitmap, extended=extended)
        reply = await client.ask_chunks(nbd.CMD_BLOCK_STATUS, 0, 22_000)
        # A change of depth alone splits no extent of base:allocation.
        assert reply.contexts == {
            0: [(4096, 0), (16384, 3), (512, 0), (1008, 3)],
            1: [(12288, 1), (8704, 2), (1008, 0)],
            2: [(4096, 0), (4096, 1)] * 2 + [(4096, 0)],
        }
        reply = await client.ask_chunks(nbd.CMD_BLOCK_STATUS, 0, 22_000, REQ_ONE)
        assert reply.contexts == {0: [(4096, 0)], 1: [(12288, 1)], 2: [(4096, 0)]}
        reply = await client.ask_chunks(nbd.CMD_BLOCK_STATUS, 4096, 1, REQ_ONE)
        assert reply.contexts[0] == [(1, 3)]
        node.dirty_bitmaps.clear()
        reply = await client.ask_chunks(nbd.CMD_BLOCK_STATUS, 0, 22_000)
        assert reply.error == nbd.EIO
        assert "b0" in reply.text


async def test_one_extent_where_another_context_has_thousands(tmp_path):
    node = FakeNode(1 << 20)
    node.status = [(512, 0, 1 + i % 2) for i in range(2047)] + [(512, 3, 0)]
    async with serving(tmp_path, node) as served:
        client = await served.connect_chunked(BASE, DEPTH, extended=False)
        reply = await client.ask_chunks(nbd.CMD_BLOCK_STATUS, 0, 1 << 20, REQ_ONE)
        assert reply.contexts == {0: [(2047 * 512, 0)], 1: [(512, 1)]}


@both
async def test_block_status_that_is_refused(tmp_path, extended):
    async with serving(tmp_path, striped()) as served:
        client = await served.connect_chunked(BASE, extended=extended)
        for offset, length, flags in (
            (0, 0, 0),
            (client.size - 1, 2, 0),
            ((1 << 64) - 1, 1, 0),
            (0, 1, DF),
            (0, 1, nbd.CMD_FLAG_NO_HOLE),
        ):
            reply = await client.ask_chunks(nbd.CMD_BLOCK_STATUS, offset, length, flags)
            assert reply.error == nbd.EINVAL
        if not extended:
            reply = await client.ask_chunks(nbd.CMD_BLOCK_STATUS, 0, 1, PAYLOAD)
            assert reply.error == nbd.EINVAL


async def test_block_status_without_structured_replies(tmp_path):
    async with serving(tmp_path, striped()) as served:
        client = await served.connect()
        assert await client.call(nbd.CMD_BLOCK_STATUS, 0, 4096) == nbd.EINVAL


async def test_contexts_of_another_export(tmp_path):
    async with serving(tmp_path, striped(), striped()) as served:
        client = await served.connect_raw()
        await client.greet()
        await client.negotiate(BASE, extended=False)
        await client.go("1")
        reply = await client.ask_chunks(nbd.CMD_BLOCK_STATUS, 0, 4096)
        assert reply.error == nbd.EINVAL


# -- extended headers --------------------------------------------------------------


def payload_of(length, *ids):
    return length.to_bytes(8, "big") + b"".join(i.to_bytes(4, "big") for i in ids)


@pytest.mark.parametrize("read_only", [False, True])
async def test_a_subset_of_contexts(tmp_path, read_only):
    async with serving(tmp_path, striped(read_only=read_only)) as served:
        client = await served.connect_chunked(BASE, DEPTH, extended=True)
        assert client.flags & nbd.FLAG_BLOCK_STATUS_PAYLOAD

        async def ask(payload, flags=PAYLOAD):
            return await client.ask_chunks(
                nbd.CMD_BLOCK_STATUS, 0, len(payload), flags, payload
            )

        reply = await ask(payload_of(22_000, 1))
        assert reply.contexts == {1: [(12288, 1), (8704, 2), (1008, 0)]}
        reply = await ask(payload_of(22_000, 1, 0))
        assert list(reply.contexts) == [1, 0]
        reply = await ask(payload_of(22_000, 0), PAYLOAD | REQ_ONE)
        assert reply.contexts == {0: [(4096, 0)]}
        for payload in (
            b"",
            b"short",
            payload_of(22_000),
            payload_of(22_000, 2),
            payload_of(22_000, 0, 0),
            payload_of(22_000, 0) + b"x",
            payload_of(0, 0),
            payload_of(1 << 63, 0),
            payload_of((1 << 64) - 1, 0),
            bytes(70_000),
        ):
            reply = await ask(payload)
            assert reply.error == nbd.EINVAL
            assert not reply.contexts
        # Still in sync.
        assert (await ask(payload_of(1, 0))).contexts == {0: [(1, 0)]}


async def test_effect_lengths_of_64_bits(tmp_path):
    huge = 1 << 44

    class HugeNode(FakeNode):
        size = huge

    node = HugeNode(1)
    node.status = [(huge, 3, 0)]

    async def write_zeroes(offset, length, **options):
        node.log.append(("write_zeroes", offset, length))

    node.write_zeroes = write_zeroes
    async with serving(tmp_path, node) as served:
        client = await served.connect_chunked(BASE, extended=True)
        for command, name in (
            (nbd.CMD_WRITE_ZEROES, "write_zeroes"),
            (nbd.CMD_TRIM, "discard"),
            (nbd.CMD_CACHE, "prefetch"),
        ):
            assert not (await client.ask_chunks(command, 512, huge - 512)).error
            assert (name, 512, huge - 512) in node.log
        reply = await client.ask_chunks(nbd.CMD_BLOCK_STATUS, 0, huge)
        assert reply.contexts == {0: [(huge, 3)]}
        reply = await client.ask_chunks(nbd.CMD_TRIM, 1, huge)
        assert reply.error == nbd.EINVAL
        reply = await client.ask_chunks(nbd.CMD_READ, 0, huge)
        assert reply.error == nbd.EOVERFLOW


async def test_payloads_where_none_belongs(tmp_path):
    node = FakeNode()
    async with serving(tmp_path, node) as served:
        client = await served.connect_chunked(BASE, extended=True)
        for command in (0, 3, 4, 5, 6, 999):
            reply = await client.ask_chunks(command, 0, 5000, PAYLOAD, bytes(5000))
            assert reply.error == nbd.EINVAL
        assert (await client.ask_chunks(nbd.CMD_FLUSH)).error == 0


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("length", [1, 4096, 65537])
async def test_writes_of_qemu_lack_the_flag(tmp_path, inline, length):
    node = FakeNode()
    node.inline = inline
    async with serving(tmp_path, node) as served:
        client = await served.connect_chunked(extended=True)
        data = b"x" * length
        for flags in (0, nbd.CMD_FLAG_FUA):
            reply = await client.ask_chunks(nbd.CMD_WRITE, 5, length, flags, data)
            assert not reply.error
            assert node.data[5 : 5 + length] == data


@pytest.mark.parametrize("command", [0, 1, 7, 999])
async def test_a_payload_beyond_all_limits_closes(tmp_path, caplog, command):
    async with serving(tmp_path, FakeNode()) as served:
        client = await served.connect_chunked(extended=True)
        client.writer.write(client.request(command, 0, 1 << 33, PAYLOAD))
        assert await client.reader.read() == b""
    assert "a payload of 8589934592 bytes" in caplog.text


# -- ends --------------------------------------------------------------------------


@both
async def test_data_behind_disc_is_not_looked_at(tmp_path, extended):
    node = FakeNode()
    async with serving(tmp_path, node) as served:
        client = await served.connect_chunked(extended=extended)
        client.writer.write(
            client.request(nbd.CMD_DISC)
            + client.request(nbd.CMD_WRITE, 0, 1, write_flags(extended))
            + b"x garbage"
        )
        assert await client.reader.read() == b""
    assert ("try_pwrite", 0, 1) not in node.log


async def test_options_while_the_server_stops(tmp_path, monkeypatch):
    # Longer than a busy machine lets anybody wait.
    monkeypatch.setattr(connection_module, "_DRAIN_TIMEOUT", 3)
    async with serving(tmp_path, FakeNode()) as served:
        client, silent = await served.connect_raw(), await served.connect_raw()
        await client.greet()
        await client.ask(nbd.OPT_LIST)
        served.server.stop()
        await asyncio.sleep(0.05)
        ((reply, text),) = await client.ask(nbd.OPT_GO, bytes(6))
        assert (reply, text) == (
            nbd.REP_ERR_SHUTDOWN,
            b"the server is shutting down",
        )
        assert await client.reader.read() == b""
        # Who says nothing is not waited for.
        assert len(await silent.reader.read()) == 18

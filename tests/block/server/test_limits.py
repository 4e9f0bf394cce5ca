"""What one client can't take from the others, and what it is told."""

import asyncio
import errno
import gc
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest

from nbdqcow.buffers import BufferPool
from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd
from nbdqcow.server import sockets
from nbdqcow.server.options import ServerOptions
from nbdqcow.units import KiB, MiB
from tests.block.server.support import FakeNode, Refused, serving, settle

pytestmark = pytest.mark.asyncio


def resident():
    """Return the bytes of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def nb_descriptors():
    return len(os.listdir("/proc/self/fd"))


async def test_a_write_that_no_memory_is_left_for(tmp_path, monkeypatch, caplog):
    def acquire(pool, length):
        raise MemoryError

    async with serving(tmp_path, FakeNode(8 * MiB)) as served:
        greedy, other = await served.connect(), await served.connect()
        with monkeypatch.context() as patch:
            patch.setattr(BufferPool, "acquire", acquire)
            greedy.writer.write(greedy.request(nbd.CMD_READ, 0, 512))
            greedy.writer.write(greedy.request(nbd.CMD_WRITE, 0, 8 * MiB) + b"data")
            assert (await greedy.reply(512))[:2] == (1, 0)
            assert await greedy.reader.read() == b""
        assert caplog.messages == ["client on a unix socket closed: out of memory"]
        assert await other.write(0, bytes(8 * MiB)) == 0


async def test_headers_of_large_writes_take_no_memory(tmp_path):
    async with serving(tmp_path, FakeNode(32 * MiB)) as served:
        before = resident()
        for _ in range(20):
            client = await served.connect()
            client.writer.write(client.request(nbd.CMD_WRITE, 0, 32 * MiB) + b"data")
        connections = served.server._connections
        await settle(lambda: all(c._transmission._reader.arriving for c in connections))
        assert len(connections) == 20
        assert resident() - before < 200 * MiB
        for client in served.clients:
            client.close()


class FullSocket(socket.socket):
    """One that has no file descriptor for a client while ``full``."""

    full = True
    nb_refused = 0

    def accept(self):
        if self.full:
            self.nb_refused += 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


async def test_files_that_run_out_are_told_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sockets, "_RETRY_DELAY", 0.01)
    path = str(tmp_path / "s")
    sock = FullSocket(socket.AF_UNIX)
    sock.bind(path)
    accepted = []
    listener = sockets.Listener(sock, accepted.append)
    for nb_told in (1, 2):
        sock.full, sock.nb_refused = True, 0
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            await settle(lambda: sock.nb_refused >= 3)
            assert (
                caplog.messages
                == ["no client can be accepted: Too many open files"] * nb_told
            )
            sock.full = False
            await settle(lambda: accepted)
            accepted.pop().close()
            # It has seen that nobody else waits.
            await settle(lambda: not listener._exhausted)
    listener.close()


async def test_clients_of_one_export(tmp_path):
    options = ServerOptions(max_export_connections=2)
    async with serving(tmp_path, FakeNode(), FakeNode(), options=options) as served:
        first, second = await served.connect(), await served.connect()
        third = await served.connect_raw()
        await third.greet()
        with pytest.raises(Refused, match="has 2 clients already") as raised:
            await third.go("")
        assert raised.value.reply == nbd.REP_ERR_POLICY
        # Asking is free, and the haggling goes on.
        third.writer.write(codec.option_request(nbd.OPT_INFO, codec.info_request("")))
        reply = nbd.REP_INFO
        while reply != nbd.REP_ACK:
            assert reply == nbd.REP_INFO
            head = await third.reader.readexactly(codec.OPTION_REPLY.size)
            _, _, reply, length = codec.OPTION_REPLY.unpack(head)
            await third.reader.readexactly(length)
        await third.go("1")
        await first.disconnect()
        fourth = await served.connect_raw()
        await fourth.greet()
        await settle(lambda: len(served.server._connections) == 3)
        await fourth.go("")
        # The old option has no error reply.
        fifth = await served.connect_raw()
        await fifth.greet()
        fifth.writer.write(codec.option_request(nbd.OPT_EXPORT_NAME))
        assert await fifth.reader.read() == b""
        await second.disconnect()


async def test_a_refused_client_can_abort(tmp_path):
    options = ServerOptions(max_connections=1)
    async with serving(tmp_path, FakeNode(), options=options) as served:
        await served.connect()
        other = await served.connect_raw()
        await other.greet()
        other.writer.write(codec.option_request(nbd.OPT_LIST))
        head = await other.reader.readexactly(codec.OPTION_REPLY.size)
        _, option, reply, length = codec.OPTION_REPLY.unpack(head)
        assert (option, reply) == (nbd.OPT_LIST, nbd.REP_ERR_POLICY)
        await other.reader.readexactly(length)
        other.writer.write(codec.option_request(nbd.OPT_ABORT))
        assert len(await other.reader.read()) == codec.OPTION_REPLY.size
        # One that has no place does not keep the server from ending.
        third = await served.connect_raw()
        await third.greet()
        await served.stop()


async def test_option_length(tmp_path):
    options = ServerOptions(max_option_length=100)
    async with serving(tmp_path, FakeNode(), options=options) as served:
        client = await served.connect_raw()
        await client.greet()
        with pytest.raises(Refused, match="too many") as raised:
            await client.go("x" * 100)
        assert raised.value.reply == nbd.REP_ERR_TOO_BIG
        await client.go("")


async def test_idle_client_is_closed(tmp_path, caplog):
    options = ServerOptions(idle_timeout=0.3)
    async with serving(tmp_path, FakeNode(), options=options) as served:
        idle = await served.connect()
        alive = await served.connect()
        waiting = await served.connect()
        served.server._exports[""].node.gate.clear()
        waiting.writer.write(waiting.request(nbd.CMD_FLUSH))

        async def stay_alive():
            while True:
                await alive.read(0, 512)
                await asyncio.sleep(0.05)

        task = asyncio.create_task(stay_alive())
        # One that was silent is gone; one that waits for us is not.
        assert await idle.reader.read() == b""
        assert "sent nothing for 0.3 seconds" in caplog.text
        assert caplog.text.count("closed") == 1
        served.server._exports[""].node.gate.set()
        assert (await waiting.reply())[1] == 0
        assert not task.done()
        task.cancel()


async def test_client_that_never_reads(tmp_path, caplog):
    options = ServerOptions(reply_timeout=0.3)
    node = FakeNode(4 * MiB)
    async with serving(tmp_path, node, options=options) as served:
        stuck, alive = await served.connect(), await served.connect()
        stuck.writer.transport.pause_reading()
        for _ in range(20):
            stuck.writer.write(stuck.request(nbd.CMD_READ, 0, 4 * MiB))
        async with asyncio.timeout(20):
            while "took no replies" not in caplog.text:
                assert await alive.read(0, 512) == node.data[:512]
                await asyncio.sleep(0.02)
        await settle(lambda: len(served.server._connections) == 1)
        assert not node.tokens


async def test_slow_reader_stays(tmp_path, caplog):
    options = ServerOptions(reply_timeout=1.0)
    node = FakeNode(4 * MiB)
    async with serving(tmp_path, node, options=options) as served:
        slow = await served.connect()
        for _ in range(3):
            slow.writer.write(slow.request(nbd.CMD_READ, 0, 4 * MiB))
        left = 3 * (4 * MiB + 16)
        while left:
            data = await slow.reader.read(256 * KiB)
            assert data
            left -= len(data)
            await asyncio.sleep(0.03)
        assert "closed" not in caplog.text


async def test_who_waits_for_a_server_that_was_held_up_stays(tmp_path, caplog):
    options = ServerOptions(reply_timeout=0.4, idle_timeout=0.4)
    node = FakeNode(4 * MiB)
    async with serving(tmp_path, node, options=options) as served:
        slow, quiet = await served.connect(), await served.connect()
        for _ in range(3):
            slow.writer.write(slow.request(nbd.CMD_READ, 0, 4 * MiB))
        await slow.reader.read(256 * KiB)
        time.sleep(1)  # the whole loop stands still
        assert await quiet.read(0, 512) == node.data[:512]
        assert "closed" not in caplog.text


async def test_drip_in_the_handshake(tmp_path, caplog):
    options = ServerOptions(handshake_timeout=0.3)
    async with serving(tmp_path, FakeNode(), options=options) as served:
        client = await served.connect_raw()
        alive = await served.connect()

        async def drip():
            for byte in codec.CLIENT_FLAGS.pack(3) + bytes(1000):
                client.writer.write(bytes([byte]))
                await asyncio.sleep(0.02)

        task = asyncio.create_task(drip())
        with suppress(ConnectionError):
            await client.reader.read()
        task.cancel()
        assert "no handshake in time" in caplog.text or "magic" in caplog.text
        assert await alive.read(0, 4) == b"\0\1\2\3"


async def test_idle_clients_take_little_memory(tmp_path):
    options = ServerOptions(max_connections=400)
    node = FakeNode(2 * MiB)
    async with serving(tmp_path, node, options=options) as served:
        clients = [await served.connect() for _ in range(100)]
        gc.collect()
        before = resident()
        clients += [await served.connect() for _ in range(200)]
        # Fill the receive buffers: a batch of writes, answered together. One client
        # after the other, for what waits to be sent is memory of this process, too.
        for client in clients:
            client.writer.write(
                b"".join(
                    client.request(nbd.CMD_WRITE, 0, 4096) + bytes(4096)
                    for _ in range(64)
                )
            )
            for _ in range(64):
                assert (await client.reply())[1] == 0
        now = asyncio.get_running_loop().time()
        for _ in range(2):
            for connection in served.server._connections:
                connection.check_quiet(now, held_up=False)
        gc.collect()
        # Both ends are in this process.
        assert resident() - before < 30 * MiB


async def test_connecting_and_leaving_leaves_nothing(tmp_path):
    async with serving(tmp_path, FakeNode()) as served:

        async def cycle(nb):
            for index in range(nb):
                reader, writer = await asyncio.open_unix_connection(str(served.path))
                await reader.readexactly(codec.GREETING.size)
                if index % 3:
                    writer.write(
                        codec.CLIENT_FLAGS.pack(3)
                        + codec.option_request(nbd.OPT_GO, codec.info_request(""))
                        + codec.request(nbd.CMD_READ, 1, 0, 4096)
                        + codec.request(nbd.CMD_DISC, 2) * (index % 3 - 1)
                    )
                    await reader.readexactly(4096)
                writer.transport.abort()
            await settle(lambda: not served.server._connections)
            gc.collect()

        await cycle(100)
        fds, memory = nb_descriptors(), resident()
        await cycle(1000)
        assert nb_descriptors() == fds
        assert resident() - memory < 4 * MiB

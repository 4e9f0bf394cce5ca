"""Listeners, clients coming and going, and the end of a server."""

import asyncio
import errno
import logging
import os
import signal
import socket
import threading
from contextlib import suppress

import pytest

from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd
from nbdqcow.server import sockets
from nbdqcow.server.options import ServerOptions
from nbdqcow.server.server import Server
from nbdqcow.server.sockets import as_stream
from tests.block.server.support import (
    EIO_ERROR,
    Client,
    FakeNode,
    Refused,
    serving,
    settle,
)

MiB = 1 << 20
pytestmark = pytest.mark.asyncio


async def test_exports_by_name(tmp_path):
    nodes = [FakeNode(1000 * n) for n in (1, 2, 3)]
    async with serving(tmp_path, *nodes) as served:
        assert [(await served.connect(name)).size for name in ("", "1", "2")] == [
            1000,
            2000,
            3000,
        ]
        with pytest.raises(ValueError, match="there is an export '1' already"):
            served.server.add_export("1", nodes[0])
        client = await served.connect_raw()
        await client.greet()
        client.writer.write(
            codec.option_request(nbd.OPT_GO, codec.info_request("none"))
        )
        head = await client.reader.readexactly(codec.OPTION_REPLY.size)
        assert codec.OPTION_REPLY.unpack(head)[2] == nbd.REP_ERR_UNKNOWN


async def test_a_sole_export_is_the_default_one(tmp_path):
    async with serving(tmp_path) as served:
        served.server.add_export("disk", FakeNode(555))
        assert (await served.connect()).size == 555
        assert (await served.connect("disk")).size == 555
        served.server.add_export("other", FakeNode(556))
        with pytest.raises(Refused, match="no export"):
            await served.connect()


async def test_an_export_may_be_read_only_without_multi_conn(tmp_path):
    async with serving(tmp_path) as served:
        node = FakeNode()
        served.server.add_export("", node, read_only=True, multi_conn=False)
        client = await served.connect()
        assert client.flags & nbd.FLAG_READ_ONLY
        assert not client.flags & nbd.FLAG_CAN_MULTI_CONN
        assert await client.write(0, b"x") == nbd.EPERM


async def test_tcp(tmp_path):
    node = FakeNode()
    async with serving(tmp_path, node) as served:
        ((host, port),) = await served.server.listen_tcp("127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(host, port)
        client = Client(reader, writer)
        served.clients.append(client)
        await client.greet()
        await client.go("")
        assert await client.read(1, 100) == node.data[1:101]
        with pytest.raises(OSError) as caught:
            await served.server.listen_tcp("127.0.0.1", port)
        assert caught.value.errno == errno.EADDRINUSE


async def test_a_given_socket(tmp_path):
    node = FakeNode()
    async with serving(tmp_path, node) as served:
        for family, address in (
            (socket.AF_INET, ("127.0.0.1", 0)),
            (socket.AF_UNIX, str(tmp_path / "given")),
        ):
            sock = socket.socket(family)
            sock.bind(address)
            bound = sock.getsockname()
            await served.server.listen_socket(sock)
            if family == socket.AF_INET:
                streams = await asyncio.open_connection(*bound)
            else:
                streams = await asyncio.open_unix_connection(bound)
            client = Client(*streams)
            served.clients.append(client)
            await client.greet()
            await client.go("")
            assert await client.read(1, 9) == node.data[1:10]


async def test_a_stale_socket_is_replaced_and_ours_removed(tmp_path):
    path = tmp_path / "socket"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    async with serving(tmp_path, FakeNode()) as served:
        assert (await served.connect()).size == MiB
        server = Server()
        with pytest.raises(OSError) as caught:
            await server.listen_unix(str(path))
        assert caught.value.errno == errno.EADDRINUSE
        assert (await served.connect()).size == MiB
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(OSError) as caught:
        await Server().listen_unix(str(path))
    assert caught.value.errno == errno.EADDRINUSE
    assert path.read_text() == "precious"
    with pytest.raises(OSError) as caught:
        await Server().listen_unix(str(tmp_path / "none" / "socket"))
    assert caught.value.errno == errno.ENOENT


async def test_a_label_is_the_thread_s_while_the_socket_is_made(tmp_path, monkeypatch):
    """As SELinux reads it: a string with its NUL, and an empty write at the end."""
    writes = []
    attribute = tmp_path / "sockcreate"
    attribute.touch()
    monkeypatch.setattr(sockets, "_SOCKET_LABEL", str(attribute))
    to_file = os.write
    make = socket.socket

    def write(fd, data):
        if os.readlink(f"/proc/self/fd/{fd}") == str(attribute):
            writes.append((threading.get_ident(), data))
            return len(data)
        return to_file(fd, data)

    def make_socket(*arguments):
        writes.append((threading.get_ident(), "socket"))
        return make(*arguments)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(sockets.socket, "socket", make_socket)
    sock, _ = await asyncio.to_thread(sockets.listen_unix_blocking, str(tmp_path / "a"))
    sock.close()
    assert [what for _, what in writes] == ["socket"]
    writes.clear()
    label = "system_u:object_r:svirt_socket_t:s0"
    sock, _ = await asyncio.to_thread(
        sockets.listen_unix_blocking, str(tmp_path / "b"), label=label
    )
    sock.close()
    assert [what for _, what in writes] == [f"{label}\0".encode(), "socket", b""]
    assert len({thread for thread, _ in writes}) == 1


@pytest.mark.parametrize("mode", [None, 0o600])
async def test_a_unix_socket_listens_at_once(tmp_path, monkeypatch, mode):
    path = tmp_path / "socket"
    to_stat = os.stat
    answers = []

    def stat(name):
        # A client that waits for the file is here right after it.
        with socket.socket(socket.AF_UNIX) as client:
            answers.append(client.connect_ex(str(path)))
        return to_stat(name)

    monkeypatch.setattr(sockets.os, "stat", stat)
    sock, file = sockets.listen_unix_blocking(str(path), mode=mode)
    monkeypatch.undo()
    # Permissions that are asked for are there before anybody can connect.
    assert answers == [0 if mode is None else errno.ECONNREFUSED]
    with socket.socket(socket.AF_UNIX) as client:
        assert client.connect_ex(str(path)) == 0
    file.remove()
    sock.close()


async def test_a_socket_of_somebody_else_is_not_removed(tmp_path):
    path = tmp_path / "socket"
    async with serving(tmp_path, FakeNode()):
        path.unlink()
        other = socket.socket(socket.AF_UNIX)
        other.bind(str(path))
    assert path.exists()
    other.close()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
async def test_tcp_options(tmp_path, address):
    """Of a listener that asyncio did not make, whose protocol is 0."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    async with serving(tmp_path, FakeNode()) as served:
        sock = socket.socket(family)
        sock.bind((address, 0))
        port = sock.getsockname()[1]
        await served.server.listen_socket(sock)
        _, writer = await asyncio.open_connection(address, port)
        await settle(lambda: len(served.server._connections) == 1)
        (connection,) = served.server._connections
        ours = connection._transport.get_extra_info("socket")
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
        writer.transport.abort()


async def test_families_that_event_loops_do_not_know(tmp_path):
    """As vsock is one; a unix socket in disguise stands for it here."""
    ours, theirs = socket.socketpair()
    assert as_stream(ours) is ours
    strange = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM, fileno=theirs.detach())
    async with serving(tmp_path, FakeNode()) as served:
        await served.server.serve_socket(strange)
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        client = Client(reader, writer)
        served.clients.append(client)
        await client.greet()
        await client.go("")
        assert await client.read(1, 2) == b"\1\2"
        await client.disconnect()


async def test_last_client_without_listeners(tmp_path):
    server = Server()
    server.add_export("", FakeNode())
    running = asyncio.create_task(server.run_until_stopped())
    ours, theirs = socket.socketpair()
    await server.serve_socket(theirs)
    ours.close()
    await asyncio.wait_for(running, 20)


async def test_a_last_flush_that_fails_names_the_image():
    for failure, text in (
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "'disk.img': No space left on device",
        ),
        (
            OSError(errno.EIO, "'disk.img': written data may be lost"),
            "'disk.img': written data may be lost",
        ),
    ):
        server, node = Server(), FakeNode()
        node.failure = failure
        server.add_export("", node)
        server.stop()
        with pytest.raises(OSError) as raised:
            await server.run_until_stopped()
        assert (raised.value.errno, raised.value.strerror) == (failure.errno, text)


async def test_too_many_connections(tmp_path, caplog):
    options = ServerOptions(max_connections=2)
    async with serving(tmp_path, FakeNode(), options=options) as served:
        first = await served.connect()
        second = await served.connect_raw()
        await second.greet()
        for _ in range(3):
            third = await served.connect_raw()
            await third.greet()
            with pytest.raises(Refused, match="has 2 clients already") as raised:
                await third.go("")
            assert raised.value.reply == nbd.REP_ERR_POLICY
        # Only so many are told why.
        others = [await served.connect_raw() for _ in range(30)]
        greeted = 0
        for other in others:
            try:
                await other.greet()
                greeted += 1
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
        assert greeted == 13
        assert caplog.text.count("client refused: there are 2 already") == 1
        await first.disconnect()
        await settle(lambda: len(served.server._connections) == 1)
        assert (await served.connect()).size == MiB


async def test_clients_wait_for_a_place(tmp_path):
    options = ServerOptions(
        max_connections=1, wait_when_full=True, handshake_timeout=0.2
    )
    async with serving(tmp_path, FakeNode(), options=options) as served:
        first = await served.connect()
        eager, patient, gone = [await served.connect_raw() for _ in range(3)]
        eager.writer.write(
            codec.CLIENT_FLAGS.pack(nbd.FLAG_C_FIXED_NEWSTYLE)
            + codec.option_request(nbd.OPT_LIST)
        )
        gone.close()
        # Longer than the handshake may take: that time has not begun.
        await asyncio.sleep(0.4)
        assert await first.read(0, 1) == b"\0"
        await first.disconnect()
        greeting = await eager.reader.readexactly(codec.GREETING.size)
        assert greeting.startswith(b"NBDMAGICIHAVEOPT")
        await eager.reader.readexactly(codec.OPTION_REPLY.size)
        eager.writer.write(codec.option_request(nbd.OPT_ABORT))
        await patient.greet()
        await patient.go("")
        await patient.disconnect()
        assert (await served.connect()).size == MiB


async def test_clients_that_wait_do_not_hold_up_the_end(tmp_path):
    options = ServerOptions(max_connections=1, wait_when_full=True)
    async with serving(tmp_path, FakeNode(), options=options) as served:
        served.server.on_last_disconnect = served.server.stop
        first = await served.connect()
        waiting = await served.connect_raw()
        await settle(lambda: len(served.server._waiting) == 1)
        await first.disconnect()
        assert await waiting.reader.read() == b""
        await served.stop()


async def test_handshake_timeout(tmp_path, caplog):
    options = ServerOptions(handshake_timeout=0.05)
    async with serving(tmp_path, FakeNode(), options=options) as served:
        ready = await served.connect()
        silent = await served.connect_raw()
        await silent.greet()
        assert await silent.reader.read() == b""
        assert "closed: no handshake in time" in caplog.text
        await asyncio.sleep(0.1)
        assert await ready.read(0, 1) == b"\0"


async def test_options_without_reading_replies_are_bounded(tmp_path):
    async with serving(tmp_path) as served:
        for index in range(50):
            served.server.add_export(f"{index}{'x' * 4000}", FakeNode())
        client = await served.connect_raw()
        client.writer.write(codec.CLIENT_FLAGS.pack(nbd.FLAG_C_FIXED_NEWSTYLE))
        # Each of these is answered with 200 kB.
        for _ in range(100):
            client.writer.write(codec.option_request(nbd.OPT_LIST))
            await asyncio.sleep(0.01)
        (connection,) = served.server._connections
        assert connection._transport.get_write_buffer_size() < 3 * MiB
        head = await client.reader.readexactly(codec.GREETING.size)
        assert head.startswith(b"NBDMAGIC")


async def test_a_handshake_whose_replies_have_not_left(tmp_path):
    node = FakeNode()
    async with serving(tmp_path, node) as served:
        for index in range(50):
            served.server.add_export(f"{index}{'x' * 4000}", node)
        client = await served.connect_raw()
        await client.greet()
        client.reader._transport.pause_reading()
        (connection,) = served.server._connections
        sock = connection._transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.writer.write(
            codec.option_request(nbd.OPT_LIST) * 5
            + codec.option_request(nbd.OPT_GO, codec.info_request(""))
            + client.request(nbd.CMD_READ, 5, 5)
        )
        await settle(lambda: connection.negotiated)
        assert connection._transport.get_write_buffer_size() > 0
        assert node.log == []
        client.reader._transport.resume_reading()
        nb_acks = 0
        while nb_acks < 6:
            head = await client.reader.readexactly(codec.OPTION_REPLY.size)
            _, _, reply, length = codec.OPTION_REPLY.unpack(head)
            await client.reader.readexactly(length)
            nb_acks += reply == nbd.REP_ACK
        assert await client.reply(5) == (1, 0, node.data[5:10])
        assert await client.read(1, 9) == node.data[1:10]


async def test_a_bad_handshake_closes(tmp_path, caplog):
    async with serving(tmp_path, FakeNode()) as served:
        client = await served.connect_raw()
        client.writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await client.reader.read()
        assert client.reader.at_eof()
        assert "client on a unix socket closed:" in caplog.text


async def test_last_disconnect(tmp_path):
    async with serving(tmp_path, FakeNode()) as served:
        calls = []
        served.server.on_last_disconnect = lambda: calls.append(1)
        first, second = await served.connect(), await served.connect()
        lister = await served.connect_raw()
        await first.disconnect()
        second.close()
        await settle(lambda: len(served.server._connections) == 1)
        # One that chose no export does not count, but it is a client.
        lister.close()
        await settle(lambda: not served.server._connections)
        assert calls == []
        third = await served.connect()
        await third.disconnect()
        await settle(lambda: calls == [1])


async def test_stop_finishes_requests_and_flushes(tmp_path):
    node, other = FakeNode(), FakeNode()
    async with serving(tmp_path, node, other) as served:
        served.server.on_last_disconnect = served.server.stop
        served.server.add_export("again", node)
        idle = await served.connect()
        haggling = await served.connect_raw()
        await haggling.greet()
        client = await served.connect()
        node.inline = False
        node.gate.clear()
        client.writer.write(client.request(nbd.CMD_WRITE, 0, 4) + b"data")
        await settle(lambda: node.nb_waiting == 1)
        served.server.stop()
        assert await idle.reader.read() == b""
        assert await haggling.reader.read() == b""
        with pytest.raises((ConnectionError, FileNotFoundError)):
            await served.connect_raw()
        # Whatever comes now gets no answer: the client asks again when it has
        # found a server again, and an error would be its guest's.
        node.inline = True
        client.writer.write(
            client.request(nbd.CMD_READ, 0, 512)
            + client.request(nbd.CMD_WRITE, 8, 4)
            + b"more"
            + client.request(nbd.CMD_WRITE, 8, MiB - 8)
            + bytes(MiB - 8)
        )
        await asyncio.sleep(0.05)
        assert node.log == []
        node.gate.set()
        assert await client.reply() == (1, 0, b"")
        with suppress(ConnectionResetError):
            assert await client.reader.read() == b""
        await served.stop()
        assert node.data[:12] == b"data" + FakeNode().data[4:12]
        assert [entry[0] for entry in node.log] == ["pwrite", "flush"]
        assert other.log == [("flush",)]


async def test_stop_does_not_wait_for_who_asks_nothing_and_reads_nothing(tmp_path):
    options = ServerOptions(close_timeout=0.1)
    async with serving(tmp_path, FakeNode(MiB), options=options) as served:
        client = await served.connect()
        for _ in range(100):
            client.writer.write(client.request(nbd.CMD_READ, 0, MiB))
        client.writer.write_eof()
        (connection,) = served.server._connections
        await settle(
            lambda: (
                connection._transmission._eof and connection._transmission._write_paused
            )
        )
        await served.stop()


async def test_a_failing_last_flush_is_told(tmp_path):
    server = Server()
    nodes = [FakeNode(), FakeNode()]
    nodes[0].failure = EIO_ERROR
    for index, node in enumerate(nodes):
        server.add_export(str(index), node)
    server.stop()
    with pytest.raises(OSError, match="the disk is broken"):
        await server.run_until_stopped()
    assert nodes[1].log == [("flush",)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals(tmp_path, number):
    node = FakeNode()
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        os.kill(os.getpid(), number)
        assert await client.reader.read() == b""
        await served.running
        assert node.log == [("flush",)]


async def test_a_second_signal_gives_up(tmp_path):
    node = FakeNode()
    node.inline = False
    node.gate.clear()
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        client.writer.write(client.request(nbd.CMD_READ, 0, 512))
        await settle(lambda: node.nb_waiting == 1)
        os.kill(os.getpid(), signal.SIGTERM)
        await settle(lambda: served.server._signalled)
        await asyncio.sleep(0.02)
        assert not served.running.done()
        os.kill(os.getpid(), signal.SIGTERM)
        await served.running
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await client.reply(512)
        assert node.log == []
        assert node.nb_waiting == 0


async def test_stop_does_not_wait_for_a_client_that_reads_nothing(tmp_path):
    node = FakeNode()
    options = ServerOptions(close_timeout=0.05)
    async with serving(tmp_path, node, options=options) as served:
        client = await served.connect()
        client.reader._transport.pause_reading()
        for n in range(64):
            client.writer.write(client.request(nbd.CMD_READ, n, 512 << 10))
        await settle(lambda: node.tokens)
        await served.stop()
        assert not node.tokens


async def test_what_clients_do_is_logged_for_who_asks(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "nbdqcow")
    node = FakeNode()
    async with serving(tmp_path, node, node) as served:
        client = await served.connect_chunked(extended=True, name="1")
        await client.disconnect()
        await settle(lambda: not served.server._connections)
        client = await served.connect_raw()
        await client.greet()
        with pytest.raises(Refused):
            await client.go("no\nsuch")
        client.close()
        await settle(lambda: not served.server._connections)
        client = await served.connect_raw()
        await client.greet()
        await client.ask(nbd.OPT_LIST)
        client.close()
        await settle(lambda: not served.server._connections)
    name = "client on a unix socket"
    assert caplog.messages == [
        f"{name} uses the export '1': extended replies, no TLS",
        f"{name} has left the export '1'",
        f"{name} left without an export (it was told: no export 'no\\nsuch')",
        f"{name} left without an export",
    ]

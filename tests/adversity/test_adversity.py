"""Clients and networks at their worst, and what the server has left afterwards."""

import contextlib
import os
import random
import resource
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adversity.proxy import Proxy
from tests.conftest import own_environment
from tests.crash.histories import pattern
from tests.nbd_client import CMD_READ, CMD_WRITE, NbdClient
from tests.serving import (
    Server,
    check_image,
    nbdqcow_img,
    serving,
)

KiB, MiB = 1 << 10, 1 << 20
SIZE = 8 * MiB
NB_CYCLES = int(os.environ.get("NBDQCOW_CYCLES", "1000"))
NB_PROXIED = int(os.environ.get("NBDQCOW_PROXIED", "30"))

NB_OF_A_FILE = 8
"""Descriptors that a server has of an open image now and then, however many
clients there are: mappings of the file for reads and for writes, which come with
the first request that pays, and go when enough went through them."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    nbdqcow_img("create", "-q", "-f", "qcow2", path, SIZE)
    return path


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(4096, hard) if hard != resource.RLIM_INFINITY else 4096
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def nb_descriptors(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def memory(server: Server) -> int:
    """Return the bytes of memory that a server has in use."""
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * KiB


def settled(server: Server, nb_before: int, seconds: float = 60) -> None:
    """Wait until the server has no more descriptors than before, but for those
    that do not come from clients."""
    deadline = time.monotonic() + seconds
    while nb_descriptors(server) > nb_before + NB_OF_A_FILE:
        assert time.monotonic() < deadline, (
            f"{nb_descriptors(server)} descriptors, {nb_before} before"
        )
        time.sleep(0.02)


def hang_up(client: NbdClient, *, rudely: bool) -> None:
    if rudely:
        # A reset instead of an end; on unix sockets what is unread is lost.
        linger = struct.pack("ii", 1, 0)
        client._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    client.close()


def test_clients_that_come_and_go(image, seed, figures):
    """In every state: silent, haggling, with requests half sent, with replies
    unread. Descriptors and memory come back, and others are served."""
    rnd = random.Random(seed)
    with serving(image) as server, NbdClient(server.socket) as steady:
        for _ in range(50):
            come_and_go(server, rnd)
        nb_before = nb_descriptors(server)
        before = memory(server)
        for number in range(NB_CYCLES):
            come_and_go(server, rnd)
            if number % 100 == 0:
                data = pattern(number, 4096)
                steady.write(4096, data)
                assert steady.read(4096, 4096) == data
        settled(server, nb_before)
        grown = memory(server) - before
        assert grown < 24 * MiB, f"{grown >> 20} MiB more than before"
    check_image(image)
    figures(
        f"adversity: {NB_CYCLES} clients came and went, {grown >> 10} KiB more "
        f"memory, seed {seed}"
    )


def come_and_go(server: Server, rnd: random.Random) -> None:
    """Be one client that ends somewhere."""
    if rnd.random() < 0.3:
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(str(server.socket))
            with contextlib.suppress(OSError):
                silent.sendall(rnd.randbytes(rnd.randrange(64)))
        return
    client = NbdClient(server.socket)
    match rnd.randrange(5):
        case 0:
            client.disconnect()
            return
        case 1:
            # The rest of the payload never comes.
            length = rnd.choice((512, 256 * KiB, 4 * MiB))
            part = bytes(rnd.randrange(min(length, 200 * KiB)))
            client._send(
                struct.pack(">IHHQQI", 0x25609513, 0, CMD_WRITE, 1, 0, length) + part
            )
        case 2:
            # Nobody reads the replies.
            for _ in range(rnd.randrange(1, 30)):
                client.submit(CMD_READ, 0, 64 * KiB)
        case 3:
            for _ in range(rnd.randrange(1, 10)):
                client.submit(CMD_WRITE, MiB, 4096, bytes(4096))
        case 4:
            client._send(rnd.randbytes(100))
    hang_up(client, rudely=rnd.random() < 0.5)


def test_a_network_that_mangles(image, tmp_path, seed, figures):
    """Through the proxy each answered write is there, or the connection was cut;
    the server goes on for those who come directly."""
    rnd = random.Random(seed)
    listen = Path(f"/tmp/nbdq-{os.getpid()}-proxy")
    sure: dict[int, bytes] = {}
    try:
        with serving(image) as server:
            nb_before = nb_descriptors(server)
            with Proxy(listen, server.socket, seed, cuts=0.4) as proxy:
                for number in range(NB_PROXIED):
                    offset = number % 64 * 64 * KiB
                    data = pattern(("proxy", number), rnd.choice((512, 5000, 60_000)))
                    sure.pop(offset, None)
                    with (
                        contextlib.suppress(ConnectionError),
                        NbdClient(listen) as client,
                    ):
                        for _ in range(rnd.randrange(1, 5)):
                            client.submit(CMD_READ, 0, rnd.choice((1, 70_000)))
                        client.write(offset, data)
                        client.flush()
                        sure[offset] = data
                with NbdClient(server.socket) as direct:
                    for offset, data in sure.items():
                        assert direct.read(offset, len(data)) == data
            settled(server, nb_before)
    finally:
        listen.unlink(missing_ok=True)
    check_image(image)
    figures(
        f"adversity: {NB_PROXIED} clients behind the proxy, {proxy.nb_cut} cut, "
        f"{proxy.nb_bytes >> 10} KiB mangled, seed {seed}"
    )


def test_many_exports_and_connections(tmp_path, many_files, figures):
    """200 exports and 1,000 connections at once, each of which is served."""
    nb_exports, nb_connections = 200, 1000
    names = []
    for number in range(nb_exports):
        path = tmp_path / f"{number}.raw"
        path.write_bytes(b"%06d" % number + bytes(64 * KiB - 6))
        names.append(f"e{number}={path}")
    options = [*names[1:], "--max-connections", str(nb_connections + 1)]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(
            serving(Path(names[0]), image_format="raw", options=options)
        )
        nb_before = nb_descriptors(server)
        clients = [
            stack.enter_context(NbdClient(server.socket, f"e{i % nb_exports}"))
            for i in range(nb_connections)
        ]
        tokens = [client.submit(CMD_READ, 0, 6) for client in clients]
        for i, (client, token) in enumerate(zip(clients, tokens, strict=True)):
            assert client.wait(token).data == b"%06d" % (i % nb_exports)
        used = memory(server)
        for client in clients:
            client.close()
        settled(server, nb_before)
    figures(
        f"adversity: {nb_exports} exports, {nb_connections} connections, "
        f"{used >> 20} MiB"
    )


_LEAKING = """
import sys, os
from nbdqcow.server.connection import Connection

kept = []
made = Connection.connection_made

def connection_made(self, transport):
    kept.append(os.dup(0))
    kept.append(bytes(100_000))
    made(self, transport)

Connection.connection_made = connection_made
sys.argv[0] = "nbdqcow"
from nbdqcow.cli.main import main
sys.exit(main())
"""


def test_a_broken_server_is_caught(image, seed, monkeypatch):
    """A mutant: something of each client stays."""
    from tests import serving as serving_module

    sound = serving_module.server_command

    def broken(*arguments, **options):
        return [sys.executable, "-c", _LEAKING, *sound(*arguments, **options)[3:]]

    monkeypatch.setattr(serving_module, "server_command", broken)
    assert own_environment()["PYTHONPATH"]
    rnd = random.Random(seed)
    with pytest.raises(AssertionError), serving(image) as server:
        nb_before = nb_descriptors(server)
        for _ in range(20):
            come_and_go(server, rnd)
        settled(server, nb_before, seconds=3)

"""Many clients over TLS, each of which ends in its own way, and their data."""

import contextlib
import os
import random
import socket
import ssl
import struct
import threading
import time
from pathlib import Path

import pytest

from tests.adversity.proxy import Proxy
from tests.adversity.test_adversity import hang_up, memory, nb_descriptors, settled
from tests.certificates import Authority
from tests.nbd_client import CMD_READ, CMD_WRITE, NbdClient
from tests.serving import Server, check_image, nbdqcow_img, serving
from tests.tls_client import TlsNbdClient

KiB, MiB = 1 << 10, 1 << 20
NB_THREADS = 4
REGION = 2 * MiB
NB_CYCLES = int(os.environ.get("NBDQCOW_TLS_CYCLES", "30"))
"""Connections of each thread."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    nbdqcow_img("create", "-q", "-f", "qcow2", path, NB_THREADS * REGION)
    return path


def context_of(authority: Authority) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority.own.pem.decode())
    return context


class Worker(threading.Thread):
    """Clients one after the other in a region of their own.

    Attributes:
        failure: what went wrong.
        data: what the region holds.
        nb_cut: connections that ended before their time.
    """

    def __init__(self, number: int, seed: int, server: Path, proxy: Path, contexts):
        super().__init__()
        self.failure: BaseException | None = None
        self.data = bytearray(REGION)
        self.nb_cut = 0
        self._start = number * REGION
        self._rnd = random.Random(f"{seed}-{number}")
        self._server, self._proxy = server, proxy
        self._place = server
        self._contexts = contexts
        # What a write without an answer may or may not have reached.
        self._unsure: list[tuple[int, int]] = []

    def run(self) -> None:
        try:
            for _ in range(NB_CYCLES):
                self._cycle()
            self._place = self._server
            client = self._connect()
            self._settle(client)
            assert client.read(self._start, REGION) == self.data
            client.disconnect()
        except BaseException as exc:
            self.failure = exc

    def _connect(self) -> TlsNbdClient:
        return TlsNbdClient(self._place, self._rnd.choice(self._contexts))

    def _cycle(self) -> None:
        rnd = self._rnd
        self._place = self._proxy if rnd.random() < 0.15 else self._server
        try:
            client = self._connect()
        except (OSError, TimeoutError):
            self.nb_cut += 1
            return
        with client:
            try:
                self._settle(client)
                for _ in range(rnd.randrange(6)):
                    self._write(client)
                    self._read(client, rnd.randrange(1, 6), pause=0.0)
                self._end(client)
            except OSError as exc:
                if isinstance(exc, TimeoutError):
                    raise
                # By the proxy, or by ourselves.
                self.nb_cut += 1

    def _settle(self, client: NbdClient) -> None:
        """Write anew what may be there in part."""
        for offset, length in self._unsure:
            client.write(self._start + offset, self.data[offset : offset + length])
        self._unsure.clear()

    def _range(self) -> tuple[int, int]:
        rnd = self._rnd
        length = rnd.choice((1, 512, 4096, 16 * KiB, 64 * KiB, 65 * KiB, 200 * KiB))
        return rnd.randrange(REGION - length), length

    def _write(self, client: NbdClient) -> None:
        """Large and small ones together, and all of them answered."""
        tokens, first = [], len(self._unsure)
        for _ in range(self._rnd.randrange(1, 5)):
            offset, length = self._range()
            if any(o < offset + length and offset < o + n for o, n in self._unsure):
                # Two that overlap may be done in any order.
                continue
            data = self._rnd.randbytes(length)
            self._unsure.append((offset, length))
            self.data[offset : offset + length] = data
            tokens.append(client.submit(CMD_WRITE, self._start + offset, length, data))
        for token in tokens:
            assert not client.wait(token).error
        del self._unsure[first:]

    def _read(self, client: NbdClient, nb_reads: int, *, pause: float) -> None:
        wanted = [self._range() for _ in range(nb_reads)]
        tokens = [
            client.submit(CMD_READ, self._start + offset, length)
            for offset, length in wanted
        ]
        time.sleep(pause)
        self._expect(client, dict(zip(tokens, wanted, strict=True)))

    def _expect(self, client: NbdClient, wanted: dict[int, tuple[int, int]]) -> None:
        for token, (offset, length) in wanted.items():
            assert client.wait(token).data == self.data[offset : offset + length]

    def _end(self, client: TlsNbdClient) -> None:
        rnd = self._rnd
        match rnd.randrange(8):
            case 0:
                client.disconnect()
            case 1:
                self._read(client, 30, pause=rnd.random() / 5)
                hang_up(client, rudely=False)
            case 2:
                for _ in range(30):
                    client.submit(CMD_READ, self._start, 64 * KiB)
                hang_up(client, rudely=rnd.random() < 0.5)
            case 3 | 4 as how:
                # Its end is said, and the replies still come, all of them.
                wanted = {}
                for _ in range(rnd.randrange(20)):
                    offset, length = self._range()
                    token = client.submit(CMD_READ, self._start + offset, length)
                    wanted[token] = offset, length
                if how == 3:
                    client.socket.end()
                client.socket.plain.shutdown(socket.SHUT_WR)
                if how == 4:
                    self._expect(client, wanted)
            case 5 if self._place == self._server:
                # Half of a record, with half of a write. The proxy could still have
                # it when the next client has written something else.
                offset, length = self._range()
                self._unsure.append((offset, length))
                head = struct.pack(
                    ">IHHQQI", 0x25609513, 0, 1, 1 << 40, self._start + offset, length
                )
                data = bytes(self.data[offset : offset + length])
                records = client.socket.record(head + data)
                client.socket.plain.setblocking(True)
                client.socket.plain.sendall(records[: rnd.randrange(len(records))])
                hang_up(client, rudely=rnd.random() < 0.5)
            case 5 | 6:
                client.socket.plain.setblocking(True)
                client.socket.plain.sendall(rnd.randbytes(100))
                hang_up(client, rudely=False)
            case 7:
                hang_up(client, rudely=True)


def churn(
    server: Server, proxy: Path, authority: Authority, seed: int
) -> tuple[list[Worker], bytes]:
    """Let workers run to their ends; returns them, and what all regions hold."""
    contexts = [context_of(authority) for _ in range(2)]
    contexts[1].maximum_version = ssl.TLSVersion.TLSv1_2
    workers = [
        Worker(number, seed, server.socket, proxy, contexts)
        for number in range(NB_THREADS)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for worker in workers:
        if worker.failure is not None:
            raise worker.failure
    return workers, b"".join(bytes(worker.data) for worker in workers)


def test_clients_over_tls_that_come_and_go(image, tmp_path, seed, figures):
    """With records that are cut, ends of one direction, and replies that are read
    late or never: each answered write is there, and nothing of a client stays."""
    authority = Authority()
    directory = authority.write_server(tmp_path / "server")
    options = ["--tls-certificates", str(directory)]
    listen = Path(f"/tmp/nbdq-{os.getpid()}-tls")
    with contextlib.ExitStack() as stack:
        stack.callback(listen.unlink, missing_ok=True)
        server = stack.enter_context(serving(image, options=options))
        steady = stack.enter_context(TlsNbdClient(server.socket, context_of(authority)))
        nb_before = nb_descriptors(server)
        with Proxy(listen, server.socket, seed, cuts=0.4) as proxy:
            workers, data = churn(server, listen, authority, seed)
        assert steady.read(0, NB_THREADS * REGION) == data
        settled(server, nb_before)
        used = memory(server)
        assert "Traceback" not in server.errors(), server.errors()
    assert used < 300 * MiB, f"{used >> 20} MiB"
    check_image(image)
    nb_cut = sum(worker.nb_cut for worker in workers)
    figures(
        f"adversity: {NB_THREADS * NB_CYCLES} clients over TLS, {nb_cut} cut, "
        f"{proxy.nb_bytes >> 10} KiB mangled, {used >> 20} MiB, seed {seed}"
    )

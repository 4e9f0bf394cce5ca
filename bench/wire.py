"""A client made by hand, which takes as little time as a client can."""

import itertools
import random
import socket
import time
from typing import Final, Self

from bench.cells import KiB, MiB
from bench.peers import BenchError, Server
from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd

_BLOCK: Final = 4 * KiB
_BATCH: Final = 8
"""Requests sent at once; two batches are under way, so that nobody waits."""
_NB_BATCHES: Final = 2000
_PATIENCE: Final = 30.0


def attach(server: Server, *, structured: bool = False) -> socket.socket:
    """Return a connection in the transmission phase."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_PATIENCE)
    connection.connect(str(server.socket))
    replies = connection.makefile("rb")
    replies.read(codec.GREETING.size)
    connection.sendall(codec.CLIENT_FLAGS.pack(3))
    options = {nbd.OPT_GO: codec.info_request("")}
    if structured:
        options = {nbd.OPT_STRUCTURED_REPLY: b"", **options}
    for option, data in options.items():
        connection.sendall(codec.option_request(option, data))
        reply = nbd.REP_INFO
        while reply == nbd.REP_INFO:
            head = replies.read(codec.OPTION_REPLY.size)
            _, _, reply, length = codec.OPTION_REPLY.unpack(head)
            replies.read(length)
        if reply != nbd.REP_ACK:
            raise BenchError(f"a connection was refused with {reply:#x}")
    return connection


class BlockReader:
    """A connection that reads 4 KiB at random places, 16 requests under way.

    What comes is counted, not looked at: of the time that a request takes, nearly
    all is the server's.
    """

    def __init__(
        self, server: Server, disk_size: int, seed: int, *, structured: bool
    ) -> None:
        rng = random.Random(seed)
        self._batches = itertools.cycle(
            [
                b"".join(
                    codec.request(
                        nbd.CMD_READ,
                        cookie,
                        rng.randrange(disk_size // _BLOCK) * _BLOCK,
                        _BLOCK,
                    )
                    for cookie in range(_BATCH)
                )
                for _ in range(_NB_BATCHES)
            ]
        )
        head = codec.SIMPLE_REPLY.size
        if structured:
            head = codec.STRUCTURED_REPLY.size + codec.U64.size
        self._reply_length = _BATCH * (head + _BLOCK)
        self._buffer = memoryview(bytearray(MiB))
        self._connection = attach(server, structured=structured)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._connection.close()

    def read(self, seconds: float) -> tuple[int, float]:
        """Return how many blocks were read, and the seconds that it took."""
        connection, buffer, batches = self._connection, self._buffer, self._batches
        reply_length = self._reply_length
        start = time.perf_counter()
        connection.sendall(next(batches) + next(batches))
        nb_sent, nb_bytes = 2, 0
        while time.perf_counter() - start < seconds:
            nb_bytes += connection.recv_into(buffer)
            while nb_bytes >= (nb_sent - 1) * reply_length:
                connection.sendall(next(batches))
                nb_sent += 1
        while nb_bytes < nb_sent * reply_length:
            nb_bytes += connection.recv_into(buffer)
        return nb_sent * _BATCH, time.perf_counter() - start

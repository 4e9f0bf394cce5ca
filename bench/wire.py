"""A client made by hand, which takes as little time as a client can."""

import random
import socket
import time
from typing import Final

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


def read_blocks(
    server: Server, disk_size: int, seconds: float, seed: int, *, structured: bool
) -> tuple[float, float]:
    """Read 4 KiB at random places with 16 requests under way.

    Returns how many a second, and the server's seconds of processor time for each.
    What comes is counted, not looked at: of the time that a request takes, nearly
    all is the server's.
    """
    rng = random.Random(seed)
    batches = [
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
    head = codec.SIMPLE_REPLY.size
    if structured:
        head = codec.STRUCTURED_REPLY.size + codec.U64.size
    reply_length = _BATCH * (head + _BLOCK)
    buffer = memoryview(bytearray(MiB))
    with attach(server, structured=structured) as connection:
        connection.sendall(batches[0] + batches[1])
        nb_sent, nb_bytes = 2, 0
        cpu_before, start = server.cpu_seconds(), time.perf_counter()
        while time.perf_counter() - start < seconds:
            nb_bytes += connection.recv_into(buffer)
            while nb_bytes >= (nb_sent - 1) * reply_length:
                connection.sendall(batches[nb_sent % _NB_BATCHES])
                nb_sent += 1
        elapsed = time.perf_counter() - start
        cpu = server.cpu_seconds() - cpu_before
    nb_requests = nb_bytes / reply_length * _BATCH
    return nb_requests / elapsed, cpu / nb_requests

"""Many equal requests to a disk: `bench`."""

import errno
import os
import time
from dataclasses import dataclass

from nbdqcow.block.node import Node
from nbdqcow.errors import BlockError
from nbdqcow.jobs.control import Flight


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What is asked of the disk.

    Attributes:
        count: requests; depth: how many at once.
        offset: of the first; step: bytes from one to the next; from the end of
            the disk they go on at its beginning.
        length: bytes of each.
        pattern: the byte to write; None reads.
        flush_interval: writes from one flush to the next; 0 for none.
        drain: others wait for a flush.
    """

    count: int
    depth: int
    offset: int
    step: int
    length: int
    pattern: int | None = None
    flush_interval: int = 0
    drain: bool = True


async def bench(node: Node, options: BenchOptions) -> float:
    """Send the requests; return the seconds that they took. Raises `OSError`."""
    data = bytes([options.pattern or 0]) * options.length
    started = time.perf_counter()
    position = options.offset
    nb_since_flush = 0

    async def request(offset: int) -> None:
        if offset + options.length > node.size:
            raise BlockError(errno.EIO, os.strerror(errno.EIO))
        if options.pattern is None:
            await node.pread(offset, options.length)
        else:
            await node.pwrite(offset, data)

    async with Flight(options.depth) as flight:
        for _ in range(options.count):
            if options.flush_interval and nb_since_flush == options.flush_interval:
                nb_since_flush = 0
                if options.drain:
                    await flight.drain()
                await flight.add(node.flush())
            await flight.add(request(position))
            nb_since_flush += 1
            position = (position + options.step) % (node.size or 1)
        await flight.drain()
    return time.perf_counter() - started

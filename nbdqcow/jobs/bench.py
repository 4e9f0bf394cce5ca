"""Many equal requests to a disk: `bench`."""

import asyncio
import time
from dataclasses import dataclass

from nbdqcow.block.node import Node
from nbdqcow.errors import BlockError


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
    nb_left = options.count
    nb_since_flush = 0
    running: set[asyncio.Task[None]] = set()

    async def request(offset: int) -> None:
        if offset + options.length > node.size:
            raise BlockError(5, "Input/output error")
        if options.pattern is None:
            await node.pread(offset, options.length)
        else:
            await node.pwrite(offset, data)

    async def settle(tasks: set[asyncio.Task[None]]) -> None:
        for task in tasks:
            await task

    try:
        while nb_left or running:
            while nb_left and len(running) < options.depth:
                if options.flush_interval and nb_since_flush == options.flush_interval:
                    nb_since_flush = 0
                    if options.drain:
                        await settle(running)
                        running.clear()
                    running.add(asyncio.create_task(node.flush()))
                    continue
                running.add(asyncio.create_task(request(position)))
                nb_left, nb_since_flush = nb_left - 1, nb_since_flush + 1
                position = (position + options.step) % (node.size or 1)
            done, running = await asyncio.wait(
                running, return_when=asyncio.FIRST_COMPLETED
            )
            await settle(done)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return time.perf_counter() - started

"""Disks as one stream of bytes: `convert` to standard output."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Final

from nbdqcow.block.node import Node
from nbdqcow.buffers import zero_views
from nbdqcow.jobs.control import JobControl
from nbdqcow.jobs.errors import CopyError, reason_of
from nbdqcow.jobs.status import disk_size
from nbdqcow.types import Buffer
from nbdqcow.units import MiB

_PIECE: Final = 1 * MiB
_NB_AHEAD: Final = 4


async def stream(
    sources: Sequence[Node],
    write: Callable[[Buffer], Awaitable[None]],
    control: JobControl,
) -> None:
    """Give all of the disks to ``write``, in order, each in whole sectors.

    Pieces are read ahead while others are written. Raises `CopyError`, and
    what ``write`` raises.
    """
    control.expect(sum(map(disk_size, sources)))
    reads: deque[asyncio.Task[list[Buffer]]] = deque()
    position = 0

    async def write_one() -> None:
        nonlocal position
        try:
            pieces = await reads.popleft()
        except OSError as error:
            raise CopyError("reading", position, reason_of(error)) from error
        for piece in pieces:
            await write(piece)
            position += len(piece)
            control.advance(len(piece))

    try:
        for source, offset, length in _pieces(sources):
            await control.checkpoint(length)
            reads.append(asyncio.create_task(_read(source, offset, length)))
            if len(reads) == _NB_AHEAD:
                await write_one()
        while reads:
            await write_one()
    finally:
        for read in reads:
            read.cancel()
        await asyncio.gather(*reads, return_exceptions=True)


def _pieces(sources: Sequence[Node]) -> Iterator[tuple[Node, int, int]]:
    for source in sources:
        size = disk_size(source)
        for offset in range(0, size, _PIECE):
            yield source, offset, min(_PIECE, size - offset)


async def _read(source: Node, offset: int, length: int) -> list[Buffer]:
    inside = min(length, source.size - offset)
    pieces = [piece async for piece in source.pread_pieces(offset, inside)]
    return pieces + zero_views(length - inside)

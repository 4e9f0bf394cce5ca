"""Bringing what an image and others have above a base down into the base."""

from typing import Final

from nbdqcow.block.node import Node
from nbdqcow.jobs.control import Flight, JobControl
from nbdqcow.jobs.errors import CopyError, reason_of
from nbdqcow.types import COMPRESSED, DATA, UNALLOCATED, ZERO
from nbdqcow.units import MiB

_PIECE: Final = 2 * MiB
_STRETCH: Final = 1024 * MiB
"""Bytes whose maps are looked at, at a time."""

_NB_IN_FLIGHT: Final = 4


async def commit(top: Node, base: Node, control: JobControl) -> None:
    """Make ``base`` read as ``top`` does, which is above it in its chain.

    ``base`` can be written to; it grows if it is shorter. All is durable on
    return. Raises `CopyError`, `OSError` and
    `nbdqcow.jobs.control.JobCancelled`; `top` reads as before in any case.
    """
    if base.size < top.size:
        await base.resize(top.size)
    control.expect(top.size)

    async def copy(kind: int, offset: int, length: int) -> None:
        action = "reading"
        try:
            if kind == ZERO:
                action = "writing"
                await base.write_zeroes(offset, length)
            else:
                data = await top.pread(offset, length)
                action = "writing"
                await base.pwrite(offset, data)
        except OSError as error:
            raise CopyError(action, offset, reason_of(error)) from error
        control.advance(length)

    async with Flight(_NB_IN_FLIGHT) as flight:
        offset = 0
        while offset < top.size:
            length = min(_STRETCH, top.size - offset)
            kind, length = await _kind_above(top, base, offset, length)
            if kind == DATA:
                length = min(length, _PIECE)
            await control.checkpoint(length if kind == DATA else 0)
            if kind == UNALLOCATED:
                control.advance(length)
            else:
                await flight.add(copy(kind, offset, length))
            offset += length
        await flight.drain()
    await base.flush()


async def _kind_above(
    top: Node, base: Node, offset: int, length: int
) -> tuple[int, int]:
    """Return what the images above ``base`` have at ``offset``: DATA, ZERO or
    UNALLOCATED, and for how many of ``length`` bytes."""
    node: Node | None = top
    while node is not base:
        # Behind the end of an image there are zeroes, whatever is below it.
        if node is None or offset >= node.size:
            return ZERO, length
        kind, _, length = await node.driver.map(offset, min(length, node.size - offset))
        if kind != UNALLOCATED:
            return (DATA if kind in (DATA, COMPRESSED) else ZERO), length
        node = node.backing
    return UNALLOCATED, length

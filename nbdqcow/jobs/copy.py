"""Copying a stretch of a disk byte for byte: `dd`."""

from typing import Final

from nbdqcow.block.node import Node
from nbdqcow.jobs.control import Flight, JobControl
from nbdqcow.jobs.errors import copying
from nbdqcow.units import MiB

_PIECE: Final = 2 * MiB
_NB_IN_FLIGHT: Final = 4


async def copy(
    source: Node, target: Node, start: int, length: int, control: JobControl
) -> None:
    """Write ``length`` bytes of ``source`` from ``start`` on to the beginning of
    ``target``, zeroes too. What is past the source's end is zero.

    Raises `CopyError`.
    """
    control.expect(length)

    async def copy_piece(offset: int) -> None:
        count = min(_PIECE, length - offset)
        inside = max(0, min(count, source.size - start - offset))
        with copying("reading", start + offset):
            data = await source.pread(start + offset, inside) if inside else b""
        if inside < count:
            data = bytes(data).ljust(count, b"\0")
        with copying("writing", offset):
            await target.pwrite(offset, data)
        control.advance(count)

    async with Flight(_NB_IN_FLIGHT) as flight:
        for offset in range(0, length, _PIECE):
            await control.checkpoint(min(_PIECE, length - offset))
            await flight.add(copy_piece(offset))
        await flight.drain()

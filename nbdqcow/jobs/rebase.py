"""Giving an image another backing image, its content staying what it is."""

from collections.abc import Iterator
from typing import Final

from nbdqcow.block.node import Node
from nbdqcow.jobs.control import Flight, JobControl
from nbdqcow.jobs.errors import copying
from nbdqcow.jobs.status import stretch_of
from nbdqcow.types import UNALLOCATED, ZERO
from nbdqcow.units import SECTOR_SIZE, MiB, round_up

_PIECE: Final = 2 * MiB
_STRETCH: Final = 1024 * MiB
"""Bytes whose maps are looked at, at a time."""

_NB_IN_FLIGHT: Final = 4


async def rebase(
    node: Node,
    new_backing: Node | None,
    control: JobControl,
    *,
    shared: Node | None = None,
    compressed: bool = False,
) -> None:
    """Copy into an image what ``new_backing`` has otherwise than its backing
    image, so that it may take that one's place.

    ``node`` has its old backing image still. ``shared`` is an image of its
    chain that the new one is the same as: what only it and those below have
    need not be looked at. ``compressed``: whole clusters are stored compressed.
    All is durable on return; the image's header is the
    caller's. Raises `CopyError` and `nbdqcow.jobs.control.JobCancelled`: the
    image is then as good as before.
    """
    control.expect(node.size)
    unit = node.driver.cluster_size if compressed else _unit(node)
    write = node.pwrite_compressed if compressed else node.pwrite
    # As qemu-img does, and its tests look for: zeroes of the old backing image are
    # written out, those behind its end are zero clusters.
    old_end = 0 if node.backing is None else round_up(node.backing.size, unit)

    async def compare(offset: int, length: int) -> None:
        old = await _read(node, offset, length)
        new = bytes(length)
        if new_backing is not None:
            inside = max(0, min(length, new_backing.size - offset))
            new = (await _read(new_backing, offset, inside)).ljust(length, b"\0")
        if old != new:
            inside = max(0, min(length, old_end - offset))
            for start, stop in _differences(old[:inside], new, offset, unit):
                with copying("writing", offset + start):
                    await write(offset + start, old[start:stop])
            behind = offset + inside
            for start, stop in _differences(old[inside:], new[inside:], behind, unit):
                with copying("writing", behind + start):
                    await node.write_zeroes(behind + start, stop - start)
        control.advance(length)

    node.driver.gets_backing = new_backing is not None
    try:
        async with Flight(_NB_IN_FLIGHT) as flight:
            offset = 0
            while offset < node.size:
                length = node.size - offset
                wanted, length = await _is_wanted(node, shared, offset, length)
                if wanted:
                    wanted, length = await _may_differ(
                        node, new_backing, offset, length
                    )
                # What is allocated as a whole is written as a whole.
                wanted, length = _whole_units(node, wanted, offset, length, unit)
                if wanted:
                    length = min(length, _PIECE)
                await control.checkpoint(length if wanted else 0)
                if wanted:
                    await flight.add(compare(offset, length))
                else:
                    control.advance(length)
                offset += length
            await flight.drain()
    finally:
        node.driver.gets_backing = False
    await node.flush()


def _unit(node: Node) -> int:
    """Return the bytes that are allocated together anyway."""
    driver = node.driver
    return max(SECTOR_SIZE, getattr(driver, "subcluster_size", driver.cluster_size))


async def _is_wanted(
    node: Node, shared: Node | None, offset: int, length: int
) -> tuple[bool, int]:
    """Return whether a stretch comes from images that will be gone, and how
    long it is."""
    kind, _, length = await node.driver.map(offset, length)
    if kind != UNALLOCATED:
        return False, length
    if shared is None:
        return True, length
    above = node.backing
    while above is not shared:
        # Behind the end of an image there are zeroes, whatever is below it.
        if above is None or offset >= above.size:
            return True, length
        kind, _, length = await above.driver.map(
            offset, min(length, above.size - offset)
        )
        if kind != UNALLOCATED:
            return True, length
        above = above.backing
    return False, length


async def _may_differ(
    node: Node, new_backing: Node | None, offset: int, length: int
) -> tuple[bool, int]:
    """Return whether a stretch must be read: not if both images' maps say that
    it is zero."""
    kind, length = await stretch_of(node, offset, min(length, _STRETCH))
    if new_backing is None or offset >= new_backing.size:
        return kind != ZERO, length
    inside = min(length, new_backing.size - offset)
    other, length = await stretch_of(new_backing, offset, inside)
    return kind != ZERO or other != ZERO, length


def _whole_units(
    node: Node, wanted: bool, offset: int, length: int, unit: int
) -> tuple[bool, int]:
    """Return the same of whole units: one that is wanted in part is wanted."""
    whole = length - length % unit
    if offset + length == node.size or whole == length:
        return wanted, length
    if whole and not wanted:
        return False, whole
    return True, min(whole + unit, node.size - offset)


def _differences(
    old: bytes, new: bytes, offset: int, unit: int
) -> Iterator[tuple[int, int]]:
    """Yield start and end of the runs of differing units of ``old``, cut at ``unit``
    bytes of the disk."""
    run_start, position = -1, 0
    while position < len(old):
        end = min(len(old), position + unit - (offset + position) % unit)
        differs = old[position:end] != new[position:end]
        if differs and run_start < 0:
            run_start = position
        elif not differs and run_start >= 0:
            yield run_start, position
            run_start = -1
        position = end
    if run_start >= 0:
        yield run_start, position


async def _read(node: Node, offset: int, length: int) -> bytes:
    if not length:
        return b""
    with copying("reading", offset):
        return bytes(await node.pread(offset, length))

"""The map of a disk: what is where, and in which image of the chain."""

from bisect import bisect_right
from collections.abc import AsyncIterator, Sequence
from itertools import accumulate, repeat
from typing import Final, Self, TypeAlias

from nbdqcow.block.driver import FormatDriver
from nbdqcow.block.node import Node
from nbdqcow.block.storage import StorageDriver
from nbdqcow.jobs.status import disk_size, has_holes, has_offsets
from nbdqcow.types import COMPRESSED, DATA, UNALLOCATED, ZERO, ZERO_ALLOCATED
from nbdqcow.units import round_down, round_up

_MANY_ROWS: Final = 1 << 12
_NB_STRETCHES: Final = 1 << 14
_MIXED: Final = -1

HAS_DATA: Final = 1
"""The image has a place for it in a file."""
IS_ZERO: Final = 2
"""It reads as zeroes; with HAS_DATA: that place is a hole."""
IS_PRESENT: Final = 4
"""The image has an entry for it."""
HAS_OFFSET: Final = 8
"""The host offset means something."""

Row: TypeAlias = tuple[int, int, int, int, int, Node]
"""``(start, length, flags, host_offset, depth, node)``: a stretch of a disk, as
QEMU's ``map`` tells it, and which image of the chain says so: ``node``, at
``depth`` from the top one. A plain tuple: there are millions."""


async def map_disk(node: Node, start: int, end: int) -> AsyncIterator[list[Row]]:
    """Yield what is in ``[start, end)``, in order. What continues the row
    before, in the file also, is joined to it."""
    last: list[Row] = []
    async for rows, may_join in _rows(node, start, min(end, node.size), 0):
        if may_join:
            rows = _join(last + rows)
        elif last and _continues(last[0], rows[0]):
            rows[0] = _joined(last[0], rows[0])
        else:
            rows = last + rows
        last = [rows.pop()]
        if rows:
            yield rows
    if (start := max(start, node.size)) < min(end, disk_size(node)):
        rest = _rest_of_sector(node, start, end, 0)
        aligned = node.driver.cluster_size == 1 and node.driver.data.read_alignment > 1
        if aligned and last and last[0][4] == 0:
            # Past the page cache it is read with what is before it, and QEMU takes
            # it for the same.
            rest = (*rest[:2], last[0][2], *rest[3:])
        last = _join([*last, rest])
    if last:
        yield last


def _rest_of_sector(node: Node, start: int, end: int, depth: int) -> Row:
    """Return what is behind the end of a disk in its last sector."""
    flags = IS_ZERO | IS_PRESENT
    if node.driver.cluster_size == 1 and node.driver.data.name != "nbd":
        # As if the file were that long; an export is what it is.
        flags |= HAS_OFFSET
    return start, end - start, flags, start, depth, node


async def data_length(node: Node, cluster_size: int) -> int:
    """Return the bytes of a disk that are not zero by its map, counted in whole
    clusters of ``cluster_size``."""
    total = covered = 0
    async for rows in map_disk(node, 0, disk_size(node)):
        for start, length, flags, *_ in rows:
            if flags & IS_ZERO:
                continue
            first = max(covered, round_down(start, cluster_size))
            covered = max(covered, round_up(start + length, cluster_size))
            total += covered - first
    return total


def _join(rows: list[Row]) -> list[Row]:
    joined = rows[:1]
    for row in rows[1:]:
        if _continues(joined[-1], row):
            joined[-1] = _joined(joined[-1], row)
        else:
            joined.append(row)
    return joined


def _continues(first: Row, second: Row) -> bool:
    if first[2] != second[2] or first[4] != second[4]:
        return False
    return not first[2] & HAS_OFFSET or first[3] + first[1] == second[3]


def _joined(first: Row, second: Row) -> Row:
    return (first[0], first[1] + second[1], *first[2:])


async def _rows(
    node: Node, start: int, end: int, depth: int
) -> AsyncIterator[tuple[list[Row], bool]]:
    """Yield rows, and whether some of them may continue others."""
    driver, backing = node.driver, node.backing
    if driver.data.shows_context or (
        driver.cluster_size == 1 and driver.data.tells_states
    ):
        async for rows in _context_rows(node, start, end, depth):
            yield rows, True
        return
    flags_of = _flags_of(driver)
    # Unallocated subclusters of a cluster that has others.
    unallocated_have_places = (
        driver.subcluster_size < driver.cluster_size and has_offsets(driver)
    )
    holes = None
    if flags_of[DATA] & HAS_OFFSET and await has_holes(driver):
        holes = await _FileMap.load(driver.data)
    while start < end:
        kinds, hosts, lengths = zip(*await driver.runs(start, end - start), strict=True)
        starts = list(accumulate(lengths, initial=start))
        flags = [flags_of[kind] for kind in kinds]
        if unallocated_have_places and UNALLOCATED in kinds:
            for index, kind in enumerate(kinds):
                if kind == UNALLOCATED and hosts[index]:
                    flags[index] |= HAS_OFFSET
        if holes is not None:
            holes.mark(flags, hosts, lengths)
        rows = list(zip(starts, lengths, flags, hosts, repeat(depth), repeat(node)))
        if holes is not None and _MIXED in flags:
            rows = holes.split(rows)
        may_join = COMPRESSED in kinds or not flags_of[DATA] & HAS_OFFSET
        if backing is None or UNALLOCATED not in kinds:
            yield rows, may_join
        else:
            async for below in _see_through(rows, backing, depth):
                yield below, True
        start = starts[-1]


def _flags_of(driver: FormatDriver) -> list[int]:
    """Return the flags of each kind of run."""
    flags_of = [0] * 5
    flags_of[DATA] = HAS_DATA | IS_PRESENT | HAS_OFFSET
    flags_of[COMPRESSED] = HAS_DATA | IS_PRESENT
    flags_of[ZERO] = IS_ZERO | IS_PRESENT
    flags_of[ZERO_ALLOCATED] = IS_ZERO | IS_PRESENT | HAS_OFFSET
    flags_of[UNALLOCATED] = IS_ZERO
    if driver.cluster_size == 1:
        flags_of[ZERO] |= HAS_OFFSET
    if not has_offsets(driver):
        return [flags & ~HAS_OFFSET for flags in flags_of]
    return flags_of


async def _context_rows(
    node: Node, start: int, end: int, depth: int
) -> AsyncIterator[list[Row]]:
    """Yield what base:allocation says, or another metadata context, with its flags
    as if they were those: what a dirty bitmap marks is a hole that is no zero."""
    storage = node.driver.data
    plain = IS_PRESENT | HAS_OFFSET
    flags_of = (plain | HAS_DATA, 0, plain | HAS_DATA | IS_ZERO, plain | IS_ZERO)
    while start < end:
        run = node.driver.try_map(start, end - start)
        _, host_offset, length = run or await node.driver.map(start, end - start)
        extents = await storage.context_extents(host_offset, length)
        rows: list[Row] = []
        for length, flags in extents:
            rows.append((start, length, flags_of[flags & 3], host_offset, depth, node))
            start, host_offset = start + length, host_offset + length
        yield rows


async def _see_through(
    rows: list[Row], backing: Node, depth: int
) -> AsyncIterator[list[Row]]:
    """Put what ``backing`` has in the place of what is not present."""
    found: list[Row] = []
    below_end = disk_size(backing)
    for row in rows:
        start, length, flags, host_offset, _, node = row
        if flags & IS_PRESENT or start >= below_end:
            found.append(row)
            continue
        end, stop = start + length, min(start + length, below_end)
        async for below, _ in _rows(backing, start, min(stop, backing.size), depth + 1):
            found += below
        if (rest := max(start, backing.size)) < stop:
            found.append(_rest_of_sector(backing, rest, stop, depth + 1))
        if stop < end:
            found.append(
                (stop, end - stop, flags, host_offset + stop - start, depth, node)
            )
        if len(found) > _MANY_ROWS:
            yield found
            found = []
    if found:
        yield found


class _FileMap:
    """The holes of a file that has more of them than it should."""

    def __init__(self) -> None:
        self._ends: list[int] = []
        self._allocated: list[bool] = []

    @classmethod
    async def load(cls, storage: StorageDriver) -> Self:
        """Look for all holes of ``storage``."""
        found = cls()
        position = 0
        while position < storage.length:
            stretches = await storage.extents(
                position, storage.length - position, _NB_STRETCHES
            )
            lengths = (length for _, length in stretches)
            found._ends += list(accumulate(lengths, initial=position))[1:]
            found._allocated += [allocated for allocated, _ in stretches]
            position = found._ends[-1]
        # What is past the end is a hole.
        found._ends.append(1 << 64)
        found._allocated.append(False)
        return found

    def mark(
        self, flags: list[int], hosts: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Add IS_ZERO to the flags of data that is a hole; those of what is so
        in part become _MIXED, for `split`."""
        ends, allocated = self._ends, self._allocated
        plain = HAS_DATA | IS_PRESENT | HAS_OFFSET
        for index, host_offset in enumerate(hosts):
            if flags[index] == plain:
                at = bisect_right(ends, host_offset)
                if ends[at] < host_offset + lengths[index]:
                    flags[index] = _MIXED
                elif not allocated[at]:
                    flags[index] = plain | IS_ZERO

    def split(self, rows: list[Row]) -> list[Row]:
        """Cut the rows without flags where data and holes meet."""
        found: list[Row] = []
        for row in rows:
            if row[2] != _MIXED:
                found.append(row)
                continue
            start, length, _, host_offset, depth, node = row
            at = bisect_right(self._ends, host_offset)
            while length:
                covered = min(self._ends[at] - host_offset, length)
                flags = HAS_DATA | IS_PRESENT | HAS_OFFSET
                if not self._allocated[at]:
                    flags |= IS_ZERO
                found.append((start, covered, flags, host_offset, depth, node))
                start, host_offset = start + covered, host_offset + covered
                length, at = length - covered, at + 1
        return found

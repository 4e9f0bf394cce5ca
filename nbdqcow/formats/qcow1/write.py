"""Guest writes: in place, or into new clusters at the end of the file.

A writer that allocates registers the guest clusters it works on before it lets
go of the image's lock, and links them when all their bytes are in the file.
Whoever overlaps it waits and then looks everything up again. The format counts
no references, so what a compressed cluster took is never used again.
"""

from typing import TYPE_CHECKING, Final

from nbdqcow.block.driver import WritePlan
from nbdqcow.block.inflight import InFlightRange
from nbdqcow.errors import CorruptImage
from nbdqcow.formats.qcow1.tables import L2Slice
from nbdqcow.units import SECTOR_SIZE, MiB, round_up

if TYPE_CHECKING:
    from nbdqcow.formats.qcow1.driver import Qcow1Driver

_MAX_PIECE: Final = 32 * MiB
"""Guest bytes of one allocation: bounds what one request holds at a time."""


class FileEnd:
    """Where the file's used part ends: the next cluster goes there.

    Attributes:
        offset: the end in bytes, of any alignment.
    """

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self._gaps: dict[int, int] = {}

    def take(self, length: int, alignment: int) -> tuple[int, int]:
        """Return the aligned start of ``length`` bytes, and the old end."""
        old_end = self.offset
        start = round_up(old_end, alignment)
        self.offset = start + length
        return start, old_end

    def give_back(self, old_end: int, end: int) -> bool:
        """Take back what ends at ``end`` and began with an ``old_end``; whether
        the file's end moves back. What others took behind it stays between
        until it is given back too."""
        self._gaps[end] = old_end
        if self.offset != end:
            return False
        while self.offset in self._gaps:
            self.offset = self._gaps.pop(self.offset)
        return True

    def reset(self, offset: int) -> None:
        """Begin anew; nothing is taken behind ``offset``."""
        self.offset = offset
        self._gaps.clear()


class Allocation:
    """New host clusters for a range of guest clusters, not linked yet.

    Attributes:
        entry: the L2 entry of the first cluster; the others follow it.
        old_end, end: what `FileEnd.give_back` needs.
    """

    __slots__ = (
        "end",
        "entry",
        "epoch",
        "in_flight",
        "l2",
        "l2_index",
        "nb_clusters",
        "old_end",
    )

    def __init__(
        self,
        in_flight: InFlightRange,
        l2: L2Slice,
        l2_index: int,
        nb_clusters: int,
        entry: int,
        old_end: int,
        end: int,
        epoch: int,
    ) -> None:
        self.in_flight = in_flight
        self.l2 = l2
        self.l2_index = l2_index
        self.nb_clusters = nb_clusters
        self.entry = entry
        self.old_end = old_end
        self.end = end
        self.epoch = epoch


async def begin_write(image: "Qcow1Driver", offset: int, length: int) -> WritePlan:
    """See `FormatDriver.begin_write`."""
    await image.writeback.make_room()
    cluster_mask = image.cluster_size - 1
    length = min(length, _MAX_PIECE)
    while True:
        async with image.lock:
            image.check_writable()
            start = offset & ~cluster_mask
            end = (offset + length + cluster_mask) & ~cluster_mask
            busy = image.in_flight.first_overlap(start, end)
            if busy is None or busy.start > start:
                if busy is not None:
                    length = busy.start - offset
                while (plan := _try_plan(image, offset, length)) is None:
                    await slice_for_change(image, offset)
                if not isinstance(plan.private, int):
                    image.storage.announce("cluster_alloc")
                return plan
        await busy.wait()


def try_begin_write(image: "Qcow1Driver", offset: int, length: int) -> WritePlan | None:
    """See `FormatDriver.try_begin_write`."""
    if image.lock.locked() or image.tables.dirty_bytes > image.tables.dirty_limit:
        return None
    if image.in_flight:
        cluster_mask = image.cluster_size - 1
        end = (offset + length + cluster_mask) & ~cluster_mask
        if image.in_flight.find(offset & ~cluster_mask, end) is not None:
            return None
    return _try_plan(image, offset, length, whole=True)


def _try_plan(
    image: "Qcow1Driver", offset: int, length: int, *, whole: bool = False
) -> WritePlan | None:
    """Find or allocate clusters; None if a table must be read or made first.

    Nobody else holds the lock, and nothing in flight overlaps. ``whole``:
    None also if one plan can't cover all of ``length``.
    """
    tables, mapping, cluster_size = image.tables, image.mapping, image.cluster_size
    key = offset >> tables.slice_shift
    if not tables.table_offset(tables.l1_index(key)):
        return None
    l2 = tables.try_load(key)
    if l2 is None:
        return None
    words = l2.words
    index = (offset >> image.cluster_bits) & (tables.slice_entries - 1)
    in_cluster = offset & (cluster_size - 1)
    covered = mapping.in_place_length(l2, index, in_cluster, length)
    if covered:
        if whole and covered < length:
            return None
        epoch = image.writers.enter_in_place()
        return WritePlan(offset, covered, words[index] + in_cluster, private=epoch)

    needed = -(-(in_cluster + length) // cluster_size)
    wanted = min(needed, len(words) - index)
    nb_clusters = 0
    while nb_clusters < wanted and mapping.needs_cluster(words[index + nb_clusters]):
        nb_clusters += 1
    if whole and nb_clusters < needed:
        return None
    check_sound(l2)
    nb_bytes = nb_clusters * cluster_size
    length = min(length, nb_bytes - in_cluster)
    start = offset - in_cluster
    host_start, old_end = image.file_end.take(nb_bytes, cluster_size)
    allocation = Allocation(
        image.in_flight.add(start, start + nb_bytes),
        l2, index, nb_clusters, host_start, old_end, host_start + nb_bytes,
        image.epochs.enter(),
    )  # fmt: skip
    l2.pins += 1
    # All of the new clusters is written, also where they read as zeroes
    # already: the file then ends where its last cluster does, for whoever
    # looks for room there by the file's length.
    return WritePlan(
        guest_offset=offset,
        length=length,
        host_offset=host_start + in_cluster,
        head=in_cluster,
        tail=nb_bytes - in_cluster - length,
        private=allocation,
    )


def check_sound(l2: L2Slice) -> None:
    """Refuse to change a table with damage: some of it is not in memory."""
    if l2.damaged:
        raise CorruptImage("An L2 table names clusters past the end of the file")


async def slice_for_change(image: "Qcow1Driver", offset: int) -> L2Slice:
    """Return the slice of a guest offset, making its L2 table if there is
    none. The lock is held."""
    tables = image.tables
    key = offset >> tables.slice_shift
    l1_index = tables.l1_index(key)
    if not tables.table_offset(l1_index):
        host_offset, old_end = image.file_end.take(
            tables.table_bytes, image.cluster_size
        )
        tables.add_table(l1_index, host_offset, old_end)
    return await tables.load(key)


async def place_compressed(
    image: "Qcow1Driver", offset: int, length: int
) -> tuple[Allocation, int]:
    """Take room for a compressed cluster of ``length`` bytes at a guest offset.

    Returns the allocation, whose ``entry`` is the host offset so far, and that
    offset. It begins with a sector of its own, so that a write that must
    change parts of sectors never meets another one there.
    """
    await image.writeback.make_room()
    while True:
        async with image.lock:
            image.check_writable()
            busy = image.in_flight.find(offset, offset + image.cluster_size)
            if busy is None:
                l2 = await slice_for_change(image, offset)
                check_sound(l2)
                index = (offset >> image.cluster_bits) & (len(l2.words) - 1)
                host_offset, old_end = image.file_end.take(length, SECTOR_SIZE)
                l2.pins += 1
                allocation = Allocation(
                    image.in_flight.add(offset, offset + image.cluster_size),
                    l2, index, 1, host_offset, old_end, host_offset + length,
                    image.epochs.enter(),
                )  # fmt: skip
                return allocation, host_offset
        await busy.wait()


def link(image: "Qcow1Driver", allocation: Allocation) -> None:
    """The clusters are in the file: name them in the L2 table. One block
    without awaits: a lookup sees all of the old mapping or all of the new."""
    l2, first = allocation.l2, allocation.l2_index
    words, entry = l2.words, allocation.entry
    end = first + allocation.nb_clusters
    for index in range(first, end):
        words[index] = entry
        l2.checked[index] = 1
        entry += image.cluster_size
    image.tables.mark_dirty(l2, first, end)
    _finish(image, allocation)


def roll_back(image: "Qcow1Driver", allocation: Allocation) -> bool:
    """The old mapping stays, and nobody names the new clusters; whether the
    file's used part ends earlier now."""
    shorter = image.file_end.give_back(allocation.old_end, allocation.end)
    _finish(image, allocation)
    return shorter


def drop_unused_tables(image: "Qcow1Driver") -> None:
    """Give back the place of new L2 tables that map nothing, if the file ends
    with them. The lock is held and no commit runs."""
    tables = image.tables
    for l1_index, (offset, old_end) in reversed(list(tables.fresh.items())):
        start = l1_index << tables.l1_shift
        if (
            offset + tables.table_bytes != image.file_end.offset
            or image.in_flight.find(start, start + (1 << tables.l1_shift)) is not None
            or any(tables.table_content(l1_index))
        ):
            return
        tables.drop_table(l1_index)
        image.file_end.give_back(old_end, offset + tables.table_bytes)


def _finish(image: "Qcow1Driver", allocation: Allocation) -> None:
    allocation.l2.pins -= 1
    image.epochs.leave(allocation.epoch)
    image.in_flight.remove(allocation.in_flight)

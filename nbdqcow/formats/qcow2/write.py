"""Guest writes: in place, or into new clusters with copy-on-write.

A writer that allocates registers the guest clusters it works on before it
lets go of the image's lock, and links them when all their bytes are in the
file. Whoever overlaps it waits and then looks everything up again.
"""

import errno
from array import array
from itertools import takewhile
from typing import TYPE_CHECKING, Final

from nbdqcow.block.driver import WritePlan
from nbdqcow.block.inflight import InFlightRange
from nbdqcow.errors import BlockError
from nbdqcow.formats.qcow2.entries import (
    IN_DATA_FILE,
    OFFSET_MASK,
    OFLAG_COMPRESSED,
    OFLAG_COPIED,
    OFLAG_ZERO,
    compressed_range,
)
from nbdqcow.formats.qcow2.tables import L2Slice
from nbdqcow.units import MiB, round_up

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.driver import Qcow2Driver

_MAX_PIECE: Final = 32 * MiB
"""Guest bytes of one allocation: bounds what one request holds at a time."""


class Allocation:
    """New host clusters for a range of guest clusters, not linked yet.

    ``reused``: the clusters belong to the guest range already (preallocated
    zero clusters): nothing is given back if the write fails.
    """

    __slots__ = (
        "cluster_index",
        "epoch",
        "in_flight",
        "l2",
        "l2_index",
        "nb_clusters",
        "reused",
    )

    def __init__(
        self,
        in_flight: InFlightRange,
        l2: L2Slice,
        l2_index: int,
        cluster_index: int,
        nb_clusters: int,
        reused: bool,
        epoch: int,
    ) -> None:
        self.in_flight = in_flight
        self.l2 = l2
        self.l2_index = l2_index
        self.cluster_index = cluster_index
        self.nb_clusters = nb_clusters
        self.reused = reused
        self.epoch = epoch

    def end(self, image: "Qcow2Driver") -> None:
        """The data is in the file."""
        self.link(image)
        self._finish(image)

    def abort(self, image: "Qcow2Driver") -> None:
        """The data, or some of it, could not be written."""
        if not self.reused and not image.header.has_data_file:
            # Nothing on disk names these clusters, so no write-back is needed
            # before they are free again; but they are dirty with our bytes now.
            image.freed.add(self.cluster_index, self.nb_clusters, False)
        self._finish(image)

    def cancel(self, image: "Qcow2Driver") -> None:
        """Nothing was written, nor is on the way."""
        if not self.reused:
            untake_clusters(image, self.cluster_index, self.nb_clusters)
        self._finish(image)

    def _finish(self, image: "Qcow2Driver") -> None:
        self.l2.pins -= 1
        image.epochs.leave(self.epoch)
        image.in_flight.remove(self.in_flight)
        image.start_writeback_if_due()

    def link(self, image: "Qcow2Driver") -> None:
        """Let the L2 entries name the clusters."""
        l2, first = self.l2, self.l2_index
        end = first + self.nb_clusters
        words = l2.words
        if not self.reused:
            for old in filter(None, words[first:end]):
                free_entry(image, old)
        entry = (self.cluster_index << image.cluster_bits) | OFLAG_COPIED
        step = image.cluster_size
        words[first:end] = array(
            "Q", range(entry, entry + self.nb_clusters * step, step)
        )
        image.tables.mark_dirty(l2, first, end)


async def begin_write(image: "Qcow2Driver", offset: int, length: int) -> WritePlan:
    """See `FormatDriver.begin_write`."""
    if image.tables.dirty_bytes > image.tables.dirty_limit:
        await image.writeback.flush()
    unit_mask = image.subcluster_size - 1
    length = min(length, _MAX_PIECE)
    while True:
        async with image.lock:
            image.check_writable()
            if offset >= round_up(image.size, image.cluster_size):
                raise BlockError(errno.ENOSPC, "the disk has become smaller")
            start = offset & ~unit_mask
            end = (offset + length + unit_mask) & ~unit_mask
            busy = image.in_flight.first_overlap(start, end)
            if busy is None or busy.start > start:
                if busy is not None:
                    length = busy.start - offset
                while (plan := image.try_plan(image, offset, length)) is None:
                    await slice_for_change(image, offset)
                    await image.refcounts.prepare_allocation()
                # What is taken at once, inline, nobody hears of.
                if not isinstance(plan.private, int) and not plan.private.reused:
                    image.storage.announce("cluster_alloc")
                return plan
        await busy.wait()


def try_begin_write(image: "Qcow2Driver", offset: int, length: int) -> WritePlan | None:
    """See `FormatDriver.try_begin_write`."""
    if image.lock.locked() or image.tables.dirty_bytes > image.tables.dirty_limit:
        return None
    if image.in_flight:
        unit_mask = image.subcluster_size - 1
        end = (offset + length + unit_mask) & ~unit_mask
        if image.in_flight.find(offset & ~unit_mask, end) is not None:
            return None
    return image.try_plan(image, offset, length, whole=True)


def own_slice(image: "Qcow2Driver", offset: int) -> L2Slice | None:
    """Return the slice of a guest offset, if its L2 table is ours to change
    and it is in reach without waiting."""
    tables = image.tables
    key = offset >> tables.slice_shift
    l1_index = tables.l1_index(key)
    if not tables.table_offset(l1_index) or tables.l1[l1_index] < OFLAG_COPIED:
        return None
    return tables.try_load(key)


def try_plan(
    image: "Qcow2Driver", offset: int, length: int, *, whole: bool = False
) -> WritePlan | None:
    """Find or allocate clusters; None if a table must be read or made first.

    Nobody else holds the lock, and nothing in flight overlaps. ``whole``:
    None also if one plan can't cover all of ``length``.
    """
    tables, cluster_size = image.tables, image.cluster_size
    l2 = own_slice(image, offset)
    if l2 is None:
        return None
    index = (offset >> image.cluster_bits) & (tables.slice_entries - 1)
    in_cluster = offset & (cluster_size - 1)
    covered = image.mapping.in_place_length(l2, index, in_cluster, length)
    if covered:
        if whole and covered < length:
            return None
        host_offset = (l2.words[index] & OFFSET_MASK) + in_cluster
        epoch = image.writers.enter_in_place()
        return WritePlan(offset, covered, host_offset, private=epoch)

    words = l2.words
    needed = -(-(in_cluster + length) // cluster_size)
    wanted = min(needed, len(words) - index)
    nb_clusters = 1
    reused = _is_own_zero(image, words[index])
    if reused:
        cluster_index = (words[index] & OFFSET_MASK) >> image.cluster_bits
        image.check_not_metadata(cluster_index)
    else:
        others = words[index + 1 : index + wanted]
        if any(others):
            nb_clusters += len(list(takewhile(needs_cluster, others)))
        else:
            nb_clusters = wanted
        if whole and nb_clusters < needed:
            return None
        taken = take_clusters(image, offset - in_cluster, nb_clusters)
        if taken is None:
            return None
        cluster_index, nb_clusters = taken
    if whole and nb_clusters < needed:
        if not reused:
            untake_clusters(image, cluster_index, nb_clusters)
        return None
    host_start = cluster_index << image.cluster_bits
    reads_zero = not reused and image.reads_zero_from <= host_start
    if not reused:
        image.note_used(host_start + nb_clusters * cluster_size)
    length = min(length, nb_clusters * cluster_size - in_cluster)
    start = offset - in_cluster
    allocation = Allocation(
        image.in_flight.add(start, start + nb_clusters * cluster_size),
        l2, index, cluster_index, nb_clusters, reused, image.epochs.enter(),
    )  # fmt: skip
    l2.pins += 1
    return WritePlan(
        guest_offset=offset,
        length=length,
        host_offset=host_start + in_cluster,
        head=in_cluster,
        tail=nb_clusters * cluster_size - in_cluster - length,
        reads_zero=reads_zero,
        private=allocation,
    )


def take_clusters(
    image: "Qcow2Driver", offset: int, nb_clusters: int
) -> tuple[int, int] | None:
    """Take host clusters for the guest's from ``offset`` on; None if that
    needs waiting. Returns the first one's index and how many there are."""
    if image.header.has_data_file:
        return (offset | IN_DATA_FILE) >> image.cluster_bits, nb_clusters
    return image.refcounts.try_allocate(nb_clusters)


def untake_clusters(image: "Qcow2Driver", index: int, nb_clusters: int) -> None:
    """Give back what `take_clusters` has just returned."""
    if not image.header.has_data_file:
        image.refcounts.untake(index, nb_clusters)


def _is_own_zero(image: "Qcow2Driver", entry: int) -> bool:
    """Whether an entry is a preallocated zero cluster that is ours alone."""
    own_zero = OFLAG_COPIED | OFLAG_ZERO
    return (
        image.header.version >= 3
        and entry & (own_zero | OFLAG_COMPRESSED) == own_zero
        and bool(entry & OFFSET_MASK)
    )


def needs_cluster(entry: int) -> bool:
    """Whether a write to the cluster of this entry must allocate.

    Not if it is unshared: a plain cluster is written in place then, and a
    preallocated zero cluster used.
    """
    return (
        bool(entry & OFLAG_COMPRESSED)
        or not entry & OFFSET_MASK
        or entry < OFLAG_COPIED
    )


def are_alike(words: "array[int]", period: int = 1) -> bool:
    """Whether words are the first ``period`` ones over and over. Told at once: one
    request may be about billions of entries."""
    return words == words[:period] * (len(words) // period)


def names_nothing(entry: int) -> bool:
    """Whether an L2 entry has no host cluster."""
    return not entry & (OFFSET_MASK | OFLAG_COMPRESSED)


async def slice_for_change(image: "Qcow2Driver", offset: int) -> L2Slice:
    """Return the slice of a guest offset, in a table that is ours to change.

    Makes the L2 table if there is none, and a copy of one that a snapshot
    shares. The lock is held. Raises `BlockError`, and `CorruptImage`.
    """
    tables = image.tables
    key = offset >> tables.slice_shift
    l1_index = tables.l1_index(key)
    if l1_index >= len(tables.l1):
        raise BlockError(errno.ENOSPC, "the disk has become smaller")
    table_offset = tables.table_offset(l1_index)
    if not table_offset or tables.l1[l1_index] < OFLAG_COPIED:
        cluster_index, _ = await image.refcounts.allocate(1)
        image.metadata.add(cluster_index)
        new_offset = cluster_index << image.cluster_bits
        image.note_used(new_offset + image.cluster_size)
        entry = new_offset | OFLAG_COPIED
        try:
            await image.refcounts.write_empty(cluster_index, 1)
            if table_offset:
                await tables.copy_table(l1_index, entry)
            else:
                tables.add_table(l1_index, entry)
        except BaseException:
            # A read or write failed, or the request was cancelled.
            image.metadata.discard(cluster_index)
            image.freed.add(cluster_index, 1, False)
            raise
        if table_offset:
            # The old table stays metadata: a snapshot still has it.
            image.freed.add(table_offset >> image.cluster_bits, 1, False)
    return await tables.load(key)


def end_write(image: "Qcow2Driver", plan: WritePlan) -> None:
    """See `FormatDriver.end_write`. One block without awaits: a lookup sees
    all of the old mapping or all of the new."""
    allocation = plan.private
    if isinstance(allocation, int):
        image.writers.leave_in_place(allocation)
        return
    allocation.end(image)


def abort_write(image: "Qcow2Driver", plan: WritePlan) -> None:
    """See `FormatDriver.abort_write`."""
    allocation = plan.private
    if isinstance(allocation, int):
        image.writers.leave_in_place(allocation)
        return
    allocation.abort(image)


def cancel_write(image: "Qcow2Driver", plan: WritePlan) -> None:
    """See `FormatDriver.cancel_write`."""
    allocation = plan.private
    if isinstance(allocation, int):
        image.writers.leave_in_place(allocation)
        return
    allocation.cancel(image)


def free_entry(image: "Qcow2Driver", entry: int, *, discard: bool = False) -> None:
    """Note that the active L2 table no longer has this entry.

    ``discard``: give the space back to the file system, not only to the
    image, where the next allocation would want it.
    """
    if image.header.has_data_file:
        return
    if entry & OFLAG_COMPRESSED:
        host_offset, length = compressed_range(entry, image.cluster_bits)
        first = host_offset >> image.cluster_bits
        last = (host_offset + length - 1) >> image.cluster_bits
        image.compressed.forget(entry)
        image.freed.add(first, last - first + 1, discard)
    elif entry & OFFSET_MASK:
        index = (entry & OFFSET_MASK) >> image.cluster_bits
        image.freed.add(index, 1, discard)

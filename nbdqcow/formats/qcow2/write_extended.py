"""Guest writes to images with subclusters.

Only subclusters that a write covers in part are completed with old content.
A write to subclusters that are not stored yet, in a cluster of its own, goes
to their place in that cluster, and the bits are set when the data is there.
Such writers register the subclusters that they work on, those that take new
clusters the whole of these: two writers may fill different subclusters of one
cluster at the same time, but one only after the cluster is linked.

Source: qcow2.txt, "Extended L2 Entries".
"""

from array import array
from typing import TYPE_CHECKING

from nbdqcow.block.driver import WritePlan
from nbdqcow.block.inflight import InFlightRange
from nbdqcow.formats.qcow2.entries import (
    ALL_ALLOCATED,
    NB_SUBCLUSTERS,
    OFFSET_MASK,
    OFLAG_COMPRESSED,
    OFLAG_COPIED,
    subcluster_mask,
)
from nbdqcow.formats.qcow2.mapping_extended import ExtendedMapping
from nbdqcow.formats.qcow2.tables import L2Slice
from nbdqcow.formats.qcow2.write import (
    Allocation,
    free_entry,
    needs_cluster,
    own_slice,
    take_clusters,
    untake_clusters,
)

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.driver import Qcow2Driver


class ExtendedAllocation(Allocation):
    """Subclusters for a guest write, whose bits are not set yet.

    ``first``, ``last``: the subclusters written, counted from the first one
    of the first cluster. ``l2_index`` is the entry's, not the word's.
    """

    __slots__ = ("first", "last")

    def __init__(
        self,
        in_flight: InFlightRange,
        l2: L2Slice,
        l2_index: int,
        cluster_index: int,
        nb_clusters: int,
        reused: bool,
        epoch: int,
        first: int,
        last: int,
    ) -> None:
        super().__init__(
            in_flight, l2, l2_index, cluster_index, nb_clusters, reused, epoch
        )
        self.first = first
        self.last = last

    def link(self, image: "Qcow2Driver") -> None:
        """Let the L2 entries name the clusters, and say what they hold."""
        words = self.l2.words
        entry = (self.cluster_index << image.cluster_bits) | OFLAG_COPIED
        first, last = self.first, self.last
        word_index = 2 * self.l2_index
        for index in range(word_index, word_index + 2 * self.nb_clusters, 2):
            written = subcluster_mask(first, min(last, NB_SUBCLUSTERS - 1))
            bitmap = words[index + 1] | written
            if not self.reused:
                old = words[index]
                if old & OFLAG_COMPRESSED:
                    bitmap = written
                free_entry(image, old)
                words[index] = entry
            words[index + 1] = bitmap & ~(written << NB_SUBCLUSTERS)
            entry += image.cluster_size
            first, last = 0, last - NB_SUBCLUSTERS
        image.tables.mark_dirty(self.l2, word_index, word_index + 2 * self.nb_clusters)


def try_plan(
    image: "Qcow2Driver", offset: int, length: int, *, whole: bool = False
) -> WritePlan | None:
    """As `nbdqcow.formats.qcow2.write.try_plan`.

    ``whole``: None also if more must be copied than what the write leaves of
    the subclusters at its two ends.
    """
    l2 = own_slice(image, offset)
    if l2 is None:
        return None
    mapping = image.mapping
    assert isinstance(mapping, ExtendedMapping)
    index = (offset >> image.cluster_bits) & (image.tables.slice_entries - 1)
    in_cluster = offset & (image.cluster_size - 1)
    own = mapping.own_length(l2, index, in_cluster, length)
    if not own:
        return _plan_new(image, mapping, l2, index, offset, length, whole)
    if whole and own < length:
        return None
    return _plan_own(image, l2, index, offset, own)


def _plan_own(
    image: "Qcow2Driver", l2: L2Slice, index: int, offset: int, length: int
) -> WritePlan:
    """Plan a write to clusters that are ours alone, one behind the other."""
    words, unit = l2.words, image.subcluster_size
    in_cluster = offset & (image.cluster_size - 1)
    host_start = words[2 * index] & OFFSET_MASK
    first = in_cluster // unit
    last = (in_cluster + length - 1) // unit
    nb_clusters = last // NB_SUBCLUSTERS + 1
    if _all_stored(words[2 * index + 1 : 2 * (index + nb_clusters) : 2], first, last):
        epoch = image.writers.enter_in_place()
        return WritePlan(offset, length, host_start + in_cluster, private=epoch)
    last_word = words[2 * (index + nb_clusters) - 1]
    head, tail = offset % unit, -(offset + length) % unit
    if words[2 * index + 1] >> first & 1:
        head = 0
    if last_word >> last % NB_SUBCLUSTERS & 1:
        tail = 0
    start = offset - offset % unit
    allocation = ExtendedAllocation(
        image.in_flight.add(start, start + (last + 1 - first) * unit),
        l2, index, host_start >> image.cluster_bits, nb_clusters, True,
        image.epochs.enter(), first, last,
    )  # fmt: skip
    l2.pins += 1
    return WritePlan(
        offset, length, host_start + in_cluster, head, tail, private=allocation
    )


def _all_stored(bitmaps: "array[int]", first: int, last: int) -> bool:
    """Whether subclusters ``first`` to ``last``, counted through clusters, are
    all allocated."""
    for bitmap in bitmaps:
        touched = subcluster_mask(first, min(last, NB_SUBCLUSTERS - 1))
        if bitmap & touched != touched:
            return False
        first, last = 0, last - NB_SUBCLUSTERS
    return True


def _plan_new(
    image: "Qcow2Driver",
    mapping: ExtendedMapping,
    l2: L2Slice,
    index: int,
    offset: int,
    length: int,
    whole: bool,
) -> WritePlan | None:
    """Plan a write to new clusters."""
    words, unit, cluster_size = l2.words, image.subcluster_size, image.cluster_size
    in_cluster = offset & (cluster_size - 1)
    needed = -(-(in_cluster + length) // cluster_size)
    wanted = min(needed, image.tables.slice_entries - index)
    nb_clusters = 1
    while nb_clusters < wanted and needs_cluster(words[2 * (index + nb_clusters)]):
        nb_clusters += 1
    if whole and nb_clusters < needed:
        return None
    length = min(length, nb_clusters * cluster_size - in_cluster)
    touched = in_cluster // unit, (in_cluster + length - 1) // unit
    first, last = _copied_range(mapping, l2, index, *touched)
    if whole and (first, last) != touched:
        return None
    taken = take_clusters(image, offset - in_cluster, nb_clusters)
    if taken is None:
        return None
    cluster_index, nb_taken = taken
    if nb_taken < nb_clusters:
        if whole:
            untake_clusters(image, cluster_index, nb_taken)
            return None
        nb_clusters = nb_taken
        length = nb_clusters * cluster_size - in_cluster
        last = nb_clusters * NB_SUBCLUSTERS - 1
    host_start = cluster_index << image.cluster_bits
    reads_zero = image.reads_zero_from <= host_start
    image.note_used(host_start + nb_clusters * cluster_size)
    start = offset - in_cluster
    allocation = ExtendedAllocation(
        image.in_flight.add(start, start + nb_clusters * cluster_size),
        l2, index, cluster_index, nb_clusters, False,
        image.epochs.enter(), first, last,
    )  # fmt: skip
    l2.pins += 1
    return WritePlan(
        guest_offset=offset,
        length=length,
        host_offset=host_start + in_cluster,
        head=in_cluster - first * unit,
        tail=(last + 1) * unit - in_cluster - length,
        reads_zero=reads_zero,
        private=allocation,
    )


def _copied_range(
    mapping: ExtendedMapping, l2: L2Slice, index: int, first: int, last: int
) -> tuple[int, int]:
    """Widen a range of subclusters, counted from the first one of the cluster
    at ``index``, by those that are stored so far: new clusters must hold these,
    too, in one piece with what is written."""
    before = _stored(mapping, l2, index)
    behind = _stored(mapping, l2, index + last // NB_SUBCLUSTERS)
    if before:
        first = min(first, (before & -before).bit_length() - 1)
    if behind:
        base = last - last % NB_SUBCLUSTERS
        last = max(last, base + behind.bit_length() - 1)
    return first, last


def _stored(mapping: ExtendedMapping, l2: L2Slice, index: int) -> int:
    """Return the allocation bits of a cluster that is about to be replaced."""
    entry, bitmap = l2.words[2 * index], l2.words[2 * index + 1]
    if entry & OFLAG_COMPRESSED:
        return ALL_ALLOCATED
    mapping.check_sound(entry, bitmap)
    return bitmap & ALL_ALLOCATED

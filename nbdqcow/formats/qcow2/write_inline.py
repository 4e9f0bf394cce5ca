"""Guest writes to one cluster that end in the turn of the loop in which they
begin.

Nobody can meet such a write, so it is not registered anywhere: what is left is
to find the entry, to take a cluster, and to change the entry afterwards. What
is not of the most frequent kind goes the general way.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from nbdqcow.block.driver import WritePlan
from nbdqcow.errors import CorruptImage
from nbdqcow.formats.qcow2.entries import (
    ALL_ALLOCATED,
    NB_SUBCLUSTERS,
    OFFSET_MASK,
    OFLAG_COMPRESSED,
    OFLAG_COPIED,
)
from nbdqcow.formats.qcow2.tables import L2Slice

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.driver import Qcow2Driver


class InlineLink:
    """An L2 entry that will name the cluster of a write.

    ``cluster_index``: the cluster that was taken for it; 0: none was.
    """

    __slots__ = ("cluster_index", "entry", "l2", "word_index")

    def __init__(
        self, l2: L2Slice, word_index: int, entry: int, cluster_index: int
    ) -> None:
        self.l2 = l2
        self.word_index = word_index
        self.entry = entry
        self.cluster_index = cluster_index

    def end(self, image: "Qcow2Driver") -> None:
        """The data is in the file."""
        l2, index = self.l2, self.word_index
        l2.words[index] = self.entry
        image.tables.mark_dirty(l2, index, index + 1)

    def cancel(self, image: "Qcow2Driver") -> None:
        """The data was not written."""
        if self.cluster_index:
            image.refcounts.untake(self.cluster_index, 1)


class ExtendedInlineLink(InlineLink):
    """The same with a bitmap of subclusters."""

    __slots__ = ("bitmap",)

    def __init__(
        self, l2: L2Slice, word_index: int, entry: int, bitmap: int, cluster_index: int
    ) -> None:
        super().__init__(l2, word_index, entry, cluster_index)
        self.bitmap = bitmap

    def end(self, image: "Qcow2Driver") -> None:
        """The data is in the file."""
        l2, index = self.l2, self.word_index
        l2.words[index], l2.words[index + 1] = self.entry, self.bitmap
        image.tables.mark_dirty(l2, index, index + 2)


class InlineWriter:
    """Plans writes to a cluster that is not there yet, in an image without a
    data file or numbered sectors."""

    def __init__(
        self,
        image: "Qcow2Driver",
        try_begin_any: Callable[[int, int], WritePlan | None],
    ) -> None:
        """``try_begin_any`` is for all other writes."""
        self._image = image
        self._try_begin_any = try_begin_any
        self._tables = image.tables
        self._young = image.tables.young
        self._slice_shift = image.tables.slice_shift
        self._l1_shift = image.tables.l1_shift
        self._index_mask = image.tables.slice_entries - 1
        self._cluster_bits = image.cluster_bits
        self._cluster_size = image.cluster_size

    def _find(self, offset: int, length: int) -> L2Slice | None:
        """Return the slice of a write to one cluster if it is in memory, its
        table is ours to change, and nobody else works on the image."""
        found = self._young.get(offset >> self._slice_shift)
        image, tables = self._image, self._tables
        if (
            found is None
            or (offset & (self._cluster_size - 1)) + length > self._cluster_size
            or image.in_flight
            or image.lock.locked()
            or image.read_only
            or tables.l1[offset >> self._l1_shift] < OFLAG_COPIED
            or tables.dirty_bytes > tables.dirty_limit
        ):
            return None
        return found

    def _try_take(self) -> tuple[int, bool] | None:
        """Take a cluster. Returns its index and whether it reads as zeroes, or
        None if that needs waiting or the counts can't be right."""
        image = self._image
        try:
            taken = image.refcounts.try_allocate(1)
        except CorruptImage:
            # The coroutine finds the same, and marks the image.
            return None
        if taken is None:
            return None
        host_start = taken[0] << self._cluster_bits
        reads_zero = image.reads_zero_from <= host_start
        image.note_used(host_start + self._cluster_size)
        return taken[0], reads_zero

    def try_begin_write(self, offset: int, length: int) -> WritePlan | None:
        """See `FormatDriver.try_begin_write`."""
        found = self._find(offset, length)
        if found is None:
            return self._try_begin_any(offset, length)
        index = (offset >> self._cluster_bits) & self._index_mask
        if found.words[index]:
            return self._try_begin_any(offset, length)
        taken = self._try_take()
        if taken is None:
            return None
        cluster_index, reads_zero = taken
        host_start = cluster_index << self._cluster_bits
        head = offset & (self._cluster_size - 1)
        return WritePlan(
            offset, length, host_start + head,
            head, self._cluster_size - head - length, reads_zero,
            InlineLink(found, index, host_start | OFLAG_COPIED, cluster_index),
        )  # fmt: skip


class ExtendedInlineWriter(InlineWriter):
    """Plans writes to subclusters of a cluster that is ours alone, or not there
    yet."""

    def __init__(
        self,
        image: "Qcow2Driver",
        try_begin_any: Callable[[int, int], WritePlan | None],
    ) -> None:
        super().__init__(image, try_begin_any)
        self._unit = image.subcluster_size
        # Any of these bits: not a plain cluster, or not well aligned.
        self._not_plain = OFLAG_COMPRESSED | (OFFSET_MASK & (image.cluster_size - 1))

    def try_begin_write(self, offset: int, length: int) -> WritePlan | None:
        """See `FormatDriver.try_begin_write`."""
        found = self._find(offset, length)
        if found is None:
            return self._try_begin_any(offset, length)
        image, unit = self._image, self._unit
        in_cluster = offset & (self._cluster_size - 1)
        end = in_cluster + length
        index = ((offset >> self._cluster_bits) & self._index_mask) << 1
        entry, bitmap = found.words[index], found.words[index + 1]
        first, last = in_cluster // unit, (end - 1) // unit
        if bitmap & bitmap >> NB_SUBCLUSTERS & ALL_ALLOCATED:
            return None
        head, tail = in_cluster % unit, -end % unit
        cluster_index, reads_zero = 0, False
        if not entry and not bitmap & ALL_ALLOCATED:
            taken = self._try_take()
            if taken is None:
                return None
            cluster_index, reads_zero = taken
            host_start = cluster_index << self._cluster_bits
            entry = host_start | OFLAG_COPIED
        else:
            host_start = entry & OFFSET_MASK
            if (
                not host_start
                or entry < OFLAG_COPIED
                or entry & self._not_plain
                or host_start >> self._cluster_bits in image.metadata
            ):
                return self._try_begin_any(offset, length)
            if bitmap >> first & 1:
                head = 0
            if bitmap >> last & 1:
                tail = 0
        written = (2 << last) - (1 << first)
        bitmap = (bitmap | written) & ~(written << NB_SUBCLUSTERS)
        return WritePlan(
            offset, length, host_start + in_cluster, head, tail, reads_zero,
            ExtendedInlineLink(found, index, entry, bitmap, cluster_index),
        )  # fmt: skip

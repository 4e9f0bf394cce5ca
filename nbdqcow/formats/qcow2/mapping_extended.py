"""Where guest bytes are, in an image with subclusters.

An entry is two words: the host offset, and a bitmap that says of each of the
cluster's 32 subclusters whether it is stored there, reads as zeroes, or is
not in this image.

Source: qcow2.txt, "Extended L2 Entries".
"""

from collections.abc import Callable
from typing import Final

from nbdqcow.errors import CorruptImage
from nbdqcow.formats.qcow2.entries import (
    ALL_ALLOCATED,
    ALL_ZERO,
    NB_SUBCLUSTERS,
    OFFSET_MASK,
    OFLAG_COMPRESSED,
    OFLAG_COPIED,
    SUBCLUSTERS_BITS,
    is_sound,
    subcluster_mask,
    subcluster_stretch,
)
from nbdqcow.formats.qcow2.mapping import Mapping
from nbdqcow.formats.qcow2.tables import L2Slice, Tables
from nbdqcow.types import COMPRESSED, DATA, UNALLOCATED, ZERO, ZERO_ALLOCATED, Run

_TOUCHED: Final = tuple(
    tuple(
        subcluster_mask(first, last) if first <= last else ALL_ALLOCATED
        for last in range(NB_SUBCLUSTERS)
    )
    for first in range(NB_SUBCLUSTERS)
)
"""`subcluster_mask` by first and last."""

_UNIFORM: Final = {
    DATA: ALL_ALLOCATED,
    ZERO: ALL_ZERO,
    ZERO_ALLOCATED: ALL_ZERO,
    UNALLOCATED: 0,
}
"""The bitmap of a cluster whose subclusters are all of one kind."""


class ExtendedMapping(Mapping):
    """As `Mapping`, for extended L2 entries.

    What can't be right makes ``try_*`` decline, so that `map` and
    `begin_write` raise `CorruptImage`, where the driver marks the image.
    """

    def __init__(
        self,
        tables: Tables,
        metadata: set[int],
        check_overlap: Callable[[int], None],
    ) -> None:
        # Bit 0 of an extended entry means nothing.
        super().__init__(tables, metadata, False, check_overlap)
        self._subcluster_bits = self._cluster_bits - SUBCLUSTERS_BITS

    def try_map(self, offset: int, length: int) -> Run | None:
        """See `FormatDriver.try_map`."""
        found = self._young.get(offset >> self._slice_shift)
        if found is not None:
            words = found.words
            index = ((offset >> self._cluster_bits) & self._index_mask) << 1
            entry = words[index]
            host_offset = entry & OFFSET_MASK
            if host_offset and not entry & self._not_plain:
                in_cluster = offset & self._cluster_mask
                end = in_cluster + length
                if end <= self._cluster_size:
                    bits = self._subcluster_bits
                    touched = _TOUCHED[in_cluster >> bits][(end - 1) >> bits]
                    bitmap = words[index + 1]
                    if (
                        bitmap & touched == touched
                        and not bitmap >> NB_SUBCLUSTERS & touched
                    ):
                        return DATA, host_offset + in_cluster, length
        try:
            if found is None and not self._reach(offset):
                return None
            return self._run(offset, length)
        except CorruptImage:
            return None

    def try_map_write(self, offset: int, length: int) -> int:
        """See `FormatDriver.try_map_write`."""
        found = self._young.get(offset >> self._slice_shift)
        if found is None and (found := self._try_reach(offset)) is None:
            return -1
        words = found.words
        index = ((offset >> self._cluster_bits) & self._index_mask) << 1
        entry = words[index]
        host_offset = entry & OFFSET_MASK
        if not host_offset or entry & self._not_writable or entry < OFLAG_COPIED:
            return -1
        if host_offset >> self._cluster_bits in self._metadata:
            return -1
        in_cluster = offset & self._cluster_mask
        end = in_cluster + length
        if end <= self._cluster_size:
            bits = self._subcluster_bits
            touched = _TOUCHED[in_cluster >> bits][(end - 1) >> bits]
            bitmap = words[index + 1]
            if bitmap & touched != touched or bitmap >> NB_SUBCLUSTERS & touched:
                return -1
        else:
            try:
                if self.in_place_length(found, index >> 1, in_cluster, length) < length:
                    return -1
            except CorruptImage:
                return -1
        return host_offset + in_cluster

    def in_place_length(
        self, found: L2Slice, index: int, in_cluster: int, length: int
    ) -> int:
        """Return how many of ``length`` bytes lie in one contiguous run of
        allocated subclusters in unshared clusters of a slice."""
        own = self.own_length(found, index, in_cluster, length)
        words, bits = found.words, self._subcluster_bits
        covered = 0
        while covered < own:
            kind, nb = subcluster_stretch(words[2 * index + 1], in_cluster >> bits)
            if kind != DATA:
                break
            stretch_end = ((in_cluster >> bits) + nb) << bits
            covered += stretch_end - in_cluster
            if stretch_end < self._cluster_size:
                break
            index, in_cluster = index + 1, 0
        return min(covered, own)

    def own_length(
        self, found: L2Slice, index: int, in_cluster: int, length: int
    ) -> int:
        """Return how many of ``length`` bytes lie in one contiguous run of
        unshared clusters of a slice, whatever their subclusters are."""
        words = found.words
        entry = words[2 * index]
        if not entry & OFFSET_MASK or entry & self._not_plain or entry < OFLAG_COPIED:
            return 0
        first_host = (entry & OFFSET_MASK) >> self._cluster_bits
        covered = self._cluster_size - in_cluster
        nb_clusters = 1
        self.check_sound(entry, words[2 * index + 1])
        while covered < length and index + nb_clusters <= self._index_mask:
            entry += self._cluster_size
            if words[2 * (index + nb_clusters)] != entry:
                break
            self.check_sound(entry, words[2 * (index + nb_clusters) + 1])
            nb_clusters += 1
            covered += self._cluster_size
        self._check_not_metadata(first_host, nb_clusters)
        return min(covered, length)

    def _run_in_slice(self, offset: int, length: int) -> Run:
        tables = self._tables
        key = offset >> self._slice_shift
        if not tables.table_offset(tables.l1_index(key)):
            return UNALLOCATED, 0, tables.empty_until(offset, offset + length) - offset
        words = self._young[key].words
        index = ((offset >> self._cluster_bits) & self._index_mask) << 1
        in_cluster = offset & self._cluster_mask
        entry = words[index]
        if entry & OFLAG_COMPRESSED:
            return COMPRESSED, entry, min(self._cluster_size - in_cluster, length)
        bits = self._subcluster_bits
        first = in_cluster >> bits
        kind, host_start, nb = self._stretch(entry, words[index + 1], first)
        covered = ((first + nb) << bits) - in_cluster
        uniform = _UNIFORM[kind]
        step = self._cluster_size if host_start else 0
        whole = first + nb == NB_SUBCLUSTERS
        while whole and covered < length and (index := index + 2) < len(words):
            entry += step
            if words[index] == entry and words[index + 1] == uniform:
                covered += self._cluster_size
                continue
            next_entry = words[index]
            if next_entry & OFLAG_COMPRESSED:
                break
            next_kind, next_start, nb = self._stretch(next_entry, words[index + 1], 0)
            if next_kind != kind or next_start != (entry & OFFSET_MASK if step else 0):
                break
            covered += nb << bits
            whole = nb == NB_SUBCLUSTERS
            entry = next_entry
        return kind, host_start and host_start + in_cluster, min(covered, length)

    def _stretch(self, entry: int, bitmap: int, first: int) -> Run:
        """Return the kind of subcluster ``first``, where its cluster is, if
        anywhere, and how many subclusters from it on are alike."""
        self.check_sound(entry, bitmap)
        kind, nb = subcluster_stretch(bitmap, first)
        host_start = entry & OFFSET_MASK
        if kind == ZERO and host_start:
            kind = ZERO_ALLOCATED
        return kind, host_start, nb

    def check_sound(self, entry: int, bitmap: int) -> None:
        """Raise `CorruptImage` if a standard cluster's entry can't be right."""
        if entry & OFFSET_MASK & self._cluster_mask:
            raise CorruptImage(
                f"Cluster allocation offset {entry & OFFSET_MASK:#x} unaligned"
            )
        if not is_sound(entry, bitmap):
            raise CorruptImage(
                f"Invalid subcluster bitmap {bitmap:#x} (L2 entry {entry:#x})"
            )

"""Where guest bytes are: the lookup that every request goes through.

An L2 entry is 0 (not in this image), the host offset of a cluster, aligned to a
sector and not always to a cluster, or the descriptor of a compressed cluster.
"""

from typing import Final

from nbdqcow.errors import CorruptImage
from nbdqcow.formats.qcow1.header import COMPRESSED as FLAG_COMPRESSED
from nbdqcow.formats.qcow1.tables import L2Slice, Tables
from nbdqcow.types import COMPRESSED, DATA, UNALLOCATED, Run
from nbdqcow.units import SECTOR_SIZE

_NOT_PLAIN = FLAG_COMPRESSED | (SECTOR_SIZE - 1)
_MAX_PIECES: Final = 32
"""Slices, or stretches of the L1 table, looked at for one run: a client may ask
about a whole disk, and others wait meanwhile."""


class Mapping:
    """Answers lookups from the cached tables, or reads them first."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._young = tables.young
        self._slice_shift = tables.slice_shift
        self._cluster_bits = tables.cluster_bits
        self._cluster_size = tables.cluster_size
        self._cluster_mask = tables.cluster_size - 1
        self._index_mask = tables.slice_entries - 1
        # An instance's attribute costs less than a module's.
        self._not_plain = _NOT_PLAIN
        self._not_writable = _NOT_PLAIN

    def try_map(self, offset: int, length: int) -> Run | None:
        """See `FormatDriver.try_map`."""
        found = self._young.get(offset >> self._slice_shift)
        if found is not None:
            entry = found.words[(offset >> self._cluster_bits) & self._index_mask]
            if entry and not entry & self._not_plain:
                in_cluster = offset & self._cluster_mask
                if in_cluster + length <= self._cluster_size:
                    return DATA, entry + in_cluster, length
        elif not self._reach(offset):
            return None
        return self._run(offset, length)

    async def map(self, offset: int, length: int) -> Run:
        """See `FormatDriver.map`."""
        while (run := self.try_map(offset, length)) is None:
            await self._tables.load(offset >> self._slice_shift)
        return run

    def try_map_write(self, offset: int, length: int) -> int:
        """See `FormatDriver.try_map_write`."""
        found = self._young.get(offset >> self._slice_shift)
        if found is None:
            if not self._reach(offset):
                return -1
            found = self._young.get(offset >> self._slice_shift)
            if found is None:
                return -1
        index = (offset >> self._cluster_bits) & self._index_mask
        entry = found.words[index]
        if not entry or entry & self._not_writable:
            return -1
        in_cluster = offset & self._cluster_mask
        if in_cluster + length > self._cluster_size or not found.checked[index]:
            try:
                if self.in_place_length(found, index, in_cluster, length) < length:
                    return -1
            except CorruptImage:
                # The coroutine finds the same, and can say so.
                return -1
        return entry + in_cluster

    def freeze(self, frozen: bool) -> None:
        """Let no write be mapped from now on, or let them again."""
        self._not_writable = (1 << 64) - 1 if frozen else _NOT_PLAIN

    def in_place_length(
        self, found: L2Slice, index: int, in_cluster: int, length: int
    ) -> int:
        """Return how many of ``length`` bytes lie in one contiguous run of
        plain clusters of a slice; 0 if the first does not.

        Raises `CorruptImage` for a cluster that overlaps with metadata.
        """
        words, checked = found.words, found.checked
        entry = words[index]
        if not entry or entry & _NOT_PLAIN:
            return 0
        covered = self._cluster_size - in_cluster
        end = index + 1
        expected = entry + self._cluster_size
        while covered < length and end < len(words) and words[end] == expected:
            covered += self._cluster_size
            expected += self._cluster_size
            end += 1
        for i in range(index, end):
            if not checked[i]:
                if self._tables.overlaps_metadata(words[i]):
                    raise CorruptImage(
                        "Preventing invalid write on metadata (guest data maps to"
                        f" metadata at {words[i]:#x})"
                    )
                checked[i] = 1
        return min(covered, length)

    def needs_cluster(self, entry: int) -> bool:
        """Whether a write to the cluster of this entry must allocate.

        Raises `CorruptImage` if the entry can't be right.
        """
        if not entry or entry & FLAG_COMPRESSED:
            return True
        if entry & (SECTOR_SIZE - 1):
            raise _damaged()
        return False

    def _reach(self, offset: int) -> bool:
        """Bring the slice of a guest offset into ``young`` without waiting.

        True also if there is no L2 table: nothing is needed then.
        """
        tables = self._tables
        key = offset >> self._slice_shift
        if not tables.table_offset(tables.l1_index(key)):
            return True
        return tables.try_load(key) is not None

    def _run(self, offset: int, length: int) -> Run:
        """Return the longest run in reach, or as much of it as is looked at in
        one turn; its beginning is in reach."""
        kind, host_offset, covered = self._run_in_slice(offset, length)
        nb_pieces = 1
        while covered < length and kind != COMPRESSED and nb_pieces < _MAX_PIECES:
            nb_pieces += 1
            try:
                if not self._reach(offset + covered):
                    break
                next_kind, next_host, more = self._run_in_slice(
                    offset + covered, length - covered
                )
            except CorruptImage:
                # What comes before it can be read.
                break
            if next_kind != kind:
                break
            if kind == DATA and next_host != host_offset + covered:
                break
            covered += more
        return kind, host_offset, covered

    def _run_in_slice(self, offset: int, length: int) -> Run:
        tables = self._tables
        key = offset >> self._slice_shift
        if not tables.table_offset(tables.l1_index(key)):
            return UNALLOCATED, 0, tables.empty_until(offset, offset + length) - offset
        words = self._young[key].words
        index = (offset >> self._cluster_bits) & self._index_mask
        in_cluster = offset & self._cluster_mask
        covered = self._cluster_size - in_cluster
        entry = words[index]
        if entry & FLAG_COMPRESSED:
            return COMPRESSED, entry, min(covered, length)
        if entry & (SECTOR_SIZE - 1):
            raise _damaged()
        step = self._cluster_size if entry else 0
        host_offset = entry + in_cluster if entry else 0
        while covered < length and (index := index + 1) <= self._index_mask:
            entry += step
            if words[index] != entry:
                break
            covered += self._cluster_size
        return (DATA if step else UNALLOCATED), host_offset, min(covered, length)


def _damaged() -> CorruptImage:
    return CorruptImage(
        "Cluster offset can't be right: unaligned, or past the end of the file"
    )

"""Where guest bytes are: the lookup that every request goes through.

Source: qcow2.txt, "Cluster mapping".
"""

from collections.abc import Callable
from typing import Final

from nbdqcow.errors import CorruptImage
from nbdqcow.formats.qcow2.entries import (
    OFFSET_MASK,
    OFLAG_COMPRESSED,
    OFLAG_COPIED,
    OFLAG_ZERO,
    classify,
)
from nbdqcow.formats.qcow2.tables import L2Slice, Tables
from nbdqcow.types import COMPRESSED, DATA, UNALLOCATED, ZERO, ZERO_ALLOCATED, Run
from nbdqcow.units import format_hex

MAX_PIECES: Final = 32
"""Slices, or stretches of the L1 table, looked at for one run: a client may ask
about an exbibyte, and others wait meanwhile."""


class Mapping:
    """Answers lookups from the cached tables, or reads them first.

    ``metadata`` holds the indices of host clusters that guest data must never
    be written to; it is the image's own set, which grows and shrinks.
    ``check_overlap`` raises `CorruptImage` for one of them, or lets it pass.
    ``zero_flag``: bit 0 of an entry is one; ``version2``: it may not be set.
    """

    def __init__(
        self,
        tables: Tables,
        metadata: set[int],
        zero_flag: bool,
        check_overlap: Callable[[int], None],
        *,
        version2: bool = False,
    ) -> None:
        self._tables = tables
        self._young = tables.young
        self._metadata = metadata
        self.check_overlap = check_overlap
        self._slice_shift = tables.slice_shift
        self._slice_mask = (1 << tables.slice_shift) - 1
        self._cluster_bits = tables.cluster_bits
        self._cluster_size = tables.cluster_size
        self._cluster_mask = tables.cluster_size - 1
        self._index_mask = tables.slice_entries - 1
        self._zero_flag: Final = OFLAG_ZERO if zero_flag else 0
        self._version2 = version2
        # No bit of these: a plain cluster, well aligned.
        self._not_plain = (
            OFLAG_COMPRESSED | self._zero_flag | (self._cluster_mask & OFFSET_MASK)
        )
        self._not_writable = self._not_plain

    def try_map(self, offset: int, length: int) -> Run | None:
        """See `FormatDriver.try_map`."""
        found = self._young.get(offset >> self._slice_shift)
        if found is not None:
            entry = found.words[(offset >> self._cluster_bits) & self._index_mask]
            in_cluster = offset & self._cluster_mask
            if in_cluster + length <= self._cluster_size:
                host_offset = entry & OFFSET_MASK
                if host_offset and not entry & self._not_plain:
                    return DATA, host_offset + in_cluster, length
                if not entry:
                    return UNALLOCATED, 0, length
        try:
            if found is None and not self._reach(offset):
                return None
            return self._run(offset, length)
        except CorruptImage:
            # The coroutine finds the same, and marks the image.
            return None

    async def map(self, offset: int, length: int) -> Run:
        """See `FormatDriver.map`. Raises `CorruptImage`."""
        while not self._reach(offset):
            await self._tables.load(offset >> self._slice_shift)
        run = self._run(offset, length)
        assert run is not None
        return run

    def try_map_write(self, offset: int, length: int) -> int:
        """See `FormatDriver.try_map_write`."""
        found = self._young.get(offset >> self._slice_shift)
        if found is None and (found := self._try_reach(offset)) is None:
            return -1
        index = (offset >> self._cluster_bits) & self._index_mask
        entry = found.words[index]
        host_offset = entry & OFFSET_MASK
        if not host_offset or entry & self._not_writable or entry < OFLAG_COPIED:
            return -1
        if host_offset >> self._cluster_bits in self._metadata:
            return -1
        in_cluster = offset & self._cluster_mask
        if in_cluster + length > self._cluster_size:
            try:
                if self.in_place_length(found, index, in_cluster, length) < length:
                    return -1
            except CorruptImage:
                # The coroutine finds the same, and marks the image.
                return -1
        return host_offset + in_cluster

    def freeze(self, frozen: bool) -> None:
        """Let no write be mapped from now on, or let them be mapped again."""
        self._not_writable = OFLAG_COPIED if frozen else self._not_plain

    def in_place_length(
        self, found: L2Slice, index: int, in_cluster: int, length: int
    ) -> int:
        """Return how many of ``length`` bytes lie in one contiguous run of
        plain, unshared clusters of a slice; 0 if the first does not."""
        words = found.words
        entry = words[index]
        if not entry & OFFSET_MASK or entry & self._not_plain or entry < OFLAG_COPIED:
            return 0
        covered = self._cluster_size - in_cluster
        first_host = (entry & OFFSET_MASK) >> self._cluster_bits
        nb_clusters = 1
        while covered < length and index + nb_clusters < len(words):
            entry += self._cluster_size
            if words[index + nb_clusters] != entry:
                break
            nb_clusters += 1
            covered += self._cluster_size
        self._check_not_metadata(first_host, nb_clusters)
        return min(covered, length)

    def _check_not_metadata(self, first: int, nb_clusters: int) -> None:
        """Raise `CorruptImage` if one of these host clusters is metadata."""
        for host_index in range(first, first + nb_clusters):
            if host_index in self._metadata:
                self.check_overlap(host_index)

    def _reach(self, offset: int) -> bool:
        """Bring the slice of a guest offset into ``young`` without waiting.

        True also if there is no L2 table: nothing is needed then.
        """
        tables = self._tables
        key = offset >> self._slice_shift
        if not tables.table_offset(tables.l1_index(key)):
            return True
        return tables.try_load(key) is not None

    def _try_reach(self, offset: int) -> L2Slice | None:
        """Return the slice of a guest offset if that needs no waiting."""
        try:
            self._reach(offset)
        except CorruptImage:
            return None
        return self._young.get(offset >> self._slice_shift)

    def _run(self, offset: int, length: int) -> Run | None:
        """Return the longest run that is in reach, or as much of it as is looked
        at in one turn; None if nothing is in reach."""
        kind, host_offset, covered = self._run_in_slice(offset, length)
        if kind == COMPRESSED:
            return kind, host_offset, covered
        nb_pieces = 1
        while covered < length and nb_pieces < MAX_PIECES:
            if (offset + covered) & self._slice_mask:
                # What comes next in its slice is something else.
                break
            nb_pieces += 1
            if not self._reach(offset + covered):
                break
            next_kind, next_host, more = self._run_in_slice(
                offset + covered, length - covered
            )
            if next_kind != kind:
                break
            if next_host != (host_offset + covered if host_offset else 0):
                break
            covered += more
        return kind, host_offset, covered

    def _corrupt(self, what: str, offset: int) -> CorruptImage:
        """Return the error for the entry of a guest offset that can't be right."""
        tables = self._tables
        table = tables.table_offset(tables.l1_index(offset >> self._slice_shift))
        in_table = (offset >> self._cluster_bits) & (self._cluster_size // 8 - 1)
        return CorruptImage(
            f"{what} (L2 offset: {table:#x}, L2 index: {format_hex(in_table)})"
        )

    def _run_in_slice(self, offset: int, length: int) -> Run:
        tables = self._tables
        key = offset >> self._slice_shift
        if not tables.table_offset(tables.l1_index(key)):
            return UNALLOCATED, 0, tables.empty_until(offset, offset + length) - offset
        words = self._young[key].words
        index = (offset >> self._cluster_bits) & self._index_mask
        in_cluster = offset & self._cluster_mask
        covered = self._cluster_size - in_cluster
        flags = OFLAG_COMPRESSED | self._zero_flag | OFFSET_MASK
        entry = words[index] & flags
        kind = classify(entry)
        if kind == COMPRESSED:
            return kind, words[index], min(covered, length)
        host_offset = entry & OFFSET_MASK
        if host_offset & self._cluster_mask:
            raise self._corrupt(
                f"Cluster allocation offset {host_offset:#x} unaligned", offset
            )
        if self._version2 and kind in (ZERO, ZERO_ALLOCATED):
            # Whether it is data or zeroes nobody knows.
            raise self._corrupt("Zero cluster entry found in pre-v3 image", offset)
        step = self._cluster_size if kind in (DATA, ZERO_ALLOCATED) else 0
        while covered < length and (index := index + 1) <= self._index_mask:
            entry += step
            if words[index] & flags != entry:
                break
            covered += self._cluster_size
        if host_offset:
            host_offset += in_cluster
        return kind, host_offset, min(covered, length)

"""Counting what refers to each cluster of an image, for the check."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from nbdqcow.block.steps import Read, Steps
from nbdqcow.block.tools import CheckResult, Report
from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow2 import header as h
from nbdqcow.formats.qcow2.bitmap_directory import read_bitmap_directory
from nbdqcow.formats.qcow2.entries import MAX_L1_BYTES, OFFSET_MASK
from nbdqcow.formats.qcow2.header import Header
from nbdqcow.formats.qcow2.l2_references import BATCH_BYTES, L2Tables
from nbdqcow.formats.qcow2.snapshot_table import Snapshot
from nbdqcow.units import MiB

if TYPE_CHECKING:
    import numpy.typing as npt

    Entries: TypeAlias = npt.NDArray[np.uint64]
    Counts: TypeAlias = npt.NDArray[np.uint32]

MAX_TABLE_ENTRIES: Final = 1 << 27
"""Of the L1 tables of all snapshots, and of all bitmap tables. Tables may lie
upon each other, so that the file's length does not bound them."""

_MAX_REFERENCES: Final = (1 << 32) - 1
_MAX_CUT_OFF: Final = 256 * MiB
"""Bytes that a file may have lost at its end, besides as much as is left of it;
what names more is taken to be wrong. Or a damaged entry would make a repair
write terabytes behind the end."""


class References:
    """How often each cluster of the file is referred to.

    Attributes:
        nb_clusters: of the file, the last one perhaps incomplete.
        counts: by cluster; one more than the file has, for a table whose
            last bytes lie beyond the end.
        named_end: the first cluster behind those of the file, and behind what
            tables name of those that it may have lost at its end.
        repair: table entries may be repaired while they are counted.
        incomplete: a table that names tables is damaged, so clusters may be
            in use that nothing is known to refer to.
    """

    def __init__(
        self,
        header: Header,
        file_length: int,
        report: Report,
        result: CheckResult,
        *,
        repair: bool,
    ) -> None:
        self.header = header
        self.file_length = file_length
        self.repair = repair
        self.incomplete = False
        self.report = report
        self.result = result
        self.nb_clusters = -(-file_length // header.cluster_size)
        self.counts: Counts = np.zeros(self.nb_clusters + 1, np.uint32)
        self.named_end = self.nb_clusters
        self._total = 0
        self._nb_entries_left = MAX_TABLE_ENTRIES
        self._structures: list[tuple[int, int]] | None = None

    def bad(self, text: str, times: int = 1) -> None:
        """Report and count something wrong."""
        self.report(text)
        self.result.corruptions += times

    def count_range(self, offset: int, length: int, times: int = 1) -> None:
        """Count a reference to every cluster of a byte range."""
        if length == 0:
            return
        if not self._is_inside(offset, length, times):
            return
        first = offset >> self.header.cluster_bits
        last = (offset + length - 1) >> self.header.cluster_bits
        self._spend(times * (last - first + 1))
        self.counts[first : last + 1] += np.uint32(times)
        if self._structures is not None:
            self._structures.append((first, last))

    def _is_inside(self, offset: int, length: int, times: int) -> bool:
        if offset + length - self.file_length < self.header.cluster_size:
            return True
        end = ((offset + length - 1) >> self.header.cluster_bits) + 1
        if end <= 2 * self.nb_clusters + (_MAX_CUT_OFF >> self.header.cluster_bits):
            self.named_end = max(self.named_end, end)
        self.bad(
            "ERROR: counting reference for region exceeding the end of the file by "
            f"one cluster or more: offset {offset:#x} size {length:#x}",
            times,
        )
        return False

    def count_clusters(self, clusters: "Entries", times: "Entries") -> None:
        """Count ``times`` references to each cluster, by index; all inside."""
        self._spend(int(times.sum()))
        np.add.at(self.counts, clusters.astype(np.int64), times.astype(np.uint32))

    def _spend(self, nb: int) -> None:
        """Keep the counters, which have 32 bits, from wrapping."""
        self._total += nb
        if self._total > _MAX_REFERENCES:
            raise ImageError("The image refers to more clusters than can be counted")

    def spend_entries(self, nb_entries: int) -> None:
        """Refuse more table entries than anyone could wait for."""
        self._nb_entries_left -= nb_entries
        if self._nb_entries_left < 0:
            raise ImageError("The tables of snapshots or bitmaps are too large")

    def mark_refcount_structures(self) -> None:
        """What is counted from now on is the refcount table and its blocks."""
        self._structures = []

    def without_refcount_structures(self) -> tuple["Counts", list[int]]:
        """Return the counts without the refcount table and its blocks, and in
        which clusters these are, ascending."""
        clusters: set[int] = set()
        for first, last in self._structures or ():
            self.counts[first : last + 1] -= np.uint32(1)
            clusters.update(range(first, last + 1))
        self._structures = []
        return self.counts, sorted(clusters)


def count_references(
    header: Header,
    references: References,
    snapshots: Sequence[Snapshot],
    snapshots_length: int,
) -> Steps[tuple["Entries", L2Tables]]:
    """Count all references but those to refcount structures.

    ``snapshots_length`` is that of their table in bytes.
    Returns the active L1 table, and what is known of all L2 tables.
    """
    references.count_range(0, header.cluster_size)
    references.count_range(header.l1_table_offset, header.l1_size * 8)
    l1 = yield from read_table(header.l1_table_offset, header.l1_size)
    tables = L2Tables(header, references)
    active = tables.add_l1(l1)
    before = references.result.corruptions
    for snapshot in snapshots:
        yield from _add_snapshot(header, references, tables, snapshot)
    references.incomplete |= references.result.corruptions != before
    yield from tables.count(active)
    if snapshots:
        references.count_range(header.snapshots_offset, snapshots_length)
    crypto = header.extension(h.EXT_CRYPTO)
    if crypto is not None and len(crypto) >= 16:
        references.count_range(
            int.from_bytes(crypto[:8], "big"), int.from_bytes(crypto[8:16], "big")
        )
    yield from _count_bitmaps(header, references)
    return l1, tables


def read_table(offset: int, nb_entries: int) -> Steps["Entries"]:
    """Read a table of 64-bit entries."""
    if nb_entries == 0:
        return np.zeros(0, np.uint64)
    raw = yield Read(offset, nb_entries * 8)
    return np.frombuffer(raw, ">u8").astype(np.uint64)


def _add_snapshot(
    header: Header, references: References, tables: L2Tables, snapshot: Snapshot
) -> Steps[None]:
    label = f"snapshot {snapshot.info.id} ({snapshot.info.name})"
    if snapshot.l1_table_offset % header.cluster_size:
        references.bad(
            f"ERROR {label} l1_offset={snapshot.l1_table_offset:#x}: L1 table is not "
            "cluster aligned; snapshot table entry corrupted"
        )
        return
    if snapshot.l1_size > MAX_L1_BYTES // 8:
        references.bad(
            f"ERROR {label} l1_size={snapshot.l1_size:#x}: L1 table is too large; "
            "snapshot table entry corrupted"
        )
        return
    references.spend_entries(snapshot.l1_size)
    references.count_range(snapshot.l1_table_offset, snapshot.l1_size * 8)
    l1 = yield from read_table(snapshot.l1_table_offset, snapshot.l1_size)
    tables.add_l1(l1)


def _count_bitmaps(header: Header, references: References) -> Steps[None]:
    bitmaps = yield from read_bitmap_directory(header)
    if not bitmaps:
        return
    extension = header.bitmaps
    assert extension is not None
    references.count_range(extension.directory_offset, extension.directory_length)
    for bitmap in bitmaps:
        references.spend_entries(bitmap.table_entries)
        references.count_range(bitmap.table_offset, bitmap.table_entries * 8)
        for start in range(0, bitmap.table_entries, BATCH_BYTES // 8):
            nb = min(BATCH_BYTES // 8, bitmap.table_entries - start)
            entries = yield from read_table(bitmap.table_offset + start * 8, nb)
            for entry in map(int, entries[entries > 1]):
                offset = entry & OFFSET_MASK
                if entry & ~OFFSET_MASK or offset % header.cluster_size:
                    references.bad(
                        f"ERROR bitmap '{bitmap.name}': invalid table entry {entry:#x}"
                    )
                else:
                    references.count_range(offset, header.cluster_size)

"""Counting what L2 tables refer to, for the check.

L2 tables are read in batches and looked at as arrays; a table that several
L1 entries or snapshots share is read once and counts as often as it is
referred to.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from nbdqcow.block.steps import Read, Steps, Write
from nbdqcow.formats.qcow2.entries import (
    ALL_ALLOCATED,
    L1_RESERVED_MASK,
    L2_RESERVED_MASK,
    NB_SUBCLUSTERS,
    OFFSET_MASK,
    OFLAG_COMPRESSED,
    OFLAG_COPIED,
    OFLAG_ZERO,
    compressed_range,
    compressed_ranges,
)
from nbdqcow.formats.qcow2.header import Header

if TYPE_CHECKING:
    import numpy.typing as npt

    from nbdqcow.formats.qcow2.references import References

    Entries: TypeAlias = npt.NDArray[np.uint64]

BATCH_BYTES: Final = 1 << 20
"""L2 tables looked at at a time; one table can be larger."""

_MAX_COMPRESSED_CLUSTERS: Final = 3
"""A compressed cluster may begin within one, fill one, and end within one."""


class L2Tables:
    """The L2 tables that L1 tables refer to, and how often."""

    def __init__(self, header: Header, references: "References") -> None:
        self.header = header
        self.references = references
        self._offsets: Entries = np.zeros(0, np.uint64)
        self._times: Entries = np.zeros(0, np.uint64)
        # Tables that are mostly wrong, and those with zero clusters to repair.
        self._damaged: list[int] = []
        self._to_repair: list[int] = []

    def add_l1(self, l1: "Entries") -> "Entries":
        """Note the tables of one L1 table, and count references to them.

        Returns their offsets in the order of the L1 table, each once, and
        below them how often each is named.
        """
        before = self.references.result.corruptions
        for entry in map(int, l1[(l1 & L1_RESERVED_MASK) != 0]):
            self.references.bad(
                f"ERROR found L1 entry with reserved bits set: {entry:x}"
            )
        nameless = (l1 & np.uint64(OFFSET_MASK | L1_RESERVED_MASK) == 0) & (l1 != 0)
        for entry in map(int, l1[nameless]):
            # It had a table: what that one maps may be all that leaks.
            self.references.bad(f"ERROR found L1 entry without a table: {entry:x}")
        offsets, first, times = np.unique(
            l1 & np.uint64(OFFSET_MASK), return_index=True, return_counts=True
        )
        there = offsets != 0
        offsets = offsets[there].astype(np.uint64)
        first, times = first[there], times[there]
        cluster_size = self.header.cluster_size
        sound = (offsets & np.uint64(cluster_size - 1)) == 0
        sound &= offsets < self.references.file_length
        self.references.count_clusters(
            offsets[sound] >> np.uint64(self.header.cluster_bits),
            times[sound].astype(np.uint64),
        )
        for offset, nb in zip(
            map(int, offsets[~sound]), map(int, times[~sound]), strict=True
        ):
            self.references.count_range(offset, cluster_size, nb)
            if offset % cluster_size:
                self.references.bad(
                    f"ERROR l2_offset={offset:x}: Table is not cluster aligned; L1 "
                    "entry corrupted",
                    nb,
                )
        fixed = self._are_fixed(offsets)
        for offset, nb in zip(
            map(int, offsets[fixed]), map(int, times[fixed]), strict=True
        ):
            self.references.bad(
                f"ERROR l2_offset={offset:x}: Table overlaps with one that the "
                "header names; L1 entry corrupted",
                nb,
            )
            self._damaged.append(offset)
        if self.references.result.corruptions != before:
            self.references.incomplete = True
        both = np.concatenate((self._offsets, offsets))
        merged, where = np.unique(both, return_inverse=True)
        sums = np.zeros(len(merged), np.uint64)
        np.add.at(sums, where, np.concatenate((self._times, times.astype(np.uint64))))
        self._offsets, self._times = merged, sums
        order = np.argsort(first)
        return np.stack((offsets[order], times[order].astype(np.uint64)))

    def _are_fixed(self, offsets: "Entries") -> "npt.NDArray[np.bool_]":
        """Whether L2 tables there would overlap with the header, the active L1
        table or the refcount table."""
        header, size = self.header, self.header.cluster_size
        ranges = (
            (0, size),
            (header.l1_table_offset, header.l1_size * 8),
            (header.refcount_table_offset, header.refcount_table_clusters * size),
        )
        fixed = np.zeros(len(offsets), np.bool_)
        for start, length in ranges:
            if length:
                first = max(0, start - size + 1)
                fixed |= (offsets >= first) & (offsets < start + length)
        return fixed

    def count(self, active: "Entries") -> Steps[None]:
        """Count what all tables refer to, the ``active`` ones first; only
        these go into the statistics."""
        others = np.setdiff1d(self._offsets, active[0])
        inactive = np.stack((others, np.zeros_like(others)))
        for tables in (active, inactive):
            for batch, nb_active in _batches(tables, self.header.cluster_size):
                entries, bitmaps = yield from read_l2_tables(self.header, batch)
                wrong = self._leave_out_bad_zero_clusters(batch, entries, bitmaps)
                times = self._times[np.searchsorted(self._offsets, batch)]
                wrong |= self._count_batch(entries, bitmaps, times, nb_active)
                if wrong.any():
                    nb_used = np.count_nonzero(entries, axis=1)
                    nb_wrong = np.count_nonzero(wrong, axis=1)
                    mostly = (nb_wrong > 0) & (2 * nb_wrong >= nb_used)
                    self._damaged += batch[mostly].tolist()

    def _bad_zero_clusters(
        self, entries: "Entries", bitmaps: "Entries | None"
    ) -> "npt.NDArray[np.bool_]":
        """Tell clusters of which nothing is read, with a host offset that can't be."""
        hosts = entries & np.uint64(OFFSET_MASK)
        if bitmaps is None:
            flags = entries & np.uint64(OFLAG_COMPRESSED | OFLAG_ZERO)
            unread = flags == OFLAG_ZERO
        else:
            unread = (entries & np.uint64(OFLAG_COMPRESSED)) == 0
            unread &= (bitmaps & np.uint64(ALL_ALLOCATED)) == 0
        return np.asarray(
            unread & ((hosts & np.uint64(self.header.cluster_size - 1)) != 0)
        )

    def _leave_out_bad_zero_clusters(
        self, offsets: "Entries", entries: "Entries", bitmaps: "Entries | None"
    ) -> "npt.NDArray[np.bool_]":
        """Count nothing for what `repair_zero_clusters` will see to; return
        which entries that is."""
        if not self.references.repair:
            return np.zeros(entries.shape, np.bool_)
        bad = self._bad_zero_clusters(entries, bitmaps)
        entries[bad] = OFLAG_ZERO if bitmaps is None else 0
        self._to_repair += offsets[bad.any(axis=1)].tolist()
        return bad

    def doubtful(self) -> set[int]:
        """Return the offsets of tables that are not to be written to: an L1
        entry may be wrong that names them.

        They are not aligned, and end in another cluster than they begin in. Or
        most of what they hold can't be, and somebody else uses their clusters,
        too: what is there may well be data. All references have been counted.
        """
        bits, size = self.header.cluster_bits, self.header.cluster_size
        unaligned = (self._offsets & np.uint64(size - 1)) != 0
        found: set[int] = set(self._offsets[unaligned].tolist())
        for offset in self._damaged:
            times = int(self._times[np.searchsorted(self._offsets, offset)])
            if (
                offset < self.references.file_length
                and int(self.references.counts[offset >> bits]) != times
            ):
                found.add(offset)
        return found

    def repair_zero_clusters(self, doubtful: set[int]) -> Steps[int]:
        """Take host offsets that can't be from clusters of which nothing is read,
        but not in ``doubtful`` tables. Returns how many are left.

        Nothing is lost: it is not known which cluster was meant, and what it
        holds is not read.
        """
        nb_left = 0
        text = "Preallocated cluster is not properly aligned; L2 entry corrupted."
        for offset in self._to_repair:
            raw = yield Read(offset, self.header.cluster_size)
            words = np.frombuffer(raw, ">u8").astype(np.uint64)
            entries, bitmaps = _split(self.header, words)
            bad = self._bad_zero_clusters(entries, bitmaps)
            for host in map(int, entries[bad] & np.uint64(OFFSET_MASK)):
                if offset in doubtful:
                    self.references.bad(f"ERROR offset={host:x}: {text}")
                    nb_left += 1
                else:
                    self.references.report(f"Repairing offset={host:x}: {text}")
                    self.references.result.corruptions_fixed += 1
            if offset not in doubtful:
                entries[bad] = OFLAG_ZERO if bitmaps is None else 0
                yield Write(offset, words.astype(">u8").tobytes())
        return nb_left

    def _count_batch(
        self,
        entries: "Entries",
        bitmaps: "Entries | None",
        times: "Entries",
        nb_active: "Entries",
    ) -> "npt.NDArray[np.bool_]":
        """Count the references of tables, one in each row of ``entries``; each
        is named ``times``, ``nb_active`` of them in the active L1 table. Returns
        which entries can't be."""
        header, references = self.header, self.references
        offsets = entries & np.uint64(OFFSET_MASK)
        is_compressed = (entries & OFLAG_COMPRESSED) != 0
        is_standard = ~is_compressed & (offsets != 0)
        if header.has_data_file:
            # Offset 0 is a place there, but under zeroes QEMU counts it as none.
            flags = OFLAG_COPIED if bitmaps is not None else OFLAG_COPIED | OFLAG_ZERO
            is_standard |= ~is_compressed & ((entries & flags) == OFLAG_COPIED)
        row_times = np.broadcast_to(times[:, None], entries.shape)
        bad = ~is_compressed & ((entries & L2_RESERVED_MASK) != 0)
        unaligned = is_standard & ((offsets & (header.cluster_size - 1)) != 0)
        bad |= unaligned | (is_compressed & ((entries & OFLAG_COPIED) != 0))
        counted = is_standard
        if header.has_data_file:
            # Its clusters have no refcounts.
            counted = np.zeros_like(is_standard)
            bad |= is_compressed
        else:
            outside = is_standard & (
                offsets + header.cluster_size - 1
                >= references.file_length + header.cluster_size - 1
            )
            bad |= outside
            counted = is_standard & ~outside
        if bitmaps is not None:
            bad |= is_compressed & (bitmaps != 0)
            bad |= ~is_compressed & _are_unsound(bitmaps, is_standard)
        if is_compressed.any():
            bad |= self._count_compressed(entries, is_compressed & ~bad, row_times)
        if bad.any():
            self._report_bad(entries, bitmaps, is_standard, row_times, bad)
        bits = np.uint64(header.cluster_bits)
        references.count_clusters(offsets[counted] >> bits, row_times[counted])
        straddling = counted & unaligned
        if straddling.any():
            references.count_clusters(
                (offsets[straddling] >> bits) + np.uint64(1), row_times[straddling]
            )
        self._count_statistics(offsets, is_standard, is_compressed, nb_active)
        return np.asarray(bad)

    def _count_compressed(
        self, entries: "Entries", sound: "npt.NDArray[np.bool_]", times: "Entries"
    ) -> "npt.NDArray[np.bool_]":
        """Count compressed clusters; return which lie outside the file."""
        header, references = self.header, self.references
        starts, ends = compressed_ranges(entries[sound], header.cluster_bits)
        outside = ends >= references.file_length + header.cluster_size
        bits = np.uint64(header.cluster_bits)
        first, last = starts >> bits, (ends - np.uint64(1)) >> bits
        chosen_times = times[sound]
        for step in range(_MAX_COMPRESSED_CLUSTERS):
            here = ~outside & (first + np.uint64(step) <= last)
            references.count_clusters(first[here] + np.uint64(step), chosen_times[here])
        result = np.zeros_like(sound)
        result[sound] = outside
        return result

    def _report_bad(
        self,
        entries: "Entries",
        bitmaps: "Entries | None",
        is_standard: "npt.NDArray[np.bool_]",
        times: "Entries",
        bad: "npt.NDArray[np.bool_]",
    ) -> None:
        """Report entries that have something wrong, in their order."""
        for row, column in zip(*map(list, np.nonzero(bad)), strict=True):
            entry = int(entries[row, column])
            nb = int(times[row, column])
            bitmap = 0 if bitmaps is None else int(bitmaps[row, column])
            if entry & OFLAG_COMPRESSED:
                self._report_bad_compressed(entry, column, bitmap, nb)
            else:
                has_cluster = bool(is_standard[row, column])
                self._report_bad_standard(entry, bitmap, nb, has_cluster=has_cluster)

    def _report_bad_compressed(
        self, entry: int, index: int, bitmap: int, times: int
    ) -> None:
        header, references = self.header, self.references
        if header.has_data_file:
            references.bad(
                f"ERROR compressed cluster with data file, entry={entry:#x}", times
            )
            return
        if bitmap:
            references.bad(
                f"ERROR compressed cluster {index} with non-zero subcluster allocation "
                f"bitmap, entry={entry:#x}",
                times,
            )
            # It is read all the same: QEMU's repair frees it.
        offset, length = compressed_range(entry, header.cluster_bits)
        if entry & OFLAG_COPIED:
            references.bad(
                f"ERROR: coffset={offset:#x}: copied flag must never be set for "
                "compressed clusters",
                times,
            )
        references.count_range(offset, length, times)

    def _report_bad_standard(
        self, entry: int, bitmap: int, times: int, *, has_cluster: bool
    ) -> None:
        header, references = self.header, self.references
        offset = entry & OFFSET_MASK
        if entry & L2_RESERVED_MASK:
            references.bad(
                f"ERROR found l2 entry with reserved bits set: {entry:x}", times
            )
        if not has_cluster:
            if bitmap & ALL_ALLOCATED:
                references.bad(
                    "ERROR: Unallocated cluster has non-zero subcluster allocation map",
                    times,
                )
        elif bitmap & bitmap >> NB_SUBCLUSTERS & ALL_ALLOCATED:
            references.bad(
                f"ERROR offset={offset:x}: Allocated cluster has corrupted subcluster "
                "allocation bitmap",
                times,
            )
        if offset % header.cluster_size:
            is_read = not entry & OFLAG_ZERO
            if header.extended_l2:
                is_read = bool(bitmap & ALL_ALLOCATED)
            kind = "Data" if is_read else "Preallocated"
            references.bad(
                f"ERROR offset={offset:x}: {kind} cluster is not properly aligned; L2 "
                "entry corrupted.",
                times,
            )
        if offset >= references.file_length and not header.has_data_file:
            references.count_range(offset, header.cluster_size, times)

    def _count_statistics(
        self,
        offsets: "Entries",
        is_standard: "npt.NDArray[np.bool_]",
        is_compressed: "npt.NDArray[np.bool_]",
        nb_active: "Entries",
    ) -> None:
        """Count allocated, compressed and fragmented clusters of each table.

        A cluster is fragmented if it does not follow the one before it in its
        table; a compressed one always is.
        """
        result = self.references.result
        compressed = is_compressed.sum(axis=1, dtype=np.uint64) * nb_active
        standard = is_standard.sum(axis=1, dtype=np.uint64) * nb_active
        nb_compressed = int(compressed.sum())
        result.compressed_clusters += nb_compressed
        result.allocated_clusters += nb_compressed + int(standard.sum())
        result.fragmented_clusters += nb_compressed
        flat = offsets[is_standard]
        rows = np.nonzero(is_standard)[0]
        follows = flat[1:] == flat[:-1] + np.uint64(self.header.cluster_size)
        apart = rows[1:][(rows[1:] == rows[:-1]) & ~follows]
        result.fragmented_clusters += int(nb_active[apart].sum())


def _are_unsound(
    bitmaps: "Entries", has_cluster: "npt.NDArray[np.bool_]"
) -> "npt.NDArray[np.bool_]":
    """Tell which bitmaps of clusters that are not compressed can't be: a subcluster
    is both allocated and zero, or allocated without a cluster."""
    allocated = bitmaps & np.uint64(ALL_ALLOCATED)
    both = (bitmaps >> np.uint64(NB_SUBCLUSTERS)) & allocated
    return np.asarray(np.where(has_cluster, both != 0, allocated != 0))


def _batches(
    tables: "Entries", table_length: int
) -> Iterator[tuple["Entries", "Entries"]]:
    nb = max(1, BATCH_BYTES // table_length)
    for start in range(0, tables.shape[1], nb):
        yield tables[0, start : start + nb], tables[1, start : start + nb]


def read_l2_tables(
    header: Header, offsets: "Entries"
) -> Steps[tuple["Entries", "Entries | None"]]:
    """Read L2 tables; return their entries, a table in each row, and with
    extended entries the subcluster bitmaps."""
    length = header.cluster_size
    raw = bytearray(length * len(offsets))
    for index, offset in enumerate(map(int, offsets)):
        raw[index * length : (index + 1) * length] = yield Read(offset, length)
    words = np.frombuffer(raw, ">u8").astype(np.uint64).reshape(len(offsets), -1)
    return _split(header, words)


def _split(header: Header, words: "Entries") -> tuple["Entries", "Entries | None"]:
    if header.extended_l2:
        return words[..., ::2], words[..., 1::2]
    return words, None

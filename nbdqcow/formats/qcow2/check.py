"""The consistency check: do the refcounts say what the tables use?

All references to clusters are counted (`nbdqcow.formats.qcow2.references`)
and compared with the refcounts on disk; then the COPIED flags of the active
tables are compared with the refcounts. Findings are counted and reported as
``qemu-img check`` does.

Memory is 4 bytes and one refcount per cluster of the file, and only for those
parts of the file that anything refers to.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nbdqcow.block.steps import Flush, Read, Steps, Write
from nbdqcow.block.tools import (
    REPAIR_ALL,
    REPAIR_LEAKS,
    REPAIR_NONE,
    CheckResult,
    Report,
)
from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow2 import header as h
from nbdqcow.formats.qcow2.copied import check_copied_flags
from nbdqcow.formats.qcow2.entries import REFTABLE_OFFSET_MASK, REFTABLE_RESERVED_MASK
from nbdqcow.formats.qcow2.header import Header
from nbdqcow.formats.qcow2.rebuild import choose_clusters, rebuild_refcounts
from nbdqcow.formats.qcow2.refcount_codec import pack_refcounts, unpack_refcounts
from nbdqcow.formats.qcow2.references import References, count_references
from nbdqcow.formats.qcow2.snapshot_check import (
    LoadedSnapshots,
    load_snapshots,
    write_snapshot_fields,
)
from nbdqcow.formats.qcow2.snapshot_table import pack_snapshots

if TYPE_CHECKING:
    import numpy.typing as npt

MAX_CLUSTERS: Final = 1 << 30
"""Of a file that can be checked: 64 TiB with clusters of 64 KiB."""

MAX_REPORTED: Final = 1_000_000
"""Lines about one image; the rest is counted but not told."""

_COMPARE_CHUNK: Final = 1 << 20
_MAX_COUNT: Final = (1 << 32) - 1
"""Of the references that are counted to a cluster."""
_ENOUGH_FREE: Final = 1 << 20
"""Clusters among which there is room for new refcount structures."""
_INCOMPAT_MARKS: Final = h.INCOMPAT_DIRTY | h.INCOMPAT_CORRUPT


def check_image(
    file_length: int, repair: int, report: Report, *, can_grow: bool = True
) -> Steps[CheckResult]:
    """Check an image in a file of ``file_length`` bytes.

    ``repair`` is one of the ``REPAIR_`` constants of `nbdqcow.block.tools`;
    ``can_grow`` is False for a file that is a device.
    Raises `ImageError` for what can't be checked, `OSError` from the file.
    """
    header = yield from h.read_header(for_check=True)
    if file_length >> header.cluster_bits >= MAX_CLUSTERS:
        raise ImageError(
            f"The file has too many clusters to be checked: more than {MAX_CLUSTERS}"
        )
    if repair:
        # What is read may be in page cache alone, if who wrote it was killed: on
        # disk, entries may still name what seems to be free.
        yield Flush()
    try:
        report = _limited(report)
        snapshots = yield from load_snapshots(header, file_length, repair, report)
        check = _Check(header, file_length, repair, report, can_grow)
        result = yield from check.run(snapshots)
        sound = not result.corruptions and not result.check_errors
        result.corruptions += snapshots.nb_bad
        if snapshots.nb_bad and repair == REPAIR_ALL and sound:
            yield from check.rewrite_snapshots(snapshots)
        result.corruptions_fixed += snapshots.nb_fixed
        return result
    except MemoryError:
        raise ImageError(
            "There is not enough memory to check a file of "
            f"{file_length >> header.cluster_bits} clusters"
        ) from None


def _limited(report: Report) -> Report:
    """Return a ``report`` that falls silent after `MAX_REPORTED` lines."""
    nb_lines = 0

    def limited(line: str) -> None:
        nonlocal nb_lines
        nb_lines += 1
        if nb_lines <= MAX_REPORTED:
            report(line)
        elif nb_lines == MAX_REPORTED + 1:
            report("There is more, which is counted but not shown")

    return limited


class _Check:
    """One check of one image.

    Attributes:
        refcounts: the refcounts on disk, by cluster.
        rebuild: the refcount structures can't be repaired in place.
    """

    def __init__(
        self,
        header: Header,
        file_length: int,
        repair: int,
        report: Report,
        can_grow: bool,
    ) -> None:
        self.header = header
        self._cluster_size = header.cluster_size
        self._max_refcount = (1 << header.refcount_bits) - 1
        self._can_grow = can_grow
        self.file_length = file_length
        self.repair = repair
        self.report = report
        self.result = CheckResult()
        self.references = References(
            header, file_length, report, self.result, repair=repair == REPAIR_ALL
        )
        self.refcounts = np.zeros(
            self.references.nb_clusters + 1, _refcount_type(header.refcount_order)
        )
        self.blocks: dict[int, int] = {}
        self.rebuild = False

    def run(self, snapshots: LoadedSnapshots) -> Steps[CheckResult]:
        result = self.result
        result.total_clusters = -(-self.header.size // self.header.cluster_size)
        l1, tables = yield from count_references(
            self.header, self.references, snapshots.entries, snapshots.table_length
        )
        found_in_tables = result.corruptions
        yield from self._load_refcounts()
        self._count_refcount_structures()
        self._note_overflows()
        doubtful = tables.doubtful()
        found_in_tables += yield from tables.repair_zero_clusters(doubtful)
        self._compare()
        if self.repair and self.rebuild:
            if self.repair < REPAIR_ALL:
                self.report("ERROR need to rebuild refcount structures")
                raise ImageError("Check failed: Input/output error")
            yield from self._rebuild(found_in_tables)
        elif self.repair and (result.corruptions or result.leaks):
            yield from self._repair_refcounts()
        # Flags are cheap to repair, but on wrong refcounts they'd come out wrong.
        repair_flags = self.repair == REPAIR_ALL or (
            self.repair != REPAIR_NONE and not (result.corruptions or result.leaks)
        )
        yield from check_copied_flags(
            self.header, l1, self.refcounts, repair_flags, self.report, result, doubtful
        )
        wrong = result.corruptions or result.check_errors
        if snapshots.nb_bad and self.repair != REPAIR_ALL:
            wrong = True
        if self.repair and not wrong:
            yield from self._clear_marks()
        return result

    def rewrite_snapshots(self, snapshots: LoadedSnapshots) -> Steps[None]:
        """Write the table of a sound image anew, with complete entries.

        The refcount structures are made anew with it; what was in the old
        table's place, and in theirs, is free in the end.
        """
        header, nothing = self.header, _limited(lambda _: None)
        fresh = _Check(header, self.file_length, REPAIR_NONE, nothing, self._can_grow)
        yield from fresh.run(snapshots)
        table = pack_snapshots(
            [one.completed(header.size) for one in snapshots.entries]
        )
        nb_needed = -(-len(table) // header.cluster_size)
        free = None if self._can_grow else fresh._free_clusters()
        place = fresh.references.nb_clusters
        place += bool(fresh.references.counts[place])
        if free is not None:
            place, _ = choose_clusters(free, nb_needed, 0)
            free = free[(free < place) | (free >= place + nb_needed)]
        counts, _ = fresh.references.without_refcount_structures()
        first = max(len(counts), place + nb_needed)
        counts = np.pad(counts, (0, first - len(counts)))
        counts[place : place + nb_needed] = 1
        offset = place << header.cluster_bits
        yield Write(offset, table)
        end = yield from rebuild_refcounts(header, counts, first, free)
        header.nb_snapshots, header.snapshots_offset = len(snapshots.entries), offset
        yield from write_snapshot_fields(header)
        end = max(end, self.file_length, offset + len(table))
        last = _Check(header, end, REPAIR_LEAKS, nothing, self._can_grow)
        yield from last.run(replace(snapshots, table_length=len(table), nb_bad=0))
        snapshots.nb_fixed += snapshots.nb_bad
        self.result.corruptions -= snapshots.nb_bad

    # -- refcounts on disk -------------------------------------------------

    def _load_refcounts(self) -> Steps[None]:
        """Read the refcount table and all blocks that it has for the file."""
        header = self.header
        nb_bytes = header.refcount_table_clusters << header.cluster_bits
        if nb_bytes == 0:
            self.table = np.zeros(0, np.uint64)
            return
        raw = yield Read(header.refcount_table_offset, nb_bytes)
        self.table = np.frombuffer(raw, ">u8").astype(np.uint64)
        per_block = header.cluster_size * 8 // header.refcount_bits
        for index in map(int, np.flatnonzero(self.table & REFTABLE_OFFSET_MASK)):
            offset = int(self.table[index]) & REFTABLE_OFFSET_MASK
            start = index * per_block
            if start >= len(self.refcounts):
                return
            if offset % header.cluster_size or offset >= self.file_length:
                continue
            block = yield Read(offset, header.cluster_size)
            values = unpack_refcounts(block, header.refcount_order)
            end = min(start + per_block, len(self.refcounts))
            self.refcounts[start:end] = values[: end - start]
            self.blocks[index] = offset

    def _count_refcount_structures(self) -> None:
        """Count references to the refcount table and its blocks."""
        header, references = self.header, self.references
        references.mark_refcount_structures()
        references.count_range(
            header.refcount_table_offset,
            header.refcount_table_clusters << header.cluster_bits,
        )
        for index in map(int, np.flatnonzero(self.table)):
            entry = int(self.table[index])
            offset = entry & REFTABLE_OFFSET_MASK
            cluster = offset >> header.cluster_bits
            if entry & REFTABLE_RESERVED_MASK:
                self._bad_block(f"table entry {index} has reserved bits set")
            elif offset % header.cluster_size:
                self._bad_block(
                    f"block {index} is not cluster aligned; refcount table entry "
                    "corrupted"
                )
            elif cluster >= references.nb_clusters:
                # A repair of leaks can do without: what counts there is no leak.
                self._bad_block(
                    f"block {index} is outside image",
                    rebuilds=self.repair == REPAIR_ALL,
                )
            else:
                references.count_range(offset, header.cluster_size)
                if references.counts[cluster] != 1:
                    self._bad_block(
                        f"block {index} refcount={references.counts[cluster]}"
                    )

    def _bad_block(self, text: str, *, rebuilds: bool = True) -> None:
        self.report(f"ERROR refcount {text}")
        self.result.corruptions += 1
        self.rebuild |= rebuilds

    # -- comparison ----------------------------------------------------------

    def _note_overflows(self) -> None:
        """Find clusters with more references than their refcounts can say.

        They are no differences then: the largest refcount is the best there is.
        """
        counts, limit = self.references.counts, self._max_refcount
        for start in range(0, len(counts), _COMPARE_CHUNK):
            part = counts[start : start + _COMPARE_CHUNK]
            over = np.flatnonzero(part > limit)
            self.result.corruptions += int((part[over] - np.uint64(limit)).sum())
            for cluster in map(int, over[: MAX_REPORTED + 1] + start):
                self.report(
                    f"ERROR: overflow cluster offset={cluster * self._cluster_size:#x}"
                    "\nUse qemu-img amend to increase the refcount entry width or "
                    "qemu-img convert to create a clean copy if the image cannot be "
                    "opened for writing"
                )

    def _counted(self, start: int) -> "npt.NDArray[np.uint32]":
        """Return a part of the references, as far as refcounts can say them."""
        part = self.references.counts[start : start + _COMPARE_CHUNK]
        return np.minimum(part, np.uint32(min(self._max_refcount, _MAX_COUNT)))

    def _differences(self) -> Iterator[tuple[int, int, int]]:
        """Yield ``(cluster, refcount, references)`` where these two differ."""
        for start in range(0, len(self.references.counts), _COMPARE_CHUNK):
            ours = self._counted(start)
            theirs = self.refcounts[start : start + _COMPARE_CHUNK]
            for index in map(int, np.flatnonzero(theirs != ours)):
                yield start + index, int(theirs[index]), int(ours[index])

    def _compare(self) -> None:
        result, counts = self.result, self.references.counts
        for start in range(0, len(counts), _COMPARE_CHUNK):
            ours = self._counted(start)
            theirs = self.refcounts[start : start + _COMPARE_CHUNK]
            too_low = theirs < ours
            result.corruptions += int(np.count_nonzero(too_low))
            result.leaks += int(np.count_nonzero(theirs > ours))
            self.rebuild |= bool((too_low & (theirs == 0)).any())
        differences = itertools.islice(self._differences(), MAX_REPORTED + 1)
        for cluster, refcount, references in differences:
            kind = "ERROR" if refcount < references else "Leaked"
            self.report(
                f"{kind} cluster {cluster} refcount={refcount} reference={references}"
            )
        self._note_end()

    def _note_end(self) -> None:
        """Find the last cluster that is used or has a refcount."""
        counts = self.references.counts
        for start in range(
            (len(counts) - 1) // _COMPARE_CHUNK * _COMPARE_CHUNK, -1, -_COMPARE_CHUNK
        ):
            used = (counts[start : start + _COMPARE_CHUNK] != 0) | (
                self.refcounts[start : start + _COMPARE_CHUNK] != 0
            )
            if used.any():
                last = start + int(np.flatnonzero(used)[-1])
                self.result.image_end_offset = (last + 1) << self.header.cluster_bits
                return

    # -- repair --------------------------------------------------------------

    def _repair_refcounts(self) -> Steps[None]:
        """Set wrong refcounts right in their blocks, as far as allowed."""
        per_block = self.header.cluster_size * 8 // self.header.refcount_bits
        by_block = itertools.groupby(
            self._differences(), lambda difference: difference[0] // per_block
        )
        for block, differences in by_block:
            entries = [
                (cluster % per_block, value)
                for cluster, value in self._choose_refcounts(differences)
            ]
            if entries:
                yield from self._update_block(self.blocks[block], entries)
        yield Flush()

    def _choose_refcounts(
        self, differences: Iterable[tuple[int, int, int]]
    ) -> Iterator[tuple[int, int]]:
        """Yield ``(cluster, refcount)`` to be set, as far as that is allowed."""
        result = self.result
        for cluster, refcount, references in differences:
            text = f"cluster {cluster} refcount={refcount} reference={references}"
            if references > refcount and self.repair < REPAIR_ALL:
                self.report(f"ERROR {text}")
                continue
            if references < refcount and self.references.incomplete:
                # They may be all that is left of what a damaged table maps.
                self.report(f"Leaked {text}: kept, as a damaged table may use it")
                continue
            self.report(f"Repairing {text}")
            self.refcounts[cluster] = references
            if references > refcount:
                result.corruptions -= 1
                result.corruptions_fixed += 1
            else:
                result.leaks -= 1
                result.leaks_fixed += 1
            yield cluster, references

    def _update_block(self, offset: int, entries: list[tuple[int, int]]) -> Steps[None]:
        order = self.header.refcount_order
        raw = yield Read(offset, self.header.cluster_size)
        values = unpack_refcounts(raw, order)
        for index, value in entries:
            values[index] = value
        yield Write(offset, pack_refcounts(values, order))

    def _rebuild(self, found_in_tables: int) -> Steps[None]:
        """Write new refcount structures; those found in tables stay wrong."""
        result = self.result
        self.report("Rebuilding refcount structure")
        # Not where a file that was cut short had what tables still name: it
        # would be taken for that, and freed as that.
        first = self.references.named_end
        if first < len(self.references.counts) and self.references.counts[first]:
            first += 1
        free = self._free_clusters()
        counts, places = self.references.without_refcount_structures()
        if self.references.incomplete:
            # What seems to leak may be in use: it keeps its refcount.
            _raise_to(counts, self.refcounts)
        else:
            result.leaks_fixed += result.leaks
            result.leaks = 0
        freed = [(cluster, int(counts[cluster])) for cluster in places]
        old_place = self.header.refcount_table_offset
        try:
            inside = None if self._can_grow else free
            end = yield from rebuild_refcounts(self.header, counts, first, inside)
        except OSError:
            if not self._can_grow or self.header.refcount_table_offset != old_place:
                raise
            # The file system is full, or this is a device by another name.
            end = yield from rebuild_refcounts(self.header, counts, first, free)
        self.file_length = max(self.file_length, end)
        self.refcounts = counts
        for cluster, nb in () if self.references.incomplete else freed:
            # Told one by one, as QEMU does; not findings, and not counted.
            self.report(f"Repairing cluster {cluster} refcount={nb + 1} reference={nb}")
        result.corruptions_fixed += result.corruptions - found_in_tables
        result.corruptions = found_in_tables

    def _free_clusters(self) -> "npt.NDArray[np.int64]":
        """Return whole clusters of the file that nothing refers to, as many as
        new refcount structures might need.

        While a damaged table may refer to more, one with a refcount is none.
        """
        found: list[npt.NDArray[np.int64]] = []
        nb_whole = self.file_length >> self.header.cluster_bits
        for start in range(0, nb_whole, _COMPARE_CHUNK):
            end = min(start + _COMPARE_CHUNK, nb_whole)
            used = self.references.counts[start:end] != 0
            if self.references.incomplete:
                used |= self.refcounts[start:end] != 0
            found.append(np.flatnonzero(~used) + start)
            if sum(map(len, found)) > _ENOUGH_FREE:
                break
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _clear_marks(self) -> Steps[None]:
        """The image is sound again: say so in the header."""
        header = self.header
        unknown = header.autoclear_features & ~(
            h.AUTOCLEAR_BITMAPS | h.AUTOCLEAR_RAW_DATA_FILE
        )
        if header.version < 3:
            return
        if unknown:
            # We wrote, and can't know what these features are about.
            header.autoclear_features &= ~unknown
            yield Write(
                h.AUTOCLEAR_FEATURES_OFFSET,
                header.autoclear_features.to_bytes(8, "big"),
            )
        if header.incompatible_features & _INCOMPAT_MARKS:
            yield Flush()
            header.incompatible_features &= ~_INCOMPAT_MARKS
            yield Write(
                h.INCOMPATIBLE_FEATURES_OFFSET,
                header.incompatible_features.to_bytes(8, "big"),
            )
        yield Flush()


def _raise_to(counts: "npt.NDArray[np.uint32]", least: "npt.NDArray[Any]") -> None:
    """Raise each count to the one of ``least``, if that is more.

    In pieces, and only where there is anything: what was never written to
    takes no memory.
    """
    for start in range(0, len(counts), _COMPARE_CHUNK):
        theirs = least[start : start + _COMPARE_CHUNK]
        if theirs.any():
            ours = counts[start : start + _COMPARE_CHUNK]
            ours[:] = np.maximum(ours, theirs)


def _refcount_type(order: int) -> "npt.DTypeLike":
    return (np.uint8, np.uint8, np.uint8, np.uint8, np.uint16, np.uint32, np.uint64)[
        order
    ]

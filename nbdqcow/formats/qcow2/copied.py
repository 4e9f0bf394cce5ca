"""The COPIED flags: set where a refcount is exactly one, in active tables.

Source: qcow2.txt, "Cluster mapping". A wrong flag corrupts data: a shared
cluster would be written in place.
"""

from typing import TYPE_CHECKING

import numpy as np

from nbdqcow.block.steps import Flush, Steps, Write
from nbdqcow.block.tools import CheckResult, Report
from nbdqcow.formats.qcow2.entries import OFFSET_MASK, OFLAG_COMPRESSED, OFLAG_COPIED
from nbdqcow.formats.qcow2.header import Header
from nbdqcow.formats.qcow2.l2_references import BATCH_BYTES, read_l2_tables

if TYPE_CHECKING:
    import numpy.typing as npt


def check_copied_flags(
    header: Header,
    l1: "npt.NDArray[np.uint64]",
    refcounts: "npt.NDArray[np.unsignedinteger[npt.NBitBase]]",
    repair: bool,
    report: Report,
    result: CheckResult,
    doubtful: set[int],
) -> Steps[None]:
    """Check, and repair, the flags of the active L1 table and its L2 tables.

    Nothing is written to the tables at ``doubtful`` offsets, which may be data.
    """
    checker = _Flags(header, refcounts, repair, report, result, doubtful)
    used = np.flatnonzero(l1 & OFFSET_MASK)
    nb = max(1, BATCH_BYTES // header.cluster_size)
    for start in range(0, len(used), nb):
        indices = used[start : start + nb]
        yield from checker.check(l1, indices)
    if checker.wrote:
        yield Flush()


class _Flags:
    """One pass over the active tables."""

    def __init__(
        self,
        header: Header,
        refcounts: "npt.NDArray[np.unsignedinteger[npt.NBitBase]]",
        repair: bool,
        report: Report,
        result: CheckResult,
        doubtful: set[int],
    ) -> None:
        self.header = header
        self.refcounts = refcounts
        self.repair = repair
        self.report = report
        self.result = result
        self._doubtful = doubtful
        self.wrote = False
        self._repaired: set[int] = set()

    def check(
        self, l1: "npt.NDArray[np.uint64]", indices: "npt.NDArray[np.intp]"
    ) -> Steps[None]:
        """Check the L1 entries at ``indices`` and the tables that they name."""
        header = self.header
        offsets = l1[indices] & np.uint64(OFFSET_MASK)
        entries, bitmaps = yield from read_l2_tables(header, offsets)
        data_offsets = entries & np.uint64(OFFSET_MASK)
        is_standard = ((entries & OFLAG_COMPRESSED) == 0) & (data_offsets != 0)
        if header.has_data_file:
            is_standard[:] = False
        wrong = is_standard & self._is_wrong(entries, data_offsets)
        if self.repair:
            self._skip_repaired(offsets, wrong)
        l1_wrong = self._is_wrong(l1[indices], offsets)
        for row in map(int, np.flatnonzero(l1_wrong | wrong.any(axis=1))):
            index, offset = int(indices[row]), int(offsets[row])
            if l1_wrong[row]:
                entry = int(l1[index])
                text = f"L2 cluster: l1_index={index} l1_entry={entry:x}"
                self._note(text, offset, self.repair)
                l1[index] = entry ^ OFLAG_COPIED
            repair = self.repair and offset not in self._doubtful
            for column in map(int, np.flatnonzero(wrong[row])):
                entry = int(entries[row, column])
                text = f"data cluster: l2_entry={entry:x}"
                self._note(text, int(data_offsets[row, column]), repair)
                entries[row, column] = entry ^ OFLAG_COPIED
            if self.repair:
                if repair and wrong[row].any():
                    table = entries[row]
                    if bitmaps is not None:
                        table = np.stack((table, bitmaps[row]), axis=1).reshape(-1)
                    yield Write(offset, table.astype(">u8").tobytes())
                if l1_wrong[row]:
                    yield Write(
                        header.l1_table_offset + index * 8,
                        int(l1[index]).to_bytes(8, "big"),
                    )
                self.wrote = True

    def _skip_repaired(
        self, offsets: "npt.NDArray[np.uint64]", wrong: "npt.NDArray[np.bool_]"
    ) -> None:
        """A table that several L1 entries name is repaired once: its entries,
        read before that, would be flipped back."""
        for row in map(int, np.flatnonzero(wrong.any(axis=1))):
            offset = int(offsets[row])
            if offset in self._repaired:
                wrong[row] = False
            self._repaired.add(offset)

    def _is_wrong(
        self, entries: "npt.NDArray[np.uint64]", offsets: "npt.NDArray[np.uint64]"
    ) -> "npt.NDArray[np.bool_]":
        clusters = offsets >> np.uint64(self.header.cluster_bits)
        inside = clusters < len(self.refcounts)
        clusters = np.where(inside, clusters, 0).astype(np.int64)
        once = inside & (self.refcounts[clusters] == 1)
        copied = (entries & OFLAG_COPIED) != 0
        return np.asarray(once != copied)

    def _note(self, text: str, offset: int, repair: bool) -> None:
        cluster = offset >> self.header.cluster_bits
        refcount = int(self.refcounts[cluster]) if cluster < len(self.refcounts) else 0
        done = "Repairing" if repair else "ERROR"
        self.report(f"{done} OFLAG_COPIED {text} refcount={refcount}")
        if repair:
            self.result.corruptions_fixed += 1
        else:
            self.result.corruptions += 1

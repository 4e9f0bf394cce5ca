"""What a consistency check finds in the snapshot table itself.

Source: qcow2.txt, "Snapshots".
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nbdqcow.block.steps import Flush, Steps, Write
from nbdqcow.block.tools import REPAIR_ALL, Report
from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow2 import header as h
from nbdqcow.formats.qcow2.header import Header
from nbdqcow.formats.qcow2.snapshot_table import Discards, Snapshot, read_snapshots


@dataclass(slots=True)
class LoadedSnapshots:
    """A snapshot table as a check works with it.

    Attributes:
        table_length: in the file, in bytes.
        nb_bad: entries that the image may not have as they are; a repair writes
            the table anew.
        nb_fixed: what was wrong and is no longer.
    """

    entries: Sequence[Snapshot]
    table_length: int
    nb_bad: int = 0
    nb_fixed: int = 0


def load_snapshots(
    header: Header, file_length: int, repair: int, report: Report
) -> Steps[LoadedSnapshots]:
    """Read the table; a repair of all leaves out what goes beyond the limits or
    the file's end.

    Changes ``header`` if snapshots are left out, in the file, too. Raises
    `ImageError` for a table that can't be read; its cause is an error that says why.
    """
    discards = Discards(report, file_length) if repair == REPAIR_ALL else None
    nb_beyond = max(header.nb_snapshots - h.MAX_SNAPSHOTS, 0)
    try:
        header.check_range("snapshot table", header.snapshots_offset, 0)
    except ImageError as error:
        raise ImageError("Check failed: Invalid argument") from ImageError(
            f"ERROR {error}"
        )
    if nb_beyond and discards is None:
        raise ImageError("Check failed: File too large") from ImageError(
            "ERROR snapshot table too large\n"
            f"You can force-remove all {nb_beyond} overhanging snapshots with qemu-img "
            "check -r all"
        )
    if nb_beyond and discards is not None:
        report(f"Discarding {nb_beyond} overhanging snapshots")
        header.nb_snapshots = h.MAX_SNAPSHOTS
        discards.nb_snapshots = nb_beyond
    try:
        entries, length = yield from read_snapshots(header, discards)
    except ImageError as error:
        raise ImageError("Check failed: File too large") from ImageError(
            f"ERROR failed to read the snapshot table: {error}"
        )
    loaded = LoadedSnapshots(entries, length)
    if discards is not None:
        loaded.nb_bad, loaded.nb_fixed = discards.nb_extras, discards.nb_snapshots
        if discards.nb_snapshots:
            # What only they had is found to leak, and freed.
            header.nb_snapshots = len(entries)
            yield from write_snapshot_fields(header)
    if header.version >= 3:
        what = "Repairing" if repair == REPAIR_ALL else "ERROR"
        for index, snapshot in enumerate(entries):
            if not snapshot.complete:
                loaded.nb_bad += 1
                report(f"{what} snapshot table entry {index} is incomplete")
    return loaded


def write_snapshot_fields(header: Header) -> Steps[None]:
    """Write where the header says that the table is, all before it first."""
    start = h.SNAPSHOT_FIELDS_OFFSET
    yield Flush()
    yield Write(start, header.pack_fields()[start : start + 12])
    yield Flush()

"""The snapshot table: a contiguous list of entries of varying length.

Source: qcow2.txt, "Snapshots".
"""

import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from nbdqcow.block.steps import Read, Steps
from nbdqcow.block.tools import Report, SnapshotInfo
from nbdqcow.errors import BlockError, ImageError
from nbdqcow.formats.qcow2.entries import MAX_L1_BYTES
from nbdqcow.formats.qcow2.header import MAX_SNAPSHOTS, Header, decode_name
from nbdqcow.units import round_up

MAX_TABLE_BYTES: Final = 64 << 20
"""QEMU's limit; ours too."""
MAX_EXTRA_BYTES: Final = 1024
_MAX_SPAN: Final = (1 << 31) - 1
"""How far a table that is being repaired may reach, too long extra data included."""

_ENTRY: Final = struct.Struct(">QIHHIIQII")
_EXTRA: Final = struct.Struct(">QQQ")
_V3_EXTRA_LENGTH: Final = 16
"""Version 3 wants at least the 64-bit VM state size and the disk size."""
_NO_ICOUNT: Final = (1 << 64) - 1


class Snapshot(NamedTuple):
    """One internal snapshot; lengths in bytes.

    Attributes:
        disk_size: the virtual size then; None in old images.
        extra: all extra data, the fields known to us included.
    """

    info: SnapshotInfo
    l1_table_offset: int
    l1_size: int
    disk_size: int | None
    extra: bytes

    @property
    def complete(self) -> bool:
        """Whether a version 3 image may have this entry."""
        return len(self.extra) >= _V3_EXTRA_LENGTH

    def completed(self, size: int) -> "Snapshot":
        """Return it with all fields that we know, as every new table has it.

        What we don't know stays. ``size`` is the virtual size if it has none.
        """
        disk_size = size if self.disk_size is None else self.disk_size
        known = pack_extra(self.info.vm_state_length, disk_size, self.info.icount)
        extra = known + self.extra[len(known) :]
        return self._replace(disk_size=disk_size, extra=extra)

    def check_l1_table(self, cluster_size: int) -> None:
        """Refuse an L1 table that none can be. Raises `ImageError`."""
        if self.l1_size * 8 > MAX_L1_BYTES:
            raise ImageError("Snapshot L1 table too large")
        if self.l1_table_offset % cluster_size:
            raise ImageError("Snapshot L1 table offset invalid")


@dataclass(slots=True)
class Discards:
    """What a repair leaves out of a table that goes beyond the limits.

    Attributes:
        file_length: what lies behind it is no part of the table.
        nb_snapshots: so many at the table's end.
        nb_extras: so many snapshots' extra data was cut.
    """

    report: Report
    file_length: int
    nb_snapshots: int = 0
    nb_extras: int = 0


def read_snapshots(
    header: Header, discards: Discards | None = None
) -> Steps[tuple[list[Snapshot], int]]:
    """Read the snapshot table; return its entries and its length in bytes.

    Raises `ImageError` if it goes beyond the limits; with ``discards``, what is
    beyond is left out and noted there.
    """
    snapshots: list[Snapshot] = []
    offset = header.snapshots_offset
    # What the table would take when written again.
    table_length = 0
    for index in range(header.nb_snapshots):
        end = offset
        offset = round_up(offset, 8)
        fixed = bytes((yield Read(offset, _ENTRY.size)))
        _, _, id_length, name_length, _, _, _, _, extra_length = _ENTRY.unpack(fixed)
        offset += _ENTRY.size
        extra = b""
        if extra_length > MAX_EXTRA_BYTES:
            if discards is None:
                raise ImageError(
                    f"Too much extra metadata in snapshot table entry {index}\n"
                    "You can force-remove this extra metadata with qemu-img check -r "
                    "all"
                )
            discards.report(
                "Discarding too much extra metadata in snapshot table entry "
                f"{index} ({extra_length} > {MAX_EXTRA_BYTES})"
            )
            discards.nb_extras += 1
            extra = bytes((yield Read(offset, MAX_EXTRA_BYTES)))
            offset += extra_length
            extra_length = 0
        rest = b""
        if length := extra_length + id_length + name_length:
            rest = bytes((yield Read(offset, length)))
        offset += length
        table_length = round_up(table_length, 8)
        table_length += _ENTRY.size + len(extra) + length
        span = offset - header.snapshots_offset
        beyond_end = discards is not None and offset > discards.file_length
        if table_length > MAX_TABLE_BYTES or span > _MAX_SPAN or beyond_end:
            nb_beyond = header.nb_snapshots - index
            if discards is None:
                raise ImageError(
                    "Snapshot table is too big\n"
                    f"You can force-remove all {nb_beyond} overhanging snapshots with "
                    "qemu-img check -r all"
                )
            reason = "behind the end of the file" if beyond_end else "too big"
            discards.report(
                f"Discarding {nb_beyond} overhanging snapshots (snapshot table is "
                f"{reason})"
            )
            discards.nb_snapshots += nb_beyond
            return snapshots, end - header.snapshots_offset
        snapshots.append(
            _parse_entry(
                fixed,
                extra or rest[:extra_length],
                id_=decode_name(rest[extra_length : extra_length + id_length]),
                name=decode_name(rest[extra_length + id_length :]),
            )
        )
    return snapshots, offset - header.snapshots_offset


def _parse_entry(fixed: bytes, extra: bytes, *, id_: str, name: str) -> Snapshot:
    """Return what an entry says: its fixed part, and its extra data, of which old
    images have less."""
    l1_offset, l1_size, _, _, seconds, nanoseconds, clock, vm_state_length, _ = (
        _ENTRY.unpack(fixed)
    )
    known_length = len(extra)
    if known_length >= 8:
        vm_state_length = int.from_bytes(extra[:8], "big")
    disk_size = int.from_bytes(extra[8:16], "big") if known_length >= 16 else None
    icount = int.from_bytes(extra[16:24], "big") if known_length >= 24 else None
    info = SnapshotInfo(
        id=id_,
        name=name,
        vm_state_length=vm_state_length,
        date_seconds=seconds,
        date_nanoseconds=nanoseconds,
        vm_clock_nanoseconds=clock,
        icount=None if icount == _NO_ICOUNT else icount,
    )
    return Snapshot(info, l1_offset, l1_size, disk_size, extra)


def pack_snapshots(snapshots: Sequence[Snapshot]) -> bytes:
    """Return a snapshot table. Raises `ImageError` if it is too long."""
    table = bytearray()
    for one in snapshots:
        info = one.info
        id_, name = _encode(info.id), _encode(info.name)
        table += bytes(-len(table) % 8)
        table += _ENTRY.pack(
            one.l1_table_offset,
            one.l1_size,
            len(id_),
            len(name),
            info.date_seconds,
            info.date_nanoseconds,
            info.vm_clock_nanoseconds,
            info.vm_state_length if info.vm_state_length < 1 << 32 else 0,
            len(one.extra),
        )
        table += one.extra + id_ + name
    if len(table) > MAX_TABLE_BYTES or len(snapshots) > MAX_SNAPSHOTS:
        raise ImageError("Snapshot table is too big")
    return bytes(table)


def pack_extra(vm_state_length: int, disk_size: int, icount: int | None) -> bytes:
    """Return the extra data of a new entry."""
    return _EXTRA.pack(
        vm_state_length, disk_size, _NO_ICOUNT if icount is None else icount
    )


def find_snapshot(snapshots: Sequence[Snapshot], id_or_name: str) -> int:
    """Return the index of a snapshot; an ID comes before all names.

    Raises `BlockError` (ENOENT) if there is none.
    """
    for names in (
        [one.info.id for one in snapshots],
        [one.info.name for one in snapshots],
    ):
        if id_or_name in names:
            return names.index(id_or_name)
    raise BlockError(errno.ENOENT, f"there is no snapshot '{id_or_name}'")


def select_snapshot(
    snapshots: Sequence[Snapshot], wanted: str | tuple[str | None, str | None]
) -> Snapshot:
    """Return the snapshot of an ID or name, or of an ID and a name.

    Raises `ImageError` if there is none.
    """
    if isinstance(wanted, str):
        try:
            return snapshots[find_snapshot(snapshots, wanted)]
        except BlockError:
            raise ImageError(f"Can't find snapshot '{wanted}'") from None
    id_, name = wanted
    for one in snapshots:
        if id_ in (None, one.info.id) and name in (None, one.info.name):
            return one
    what = [f"{k} '{v}'" for k, v in (("ID", id_), ("name", name)) if v is not None]
    raise ImageError(f"Can't find a snapshot of {' and '.join(what)}")


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")

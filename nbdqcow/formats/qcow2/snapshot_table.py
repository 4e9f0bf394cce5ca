"""The snapshot table: a contiguous list of entries of varying length.

Source: qcow2.txt, "Snapshots".
"""

import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from nbdqcow.block.steps import Read, Steps
from nbdqcow.block.tools import SnapshotInfo
from nbdqcow.errors import BlockError, ImageError
from nbdqcow.formats.qcow2.entries import MAX_L1_BYTES
from nbdqcow.formats.qcow2.header import MAX_SNAPSHOTS, Header
from nbdqcow.units import round_up

MAX_TABLE_BYTES: Final = 64 << 20
"""QEMU's limit; ours too."""
MAX_EXTRA_BYTES: Final = 1024

_ENTRY: Final = struct.Struct(">QIHHIIQII")
_EXTRA: Final = struct.Struct(">QQQ")
_V3_EXTRA_LENGTH: Final = 16
"""Version 3 wants at least the 64-bit VM state size and the disk size."""
_NO_ICOUNT: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Snapshot:
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

    def check_l1_table(self, cluster_size: int) -> None:
        """Refuse an L1 table that none can be. Raises `ImageError`."""
        if self.l1_size * 8 > MAX_L1_BYTES:
            raise ImageError("Snapshot L1 table too large")
        if self.l1_table_offset % cluster_size:
            raise ImageError("Snapshot L1 table offset invalid")


def read_snapshots(header: Header) -> Steps[tuple[list[Snapshot], int]]:
    """Read the snapshot table; return its entries and its length in bytes.

    Raises `ImageError` if it goes beyond the limits.
    """
    snapshots: list[Snapshot] = []
    offset = header.snapshots_offset
    for index in range(header.nb_snapshots):
        offset = round_up(offset, 8)
        fixed = bytes((yield Read(offset, _ENTRY.size)))
        (
            l1_offset,
            l1_size,
            id_length,
            name_length,
            date_seconds,
            date_nanoseconds,
            clock,
            vm_state_length,
            extra_length,
        ) = _ENTRY.unpack(fixed)
        if extra_length > MAX_EXTRA_BYTES:
            raise ImageError(
                f"Too much extra metadata in snapshot table entry {index}\n"
                "You can force-remove this extra metadata with qemu-img check -r all"
            )
        offset += _ENTRY.size
        rest = b""
        if length := extra_length + id_length + name_length:
            rest = bytes((yield Read(offset, length)))
        offset += length
        if offset - header.snapshots_offset > MAX_TABLE_BYTES:
            raise ImageError("Snapshot table is too big")
        extra = rest[:extra_length]
        if extra_length >= 8:
            vm_state_length = int.from_bytes(extra[:8], "big")
        icount = int.from_bytes(extra[16:24], "big") if extra_length >= 24 else None
        info = SnapshotInfo(
            id=_decode(rest[extra_length : extra_length + id_length]),
            name=_decode(rest[extra_length + id_length :]),
            vm_state_length=vm_state_length,
            date_seconds=date_seconds,
            date_nanoseconds=date_nanoseconds,
            vm_clock_nanoseconds=clock,
            icount=None if icount == _NO_ICOUNT else icount,
        )
        disk_size = int.from_bytes(extra[8:16], "big") if extra_length >= 16 else None
        snapshots.append(Snapshot(info, l1_offset, l1_size, disk_size, extra))
    return snapshots, offset - header.snapshots_offset


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


def _decode(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")

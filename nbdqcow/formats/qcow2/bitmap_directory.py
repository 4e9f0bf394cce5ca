"""The directory of persistent bitmaps.

Source: qcow2.txt, "Bitmaps".
"""

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from nbdqcow.block.steps import Read, Steps
from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow2.header import Header
from nbdqcow.units import round_up

FLAG_IN_USE: Final = 1 << 0
FLAG_AUTO: Final = 1 << 1
_RESERVED_FLAGS: Final = 0xFFFFFFFC
TYPE_DIRTY: Final = 1
MAX_TABLE_ENTRIES: Final = 0x8000000
"""QEMU's limit; ours too."""
MAX_NAME_BYTES: Final = 1023

_ENTRY: Final = struct.Struct(">QIIBBHI")


class BitmapEntry(NamedTuple):
    """One bitmap of the directory; ``table_entries`` counts 8-byte entries."""

    name: str
    table_offset: int
    table_entries: int
    flags: int
    granularity_bits: int


def read_bitmap_directory(header: Header) -> Steps[list[BitmapEntry]]:
    """Read the directory of a consistent bitmaps extension, else nothing.

    Raises `ImageError` for a directory that QEMU would not use.
    """
    extension = header.bitmaps
    if extension is None or not header.bitmaps_consistent:
        return []
    data = bytes((yield Read(extension.directory_offset, extension.directory_length)))
    entries: list[BitmapEntry] = []
    offset = 0
    while offset < len(data):
        if len(data) - offset < _ENTRY.size:
            raise ImageError("Broken bitmap directory")
        entry, length = _parse_entry(header, data, offset)
        entries.append(entry)
        offset += length
    if len(entries) != extension.nb_bitmaps:
        raise ImageError("Broken bitmap directory")
    return entries


def pack_bitmap_directory(entries: Sequence[BitmapEntry]) -> bytes:
    """Return a directory."""
    data = bytearray()
    for entry in entries:
        name = entry.name.encode("utf-8", "surrogateescape")
        data += _ENTRY.pack(
            entry.table_offset,
            entry.table_entries,
            entry.flags,
            TYPE_DIRTY,
            entry.granularity_bits,
            len(name),
            0,
        )
        data += name
        data += bytes(-len(data) % 8)
    return bytes(data)


def _parse_entry(header: Header, data: bytes, offset: int) -> tuple[BitmapEntry, int]:
    """Return the entry at ``offset`` and its padded length."""
    (
        table_offset,
        table_entries,
        flags,
        type_,
        granularity_bits,
        name_length,
        extra_length,
    ) = _ENTRY.unpack_from(data, offset)
    if extra_length:
        raise ImageError("Bitmap extra data is not supported")
    start = offset + _ENTRY.size
    if start + name_length > len(data):
        raise ImageError("Broken bitmap directory")
    name = data[start : start + name_length].decode("utf-8", "surrogateescape")
    if (
        table_entries == 0
        or table_entries > MAX_TABLE_ENTRIES
        or table_offset == 0
        or table_offset % header.cluster_size
        or flags & _RESERVED_FLAGS
        or not 1 <= name_length <= MAX_NAME_BYTES
        or type_ != TYPE_DIRTY
        or not 9 <= granularity_bits <= 31
        or not _fits(header, table_entries, granularity_bits, flags)
    ):
        raise ImageError(f"Bitmap '{name}' doesn't satisfy the constraints")
    entry = BitmapEntry(name, table_offset, table_entries, flags, granularity_bits)
    return entry, round_up(_ENTRY.size + name_length, 8)


def _fits(
    header: Header, table_entries: int, granularity_bits: int, flags: int
) -> bool:
    """Whether the table covers the disk; one in use may be out of date."""
    nb_bits = -(-header.size // (1 << granularity_bits))
    needed = -(-nb_bits // (8 * header.cluster_size))
    return bool(flags & FLAG_IN_USE) or table_entries == needed

"""The qcow header, version 1: 48 bytes, and the backing file's name.

There is no specification; docs/qcow1.md describes the format as QEMU's and
VirtualBox's drivers agree on it. All integers are big-endian.
"""

import struct
from dataclasses import dataclass
from typing import Final, Self

from nbdqcow.block.steps import Read, Steps
from nbdqcow.errors import ImageError, UnsupportedFeature
from nbdqcow.units import SECTOR_SIZE, MiB

MAGIC: Final = b"QFI\xfb"
VERSION: Final = 1
HEADER_LENGTH: Final = 48

CRYPT_NONE: Final = 0
CRYPT_AES: Final = 1

MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 16
MIN_L2_BITS: Final = 6
MAX_L2_BITS: Final = 13
MAX_BACKING_NAME_BYTES: Final = 1023

MAX_L1_BYTES: Final = ((1 << 31) - 1) // 8 * 8
"""QEMU's limit: 512 TiB of disk with the clusters and tables of a new image."""
MAX_L1_MEMORY: Final = 64 * MiB
"""Memory that one image may take for its L1 table when it is opened."""

COMPRESSED: Final = 1 << 63
"""Flag of an L2 entry whose cluster is compressed."""

_FIELDS: Final = struct.Struct(">4sIQIIQBBHIQ")


@dataclass(slots=True)
class Header:
    """The header of one image.

    Attributes:
        size: the virtual size as stored; the disk has whole sectors only, see
            `disk_size`.
        l2_bits: log2 of the entries of an L2 table.
        backing_file_offset, backing_file_size: where the backing file's name
            is in the file, and its bytes; both 0 without one.
        mtime: not used by anyone; kept as it is.
        backing_filename: as stored, up to a NUL, decoded from UTF-8 with
            ``surrogateescape``; None without a backing file.
    """

    size: int
    cluster_bits: int = 12
    l2_bits: int = 9
    l1_table_offset: int = HEADER_LENGTH
    crypt_method: int = CRYPT_NONE
    backing_file_offset: int = 0
    backing_file_size: int = 0
    mtime: int = 0
    backing_filename: str | None = None

    @classmethod
    def parse(cls, head: bytes) -> Self:
        """Read the fixed fields. Raises `ImageError` in QEMU's words."""
        if len(head) < HEADER_LENGTH or head[:4] != MAGIC:
            raise ImageError("Image not in qcow format")
        (
            _, version, backing_offset, backing_size, mtime, size,
            cluster_bits, l2_bits, _, crypt_method, l1_table_offset,
        ) = _FIELDS.unpack_from(head)  # fmt: skip
        if version != VERSION:
            hint = "\nTry the 'qcow2' driver instead." if version in (2, 3) else ""
            raise UnsupportedFeature(
                f"qcow (v1) does not support qcow version {version}{hint}"
            )
        if size <= 1:
            raise ImageError("Image size is too small (must be at least 2 bytes)")
        if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
            raise ImageError("Cluster size must be between 512 and 64k")
        if not MIN_L2_BITS <= l2_bits <= MAX_L2_BITS:
            raise ImageError("L2 table size must be between 512 and 64k")
        if crypt_method > CRYPT_AES:
            raise ImageError("invalid encryption method in qcow header")
        header = cls(
            size=size,
            cluster_bits=cluster_bits,
            l2_bits=l2_bits,
            l1_table_offset=l1_table_offset,
            crypt_method=crypt_method,
            backing_file_offset=backing_offset,
            backing_file_size=backing_size,
            mtime=mtime,
        )
        if header.l1_bytes > MAX_L1_BYTES:
            raise ImageError("Image too large")
        if backing_offset and backing_size > MAX_BACKING_NAME_BYTES:
            raise ImageError("Backing file name too long")
        return header

    def pack(self) -> bytes:
        """Return the fixed fields as they are stored."""
        return _FIELDS.pack(
            MAGIC, VERSION, self.backing_file_offset, self.backing_file_size,
            self.mtime, self.size, self.cluster_bits, self.l2_bits, 0,
            self.crypt_method, self.l1_table_offset,
        )  # fmt: skip

    @property
    def disk_size(self) -> int:
        """Bytes of the virtual disk: the whole sectors of ``size``."""
        return self.size // SECTOR_SIZE * SECTOR_SIZE

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def l2_table_bytes(self) -> int:
        """Bytes of an L2 table, which need not be a cluster's."""
        return 8 << self.l2_bits

    @property
    def l1_size(self) -> int:
        """Entries of the L1 table, as many as the virtual size needs."""
        return -(-self.size >> (self.cluster_bits + self.l2_bits))

    @property
    def l1_bytes(self) -> int:
        """Bytes of the L1 table."""
        return self.l1_size * 8

    def check_l1(self, file_length: int) -> None:
        """Refuse an L1 table that is not wholly in the file.

        Raises `ImageError`.
        """
        if self.l1_table_offset % 8:
            # A power cut could leave half of an entry that crosses a sector.
            raise ImageError(f"L1 table offset {self.l1_table_offset:#x} unaligned")
        if self.l1_table_offset < HEADER_LENGTH:
            raise ImageError("L1 table overlaps with the image header")
        if self.l1_table_offset + self.l1_bytes > file_length:
            raise ImageError("Could not read L1 table: it is past the file's end")

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Half-open ranges of the file that guest data must never go to, but
        for the L2 tables."""
        ranges = [
            (0, HEADER_LENGTH),
            (self.l1_table_offset, self.l1_table_offset + self.l1_bytes),
        ]
        if self.backing_file_offset:
            end = self.backing_file_offset + self.backing_file_size
            ranges.append((self.backing_file_offset, end))
        return ranges


def read_header(file_length: int) -> Steps[Header]:
    """Read the header and the backing file's name. Raises `ImageError`."""
    header = Header.parse(bytes((yield Read(0, min(HEADER_LENGTH, file_length or 1)))))
    offset, length = header.backing_file_offset, header.backing_file_size
    if not offset or not length:
        return header
    if offset + length > file_length:
        raise ImageError("Backing file name lies beyond the end of the file")
    name, _, _ = bytes((yield Read(offset, length))).partition(b"\0")
    if name:
        header.backing_filename = name.decode("utf-8", "surrogateescape")
    return header


def compressed_range(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Return host offset and bytes of the compressed cluster of an L2 entry.

    Bit 63 is the flag; below it the length takes as many bits as a cluster has,
    and the offset, of any alignment, the rest.
    """
    shift = 63 - cluster_bits
    return entry & ((1 << shift) - 1), entry >> shift & ((1 << cluster_bits) - 1)


def compressed_entry(offset: int, length: int, cluster_bits: int) -> int:
    """Return the L2 entry of a compressed cluster; see `compressed_range`."""
    return COMPRESSED | length << (63 - cluster_bits) | offset

"""The qcow2 header: every field, the extensions, the backing file's name.

Source: qcow2.txt, "Header", "Header extensions". All integers are big-endian.

`Header.parse` accepts what QEMU opens and refuses the rest in its words, so
that tools can describe an image; `Header.check_supported` then refuses what
this project's driver lacks, and `Header.check_layout` what can't be in a sound
image file.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Self

from nbdqcow.block.steps import Read, Steps
from nbdqcow.errors import ImageError, UnsupportedFeature
from nbdqcow.formats.qcow2.entries import (
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_REFTABLE_BYTES,
    MIN_CLUSTER_BITS,
)
from nbdqcow.units import round_up

MAGIC: Final = 0x514649FB
"""``QFI\\xfb``."""

_READ_LENGTH: Final = 65536
"""Bytes to read before `needed` can say whether the header has more."""

INCOMPAT_DIRTY: Final = 1 << 0
INCOMPAT_CORRUPT: Final = 1 << 1
INCOMPAT_DATA_FILE: Final = 1 << 2
INCOMPAT_COMPRESSION: Final = 1 << 3
INCOMPAT_EXTENDED_L2: Final = 1 << 4
INCOMPAT_KNOWN_MASK: Final = 0x1F
COMPAT_LAZY_REFCOUNTS: Final = 1 << 0
AUTOCLEAR_BITMAPS: Final = 1 << 0
AUTOCLEAR_RAW_DATA_FILE: Final = 1 << 1
AUTOCLEAR_KNOWN_MASK: Final = 0x3

CRYPT_NONE: Final = 0
CRYPT_AES: Final = 1
CRYPT_LUKS: Final = 2

COMPRESSION_ZLIB: Final = 0
COMPRESSION_ZSTD: Final = 1
COMPRESSION_TYPES: Final = ("zlib", "zstd")

COMPAT_VERSIONS: Final = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
"""The version that each value of the option ``compat`` means."""

EXT_END: Final = 0
EXT_BACKING_FORMAT: Final = 0xE2792ACA
EXT_FEATURE_NAMES: Final = 0x6803F857
EXT_BITMAPS: Final = 0x23852875
EXT_CRYPTO: Final = 0x0537BE77
EXT_DATA_FILE: Final = 0x44415441
_EXTENSION_RANKS: Final = {
    EXT_BACKING_FORMAT: 0,
    EXT_DATA_FILE: 1,
    EXT_CRYPTO: 2,
    EXT_FEATURE_NAMES: 3,
    EXT_BITMAPS: 4,
}
"""The order in which QEMU writes them; those unknown to us come last."""

# Where fields lie that change while an image is open, so that each can be
# rewritten alone in one write.
REFTABLE_FIELDS_OFFSET: Final = 48
"""``refcount_table_offset`` (u64), ``refcount_table_clusters`` (u32)."""
SNAPSHOT_FIELDS_OFFSET: Final = 60
"""``nb_snapshots`` (u32), ``snapshots_offset`` (u64)."""
INCOMPATIBLE_FEATURES_OFFSET: Final = 72
AUTOCLEAR_FEATURES_OFFSET: Final = 88
REFCOUNT_ORDER_OFFSET: Final = 96

MAX_SNAPSHOTS: Final = 65536
MAX_BITMAPS: Final = 65535
MAX_BITMAP_DIRECTORY_BYTES: Final = MAX_BITMAPS * 1024
"""One entry takes at most 1 KiB: 24 bytes and the name, padded."""
MAX_BACKING_NAME_BYTES: Final = 1023
MAX_BACKING_FORMAT_BYTES: Final = 15
_MAX_OFFSET: Final = (1 << 63) - 1
_MAX_L1_ENTRIES: Final = (1 << 31) - 1

V2_HEADER_LENGTH: Final = 72
V3_HEADER_LENGTH: Final = 112
"""What new images get: 104 bytes, the compression type and its padding."""
_V3_MIN_HEADER_LENGTH: Final = 104

_V2_FIELDS: Final = struct.Struct(">IIQIIQIIQQIIQ")
_V3_FIELDS: Final = struct.Struct(">QQQII")
_EXTENSION: Final = struct.Struct(">II")
_BITMAPS: Final = struct.Struct(">IIQQ")
_FEATURE_NAME_LENGTH: Final = 48


class Extension(NamedTuple):
    """One header extension; ``data`` excludes the padding."""

    type: int
    data: bytes


class BitmapsExtension(NamedTuple):
    """The bitmaps extension ("Bitmaps extension").

    ``directory_length`` is in bytes, ``directory_offset`` in the image file.
    """

    nb_bitmaps: int
    directory_length: int
    directory_offset: int

    def pack(self) -> bytes:
        """Return it as `Header.set_extension` takes it."""
        return _BITMAPS.pack(
            self.nb_bitmaps, 0, self.directory_length, self.directory_offset
        )


def needed(data: bytes) -> int:
    """Return how many bytes of the file `Header.parse` wants.

    ``data`` is the beginning of the file, at least 24 bytes. The answer is
    the cluster size if the cluster size is one we accept, else ``len(data)``:
    parsing will fail without more.
    """
    if len(data) < 24 or struct.unpack_from(">I", data)[0] != MAGIC:
        return len(data)
    (cluster_bits,) = struct.unpack_from(">I", data, 20)
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        return len(data)
    return int(1 << cluster_bits)


def read_header(*, for_check: bool = False) -> Steps["Header"]:
    """Read and parse the header: see `Header.parse`. Raises `ImageError`."""
    head = bytes((yield Read(0, _READ_LENGTH)))
    if needed(head) > len(head):
        head = bytes((yield Read(0, needed(head))))
    return Header.parse(head, for_check=for_check)


@dataclass(slots=True)
class Header:
    """The header of one image, its fields by the specification's names.

    Attributes:
        extra: bytes after the compression type, up to ``header_length``:
            fields we don't know, kept as they are.
        extensions: in the order of the file, without the end marker.
        backing_filename: as stored, up to a NUL, decoded from UTF-8 with
            ``surrogateescape``; None without a backing file.
    """

    size: int
    cluster_bits: int = 16
    version: int = 3
    backing_file_offset: int = 0
    backing_file_size: int = 0
    crypt_method: int = CRYPT_NONE
    l1_size: int = 0
    l1_table_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    header_length: int = V3_HEADER_LENGTH
    compression_type: int = COMPRESSION_ZLIB
    extra: bytes = b""
    extensions: list[Extension] = field(default_factory=list)
    backing_filename: str | None = None

    # -- what the fields mean --------------------------------------------

    @property
    def cluster_size(self) -> int:
        """Bytes in a cluster."""
        return 1 << self.cluster_bits

    @property
    def refcount_bits(self) -> int:
        """Bits in a refcount: 1 to 64."""
        return 1 << self.refcount_order

    @property
    def extended_l2(self) -> bool:
        """Whether L2 entries carry subcluster bitmaps."""
        return bool(self.incompatible_features & INCOMPAT_EXTENDED_L2)

    @property
    def subcluster_size(self) -> int:
        """Bytes that an L2 entry tells apart: a cluster, or a part of one."""
        return self.cluster_size // (32 if self.extended_l2 else 1)

    @property
    def l2_entry_size(self) -> int:
        """Bytes in an L2 entry."""
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """Entries in an L2 table, which fills one cluster."""
        return self.cluster_size // self.l2_entry_size

    @property
    def l1_entries_needed(self) -> int:
        """L1 entries that map ``size`` bytes; VM state lies beyond them."""
        return -(-self.size // (self.cluster_size * self.l2_entries))

    @property
    def dirty(self) -> bool:
        """Whether refcounts may be wrong and must be repaired before use."""
        return bool(self.incompatible_features & INCOMPAT_DIRTY)

    @property
    def corrupt(self) -> bool:
        """Whether a program found the image damaged."""
        return bool(self.incompatible_features & INCOMPAT_CORRUPT)

    @property
    def lazy_refcounts(self) -> bool:
        """Whether refcounts may lag behind while the image is marked dirty."""
        return bool(self.compatible_features & COMPAT_LAZY_REFCOUNTS)

    @property
    def has_data_file(self) -> bool:
        """Whether guest data lies in an external file."""
        return bool(self.incompatible_features & INCOMPAT_DATA_FILE)

    @property
    def backing_format(self) -> str | None:
        """The backing file's format as the image names it."""
        return self._string_extension(EXT_BACKING_FORMAT)

    @property
    def data_file_name(self) -> str | None:
        """The external data file's name as the image gives it."""
        return self._string_extension(EXT_DATA_FILE)

    @property
    def bitmaps(self) -> BitmapsExtension | None:
        """The bitmaps extension, consistent or not: see `bitmaps_consistent`."""
        data = self.extension(EXT_BITMAPS)
        if data is None:
            return None
        nb_bitmaps, _, length, offset = _BITMAPS.unpack(data)
        return BitmapsExtension(nb_bitmaps, length, offset)

    @property
    def bitmaps_consistent(self) -> bool:
        """Whether the bitmaps extension is there and may be trusted."""
        return (
            bool(self.autoclear_features & AUTOCLEAR_BITMAPS)
            and self.extension(EXT_BITMAPS) is not None
        )

    @property
    def feature_names(self) -> dict[tuple[int, int], str]:
        """Names from the feature name table by ``(type, bit)``; type 0 is
        incompatible, 1 compatible, 2 autoclear."""
        data = self.extension(EXT_FEATURE_NAMES) or b""
        names = {}
        for start in range(0, len(data) - 1, _FEATURE_NAME_LENGTH):
            # The last one may be cut short.
            entry = data[start : start + _FEATURE_NAME_LENGTH]
            names[entry[0], entry[1]] = decode_name(entry[2:])
        return names

    def extension(self, type_: int) -> bytes | None:
        """Return the data of the extension of a type, or None; of several the
        last one counts, as in QEMU."""
        for extension in reversed(self.extensions):
            if extension.type == type_:
                return extension.data
        return None

    def set_extension(self, type_: int, data: bytes | None) -> None:
        """Replace the extension of a type where it stands, add it where QEMU
        would write it, or with None remove it. Only one of that type stays."""
        rank = _EXTENSION_RANKS.get(type_, len(_EXTENSION_RANKS))
        index = 0
        while index < len(self.extensions) and rank >= _EXTENSION_RANKS.get(
            self.extensions[index].type, len(_EXTENSION_RANKS)
        ):
            index += 1
        for place, extension in reversed(list(enumerate(self.extensions))):
            if extension.type == type_:
                del self.extensions[place]
                index = place
        if data is not None:
            self.extensions.insert(index, Extension(type_, data))

    def _string_extension(self, type_: int) -> str | None:
        data = self.extension(type_)
        return None if data is None else decode_name(data)

    # -- reading ---------------------------------------------------------

    @classmethod
    def parse(cls, data: bytes, *, for_check: bool = False) -> Self:
        """Parse the first cluster of an image file.

        ``data`` holds at least `needed` bytes of the file; what the file is
        too short for counts as zeroes. ``for_check`` lets pass what a
        consistency check reports on its own: a missing refcount table and
        bad snapshot table fields.

        Raises `ImageError`, and `UnsupportedFeature` for unknown features.
        """
        data = data.ljust(_V3_MIN_HEADER_LENGTH + 8, b"\0")
        magic, version, *rest = _V2_FIELDS.unpack_from(data)
        if magic != MAGIC:
            raise ImageError("Image is not in qcow2 format")
        if version not in (2, 3):
            raise UnsupportedFeature(f"Unsupported qcow2 version {version}")
        header = cls(
            version=version,
            backing_file_offset=rest[0],
            backing_file_size=rest[1],
            cluster_bits=rest[2],
            size=rest[3],
            crypt_method=rest[4],
            l1_size=rest[5],
            l1_table_offset=rest[6],
            refcount_table_offset=rest[7],
            refcount_table_clusters=rest[8],
            nb_snapshots=rest[9],
            snapshots_offset=rest[10],
            header_length=V2_HEADER_LENGTH,
        )
        if not MIN_CLUSTER_BITS <= header.cluster_bits <= MAX_CLUSTER_BITS:
            raise UnsupportedFeature(
                f"Unsupported cluster size: 2^{header.cluster_bits}"
            )
        data = data[: header.cluster_size].ljust(header.cluster_size, b"\0")
        if version == 3:
            header._parse_v3(data)
        if header.backing_file_offset > header.cluster_size:
            raise ImageError("Invalid backing file offset")
        header.extensions = list(header._parse_extensions(data))
        header._check_features()
        header._check_tables(for_check)
        header._check_extensions()
        header._parse_backing_filename(data)
        return header

    def _parse_v3(self, data: bytes) -> None:
        (
            self.incompatible_features,
            self.compatible_features,
            self.autoclear_features,
            self.refcount_order,
            self.header_length,
        ) = _V3_FIELDS.unpack_from(data, V2_HEADER_LENGTH)
        if self.header_length < _V3_MIN_HEADER_LENGTH:
            raise ImageError("qcow2 header too short")
        if self.header_length > self.cluster_size:
            raise ImageError("qcow2 header exceeds cluster size")
        if self.header_length % 8:
            raise ImageError("qcow2 header length is not a multiple of 8")
        if self.header_length > _V3_MIN_HEADER_LENGTH:
            self.compression_type = data[_V3_MIN_HEADER_LENGTH]
            self.extra = data[_V3_MIN_HEADER_LENGTH + 1 : self.header_length]

    def _parse_extensions(self, data: bytes) -> Iterator[Extension]:
        end = self.backing_file_offset or self.cluster_size
        offset = self.header_length
        while offset + _EXTENSION.size <= end:
            type_, length = _EXTENSION.unpack_from(data, offset)
            offset += _EXTENSION.size
            if length > end - offset:
                raise ImageError("Header extension too large")
            if type_ == EXT_END:
                return
            yield Extension(type_, data[offset : offset + length])
            offset += round_up(length, 8)

    def _parse_backing_filename(self, data: bytes) -> None:
        offset, length = self.backing_file_offset, self.backing_file_size
        if offset == 0:
            return
        if length > min(MAX_BACKING_NAME_BYTES, self.cluster_size - offset):
            raise ImageError("Backing file name too long")
        if length and offset < self.header_length:
            raise ImageError("Invalid backing file offset")
        self.backing_filename = decode_name(data[offset : offset + length]) or None

    def _check_features(self) -> None:
        """Refuse feature bits that we don't know, and contradictions."""
        unknown = self.incompatible_features & ~INCOMPAT_KNOWN_MASK
        if unknown:
            texts = []
            for (type_, bit), name in self.feature_names.items():
                if type_ == 0 and bit < 64 and unknown & (1 << bit) and name:
                    texts.append(name)
                    unknown &= ~(1 << bit)
            if unknown:
                texts.append(f"Unknown incompatible feature: {unknown:x}")
            raise UnsupportedFeature(
                "Unsupported qcow2 feature(s): " + ", ".join(texts)
            )
        if self.extended_l2 and self.cluster_bits < 14:
            raise UnsupportedFeature(
                f"Unsupported subcluster size: {self.cluster_size // 32}"
            )
        if self.refcount_order > 6:
            raise ImageError(
                "Reference count entry width too large; may not exceed 64 bits"
            )
        if self.crypt_method > CRYPT_LUKS:
            signed = self.crypt_method - (self.crypt_method >> 31 << 32)
            raise UnsupportedFeature(f"Unsupported encryption method {signed}")
        flagged = bool(self.incompatible_features & INCOMPAT_COMPRESSION)
        if self.compression_type > COMPRESSION_ZSTD:
            raise UnsupportedFeature(
                f"qcow2: unknown compression type: {self.compression_type}"
            )
        if flagged != (self.compression_type != COMPRESSION_ZLIB):
            raise ImageError(
                "qcow2: Compression type incompatible feature bit must "
                f"{'not ' if flagged else ''}be set"
            )

    def _check_tables(self, for_check: bool) -> None:
        """Refuse table sizes out of bounds before anyone takes memory."""
        if self.refcount_table_clusters > MAX_REFTABLE_BYTES // self.cluster_size:
            raise ImageError("Reference count table too large")
        if self.refcount_table_clusters == 0 and not for_check:
            raise ImageError("Image does not contain a reference count table")
        self.check_range(
            "Reference count table",
            self.refcount_table_offset,
            self.refcount_table_clusters << self.cluster_bits,
        )
        if not for_check:
            if self.nb_snapshots > MAX_SNAPSHOTS:
                raise ImageError("Snapshot table too large")
            self.check_range("Snapshot table", self.snapshots_offset, 0)
        if self.l1_size * 8 > MAX_L1_BYTES:
            raise ImageError("Active L1 table too large")
        self.check_range("Active L1 table", self.l1_table_offset, self.l1_size * 8)
        if self.l1_entries_needed > _MAX_L1_ENTRIES:
            raise ImageError("Image is too big")
        if self.l1_size < self.l1_entries_needed:
            raise ImageError("L1 table is too small")

    def check_range(self, name: str, offset: int, length: int) -> None:
        """See that a table can be there, in some file. Raises `ImageError`."""
        if offset % self.cluster_size or offset > _MAX_OFFSET - length:
            raise ImageError(f"{name} offset invalid")

    def _check_extensions(self) -> None:
        for extension in self.extensions:
            length = len(extension.data)
            if extension.type == EXT_BACKING_FORMAT:
                if length > MAX_BACKING_FORMAT_BYTES:
                    raise ImageError(
                        f"ERROR: ext_backing_format: len={length} too large (>=16)"
                    )
            elif extension.type == EXT_CRYPTO:
                if self.crypt_method != CRYPT_LUKS:
                    raise ImageError(
                        "CRYPTO header extension only expected with LUKS "
                        "encryption method"
                    )
            elif extension.type == EXT_BITMAPS:
                self._check_bitmaps(extension.data)

    def _check_bitmaps(self, data: bytes) -> None:
        if len(data) != _BITMAPS.size:
            raise ImageError("bitmaps_ext: Invalid extension length")
        if not self.bitmaps_consistent:
            return
        nb_bitmaps, reserved, length, offset = _BITMAPS.unpack(data)
        if reserved:
            raise ImageError("bitmaps_ext: Reserved field is not zero")
        if nb_bitmaps > MAX_BITMAPS:
            raise ImageError(
                f"bitmaps_ext: Image has {nb_bitmaps} bitmaps, exceeding the QEMU "
                f"supported maximum of {MAX_BITMAPS}"
            )
        if nb_bitmaps == 0:
            raise ImageError("found bitmaps extension with zero bitmaps")
        if offset % self.cluster_size or offset > _MAX_OFFSET - length:
            raise ImageError("bitmaps_ext: invalid bitmap directory offset")
        if length > MAX_BITMAP_DIRECTORY_BYTES:
            raise ImageError(
                f"bitmaps_ext: bitmap directory size ({length}) exceeds the "
                f"maximum supported size ({MAX_BITMAP_DIRECTORY_BYTES})"
            )
        if length == 0:
            raise ImageError("Requested bitmap directory size is zero")

    # -- what a driver may open ------------------------------------------

    def check_supported(self, *, read_only: bool) -> None:
        """Refuse, by name, what the driver does not implement.

        Raises `UnsupportedFeature`, or `ImageError` for an image marked as
        damaged that is to be written.
        """
        if self.autoclear_features & AUTOCLEAR_RAW_DATA_FILE and not self.has_data_file:
            raise ImageError("data-file-raw requires a data file")
        if self.corrupt and not read_only:
            raise ImageError("qcow2: Image is corrupt; cannot be opened read/write")

    def check_layout(self, file_length: int) -> None:
        """Refuse tables outside the file, on the header, or on each other.

        ``file_length`` is in bytes; its last cluster may be incomplete, what
        it lacks reads as zeroes. Raises `ImageError`.
        """
        ranges = [
            ("header", 0, self.cluster_size),
            (
                "refcount table",
                self.refcount_table_offset,
                self.refcount_table_clusters << self.cluster_bits,
            ),
            ("L1 table", self.l1_table_offset, self.l1_size * 8),
        ]
        if self.nb_snapshots:
            # Its entries vary in length; the first one fills 40 bytes.
            ranges.append(("snapshot table", self.snapshots_offset, 40))
        limit = round_up(file_length, self.cluster_size)
        last_name, last_end = "", 0
        for name, offset, length in sorted(ranges, key=lambda item: item[1]):
            if length == 0:
                continue
            if offset < last_end:
                raise ImageError(f"qcow2: {name} overlaps the {last_name}")
            if offset + length > limit:
                raise ImageError(f"qcow2: {name} lies beyond the end of the file")
            last_name, last_end = name, offset + length

    # -- writing ---------------------------------------------------------

    def pack(self) -> bytes:
        """Return header, extensions and backing name as the file holds them.

        Sets ``backing_file_offset`` and ``backing_file_size``. Unknown fields
        and extensions are kept. Raises `ImageError` if it all does not fit
        the first cluster.
        """
        extensions = bytearray()
        for extension in self.extensions:
            length = len(extension.data)
            extensions += _EXTENSION.pack(extension.type, length)
            extensions += extension.data.ljust(round_up(length, 8), b"\0")
        extensions += _EXTENSION.pack(EXT_END, 0)
        name = (self.backing_filename or "").encode("utf-8", "surrogateescape")
        if len(name) > MAX_BACKING_NAME_BYTES:
            raise ImageError("Backing file name too long")
        self.backing_file_size = len(name)
        self.backing_file_offset = self.header_length + len(extensions) if name else 0
        packed = bytes(self.pack_fields() + extensions + name)
        if len(packed) > self.cluster_size:
            raise ImageError("qcow2: header does not fit the first cluster")
        return packed

    def pack_fields(self) -> bytes:
        """Return the fields up to ``header_length`` as the file holds them."""
        fixed = bytearray(
            _V2_FIELDS.pack(
                MAGIC,
                self.version,
                self.backing_file_offset,
                self.backing_file_size,
                self.cluster_bits,
                self.size,
                self.crypt_method,
                self.l1_size,
                self.l1_table_offset,
                self.refcount_table_offset,
                self.refcount_table_clusters,
                self.nb_snapshots,
                self.snapshots_offset,
            )
        )
        if self.version >= 3:
            fixed += _V3_FIELDS.pack(
                self.incompatible_features,
                self.compatible_features,
                self.autoclear_features,
                self.refcount_order,
                self.header_length,
            )
            if self.header_length > _V3_MIN_HEADER_LENGTH:
                fixed.append(self.compression_type)
                fixed += self.extra.ljust(self.header_length - len(fixed), b"\0")
        return bytes(fixed)


def decode_name(data: bytes) -> str:
    """Decode a name of the image: UTF-8 up to a NUL, any bytes kept."""
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")

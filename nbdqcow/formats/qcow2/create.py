"""New qcow2 images.

The layout is computed as a whole first, so that the refcounts are written
once and right: header, refcount table, the first refcount block, the L1
table, the other refcount blocks, then with preallocation each L2 table with
the data clusters that it maps. The header is written last: what is left of an
interrupted creation is not an image.
"""

import struct
import sys
from array import array
from collections.abc import Iterator
from typing import Final, NamedTuple

from nbdqcow.block.storage import StorageDriver
from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow2 import header as h
from nbdqcow.formats.qcow2.encryption_header import NewEncryption
from nbdqcow.formats.qcow2.entries import (
    ALL_ALLOCATED,
    MAX_L1_BYTES,
    MAX_REFTABLE_BYTES,
    OFLAG_COPIED,
)
from nbdqcow.formats.qcow2.header import Extension, Header
from nbdqcow.formats.qcow2.refcount_codec import filled_block
from nbdqcow.units import MAX_DISK_LENGTH, SECTOR_SIZE, round_up

_FEATURE_NAMES: Final = (
    (0, 0, b"dirty bit"),
    (0, 1, b"corrupt bit"),
    (0, 2, b"external data file"),
    (0, 3, b"compression type"),
    (0, 4, b"extended L2 entries"),
    (1, 0, b"lazy refcounts"),
    (2, 0, b"bitmaps"),
    (2, 1, b"raw external data"),
)
_FEATURE_NAMES_MIN_CLUSTER: Final = 8192
"""Below this, QEMU spares the names: the backing name needs the room."""


class CreateOptions(NamedTuple):
    """What a new image is to be like; sizes in bytes.

    Attributes:
        size: the virtual size; rounded up to whole 512-byte sectors.
        version: 2 or 3.
        backing_file: stored as given; None for none.
        preallocation: ``off``, ``metadata`` (everything is mapped, no space is
            taken), ``falloc`` (space is taken too), ``full`` (by writing).
    """

    size: int
    version: int = 3
    cluster_size: int = 65536
    backing_file: str | None = None
    backing_format: str | None = None
    refcount_bits: int = 16
    lazy_refcounts: bool = False
    preallocation: str = "off"
    compression_type: str = "zlib"
    extended_l2: bool = False
    data_file: str | None = None
    data_file_raw: bool = False
    encryption: NewEncryption | None = None

    def check(self) -> None:
        """Refuse what no image can be, in QEMU's words. Raises `ImageError`."""
        newer = "compatibility level 1.1 and above (use version=v3 or greater)"
        cluster_size = self.cluster_size
        if cluster_size & (cluster_size - 1) or not 512 <= cluster_size <= 2 << 20:
            raise ImageError(
                "Cluster size must be a power of two between 512 and 2048k"
            )
        if self.extended_l2 and self.version < 3:
            raise ImageError(f"Extended L2 entries are only supported with {newer}")
        if self.extended_l2 and cluster_size < 16384:
            raise ImageError(
                "Extended L2 entries are only supported with cluster sizes of at "
                "least 16384 bytes"
            )
        if (
            self.preallocation != "off"
            and self.backing_file is not None
            and not self.extended_l2
        ):
            raise ImageError(
                "Backing file and preallocation can only be used at the same time if "
                "extended_l2 is on"
            )
        if self.lazy_refcounts and self.version < 3:
            raise ImageError(f"Lazy refcounts only supported with {newer}")
        bits = self.refcount_bits
        if not 1 <= bits <= 64 or bits & (bits - 1):
            raise ImageError(
                "Refcount width must be a power of two and may not exceed 64 bits"
            )
        if self.version < 3 and bits != 16:
            raise ImageError(
                "Different refcount widths than 16 bits require compatibility level "
                "1.1 or above (use version=v3 or greater)"
            )
        if self.data_file_raw and self.data_file is None:
            raise ImageError("data-file-raw requires data-file")
        if self.data_file is not None and self.version < 3:
            raise ImageError(f"External data files are only supported with {newer}")
        if self.data_file_raw and self.backing_file is not None:
            raise ImageError(
                "Backing file and data-file-raw cannot be used at the same time"
            )
        if self.compression_type != "zlib" and self.version < 3:
            raise ImageError(
                f"Non-zlib compression type is only supported with {newer}"
            )
        if self.backing_format is not None and self.backing_file is None:
            raise ImageError("Backing format cannot be used without backing file")


class CreatePlan(NamedTuple):
    """A new image's bytes and where they go.

    Attributes:
        header: complete, its offsets set.
        file_length: bytes that the file gets.
        data_start: where the tables and clusters of preallocation begin.
        nb_data_clusters: preallocated guest clusters; 0 without. If there is a
            data file, they are there.
        luks_offset, luks_area: the encryption header; empty without.
        data_file: its name as the image gives it, or None.
    """

    header: Header
    packed_header: bytes
    file_length: int
    nb_refcount_blocks: int
    data_start: int
    nb_data_clusters: int
    preallocation: str
    luks_offset: int
    luks_area: bytes
    data_file: str | None

    def writes(self) -> Iterator[tuple[int, bytes]]:
        """Yield ``(offset, bytes)`` for all metadata but the header's first
        sector, see `magic_write`. Whole clusters: a new image is as long on the
        disk as QEMU's, which `info` shows."""
        yield from self._refcount_writes()
        yield from self._mapping_writes()
        if self.luks_area:
            # The slots that are not in use are zero.
            yield self.luks_offset, self.luks_area.rstrip(b"\0")
        if (rest := self.header.cluster_size - SECTOR_SIZE) > 0:
            yield SECTOR_SIZE, self.packed_header[SECTOR_SIZE:].ljust(rest, b"\0")

    @property
    def magic_write(self) -> tuple[int, bytes]:
        """What makes it an image: it comes when all the rest is durable."""
        return 0, self.packed_header[:SECTOR_SIZE]

    def _block_offset(self, index: int) -> int:
        """The first block precedes the L1 table, the others follow it."""
        header = self.header
        first = header.refcount_table_offset + (
            header.refcount_table_clusters << header.cluster_bits
        )
        if index == 0:
            return first
        return self.data_start - (
            (self.nb_refcount_blocks - index) << header.cluster_bits
        )

    def _refcount_writes(self) -> Iterator[tuple[int, bytes]]:
        header = self.header
        cluster_size = header.cluster_size
        per_block = cluster_size * 8 // header.refcount_bits
        nb_clusters = -(-self.file_length // cluster_size)
        offsets = [self._block_offset(i) for i in range(self.nb_refcount_blocks)]
        for index, offset in enumerate(offsets):
            nb_used = min(per_block, nb_clusters - index * per_block)
            yield offset, filled_block(cluster_size, header.refcount_order, nb_used)
        table = struct.pack(f">{len(offsets)}Q", *offsets)
        nb_bytes = header.refcount_table_clusters * cluster_size
        yield header.refcount_table_offset, table.ljust(nb_bytes, b"\0")

    def _mapping_writes(self) -> Iterator[tuple[int, bytes]]:
        header = self.header
        step = header.cluster_size
        nb_words = header.l2_entry_size // 8
        is_raw = header.autoclear_features & h.AUTOCLEAR_RAW_DATA_FILE
        l1 = array("Q")
        offset = self.data_start
        remaining = self.nb_data_clusters
        nb_before = 0
        while remaining:
            nb = min(remaining, header.l2_entries)
            first = (offset + step) | OFLAG_COPIED
            if self.data_file is not None:
                first = nb_before * step | OFLAG_COPIED
            # With subclusters, none of them is said to be allocated, so that
            # a backing file shows through.
            table = array("Q", bytes(nb * header.l2_entry_size))
            table[::nb_words] = array("Q", range(first, first + nb * step, step))
            if is_raw and nb_words > 1:
                # What is in a raw data file must be seen.
                table[1::nb_words] = array("Q", [ALL_ALLOCATED]) * nb
            yield offset, _big_endian(table).ljust(step, b"\0")
            l1.append(offset | OFLAG_COPIED)
            offset += step if self.data_file is not None else (nb + 1) * step
            nb_before += nb
            remaining -= nb
        if header.l1_size:
            table_bytes = _big_endian(l1).ljust(header.l1_size * 8, b"\0")
            yield header.l1_table_offset, table_bytes


def plan_create(options: CreateOptions) -> CreatePlan:
    """Compute the layout of a new image. Raises as `CreateOptions.check`."""
    options.check()
    cluster_size = options.cluster_size
    header = Header(
        size=round_up(options.size, SECTOR_SIZE),
        version=options.version,
        cluster_bits=cluster_size.bit_length() - 1,
        refcount_order=options.refcount_bits.bit_length() - 1,
        header_length=(
            h.V3_HEADER_LENGTH if options.version >= 3 else h.V2_HEADER_LENGTH
        ),
        compatible_features=h.COMPAT_LAZY_REFCOUNTS if options.lazy_refcounts else 0,
        compression_type=h.COMPRESSION_TYPES.index(options.compression_type),
        backing_filename=options.backing_file,
    )
    if header.compression_type != h.COMPRESSION_ZLIB:
        header.incompatible_features |= h.INCOMPAT_COMPRESSION
    if options.extended_l2:
        header.incompatible_features |= h.INCOMPAT_EXTENDED_L2
    if options.data_file is not None:
        header.incompatible_features |= h.INCOMPAT_DATA_FILE
    if options.data_file_raw:
        header.autoclear_features |= h.AUTOCLEAR_RAW_DATA_FILE
    _add_extensions(header, options)
    header.l1_size = header.l1_entries_needed
    if header.size > MAX_DISK_LENGTH:
        if header.size >> 63:
            raise ImageError("Could not resize image: Image size cannot be negative")
        raise ImageError(
            f"Could not resize image: offset({header.size}) exceeds "
            f"maximum({MAX_DISK_LENGTH})"
        )
    if header.l1_size * 8 > MAX_L1_BYTES:
        raise ImageError(
            "The image size is too large for file format 'qcow2' (try using a larger "
            "cluster size)"
        )
    nb_data = nb_l2 = 0
    if options.preallocation != "off" or options.data_file_raw:
        # A raw data file is all there, whether or not one looks at the tables.
        nb_data = -(-header.size // cluster_size)
        nb_l2 = header.l1_size
    nb_here = 0 if options.data_file is not None else nb_data
    l1_clusters = -(-header.l1_size * 8 // cluster_size)
    luks_area = b"" if options.encryption is None else options.encryption.luks_area
    luks_clusters = -(-len(luks_area) // cluster_size)
    table_clusters, nb_blocks = refcount_structures(
        1 + l1_clusters + luks_clusters + nb_l2 + nb_here,
        cluster_size,
        options.refcount_bits,
    )
    check_refcount_table(table_clusters, cluster_size)
    header.refcount_table_offset = cluster_size
    header.refcount_table_clusters = table_clusters
    l1_offset = (2 + table_clusters) * cluster_size
    header.l1_table_offset = l1_offset if header.l1_size else 0
    luks_offset = l1_offset + l1_clusters * cluster_size
    if options.encryption is not None:
        options.encryption.describe_in(header, luks_offset)
    data_start = luks_offset + (luks_clusters + nb_blocks - 1) * cluster_size
    file_length = data_start + (nb_l2 + nb_here) * cluster_size
    if nb_blocks == 1 and nb_l2 == luks_clusters == 0:
        # The L1 table ends the file; the rest of its cluster is no one's.
        file_length = l1_offset + header.l1_size * 8
    return CreatePlan(
        header,
        header.pack(),
        file_length,
        nb_blocks,
        data_start,
        nb_data,
        options.preallocation,
        luks_offset,
        luks_area,
        options.data_file,
    )


def _add_extensions(header: Header, options: CreateOptions) -> None:
    if options.backing_format is not None:
        raw = options.backing_format.encode("utf-8", "surrogateescape")
        header.extensions.append(Extension(h.EXT_BACKING_FORMAT, raw))
    if options.data_file is not None:
        raw = options.data_file.encode("utf-8", "surrogateescape")
        header.extensions.append(Extension(h.EXT_DATA_FILE, raw))
    names = feature_names(options.cluster_size)
    if options.version >= 3 and names is not None:
        header.extensions.append(Extension(h.EXT_FEATURE_NAMES, names))


def feature_names(cluster_size: int) -> bytes | None:
    """Return the feature name table of a version 3 image; None for none."""
    if cluster_size < _FEATURE_NAMES_MIN_CLUSTER:
        return None
    return b"".join(
        bytes((type_, bit)) + name.ljust(46, b"\0")
        for type_, bit, name in _FEATURE_NAMES
    )


def refcount_structures(
    nb_clusters: int, cluster_size: int, refcount_bits: int
) -> tuple[int, int]:
    """Return clusters of the refcount table and number of blocks that cover
    ``nb_clusters`` other clusters and themselves; the table may be too large for
    an image, see `check_refcount_table`."""
    per_block = cluster_size * 8 // refcount_bits
    table_clusters = nb_blocks = 1
    while True:
        total = nb_clusters + table_clusters + nb_blocks
        blocks = -(-total // per_block)
        tables = -(-blocks * 8 // cluster_size)
        if (tables, blocks) == (table_clusters, nb_blocks):
            break
        table_clusters, nb_blocks = tables, blocks
    return table_clusters, nb_blocks


def check_refcount_table(table_clusters: int, cluster_size: int) -> None:
    """Raise `ImageError` for a refcount table that would be too large."""
    if table_clusters * cluster_size > MAX_REFTABLE_BYTES:
        raise ImageError(
            "The preallocated image is too large for its refcount table (try using a "
            "larger cluster size)"
        )


def _big_endian(entries: "array[int]") -> bytes:
    if sys.byteorder == "little":
        entries.byteswap()
    return entries.tobytes()


async def create(
    storage: StorageDriver,
    options: CreateOptions,
    data_file: StorageDriver | None = None,
) -> None:
    """Write a new image into ``storage``, whatever was there before, and make
    ``data_file`` an empty disk, if the options want one.

    Raises `ImageError` before anything is touched, `OSError` later.
    """
    plan = plan_create(options)
    await storage.truncate(0)
    await storage.truncate(plan.file_length)
    if not storage.zero_beyond_end:
        await storage.write_zeroes(0, plan.file_length, may_unmap=True)
        # The header of what was there must not outlive its tables.
        await storage.flush()
    if plan.data_file is None:
        length = plan.file_length - plan.data_start
        await _preallocate(storage, plan.data_start, length, plan.preallocation)
    else:
        assert data_file is not None
        await data_file.truncate(0)
        await data_file.truncate(plan.header.size)
        await _preallocate(data_file, 0, plan.header.size, plan.preallocation)
        await data_file.flush()
    for offset, data in plan.writes():
        await storage.pwritev(offset, [data])
    await storage.flush()
    offset, data = plan.magic_write
    await storage.pwritev(offset, [data])
    await storage.flush()


async def _preallocate(
    storage: StorageDriver, offset: int, length: int, preallocation: str
) -> None:
    if preallocation == "falloc":
        await storage.write_zeroes(offset, length, may_unmap=False)
    elif preallocation == "full":
        await storage.write_zero_data(offset, length)

"""Builds qcow2 images in memory, sound ones and damaged ones.

The builder keeps clusters, tables and refcounts as plain Python values until
`ImageBuilder.build`, so that a test can set any of them to anything.
"""

import struct
import zlib
from typing import Any

from nbdqcow.formats.qcow2.entries import (
    OFLAG_COMPRESSED,
    OFLAG_COPIED,
    OFLAG_ZERO,
    compressed_range,
)
from nbdqcow.formats.qcow2.header import Header


def l2_table_offset(image: bytes) -> int:
    """Return where the first L2 table of an image is, by its first L1 entry."""
    l1_offset = int.from_bytes(image[40:48])
    return int.from_bytes(image[l1_offset + 1 : l1_offset + 8])


def patched(image: bytes, *fields: tuple[int, str, int | bytes]) -> bytes:
    """Return ``image`` with big-endian fields overwritten.

    A field is ``(offset, struct format, value)``; format ``s`` takes bytes of
    any length.
    """
    data = bytearray(image)
    for offset, format_, value in fields:
        raw = value if format_ == "s" else struct.pack(">" + format_, value)
        data[offset : offset + len(raw)] = raw
    return bytes(data)


class ImageBuilder:
    """One image: header, clusters, L1 and L2 tables, snapshots, refcounts.

    Every allocation counts one reference; `build` writes a refcount table and
    blocks that cover the file unless ``refcounts`` were made wrong on purpose
    (change the dictionary, cluster index to refcount, before building).
    """

    def __init__(
        self,
        size: int = 1 << 20,
        *,
        cluster_bits: int = 9,
        version: int = 3,
        refcount_order: int = 4,
    ) -> None:
        self.header = Header(
            size=size,
            cluster_bits=cluster_bits,
            version=version,
            refcount_order=refcount_order,
            header_length=112 if version == 3 else 72,
        )
        self.cluster_size = 1 << cluster_bits
        self.refcounts: dict[int, int] = {0: 1}
        self.clusters: dict[int, bytes] = {}
        self.end = self.cluster_size
        nb_l1 = max(1, self.header.l1_entries_needed)
        self.l1 = [0] * nb_l1
        self.l2: dict[int, list[int]] = {}
        self.header.l1_size = nb_l1
        self.header.l1_table_offset = self.allocate(nb_l1 * 8)
        self.snapshots: list[bytes] = []

    def allocate(self, length: int | None = None, data: bytes = b"") -> int:
        """Take contiguous clusters for ``length`` bytes (one cluster by
        default), put ``data`` there, and return their offset."""
        offset = self.end
        nb_clusters = -(-(length or self.cluster_size) // self.cluster_size)
        for index in range(nb_clusters):
            self.refcounts[(offset >> self.header.cluster_bits) + index] = 1
        self.end += nb_clusters * self.cluster_size
        if data:
            self.clusters[offset] = data
        return offset

    def l2_table(self, l1_index: int) -> list[int]:
        """Return the L2 table of an L1 entry as a list to change, new if
        there is none."""
        if l1_index not in self.l2:
            self.l1[l1_index] = self.allocate() | OFLAG_COPIED
            self.l2[l1_index] = [0] * (self.cluster_size // 8)
        return self.l2[l1_index]

    def set_entry(self, guest_cluster: int, entry: int) -> None:
        """Set the L2 entry of a guest cluster."""
        l1_index, l2_index = divmod(guest_cluster, self.cluster_size // 8)
        self.l2_table(l1_index)[l2_index] = entry

    def add_data(self, guest_cluster: int, data: bytes = b"x") -> int:
        """Give a guest cluster a host cluster with ``data``; return its offset."""
        offset = self.allocate(data=data)
        self.set_entry(guest_cluster, offset | OFLAG_COPIED)
        return offset

    def add_zero(self, guest_cluster: int, *, allocated: bool = False) -> None:
        """Make a guest cluster read as zeroes."""
        entry = self.allocate() | OFLAG_COPIED if allocated else 0
        self.set_entry(guest_cluster, entry | OFLAG_ZERO)

    def add_compressed(self, guest_cluster: int, data: bytes, *, skip: int = 0) -> int:
        """Compress a guest cluster into new host clusters, ``skip`` bytes into
        them; return the L2 entry."""
        packer = zlib.compressobj(9, zlib.DEFLATED, -12)
        raw = packer.compress(data.ljust(self.cluster_size, b"\0")) + packer.flush()
        data = bytes(skip) + raw
        offset = self.allocate(-(-len(data) // 512) * 512, data) + skip
        entry = self.compressed_entry(offset, len(raw))
        self.set_entry(guest_cluster, entry)
        return entry

    def compressed_entry(self, offset: int, length: int) -> int:
        """Return the L2 entry for ``length`` compressed bytes at ``offset``."""
        offset_bits = 62 - (self.header.cluster_bits - 8)
        sectors = ((offset + length - 1) >> 9) - (offset >> 9)
        return OFLAG_COMPRESSED | sectors << offset_bits | offset

    def add_snapshot(self, name: str = "one", *, vm_state: int = 0) -> None:
        """Take a snapshot: copy the L1 table, share all it reaches."""
        for l1_index, table in self.l2.items():
            self._share(self.l1[l1_index] & ~OFLAG_COPIED)
            self.l1[l1_index] &= ~OFLAG_COPIED
            for l2_index, entry in enumerate(table):
                if entry & OFLAG_COMPRESSED:
                    self._share(*compressed_range(entry, self.header.cluster_bits))
                elif entry & ~(OFLAG_COPIED | OFLAG_ZERO):
                    self._share(entry & ~(OFLAG_COPIED | OFLAG_ZERO))
                    table[l2_index] &= ~OFLAG_COPIED
        l1 = struct.pack(f">{len(self.l1)}Q", *self.l1)
        l1_offset = self.allocate(len(l1), l1)
        id_ = str(len(self.snapshots) + 1).encode()
        raw_name = name.encode()
        entry = struct.pack(
            ">QIHHIIQIIQQ",
            l1_offset,
            len(self.l1),
            len(id_),
            len(raw_name),
            1_700_000_000,
            123_000_000,
            3_723_456_000_000,
            vm_state & 0xFFFFFFFF,
            16,
            vm_state,
            self.header.size,
        )
        entry += id_ + raw_name
        self.snapshots.append(entry.ljust(-(-len(entry) // 8) * 8, b"\0"))

    def _share(self, offset: int, length: int = 1) -> None:
        bits = self.header.cluster_bits
        for index in range(offset >> bits, (offset + length - 1 >> bits) + 1):
            self.refcounts[index] += 1

    def build(self) -> bytes:
        """Return the image file."""
        header = self.header
        if self.snapshots:
            table = b"".join(self.snapshots)
            header.nb_snapshots = len(self.snapshots)
            header.snapshots_offset = self.allocate(len(table), table)
        self._add_refcounts()
        image = bytearray(self.end)

        def put(offset: int, data: bytes) -> None:
            image[offset : offset + len(data)] = data

        for offset, data in self.clusters.items():
            put(offset, data)
        put(header.l1_table_offset, struct.pack(f">{len(self.l1)}Q", *self.l1))
        for l1_index, entries in self.l2.items():
            offset = self.l1[l1_index] & ~OFLAG_COPIED
            put(offset, struct.pack(f">{len(entries)}Q", *entries))
        put(0, header.pack())
        return bytes(image)

    def _add_refcounts(self) -> None:
        header = self.header
        bits = header.refcount_bits
        per_block = self.cluster_size * 8 // bits
        blocks: list[int] = []
        table_offset = self.allocate()
        while len(blocks) * per_block * self.cluster_size < self.end:
            blocks.append(self.allocate())
        assert len(blocks) * 8 <= self.cluster_size, "too large for this builder"
        header.refcount_table_offset = table_offset
        header.refcount_table_clusters = 1
        self.clusters[table_offset] = struct.pack(f">{len(blocks)}Q", *blocks)
        for number, block in enumerate(blocks):
            values = [
                self.refcounts.get(number * per_block + i, 0) for i in range(per_block)
            ]
            self.clusters[block] = _pack_refcounts(values, bits)


def _pack_refcounts(values: list[int], bits: int) -> bytes:
    """Pack refcounts: big-endian, below a byte the lowest bits come first."""
    if bits >= 8:
        return b"".join(value.to_bytes(bits // 8, "big") for value in values)
    per_byte = 8 // bits
    return bytes(
        sum(
            value << (position * bits)
            for position, value in enumerate(values[start : start + per_byte])
        )
        for start in range(0, len(values), per_byte)
    )


class BytesFile:
    """A file in memory for the blocking tools (`nbdqcow.block.steps`)."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)
        self.filename = "bytes"
        self.is_device = False
        self.nb_read = 0

    @property
    def length(self) -> int:
        return len(self.data)

    def pread(self, offset: int, length: int) -> bytes:
        self.nb_read += length
        return bytes(self.data[offset : offset + length]).ljust(length, b"\0")

    def pwrite(self, offset: int, data: bytes) -> None:
        self.data[len(self.data) :] = bytes(max(0, offset - len(self.data)))
        self.data[offset : offset + len(data)] = data

    def truncate(self, length: int) -> None:
        del self.data[length:]
        self.data[len(self.data) :] = bytes(length - len(self.data))

    def allocate(self, offset: int, length: int) -> None:
        self.write_zeroes(offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        self.pwrite(offset, bytes(length))

    def flush(self) -> None:
        pass

    def allocated_length(self) -> int:
        return len(self.data)

    def close(self) -> None:
        pass


def builder_of_all_kinds(size: int = 8 << 20, **options: Any) -> ImageBuilder:
    """Return the builder of a sound image with every kind of cluster, in clusters of
    4 KiB unless ``options`` say otherwise; see `ImageBuilder` for them."""
    builder = ImageBuilder(size, **{"cluster_bits": 12, **options})
    for number in range(6):
        builder.add_data(number * 3, b"data%d" % number)
    builder.add_zero(20)
    builder.add_zero(21, allocated=True)
    builder.add_compressed(30, b"hello" * 100)
    builder.add_compressed(31, b"hello" * 50, skip=100)
    return builder

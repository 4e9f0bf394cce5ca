"""A small builder of qcow images (version 1), and a consistency check.

Both are written from the format's description in docs/qcow1.md, not from the
driver, so that they can judge it.
"""

import itertools
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

COMPRESSED = 1 << 63
HEADER = struct.Struct(">4sIQIIQBBHIQ")
SECTOR = 512


@dataclass(frozen=True, slots=True)
class Plain:
    """A cluster that is stored as it is."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Packed:
    """A cluster that is stored compressed, with zlib's ``level``."""

    data: bytes
    level: int = 6


@dataclass(slots=True)
class Image:
    """What an image is to be; `build` gives its bytes.

    Attributes:
        clusters: guest cluster index to content.
        key: the passphrase of an encrypted image.
        gap: bytes left out in front of everything that is stored, in turn, so
            that it lies at odd places (multiples of 512).
        name_at_end: the backing file's name is behind everything else.
    """

    size: int
    cluster_bits: int = 12
    l2_bits: int = 9
    clusters: Mapping[int, Plain | Packed] = field(default_factory=dict)
    backing: bytes = b""
    key: bytes | None = None
    gap: int = 0
    name_at_end: bool = False

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    def build(self) -> bytes:
        nb_l1 = -(-self.size // (self.cluster_size << self.l2_bits))
        name_offset = HEADER.size if self.backing and not self.name_at_end else 0
        l1_offset = (
            -(-(HEADER.size + (len(self.backing) if name_offset else 0)) // 8) * 8
        )
        out = bytearray(l1_offset + nb_l1 * 8)
        l1 = [0] * nb_l1
        l2: dict[int, list[int]] = {}

        def place(data: bytes, alignment: int) -> int:
            out.extend(bytes(self.gap))
            out.extend(bytes(-len(out) % alignment))
            offset = len(out)
            out.extend(data)
            return offset

        for index, content in self.clusters.items():
            table = l2.setdefault(index >> self.l2_bits, [0] * (1 << self.l2_bits))
            data = content.data.ljust(self.cluster_size, b"\0")
            if isinstance(content, Packed):
                packer = zlib.compressobj(content.level, zlib.DEFLATED, -12)
                packed = packer.compress(data) + packer.flush()
                assert len(packed) < self.cluster_size
                shift = 63 - self.cluster_bits
                entry = place(packed, 1) | COMPRESSED | len(packed) << shift
            else:
                if self.key is not None:
                    first = index * self.cluster_size // SECTOR
                    data = encrypt(self.key, first, data)
                entry = place(data, SECTOR)
            table[index & ((1 << self.l2_bits) - 1)] = entry
        for l1_index, table in l2.items():
            l1[l1_index] = place(struct.pack(f">{len(table)}Q", *table), SECTOR)
        out[l1_offset : l1_offset + 8 * nb_l1] = struct.pack(f">{nb_l1}Q", *l1)
        if self.backing and self.name_at_end:
            name_offset = place(self.backing, SECTOR)
        elif self.backing:
            out[name_offset : name_offset + len(self.backing)] = self.backing
        out[: HEADER.size] = HEADER.pack(
            b"QFI\xfb", 1, name_offset, len(self.backing), 0, self.size,
            self.cluster_bits, self.l2_bits, 0, self.key is not None, l1_offset,
        )  # fmt: skip
        return bytes(out)

    def content(self, below: bytes = b"") -> bytes:
        """Return what the guest sees, ``below`` being the backing file's."""
        disk = bytearray(below[: self.size].ljust(self.size, b"\0"))
        for index, content in self.clusters.items():
            start = index * self.cluster_size
            data = content.data.ljust(self.cluster_size, b"\0")
            disk[start : start + self.cluster_size] = data
        return bytes(disk[: self.size])


def encrypt(key: bytes, first_sector: int, data: bytes) -> bytes:
    """AES-128-CBC, a vector for each sector: its number on the guest's disk."""
    out = b""
    cipher = algorithms.AES(key[:16].ljust(16, b"\0"))
    for start in range(0, len(data), SECTOR):
        vector = struct.pack("<QQ", first_sector + start // SECTOR, 0)
        encryptor = Cipher(cipher, modes.CBC(vector)).encryptor()
        out += encryptor.update(data[start : start + SECTOR]) + encryptor.finalize()
    return out


def check(image: bytes | Path) -> int:
    """Fail unless the image is sound: nothing is named twice, nothing is past
    the file's end, all is aligned. Returns the number of allocated clusters."""
    data = image if isinstance(image, bytes) else image.read_bytes()
    (
        magic, version, name_offset, name_length, _, size,
        cluster_bits, l2_bits, _, _, l1_offset,
    ) = HEADER.unpack_from(data)  # fmt: skip
    assert (magic, version) == (b"QFI\xfb", 1)
    nb_l1 = -(-size // (1 << cluster_bits + l2_bits))
    used = [(0, HEADER.size, "header"), (l1_offset, l1_offset + 8 * nb_l1, "L1")]
    if name_offset:
        used.append((name_offset, name_offset + name_length, "name"))
    nb_clusters = 0
    shift = 63 - cluster_bits
    for l1_index, table in enumerate(struct.unpack_from(f">{nb_l1}Q", data, l1_offset)):
        if not table:
            continue
        assert table % SECTOR == 0, f"L2 table {l1_index} at {table:#x}"
        used.append((table, table + (8 << l2_bits), f"L2 {l1_index}"))
        assert used[-1][1] <= len(data), f"L2 table {l1_index} is past the end"
        entries = struct.unpack_from(f">{1 << l2_bits}Q", data, table)
        for index, entry in enumerate(entries, l1_index << l2_bits):
            if not entry:
                continue
            nb_clusters += 1
            if entry & COMPRESSED:
                start = entry & ((1 << shift) - 1)
                length = entry >> shift & ((1 << cluster_bits) - 1)
                assert length
            else:
                assert entry % SECTOR == 0, f"cluster {index} at {entry:#x}"
                start, length = entry, 1 << cluster_bits
            used.append((start, start + length, f"cluster {index}"))
            assert start + length <= len(data), f"{used[-1]} is past {len(data)}"
    used.sort()
    for (_, end, name), (start, _, next_name) in itertools.pairwise(used):
        assert end <= start, f"{name} overlaps with {next_name} at {start:#x}"
    return nb_clusters

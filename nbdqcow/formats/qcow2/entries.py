"""The bits of qcow2's table entries, and what an L2 entry means.

Source: qcow2.txt, "Cluster mapping" and "Host cluster management".
"""

from typing import TYPE_CHECKING, Final

from nbdqcow.types import COMPRESSED, DATA, UNALLOCATED, ZERO, ZERO_ALLOCATED

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

OFLAG_COPIED: Final = 1 << 63
"""L1 and L2: the refcount is exactly one, so writing in place is allowed."""
OFLAG_COMPRESSED: Final = 1 << 62
OFLAG_ZERO: Final = 1 << 0
"""L2, version 3 without extended L2: the cluster reads as zeroes."""

OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
"""Bits 9 to 55: the host offset in L1 and standard L2 entries."""
IN_DATA_FILE: Final = 1 << 55
"""In memory only: the offset is one in the external data file, where 0 is as
good as any other."""
L1_RESERVED_MASK: Final = 0x7F00_0000_0000_01FF
L2_RESERVED_MASK: Final = 0x3F00_0000_0000_01FE
SUBCLUSTERS_BITS: Final = 5
"""Extended L2: a standard cluster has 32 subclusters."""
NB_SUBCLUSTERS: Final = 1 << SUBCLUSTERS_BITS
ALL_ALLOCATED: Final = (1 << NB_SUBCLUSTERS) - 1
"""The bits of a subcluster bitmap that say "in this file", one for each."""
ALL_ZERO: Final = ALL_ALLOCATED << NB_SUBCLUSTERS
"""The bits that say "reads as zeroes"."""

REFTABLE_OFFSET_MASK: Final = 0xFFFF_FFFF_FFFF_FE00
REFTABLE_RESERVED_MASK: Final = 0x1FF

MAX_L1_BYTES: Final = 32 << 20
"""QEMU's limit for the active L1 table; ours too."""
MAX_REFTABLE_BYTES: Final = 8 << 20
MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21

DEFLATE_WINDOW_BITS: Final = 12
"""QEMU reads deflate with a window of 4 KiB."""


def classify(entry: int) -> int:
    """Return the run kind (`nbdqcow.types`) of a standard L2 entry."""
    if entry & OFLAG_COMPRESSED:
        return COMPRESSED
    if entry & OFLAG_ZERO:
        return ZERO_ALLOCATED if entry & OFFSET_MASK else ZERO
    return DATA if entry & OFFSET_MASK else UNALLOCATED


def subcluster_stretch(bitmap: int, first: int) -> tuple[int, int]:
    """Return the kind of subcluster ``first``, and how many from it on are alike.

    The kind is DATA, ZERO or UNALLOCATED; the bitmap is sound.
    """
    allocated = (bitmap & ALL_ALLOCATED) >> first
    zero = bitmap >> (NB_SUBCLUSTERS + first)
    if allocated & 1:
        kind, unlike = DATA, ~allocated
    elif zero & 1:
        kind, unlike = ZERO, ~zero
    else:
        kind, unlike = UNALLOCATED, allocated | zero
    nb = (unlike & -unlike).bit_length() - 1
    return kind, nb if 0 <= nb < NB_SUBCLUSTERS - first else NB_SUBCLUSTERS - first


def is_sound(entry: int, bitmap: int) -> bool:
    """Whether the bitmap of an entry for a standard cluster is possible: no
    subcluster both allocated and zero, none allocated without a cluster."""
    if bitmap & bitmap >> NB_SUBCLUSTERS & ALL_ALLOCATED:
        return False
    return bool(entry & OFFSET_MASK) or not bitmap & ALL_ALLOCATED


def subcluster_mask(first: int, last: int) -> int:
    """Return the allocation bits of subclusters ``first`` to ``last``."""
    return (2 << last) - (1 << first)


def compressed_range(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Return ``(host_offset, length)`` of a compressed cluster's bytes.

    The length reaches to the end of the last 512-byte sector, so it may hold
    more than the compressed stream ("Compressed Clusters Descriptor").
    """
    offset_bits = 62 - (cluster_bits - 8)
    host_offset = entry & ((1 << offset_bits) - 1)
    additional = (entry >> offset_bits) & ((1 << (cluster_bits - 8)) - 1)
    return host_offset, (additional + 1) * 512 - (host_offset & 511)


def compressed_ranges(
    entries: "npt.NDArray[np.uint64]", cluster_bits: int
) -> tuple["npt.NDArray[np.uint64]", "npt.NDArray[np.uint64]"]:
    """Return where the bytes of compressed clusters begin, and where they end: as
    `compressed_range` has it, of many at once."""
    import numpy as np

    offset_bits = 62 - (cluster_bits - 8)
    starts = entries & np.uint64((1 << offset_bits) - 1)
    additional = entries >> np.uint64(offset_bits)
    additional &= np.uint64((1 << (cluster_bits - 8)) - 1)
    ends = (starts & ~np.uint64(511)) + (additional + np.uint64(1)) * np.uint64(512)
    return starts, ends


def compressed_entry(host_offset: int, length: int, cluster_bits: int) -> int:
    """Return the L2 entry of a compressed cluster, the reverse of
    `compressed_range`; it ends below `max_compressed_offset`."""
    additional = ((host_offset & 511) + length - 1) // 512
    return OFLAG_COMPRESSED | additional << (70 - cluster_bits) | host_offset


def max_compressed_offset(cluster_bits: int) -> int:
    """Return the end of what a descriptor can name; bytes."""
    return 1 << (70 - cluster_bits)

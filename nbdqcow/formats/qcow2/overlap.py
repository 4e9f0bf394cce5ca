"""Checks that guest data is never written over metadata.

Which clusters hold metadata, the image knows (`Qcow2Driver.metadata`); what
kind it is matters only once a write would hit one, which no sound image does.
"""

from collections import Counter
from typing import TYPE_CHECKING, Final

from nbdqcow.block.steps import run_steps
from nbdqcow.errors import CorruptImage, ImageError
from nbdqcow.formats.qcow2.entries import (
    OFFSET_MASK,
    REFTABLE_OFFSET_MASK,
)
from nbdqcow.formats.qcow2.snapshot_table import read_snapshots
from nbdqcow.formats.words import load_be64

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.driver import Qcow2Driver

_NAMES: Final = {
    "main-header": "qcow2_header",
    "active-l1": "active L1 table",
    "active-l2": "active L2 table",
    "refcount-table": "refcount table",
    "refcount-block": "refcount block",
    "snapshot-table": "snapshot table",
    "inactive-l1": "inactive L1 table",
    "inactive-l2": "inactive L2 table",
    "bitmap-directory": "bitmap directory",
}
"""What QEMU calls them in its message."""


_MAX_SNAPSHOT_L1_CLUSTERS: Final = 1 << 21
"""Each takes about 100 bytes of memory while the image is open for writing."""


def check(image: "Qcow2Driver", cluster_index: int) -> None:
    """Refuse a write to a cluster of metadata, if its kind is to be checked.

    Raises `CorruptImage`.
    """
    checked = image.settings.overlap_checks
    kind = _kind(image, cluster_index)
    if kind in checked or (kind is None and checked):
        name = "other metadata" if kind is None else _NAMES[kind]
        raise CorruptImage(
            f"Preventing invalid write on metadata (overlaps with {name})"
        )


def _kind(image: "Qcow2Driver", cluster_index: int) -> str | None:
    """Return the kind of a cluster of metadata; None for what has no class of
    its own: an encryption header, a bitmap's table or data."""
    header, bits = image.header, image.cluster_bits
    offset = cluster_index << bits
    table_length = header.refcount_table_clusters << bits
    if cluster_index == 0:
        return "main-header"
    if _within(offset, header.l1_table_offset, header.l1_size * 8):
        return "active-l1"
    if any(entry & OFFSET_MASK == offset for entry in image.tables.l1):
        return "active-l2"
    if _within(offset, header.refcount_table_offset, table_length):
        return "refcount-table"
    if any(entry & REFTABLE_OFFSET_MASK == offset for entry in image.refcounts.table):
        return "refcount-block"
    return image.snapshot_metadata.get(cluster_index) or _bitmap_kind(image, offset)


def not_overlapping(image: "Qcow2Driver", block_indices: list[int]) -> list[int]:
    """Return those refcount blocks in whose clusters, as far as is known, there
    is nothing else: in a corrupt image there may be, and their counts of 1 are
    for that, too."""
    header, bits = image.header, image.cluster_bits
    tables = {entry & OFFSET_MASK for entry in image.tables.l1}
    offsets = Counter(image.refcounts.table[index] for index in block_indices)
    ranges = (
        (0, image.cluster_size),
        (header.l1_table_offset, header.l1_size * 8),
        (header.refcount_table_offset, header.refcount_table_clusters << bits),
    )
    return [
        index
        for index in block_indices
        if offsets[offset := image.refcounts.table[index]] == 1
        and offset not in tables
        and offset >> bits not in image.snapshot_metadata
        and not any(_within(offset, start, length) for start, length in ranges)
        and _bitmap_kind(image, offset) is None
    ]


def _bitmap_kind(image: "Qcow2Driver", offset: int) -> str | None:
    extension = image.header.bitmaps
    if extension is not None and _within(
        offset, extension.directory_offset, extension.directory_length
    ):
        return "bitmap-directory"
    return None


async def note_snapshots(image: "Qcow2Driver") -> None:
    """Note the metadata of internal snapshots. Raises `ImageError` if it can't
    be right.

    Source: qcow2.txt, "Snapshots".
    """
    header, bits = image.header, image.cluster_bits
    if not header.nb_snapshots:
        return
    snapshots, length = await run_steps(read_snapshots(header), image.storage)
    if sum(-(-one.l1_size * 8 // image.cluster_size) for one in snapshots) > (
        _MAX_SNAPSHOT_L1_CLUSTERS
    ):
        raise ImageError("The L1 tables of the snapshots are too large")
    places = [(header.snapshots_offset, length, "snapshot-table")]
    for one in snapshots:
        offset, length = one.l1_table_offset, one.l1_size * 8
        one.check_l1_table(image.cluster_size)
        places.append((offset, length, "inactive-l1"))
        if "inactive-l2" in image.settings.overlap_checks and length:
            l1 = load_be64(await image.storage.pread(offset, length))
            tables = {entry & OFFSET_MASK for entry in l1} - {0}
            places += [(table, 1, "inactive-l2") for table in tables]
            if len(places) > _MAX_SNAPSHOT_L1_CLUSTERS:
                raise ImageError("The snapshots have too many L2 tables")
    for offset, length, kind in places:
        for cluster_index in range(offset >> bits, -(-(offset + length) >> bits)):
            image.snapshot_metadata.setdefault(cluster_index, kind)
    image.metadata.update(image.snapshot_metadata)


def _within(offset: int, start: int, length: int) -> bool:
    return start <= offset < start + length

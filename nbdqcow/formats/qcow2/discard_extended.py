"""Discard and write-zeroes in images with subclusters.

A subcluster is zeroed by two bits of its cluster's bitmap; the cluster is
freed when that may be and nothing is stored in it any more.

Source: qcow2.txt, "Extended L2 Entries".
"""

from array import array
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from nbdqcow.errors import NotSupported
from nbdqcow.formats.qcow2.entries import (
    ALL_ALLOCATED,
    ALL_ZERO,
    NB_SUBCLUSTERS,
    OFFSET_MASK,
    OFLAG_COMPRESSED,
    OFLAG_COPIED,
    subcluster_mask,
)
from nbdqcow.formats.qcow2.mapping_extended import ExtendedMapping
from nbdqcow.formats.qcow2.write import (
    are_alike,
    free_entry,
    names_nothing,
    slice_for_change,
)

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.driver import Qcow2Driver

_Change: TypeAlias = Callable[[int, int, int], tuple[int, int]]
"""Given an entry, its bitmap and the allocation bits of the subclusters that
are concerned: the entry and the bitmap that take their place."""

ChangePiece: TypeAlias = Callable[[int, int], Awaitable[None]]
"""Changes the entries of a guest range, which lies within one L2 slice."""


def zeroing(image: "Qcow2Driver", *, covered: bool, may_unmap: bool) -> ChangePiece:
    """Return what makes the subclusters of a piece read as zeroes.

    ``covered``: a backing file shows through what is not allocated. It raises
    `NotSupported` for a part of a compressed cluster.
    """

    def change(entry: int, bitmap: int, chosen: int) -> tuple[int, int]:
        if not entry and not bitmap and not covered:
            return 0, 0
        if chosen == ALL_ALLOCATED:
            keep = not may_unmap and _is_own(entry)
            return entry if keep else 0, ALL_ZERO
        if entry & OFLAG_COMPRESSED:
            raise NotSupported("a part of a compressed cluster can't be made zero")
        new = (bitmap | chosen << NB_SUBCLUSTERS) & ~chosen
        if may_unmap and bitmap & ALL_ALLOCATED and not new & ALL_ALLOCATED:
            return 0, new
        return entry, new

    return partial(_change_in_slice, image, change)


def discarding(image: "Qcow2Driver", *, covered: bool) -> ChangePiece:
    """Return what frees the clusters of a piece."""

    def change(entry: int, bitmap: int, chosen: int) -> tuple[int, int]:
        return (0, ALL_ZERO) if entry or covered else (0, bitmap)

    return partial(_change_in_slice, image, change)


def claiming(image: "Qcow2Driver") -> ChangePiece:
    """Return what makes unallocated subclusters read as zeroes."""

    def change(entry: int, bitmap: int, chosen: int) -> tuple[int, int]:
        return entry, (bitmap | chosen << NB_SUBCLUSTERS) & ~chosen

    return partial(_change_in_slice, image, change)


def _is_own(entry: int) -> bool:
    return entry & (OFLAG_COPIED | OFLAG_COMPRESSED) == OFLAG_COPIED


async def _change_in_slice(
    image: "Qcow2Driver", change: _Change, offset: int, end: int
) -> None:
    """Change the entries of a range that begins with a subcluster and ends
    with one, or with the image."""
    tables = image.tables
    key = offset >> tables.slice_shift
    first_end = min(end, offset + image.cluster_size)
    if tables.table_offset(tables.l1_index(key)):
        found = await tables.load(key)
        alike = _words_alike(image, found.words, offset, end)
        if not _changes(
            image, found.words, change, offset, first_end if alike else end
        ):
            return
    found = await slice_for_change(image, offset)
    words = found.words
    if alike := _words_alike(image, words, offset, end):
        for _, *new in _changes(image, words, change, offset, first_end):
            words[alike] = array("Q", new) * ((alike.stop - alike.start) // 2)
            tables.mark_dirty(found, alike.start, alike.stop)
        return
    changes = _changes(image, words, change, offset, end)
    for index, new_entry, new_bitmap in changes:
        old_entry = words[index]
        words[index], words[index + 1] = new_entry, new_bitmap
        if not new_entry & OFFSET_MASK:
            free_entry(image, old_entry, discard=image.discard_freed)
    if changes:
        tables.mark_dirty(found, changes[0][0], changes[-1][0] + 2)


def _words_alike(
    image: "Qcow2Driver", words: "array[int]", offset: int, end: int
) -> slice | None:
    """Return which words of a slice are those of a range, if it is whole clusters
    that are all alike and have no host cluster; else None."""
    size = image.cluster_size
    if offset % size or (end % size and end < image.size):
        return None
    first = 2 * ((offset >> image.cluster_bits) & (image.tables.slice_entries - 1))
    found = slice(first, first + 2 * -(-(end - offset) // size))
    if not names_nothing(words[first]) or not are_alike(words[found], 2):
        return None
    return found


def _changes(
    image: "Qcow2Driver", words: "array[int]", change: _Change, offset: int, end: int
) -> list[tuple[int, int, int]]:
    """Return where entries of a slice change, and into what: the index of the
    entry's first word, the new entry, the new bitmap."""
    mapping, unit = image.mapping, image.subcluster_size
    assert isinstance(mapping, ExtendedMapping)
    cluster_size = image.cluster_size
    changes = []
    index_mask = image.tables.slice_entries - 1
    # What lies behind the image's end goes with its last subcluster.
    reach = end if end < image.size else end + cluster_size
    for start in range(offset & -cluster_size, end, cluster_size):
        first = max(offset - start, 0) // unit
        last = min(reach - start, cluster_size) // unit - 1
        index = 2 * ((start >> image.cluster_bits) & index_mask)
        entry, bitmap = words[index], words[index + 1]
        if not entry & OFLAG_COMPRESSED:
            mapping.check_sound(entry, bitmap)
        new = change(entry, bitmap, subcluster_mask(first, last))
        if new != (entry, bitmap):
            changes.append((index, *new))
    return changes

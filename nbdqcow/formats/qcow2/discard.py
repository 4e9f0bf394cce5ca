"""Discard and write-zeroes: whole clusters by metadata alone."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from nbdqcow.errors import NotSupported
from nbdqcow.formats.qcow2.entries import (
    OFFSET_MASK,
    OFLAG_COMPRESSED,
    OFLAG_COPIED,
    OFLAG_ZERO,
)
from nbdqcow.formats.qcow2.write import free_entry, slice_for_change
from nbdqcow.types import UNALLOCATED, ZERO, ZERO_ALLOCATED

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.driver import Qcow2Driver

_Change = Callable[[int], int]
"""Gives the entry that takes an entry's place; the same one: no change."""

_SLICES_PER_LOCK: Final = 16
"""Slices changed before others get a turn at the lock."""


async def write_zeroes(
    image: "Qcow2Driver", offset: int, length: int, *, may_unmap: bool
) -> None:
    """Make clusters read as zeroes.

    ``may_unmap`` frees them; otherwise unshared clusters stay allocated under
    the zero flag, for later writes. Version 2 has no such flag: there, only a
    cluster without a backing file can be made zero, by freeing it.
    """
    version2 = image.header.version < 3
    if version2 and (image.backing_filename or not may_unmap):
        raise NotSupported("version 2 images have no zero clusters")
    covered = image.backing_filename is not None

    def change(entry: int) -> int:
        if version2:
            return 0
        if not entry:
            return OFLAG_ZERO if covered else 0
        if may_unmap:
            return OFLAG_ZERO
        if entry & OFLAG_ZERO and not entry & OFLAG_COMPRESSED:
            return entry
        if entry & (OFLAG_COPIED | OFLAG_COMPRESSED) == OFLAG_COPIED:
            return entry | OFLAG_ZERO
        return OFLAG_ZERO

    await _change_clusters(image, offset, length, change, covered)


async def claim_zero(image: "Qcow2Driver", offset: int, backing_zero: bool) -> bool:
    """See `FormatDriver.claim_zero`."""
    length = min(image.cluster_size, image.size - offset)
    while True:
        async with image.lock:
            busy = image.in_flight.find(offset, offset + length)
            if busy is None:
                kind, _, _ = await image.mapping.map(offset, length)
                if kind in (ZERO, ZERO_ALLOCATED):
                    return True
                if kind != UNALLOCATED or not backing_zero:
                    return False
                if image.backing_filename is None:
                    return True
                if image.header.version < 3:
                    return False
                await _change_in_slice(
                    image, offset, offset + length, lambda _: OFLAG_ZERO
                )
                return True
        await busy.wait()


async def discard(image: "Qcow2Driver", offset: int, length: int) -> None:
    """Free clusters; they read as zeroes afterwards, as QEMU has it.

    A version 2 image with a backing file can't hide that file's data, so
    nothing is done there.
    """
    version2 = image.header.version < 3
    if version2 and image.backing_filename:
        return

    def change(entry: int) -> int:
        return 0 if version2 or not entry else OFLAG_ZERO

    def change_covered(entry: int) -> int:
        return OFLAG_ZERO

    covered = image.backing_filename is not None
    await _change_clusters(
        image, offset, length, change_covered if covered else change, covered
    )


async def _change_clusters(
    image: "Qcow2Driver", offset: int, length: int, change: _Change, covered: bool
) -> None:
    """Apply ``change`` to the L2 entries of a cluster-aligned range.

    ``covered``: entries in L2 tables that do not exist yet matter, because a
    backing file shows through them.
    """
    tables, end = image.tables, offset + length
    while offset < end:
        if tables.dirty_bytes > tables.dirty_limit:
            await image.writeback.flush()
        busy = None
        async with image.lock:
            for _ in range(_SLICES_PER_LOCK):
                slice_end = ((offset >> tables.slice_shift) + 1) << tables.slice_shift
                piece_end = min(end, slice_end)
                busy = image.in_flight.first_overlap(offset, piece_end)
                if busy is not None:
                    break
                if covered or tables.table_offset(offset >> tables.l1_shift):
                    await _change_in_slice(image, offset, piece_end, change)
                    offset = piece_end
                else:
                    table_end = ((offset >> tables.l1_shift) + 1) << tables.l1_shift
                    offset = min(end, table_end)
                if offset >= end:
                    break
        image.start_writeback_if_due()
        if busy is not None:
            await busy.wait()


async def _change_in_slice(
    image: "Qcow2Driver", offset: int, end: int, change: _Change
) -> None:
    tables = image.tables
    first = (offset >> image.cluster_bits) & (tables.slice_entries - 1)
    last = first + -(-(end - offset) // image.cluster_size)
    key = offset >> tables.slice_shift
    if tables.table_offset(tables.l1_index(key)):
        found = await tables.load(key)
        if all(change(entry) == entry for entry in found.words[first:last]):
            return
    found = await slice_for_change(image, offset)
    words = found.words
    for index in range(first, last):
        old = words[index]
        new = change(old)
        if new == old:
            continue
        words[index] = new
        if not new & OFFSET_MASK:
            free_entry(image, old, discard=image.discard_freed)
    tables.mark_dirty(found, first, last)

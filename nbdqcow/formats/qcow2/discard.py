"""Discard and write-zeroes: whole clusters by metadata alone."""

import asyncio
import errno
from array import array
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

from nbdqcow.errors import BlockError, NotSupported
from nbdqcow.formats.qcow2 import discard_extended
from nbdqcow.formats.qcow2.discard_extended import ChangePiece
from nbdqcow.formats.qcow2.entries import (
    OFFSET_MASK,
    OFLAG_COMPRESSED,
    OFLAG_COPIED,
    OFLAG_ZERO,
)
from nbdqcow.formats.qcow2.write import (
    are_alike,
    free_entry,
    names_nothing,
    slice_for_change,
)
from nbdqcow.types import UNALLOCATED, ZERO, ZERO_ALLOCATED
from nbdqcow.units import round_up

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.driver import Qcow2Driver

_Change: TypeAlias = Callable[[int], int]
"""Gives the entry that takes an entry's place; the same one: no change."""

_SLICE_COST: Final = 64
_COST_PER_LOCK: Final = 16 * _SLICE_COST
"""What is done before others get a turn at the lock, and at the event loop: 16
slices, or 1024 looks at where there are no tables."""


async def write_zeroes(
    image: "Qcow2Driver", offset: int, length: int, *, may_unmap: bool
) -> None:
    """Make clusters read as zeroes.

    ``may_unmap`` frees them; otherwise unshared clusters stay allocated under
    the zero flag, for later writes. Version 2 has no such flag: there, only a
    cluster without a backing file can be made zero, by freeing it; otherwise
    `NotSupported` is raised.
    """
    may_unmap = may_unmap and not image.settings.keep_discarded
    version2 = image.header.version < 3
    covered = image.is_covering
    if version2 and (covered or not may_unmap):
        raise NotSupported("version 2 images have no zero clusters")
    covered = covered or (image.settings.explicit_zeroes and not version2)

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

    zero_piece: ChangePiece = partial(_change_in_slice, image, change)
    if image.header.extended_l2:
        zero_piece = discard_extended.zeroing(
            image, covered=covered, may_unmap=may_unmap
        )
    unit = image.subcluster_size
    done = await _change_clusters(image, offset, length, zero_piece, covered, unit)
    if rest := offset + length - done:
        await image.write_plain(done, memoryview(bytes(rest)))


async def claim_zero(image: "Qcow2Driver", offset: int, backing_zero: bool) -> bool:
    """See `FormatDriver.claim_zero`."""
    if image.header.extended_l2:
        claim_piece = discard_extended.claiming(image)
    else:
        claim_piece = partial(_change_in_slice, image, lambda _: OFLAG_ZERO)
    while True:
        async with image.lock:
            image.check_writable()
            if offset >= image.size:
                raise BlockError(errno.ENOSPC, "the disk has become smaller")
            length = min(image.subcluster_size, image.size - offset)
            busy = image.in_flight.find(offset, offset + length)
            if busy is None:
                kind, _, _ = await image.mapping.map(offset, length)
                if kind in (ZERO, ZERO_ALLOCATED):
                    return True
                if kind != UNALLOCATED or not backing_zero:
                    return False
                explicit = image.settings.explicit_zeroes and image.header.version > 2
                if not (image.is_covering or explicit):
                    return True
                if image.header.version < 3:
                    return False
                await claim_piece(offset, offset + length)
                return True
        await busy.wait()


async def discard(image: "Qcow2Driver", offset: int, length: int) -> None:
    """Free clusters; they read as zeroes afterwards, as QEMU has it.

    A version 2 image with a backing file can't hide that file's data, so
    nothing is done there.
    """
    # A hint: what would be in the way of zeroes ends it.
    with suppress(NotSupported):
        await _discard(image, offset, length)


async def _discard(image: "Qcow2Driver", offset: int, length: int) -> None:
    version2 = image.header.version < 3
    covered = image.is_covering
    if version2 and covered:
        return

    if image.settings.keep_discarded:
        await write_zeroes(image, offset, length, may_unmap=False)
        if image.discard_freed:
            await _discard_kept(image, offset, length)
        return

    def change(entry: int) -> int:
        if covered:
            return OFLAG_ZERO
        return 0 if version2 or not entry else OFLAG_ZERO

    discard_piece: ChangePiece = partial(_change_in_slice, image, change)
    if image.header.extended_l2:
        discard_piece = discard_extended.discarding(image, covered=covered)
    unit = image.cluster_size
    await _change_clusters(image, offset, length, discard_piece, covered, unit)


async def _discard_kept(image: "Qcow2Driver", offset: int, length: int) -> None:
    """Give the space of zero clusters back that stay the guest's.

    The lock is held, or a writer might use them meanwhile.
    """
    size, start = image.cluster_size, offset
    end = round_up(offset + length, size)
    while start < end:
        async with image.lock:
            image.check_writable()
            kind, host_offset, covered = await image.mapping.map(start, end - start)
            if kind != ZERO_ALLOCATED:
                start += max(covered // size, 1) * size
            else:
                if (
                    covered >= size
                    and image.in_flight.find(start, start + size) is None
                    # A snapshot may show data there.
                    and await image.refcounts.count(host_offset // size) == 1
                ):
                    await image.data.discard(host_offset, size)
                start += size
        await asyncio.sleep(0)


async def _change_clusters(
    image: "Qcow2Driver",
    offset: int,
    length: int,
    change_piece: ChangePiece,
    covered: bool,
    unit: int,
) -> int:
    """Apply ``change_piece`` to the pieces of a range; return where that ended.

    An entry changes while no writer works on its cluster.

    ``covered``: entries in L2 tables that do not exist yet matter, because a
    backing file shows through them. ``unit``: bytes that an entry changes at
    least. A part of one is left out at the end of the range, where the disk
    ended when the range was chosen: what is behind that may be somebody's now.

    Raises `NotSupported` if the image becomes one of another version meanwhile, in
    which entries mean something else.
    """
    tables, end = image.tables, offset + length
    version = image.header.version
    cluster_mask = image.cluster_size - 1
    while offset < end:
        if tables.dirty_bytes > tables.dirty_limit:
            await image.writeback.flush()
        busy = None
        async with image.lock:
            image.check_writable()
            if image.header.version != version:
                raise NotSupported("the image has become one of another version")
            if end < image.size:
                end = max(offset, end // unit * unit)
            cost = 0
            while offset < end and cost < _COST_PER_LOCK:
                # Nobody writes where there is no table.
                if not covered and (stop := tables.empty_until(offset, end)) > offset:
                    offset = stop
                    cost += 1
                    continue
                slice_end = ((offset >> tables.slice_shift) + 1) << tables.slice_shift
                piece_end = min(end, slice_end)
                busy = image.in_flight.first_overlap(
                    offset & ~cluster_mask, (piece_end + cluster_mask) & ~cluster_mask
                )
                if busy is not None:
                    break
                await change_piece(offset, piece_end)
                if offset < image.size:
                    # Not later: the image may be made read-only before the rest.
                    image.mark_written(offset, piece_end - offset)
                offset = piece_end
                cost += _SLICE_COST
        image.start_writeback_if_due()
        if busy is not None:
            await busy.wait()
        elif offset < end:
            # Nothing above waits where the tables are in memory and the lock is
            # free, and a request may be about all of the largest disk.
            await asyncio.sleep(0)
    return end


async def _change_in_slice(
    image: "Qcow2Driver", change: _Change, offset: int, end: int
) -> None:
    tables = image.tables
    first = (offset >> image.cluster_bits) & (tables.slice_entries - 1)
    last = first + -(-(end - offset) // image.cluster_size)
    key = offset >> tables.slice_shift
    if tables.table_offset(tables.l1_index(key)):
        found = await tables.load(key)
        entries = found.words[first:last]
        if are_alike(entries):
            entries = entries[:1]
        if all(change(entry) == entry for entry in entries):
            return
    found = await slice_for_change(image, offset)
    words = found.words
    if are_alike(entries := words[first:last]) and names_nothing(entries[0]):
        words[first:last] = array("Q", [change(entries[0])]) * len(entries)
    else:
        _change_each(image, change, words, first, last)
    tables.mark_dirty(found, first, last)


def _change_each(
    image: "Qcow2Driver", change: _Change, words: "array[int]", first: int, last: int
) -> None:
    for index in range(first, last):
        old = words[index]
        new = change(old)
        if new == old:
            continue
        words[index] = new
        if not new & OFFSET_MASK:
            free_entry(image, old, discard=image.discard_freed)

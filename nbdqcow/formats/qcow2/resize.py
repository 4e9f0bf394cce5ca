"""Resizing an image that is in use, and emptying it.

Another L1 table is made beside the old one; one write to the header's first
sector then changes the size and the table together. A power cut leaves the
old disk or the new one, and leaked clusters. Entries beyond the end of the
disk are nobody's; growing clears them, for a power cut or another program may
have left some.

Source: qcow2.txt, "Header" (size, l1_size, l1_table_offset).
"""

import errno
import struct
from array import array
from collections.abc import Awaitable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from nbdqcow.block.driver import WritePlan
from nbdqcow.block.storage import StorageDriver
from nbdqcow.errors import BlockError, NotSupported
from nbdqcow.formats.qcow2 import data_file, discard, encryption, overlap
from nbdqcow.formats.qcow2 import header as h
from nbdqcow.formats.qcow2.entries import (
    ALL_ALLOCATED,
    ALL_ZERO,
    IN_DATA_FILE,
    MAX_L1_BYTES,
    OFFSET_MASK,
    OFLAG_COMPRESSED,
    OFLAG_COPIED,
)
from nbdqcow.formats.qcow2.generation import ROOTS_OFFSET, alone
from nbdqcow.formats.qcow2.new_counts import runs
from nbdqcow.formats.qcow2.write import (
    Allocation,
    end_write,
    free_entry,
    slice_for_change,
)
from nbdqcow.formats.words import dump_be64
from nbdqcow.units import SECTOR_SIZE, MiB, round_up

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.driver import Qcow2Driver

_DISK: Final = struct.Struct(">QIIQ")
"""The header from ``size`` to ``l1_table_offset``: within one sector."""


_WRITTEN_OUT: Final = MiB
"""Bytes that are written rather than set aside. A file system splits what is set aside
where it is written to, and may need a block for that (ext4's fifth extent), although
all room was to be there."""


async def resize(image: "Qcow2Driver", size: int, preallocation: str) -> None:
    """See `FormatDriver.resize`. No other operation runs."""
    if size % SECTOR_SIZE:
        raise BlockError(errno.EINVAL, "The new size must be a multiple of 512")
    if image.header.nb_snapshots and image.header.version < 3:
        raise NotSupported("Can't resize a v2 image which has snapshots")
    image.bitmaps.check_resize(size)
    if size < image.size:
        if preallocation != "off":
            raise BlockError(
                errno.EINVAL, "Preallocation can only be used for growing images"
            )
        await _shrink(image, size)
    elif size > image.size:
        await _grow(image, size, preallocation)


async def make_empty(image: "Qcow2Driver") -> None:
    """See `FormatDriver.make_empty`."""
    if image.data_file is not None and data_file.is_raw(image.header):
        raise NotSupported("a raw external data file can't be emptied")
    async with alone(image):
        old, offset = image.tables.l1, image.tables.l1_offset
        empty = array("Q", bytes(len(old) * 8))
        image.storage.announce("empty_image_prepare")
        # In place, or the file's end would stay: cut off in between, some
        # tables are empty and some are not, as with any discard.
        image.storage.announce("l1_update")
        await _or_fail(image, image.storage.pwritev(offset, [empty.tobytes()]))
        await _or_fail(image, image.storage.flush())
        image.tables.replace(empty, offset)
    await _free_tables(image, old)
    image.trim_when_freed()


# -- the L1 table ----------------------------------------------------------


async def _move_l1(image: "Qcow2Driver", l1: "array[int]") -> None:
    """Let another L1 table take the old one's place, in new clusters.

    What only the old one names is for the caller. The image is `alone`.
    """
    tables, bits = image.tables, image.cluster_bits
    old_offset, old_length = tables.l1_offset, len(tables.l1)
    nb_clusters = _l1_clusters(image, len(l1))
    image.storage.announce("l1_grow_alloc_table")
    first = await image.refcounts.allocate_contiguous(nb_clusters)
    try:
        image.metadata.update(range(first, first + nb_clusters))
        image.note_used((first + nb_clusters) << bits)
        await image.writeback.commit_alone()
        data = dump_be64(l1).ljust(nb_clusters << bits, b"\0")
        image.storage.announce("l1_grow_write_table")
        await image.storage.pwritev(first << bits, [data])
        await image.storage.flush()
    except BaseException:
        await image.refcounts.give_back(first, nb_clusters)
        raise
    image.storage.announce("l1_grow_activate_table")
    await _switch(image, image.size, l1, first << bits)
    _free_l1(image, old_offset >> bits, _l1_clusters(image, old_length))


async def _switch(
    image: "Qcow2Driver", size: int, l1: "array[int]", l1_offset: int
) -> None:
    """Make a size and an L1 table, which is on disk, valid in one write."""
    header = image.header
    data = _DISK.pack(size, header.crypt_method, len(l1), l1_offset)
    await _or_fail(image, image.storage.pwritev(ROOTS_OFFSET, [data]))
    await _or_fail(image, image.storage.flush())
    header.l1_size, header.l1_table_offset = len(l1), l1_offset
    image.tables.replace(l1, l1_offset)
    image.set_size(size)


async def _or_fail(image: "Qcow2Driver", work: Awaitable[None]) -> None:
    """Do a part of a switch: if it fails, nobody knows what is on disk."""
    try:
        await work
    except BaseException:
        image.fail()
        raise


def _l1_clusters(image: "Qcow2Driver", nb_entries: int) -> int:
    return -(-nb_entries * 8 // image.cluster_size)


def _free_l1(image: "Qcow2Driver", first: int, nb_clusters: int) -> None:
    if nb_clusters:
        image.freed.add(first, nb_clusters, image.discard_freed)


# -- shrinking -------------------------------------------------------------


async def _shrink(image: "Qcow2Driver", size: int, file_end: int = 0) -> None:
    """Make the disk smaller. A data file has at least ``file_end`` bytes then."""
    async with alone(image):
        old_l1, old_offset = image.tables.l1, image.tables.l1_offset
        nb_entries = replace(image.header, size=size).l1_entries_needed
        nb_clusters = _l1_clusters(image, nb_entries)
        image.storage.announce("l1_shrink_write_table")
        await _switch(image, size, old_l1[:nb_entries], old_offset if nb_entries else 0)
        _free_l1(
            image,
            (old_offset >> image.cluster_bits) + nb_clusters,
            _l1_clusters(image, len(old_l1)) - nb_clusters,
        )
        await _clear_entries(image, round_up(size, image.cluster_size))
    image.storage.announce("l1_shrink_free_l2_clusters")
    await _free_tables(image, old_l1[nb_entries:])
    image.trim_when_freed()
    if image.data_file is not None:
        # What replies show of it may not have left yet.
        await image.epochs.quiet()
        await image.data_file.truncate(max(size, file_end))
        # The image says so already; what a raw one has behind its end would be the
        # disk's when it grows.
        await image.data_file.flush()


async def _clear_entries(image: "Qcow2Driver", start: int) -> None:
    """Free what the L2 table around guest offset ``start`` maps from there on.

    The image is `alone`; the tables behind are not there.
    """
    tables = image.tables
    step = image.tables.entry_words
    l1_index = start >> tables.l1_shift
    end = round_up(start, 1 << tables.l1_shift)
    offset = start
    while offset < end and tables.table_offset(l1_index):
        slice_end = ((offset >> tables.slice_shift) + 1) << tables.slice_shift
        first = -((slice_end - offset) >> image.cluster_bits) * step
        found = await tables.load(offset >> tables.slice_shift)
        if any(found.words[first:]):
            found = await slice_for_change(image, offset)
            words = found.words
            first += len(words)
            for index in range(first, len(words), step):
                free_entry(image, words[index], discard=image.discard_freed)
            words[first:] = array("Q", bytes((len(words) - first) * 8))
            tables.mark_dirty(found, first, len(words))
        offset = slice_end


async def _free_tables(image: "Qcow2Driver", l1: "array[int]") -> None:
    """Free the L2 tables of an L1 table that no header names any more, and
    what they map. Others may work on the image."""
    size, bits = image.cluster_size, image.cluster_bits
    step = image.tables.entry_words
    for entry in l1:
        offset = entry & OFFSET_MASK
        if not offset or offset & (size - 1):
            continue
        image.storage.announce("l2_load")
        data = await image.storage.pread(offset, size)
        words = np.frombuffer(data, ">u8")[::step].astype(np.uint64)
        plain = (words & np.uint64(OFLAG_COMPRESSED)) == 0
        if image.header.has_data_file:
            plain[:] = False
        hosts = words[plain] & np.uint64(OFFSET_MASK)
        for first, nb_clusters in runs(hosts[hosts != 0] >> np.uint64(bits)):
            image.freed.add(first, nb_clusters, image.discard_freed)
        for other in words[~plain].tolist():
            free_entry(image, other, discard=image.discard_freed)
        image.freed.add(offset >> bits, 1, image.discard_freed)
        image.start_writeback_if_due()


# -- growing ---------------------------------------------------------------


async def _grow(image: "Qcow2Driver", size: int, preallocation: str) -> None:
    # Before anything else becomes larger.
    if replace(image.header, size=size).l1_entries_needed * 8 > MAX_L1_BYTES:
        raise BlockError(errno.EFBIG, "Failed to grow the L1 table: File too large")
    is_raw = image.data_file is not None and data_file.is_raw(image.header)
    # What a raw data file has behind the disk becomes the disk's, as in a raw
    # image: people append to the file first and then tell the image.
    keeps = image.data_file is not None and data_file.keeps_what_is_behind(image)
    await image.prepare_growing(image.size if keeps else size)
    old_size, cluster_size = image.size, image.cluster_size
    backing_size = image.backing_size
    start, end = round_up(old_size, cluster_size), round_up(size, cluster_size)
    if (
        start < end
        and backing_size > old_size
        and image.header.version < 3
        and preallocation in ("off", "metadata")
    ):
        raise NotSupported("Failed to zero out new clusters: Operation not supported")
    kept_end = image.data_file.length if is_raw and image.data_file else 0
    if image.data_file is not None:
        await _grow_data_file(image, size, max(kept_end, old_size))
    if is_raw and preallocation == "off":
        preallocation = "metadata"
    async with alone(image):
        stale = await _grow_l1(image, size)
        await _clear_entries(image, start)
    await _free_tables(image, stale)
    # Nobody looks at what is past the size until that has changed.
    try:
        if preallocation != "off":
            # Without a bitmap, the backing image shows until it is written.
            bitmap = ALL_ZERO if backing_size > start else 0
            if is_raw:
                bitmap = ALL_ALLOCATED
            await _preallocate(image, start, end, preallocation, bitmap, kept_end)
        elif backing_size > start and start < end:
            end = min(end, round_up(backing_size, cluster_size))
            await discard.write_zeroes(image, start, end - start, may_unmap=True)
        await image.writeback.flush()
    except BaseException:
        # What was appended to a raw data file is there still for another try.
        await _shrink(image, old_size, kept_end)
        raise
    async with image.lock:
        data = size.to_bytes(8, "big")
        await _or_fail(image, image.storage.pwritev(ROOTS_OFFSET, [data]))
        await _or_fail(image, image.storage.flush())
        image.set_size(size)


async def _grow_l1(image: "Qcow2Driver", size: int) -> "array[int]":
    """Make the L1 table long enough for ``size``; return what it had beyond
    the end of the disk, and has no longer."""
    l1 = image.tables.l1
    nb_old = image.header.l1_entries_needed
    nb_new = replace(image.header, size=size).l1_entries_needed
    stale = l1[nb_old:]
    if nb_new > len(l1) or any(stale):
        nb_new = max(nb_new, len(l1))
        await _move_l1(image, l1[:nb_old] + array("Q", bytes((nb_new - nb_old) * 8)))
    return stale


class _Preallocation(Allocation):
    """New clusters that are linked without data of the guest's.

    ``bitmap``: with extended L2, what is said of their subclusters.
    """

    __slots__ = ("bitmap",)
    bitmap: int

    def link(self, image: "Qcow2Driver") -> None:
        """Let the L2 entries, which are empty, name the clusters."""
        step = image.tables.entry_words
        words, first = self.l2.words, self.l2_index * step
        end = first + self.nb_clusters * step
        size = image.cluster_size
        start = self.cluster_index * size | OFLAG_COPIED
        words[first:end:step] = array(
            "Q", range(start, start + self.nb_clusters * size, size)
        )
        if step > 1:
            words[first + 1 : end : step] = array("Q", [self.bitmap]) * self.nb_clusters
        image.tables.mark_dirty(self.l2, first, end)


async def _preallocate(
    image: "Qcow2Driver",
    offset: int,
    end: int,
    preallocation: str,
    bitmap: int,
    kept_end: int,
) -> None:
    """Map guest clusters to new ones at the end of the file, which read as
    zeroes; in a data file, to what it has up to ``kept_end``."""
    tables, bits = image.tables, image.cluster_bits
    while offset < end:
        if tables.dirty_bytes > tables.dirty_limit:
            await image.writeback.flush()
        slice_end = ((offset >> tables.slice_shift) + 1) << tables.slice_shift
        nb_clusters = (min(end, slice_end) - offset) >> bits
        length = nb_clusters << bits
        async with image.lock:
            l2 = await slice_for_change(image, offset)
            # Before anything waits: a slice that nobody holds leaves the cache.
            l2.pins += 1
            try:
                first = await _place_for(image, offset, nb_clusters)
            except BaseException:
                l2.pins -= 1
                raise
        index = (offset >> bits) & ((1 << (tables.slice_shift - bits)) - 1)
        allocation = _Preallocation(
            image.in_flight.add(offset, offset + length),
            l2, index, first, nb_clusters, False, image.epochs.enter(),
        )  # fmt: skip
        allocation.bitmap = bitmap
        plan = WritePlan(offset, length, first << bits, private=allocation)
        try:
            inside = length
            if image.data_file is not None:
                # It is as long as the new disk, which may end in a cluster.
                inside = min(length, image.data_file.length - offset)
            if image.header.crypt_method != h.CRYPT_NONE:
                await _zero_encrypted(image, plan, inside)
            elif image.data_file is not None:
                new = max(offset, kept_end)
                if (rest := offset + inside - new) > 0:
                    await _zero_file(image.data_file, new, rest, preallocation)
            else:
                await _zero_file(image.storage, first << bits, length, preallocation)
        except BaseException:
            image.abort_write(plan)
            raise
        end_write(image, plan)
        offset += length


async def _place_for(image: "Qcow2Driver", offset: int, nb_clusters: int) -> int:
    """Take new clusters in a row for guest clusters from ``offset`` on; return
    the first one's index. The lock is held."""
    bits = image.cluster_bits
    if image.data_file is not None:
        return (offset | IN_DATA_FILE) >> bits
    # Freed clusters may hold old data, also those behind the file's end of a
    # moment ago. Where nothing is known to be zero, zeroes are written.
    used_end = 0
    if image.reads_zero_from < 1 << 63:
        used_end = max(image.storage.length, image.reads_zero_from)
    first = await image.refcounts.allocate_contiguous(nb_clusters, -(-used_end >> bits))
    image.note_used((first + nb_clusters) << bits)
    return first


async def _grow_data_file(image: "Qcow2Driver", size: int, zero_from: int) -> None:
    """Make room for a larger disk, which reads as zeroes from an offset on; the
    data file may be longer than the disk is."""
    assert image.data_file is not None
    stale = min(image.data_file.length, size) - zero_from
    if stale > 0:
        await image.data.write_zeroes(zero_from, stale, may_unmap=True)
    if image.data_file.length < size:
        await image.data_file.truncate(size)


async def _zero_encrypted(image: "Qcow2Driver", plan: WritePlan, length: int) -> None:
    """Write zeroes out, encrypted: what is new in a file decrypts to noise."""
    host_offset = plan.host_offset
    if image.data_file is not None:
        host_offset = plan.guest_offset
    place = encryption.tagged(image.header, host_offset, plan.guest_offset)
    await image.data.write_zeroes(place, length, may_unmap=False)


async def _zero_file(
    storage: StorageDriver, offset: int, length: int, preallocation: str
) -> None:
    """Make a range of a file, which was never used, what a preallocation
    mode wants."""
    if preallocation == "full" or (
        preallocation == "falloc" and length <= _WRITTEN_OUT
    ):
        await storage.write_zero_data(offset, length)
    elif preallocation == "falloc" or not storage.zero_beyond_end:
        await storage.write_zeroes(offset, length, may_unmap=False)
    else:
        # Others may write to clusters behind it.
        await storage.grow(offset + length)


# -- the end of the file ---------------------------------------------------


async def trim(image: "Qcow2Driver") -> None:
    """Cut off what lies behind the last cluster in use, after the refcount
    blocks that count nothing more."""
    refcounts = image.refcounts
    await image.writeback.flush()
    async with image.writeback.paused(), image.lock:
        if image.failed or image.header.corrupt or refcounts.may_have_moved:
            # What the disk names may be behind all that we know of.
            return
        await image.writeback.commit_alone()
        # The last may have been all that another one counted.
        while empty := overlap.not_overlapping(image, await refcounts.empty_blocks()):
            await _or_fail(image, refcounts.drop_blocks(empty))
            await image.writeback.commit_alone()
        length = await refcounts.nb_clusters() << image.cluster_bits
        if length < image.storage.length:
            await image.storage.truncate(length)
            image.file_end = min(image.file_end, length)
            if image.data is image.storage and image.storage.zero_beyond_end:
                image.reads_zero_from = min(image.reads_zero_from, length)

"""Writing compressed clusters: packed one behind the other, then linked.

Several share a host cluster, which is counted once for each of them. Streams
are made in parallel and placed in the order in which they were asked for.

Source: qcow2.txt, "Compressed Clusters Descriptor".
"""

import asyncio
import contextlib
import errno
from array import array
from typing import TYPE_CHECKING

from nbdqcow.block.inflight import InFlightRange
from nbdqcow.buffers import zero_bytes
from nbdqcow.errors import BlockError, NotSupported
from nbdqcow.formats.qcow2.entries import compressed_entry, max_compressed_offset
from nbdqcow.formats.qcow2.header import CRYPT_NONE
from nbdqcow.formats.qcow2.tables import L2Slice
from nbdqcow.formats.qcow2.write import free_entry, slice_for_change
from nbdqcow.outliving import forget
from nbdqcow.types import Buffer
from nbdqcow.units import SECTOR_SIZE, round_up

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.driver import Qcow2Driver


async def write_compressed(
    image: "Qcow2Driver", offset: int, data: Buffer, *, store_zeroes: bool
) -> None:
    """See `FormatDriver.write_compressed`."""
    header = image.header
    if header.crypt_method != CRYPT_NONE:
        raise NotSupported("Compression and encryption not supported at the same time")
    if header.has_data_file:
        raise NotSupported("Operation not supported")
    length, cluster_size = len(data), image.cluster_size
    if not store_zeroes and bytes(data) == zero_bytes(length):
        with contextlib.suppress(NotSupported):
            await image.write_zeroes(offset, length, may_unmap=True, no_fallback=True)
            return
    if length < cluster_size:
        data = bytes(data).ljust(cluster_size, b"\0")
    clusters = image.compressed
    compress = clusters.compress
    job = asyncio.create_task(clusters.threads.run(compress, data))
    # It may have failed before it is this call's turn, and this call be cancelled.
    forget(job)
    try:
        # First come, first served: the lock keeps the order of the calls.
        async with clusters.placing:
            packed = await job
            if clusters.compress is not compress:
                # The image has been amended meanwhile.
                packed = await clusters.threads.run(clusters.compress, data)
            if len(packed) >= cluster_size or not await _place(
                image, offset, length, packed
            ):
                await image.write_plain(offset, memoryview(data)[:length])
    finally:
        if not job.done():
            job.cancel()
            await asyncio.wait((job,))


async def _place(image: "Qcow2Driver", offset: int, length: int, packed: bytes) -> bool:
    """Write a stream behind the last one and link it to the guest's cluster.

    ``length``: bytes of the guest's in it. False if that is not all of the
    cluster any more, for the disk has grown.
    """
    begun = await _begin(image, offset, length, len(packed))
    if begun is None:
        return False
    l2, in_flight, host_offset = begun
    epoch = image.epochs.enter()
    entry = compressed_entry(host_offset, len(packed), image.cluster_bits)
    try:
        if not image.storage.try_pwrite(host_offset, packed):
            image.storage.announce("write_compressed")
            await image.storage.pwritev(host_offset, [packed])
    except BaseException:
        free_entry(image, entry)
        raise
    else:
        # Somebody may remember who had the very same place before.
        image.compressed.drop(entry)
        _link(image, l2, offset, entry)
    finally:
        l2.pins -= 1
        image.epochs.leave(epoch)
        image.in_flight.remove(in_flight)
        image.start_writeback_if_due()
    return True


async def _begin(
    image: "Qcow2Driver", offset: int, guest_length: int, length: int
) -> tuple[L2Slice, InFlightRange, int] | None:
    """Return the pinned slice of a guest cluster, the cluster as one that is
    being worked on, and where ``length`` bytes for it have been taken; None if
    it has more than ``guest_length`` bytes of the disk."""
    end = offset + image.cluster_size
    if image.tables.dirty_bytes > image.tables.dirty_limit:
        await image.writeback.flush()
    while True:
        async with image.lock:
            image.check_writable()
            if offset >= image.size:
                raise BlockError(errno.ENOSPC, "the disk has become smaller")
            if offset + guest_length < min(end, image.size):
                return None
            busy = image.in_flight.find(offset, end)
            if busy is None:
                l2 = await slice_for_change(image, offset)
                l2.pins += 1
                try:
                    host_offset = await image.refcounts.allocate_bytes(length)
                    _check_place(image, host_offset, length)
                except BaseException:
                    l2.pins -= 1
                    raise
                return l2, image.in_flight.add(offset, end), host_offset
        await busy.wait()


def _check_place(image: "Qcow2Driver", host_offset: int, length: int) -> None:
    bits, end = image.cluster_bits, host_offset + length
    image.reads_zero_from = max(
        image.reads_zero_from, round_up(end, image.cluster_size)
    )
    # As with QEMU: a stream is followed by others, and nobody reads its cluster.
    image.file_end = max(image.file_end, round_up(end, SECTOR_SIZE))
    if end > max_compressed_offset(bits):
        raise BlockError(errno.EFBIG, "the image file is too long to compress in it")


def _link(image: "Qcow2Driver", l2: L2Slice, offset: int, entry: int) -> None:
    """Let the guest's cluster be the compressed one from now on."""
    tables, words = image.tables, l2.words
    cluster = (offset >> image.cluster_bits) & (tables.slice_entries - 1)
    index, end = cluster * tables.entry_words, (cluster + 1) * tables.entry_words
    free_entry(image, words[index])
    words[index] = entry
    # A compressed cluster has no subclusters.
    words[index + 1 : end] = array("Q", bytes(8 * (end - index - 1)))
    tables.mark_dirty(l2, index, end)

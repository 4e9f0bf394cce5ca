"""Writing compressed clusters: packed one behind the other, then linked.

Several share a host cluster, which is counted once for each of them. Streams
are made in parallel and placed in the order in which they were asked for, some at
a time.

Source: qcow2.txt, "Compressed Clusters Descriptor".
"""

import asyncio
import contextlib
import errno
from array import array
from typing import TYPE_CHECKING, Final, NamedTuple

from nbdqcow.block.inflight import InFlightRange
from nbdqcow.buffers import zero_bytes
from nbdqcow.errors import BlockError, NotSupported
from nbdqcow.formats.qcow2.entries import compressed_entry, max_compressed_offset
from nbdqcow.formats.qcow2.header import CRYPT_NONE
from nbdqcow.formats.qcow2.tables import L2Slice
from nbdqcow.formats.qcow2.write import free_entry, slice_for_change
from nbdqcow.outliving import forget
from nbdqcow.types import Buffer
from nbdqcow.units import SECTOR_SIZE, KiB, round_up

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.codec import Compress
    from nbdqcow.formats.qcow2.driver import Qcow2Driver


_AT_ONCE_BYTES: Final = 256 * KiB
_MAX_AT_ONCE: Final = 16


def nb_at_once(cluster_size: int) -> int:
    """Return how many clusters a thread compresses before the loop places them: a
    millisecond's work or two, so that handing it over costs little beside it."""
    return min(max(1, _AT_ONCE_BYTES // cluster_size), _MAX_AT_ONCE)


class _Piece(NamedTuple):
    """A cluster that is to be compressed: its bytes, of which the guest's are the
    first ``length``."""

    offset: int
    data: Buffer
    length: int


class _Placed(NamedTuple):
    """A stream on its way into the file, and what is held for it meanwhile."""

    offset: int
    packed: bytes
    host_offset: int
    entry: int
    l2: L2Slice
    in_flight: InFlightRange


async def write_compressed(
    image: "Qcow2Driver", offset: int, data: Buffer, *, store_zeroes: bool
) -> None:
    """See `FormatDriver.write_compressed`."""
    header = image.header
    if header.crypt_method != CRYPT_NONE:
        raise NotSupported("Compression and encryption not supported at the same time")
    if header.has_data_file:
        raise NotSupported("Operation not supported")
    pieces: list[_Piece] = []
    view, cluster_size = memoryview(data), image.cluster_size
    for start in range(0, len(view), cluster_size):
        plain: Buffer = view[start : start + cluster_size]
        length = len(plain)
        if not (store_zeroes or plain[0]) and bytes(plain) == zero_bytes(length):
            with contextlib.suppress(NotSupported):
                await image.write_zeroes(
                    offset + start, length, may_unmap=True, no_fallback=True
                )
                continue
        if length < cluster_size:
            plain = bytes(plain).ljust(cluster_size, b"\0")
        pieces.append(_Piece(offset + start, plain, length))
    if pieces:
        await _write_pieces(image, pieces)


async def _write_pieces(image: "Qcow2Driver", pieces: list[_Piece]) -> None:
    clusters = image.compressed
    compress = clusters.compress
    job = asyncio.create_task(
        clusters.threads.run(_compress_blocking, compress, pieces)
    )
    # It may have failed before it is this call's turn, and this call be cancelled.
    forget(job)
    try:
        # First come, first served: the lock keeps the order of the calls.
        async with clusters.placing:
            packed = await job
            if clusters.compress is not compress:
                # The image has been amended meanwhile.
                packed = await clusters.threads.run(
                    _compress_blocking, clusters.compress, pieces
                )
            while pieces:
                nb_done = await _place(image, pieces, packed)
                if not nb_done:
                    piece, nb_done = pieces[0], 1
                    plain = memoryview(piece.data)[: piece.length]
                    await image.write_plain(piece.offset, plain)
                pieces, packed = pieces[nb_done:], packed[nb_done:]
    finally:
        if not job.done():
            job.cancel()
            await asyncio.wait((job,))


def _compress_blocking(compress: "Compress", pieces: list[_Piece]) -> list[bytes]:
    return [compress(piece.data) for piece in pieces]


async def _place(
    image: "Qcow2Driver", pieces: list[_Piece], packed: list[bytes]
) -> int:
    """Write streams behind the last one and link them to the guest's clusters.

    Returns how many of the first it were; 0 if that one is to be stored as it is,
    for it gets no shorter, or has more of the disk by now than it had.
    """
    placed = await _begin(image, pieces, packed)
    if not placed:
        return 0
    epoch = image.epochs.enter()
    try:
        await _write(image, placed)
    except BaseException:
        for stream in placed:
            free_entry(image, stream.entry)
        raise
    else:
        for stream in placed:
            # Somebody may remember who had the very same place before.
            image.compressed.drop(stream.entry)
            _link(image, stream)
    finally:
        image.epochs.leave(epoch)
        _end(image, placed)
    return len(placed)


async def _begin(
    image: "Qcow2Driver", pieces: list[_Piece], packed: list[bytes]
) -> list[_Placed]:
    """Take places for the first streams, as many as can have one without waiting;
    see `_place`."""
    if image.tables.dirty_bytes > image.tables.dirty_limit:
        await image.writeback.flush()
    placed: list[_Placed] = []
    while True:
        busy: InFlightRange | None = None
        async with image.lock:
            try:
                for piece, stream in zip(pieces, packed, strict=True):
                    image.check_writable()
                    if len(stream) >= image.cluster_size or _has_grown(image, piece):
                        break
                    end = piece.offset + image.cluster_size
                    busy = image.in_flight.find(piece.offset, end)
                    if busy is not None:
                        break
                    placed.append(await _take_place(image, piece.offset, stream))
            except OSError:
                # The next call will see it, once these have their places.
                if not placed:
                    raise
            except BaseException:
                for begun in placed:
                    free_entry(image, begun.entry)
                _end(image, placed)
                raise
        if placed or busy is None:
            return placed
        await busy.wait()


def _has_grown(image: "Qcow2Driver", piece: _Piece) -> bool:
    """Whether the disk has more of a cluster than what is to be written of it."""
    if piece.offset >= image.size:
        raise BlockError(errno.ENOSPC, "the disk has become smaller")
    cluster_end = min(piece.offset + image.cluster_size, image.size)
    return piece.offset + piece.length < cluster_end


async def _take_place(image: "Qcow2Driver", offset: int, packed: bytes) -> _Placed:
    l2 = await slice_for_change(image, offset)
    l2.pins += 1
    try:
        host_offset = await image.refcounts.allocate_bytes(len(packed))
        _check_place(image, host_offset, len(packed))
    except BaseException:
        l2.pins -= 1
        raise
    entry = compressed_entry(host_offset, len(packed), image.cluster_bits)
    in_flight = image.in_flight.add(offset, offset + image.cluster_size)
    return _Placed(offset, packed, host_offset, entry, l2, in_flight)


def _end(image: "Qcow2Driver", placed: list[_Placed]) -> None:
    """Let go of what was held for streams."""
    for stream in placed:
        stream.l2.pins -= 1
        image.in_flight.remove(stream.in_flight)
    image.start_writeback_if_due()


async def _write(image: "Qcow2Driver", placed: list[_Placed]) -> None:
    """Write streams to their places, those that follow one another at once."""
    first = 0
    while first < len(placed):
        start = end = placed[first].host_offset
        streams: list[bytes] = []
        for stream in placed[first:]:
            if stream.host_offset != end:
                break
            streams.append(stream.packed)
            end += len(stream.packed)
        if not image.storage.try_pwritev(start, streams):
            image.storage.announce("write_compressed")
            await image.storage.pwritev(start, streams)
        first += len(streams)


def _check_place(image: "Qcow2Driver", host_offset: int, length: int) -> None:
    bits, end = image.cluster_bits, host_offset + length
    image.reads_zero_from = max(
        image.reads_zero_from, round_up(end, image.cluster_size)
    )
    # As with QEMU: a stream is followed by others, and nobody reads its cluster.
    image.file_end = max(image.file_end, round_up(end, SECTOR_SIZE))
    if end > max_compressed_offset(bits):
        raise BlockError(errno.EFBIG, "the image file is too long to compress in it")


def _link(image: "Qcow2Driver", stream: _Placed) -> None:
    """Let the guest's cluster be the compressed one from now on."""
    tables, words = image.tables, stream.l2.words
    cluster = (stream.offset >> image.cluster_bits) & (tables.slice_entries - 1)
    index, end = cluster * tables.entry_words, (cluster + 1) * tables.entry_words
    free_entry(image, words[index])
    words[index] = stream.entry
    # A compressed cluster has no subclusters.
    words[index + 1 : end] = array("Q", bytes(8 * (end - index - 1)))
    tables.mark_dirty(stream.l2, index, end)

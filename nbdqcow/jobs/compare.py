"""Comparing two disks."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import takewhile
from typing import Final, NamedTuple

from nbdqcow.block.node import Node
from nbdqcow.block.storage import StorageDriver
from nbdqcow.errors import NbdQcowError
from nbdqcow.jobs.control import JobControl
from nbdqcow.jobs.errors import reason_of
from nbdqcow.jobs.status import Entry, disk_size, entry_of, place_in
from nbdqcow.jobs.zeroes import is_zero
from nbdqcow.pool import Pool
from nbdqcow.units import SECTOR_SIZE, KiB, MiB

_PIECE: Final = 2 * MiB
_CHUNK: Final = 256 * KiB
"""What a thread reads of each disk at a time: both stay in its processor's cache
until they are compared."""
_NB_IN_FLIGHT: Final = 4
_GROUP: Final = 16 * MiB
"""Bytes that are read of pieces that go to a thread together, and"""
_MAX_GROUP: Final = 64
"""their greatest number."""


class CompareError(NbdQcowError):
    """A disk could not be read: the one of index ``which``, at ``offset``."""

    def __init__(self, which: int, offset: int, reason: str) -> None:
        super().__init__(reason)
        self.which = which
        self.offset = offset


class Comparison(NamedTuple):
    """What was found, each None or False if there is nothing of it.

    Attributes:
        content_offset: the first sector that differs.
        status_offset: the first byte that is data in one disk only.
        sizes_differ: one disk is longer. All of both was looked at, unless
            the comparison was to be strict, or they differ before.
    """

    content_offset: int | None = None
    status_offset: int | None = None
    sizes_differ: bool = False


class _Piece(NamedTuple):
    """A stretch of both disks.

    Attributes:
        reads: which of them must be read; the others are zero.
        places: where these are in files, if threads can read them there.
        status_differs: a strict comparison ends here.
        failure: why nobody knows what is here, or None.
    """

    offset: int
    length: int
    reads: tuple[int, ...]
    places: list[tuple[StorageDriver, int]]
    status_differs: bool
    failure: CompareError | None = None

    @property
    def end(self) -> int:
        """Where the next one begins."""
        return self.offset + self.length

    @property
    def in_threads(self) -> bool:
        """Whether threads can read all of it."""
        return len(self.places) == len(self.reads)


async def compare(
    first: Node,
    second: Node,
    control: JobControl,
    *,
    strict: bool = False,
    on_longer: Callable[[], None] = lambda: None,
) -> Comparison:
    """Say whether two disks have the same content.

    What one has behind the end of the other must read as zeroes. ``strict``:
    they must also be of one size, and have data in the same places.
    ``on_longer`` is called once all that both have is the same, and one has
    more. Raises `CompareError` and `nbdqcow.jobs.control.JobCancelled`.
    """
    nodes = (first, second)
    sizes_differ = disk_size(first) != disk_size(second)
    if strict and sizes_differ:
        return Comparison(sizes_differ=True)
    control.expect(max(map(disk_size, nodes)))
    common = min(map(disk_size, nodes))
    running: deque[tuple[list[_Piece], asyncio.Task[int | None]]] = deque()
    pool = Pool()

    async def finish_one() -> Comparison | None:
        group, task = running.popleft()
        if group[0].offset == common:
            on_longer()
        try:
            offset = await task
        except CompareError as error:
            advance(group, error.offset)
            raise
        if offset is None:
            advance(group, group[-1].end)
            return None
        advance(group, offset)
        return Comparison(offset, None, sizes_differ and offset >= common)

    def advance(group: list[_Piece], end: int) -> None:
        # Piece by piece, as QEMU does.
        for piece in takewhile(lambda piece: piece.end <= end, group):
            control.advance(piece.length)

    last = Comparison(sizes_differ=sizes_differ)
    try:
        async for group in _groups(_pieces(nodes), common, strict=strict):
            nb_read = sum(piece.length for piece in group if piece.reads)
            await control.checkpoint(nb_read)
            if strict and group[0].status_differs:
                last = Comparison(status_offset=group[0].offset)
                break
            running.append((group, asyncio.create_task(_compare(nodes, group, pool))))
            if len(running) >= _NB_IN_FLIGHT and (found := await finish_one()):
                return found
        while running:
            if found := await finish_one():
                return found
        return last
    finally:
        for _, task in running:
            task.cancel()
        await asyncio.gather(*(task for _, task in running), return_exceptions=True)
        await pool.close()


async def _pieces(nodes: tuple[Node, Node]) -> AsyncIterator[_Piece]:
    sizes = [disk_size(node) for node in nodes]
    ends = [0, 0]
    entries: list[Entry | None] = [None, None]
    offset = 0
    while offset < max(sizes):
        for which, node in enumerate(nodes):
            if ends[which] > offset:
                continue
            entries[which] = None
            ends[which] = max(sizes)
            if offset < sizes[which]:
                try:
                    entry = await _entry(which, node, offset, sizes[which] - offset)
                except CompareError as error:
                    # What is before it counts first.
                    yield _Piece(offset, 0, (which,), [], False, error)
                    return
                entries[which], ends[which] = entry, offset + entry.length
        reads = tuple(
            which
            for which, entry in enumerate(entries)
            if entry is not None and not entry.is_zero
        )
        end = min(ends)
        if reads:
            end = min(end, offset + _PIECE - offset % _PIECE)
        differs = _status(entries[0]) != _status(entries[1])
        places = []
        for which in reads:
            held = entries[which]
            assert held is not None
            if (place := place_in(held, ends[which], offset, end)) is not None:
                places.append(place)
        yield _Piece(offset, end - offset, reads, places, differs)
        offset = end


async def _groups(
    pieces: AsyncIterator[_Piece], common: int, *, strict: bool
) -> AsyncIterator[list[_Piece]]:
    """Yield pieces, together those that a thread goes through in one go. One that
    begins at ``common`` begins a group, one that ends a comparison is alone."""
    group: list[_Piece] = []
    nb_read = 0
    async for piece in pieces:
        alone = not piece.in_threads or (strict and piece.status_differs)
        full = nb_read >= _GROUP or len(group) == _MAX_GROUP
        if group and (full or alone or piece.offset == common):
            yield group
            group, nb_read = [], 0
        group.append(piece)
        nb_read += len(piece.reads) * piece.length
        if alone:
            yield group
            group, nb_read = [], 0
    if group:
        yield group


async def _entry(which: int, node: Node, offset: int, length: int) -> Entry:
    try:
        entry = await entry_of(node, offset, length)
    except OSError as error:
        raise CompareError(which, offset, reason_of(error)) from error
    assert entry is not None
    return entry


def _status(entry: Entry | None) -> tuple[bool, ...]:
    """Return what a strict comparison looks at."""
    if entry is None:
        return ()
    # What is behind the end of a backing file is zero whatever that file is given
    # later: the image says so as it does by a zero cluster.
    present = entry.present or entry.node.backing is not None
    return entry.is_data, entry.is_zero, present, entry.host_offset >= 0


async def _compare(
    nodes: tuple[Node, Node], group: list[_Piece], pool: Pool
) -> int | None:
    """Return the first sector that differs, None if there is none."""
    pieces = [piece for piece in group if piece.reads]
    while pieces:
        if pieces[0].in_threads:
            nb_same = await pool.run(_nb_same_blocking, pieces)
            del pieces[:nb_same]
        if pieces:
            # Which disk can't be read, or where they differ, this way tells.
            piece = pieces.pop(0)
            if (offset := await _compare_piece(nodes, piece)) is not None:
                return offset
    return None


async def _compare_piece(nodes: tuple[Node, Node], piece: _Piece) -> int | None:
    if piece.failure is not None:
        raise piece.failure
    found = await asyncio.gather(
        *(_read(which, nodes[which], piece) for which in piece.reads)
    )
    if len(found) == 1:
        found.append(bytes(piece.length))
    if found[0] == found[1]:
        return None
    return piece.offset + _first_difference(*found)


class _Buffers(threading.local):
    """Two buffers for each thread."""

    def __init__(self) -> None:
        self.pair = (bytearray(_CHUNK), bytearray(_CHUNK))


_buffers: Final = _Buffers()


def _nb_same_blocking(pieces: Sequence[_Piece]) -> int:
    """Return how many pieces, from the first one on, are found to be the same."""
    for number, piece in enumerate(pieces):
        try:
            if not _is_same_blocking(piece.places, piece.length):
                return number
        except OSError:
            return number
    return len(pieces)


def _is_same_blocking(places: Sequence[tuple[StorageDriver, int]], length: int) -> bool:
    first, second = _buffers.pair
    for start in range(0, length, _CHUNK):
        count = min(_CHUNK, length - start)
        for (storage, offset), buffer in zip(places, _buffers.pair, strict=False):
            storage.pread_into_blocking(offset + start, memoryview(buffer)[:count])
        if len(places) == 1:
            if not is_zero(first[:count]):
                return False
        # Whole buffers compare at once, views byte by byte.
        elif first != second if count == _CHUNK else first[:count] != second[:count]:
            return False
    return True


async def _read(which: int, node: Node, piece: _Piece) -> bytes:
    inside = min(piece.length, node.size - piece.offset)
    try:
        data = await node.pread(piece.offset, inside)
    except OSError as error:
        raise CompareError(which, piece.offset, reason_of(error)) from error
    # Views compare byte by byte, bytes at once.
    return bytes(data).ljust(piece.length, b"\0")


def _first_difference(first: bytes, second: bytes) -> int:
    for start in range(0, len(first), SECTOR_SIZE):
        end = start + SECTOR_SIZE
        if first[start:end] != second[start:end]:
            return start
    raise AssertionError("they are equal")

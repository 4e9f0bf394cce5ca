"""Moving data from file to file in worker threads, by way of a small buffer.

A thread reads what fits into its processor's cache, looks at it if need be, and
writes it while it is still there. Reading all of a large piece first costs twice
as much, for it goes out to memory and comes back.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Final

from nbdqcow.block.storage import BlockingSource, StorageDriver, WriteBlocking
from nbdqcow.jobs.status import ZEROES, Place
from nbdqcow.jobs.zeroes import data_runs, is_zero
from nbdqcow.types import Buffer
from nbdqcow.units import KiB

CHUNK: Final = 512 * KiB
"""Bytes that a thread reads and writes at a time."""
_SHORT_CHUNK: Final = 128 * KiB
"""The same of what it decompresses. That takes so long that a longer one gains nothing,
and the kernel has more trouble to find memory for it: page cache comes in pages as
large as what is written."""


class ReadError(Exception):
    """Reading failed with ``reason``, in the middle of writing."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class ZeroesFound(Exception):
    """A unit that was to hold data holds nothing but zeroes."""


class _Buffers(threading.local):
    """One buffer for each thread."""

    def __init__(self) -> None:
        self.data = bytearray(CHUNK)
        self.view = memoryview(self.data)


_buffers: Final = _Buffers()


class Transfer:
    """The bytes of ``places``, on their way into one image.

    Attributes:
        zeroes: what `write_data_blocking` left out, as offset and length.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places
        self.zeroes: list[tuple[int, int]] = []

    def is_plain_copy(self, target: StorageDriver) -> bool:
        """Whether all of it can be copied by `StorageDriver.copy_from`, at less
        cost than by reading and writing."""
        return all(
            isinstance(source, StorageDriver) and target.copies_plainly(source)
            for source, _, _ in self._places
        )

    def find(
        self, skipped: int, start: int, length: int
    ) -> Iterator[tuple[StorageDriver, int, int]]:
        """Yield where the bytes of a plain copy are; see `WriteRequests.copy_by`.
        ``skipped`` is as in `write_blocking`."""
        for source, offset, count in self.stretches(skipped + start, length):
            assert isinstance(source, StorageDriver)
            yield source, offset, count

    def is_cut_at(self, unit: int) -> bool:
        """Whether no unit lies in two places."""
        return all(count % unit == 0 for _, _, count in self._places[:-1])

    def try_find_runs(self, unit: int) -> list[tuple[bool, int]] | None:
        """Return what `data_runs` would say of all the bytes, from a look at
        page cache alone; None if that is not to be had.

        Mostly a word of each unit tells, so this costs a twentieth of reading.
        """
        runs: list[tuple[bool, int]] = []
        if not self.is_cut_at(unit):
            return None
        for storage, start, count in self._places:
            if not isinstance(storage, StorageDriver):
                return None
            words = storage.try_pick(start, count, unit)
            if words is None:
                return None
            if 0 not in words:
                _append(runs, True, count)
                continue
            for word, offset in zip(words, range(0, count, unit), strict=True):
                covered = min(unit, count - offset)
                has_data = word != 0
                if not has_data:
                    data = storage.try_pread(start + offset, covered)
                    if data is None:
                        return None
                    has_data = not is_zero(data)
                _append(runs, has_data, covered)
        return runs

    def write_blocking(
        self, skipped: int, start: int, length: int, write: WriteBlocking
    ) -> None:
        """Write all of ``length`` bytes; see `Node.pwrite_by`. ``skipped`` is
        where among our bytes those of the request begin.

        Raises `ReadError`, and what ``write`` does.
        """
        view = _buffers.view
        position = 0
        for source, offset, count in self._cut(skipped + start, length, CHUNK):
            chunk = view[:count]
            _read(source, offset, chunk)
            write(position, chunk)
            position += count

    def write_full_blocking(
        self, unit: int, start: int, length: int, write: WriteBlocking
    ) -> None:
        """Do as `write_blocking` does, of bytes of which every ``unit`` is known to
        hold data. Raises `ZeroesFound` before it writes one that does not."""

        def write_full(position: int, chunk: Buffer) -> None:
            count = len(chunk)
            if data_runs(_buffers.data, unit, count) != [(True, count)]:
                raise ZeroesFound
            write(position, chunk)

        self.write_blocking(0, start, length, write_full)

    def write_data_blocking(
        self, unit: int, start: int, length: int, write: WriteBlocking
    ) -> None:
        """Write units that hold data, and note the others in `zeroes`.

        ``unit`` divides `CHUNK`, and begins where our bytes do.
        """
        data, view = _buffers.data, _buffers.view
        position, filled = 0, 0
        chunk = CHUNK
        if not all(
            source is ZEROES or isinstance(source, StorageDriver)
            for source, _, _ in self._places
        ):
            chunk = max(unit, _SHORT_CHUNK)
        for source, offset, count in self._cut(start, length, chunk):
            if source is ZEROES and count == chunk:
                self.zeroes.append((start + position, count))
                position += count
                continue
            _read(source, offset, view[filled : filled + count])
            filled += count
            if filled < chunk and position + filled < length:
                # Units may go across the edge of a place.
                continue
            at = 0
            for has_data, covered in data_runs(data, unit, filled):
                if has_data:
                    write(position + at, view[at : at + covered])
                else:
                    self.zeroes.append((start + position + at, covered))
                at += covered
            position, filled = position + filled, 0

    def _cut(self, start: int, length: int, chunk: int) -> list[Place]:
        """Return where our bytes ``[start, start + length)`` are, cut wherever a
        ``chunk``, counted from ``start``, ends."""
        cut: list[Place] = []
        done = 0
        for source, offset, count in self.stretches(start, length):
            while count:
                covered = min(count, chunk - done % chunk)
                cut.append(Place(source, offset, covered))
                offset, count, done = offset + covered, count - covered, done + covered
        return cut

    def stretches(self, start: int, length: int) -> Iterator[Place]:
        """Yield where our bytes ``[start, start + length)`` are."""
        for source, offset, count in self._places:
            if start < count and length:
                covered = min(count - start, length)
                yield Place(source, offset + start, covered)
                length -= covered
            start = max(0, start - count)


def _read(source: BlockingSource, offset: int, view: memoryview) -> None:
    try:
        source.pread_into_blocking(offset, view)
    except OSError as error:
        raise ReadError(error) from error


def _append(runs: list[tuple[bool, int]], has_data: bool, length: int) -> None:
    if runs and runs[-1][0] is has_data:
        length += runs.pop()[1]
    runs.append((has_data, length))

"""Files past the page cache: O_DIRECT, as ``--cache=none`` asks for.

The kernel then wants memory, offsets and lengths in multiples of the disk's
blocks. Requests come as they come, so all go through a buffer of our own, and
a write of part of a block reads the block, changes it and writes it back,
while nobody else writes to that block.
"""

import errno
import mmap
import os
from collections.abc import Callable
from typing import Any, ClassVar, Final, TypeVar, TypeVarTuple

from nbdqcow.block.inflight import InFlightRange, InFlightRanges
from nbdqcow.pool import Lane
from nbdqcow.storage.file import FileStorage
from nbdqcow.types import Buffer, Buffers
from nbdqcow.units import round_up

# A range with this end keeps off everything behind its start.
_FOREVER: Final = 1 << 63
_MAX_ALIGNMENT: Final = 4096

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class DirectFileStorage(FileStorage):
    """A file opened with O_DIRECT. Everything runs in threads."""

    writes_in_threads: ClassVar[bool] = False

    def __init__(self, fd: int, filename: str, **options: Any) -> None:
        super().__init__(fd, filename, **options)
        self.read_alignment = self._probe_alignment()
        self._changing = InFlightRanges()

    def _probe_alignment(self) -> int:
        """Return the block size, in bytes, that reading the file takes."""
        buffer = _make_buffer(_MAX_ALIGNMENT)
        # Near its end a file may accept what it would not accept elsewhere.
        if self.length >= _MAX_ALIGNMENT:
            for alignment in (1, 512, 1024, 2048):
                try:
                    os.preadv(self._fd, (buffer[:alignment],), alignment)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                else:
                    # A hole is read without asking the disk: it says nothing.
                    return alignment if alignment > 1 else _MAX_ALIGNMENT
        return _MAX_ALIGNMENT

    def _pread_blocking(self, offset: int, length: int) -> Buffer:
        if not length:
            return b""
        start, stop = self._align(offset, offset + length)
        buffer = _make_buffer(stop - start)
        self._read_blocks(start, buffer)
        return buffer[offset - start : offset - start + length]

    def pread_into_blocking(self, offset: int, view: memoryview) -> None:
        """Fill ``view``, by way of memory as the kernel wants it."""
        view[:] = self._pread_blocking(offset, len(view))

    def _read_blocks(self, start: int, buffer: memoryview) -> None:
        """Fill a zeroed buffer; what is past the end of the file stays zero."""
        nb_read = 0
        # Part of a block is all there is before the end.
        while nb_read < len(buffer) and nb_read % self.read_alignment == 0:
            count = os.preadv(self._fd, (buffer[nb_read:],), start + nb_read)
            if not count:
                return
            nb_read += count

    def _pwritev_blocking(self, offset: int, buffers: Buffers, durable: bool) -> None:
        end = offset + sum(map(len, buffers))
        start, stop = self._align(offset, end)
        bounce = _make_buffer(stop - start)
        size = self.read_alignment
        if offset != start:
            self._read_blocks(start, bounce[:size])
        if end != stop and (offset == start or stop - start > size):
            self._read_blocks(stop - size, bounce[len(bounce) - size :])
        position = offset - start
        for buffer in buffers:
            bounce[position : position + len(buffer)] = buffer
            position += len(buffer)
        # The last block of a file is written whole, and cut again. `_change`
        # keeps all else off the end of the file meanwhile.
        length = max(self.length, end)
        cut = stop > length and not self._is_device
        super()._pwritev_blocking(start, [bounce], durable and not cut)
        if cut:
            os.ftruncate(self._fd, length)
            if durable:
                self._sync_blocking()

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool = False
    ) -> None:
        """Make a range read as zeroes. Blocks of which it has a part are written,
        as QEMU does: what was a hole has space then."""
        if not no_fallback:
            end = offset + length
            start, stop = round_up(offset, self.read_alignment), end
            if end < self.length:
                stop -= end % self.read_alignment
            if start >= stop:
                start = stop = end
            for first, last in ((offset, start), (stop, end)):
                if first < last:
                    await self.pwritev(first, [bytes(last - first)])
            offset, length = start, stop - start
        await super().write_zeroes(
            offset, length, may_unmap=may_unmap, no_fallback=no_fallback
        )

    async def _change(
        self,
        offset: int,
        end: int,
        durable: bool,
        function: Callable[[*Ts], T],
        *arguments: *Ts,
        lane: Lane | None = None,
    ) -> T:
        changing = await self._enter(offset, end)
        try:
            return await super()._change(
                offset, end, durable, function, *arguments, lane=lane
            )
        finally:
            self._changing.remove(changing)

    async def _enter(self, offset: int, end: int) -> InFlightRange:
        """Wait until nothing else changes the blocks of ``[offset, end)``."""
        start, stop = self._align(offset, end)
        while True:
            # Who leaves an odd end has to cut the file there.
            grows_oddly = end != stop and stop > self.length
            limit = _FOREVER if grows_oddly else stop
            other = self._changing.find(start, limit)
            if other is None:
                return self._changing.add(start, limit)
            await other.wait()

    def _align(self, offset: int, end: int) -> tuple[int, int]:
        """Return the blocks around a range."""
        return offset // self.read_alignment * self.read_alignment, round_up(
            end, self.read_alignment
        )


def _make_buffer(length: int) -> memoryview:
    """Return zeroed memory that begins on a page."""
    return memoryview(
        mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    )

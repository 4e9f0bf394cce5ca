"""What a file's storage driver does in the turn of the loop in which it is
asked: reads of what is in page cache, and small writes.
"""

import contextlib
import os
import resource
import time
from collections.abc import Sequence
from typing import Final

from nbdqcow.block.storage import StorageDriver
from nbdqcow.storage.linux import OVERLAYFS_MAGIC, TMPFS_MAGIC, filesystem_type
from nbdqcow.storage.mapped import MappedFile
from nbdqcow.storage.opening import CacheMode
from nbdqcow.storage.overwrite import Overwriter
from nbdqcow.storage.overwrite import pays as overwrite_pays
from nbdqcow.types import Buffer, Buffers
from nbdqcow.units import KiB

MAX_INLINE_READ: Final = 128 * KiB
MAX_INLINE_WRITE: Final = 256 * KiB
_WORD: Final = 8

# An inline write that took this long (seconds) has waited for the device, or,
# far more often on a busy machine, somebody else had the processor. So the next
# ones are watched: one that is slow again and gave the processor up by itself
# did wait. Then writes go to threads for a while, twice as long each time that
# the first ones afterwards are no better.
SLOW_WRITE: Final = 0.002
NB_WATCHED: Final = 32
MIN_PAUSE: Final = 0.05
MAX_PAUSE: Final = 1.0


class InlineFile(StorageDriver):
    """The part of `nbdqcow.storage.file.FileStorage` that never waits."""

    _cache: CacheMode
    _fd: int
    _is_device: bool
    _write_sequence: int

    def _set_up_inline(self, status: os.stat_result) -> None:
        """Find out what can be done inline with the open file of ``status``."""
        self._read_flags = 0
        self._max_inline_read = 0
        self._asks_residency = False
        if not self._cache.direct:
            self._probe_inline_reads()
        self._scratch_memory = memoryview(bytearray())
        self._scratch = (self._scratch_memory,)
        self._scratch_length = -1

        self._mapped: MappedFile | None = None
        if not (self._cache.direct or self._is_device) and _tells_residency(
            self._fd, status
        ):
            # Without /proc there are no views; copies do as well.
            with contextlib.suppress(OSError):
                self._mapped = MappedFile(self._fd)

        self._overwriter: Overwriter | None = None
        self._pause = MIN_PAUSE
        self._nb_watched = 0
        self._set_inline_writes()

    def _set_inline_writes(self) -> None:
        cache = self._cache
        inline = not (cache.direct or cache.write_through or self.read_only)
        if self._overwriter is not None:
            self._overwriter.close()
            self._overwriter = None
        if inline and self._mapped is not None and overwrite_pays(self._fd):
            with contextlib.suppress(OSError):
                self._overwriter = Overwriter(self._fd)
        self._max_inline_write = MAX_INLINE_WRITE if inline else -1
        self._inline_resume_at = 0.0 if inline else float("inf")

    def _probe_inline_reads(self) -> None:
        """Find out how to read without waiting, if at all.

        tmpfs refuses RWF_NOWAIT, but a plain read of it is a copy in memory.
        overlayfs, a container's root, refuses it too; there mincore(2) says
        whether a read would wait. Others (network file systems, say, which
        may ask their server even then) are read in threads only.
        """
        try:
            os.preadv(self._fd, (bytearray(1),), 0, os.RWF_NOWAIT)
        except BlockingIOError:
            pass
        except OSError:
            kind = filesystem_type(self._fd)
            self._asks_residency = kind == OVERLAYFS_MAGIC
            if kind == TMPFS_MAGIC:
                self._max_inline_read = MAX_INLINE_READ
            return
        self._read_flags = os.RWF_NOWAIT
        self._max_inline_read = MAX_INLINE_READ

    def try_pread(self, offset: int, length: int) -> bytes | None:
        """Return exactly ``length`` bytes if they are in page cache."""
        if length != self._scratch_length and not self._fit_scratch(length):
            return self._try_pread_resident(offset, length)
        try:
            nb_read = os.preadv(self._fd, self._scratch, offset, self._read_flags)
        except BlockingIOError:
            return None
        if nb_read == length:
            return self._scratch[0].tobytes()
        if offset + nb_read < self.length:
            # What follows is not in page cache.
            return None
        return self._scratch[0][:nb_read].tobytes().ljust(length, b"\0")

    def try_pread_into(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` if all that belongs there is in page cache."""
        if len(view) > self._max_inline_read:
            return False
        try:
            return os.preadv(self._fd, (view,), offset, self._read_flags) == len(view)
        except BlockingIOError:
            return False

    def _fit_scratch(self, length: int) -> bool:
        """Make the scratch buffer ``length`` bytes; whether that is allowed.

        preadv(2) needs memory to read into and the caller wants bytes. One
        buffer for all reads is touched already; and requests are mostly as
        long as the one before.
        """
        if length > self._max_inline_read:
            return False
        if len(self._scratch_memory) < length:
            self._scratch_memory = memoryview(bytearray(max(length, 64 * KiB)))
        self._scratch = (self._scratch_memory[:length],)
        self._scratch_length = length
        return True

    def _try_pread_resident(self, offset: int, length: int) -> bytes | None:
        """Read without RWF_NOWAIT, if mincore(2) says that it won't wait."""
        if (
            not self._asks_residency
            or self._mapped is None
            or not 0 < length <= MAX_INLINE_READ
            or offset + length > self.length
            or not self._mapped.is_resident(offset, length)
        ):
            return None
        data = os.pread(self._fd, length, offset)
        return data if len(data) == length else None

    def try_pick(self, offset: int, length: int, step: int) -> Sequence[int] | None:
        """Return a word of each ``step`` bytes of a range in page cache."""
        if not self._max_inline_read or offset + length > self.length:
            return None
        fd, flags, preadv = self._fd, self._read_flags, os.preadv
        words = memoryview(bytearray(-(-length // step) * _WORD))
        try:
            for index, start in enumerate(range(offset, offset + length, step)):
                word = words[index * _WORD : (index + 1) * _WORD]
                if not preadv(fd, (word,), start, flags):
                    return None
        except BlockingIOError:
            return None
        return words.cast("Q").tolist()

    def try_view(self, offset: int, length: int) -> memoryview | None:
        """Return page cache itself; see `nbdqcow.storage.mapped`."""
        if self._mapped is None:
            return None
        return self._mapped.try_view(offset, length, self.length)

    def is_resident(self, offset: int, length: int) -> bool:
        """Whether all of a range is in page cache."""
        return (
            self._mapped is not None
            and offset + length <= self.length
            and self._mapped.is_resident(offset, length)
        )

    def sendfile(self, socket_fd: int, offset: int, length: int) -> int:
        """Send resident bytes to a socket without copying them."""
        try:
            return os.sendfile(socket_fd, self._fd, offset, length)
        except BlockingIOError:
            return 0

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        """Write ``data`` to page cache, unless that has lately been slow."""
        length = len(data)
        if length > self._max_inline_write:
            return self._try_pwrite_watched(offset, data)
        started = time.perf_counter()
        overwriter = self._overwriter
        if (
            overwriter is not None
            and offset + length <= self.length
            and overwriter.try_write(offset, data, started)
        ):
            nb_written = length
        else:
            nb_written = os.pwrite(self._fd, data, offset)
        self._note_inline_write(started, offset + nb_written, nb_written)
        return nb_written == length

    def try_pwritev(self, offset: int, buffers: Buffers) -> bool:
        """Write ``buffers`` to page cache, unless that has lately been slow."""
        length = sum(map(len, buffers))
        if length > self._max_inline_write:
            return self._try_pwrite_watched(offset, b"".join(buffers))
        started = time.perf_counter()
        nb_written = os.pwritev(self._fd, buffers, offset)
        self._note_inline_write(started, offset + nb_written, nb_written)
        return nb_written == length

    def _note_inline_write(self, started: float, end: int, nb_written: int) -> None:
        if time.perf_counter() - started > SLOW_WRITE:
            self._nb_watched = NB_WATCHED
            self._max_inline_write = -1
        self._write_sequence += 1
        if end > self.length and nb_written:
            self.length = end

    def _try_pwrite_watched(self, offset: int, data: Buffer) -> bool:
        """Write inline, if at all, and see whether that waits for the device."""
        if len(data) > MAX_INLINE_WRITE or time.perf_counter() < self._inline_resume_at:
            return False
        nb_waits = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        self._max_inline_write = MAX_INLINE_WRITE
        done = self.try_pwrite(offset, data)
        if self._max_inline_write < 0:
            # Slow again.
            if resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw > nb_waits:
                self._pause_inline()
        elif self._nb_watched:
            self._nb_watched -= 1
            self._max_inline_write = -1
        return done

    def _pause_inline(self) -> None:
        now = time.perf_counter()
        relapsed = now - self._inline_resume_at < MAX_PAUSE
        self._pause = min(self._pause * 2, MAX_PAUSE) if relapsed else MIN_PAUSE
        self._inline_resume_at = now + self._pause


def _tells_residency(fd: int, status: os.stat_result) -> bool:
    """Whether mincore(2) tells us the truth about the file.

    Of a file that we neither own nor may write it says that all is resident.
    """
    return status.st_uid == os.geteuid() or os.access(f"/proc/self/fd/{fd}", os.W_OK)

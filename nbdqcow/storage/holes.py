"""Zeroes and holes: what a file system can do without writing zeroes out."""

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from typing import Final

from nbdqcow.errors import NotSupported
from nbdqcow.storage.linux import (
    BLKDISCARD,
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    fallocate,
)
from nbdqcow.types import Buffers
from nbdqcow.units import KiB, round_up

_PUNCH_HOLE: Final = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_DEVICE_ALIGNMENT: Final = 4 * KiB
_MAX_STRETCHES: Final = 1 << 14
"""Stretches looked for in one go: some 3 us each."""


class Holes:
    """The holes of one open file. Everything here runs in worker threads."""

    def __init__(
        self, fd: int, is_device: bool, write: Callable[[int, Buffers, bool], None]
    ) -> None:
        """``write(offset, buffers, durable)`` writes to the file."""
        self._fd = fd
        self._is_device = is_device
        self._write = write
        self._unsupported: set[int] = set()

    def zero_blocking(
        self, offset: int, length: int, unmap: bool, no_fallback: bool
    ) -> None:
        """Make a range read as zeroes, growing the file if need be.

        ``unmap``: free its space. Raises `NotSupported` if it must be written
        out; ``no_fallback``: also if the kernel would do that by itself.
        """
        if unmap and self._try_fallocate(_PUNCH_HOLE, offset, length):
            self.grow_blocking(offset + length)
        elif self._is_device and no_fallback:
            raise NotSupported("the device can't zero without writing")
        elif not self._try_fallocate(FALLOC_FL_ZERO_RANGE, offset, length) and not (
            # tmpfs has no ZERO_RANGE: free the pages, then reserve new ones.
            not self._is_device
            and self._try_fallocate(_PUNCH_HOLE, offset, length)
            and self._try_fallocate(0, offset, length)
        ):
            raise NotSupported("the file system can't zero without writing")

    def discard_blocking(self, offset: int, end: int) -> None:
        """Free the space of ``[offset, end)`` where that can be done."""
        if not self._is_device:
            self._try_fallocate(_PUNCH_HOLE, offset, end - offset)
            return
        start = round_up(offset, _DEVICE_ALIGNMENT)
        length = end // _DEVICE_ALIGNMENT * _DEVICE_ALIGNMENT - start
        if length <= 0:
            return
        try:
            fcntl.ioctl(self._fd, BLKDISCARD, struct.pack("QQ", start, length))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY):
                raise

    def reserve_blocking(self, offset: int, length: int) -> None:
        """Take space for a range that is written next, as it would be anyway.

        Where ext4 is told of a range as a whole it spares itself looking for each of
        its blocks. The file's length stays, and an error is the write's to find.
        """
        with contextlib.suppress(OSError):
            self._try_fallocate(FALLOC_FL_KEEP_SIZE, offset, length)

    def find_blocking(self, offset: int, length: int) -> tuple[bool, int]:
        """Return whether ``offset`` holds data, and for how many bytes of
        ``length`` that goes on."""
        try:
            data = os.lseek(self._fd, offset, os.SEEK_DATA)
            if data > offset:
                return False, min(data - offset, length)
            hole = os.lseek(self._fd, offset, os.SEEK_HOLE)
        except OSError as error:
            # ENXIO: nothing but a hole from here to the end of the file.
            if error.errno not in (errno.ENXIO, errno.EINVAL):
                raise
            return error.errno == errno.EINVAL, length
        return True, min(max(hole - offset, 1), length)

    def find_all_blocking(
        self, offset: int, length: int, limit: int
    ) -> list[tuple[bool, int]]:
        """Return `find_blocking` of consecutive stretches: at most ``limit``
        of them, and no more than take a moment."""
        found = []
        end = offset + length
        for _ in range(min(limit, _MAX_STRETCHES)):
            allocated, run = self.find_blocking(offset, end - offset)
            found.append((allocated, run))
            offset += run
            if offset == end:
                break
        return found

    def _try_fallocate(self, mode: int, offset: int, length: int) -> bool:
        """Whether the file system could do it; remembers what it can't."""
        if mode in self._unsupported:
            return False
        try:
            fallocate(self._fd, mode, offset, length)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
                self._unsupported.add(mode)
                return False
            if self._is_device and error.errno == errno.EINVAL:
                # Not a multiple of the device's blocks.
                return False
            raise
        return True

    def grow_blocking(self, end: int) -> None:
        """Make a regular file at least ``end`` long.

        Not by ftruncate(2), which would cut off what a write in another
        thread appends at the same time.
        """
        if (
            not self._is_device
            and os.lseek(self._fd, 0, os.SEEK_END) < end
            and not self._try_fallocate(0, end - 1, 1)
        ):
            self._write(end - 1, [b"\0"], False)

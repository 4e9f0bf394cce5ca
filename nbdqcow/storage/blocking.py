"""A local file for programs without an event loop."""

import os
import stat
from collections.abc import Callable
from typing import Final, Self

from nbdqcow.block.storage import FileRole, RoleOf
from nbdqcow.errors import ImageError
from nbdqcow.storage.locks import READ_WRITE, Permissions, choose, lock_blocking
from nbdqcow.storage.opening import find_role, open_blocking
from nbdqcow.types import Buffer

_ZEROES: Final = bytes(1 << 20)


class BlockingLocalFile:
    """A regular file or block device (`nbdqcow.block.steps.BlockingFile`)."""

    def __init__(self, fd: int, filename: str) -> None:
        self.filename = filename
        self._fd = fd
        # The only way that works for block devices as well.
        self.length = os.lseek(fd, 0, os.SEEK_END)

    @classmethod
    def open(
        cls,
        filename: str,
        *,
        read_only: bool = True,
        force_share: bool = False,
        role: FileRole | RoleOf = FileRole.IMAGE,
        reads_data: bool = True,
    ) -> Self:
        """Open a file with the image locks that QEMU takes for the same.

        ``role``: what the file is, or a function that tells it; ``reads_data``: not
        only what the metadata say is wanted.
        Raises `ImageError` (`ImageInUse` for a locked file) and `OSError`.
        """
        if force_share and not read_only:
            raise ImageError("force-share=on can only be used with read-only images")

        def permissions(fd: int) -> Permissions:
            return choose(
                find_role(fd, role),
                read_only=read_only,
                shared=force_share,
                reads_data=reads_data,
            )

        return cls._open(filename, os.O_RDONLY if read_only else os.O_RDWR, permissions)

    @classmethod
    def create(cls, filename: str) -> Self:
        """Open a file for a new image: as it is, or empty if there was none."""
        return cls._open(filename, os.O_RDWR | os.O_CREAT, lambda fd: READ_WRITE)

    @classmethod
    def _open(
        cls, filename: str, flags: int, permissions: Callable[[int], Permissions]
    ) -> Self:
        fd = open_blocking(filename, flags | os.O_CLOEXEC)
        try:
            lock_blocking(fd, filename, permissions(fd))
            return cls(fd, filename)
        except BaseException:
            os.close(fd)
            raise

    def pread(self, offset: int, length: int) -> Buffer:
        """Return exactly ``length`` bytes, zeroes past the end."""
        data = os.pread(self._fd, length, offset)
        if len(data) == length:
            return data
        whole = bytearray(length)
        done = 0
        while data:
            whole[done : done + len(data)] = data
            done += len(data)
            data = os.pread(self._fd, length - done, offset + done)
        return whole

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Write all of ``data``."""
        view = memoryview(data)
        while len(view):
            done = os.pwrite(self._fd, view, offset)
            offset += done
            view = view[done:]
        self.length = max(self.length, offset)

    def truncate(self, length: int) -> None:
        """Set the length; a block device keeps its own, which is to be enough.

        Raises `ImageError`.
        """
        if not self.is_device:
            os.ftruncate(self._fd, length)
            self.length = length
        elif length > self.length:
            raise ImageError("Cannot grow device files")

    def allocate(self, offset: int, length: int) -> None:
        """Take space for a range; what was there stays, the rest is zero."""
        if length and not self.is_device:
            os.posix_fallocate(self._fd, offset, length)
            self.length = max(self.length, offset + length)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Write zeroes out, byte for byte."""
        end = offset + length
        while offset < end:
            chunk = memoryview(_ZEROES)[: end - offset]
            self.pwrite(offset, chunk)
            offset += len(chunk)

    def flush(self) -> None:
        """Make all writes so far durable."""
        os.fdatasync(self._fd)

    def allocated_length(self) -> int:
        """Return the bytes that the file takes of its file system."""
        return os.fstat(self._fd).st_blocks * 512

    @property
    def is_device(self) -> bool:
        """Whether this is a device, whose length is fixed."""
        return not stat.S_ISREG(os.fstat(self._fd).st_mode)

    def close(self) -> None:
        """Release the file and its locks."""
        os.close(self._fd)

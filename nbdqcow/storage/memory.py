"""A file in memory, for tests and scratch disks."""

import errno
from typing import ClassVar, Final

from nbdqcow.block.storage import StorageDriver
from nbdqcow.errors import BlockError
from nbdqcow.types import Buffer, Buffers
from nbdqcow.units import GiB

MAX_LENGTH: Final = 4 * GiB


class MemoryStorage(StorageDriver):
    """A file whose bytes are a `bytearray`.

    Attributes:
        data: the bytes; ``len(data)`` is the file's length.
        max_length: where the memory "disk" is full (ENOSPC).
    """

    name: ClassVar[str] = "memory"

    def __init__(
        self,
        data: Buffer = b"",
        *,
        filename: str = "memory",
        read_only: bool = False,
        max_length: int = MAX_LENGTH,
    ) -> None:
        self.data = bytearray(data)
        self.filename = filename
        self.read_only = read_only
        self.length = len(self.data)
        self.zero_beyond_end = True
        self.max_length = max_length

    def try_pread(self, offset: int, length: int) -> bytes | None:
        """Return ``length`` bytes; never None."""
        with memoryview(self.data) as view:
            data = bytes(view[offset : offset + length])
        return data if len(data) == length else data.ljust(length, b"\0")

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        """Write ``data``; never False."""
        self._check_writable()
        end = offset + len(data)
        if end > self.length and data:
            self._resize(end)
        self.data[offset:end] = data
        return True

    async def pread(self, offset: int, length: int) -> Buffer:
        """Return ``length`` bytes."""
        data = self.try_pread(offset, length)
        assert data is not None
        return data

    async def pwritev(
        self, offset: int, buffers: Buffers, *, fua: bool = False
    ) -> None:
        """Write ``buffers`` from ``offset``."""
        for buffer in buffers:
            self.try_pwrite(offset, buffer)
            offset += len(buffer)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool = False
    ) -> None:
        """Write zeroes."""
        self.try_pwrite(offset, bytes(length))

    async def discard(self, offset: int, length: int) -> None:
        """Zero what is within the file."""
        self._check_writable()
        end = min(offset + length, self.length)
        if offset < end:
            self.data[offset:end] = bytes(end - offset)

    async def flush(self) -> None:
        """Do nothing: memory is as durable as it gets."""

    async def truncate(self, length: int) -> None:
        """Set the length."""
        self._check_writable()
        self._resize(length)

    async def reopen(self, *, read_only: bool) -> None:
        """Allow changes, or no longer."""
        self.read_only = read_only

    async def close(self) -> None:
        """Keep the data, for whoever still looks at it."""

    def _check_writable(self) -> None:
        if self.read_only:
            raise BlockError(errno.EBADF, f"'{self.filename}' is open read-only")

    def _resize(self, length: int) -> None:
        if length > self.max_length:
            raise BlockError(
                errno.ENOSPC,
                f"'{self.filename}' is limited to {self.max_length} bytes",
            )
        if length < self.length:
            del self.data[length:]
        else:
            self.data.extend(bytes(length - self.length))
        self.length = length

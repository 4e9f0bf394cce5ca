"""A file that reads as zeroes and swallows what is written."""

from typing import ClassVar, Final

from nbdqcow.block.storage import StorageDriver
from nbdqcow.types import Buffer, Buffers
from nbdqcow.units import MiB

_ZEROES: Final = memoryview(bytes(MiB))


class NullStorage(StorageDriver):
    """A file of zeroes, for measuring what is above the storage."""

    name: ClassVar[str] = "null"

    def __init__(
        self, length: int = 0, *, filename: str = "null", read_only: bool = False
    ) -> None:
        self.filename = filename
        self.read_only = read_only
        self.length = length
        self.zero_beyond_end = True

    def try_pread(self, offset: int, length: int) -> bytes | None:
        """Return zeroes."""
        return bytes(length)

    def try_view(self, offset: int, length: int) -> memoryview | None:
        """Return zeroes that are shared by all null files."""
        if length > len(_ZEROES) or offset + length > self.length:
            return None
        return _ZEROES[:length]

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        """Swallow ``data``."""
        self.length = max(self.length, offset + len(data))
        return True

    async def pread(self, offset: int, length: int) -> Buffer:
        """Return zeroes."""
        return bytes(length)

    async def pwritev(
        self, offset: int, buffers: Buffers, *, fua: bool = False
    ) -> None:
        """Swallow ``buffers``."""
        self.length = max(self.length, offset + sum(map(len, buffers)))

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool = False
    ) -> None:
        """Zero what is zero."""
        self.length = max(self.length, offset + length)

    async def discard(self, offset: int, length: int) -> None:
        """Do nothing."""

    async def flush(self) -> None:
        """Do nothing."""

    async def truncate(self, length: int) -> None:
        """Set the length."""
        self.length = length

    async def block_status(self, offset: int, length: int) -> tuple[bool, int]:
        """Say that all of it is a hole."""
        return False, length

    async def close(self) -> None:
        """Do nothing."""

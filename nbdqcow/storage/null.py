"""A file that reads as zeroes and swallows what is written."""

import asyncio
from typing import ClassVar, Final, Self
from urllib.parse import parse_qs

from nbdqcow.block.storage import StorageDriver
from nbdqcow.errors import ImageError
from nbdqcow.types import Buffer, Buffers
from nbdqcow.units import GiB, MiB, parse_size

_ZEROES: Final = memoryview(bytes(MiB))
_DEFAULT_LENGTH: Final = GiB


class NullStorage(StorageDriver):
    """A file of zeroes, for measuring what is above the storage.

    ``latency`` is how many seconds each read, write and flush takes.
    """

    name: ClassVar[str] = "null"
    resizable: ClassVar[bool] = False

    def __init__(
        self,
        length: int = 0,
        *,
        filename: str = "null",
        read_only: bool = False,
        latency: float = 0.0,
    ) -> None:
        self.filename = filename
        self.read_only = read_only
        self.length = length
        self.zero_beyond_end = True
        self._latency = latency

    @classmethod
    async def open(cls, filename: str, *, read_only: bool = False) -> Self:
        """Make the file that ``null-co://`` names. Behind it may stand
        ``?size=BYTES&latency-ns=NUMBER``.

        Raises `ImageError`.
        """
        place, _, query = filename.partition("?")
        driver = place.partition(":")[0]
        if place != f"{driver}://":
            raise ImageError(
                f"Could not open '{filename}': The only allowed filename for this "
                f"driver is '{driver}://'"
            )
        sizes = {"size": _DEFAULT_LENGTH, "latency-ns": 0}
        for key, (value, *_) in parse_qs(query, keep_blank_values=True).items():
            if key not in sizes:
                raise ImageError(f"Could not open '{filename}': no option '{key}'")
            try:
                sizes[key] = parse_size(value)
            except ValueError as exc:
                raise ImageError(f"Parameter '{key}': {exc}") from None
        return cls(
            sizes["size"],
            filename=filename,
            read_only=read_only,
            latency=sizes["latency-ns"] / 1e9,
        )

    def try_pread(self, offset: int, length: int) -> bytes | None:
        """Return zeroes."""
        return None if self._latency else bytes(length)

    def try_view(self, offset: int, length: int) -> memoryview | None:
        """Return zeroes that are shared by all null files."""
        if length > len(_ZEROES) or offset + length > self.length or self._latency:
            return None
        return _ZEROES[:length]

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        """Swallow ``data``."""
        if self._latency:
            return False
        self.length = max(self.length, offset + len(data))
        return True

    async def pread(self, offset: int, length: int) -> Buffer:
        """Return zeroes."""
        await self._wait()
        return bytes(length)

    async def pwritev(
        self, offset: int, buffers: Buffers, *, fua: bool = False
    ) -> None:
        """Swallow ``buffers``."""
        await self._wait()
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
        await self._wait()

    async def truncate(self, length: int) -> None:
        """Set the length."""
        self.length = length

    async def block_status(self, offset: int, length: int) -> tuple[bool, int]:
        """Say that all of it is a hole."""
        return False, length

    async def allocated_length(self) -> int:
        """Return that it takes no space."""
        return 0

    async def close(self) -> None:
        """Do nothing."""

    async def _wait(self) -> None:
        if self._latency:
            await asyncio.sleep(self._latency)

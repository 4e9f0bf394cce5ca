"""`blkverify`: a file that is compared with a raw one at every read."""

import errno
from collections.abc import Mapping
from typing import ClassVar

from nbdqcow.block.storage import StorageDriver
from nbdqcow.errors import ImageError
from nbdqcow.types import Buffer, Buffers


class BlkverifyStorage(StorageDriver):
    """Writes to two files, and reads that fail where the two differ."""

    name: ClassVar[str] = "blkverify"

    def __init__(
        self,
        test: StorageDriver,
        raw: StorageDriver,
        *,
        pairs: Mapping[str, str],
        filename: str,
        config: bytes = b"",
    ) -> None:
        """``test`` is what is tested, ``raw`` has what it should have. Raises
        `ImageError`."""
        for key in pairs:
            raise ImageError(
                f"Block protocol 'blkverify' doesn't support the option '{key}'"
            )
        self.inner: StorageDriver = test
        self._raw = raw
        self.filename = filename
        self.read_only = test.read_only
        self.zero_beyond_end = test.zero_beyond_end and raw.zero_beyond_end

    @property
    def length(self) -> int:  # type: ignore[override]
        """Bytes in the file that is tested."""
        return self.inner.length

    def announce(self, event: str) -> None:
        """Tell the file that is tested."""
        self.inner.announce(event)

    def try_pread(self, offset: int, length: int) -> Buffer | None:
        """Never: two reads that need no waiting are seldom at hand at once."""
        return None

    async def pread(self, offset: int, length: int) -> Buffer:
        """Read both files. Raises EIO where they differ."""
        data = bytes(await self.inner.pread(offset, length))
        expected = bytes(await self._raw.pread(offset, length))
        if data != expected:
            first = next(i for i in range(length) if data[i] != expected[i])
            raise OSError(errno.EIO, f"contents mismatch at offset {offset + first}")
        return data

    async def pwritev(
        self, offset: int, buffers: Buffers, *, fua: bool = False
    ) -> None:
        """Write to both files."""
        await self._raw.pwritev(offset, buffers, fua=fua)
        await self.inner.pwritev(offset, buffers, fua=fua)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool = False
    ) -> None:
        """Zero a range of both files."""
        for file in (self.inner, self._raw):
            await file.write_zeroes(
                offset, length, may_unmap=may_unmap, no_fallback=no_fallback
            )

    async def discard(self, offset: int, length: int) -> None:
        """Do nothing: what the two would read as then may differ."""

    async def flush(self) -> None:
        """Flush the file that is tested; the other one is thrown away."""
        await self.inner.flush()

    async def truncate(self, length: int) -> None:
        """Set the length of both files."""
        await self.inner.truncate(length)
        await self._raw.truncate(length)

    async def block_status(self, offset: int, length: int) -> tuple[bool, int]:
        """Say what the file that is tested has."""
        return await self.inner.block_status(offset, length)

    async def close(self) -> None:
        """Close both files."""
        try:
            await self.inner.close()
        finally:
            await self._raw.close()

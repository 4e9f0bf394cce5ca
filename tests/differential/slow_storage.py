"""A storage driver that takes its time, so that requests meet half-way."""

import asyncio
import random

from nbdqcow.block.storage import StorageDriver
from nbdqcow.types import Buffer, Buffers

SECTOR = 512


class SlowStorage(StorageDriver):
    """Delays every call by a random number of the loop's turns.

    Writes land in pieces and in any order, as they may on a disk; inline calls
    are now and then declined.
    """

    def __init__(self, inner: StorageDriver, source: random.Random) -> None:
        self._inner = inner
        self._source = source
        self.filename = inner.filename
        self.read_only = inner.read_only
        self.zero_beyond_end = inner.zero_beyond_end

    @property
    def length(self) -> int:  # type: ignore[override]
        return self._inner.length

    async def _wait(self) -> None:
        for _ in range(self._source.choice((0, 0, 1, 3, 10, 30))):
            await asyncio.sleep(0)

    def try_pread(self, offset: int, length: int) -> bytes | None:
        if self._source.random() < 0.3:
            return None
        return self._inner.try_pread(offset, length)

    def try_view(self, offset: int, length: int) -> memoryview | None:
        return self._inner.try_view(offset, length)

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        return self._source.random() < 0.5 and self._inner.try_pwrite(offset, data)

    async def pread(self, offset: int, length: int) -> Buffer:
        await self._wait()
        data = await self._inner.pread(offset, length)
        await self._wait()
        return data

    async def pwritev(
        self, offset: int, buffers: Buffers, *, fua: bool = False
    ) -> None:
        nb_bytes = sum(map(len, buffers))
        pieces: list[tuple[int, memoryview]] = []
        for buffer in buffers:
            view = memoryview(buffer)
            while view:
                length = SECTOR * self._source.choice((1, 8, 64, 512))
                length -= offset % SECTOR
                pieces.append((offset, view[:length]))
                offset += len(view[:length])
                view = view[length:]
        if nb_bytes < 64 * SECTOR:
            self._source.shuffle(pieces)
        for place, piece in pieces:
            if self._source.random() < 0.3:
                await self._wait()
            await self._inner.pwritev(place, [piece])
        if fua:
            await self._inner.flush()
        await self._wait()

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool = False
    ) -> None:
        await self._wait()
        await self._inner.write_zeroes(
            offset, length, may_unmap=may_unmap, no_fallback=no_fallback
        )
        await self._wait()

    async def discard(self, offset: int, length: int) -> None:
        await self._wait()
        await self._inner.discard(offset, length)
        await self._wait()

    async def flush(self) -> None:
        await self._wait()
        await self._inner.flush()
        await self._wait()

    async def truncate(self, length: int) -> None:
        await self._wait()
        await self._inner.truncate(length)

    async def block_status(self, offset: int, length: int) -> tuple[bool, int]:
        await self._wait()
        return await self._inner.block_status(offset, length)

    async def prefetch(self, offset: int, length: int) -> None:
        await self._wait()
        await self._inner.prefetch(offset, length)

    async def close(self) -> None:
        await self._inner.close()

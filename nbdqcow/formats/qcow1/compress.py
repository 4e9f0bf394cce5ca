"""Compressed clusters: raw deflate streams with a window of 4 KiB.

They are not encrypted, also in an encrypted image.
"""

import asyncio
from typing import TYPE_CHECKING, Final

from nbdqcow.errors import BlockError
from nbdqcow.formats.memory_share import MemoryShare
from nbdqcow.formats.qcow1.header import compressed_range
from nbdqcow.formats.qcow2.codec import deflate_blocking, inflate_blocking
from nbdqcow.pool import Pool
from nbdqcow.types import Buffer
from nbdqcow.units import KiB

if TYPE_CHECKING:
    from nbdqcow.formats.qcow1.driver import Qcow1Driver

_MAX_INLINE_CLUSTER: Final = 4 * KiB
"""A cluster of which decompressing costs less than a hop to a thread."""
_INLINE_BYTES: Final = 64 * KiB
"""Bytes that the loop decompresses by itself before others get a turn."""


class CompressedClusters:
    """Reads compressed clusters of one image, with a cache.

    The key is the descriptor, which names the same bytes until the image is
    emptied: the place of a compressed cluster is never used again.
    """

    def __init__(self, image: "Qcow1Driver", cache_bytes: int | None) -> None:
        self._image = image
        self._cache: dict[int, Buffer] = {}
        self._share = MemoryShare(cache_bytes)
        self._generation = 0
        self._loop = asyncio.get_running_loop()
        self._inline_left = _INLINE_BYTES
        self._pool: Pool | None = None

    def try_read(self, descriptor: int, start: int, length: int) -> Buffer | None:
        """See `FormatDriver.try_read_compressed`."""
        plain = self._cache.get(descriptor)
        if plain is None:
            plain = self._try_decompress(descriptor)
            if plain is None:
                return None
            self._keep(descriptor, plain)
        return memoryview(plain)[start : start + length]

    def _try_decompress(self, descriptor: int) -> Buffer | None:
        image = self._image
        if image.cluster_size > _MAX_INLINE_CLUSTER or self._inline_left <= 0:
            return None
        offset, length = compressed_range(descriptor, image.cluster_bits)
        data = image.storage.try_pread(offset, length)
        if data is None:
            return None
        if self._inline_left == _INLINE_BYTES:
            self._loop.call_soon(self._next_turn)
        self._inline_left -= image.cluster_size
        try:
            return inflate_blocking(data, image.cluster_size)
        except BlockError:
            # The coroutine finds the same, and can say so.
            return None

    def _next_turn(self) -> None:
        self._inline_left = _INLINE_BYTES

    async def read(self, descriptor: int) -> Buffer:
        """Return the bytes of the whole cluster of a descriptor."""
        image, generation = self._image, self._generation
        found = self.try_read(descriptor, 0, image.cluster_size)
        if found is not None:
            return found
        offset, length = compressed_range(descriptor, image.cluster_bits)
        data: Buffer | None = image.storage.try_pread(offset, length)
        if data is None:
            image.storage.announce("read_compressed")
            data = await image.storage.pread(offset, length)
        plain = await self._threads().run(inflate_blocking, data, image.cluster_size)
        if generation == self._generation:
            self._keep(descriptor, plain)
        return plain

    def _keep(self, descriptor: int, plain: Buffer) -> None:
        self._share.join()
        capacity = max(1, self._share.nb_bytes // self._image.cluster_size)
        while len(self._cache) >= capacity:
            del self._cache[next(iter(self._cache))]
        self._cache[descriptor] = plain

    async def pack(self, cluster: Buffer) -> bytes | None:
        """Return a cluster compressed, None if that does not make it shorter."""
        packed = await self._threads().run(deflate_blocking, cluster)
        return packed if len(packed) < len(cluster) else None

    def clear(self) -> None:
        """The places of all clusters may be used for something else now."""
        self._generation += 1
        self._cache.clear()

    def _threads(self) -> Pool:
        if self._pool is None:
            self._pool = Pool()
        return self._pool

    async def close(self) -> None:
        """Let go of the worker threads, and of the memory."""
        self._share.leave()
        self.clear()
        if self._pool is not None:
            await self._pool.close()
            self._pool = None

"""Compressed clusters: reading them, and keeping what was decompressed lately.

Source: qcow2.txt, "Compressed Clusters Descriptor".
"""

import asyncio
from typing import TYPE_CHECKING, Final

from nbdqcow.formats.qcow2.codec import codec
from nbdqcow.formats.qcow2.entries import compressed_range
from nbdqcow.pool import Pool
from nbdqcow.types import Buffer
from nbdqcow.units import KiB, MiB

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.driver import Qcow2Driver

CACHE_BYTES: Final = 32 * MiB
_INLINE_BYTES: Final = 512 * KiB
"""What is decompressed in one turn of the event loop: about a millisecond."""


class CompressedClusters:
    """Reads compressed clusters of one image, with a cache of plain bytes.

    The key is the descriptor.

    `forget` must be called when the space under a descriptor is freed, `drop`
    when it is used for a new cluster, or old bytes would be served for it.

    Attributes:
        placing: held by the one who finds a place for a compressed cluster
            and writes it there.
    """

    def __init__(self, image: "Qcow2Driver", cache_bytes: int = CACHE_BYTES) -> None:
        self._image = image
        self._cache_bytes = cache_bytes
        # From the one that was used the longest time ago to the last one.
        self._cache: dict[int, Buffer] = {}
        self._nb_bytes = 0
        self._loading: dict[int, asyncio.Future[None]] = {}
        self._pool: Pool | None = None
        self._inline_left = _INLINE_BYTES
        self.compress, self._decompress = codec(image.header.compression_type)
        self.placing = asyncio.Lock()

    @property
    def threads(self) -> Pool:
        """The worker threads; images without compressed clusters take none."""
        if self._pool is None:
            self._pool = Pool()
        return self._pool

    # -- reading -----------------------------------------------------------

    def try_read(self, descriptor: int, start: int, length: int) -> Buffer | None:
        """Return ``length`` bytes from ``start`` on of a descriptor's cluster,
        if they were decompressed lately."""
        plain = self._cache.get(descriptor)
        if plain is None or len(plain) < start + length:
            return None
        del self._cache[descriptor]
        self._cache[descriptor] = plain
        return memoryview(plain)[start : start + length]

    async def read(self, descriptor: int, start: int, length: int) -> Buffer:
        """Return ``length`` bytes from ``start`` on of a descriptor's cluster.

        Raises `BlockError` (EIO) if it can't be decompressed.
        """
        while (found := self.try_read(descriptor, start, length)) is None:
            running = self._loading.get(descriptor)
            if running is None:
                plain = await self._load(descriptor)
                return memoryview(plain)[start : start + length]
            # Others wait for it, too: it must outlive this task.
            await asyncio.shield(running)
        return found

    async def _load(self, descriptor: int) -> Buffer:
        """Return a cluster, and keep it."""
        image = self._image
        loop = asyncio.get_running_loop()
        ticket = loop.create_future()
        self._loading[descriptor] = ticket
        try:
            offset, length = compressed_range(descriptor, image.cluster_bits)
            data: Buffer | None = image.storage.try_pread(offset, length)
            if data is None:
                data = await image.storage.pread(offset, length)
            if self._take_inline(loop):
                plain = self._decompress(data, image.cluster_size)
            else:
                plain = await self.threads.run(
                    self._decompress, data, image.cluster_size
                )
            # Otherwise the space has changed hands meanwhile.
            if self._loading.get(descriptor) is ticket:
                self._keep(descriptor, plain)
        finally:
            if self._loading.get(descriptor) is ticket:
                del self._loading[descriptor]
            ticket.set_result(None)
        return plain

    def _take_inline(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether the loop should decompress a cluster by itself.

        It does while the threads have enough to do: a hop to a thread costs
        half as much as a cluster. But others want a turn, too.
        """
        if not self.threads.saturated or self._inline_left <= 0:
            return False
        if self._inline_left == _INLINE_BYTES:
            loop.call_soon(self._next_turn)
        self._inline_left -= self._image.cluster_size
        return True

    def _next_turn(self) -> None:
        self._inline_left = _INLINE_BYTES

    def _keep(self, descriptor: int, plain: Buffer) -> None:
        cache = self._cache
        self._nb_bytes += len(plain) - len(cache.pop(descriptor, b""))
        cache[descriptor] = plain
        while self._nb_bytes > self._cache_bytes and len(cache) > 1:
            self._nb_bytes -= len(cache.pop(next(iter(cache))))

    def drop(self, descriptor: int) -> None:
        """What was read from a descriptor's space is no longer there."""
        self._loading.pop(descriptor, None)
        self._nb_bytes -= len(self._cache.pop(descriptor, b""))

    def forget(self, descriptor: int) -> None:
        """A descriptor has lost a user: its space may go to others now."""
        self.drop(descriptor)
        offset, length = compressed_range(descriptor, self._image.cluster_bits)
        self._image.refcounts.stop_packing(offset, length)

    async def close(self) -> None:
        """Let go of the worker threads."""
        if self._pool is not None:
            await self._pool.close()
            self._pool = None

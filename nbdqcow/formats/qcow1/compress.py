"""Compressed clusters: raw deflate streams with a window of 4 KiB.

They are not encrypted, also in an encrypted image.
"""

import errno
import zlib
from typing import TYPE_CHECKING, Final

from nbdqcow.errors import BlockError
from nbdqcow.formats.qcow1.header import compressed_range
from nbdqcow.pool import Pool
from nbdqcow.types import Buffer
from nbdqcow.units import MiB

if TYPE_CHECKING:
    from nbdqcow.formats.qcow1.driver import Qcow1Driver

_CACHE_BYTES: Final = 4 * MiB
_WINDOW_BITS: Final = 12
"""A reader such as QEMU keeps no more than 4 KiB of what it has decoded."""

_MEMORY_LEVEL: Final = 9


def deflate_blocking(cluster: Buffer) -> bytes | None:
    """Return a cluster compressed, None if that does not make it shorter."""
    packer = zlib.compressobj(
        zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, -_WINDOW_BITS, _MEMORY_LEVEL
    )
    packed = packer.compress(cluster) + packer.flush()
    return packed if len(packed) < len(cluster) else None


def inflate_blocking(data: Buffer, length: int) -> bytes:
    """Return the ``length`` bytes that a stream decodes to.

    It may have a larger window than ours, and need not end there. Never takes
    more than ``length`` bytes. Raises `BlockError` (EIO) for a damaged or a
    short stream.
    """
    try:
        plain = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, length)
    except zlib.error as error:
        raise BlockError(errno.EIO, f"damaged compressed cluster: {error}") from None
    if len(plain) != length:
        raise BlockError(errno.EIO, "damaged compressed cluster: it is too short")
    return plain


class CompressedClusters:
    """Reads compressed clusters of one image, with a small cache.

    The key is the descriptor, which names the same bytes until the image is
    emptied: the place of a compressed cluster is never used again.
    """

    def __init__(self, image: "Qcow1Driver") -> None:
        self._image = image
        self._cache: dict[int, bytes] = {}
        self._capacity = max(1, _CACHE_BYTES // image.cluster_size)
        self._generation = 0
        self._pool: Pool | None = None

    async def read(self, descriptor: int) -> bytes:
        """Return the bytes of the whole cluster of a descriptor."""
        found = self._cache.get(descriptor)
        if found is not None:
            return found
        image, generation = self._image, self._generation
        offset, length = compressed_range(descriptor, image.cluster_bits)
        data: Buffer | None = image.storage.try_pread(offset, length)
        if data is None:
            data = await image.storage.pread(offset, length)
        plain = await self._threads().run(inflate_blocking, data, image.cluster_size)
        if generation == self._generation:
            while len(self._cache) >= self._capacity:
                del self._cache[next(iter(self._cache))]
            self._cache[descriptor] = plain
        return plain

    async def pack(self, cluster: Buffer) -> bytes | None:
        """Do as `deflate_blocking` does, in a worker thread."""
        return await self._threads().run(deflate_blocking, cluster)

    def clear(self) -> None:
        """The places of all clusters may be used for something else now."""
        self._generation += 1
        self._cache.clear()

    def _threads(self) -> Pool:
        if self._pool is None:
            self._pool = Pool()
        return self._pool

    async def close(self) -> None:
        """Let go of the worker threads."""
        if self._pool is not None:
            await self._pool.close()
            self._pool = None

"""Compressed clusters: reading them, and keeping the last ones decompressed.

Source: qcow2.txt, "Compressed Clusters Descriptor". The stream is raw deflate
with a window of 4 KiB when QEMU wrote it; a reader must not rely on that.
"""

import errno
import zlib
from typing import TYPE_CHECKING, Any, Final

from nbdqcow.errors import BlockError
from nbdqcow.formats.qcow2.entries import compressed_range
from nbdqcow.pool import Pool
from nbdqcow.types import Buffer
from nbdqcow.units import MiB

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.driver import Qcow2Driver

_CACHE_BYTES: Final = 4 * MiB

try:
    from isal import igzip_lib
except ImportError:  # a platform without wheels: zlib is half as fast
    igzip_lib: Any = None  # type: ignore[no-redef]


def inflate_blocking(data: Buffer, length: int) -> bytes:
    """Return the ``length`` bytes that a raw deflate stream decodes to.

    What follows the stream is ignored: a descriptor counts whole sectors.
    Never takes more than ``length`` bytes, whatever the stream holds. Raises
    `BlockError` (EIO) for a damaged or a short stream.
    """
    try:
        if igzip_lib is not None:
            decoder = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_DEFLATE, 15)
            plain = decoder.decompress(data, length)
        else:
            plain = zlib.decompressobj(-15).decompress(data, length)
    except (zlib.error, ValueError, OSError) as error:
        raise BlockError(errno.EIO, f"damaged compressed cluster: {error}") from None
    except Exception as error:
        # isal has an exception type of its own, which is not exported.
        if type(error).__module__.partition(".")[0] != "isal":
            raise
        raise BlockError(errno.EIO, f"damaged compressed cluster: {error}") from None
    if len(plain) != length:
        raise BlockError(errno.EIO, "damaged compressed cluster: it is too short")
    return plain


class CompressedClusters:
    """Reads compressed clusters of one image, with a small cache.

    The key is the descriptor; `forget` must be called when the clusters
    under one are freed, or the next user of the space would be served old
    bytes.
    """

    def __init__(self, image: "Qcow2Driver") -> None:
        self._image = image
        self._cache: dict[int, bytes] = {}
        self._forgotten = 0
        self._pool: Pool | None = None
        self._capacity = max(1, _CACHE_BYTES // image.cluster_size)

    def cached(self, descriptor: int) -> bytes | None:
        """Return a cluster that was read lately."""
        return self._cache.get(descriptor)

    async def read(self, descriptor: int) -> bytes:
        """Return the bytes of the whole cluster of a descriptor."""
        found = self._cache.get(descriptor)
        if found is not None:
            return found
        image = self._image
        forgotten = self._forgotten
        offset, length = compressed_range(descriptor, image.cluster_bits)
        storage = image.storage
        data: Buffer | None = storage.try_pread(offset, length)
        if data is None:
            data = await storage.pread(offset, length)
        if self._pool is None:
            self._pool = Pool()
        plain = await self._pool.run(inflate_blocking, data, image.cluster_size)
        if forgotten != self._forgotten:
            return plain  # the clusters may have changed hands meanwhile
        while len(self._cache) >= self._capacity:
            del self._cache[next(iter(self._cache))]
        self._cache[descriptor] = plain
        return plain

    def forget(self, descriptor: int) -> None:
        """The descriptor's clusters may be used for something else now."""
        self._forgotten += 1
        self._cache.pop(descriptor, None)

    async def close(self) -> None:
        """Let go of the worker threads."""
        if self._pool is not None:
            await self._pool.close()
            self._pool = None

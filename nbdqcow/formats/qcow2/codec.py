"""The streams of compressed clusters: raw deflate and zstd. All functions block.

Source: qcow2.txt, "Additional fields" (compression_type), "Compressed Clusters
Descriptor".
"""

import contextlib
import errno
import functools
import sys
import zlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final, TypeAlias

from nbdqcow.errors import BlockError
from nbdqcow.formats.qcow2.entries import DEFLATE_WINDOW_BITS
from nbdqcow.formats.qcow2.header import COMPRESSION_ZSTD
from nbdqcow.types import Buffer

# On a platform without wheels zlib does it, which is slower.
try:
    import deflate
except ImportError:
    deflate: Any = None  # type: ignore[no-redef]
try:
    from nbdqcow.formats.qcow2 import deflater
except ImportError:
    deflater: Any = None  # type: ignore[no-redef]

Decompress: TypeAlias = Callable[[Buffer, int], Buffer]
Compress: TypeAlias = Callable[[Buffer], bytes]

_ZLIB_LEVEL: Final = 6
_ZSTD_LEVEL: Final = 3
_ZSTD_MAX_WINDOW_LOG: Final = 23
"""A frame that wants a larger window, which is memory, is refused; that of a
compressed cluster is never above the 2 MiB of the largest cluster."""
_ZSTD_MAX_FRAMES: Final = 64


def codec(compression_type: int) -> tuple[Compress, Decompress]:
    """Return what compresses and what decompresses, for a header's
    compression type."""
    if compression_type == COMPRESSION_ZSTD:
        return zstd_blocking, unzstd_blocking
    return deflate_blocking, inflate_blocking


def inflate_blocking(data: Buffer, length: int) -> Buffer:
    """Return the ``length`` bytes that a raw deflate stream decodes to.

    What follows the stream is ignored: a descriptor counts whole sectors.
    Never takes more than ``length`` bytes, whatever the stream holds. Raises
    `BlockError` (EIO) for a damaged or a short stream.
    """
    plain: Buffer
    if deflate is not None:
        with contextlib.suppress(deflate.DeflateError):
            plain = deflate.deflate_decompress(data, length)
            if len(plain) == length:
                return plain
    # libdeflate wants the whole stream. Where a cluster is complete before
    # its end, QEMU is content.
    try:
        plain = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, length)
    except zlib.error as error:
        raise _damaged(str(error)) from None
    if len(plain) != length:
        raise _damaged("it is too short")
    return plain


def deflate_blocking(data: Buffer) -> bytes:
    """Return ``data`` as a raw deflate stream that QEMU can read."""
    if deflater is not None:
        return deflater.deflate_blocking(data)
    packer = zlib.compressobj(_ZLIB_LEVEL, zlib.DEFLATED, -DEFLATE_WINDOW_BITS)
    return packer.compress(data) + packer.flush()


def unzstd_blocking(data: Buffer, length: int) -> Buffer:
    """Do as `inflate_blocking` does with zstd frames, of which there is mostly
    one."""
    zstd = _zstd()
    options = {zstd.DecompressionParameter.window_log_max: _ZSTD_MAX_WINDOW_LOG}
    pieces: list[bytes] = []
    missing = length
    try:
        for _ in range(_ZSTD_MAX_FRAMES):
            decoder = zstd.ZstdDecompressor(options=options)
            pieces.append(decoder.decompress(data, missing))
            missing -= len(pieces[-1])
            if not missing:
                return pieces[0] if len(pieces) == 1 else b"".join(pieces)
            if not decoder.eof:
                break
            data = decoder.unused_data
    except (zstd.ZstdError, EOFError) as error:
        raise _damaged(str(error)) from None
    raise _damaged("it is too short")


def zstd_blocking(data: Buffer) -> bytes:
    """Return ``data`` as one zstd frame."""
    packed: bytes = _zstd().compress(data, _ZSTD_LEVEL)
    return packed


@functools.cache
def _zstd() -> ModuleType:
    """Return the zstd module, which only images that use it need."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def _damaged(text: str) -> BlockError:
    return BlockError(errno.EIO, f"damaged compressed cluster: {text}")

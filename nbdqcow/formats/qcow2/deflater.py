"""Raw deflate by zlib-ng, with settings that none of its levels has.

zlib's level 6, which is QEMU's, is slow, and what is fast with the window of 4 KiB
makes images some per cent larger. zlib-ng comes to the same size in half the time if
it looks for matches as its level 6 does, and in machine code as its level 9, with
another patience. Python's module has no name for that, but the C functions of zlib-ng
are in it: they are those of zlib (``deflateTune``) with other names.

Source: zlib.h of zlib 1.2.13, "Advanced functions"; zlib-ng.h of zlib-ng 2.3.
"""

import ctypes
import threading
from typing import Final, NamedTuple

from zlib_ng import zlib_ng

from nbdqcow.formats.qcow2.entries import DEFLATE_WINDOW_BITS
from nbdqcow.types import Buffer

_DEFLATED: Final = 8
_DEFAULT_STRATEGY: Final = 0
_FINISH: Final = 4
_OK: Final = 0
_STREAM_END: Final = 1
_MEM_ERROR: Final = -4

_SAMPLE_BITS: Final = 10
_NOISE_VALUES: Final = 235
"""So many values have 1024 bytes of noise, and more: 251, give or take 2."""
_NO_GAIN: Final = 0.995
"""What shrinks by less than this is as good as noise."""


class _Tuning(NamedTuple):
    """A level, which says how matches are found, and how long for.

    Attributes:
        memory_level: 2 to the power of 7 more bytes and matches are in a block.
        good_length: a match of so many bytes is enough to look less for a longer.
        max_lazy: after one of so many no better one is looked for a byte later.
        nice_length: one of so many is taken at once.
        max_chain: so many candidates are looked at.
    """

    level: int
    memory_level: int
    good_length: int
    max_lazy: int
    nice_length: int
    max_chain: int


_TEXT: Final = _Tuning(6, 7, 8, 16, 128, 32)
_CODE: Final = _Tuning(9, 8, 4, 16, 64, 16)
"""Level 9 is the only one that sees matches of three bytes, which machine code has."""
_CODE_ZEROES: Final = (0.03, 0.3)
"""What part of its bytes is zeroes, at least and at most, where `_CODE` makes a cluster
some per cent shorter; elsewhere `_TEXT` does as well."""
_SKETCH: Final = _Tuning(2, 8, 4, 4, 8, 4)


class _Stream(ctypes.Structure):
    """``zng_stream``."""

    _fields_ = (
        ("next_in", ctypes.c_char_p),
        ("avail_in", ctypes.c_uint32),
        ("total_in", ctypes.c_size_t),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint32),
        ("total_out", ctypes.c_size_t),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_uint32),
        ("reserved", ctypes.c_ulong),
    )


class _Functions:
    """The C functions of zlib-ng.

    Raises `AttributeError` where the module hides them.
    """

    def __init__(self) -> None:
        # What takes long leaves the interpreter to other threads, the rest does not.
        library = ctypes.PyDLL(zlib_ng.__file__)
        stream, number = ctypes.POINTER(_Stream), ctypes.c_int32
        version = library.zlibng_version
        version.restype = ctypes.c_char_p
        self.version: bytes = version()
        self.initialize = library.zng_deflateInit2_
        self.initialize.argtypes = (
            *(stream, number, number, number, number, number),
            *(ctypes.c_char_p, number),
        )
        self.reset = library.zng_deflateReset
        self.reset.argtypes = (stream,)
        self.tune = library.zng_deflateTune
        self.tune.argtypes = (stream, number, number, number, number)
        self.end = library.zng_deflateEnd
        self.end.argtypes = (stream,)
        self.deflate = ctypes.CDLL(zlib_ng.__file__).zng_deflate
        self.deflate.argtypes = (stream, number)


class _Deflater:
    """A stream of zlib-ng for one thread, which takes one piece of data after another.

    Raises `ImportError` if the library's streams are not as ours are.
    """

    def __init__(self, functions: _Functions, tuning: _Tuning) -> None:
        self._functions = functions
        self._tuning = tuning
        self._stream = _Stream()
        self._is_open = False
        self._reserve(1 << 16)
        # It compares the version and the structure's size with its own.
        status = functions.initialize(
            self._stream,
            tuning.level,
            _DEFLATED,
            -DEFLATE_WINDOW_BITS,
            tuning.memory_level,
            _DEFAULT_STRATEGY,
            functions.version,
            ctypes.sizeof(_Stream),
        )
        if status == _MEM_ERROR:
            raise MemoryError
        if status != _OK:
            raise ImportError(f"zlib-ng's deflateInit2 returned {status}")
        self._is_open = True

    def _reserve(self, length: int) -> None:
        """Have room for what ``length`` bytes may come to."""
        self._longest = length
        self._capacity = length + (length >> 2) + 64
        self._packed = ctypes.create_string_buffer(self._capacity)
        self._place = ctypes.addressof(self._packed)

    def compress(self, data: bytes) -> bytes:
        """Return ``data`` as one stream; it blocks."""
        length = len(data)
        if length > self._longest:
            self._reserve(length)
        functions, stream, tuning = self._functions, self._stream, self._tuning
        functions.reset(stream)
        functions.tune(stream, *tuning[2:])
        stream.next_in = data
        stream.avail_in = length
        stream.next_out = self._place
        stream.avail_out = self._capacity
        status = functions.deflate(stream, _FINISH)
        if status != _STREAM_END:
            raise RuntimeError(f"zlib-ng's deflate returned {status}")
        return ctypes.string_at(self._place, self._capacity - stream.avail_out)

    def __del__(self) -> None:
        if self._is_open:
            self._functions.end(self._stream)


class _Deflaters(threading.local):
    """Those of one thread."""

    def __init__(self) -> None:
        self._text = _Deflater(_FUNCTIONS, _TEXT)
        self._code = _Deflater(_FUNCTIONS, _CODE)
        self._sketch = _Deflater(_FUNCTIONS, _SKETCH)

    def compress(self, data: bytes) -> bytes:
        """Return ``data`` as one stream."""
        sample = data[:: len(data) >> _SAMPLE_BITS | 1]
        if len(set(sample)) > _NOISE_VALUES:
            packed = self._sketch.compress(data)
            if len(packed) > len(data) * _NO_GAIN:
                return packed
        fewest, most = _CODE_ZEROES
        if fewest * len(sample) <= sample.count(0) <= most * len(sample):
            return self._code.compress(data)
        return self._text.compress(data)


def deflate_blocking(data: Buffer) -> bytes:
    """Return ``data`` as a raw deflate stream that QEMU can read."""
    return _deflaters.compress(bytes(data))


try:
    _FUNCTIONS: Final = _Functions()
except AttributeError as error:
    raise ImportError(f"zlib-ng does not show its C functions: {error}") from None
_deflaters: Final = _Deflaters()

"""Recycled memory: touching fresh memory costs more than filling it."""

import mmap
from contextlib import suppress
from typing import Final, cast

from nbdqcow.types import Buffer
from nbdqcow.units import KiB, MiB

ZEROES: Final = bytes(MiB)
ZERO_VIEW: Final = memoryview(ZEROES)
"""What reads as zeroes by its map is handed on as slices of this: nothing is
filled, and who sends it can tell it from data (`is_zeroes`)."""


def is_zeroes(buffer: Buffer) -> bool:
    """Tell whether ``buffer`` is a slice of `ZERO_VIEW`; its bytes do not count."""
    return type(buffer) is memoryview and buffer.obj is ZEROES


def zero_bytes(length: int) -> bytes:
    """Return ``length`` zeroes, to compare with: up to 1 MiB nothing is filled."""
    return ZEROES[:length] if length <= MiB else bytes(length)


def zero_views(length: int) -> list[Buffer]:
    """Return ``length`` zeroes that `is_zeroes` knows."""
    return [ZERO_VIEW[: min(MiB, length - start)] for start in range(0, length, MiB)]


_SMALLEST: Final = 16 * KiB
_LARGEST_KEPT: Final = 4 * MiB
"""A larger buffer is given back to the system: it would hold its memory for
one rare request."""
_FROM_SYSTEM: Final = 2 * MiB
"""A buffer from here on is pages of its own, which take memory as they are filled.
A `bytearray` is filled with zeroes first: 32 MiB of them keep the event loop busy for
tens of milliseconds, and a client need not send more than a header to have that."""

_Memory = bytearray | mmap.mmap


class BufferPool:
    """Recycles buffers. For one thread.

    Buffers come in powers of two, so that one of each few requests' sizes is
    idle. At most ``max_idle`` bytes are kept.
    """

    __slots__ = ("_idle", "_max_idle", "_nb_idle_bytes")

    def __init__(self, max_idle: int = 32 * MiB) -> None:
        self._max_idle = max_idle
        self._nb_idle_bytes = 0
        self._idle: dict[int, list[_Memory]] = {}

    def acquire(self, length: int) -> memoryview:
        """Return a writable view of ``length`` bytes of any content. Raises
        `MemoryError`."""
        capacity = _SMALLEST
        if length > capacity:
            capacity = 1 << (length - 1).bit_length()
        idle = self._idle.get(capacity)
        if idle:
            self._nb_idle_bytes -= capacity
            buffer = idle.pop()
        else:
            # Only the kept ones are worth their round-up.
            buffer = _allocate(capacity if capacity <= _LARGEST_KEPT else length)
        return memoryview(buffer)[:length]

    def release(self, view: memoryview) -> None:
        """Take back what `acquire` returned; nobody may use it any more."""
        buffer = cast(_Memory, view.obj)
        capacity = len(buffer)
        if capacity > _LARGEST_KEPT or self._nb_idle_bytes + capacity > self._max_idle:
            return
        self._nb_idle_bytes += capacity
        self._idle.setdefault(capacity, []).append(buffer)


def _allocate(length: int) -> _Memory:
    if length < _FROM_SYSTEM:
        return bytearray(length)
    try:
        return mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        raise MemoryError from None


# malloc.h
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3


def keep_freed_memory() -> None:
    """Have the C library keep some memory that was freed, for this process.

    A turn of the loop may free the data of many replies at once. glibc then
    gives it back to the system and asks for it again in the next turn; page
    faults were half the cost of a 64 KiB read. Other C libraries: no effect.
    """
    _set_thresholds(trim=8 * MiB, mmap=2 * MiB)


def keep_much_freed_memory() -> None:
    """Have the C library keep all memory that was freed, for this process.

    It is for a command that reads and frees megabytes all the time.
    """
    _set_thresholds(trim=256 * MiB, mmap=32 * MiB)


def _set_thresholds(*, trim: int, mmap: int) -> None:
    import ctypes

    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # Setting one of the two freezes the other one at its default.
        mallopt(_M_TRIM_THRESHOLD, trim)
        mallopt(_M_MMAP_THRESHOLD, mmap)

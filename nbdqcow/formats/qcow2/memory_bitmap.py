"""One dirty bitmap in memory: marks, lookups, merging.

Source: qcow2.txt, "Bitmaps".
"""

import asyncio
import errno
import mmap
from typing import TYPE_CHECKING, Final, NamedTuple

from nbdqcow.errors import BlockError
from nbdqcow.units import MiB

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nbdqcow.formats.qcow2.bitmap_directory import BitmapEntry

_MAPPED_BYTES: Final = MiB
"""From that on, zeroes are pages that nobody has touched."""
_STRIDE_BITS: Final = 1 << 20


class BitmapInfo(NamedTuple):
    """One bitmap, for lists; ``granularity`` is bytes of the disk for a bit.

    ``inconsistent``: it was in use when its last user died. It holds nothing
    of worth and can only be removed.
    """

    name: str
    granularity: int
    enabled: bool
    inconsistent: bool


class Bitmap:
    """One bitmap in memory.

    Attributes:
        bits: one for each `granularity` bytes of the disk, in a byte from the
            least significant up.
        entry: where the file has it; None before it was first stored.
        busy: it is being merged, and is not to be changed otherwise than by marks.
    """

    def __init__(self, name: str, size: int, granularity_bits: int) -> None:
        self.name = name
        self.granularity_bits = granularity_bits
        self.enabled = True
        self.inconsistent = False
        self.entry: BitmapEntry | None = None
        self.busy = False
        self.bits = _zeroes(0)
        self.resize(size)

    @property
    def info(self) -> BitmapInfo:
        """What lists show."""
        return BitmapInfo(
            self.name, 1 << self.granularity_bits, self.enabled, self.inconsistent
        )

    def mark(self, offset: int, length: int) -> None:
        """A range of at least a byte was written. It may go past the disk's end:
        into the rest of its last cluster, or the disk has become smaller."""
        first = offset >> self.granularity_bits
        last = (offset + length - 1) >> self.granularity_bits
        if last >= self.nb_bits:
            last = self.nb_bits - 1
            if first > last:
                return
        bits = self.bits
        low, high = first >> 3, last >> 3
        if low == high:
            bits[low] |= (2 << (last & 7)) - (1 << (first & 7))
            return
        bits[low] |= 0x100 - (1 << (first & 7))
        bits[high] |= (2 << (last & 7)) - 1
        if high - low > 1:
            bits[low + 1 : high] = b"\xff" * (high - low - 1)

    def resize(self, size: int) -> None:
        """The disk has another size; what is new was not written."""
        self.size = size
        self.nb_bits = -(-size >> self.granularity_bits)
        length, bits = (self.nb_bits + 7) // 8, self.bits
        if isinstance(bits, mmap.mmap) and length >= _MAPPED_BYTES:
            # Pages move as they are: there may be 1 GiB of them. What is behind the
            # end in the last one is seen again if the disk grows.
            rest = bits[length : -(-length // mmap.PAGESIZE) * mmap.PAGESIZE]
            bits[length : length + len(rest)] = bytes(len(rest))
            bits.resize(length)
        else:
            self.bits = _zeroes(length)
            kept = min(len(bits), length)
            self.bits[:kept] = bits[:kept]
        self.mask_end()

    def mask_end(self) -> None:
        """Clear what is behind the last bit: it is nobody's."""
        if self.nb_bits % 8 and self.bits[-1] >> self.nb_bits % 8:
            self.bits[-1] &= (1 << self.nb_bits % 8) - 1

    def clear(self) -> None:
        """Forget all writes."""
        self.bits = _zeroes(len(self.bits))

    async def merge(self, other: "Bitmap") -> None:
        """Add what another bitmap of the same disk has. Marks may be made in both
        meanwhile; their sizes stay."""
        finer = min(self, other, key=lambda bitmap: bitmap.granularity_bits)
        for start in range(0, finer.nb_bits, _STRIDE_BITS):
            self._merge_stride(other, start)
            await asyncio.sleep(0)

    def _merge_stride(self, other: "Bitmap", start: int) -> None:
        """Add one stride, which begins with bit ``start`` of the finer bitmap."""
        shift = other.granularity_bits - self.granularity_bits
        if shift > 0:
            self._add_coarser(other, start, shift)
            return
        theirs = bytes(other.bits[start >> 3 : (start + _STRIDE_BITS) >> 3])
        if theirs == bytes(len(theirs)):
            return
        if shift:
            self._add_finer(theirs, start, -shift)
        else:
            self._add(start >> 3, theirs)

    def _add_finer(self, theirs: bytes, start: int, shift: int) -> None:
        """Add bits from ``start`` on, ``1 << shift`` of them for one of ours."""
        import numpy as np

        flags = np.unpackbits(np.frombuffer(theirs, np.uint8), bitorder="little")
        for _ in range(shift):
            flags = np.append(flags, np.zeros(len(flags) & 1, np.uint8))
            flags = flags[::2] | flags[1::2]
        first = start >> shift
        flags = np.append(np.zeros(first & 7, np.uint8), flags)
        self._add(first >> 3, np.packbits(flags, bitorder="little").tobytes())

    def _add_coarser(self, other: "Bitmap", start: int, shift: int) -> None:
        """Add those that say something of our bits from ``start`` on, each for
        ``1 << shift`` of ours."""
        import numpy as np

        first, last = start >> shift, (start + _STRIDE_BITS - 1) >> shift
        raw = bytes(other.bits[first >> 3 : (last >> 3) + 1])
        flags = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")
        flags = flags[first & 7 : (first & 7) + last - first + 1]
        if flags.any():
            own = np.repeat(flags, min(1 << shift, _STRIDE_BITS))
            self._add(start >> 3, np.packbits(own, bitorder="little").tobytes())

    def _add(self, first_byte: int, bits: bytes) -> None:
        """Set these bits, too; what is behind the end is left out."""
        import numpy as np

        bits = bits[: len(self.bits) - first_byte]
        own = np.frombuffer(self.bits, np.uint8, len(bits), first_byte)
        own |= np.frombuffer(bits, np.uint8)
        del own
        self.mask_end()

    async def extents(
        self, offset: int, length: int, limit: int
    ) -> tuple["npt.NDArray[np.uint64]", "npt.NDArray[np.bool_]"]:
        """See `DirtyBitmap.extents`."""
        import numpy as np

        shift, end = self.granularity_bits, offset + length
        position = offset >> shift
        last = (end - 1) >> shift
        starts: list[npt.NDArray[np.int64]] = []
        states: list[npt.NDArray[np.uint8]] = []
        previous = 2
        nb_found = 0
        # The disk may become smaller meanwhile.
        while position <= (last := min(last, self.nb_bits - 1)) and nb_found <= limit:
            stop = min(last + 1, (position & ~7) + _STRIDE_BITS)
            raw = np.frombuffer(self.bits, np.uint8)[position >> 3 : (stop + 7) >> 3]
            flags = np.unpackbits(raw, bitorder="little")
            flags = flags[position & 7 : (position & 7) + stop - position]
            changes = np.flatnonzero(np.diff(flags, prepend=np.uint8(previous)))
            del raw
            starts.append(changes + position)
            states.append(flags[changes])
            nb_found += len(changes)
            previous = int(flags[-1])
            position = stop
            await asyncio.sleep(0)
        if not starts:
            raise BlockError(errno.EINVAL, "the disk has become smaller")
        bounds = np.concatenate(starts).astype(np.uint64) << np.uint64(shift)
        bounds[0] = offset
        covered = min(end, position << shift)
        lengths = np.diff(np.append(bounds, np.uint64(covered)))
        return lengths[:limit], np.concatenate(states).astype(np.bool_)[:limit]


def _zeroes(length: int) -> bytearray | mmap.mmap:
    if length < _MAPPED_BYTES:
        return bytearray(length)
    return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

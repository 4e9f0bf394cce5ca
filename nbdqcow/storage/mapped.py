"""A read-only mapping of a file, to hand page cache to the kernel uncopied.

A 1 MiB read that is answered with a slice of the mapping costs neither a
1 MiB bytes object nor the page faults of fresh memory: sendmsg(2) copies out
of the page cache.

The bytes of a slice may only be touched by the kernel. If another program
shrinks the file, sendmsg(2) on such a slice fails with EFAULT, while a look
at it from Python kills the process with SIGBUS.
"""

import mmap
import os
from typing import Final

from nbdqcow.storage.linux import address_of
from nbdqcow.storage.residency import Residency
from nbdqcow.units import KiB, MiB

# Below this a copy is as cheap as asking mincore(2) and filling page tables.
MIN_LENGTH: Final = 64 * KiB
MAX_LENGTH: Final = 32 * MiB

# A mapping through which this much has been touched is dropped for a new one,
# so that the pages which count as this process's resident memory stay bounded.
# A new mapping costs 5 us, and each of its pages one entry to fill again.
BUDGET: Final = 64 * MiB

# What one touched byte may bring in: a large folio is mapped as one page.
_HUGE_PAGE: Final = 2 * MiB


class MappedFile:
    """Slices of one file's page cache."""

    def __init__(self, fd: int) -> None:
        """Map the file that ``fd`` has open."""
        # `mmap` duplicates its descriptor. A duplicate of ``fd`` itself would
        # keep the image's locks for as long as anybody holds a slice.
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        self._view = memoryview(b"")
        self._length = 0
        self._address = 0
        self._budget = 0
        self._last_page = -1
        self._residency = Residency(MAX_LENGTH)

    def try_view(self, offset: int, length: int, file_length: int) -> memoryview | None:
        """Return ``length`` bytes at ``offset`` if they are in page cache.

        ``file_length`` is what the caller knows the file to have; the range
        is never past it. The slice keeps its mapping alive.
        """
        end = offset + length
        if (
            not MIN_LENGTH <= length <= MAX_LENGTH
            or end > file_length
            or (self._budget <= 0 and not self._remap())
            or not self.is_resident(offset, length)
        ):
            return None
        first, last = offset // _HUGE_PAGE, (end - 1) // _HUGE_PAGE
        self._budget -= (last - first + (first != self._last_page)) * _HUGE_PAGE
        self._last_page = last
        return self._view[offset:end]

    def is_resident(self, offset: int, length: int) -> bool:
        """Whether all of a range, at most `MAX_LENGTH`, is in page cache."""
        end = offset + length
        if end > self._length and not (self._remap() and end <= self._length):
            return False
        return self._residency.is_resident(self._address + offset, length)

    def _remap(self) -> bool:
        """Map the file as it is now; whether that worked."""
        self.forget()
        try:
            mapping = mmap.mmap(self._fd, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except (OSError, ValueError):
            # Too large for the address space, or empty by now.
            return False
        self._address = address_of(mapping)
        self._view = memoryview(mapping)
        self._length = len(mapping)
        self._budget = BUDGET
        self._last_page = -1
        return True

    def close(self) -> None:
        """Drop the mapping and the descriptor."""
        self.forget()
        os.close(self._fd)

    def forget(self) -> None:
        """Drop the mapping; it goes once the last slice of it has gone."""
        self._view = memoryview(b"")
        self._length = 0
        self._budget = 0

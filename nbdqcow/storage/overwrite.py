"""Overwriting page cache through a mapping of the file.

Since Linux 6.16, ext4 keeps files in large folios, and write(2) looks at the
state of each block of the folio that it touches: 4 KiB into a folio of 2 MiB
cost 45 us. Through a mapping they cost a page fault the first time and a copy
afterwards: 2 to 7 us.

A store that can't be done (the file was cut short by another program, the
disk is full) would kill the process with SIGBUS if the process made it. So the
kernel makes it: the data goes through a small file in memory, from which
preadv(2) reads into the mapping, and that fails with EFAULT.
"""

import mmap
import os
import re
from contextlib import ExitStack, suppress
from typing import Final

from nbdqcow.storage.linux import (
    EXT4_MAGIC,
    PAGE_SIZE,
    address_of,
    filesystem_type,
)
from nbdqcow.storage.residency import Residency
from nbdqcow.types import Buffer
from nbdqcow.units import KiB, MiB

MAX_LENGTH: Final = 16 * KiB
"""Above this the page faults cost as much as what is saved."""

BUDGET: Final = 32 * MiB
"""Bytes written through one mapping: the pages count as this process's resident
memory until the mapping is dropped for a new one."""

_FIRST_RELEASE: Final = (6, 16)


def pays(fd: int) -> bool:
    """Whether the file is where write(2) costs more than a mapping."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if found is None or (int(found[1]), int(found[2])) < _FIRST_RELEASE:
        return False
    with suppress(OSError):
        return filesystem_type(fd) == EXT4_MAGIC
    return False


class Overwriter:
    """Writes to pages of one file that are in page cache."""

    def __init__(self, fd: int) -> None:
        """``fd`` has the file open for reading and writing. Raises `OSError`."""
        with ExitStack() as stack:
            self._source_fd = os.memfd_create("nbdqcow", os.MFD_CLOEXEC)
            stack.callback(os.close, self._source_fd)
            os.ftruncate(self._source_fd, MAX_LENGTH)
            self._source = memoryview(mmap.mmap(self._source_fd, MAX_LENGTH))
            # As `MappedFile` does, and for the same reason.
            self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
            stack.pop_all()
        self._residency = Residency(MAX_LENGTH)
        self._view = memoryview(b"")
        self._address = 0
        self._budget = 0

    def try_write(self, offset: int, data: Buffer) -> bool:
        """Overwrite bytes of the file, at most `MAX_LENGTH`, if they are in page
        cache. False if not all of it was done; then some of it may be."""
        length = len(data)
        end = offset + length
        if length > MAX_LENGTH:
            return False
        if (self._budget <= 0 or end > len(self._view)) and not self._remap(end):
            return False
        if not self._residency.is_resident(self._address + offset, length):
            return False
        nb_pages = (end - 1) // PAGE_SIZE - offset // PAGE_SIZE + 1
        self._budget -= nb_pages * PAGE_SIZE
        self._source[:length] = data
        try:
            return os.preadv(self._source_fd, (self._view[offset:end],), 0) == length
        except OSError:
            # write(2) will say what is wrong.
            return False

    def _remap(self, end: int) -> bool:
        """Map the file as it is now; whether ``end`` is inside."""
        self.forget()
        try:
            mapping = mmap.mmap(self._fd, 0)
        except (OSError, ValueError):
            return False
        self._address = address_of(mapping)
        self._view = memoryview(mapping)
        self._budget = BUDGET
        return end <= len(mapping)

    def forget(self) -> None:
        """Drop the mapping."""
        self._view = memoryview(b"")
        self._budget = 0

    def close(self) -> None:
        """Drop everything."""
        self.forget()
        self._source = memoryview(b"")
        os.close(self._source_fd)
        os.close(self._fd)

"""Overwriting page cache through a mapping of the file.

Since Linux 6.16, ext4 keeps files in large folios, and write(2) looks at the
state of each block of the folio that it touches: 4 KiB into a folio of 2 MiB
cost 20 to 45 us. Through a mapping they cost a page fault the first time and a
copy afterwards: 2 to 12 us.

The price is paid when the file is written back. A page fault makes all of the
folio dirty, write(2) only the blocks that it writes: after 2000 writes of 4 KiB
all over a file, fdatasync(2) wrote 914 MiB, and 8 MiB without a mapping. So a
piece of the file is written through the mapping once many writes went to it
since it was written back last: then one large write stands for many small ones.

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

MIN_WRITES: Final = 64
"""Writes to a folio's worth of the file that go the other way first. So what is
written back is at most 8 times what was written, where these are of 4 KiB."""

WRITE_BACK_SECONDS: Final = 5.0
"""The kernel looks for what to write back this often, flush or not."""

_FOLIO_BITS: Final = 21
_MAX_COUNTED: Final = 4096

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
        self._nb_writes: dict[int, int] = {}
        self._counts_until = 0.0
        self._view = memoryview(b"")
        self._address = 0
        self._budget = 0

    def try_write(self, offset: int, data: Buffer, now: float) -> bool:
        """Overwrite bytes of the file, at most `MAX_LENGTH`, if they are in page
        cache and that pays at ``now`` (seconds of a steady clock). False if not
        all of it was done; then some of it may be."""
        length = len(data)
        end = offset + length
        if length > MAX_LENGTH or not self._pays(offset >> _FOLIO_BITS, now):
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

    def _pays(self, folio: int, now: float) -> bool:
        """Count a write to a folio; whether there were enough before."""
        if now >= self._counts_until:
            self._nb_writes.clear()
            self._counts_until = now + WRITE_BACK_SECONDS
        nb_writes = self._nb_writes.get(folio, 0)
        if nb_writes >= MIN_WRITES:
            return True
        if not nb_writes and len(self._nb_writes) >= _MAX_COUNTED:
            self._nb_writes.clear()
        self._nb_writes[folio] = nb_writes + 1
        return False

    def written_back(self) -> None:
        """The file is being written back: what was dirty no longer is."""
        self._nb_writes.clear()

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

"""The L1 table in memory, of which only what is in use takes any.

A table may have 2 GiB, as QEMU takes it, so that a disk of 512 TiB can be made.
It is empty but for what was written.
"""

import mmap
from array import array
from collections.abc import Iterator
from typing import Final, TypeAlias

from nbdqcow.block.storage import StorageDriver
from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow1.header import MAX_L1_MEMORY, Header
from nbdqcow.formats.words import load_be64
from nbdqcow.units import MiB

L1Words: TypeAlias = "array[int] | memoryview[int]"
"""The entries, native order."""

_PIECE: Final = 4 * MiB
_PAGE: Final = mmap.PAGESIZE
_ZERO_PIECE: Final = bytes(_PIECE)


async def load_l1(storage: StorageDriver, header: Header) -> L1Words:
    """Read the table. Raises `ImageError` if it would take too much memory."""
    length = header.l1_bytes
    if length <= MAX_L1_MEMORY:
        return load_be64(await storage.pread(header.l1_table_offset, length))
    # Pages that nobody touches take no memory.
    memory = memoryview(mmap.mmap(-1, length))
    nb_taken = 0
    for start in range(0, length, _PIECE):
        size = min(_PIECE, length - start)
        piece = await storage.pread(header.l1_table_offset + start, size)
        if piece == _ZERO_PIECE[:size]:
            continue
        words = memoryview(load_be64(piece)).cast("B")
        for first in range(0, size, _PAGE):
            page = words[first : first + _PAGE]
            if page == _ZERO_PIECE[: len(page)]:
                continue
            nb_taken += _PAGE
            if nb_taken > MAX_L1_MEMORY:
                raise ImageError("Image too large: so much of its L1 table is in use")
            memory[start + first : start + first + len(page)] = page
    return memory.cast("Q")


def used_entries(l1: L1Words) -> Iterator[tuple[int, int]]:
    """Yield the index and value of each entry that is not 0."""
    if isinstance(l1, array):
        yield from ((index, entry) for index, entry in enumerate(l1) if entry)
        return
    step = _PIECE // 8
    for start in range(0, len(l1), step):
        piece = l1[start : start + step]
        if piece.cast("B") != _ZERO_PIECE[: len(piece) * 8]:
            found = ((start + i, entry) for i, entry in enumerate(piece) if entry)
            yield from found

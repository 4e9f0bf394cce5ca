"""Zero clusters made plain ones, for version 2, which has none.

The tables change in place: until the header says version 2, an entry means
the same with the flag and without it, once its cluster holds zeroes.

Source: qcow2.txt, "Standard Cluster Descriptor".
"""

import asyncio
from itertools import chain
from typing import TYPE_CHECKING

from nbdqcow.block.tools import Progress
from nbdqcow.errors import CorruptImage
from nbdqcow.formats.qcow2 import encryption
from nbdqcow.formats.qcow2.entries import (
    OFFSET_MASK,
    OFLAG_COMPRESSED,
    OFLAG_COPIED,
    OFLAG_ZERO,
)
from nbdqcow.formats.qcow2.snapshot import read, read_l1
from nbdqcow.formats.words import dump_be64, load_be64
from nbdqcow.units import format_hex

if TYPE_CHECKING:
    from array import array

    from nbdqcow.formats.qcow2.driver import Qcow2Driver


async def expand_zero_clusters(image: "Qcow2Driver", progress: Progress) -> None:
    """Make them plain in the tables of the disk and of all snapshots. The image is
    `alone`. Raises `CorruptImage`."""
    tables = image.tables
    # By the table's offset: a shared one is done once.
    places: dict[int, tuple[int, bool]] = {}
    snapshots, _ = await read(image)
    l1_tables = [await read_l1(image, one) for one in snapshots]
    for l1 in (tables.l1, *l1_tables):
        for index, entry in enumerate(l1):
            offset = entry & OFFSET_MASK
            if offset % image.cluster_size:
                raise CorruptImage(
                    f"L2 table offset {offset:#x} unaligned"
                    f" (L1 index: {format_hex(index)})"
                )
            if offset:
                places.setdefault(offset, (index, l1 is tables.l1))
    nb_entries = sum(map(len, (tables.l1, *l1_tables)))
    try:
        # Told by the L1 entry, as QEMU does.
        for nb_done, entry in enumerate(chain(tables.l1, *l1_tables), 1):
            if (place := places.pop(entry & OFFSET_MASK, None)) is not None:
                index, active = place
                guest_offset = index << tables.l1_shift
                await _expand_table(image, entry & OFFSET_MASK, guest_offset, active)
            progress(nb_done, nb_entries)
        await image.writeback.commit_alone()
    finally:
        tables.replace(tables.l1, tables.l1_offset)


async def _expand_table(
    image: "Qcow2Driver", offset: int, guest_offset: int, active: bool
) -> None:
    """Do so in one L2 table, whose first entry is for ``guest_offset``."""
    size, bits = image.cluster_size, image.cluster_bits
    words = load_be64(await image.storage.pread(offset, size))
    nb_users = await image.refcounts.count(offset >> bits)
    changed = False
    for index, entry in enumerate(words):
        if entry & OFLAG_ZERO and not entry & OFLAG_COMPRESSED:
            place = guest_offset + index * size
            if entry & OFFSET_MASK & (size - 1):
                raise CorruptImage(
                    f"Cluster allocation offset {entry & OFFSET_MASK:#x} unaligned (L2"
                    f" offset: {offset:#x}, L2 index: {format_hex(index)})"
                )
            words[index] = await _expand(image, entry, place, nb_users, active)
            changed = True
            if index % 16 == 0:
                await asyncio.sleep(0)
    if changed:
        # Counts and zeroes before what needs them.
        await _write_table(image, offset, words)


async def _write_table(image: "Qcow2Driver", offset: int, words: "array[int]") -> None:
    freed = image.take_freed()
    try:
        await image.writeback.commit_alone()
        await image.writeback.flush_files()
        await image.storage.pwritev(offset, [dump_be64(words)])
        await image.storage.flush()
    finally:
        image.freed.take_back(freed)


async def _expand(
    image: "Qcow2Driver", entry: int, guest_offset: int, nb_users: int, active: bool
) -> int:
    """Return the entry that takes a zero cluster's place.

    ``nb_users``: how many L1 tables name the table that it is in.
    """
    bits, refcounts = image.cluster_bits, image.refcounts
    cluster_index = (entry & OFFSET_MASK) >> bits
    if cluster_index:
        if await refcounts.count(cluster_index) == nb_users:
            await _write_zeroes(image, cluster_index, guest_offset)
            return entry & ~OFLAG_ZERO
        # Another table may show data there.
        for _ in range(nb_users):
            image.freed.add(cluster_index, 1, False)
    if not image.is_covering:
        return 0
    cluster_index, _ = await refcounts.allocate(1)
    for _ in range(nb_users - 1):
        await refcounts.add(cluster_index, 1, 1)
    image.note_used((cluster_index + 1) << bits)
    await _write_zeroes(image, cluster_index, guest_offset)
    return (cluster_index << bits) | (OFLAG_COPIED if active and nb_users == 1 else 0)


async def _write_zeroes(
    image: "Qcow2Driver", cluster_index: int, guest_offset: int
) -> None:
    image.check_not_metadata(cluster_index)
    host_offset = encryption.tagged(
        image.header, cluster_index << image.cluster_bits, guest_offset
    )
    await image.data.write_zeroes(host_offset, image.cluster_size, may_unmap=False)

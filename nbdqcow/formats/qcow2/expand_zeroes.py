"""Zero clusters made plain ones, for version 2, which has none.

The tables change in place: until the header says version 2, an entry means
the same with the flag and without it, once its cluster holds zeroes.

Source: qcow2.txt, "Standard Cluster Descriptor".
"""

import asyncio
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

if TYPE_CHECKING:
    from array import array

    from nbdqcow.formats.qcow2.driver import Qcow2Driver


async def expand_zero_clusters(image: "Qcow2Driver", progress: Progress) -> None:
    """Do so in the tables of the disk and of all snapshots. The image is
    `alone`."""
    tables = image.tables
    # By the table's offset: a shared one is done once.
    places: dict[int, tuple[int, bool]] = {}
    snapshots, _ = await read(image)
    l1_tables = [await read_l1(image, one) for one in snapshots]
    for l1 in (*l1_tables, tables.l1):
        for index, entry in enumerate(l1):
            offset = entry & OFFSET_MASK
            if offset % image.cluster_size:
                raise CorruptImage(
                    f"L2 table offset {offset:#x} unaligned (L1 index: {index:#x})"
                )
            if offset:
                places[offset] = index, l1 is tables.l1
    try:
        for nb_done, (offset, (index, active)) in enumerate(places.items()):
            progress(nb_done, len(places))
            await _expand_table(image, offset, index << tables.l1_shift, active)
        await image.writeback.commit_alone()
    finally:
        tables.replace(tables.l1, tables.l1_offset)
    progress(len(places), len(places))


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
    if entry & OFFSET_MASK & (image.cluster_size - 1):
        raise CorruptImage(
            f"Cluster allocation offset {entry & OFFSET_MASK:#x} unaligned (guest"
            f" offset {guest_offset:#x})"
        )
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

"""What version 2 has no room for: zero clusters are made plain ones, and
clusters that are not compressed by zlib are looked for.

The tables change in place: until the header says version 2, an entry means
the same with the flag and without it, once its cluster holds zeroes.

Source: qcow2.txt, "Standard Cluster Descriptor".
"""

import asyncio
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
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
    l1_tables = await _all_l1_tables(image)
    # By the table's offset: a shared one is done once.
    places: dict[int, tuple[int, bool]] = {}
    for l1 in l1_tables:
        for index, entry in enumerate(l1):
            if offset := _l2_offset(image, index, entry):
                places.setdefault(offset, (index, l1 is tables.l1))
    nb_entries = sum(map(len, l1_tables))
    waiting = _waiting_references(
        image, [place >> image.cluster_bits for place in places]
    )
    try:
        # Told by the L1 entry, as QEMU does.
        for nb_done, entry in enumerate(chain(*l1_tables), 1):
            if (place := places.pop(entry & OFFSET_MASK, None)) is not None:
                index, active = place
                guest_offset = index << tables.l1_shift
                offset = entry & OFFSET_MASK
                cluster_index = offset >> image.cluster_bits
                # Those that wait are counted, and do not need anything.
                nb_users = await image.refcounts.count(cluster_index)
                nb_users -= waiting[cluster_index]
                await _expand_table(image, offset, guest_offset, nb_users, active)
            progress(nb_done, nb_entries)
        await image.writeback.commit_alone()
    finally:
        tables.replace(tables.l1, tables.l1_offset)


def _waiting_references(
    image: "Qcow2Driver", cluster_indices: Sequence[int]
) -> Counter[int]:
    """Return how many references to clusters wait to be given back."""
    ordered = sorted(cluster_indices)
    waiting: Counter[int] = Counter()
    for freed in (*image.writeback.waiting, image.freed):
        for first, nb_clusters, _ in freed.ranges:
            start = bisect_left(ordered, first)
            waiting.update(ordered[start : bisect_left(ordered, first + nb_clusters)])
    return waiting


async def has_compressed_clusters(image: "Qcow2Driver") -> bool:
    """Whether there are any, in the disk or a snapshot. The image is `alone`."""
    offsets = {
        _l2_offset(image, index, entry)
        for l1 in await _all_l1_tables(image)
        for index, entry in enumerate(l1)
    }
    for offset in offsets - {0}:
        words = load_be64(await image.storage.pread(offset, image.cluster_size))
        # Bitmaps of subclusters lie between the entries.
        if any(map(OFLAG_COMPRESSED.__and__, words[:: image.tables.entry_words])):
            return True
    return False


async def _all_l1_tables(image: "Qcow2Driver") -> "list[array[int]]":
    """Return the L1 table of the disk, and of each snapshot."""
    snapshots, _ = await read(image)
    return [image.tables.l1, *[await read_l1(image, one) for one in snapshots]]


def _l2_offset(image: "Qcow2Driver", index: int, entry: int) -> int:
    """Return where the L2 table of an L1 entry is; 0 without one."""
    offset = entry & OFFSET_MASK
    if offset % image.cluster_size:
        raise CorruptImage(
            f"L2 table offset {offset:#x} unaligned (L1 index: {format_hex(index)})"
        )
    return offset


async def _expand_table(
    image: "Qcow2Driver", offset: int, guest_offset: int, nb_users: int, active: bool
) -> None:
    """Do so in one L2 table, whose first entry is for ``guest_offset``; ``nb_users``
    L1 tables name it."""
    size = image.cluster_size
    words = load_be64(await image.storage.pread(offset, size))
    change = _Change()
    nb_changed = 0
    try:
        for index, entry in enumerate(words):
            if entry & OFLAG_ZERO and not entry & OFLAG_COMPRESSED:
                place = guest_offset + index * size
                if entry & OFFSET_MASK & (size - 1):
                    raise CorruptImage(
                        f"Cluster allocation offset {entry & OFFSET_MASK:#x} unaligned"
                        f" (L2 offset: {offset:#x}, L2 index: {format_hex(index)})"
                    )
                words[index] = await _expand(
                    image, entry, place, nb_users, active, change
                )
                nb_changed += 1
                if index % 16 == 0:
                    await asyncio.sleep(0)
        if not nb_changed:
            return
        # Counts and zeroes before what needs them.
        await image.writeback.commit_alone()
        await image.writeback.flush_files()
    except BaseException:
        for cluster_index in change.taken:
            image.freed.add(cluster_index, 1, False)
        raise
    # If this fails nobody knows which of all these the table names: all stay.
    await image.storage.pwritev(offset, [dump_be64(words)])
    await image.storage.flush()
    for cluster_index in change.left:
        image.freed.add(cluster_index, 1, False)


class _Change:
    """References that change with one L2 table, a cluster for each.

    Attributes:
        taken: counted already, for entries that are to be written.
        left: not needed any more once they are.
    """

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.left: list[int] = []


async def _expand(
    image: "Qcow2Driver",
    entry: int,
    guest_offset: int,
    nb_users: int,
    active: bool,
    change: _Change,
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
        change.left += [cluster_index] * nb_users
    if not image.is_covering:
        return 0
    cluster_index, _ = await refcounts.allocate(1)
    change.taken.append(cluster_index)
    for _ in range(nb_users - 1):
        await refcounts.add(cluster_index, 1, 1)
        change.taken.append(cluster_index)
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

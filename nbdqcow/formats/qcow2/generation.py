"""A new generation of an image's metadata, built beside the one in use.

An operation on snapshots changes refcounts and COPIED flags all over the
image, and they must agree at every moment: a cluster with one user has the
flag, others don't. So nothing is changed in place. Changed refcount blocks,
the refcount table, L2 tables, the L1 table and the snapshot table are written
to new clusters; after a flush one write to the header's first sector, which
names all the roots, makes them valid together. A power cut leaves the old
generation or the new one, and leaked clusters.

Clusters that lost their last reference keep a count of 1 in the new
generation. It goes down when no request is in flight that may still read
them.
"""

import asyncio
import contextlib
import struct
from array import array
from collections.abc import AsyncIterator, Collection, Mapping
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from nbdqcow.errors import CorruptImage
from nbdqcow.formats.qcow2.entries import (
    OFFSET_MASK,
    OFLAG_COMPRESSED,
    OFLAG_COPIED,
    compressed_ranges,
)
from nbdqcow.formats.qcow2.new_counts import NewCounts, runs
from nbdqcow.formats.words import dump_be64
from nbdqcow.units import SECTOR_SIZE, MiB, round_up

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.driver import Qcow2Driver

Entries: TypeAlias = npt.NDArray[np.uint64]

ROOTS_OFFSET: Final = 24
_ROOTS: Final = struct.Struct(">QIIQQIIQ")
"""The header from ``size`` to ``snapshots_offset``: within one sector."""

_WITHOUT_COPIED: Final = OFLAG_COPIED ^ ((1 << 64) - 1)

_BATCH_BYTES: Final = MiB
"""L2 tables read at a time."""


class Generation:
    """What will be valid after `switch`.

    Build it under `alone`. Attributes:
        size: the virtual size.
        l1: the active L1 table.
        snapshots_offset, nb_snapshots: the snapshot table.
    """

    def __init__(self, image: "Qcow2Driver") -> None:
        self._image = image
        header = image.header
        self.size = header.size
        self.l1 = image.tables.l1[:]
        self.snapshots_offset = header.snapshots_offset
        self.nb_snapshots = header.nb_snapshots
        self._l1_offset = 0
        self._table_offset = 0
        self._taken: list[tuple[int, int]] = []
        self._spares: list[int] = []
        self._old: list[tuple[int, int]] = []
        self._zero_from = image.reads_zero_from
        self._counts: NewCounts

    # -- room ------------------------------------------------------------

    async def reserve(
        self, *, nb_l2_tables: int, nb_l1_entries: int, snapshots_length: int | None
    ) -> None:
        """Take clusters for all that may be written, the most there can be.

        They are in use on disk, too, when this returns. ``snapshots_length``:
        bytes of a new snapshot table; None if the old one stays.
        """
        image, refcounts = self._image, self._image.refcounts
        size = image.cluster_size
        self._l1_offset = await self._take_row(-(-nb_l1_entries * 8 // size))
        if snapshots_length is not None:
            await self.take_snapshot_table(snapshots_length)
        while True:
            table_clusters = image.header.refcount_table_clusters
            self._table_offset = await self._take_row(table_clusters)
            # What is taken may need blocks of its own, or a larger table.
            while True:
                nb_blocks = len(refcounts.table) - refcounts.table.count(0)
                missing = nb_l2_tables + nb_blocks - len(self._spares)
                if missing <= 0:
                    break
                first, nb_clusters = await refcounts.allocate(missing)
                self._note_taken(first, nb_clusters)
                self._spares += range(first, first + nb_clusters)
            if image.header.refcount_table_clusters == table_clusters:
                break
            self.replaces(self._table_offset, table_clusters * size)
        self._spares.reverse()
        await image.writeback.commit_alone()
        self._counts = NewCounts(
            image.storage, refcounts, self._take_spare, self._write_new
        )
        # Whoever waits to drop them may turn its list round meanwhile.
        waiting = [r for freed in image.writeback.waiting for r in freed.ranges]
        for first, nb_clusters, _ in waiting:
            clusters = np.arange(first, first + nb_clusters, dtype=np.uint64)
            await self._counts.add(clusters, -1)

    async def take_snapshot_table(self, length: int) -> None:
        """Take clusters for a new snapshot table; none if it is empty."""
        nb_clusters = -(-length // self._image.cluster_size)
        self.snapshots_offset = await self._take_row(nb_clusters) if length else 0

    async def _take_row(self, nb_clusters: int) -> int:
        first = await self._image.refcounts.allocate_contiguous(nb_clusters)
        self._note_taken(first, nb_clusters)
        return first << self._image.cluster_bits

    def _note_taken(self, first: int, nb_clusters: int) -> None:
        image = self._image
        self._taken.append((first, nb_clusters))
        image.metadata.update(range(first, first + nb_clusters))
        image.note_used((first + nb_clusters) << image.cluster_bits, whole=False)

    def _take_spare(self) -> int:
        return self._spares.pop()

    # -- references ------------------------------------------------------

    async def share(self, l1: "array[int]", nb_entries: int) -> "array[int]":
        """Add a second user to all that the first ``nb_entries`` of an L1 table
        reach; return that user's L1 table, of the same length.

        L2 tables with COPIED flags are copied without them for it, the others
        shared. The flags in the first user's tables don't count any more:
        it must be a snapshot from now on.
        """
        image = self._image
        new_l1 = array("Q", bytes(len(l1) * 8))
        async for indices, tables in self.read_tables(l1[:nb_entries]):
            for index, table in zip(indices, tables, strict=True):
                entries = self.entries(table)
                await self._counts.add(self.referenced(entries), 1)
                offset = l1[index] & OFFSET_MASK
                if (entries >> np.uint64(63)).any():
                    entries &= np.uint64(_WITHOUT_COPIED)
                    new_l1[index] = await self._write_table(table)
                else:
                    cluster = np.array([offset >> image.cluster_bits], np.uint64)
                    await self._counts.add(cluster, 1)
                    new_l1[index] = offset
                await asyncio.sleep(0)
        return new_l1

    async def drop(
        self, l1: "array[int]", only: Mapping[int, bytes] | None = None
    ) -> None:
        """Remove one user of all that an L1 table reaches. ``only``: by L1 index,
        packed bits: which entries of the L2 table still have that user."""
        bits = self._image.cluster_bits
        async for indices, tables in self.read_tables(l1):
            for index, table in zip(indices, tables, strict=True):
                entries = self.entries(table)
                if only is not None:
                    packed = np.frombuffer(only[index], np.uint8)
                    bits_set = np.unpackbits(packed, count=len(entries))
                    entries = entries[bits_set.astype(np.bool_)]
                await self._counts.add(self.referenced(entries), -1)
                offset = l1[index] & OFFSET_MASK
                await self._counts.add(np.array([offset >> bits], np.uint64), -1)
                await asyncio.sleep(0)

    async def set_flags(self, only: Collection[int] | None = None) -> None:
        """Make the COPIED flags of the active tables agree with the counts;
        ``only``: of the L2 tables with these indices."""
        image, counts = self._image, self._counts
        l1 = self.l1
        if only is not None:
            l1 = array("Q", [word if i in only else 0 for i, word in enumerate(l1)])
        async for indices, tables in self.read_tables(l1):
            for index, table in zip(indices, tables, strict=True):
                entries = self.entries(table)
                offset = self.l1[index] & OFFSET_MASK
                cluster = np.array([offset >> image.cluster_bits], np.uint64)
                once = bool((await counts.look_up(cluster))[0] == 1)
                # The clusters of a table that is shared are shared, too.
                if once and await self._set_entry_flags(entries):
                    await counts.add(cluster, -1)
                    self.l1[index] = await self._write_table(table)
                else:
                    self.l1[index] = offset | (OFLAG_COPIED if once else 0)
                await asyncio.sleep(0)

    async def _set_entry_flags(self, entries: Entries) -> bool:
        """Set the flags of one L2 table; return whether any changed."""
        offsets = entries & np.uint64(OFFSET_MASK)
        is_standard = (entries & np.uint64(OFLAG_COMPRESSED)) == 0
        used = np.flatnonzero(is_standard & (offsets != 0))
        clusters = offsets[used] >> np.uint64(self._image.cluster_bits)
        once = await self._counts.look_up(clusters) == 1
        old = entries[used]
        entries[used] = (old & np.uint64(_WITHOUT_COPIED)) | np.where(
            once, np.uint64(OFLAG_COPIED), np.uint64(0)
        )
        return bool((entries[used] != old).any())

    async def read_tables(
        self, l1: "array[int]"
    ) -> AsyncIterator[tuple[list[int], list[Entries]]]:
        """Yield L1 indices and the L2 tables there, as writable arrays."""
        image = self._image
        words = np.frombuffer(l1, np.uint64)
        used = [int(i) for i in np.flatnonzero(words & np.uint64(OFFSET_MASK))]
        nb = max(1, _BATCH_BYTES // image.cluster_size)
        for start in range(0, len(used), nb):
            indices = used[start : start + nb]
            pieces = await asyncio.gather(
                *(self.read_table(l1[index] & OFFSET_MASK) for index in indices)
            )
            yield indices, pieces

    async def read_table(self, offset: int) -> Entries:
        """Return an L2 table as a writable array of words."""
        image = self._image
        if offset & (image.cluster_size - 1):
            raise CorruptImage(f"L2 table offset {offset:#x} unaligned")
        image.storage.announce("l2_load")
        data = await image.storage.pread(offset, image.cluster_size)
        table: Entries = np.frombuffer(data, ">u8").astype(np.uint64)
        return table

    async def _write_table(self, table: Entries) -> int:
        """Write an L2 table to a cluster of its own; return its L1 entry."""
        offset = self._take_spare() << self._image.cluster_bits
        self._image.storage.announce("l2_update")
        await self._write_new(offset, table.astype(">u8").tobytes())
        return offset | OFLAG_COPIED

    async def _write_new(self, offset: int, data: bytes) -> None:
        """Write clusters of tables for the first time. Zeroes at the end take no
        space where nothing ever was: there may not be much left."""
        image = self._image
        image.note_used(offset + len(data))
        if offset >= self._zero_from:
            used = len(data.rstrip(b"\0"))
            data = data[: max(SECTOR_SIZE, round_up(used, SECTOR_SIZE))]
        await image.storage.pwritev(offset, [data])

    def entries(self, table: Entries) -> Entries:
        """Return a view of the words of a table that name clusters."""
        entries: Entries = table[:: self._image.header.l2_entry_size // 8]
        return entries

    def referenced(self, entries: Entries) -> Entries:
        """Return the host clusters that entries name, each as often."""
        bits = self._image.cluster_bits
        compressed = (entries & np.uint64(OFLAG_COMPRESSED)) != 0
        offsets = entries[~compressed] & np.uint64(OFFSET_MASK)
        clusters: Entries = offsets[offsets != 0] >> np.uint64(bits)
        if not compressed.any():
            return clusters
        starts, ends = compressed_ranges(entries[compressed], bits)
        first = starts >> np.uint64(bits)
        last = (ends - np.uint64(1)) >> np.uint64(bits)
        # One ends in its first cluster, the next one, or the one after.
        parts = [clusters, first]
        for step in (1, 2):
            further = first + np.uint64(step)
            parts.append(further[further <= last])
        return np.concatenate(parts)

    # -- the end ---------------------------------------------------------

    def replaces(self, offset: int, length: int) -> None:
        """A metadata range of the old generation is not in the new one."""
        if length:
            self._old.append(clusters_of(offset, length, self._image.cluster_bits))

    async def write_snapshot_table(self, table: bytes, nb_snapshots: int) -> None:
        """Write the new snapshot table where `reserve` took room."""
        self.nb_snapshots = nb_snapshots
        if table:
            await self._image.storage.pwritev(self.snapshots_offset, [table])

    async def abandon(self) -> None:
        """Nothing of this generation was made valid: give its room back."""
        image = self._image
        for first, nb_clusters in self._taken:
            image.metadata.difference_update(range(first, first + nb_clusters))
            await image.refcounts.give_back(first, nb_clusters)

    async def switch(self) -> None:
        """Make the generation valid, on disk and in memory."""
        image, header, refcounts = self._image, self._image.header, self._counts
        storage, bits = image.storage, image.cluster_bits
        try:
            await refcounts.finish()
            storage.announce("l1_update")
            await storage.pwritev(self._l1_offset, [dump_be64(self.l1)])
            storage.announce("reftable_update")
            await self._write_new(self._table_offset, dump_be64(refcounts.table))
            await image.writeback.flush_files()
        except BaseException:
            await self.abandon()
            raise
        roots = _ROOTS.pack(
            self.size,
            header.crypt_method,
            len(self.l1),
            self._l1_offset,
            self._table_offset,
            header.refcount_table_clusters,
            self.nb_snapshots,
            self.snapshots_offset,
        )
        try:
            await storage.pwritev(ROOTS_OFFSET, [roots])
            await storage.flush()
        except BaseException:
            # Which generation is valid nobody knows now.
            image.fail()
            raise
        self.replaces(
            header.refcount_table_offset, header.refcount_table_clusters << bits
        )
        self._old += runs(np.array(sorted(refcounts.replaced), np.uint64))
        self._old += runs(np.array(sorted(self._spares), np.uint64))
        storage.announce("cluster_free")
        # No await from here on: lookups see the old tables or the new.
        header.l1_size, header.l1_table_offset = len(self.l1), self._l1_offset
        header.refcount_table_offset = self._table_offset
        header.nb_snapshots = self.nb_snapshots
        header.snapshots_offset = self.snapshots_offset
        image.tables.replace(self.l1, self._l1_offset)
        image.set_size(self.size)
        image.refcounts.replace_table(refcounts.table)
        for freed in image.writeback.waiting:
            freed.ranges.clear()
        for first, nb_clusters in self._old:
            image.metadata.difference_update(range(first, first + nb_clusters))
        for first, nb_clusters in self._old:
            await image.refcounts.give_back(first, nb_clusters)
        if refcounts.freed:
            nb_entries = image.refcounts.block_entries
            image.tasks.spawn(_drop(image, refcounts.freed, nb_entries))


def clusters_of(offset: int, length: int, cluster_bits: int) -> tuple[int, int]:
    """Return the clusters that a range of the file touches: the first, how many."""
    first = offset >> cluster_bits
    return first, ((offset + length - 1) >> cluster_bits) - first + 1


async def _drop(
    image: "Qcow2Driver", freed: "dict[int, bytes]", block_entries: int
) -> None:
    """Give back the clusters that nothing names any more.

    ``freed``: by refcount block, a bit for each of its counts. There were
    ``block_entries`` of them; refcounts may get another width meanwhile.
    """
    await image.epochs.quiet()
    bits, refcounts = image.cluster_bits, image.refcounts
    for block_index, packed in freed.items():
        flags = np.unpackbits(np.frombuffer(packed, np.uint8))
        clusters = np.flatnonzero(flags).astype(np.uint64)
        clusters += np.uint64(block_index * block_entries)
        ranges = runs(clusters)
        if image.settings.discard_snapshot:
            for first, nb_clusters in ranges:
                with contextlib.suppress(OSError):
                    await image.storage.discard(first << bits, nb_clusters << bits)
        async with image.lock:
            image.metadata.difference_update(clusters.tolist())
            for first, nb_clusters in ranges:
                await refcounts.give_back(first, nb_clusters)


@contextlib.asynccontextmanager
async def alone(image: "Qcow2Driver") -> AsyncIterator[None]:
    """Keep everybody from changing metadata, with none of it dirty.

    Reads and inline writes in place go on; nobody is in the middle of a write
    that waits.
    """
    # Most of what is dirty goes to disk while writers still run.
    await image.flush()
    async with image.writeback.paused(), image.lock:
        await image.writers.quiet()
        await image.writeback.commit_alone()
        yield

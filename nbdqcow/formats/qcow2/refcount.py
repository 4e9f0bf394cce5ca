"""Host cluster reference counts: the refcount table, its blocks, allocation.

Counts change in memory first; `nbdqcow.formats.qcow2.writeback` brings them
to disk in the right order. All methods are called with the image's lock held
and touch only counts: what a cluster is for is the caller's business.

Source: qcow2.txt, "Host cluster management".
"""

import asyncio
import errno
import heapq
import os
from array import array
from collections.abc import Callable
from typing import Final

from nbdqcow.block.storage import StorageDriver
from nbdqcow.errors import BlockError, CorruptImage
from nbdqcow.formats.qcow2.entries import (
    MAX_REFTABLE_BYTES,
    REFTABLE_RESERVED_MASK,
)
from nbdqcow.formats.qcow2.header import REFTABLE_FIELDS_OFFSET, Header
from nbdqcow.formats.qcow2.refcount_blocks import RefcountBlock, RefcountBlocks
from nbdqcow.formats.qcow2.refcount_codec import pack_counts, zero_counts
from nbdqcow.formats.words import dump_be64
from nbdqcow.units import SECTOR_SIZE

_MAX_FREE_RUNS: Final = 1 << 16


class Refcounts(RefcountBlocks):
    """The reference counts of an image, and the search for free clusters.

    Free clusters come from two places: ranges that this process has freed,
    kept in a heap, and a scan position that moves once from the start of the
    file upwards. No cluster is looked at twice by the scan.

    Attributes:
        fresh: indices of blocks that the table on disk does not know yet.
        metadata: cluster indices of tables, blocks and header: guest data is
            never written there. Shared with the driver.
        table_lock: held while entries of the table are written or the table
            moves; taken inside the image's lock, or without it.
        note_used: told the host offset up to which blocks and tables are put: these
            stay in the file, whatever becomes of them.
        put_off: told which clusters, first and how many, `give_back` could not
            give back.
        packed_end: host offset where the last compressed cluster ends and
            the next one may begin; 0 if that one gets a new host cluster.
    """

    def __init__(
        self,
        storage: StorageDriver,
        header: Header,
        table: "array[int]",
        metadata: set[int],
        cache_bytes: int = 4 << 20,
    ) -> None:
        super().__init__(storage, header, table, cache_bytes)
        self.metadata = metadata
        self.fresh: set[int] = set()
        self.table_lock = asyncio.Lock()
        self.note_used: Callable[[int], None] = lambda host_end: None
        self.put_off: Callable[[int, int], None] = lambda first, nb_clusters: None
        self.packed_end = 0
        # So many clusters can be in the file, as far as is known.
        self._nb_fitting = 0
        self._scan_index = 0
        self._free_runs: list[tuple[int, int]] = []
        # Clusters and new blocks of a table that the header on disk may name.
        self._doubtful: tuple[int, int] | None = None

    @property
    def may_have_moved(self) -> bool:
        """Whether the header on disk may name a larger table behind all that is
        counted, which is as this one is now."""
        return self._doubtful is not None

    # -- changing --------------------------------------------------------

    async def add(self, cluster_index: int, nb_clusters: int, change: int) -> None:
        """Add ``change`` (1 or -1) to the counts of a range of clusters.

        Raises `BlockError` before changing anything if a count would leave
        its limits; a count below 0 means that the image is corrupt.
        """
        pieces: list[tuple[int, RefcountBlock, int, int]] = []
        index, end = cluster_index, cluster_index + nb_clusters
        try:
            while index < end:
                block_index, first = divmod(index, self.block_entries)
                last = min(self.block_entries, first + end - index)
                block = await self._block(block_index)
                if block is None:
                    raise BlockError(
                        errno.EIO, f"host cluster {index:#x} has no refcount block"
                    )
                self._check_change(index, block.counts[first:last], change)
                block.pins += 1
                pieces.append((block_index, block, first, last))
                index += last - first
        finally:
            for _, block, _, _ in pieces:
                block.pins -= 1
        for block_index, block, first, last in pieces:
            counts = block.counts
            for i in range(first, last):
                counts[i] += change
            self._mark(block_index, block, first, last)
            if change < 0:
                self._note_free(block_index, counts, first, last)

    async def give_back(self, cluster_index: int, nb_clusters: int) -> None:
        """Take 1 off the counts of clusters that nothing names any more, now or, if
        they can't be read, with a later commit. Raises `CorruptImage`."""
        try:
            await self.add(cluster_index, nb_clusters, -1)
        except CorruptImage:
            raise
        except OSError:
            self.put_off(cluster_index, nb_clusters)

    def _check_change(self, index: int, counts: "array[int]", change: int) -> None:
        """Refuse to take counts, of clusters from ``index`` on, out of limits."""
        if change < 0 and 0 in counts:
            raise CorruptImage(
                f"refcount of a cluster in use is 0"
                f" (host cluster {index + counts.index(0):#x}): image is corrupt"
            )
        if change > 0 and max(counts) >= self.max_count:
            raise BlockError(errno.EINVAL, f"refcount would exceed {self.max_count}")

    def _note_free(
        self, block_index: int, counts: "array[int]", first: int, last: int
    ) -> None:
        base = block_index * self.block_entries
        start = None
        for i in range(first, last + 1):
            if i < last and counts[i] == 0:
                if start is None:
                    start = i
            elif start is not None:
                # A free cluster holds nothing, so no metadata either.
                self.metadata.difference_update(range(base + start, base + i))
                if base + start < self._scan_index:
                    heapq.heappush(self._free_runs, (base + start, i - start))
                start = None
        if len(self._free_runs) > _MAX_FREE_RUNS:
            self._scan_index = self._free_runs[0][0]
            self._free_runs.clear()

    def reload(self, table: "array[int]") -> None:
        """All refcounts were written anew, with the width in the header."""
        self._set_width(self.header.refcount_order)
        self.replace_table(table)
        self._scan_index = 0
        self._free_runs.clear()

    def replace_table(self, table: "array[int]") -> None:
        """Take another refcount table. Nothing under the old one is dirty."""
        self.table = table
        self.blocks.clear()
        self.packed_end = 0
        self._doubtful = None

    # -- giving blocks up ------------------------------------------------

    async def empty_blocks(self) -> list[int]:
        """Return the indices of the blocks that count nothing but themselves.

        Table entries that can't be right are left to a repair.
        """
        found: list[int] = []
        for block_index, offset in enumerate(self.table):
            if (
                not offset
                or offset & REFTABLE_RESERVED_MASK
                or offset & (self.cluster_size - 1)
                or offset >= self.storage.length
            ):
                continue
            block = await self._block(block_index)
            assert block is not None
            nb_used = self.block_entries - block.counts.count(0)
            cluster_index = offset >> self.cluster_bits
            is_inside = cluster_index // self.block_entries == block_index
            if nb_used == is_inside and await self.count(cluster_index) == 1:
                found.append(block_index)
        return found

    async def drop_blocks(self, block_indices: list[int]) -> None:
        """Free blocks that `empty_blocks` has found; nothing is dirty.

        The counts of those that other blocks count go down in memory once the
        table on disk names them no more. Raises `OSError`: what the table on
        disk names is unknown then.
        """
        clusters = [self.table[index] >> self.cluster_bits for index in block_indices]
        async with self.table_lock:
            for block_index in block_indices:
                self.table[block_index] = 0
                self.blocks.pop(block_index, None)
            base, words = self.header.refcount_table_offset, SECTOR_SIZE // 8
            for first in sorted({i // words * words for i in block_indices}):
                data = dump_be64(self.table[first : first + words])
                await self.storage.pwritev(base + first * 8, [data])
            await self.storage.flush()
        self.metadata.difference_update(clusters)
        for block_index, cluster_index in zip(block_indices, clusters, strict=True):
            if cluster_index // self.block_entries != block_index:
                await self.give_back(cluster_index, 1)
        # What was listed as free may have no block now.
        self._scan_index = 0
        self._free_runs.clear()

    # -- allocating ------------------------------------------------------

    async def allocate(self, nb_clusters: int) -> tuple[int, int]:
        """Take 1 to ``nb_clusters`` contiguous free clusters.

        Returns ``(cluster_index, count)``; their refcounts are 1 now.
        """
        self.storage.announce("cluster_alloc")
        while (taken := self.try_allocate(nb_clusters)) is None:
            await self.prepare_allocation()
        return taken

    def try_allocate(self, nb_clusters: int) -> tuple[int, int] | None:
        """Do as `allocate` does; None if a refcount block must be read or
        made first, which is what `prepare_allocation` does."""
        while self._free_runs:
            index, length = self._free_runs[0]
            block_index, first = divmod(index, self.block_entries)
            block = self.blocks.get(block_index)
            if block is None:
                return None
            self._check_room(index + 1)
            heapq.heappop(self._free_runs)
            # The scan may have turned back and used what is listed here.
            if block.counts[first]:
                continue
            got = self._take(block_index, block, first, min(nb_clusters, length))
            if got < length:
                heapq.heappush(self._free_runs, (index + got, length - got))
            return index, got
        block_index, first = divmod(self._scan_index, self.block_entries)
        block = self.blocks.get(block_index)
        if block is None:
            return None
        try:
            first = block.counts.index(0, first)
        except ValueError:
            self._scan_index = (block_index + 1) * self.block_entries
            return None
        got = self._take(block_index, block, first, nb_clusters)
        index = block_index * self.block_entries + first
        self._scan_index = index + got
        return index, got

    async def prepare_allocation(self) -> None:
        """Bring the block into memory where the next allocation looks."""
        if self._free_runs:
            await self._block(self._free_runs[0][0] // self.block_entries)
        else:
            await self._block_for_allocation(self._scan_index // self.block_entries)

    def untake(self, cluster_index: int, nb_clusters: int) -> None:
        """Give back what `try_allocate` has just returned."""
        block_index, first = divmod(cluster_index, self.block_entries)
        block = self.blocks[block_index]
        for i in range(first, first + nb_clusters):
            block.counts[i] = 0
        heapq.heappush(self._free_runs, (cluster_index, nb_clusters))

    def _check_free(self, index: int, nb_clusters: int) -> None:
        """Refuse clusters whose count of 0 can't be right."""
        if not self.metadata.isdisjoint(range(index, index + nb_clusters)):
            found = min(self.metadata.intersection(range(index, index + nb_clusters)))
            raise CorruptImage(
                f"Preventing invalid allocation of metadata cluster at offset"
                f" {found << self.cluster_bits:#x}; image is corrupt"
            )

    def _check_room(self, end: int) -> None:
        """Refuse clusters up to ``end`` that a device or an export has no room for: a
        commit that has to write tables there would fail for ever."""
        if end <= self._nb_fitting:
            return
        self._nb_fitting = self.storage.room() >> self.cluster_bits
        if end > self._nb_fitting:
            raise BlockError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _take(
        self, block_index: int, block: RefcountBlock, first: int, nb_clusters: int
    ) -> int:
        """Set up to ``nb_clusters`` zero counts from ``first`` on to 1."""
        counts = block.counts
        end = first
        limit = min(first + nb_clusters, self.block_entries)
        base = block_index * self.block_entries
        if base + limit > self._nb_fitting:
            self._check_room(base + first + 1)
            limit = min(limit, self._nb_fitting - base)
        while end < limit and counts[end] == 0 and base + end not in self.metadata:
            counts[end] = 1
            end += 1
        if end == first:
            self._check_free(base + first, 1)
        self._mark(block_index, block, first, end)
        return end - first

    async def allocate_bytes(self, length: int) -> int:
        """Take ``length`` bytes, less than a cluster, for compressed data.

        They follow those taken last if there is room for them, in the same
        cluster or with a free one behind it; each cluster counts one more.
        Returns their host offset.
        """
        self.storage.announce("cluster_alloc_bytes")
        start = self.packed_end
        index = start >> self.cluster_bits
        if start and await self.count(index) >= self.max_count:
            start = 0
        room = -start % self.cluster_size
        if length > room:
            new_index, _ = await self.allocate(1)
            if not start or new_index != index + 1:
                start, room = new_index << self.cluster_bits, 0
        if room:
            await self.add(index, 1, 1)
        end = start + length
        self.packed_end = end if end % self.cluster_size else 0
        return start

    def stop_packing(self, offset: int, length: int) -> None:
        """Something in this range of the file is being freed: put nothing
        behind it, for its clusters may go with it."""
        first = offset >> self.cluster_bits
        last = (offset + length - 1) >> self.cluster_bits
        if first <= self.packed_end >> self.cluster_bits <= last:
            self.packed_end = 0

    async def allocate_contiguous(self, nb_clusters: int, lowest: int = 0) -> int:
        """Take exactly ``nb_clusters`` clusters in a row; return the first,
        which is not below ``lowest``."""
        self.storage.announce("cluster_alloc")
        if nb_clusters >= self.block_entries:
            return await self._allocate_beyond_blocks(nb_clusters, lowest)
        try:
            run_start = await self._find_row(nb_clusters, max(lowest, self._scan_index))
        except BlockError as error:
            if error.errno != errno.ENOSPC:
                raise
            # Perhaps among those that were freed.
            run_start = await self._find_row(nb_clusters, lowest)
        self._check_free(run_start, nb_clusters)
        await self.add(run_start, nb_clusters, 1)
        return run_start

    async def _find_row(self, nb_clusters: int, run_start: int) -> int:
        """Return the first of so many free clusters in a row, ``run_start`` or one
        behind it. Raises `BlockError` if there is no room for them."""
        end = run_start
        while end - run_start < nb_clusters:
            block_index, first = divmod(end, self.block_entries)
            counts = (await self._block_for_allocation(block_index)).counts
            if end == run_start:
                # Nearly all counts are passed here, in long strides.
                try:
                    first = counts.index(0, first)
                except ValueError:
                    run_start = end = (block_index + 1) * self.block_entries
                    continue
                run_start = end = block_index * self.block_entries + first
            limit = min(self.block_entries, first + nb_clusters - (end - run_start))
            while first < limit and not counts[first]:
                first += 1
                end += 1
            if first < limit:
                run_start = end = end + 1
        self._check_room(run_start + nb_clusters)
        return run_start

    async def _allocate_beyond_blocks(self, nb_clusters: int, lowest: int) -> int:
        """Do as `allocate_contiguous` does for a row longer than the clusters
        of one new block, which begin with the block itself: put all blocks
        that the row needs before it."""
        while True:
            nb_blocks = len(self.table)
            while nb_blocks and not self.table[nb_blocks - 1]:
                nb_blocks -= 1
            nb_blocks = max(nb_blocks, -(-lowest // self.block_entries))
            nb_new = 1
            while nb_new * self.block_entries < nb_new + nb_clusters:
                nb_new += 1
            if nb_blocks + nb_new <= len(self.table) and not self.may_have_moved:
                break
            async with self.table_lock:
                await self._grow_table(nb_blocks + nb_new - 1)
        start = nb_blocks * self.block_entries
        self._check_room(start + nb_new + nb_clusters)
        self._check_free(start, nb_new + nb_clusters)
        await self.write_empty(start, nb_new)
        for i in range(nb_new):
            block = self._new_block(nb_new - i * self.block_entries)
            self._keep(nb_blocks + i, block)
            self._add_block(nb_blocks + i, start + i, block)
        await self.add(start + nb_new, nb_clusters, 1)
        return start + nb_new

    async def _block_for_allocation(self, block_index: int) -> RefcountBlock:
        """Return a block, making it (and room in the table) if need be."""
        block = await self._block(block_index)
        if block is not None:
            return block
        while block_index >= len(self.table) or self.may_have_moved:
            async with self.table_lock:
                await self._grow_table(block_index)
            block = await self._block(block_index)
            if block is not None:
                return block
        first = block_index * self.block_entries
        self._check_room(first + 1)
        # Of a damaged image the block may be missing while clusters are in use.
        self._check_free(first, self.block_entries)
        await self.write_empty(first, 1)
        # All clusters that a missing block covers are free: it describes
        # itself from the first of them.
        block = self._new_block(1)
        self._keep(block_index, block)
        self._add_block(block_index, first, block)
        return block

    def _new_block(self, nb_used: int) -> RefcountBlock:
        """Return a block of which the first ``nb_used`` counts are 1: all of them if
        it has no more, none if that is below 1."""
        counts = zero_counts(self.order, self.block_entries)
        for index in range(min(nb_used, self.block_entries)):
            counts[index] = 1
        return RefcountBlock(counts)

    async def write_empty(self, cluster_index: int, nb_clusters: int) -> None:
        """Write zeroes to clusters that are to have tables. A commit, which is for
        others as well, is too late to find out that the disk is full."""
        offset = cluster_index << self.cluster_bits
        zeroes = bytes(self.cluster_size)
        for start in range(offset, offset + nb_clusters * len(zeroes), len(zeroes)):
            if not self.storage.try_pwrite(start, zeroes):
                await self.storage.pwritev(start, [zeroes])

    def _add_block(
        self, block_index: int, cluster_index: int, block: RefcountBlock
    ) -> None:
        self.storage.announce("refblock_alloc")
        self.mark_whole(block_index, block)
        self.fresh.add(block_index)
        self.metadata.add(cluster_index)
        self.note_used((cluster_index + 1) << self.cluster_bits)
        self.table[block_index] = cluster_index << self.cluster_bits

    def _larger_table(self, nb_entries: int) -> tuple[int, int]:
        """Return how many clusters a table of that many entries or more has, and how
        many blocks behind those of today describe it and themselves.

        Raises `BlockError`.
        """
        per_cluster = self.cluster_size // 8
        while True:
            table_clusters = -(-nb_entries // per_cluster)
            nb_blocks = 1
            while nb_blocks * self.block_entries < nb_blocks + table_clusters:
                nb_blocks += 1
            if len(self.table) + nb_blocks <= table_clusters * per_cluster:
                break
            nb_entries = len(self.table) + nb_blocks
        if table_clusters * self.cluster_size > MAX_REFTABLE_BYTES:
            raise BlockError(errno.EFBIG, "refcount table would be too large")
        return table_clusters, nb_blocks

    async def _grow_table(self, block_index: int) -> None:
        """Move the refcount table to a larger place that covers a block.

        The new table and the blocks that describe it go to the start of the
        range that the old table could not describe, where all is free. The
        switch is one write of 12 header bytes between two flushes. If one before
        may have taken place, the table becomes the same again, covering the block
        or not: another one would be written over it.
        """
        self.storage.announce("reftable_grow")
        old_offset = self.header.refcount_table_offset
        old_clusters = self.header.refcount_table_clusters
        first_block = len(self.table)
        start = first_block * self.block_entries
        table_clusters, nb_blocks = self._doubtful or self._larger_table(
            max(block_index + 1, first_block * 2)
        )
        table = self.table[:]
        nb_entries = table_clusters * self.cluster_size // 8
        table.extend([0] * (nb_entries - first_block))
        used = nb_blocks + table_clusters
        self._check_room(start + used)
        self.note_used((start + used) << self.cluster_bits)
        blocks = []
        for i in range(nb_blocks):
            blocks.append(self._new_block(used - i * self.block_entries))
            table[first_block + i] = (start + i) << self.cluster_bits
        # Blocks that the old table on disk has no entry for yet go out with
        # the new table: it must never point at garbage.
        self.storage.announce("refblock_alloc_write_blocks")
        for index in self.fresh:
            await self.storage.pwritev(
                table[index], [pack_counts(self.blocks[index].counts, self.order)]
            )
        for i, block in enumerate(blocks):
            await self.storage.pwritev(
                table[first_block + i], [pack_counts(block.counts, self.order)]
            )
        new_offset = (start + nb_blocks) << self.cluster_bits
        self.storage.announce("refblock_alloc_write_table")
        await self.storage.pwritev(new_offset, [dump_be64(table)])
        await self.storage.flush()
        pointer = new_offset.to_bytes(8, "big") + table_clusters.to_bytes(4, "big")
        # Should this fail, nobody knows which table is valid: no block is added
        # to the old one before this has been done again, at the same place.
        self._doubtful = table_clusters, nb_blocks
        self.storage.announce("refblock_alloc_switch_table")
        await self.storage.pwritev(REFTABLE_FIELDS_OFFSET, [pointer])
        await self.storage.flush()
        self._doubtful = None
        self.fresh.clear()
        self.table = table
        self.header.refcount_table_offset = new_offset
        self.header.refcount_table_clusters = table_clusters
        for i, block in enumerate(blocks):
            self._keep(first_block + i, block)
        self.metadata.update(range(start, start + used))
        old_first = old_offset >> self.cluster_bits
        self.metadata.difference_update(range(old_first, old_first + old_clusters))
        await self.give_back(old_first, old_clusters)

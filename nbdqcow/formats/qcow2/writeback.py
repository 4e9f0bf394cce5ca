"""Ordered write-back: how metadata reaches the disk, and when a cluster is free.

A commit takes one consistent picture of all that is dirty and writes it so
that a power cut at any point, with any subset of the writes since the last
flush on disk, leaves leaked clusters at worst:

1. refcount blocks the table on disk does not know yet; a flush; their table
   entries. (Seldom: a block of 64 KiB describes 2 GiB.)
2. refcount blocks with new counts, and L2 tables no L1 entry on disk knows yet.
3. a flush: it also covers guest data and copy-on-write data written so far.
4. L2 and L1 entries. All that they name is on disk by now.
5. a flush. What the guest wrote before the commit is durable.
6. clusters whose last reference went away in 4 are given back: their counts
   go down in memory, and to disk with some later commit.

Step 6 also waits until no request is in flight that may still read or write
such a cluster. Until then its count keeps it from being allocated, so no
quarantine list is needed beside the counts. What can't be given back, since its
refcount block can't be read, is tried again after the next commit.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING

from nbdqcow.errors import CorruptImage
from nbdqcow.formats.qcow2.refcount_codec import pack_counts
from nbdqcow.formats.tasks import SharedCommits
from nbdqcow.formats.words import dump_be64

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.driver import Qcow2Driver

_SECTOR_WORDS = 512 // 8
_NB_ATTEMPTS = 3
"""To give back, before an image is closed, what could not be given back."""


class Freed:
    """Ranges of host clusters that lost one reference each.

    ``discard``: the space under them should go back to the file system;
    ``always_discard``: under all of them.
    """

    __slots__ = ("_always_discard", "nb_clusters", "ranges")

    def __init__(self, always_discard: bool = False) -> None:
        self._always_discard = always_discard
        self.ranges: list[tuple[int, int, bool]] = []
        self.nb_clusters = 0

    def add(self, cluster_index: int, nb_clusters: int, discard: bool) -> None:
        """Note a range; neighbours are merged."""
        self.nb_clusters += nb_clusters
        discard = discard or self._always_discard
        if self.ranges:
            start, count, last_discard = self.ranges[-1]
            if start + count == cluster_index and last_discard == discard:
                self.ranges[-1] = (start, count + nb_clusters, discard)
                return
        self.ranges.append((cluster_index, nb_clusters, discard))

    def take_back(self, other: "Freed") -> None:
        """Put ranges back whose write-back failed."""
        self.ranges[:0] = other.ranges
        self.nb_clusters += other.nb_clusters


class _Picture:
    """What was dirty at one moment, in the form that goes to disk."""

    def __init__(self, image: "Qcow2Driver", *, accurate: bool) -> None:
        """``accurate``: with the refcounts; without them the image must be
        marked as dirty first."""
        tables, refcounts = image.tables, image.refcounts
        cluster_size = image.cluster_size
        self.accurate = accurate
        self.fresh_blocks = set(refcounts.fresh) if accurate else set()
        self.blocks: list[tuple[int, int, bytes]] = []
        self.block_objects = dict(refcounts.dirty) if accurate else {}
        for index, block in self.block_objects.items():
            data = pack_counts(block.counts, refcounts.order)
            first, end = 0, cluster_size
            if index not in self.fresh_blocks:
                bits = refcounts.order
                first = (block.changed_first << bits) // 8 & ~511
                end = min(cluster_size, ((block.changed_end << bits) // 8 | 511) + 1)
            block.changed_first = block.changed_end = 0
            block.pins += 1
            self.blocks.append((index, refcounts.table[index] + first, data[first:end]))
        if accurate:
            refcounts.dirty.clear()
        self.refcount_table = refcounts.table
        self.fresh_tables = dict(tables.fresh)
        self.slices = list(tables.dirty.values())
        self.slice_ranges = [(s.dirty_first, s.dirty_end) for s in self.slices]
        self.table_writes: list[tuple[int, bytes]] = []
        self.slice_writes: list[tuple[int, bytes]] = []
        contents = {index: bytearray(cluster_size) for index in self.fresh_tables}
        for s in self.slices:
            l1_index = tables.l1_index(s.key)
            if l1_index not in contents:
                first = s.dirty_first // _SECTOR_WORDS * _SECTOR_WORDS
                end = -(-s.dirty_end // _SECTOR_WORDS) * _SECTOR_WORDS
                offset = tables.slice_offset(s.key) + first * 8
                words = s.words[first:end]
                self.slice_writes.append((offset, tables.dump_entries(words)))
            s.dirty_first = s.dirty_end = 0
            s.pins += 1
        tables.dirty.clear()
        for index, content in contents.items():
            for slot, s in tables.cached_slices(index):
                start = slot * tables.slice_bytes
                content[start : start + tables.slice_bytes] = tables.dump_entries(
                    s.words
                )
            self.table_writes.append((self.fresh_tables[index], bytes(content)))
        self.dirty_l1 = set(tables.dirty_l1)
        tables.dirty_l1.clear()
        self.l1_writes = [
            (tables.l1_offset + first * 8, dump_be64(tables.l1[first:end]))
            for first, end in _sectors(self.dirty_l1, len(tables.l1))
        ]
        self.freed = image.take_freed()

    def put_back(self, image: "Qcow2Driver") -> None:
        """The commit failed: all of it is dirty again."""
        for index, block in self.block_objects.items():
            image.refcounts.mark_whole(index, block)
        for s, (first, end) in zip(self.slices, self.slice_ranges, strict=True):
            image.tables.mark_dirty(s, first, end)
        image.tables.dirty_l1 |= self.dirty_l1
        image.freed.take_back(self.freed)

    def release(self) -> None:
        """Let the caches drop what was pinned for the commit."""
        for block in self.block_objects.values():
            block.pins -= 1
        for s in self.slices:
            s.pins -= 1


def _sectors(indices: Iterable[int], length: int) -> list[tuple[int, int]]:
    """Return half-open word ranges of the 512-byte sectors with ``indices``."""
    sectors = sorted({i // _SECTOR_WORDS for i in indices})
    return [(s * _SECTOR_WORDS, min((s + 1) * _SECTOR_WORDS, length)) for s in sectors]


class Writeback:
    """The commits of one image, and what is given back after them.

    Attributes:
        waiting: what was freed durably and is not given back yet.
    """

    def __init__(self, image: "Qcow2Driver") -> None:
        self.image = image
        self._commits = SharedCommits(self._commit)
        self._dropping = asyncio.Lock()
        self.waiting: list[Freed] = []
        self._told_of_error = False
        self._accurate_wanted = False

    async def flush(self, *, accurate: bool = False) -> None:
        """Make all that was answered before this call durable.

        ``accurate``: also refcounts that need not be right yet (lazy refcounts).
        """
        self._accurate_wanted |= accurate
        await self._commits.run()

    def start(self) -> None:
        """Begin a commit in the background, unless one waits already."""
        self._commits.start()

    async def _commit(self) -> None:
        image = self.image
        if not image.metadata_dirty:
            # Taken before the flush: what is freed while it runs is still
            # named by entries on disk.
            freed = image.take_freed()
            try:
                await self.flush_files()
            except BaseException:
                image.freed.take_back(freed)
                raise
            self._give_back(freed)
            return
        async with image.lock:
            picture = self._take_picture(accurate=self._accurate_wanted)
            self._accurate_wanted = False
        try:
            await self._carry_out(picture)
        except BaseException:
            # Who wanted that may wait for the next commit, if this one had begun.
            self._accurate_wanted |= picture.accurate
            raise

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Let no commit run and give no clusters back meanwhile.

        Take it before the image's lock.
        """
        async with self._commits.running, self._dropping:
            yield

    async def commit_alone(self) -> None:
        """Commit what is dirty. Commits are paused and the lock is held."""
        await self._carry_out(self._take_picture(accurate=True))

    def _take_picture(self, *, accurate: bool) -> _Picture:
        image = self.image
        accurate |= not image.lazy_refcounts or image.refcounts.many_dirty
        return _Picture(image, accurate=accurate)

    async def _carry_out(self, picture: _Picture) -> None:
        image, storage = self.image, self.image.storage
        try:
            await self._write_refcounts(picture)
            for offset, data in picture.table_writes:
                storage.announce("l2_alloc_write")
                await storage.pwritev(offset, [data])
            if not picture.accurate and (picture.slice_writes or picture.l1_writes):
                await image.mark_dirty()
            await self.flush_files()
            # The tables are whole now. From here on a change to one of them
            # may go to disk only after what it names, like any other's.
            for index, offset in picture.fresh_tables.items():
                if image.tables.fresh.get(index) == offset:
                    del image.tables.fresh[index]
            if picture.slice_writes or picture.l1_writes:
                for offset, data in picture.slice_writes:
                    storage.announce("l2_update")
                    await storage.pwritev(offset, [data])
                for offset, data in picture.l1_writes:
                    storage.announce("l1_update")
                    await storage.pwritev(offset, [data])
                storage.announce("flush_to_disk")
                await storage.flush()
        except BaseException:
            picture.put_back(image)
            raise
        finally:
            picture.release()
        self._give_back(picture.freed)

    async def flush_files(self) -> None:
        """Make all that was written so far durable."""
        image = self.image
        if image.data is not image.storage:
            await image.data.flush()
        image.storage.announce("flush_to_disk")
        await image.storage.flush()

    async def _write_refcounts(self, picture: _Picture) -> None:
        """Steps 1 and 2: counts before what they count."""
        refcounts, storage = self.image.refcounts, self.image.storage
        if picture.fresh_blocks:
            async with refcounts.table_lock:
                for index, offset, data in picture.blocks:
                    if index in picture.fresh_blocks:
                        storage.announce("refblock_alloc_write")
                        await storage.pwritev(offset, [data])
                await storage.flush()
                # A table that has moved since went to disk with its entries.
                if refcounts.table is picture.refcount_table:
                    base = refcounts.header.refcount_table_offset
                    words = len(refcounts.table)
                    known = refcounts.table[:]
                    for index in refcounts.fresh - picture.fresh_blocks:
                        known[index] = 0
                    for first, end in _sectors(picture.fresh_blocks, words):
                        storage.announce("refblock_alloc_hookup")
                        await storage.pwritev(
                            base + first * 8, [dump_be64(known[first:end])]
                        )
                refcounts.fresh -= picture.fresh_blocks
        for index, offset, data in picture.blocks:
            if index not in picture.fresh_blocks:
                storage.announce("refblock_update_part")
                await storage.pwritev(offset, [data])

    def _give_back(self, freed: Freed) -> None:
        """Step 6, beside whatever else goes on."""
        if freed.ranges:
            self.waiting.append(freed)
            self.image.tasks.spawn(self._drop_references(freed))
        else:
            self._trim_if_wanted()

    async def drop(self, freed: Freed) -> None:
        """Give back what nothing on disk names any more, as a commit does."""
        self.waiting.append(freed)
        await self._drop_references(freed)

    def _trim_if_wanted(self) -> None:
        image = self.image
        if image.trim_wanted and not self.waiting:
            from nbdqcow.formats.qcow2 import resize

            image.trim_wanted = False
            image.tasks.spawn(resize.trim(image))

    async def _drop_references(self, freed: Freed) -> None:
        image = self.image
        await image.epochs.quiet()
        freed.ranges.reverse()
        error: OSError | None = None
        try:
            while freed.ranges:
                async with self._dropping:
                    # A snapshot operation may have seen to them all.
                    if not freed.ranges:
                        break
                    try:
                        await self._drop_range(*freed.ranges[-1])
                    except CorruptImage:
                        raise
                    except OSError as raised:
                        # A block that can't be read now: with the next commit.
                        error = raised
                        image.freed.add(*freed.ranges[-1])
                    freed.ranges.pop()
        finally:
            self.waiting.remove(freed)
        told, self._told_of_error = self._told_of_error, error is not None
        if error is None:
            self._trim_if_wanted()
        elif not told:
            raise error

    async def _drop_range(self, index: int, nb_clusters: int, discard: bool) -> None:
        image = self.image
        image.storage.announce("cluster_free")
        if discard:
            for first, count in await self._unshared(index, nb_clusters):
                # Before the count goes down, or the hole would be punched
                # under the cluster's next user. A hint: it may fail.
                with contextlib.suppress(OSError):
                    await image.storage.discard(
                        first << image.cluster_bits, count << image.cluster_bits
                    )
        async with image.lock:
            await image.refcounts.add(index, nb_clusters, -1)

    async def _unshared(self, index: int, nb_clusters: int) -> list[tuple[int, int]]:
        """Return the parts of a range whose last reference is going away."""
        parts: list[tuple[int, int]] = []
        async with self.image.lock:
            for i in range(index, index + nb_clusters):
                if await self.image.refcounts.count(i) != 1:
                    continue
                if parts and sum(parts[-1]) == i:
                    parts[-1] = (parts[-1][0], parts[-1][1] + 1)
                else:
                    parts.append((i, 1))
        return parts

    async def finish(self) -> None:
        """Bring everything to disk, the counts of freed clusters included."""
        await self.image.tasks.settle()
        await self.flush()
        await self.image.tasks.settle()
        for _ in range(_NB_ATTEMPTS):
            await self.flush(accurate=True)
            await self.image.tasks.settle()
            # Nearly always there is nothing left: see `_drop_references`.
            if not (self.image.freed.ranges or self.image.metadata_dirty):
                break
        await self.image.mark_clean()

"""Ordered write-back: how the tables reach the disk.

A commit takes one consistent picture of all that is dirty and writes it so
that a power cut at any point, with any subset of the writes since the last
flush on disk, leaves unused space in the file at worst:

1. L2 tables that no L1 entry on disk names yet, whole;
2. a flush: it also covers guest data and copy-on-write data written so far;
3. L2 and L1 entries. All that they name is on disk by now;
4. a flush. What the guest wrote before the commit is durable.
"""

from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nbdqcow.formats.tasks import SharedCommits
from nbdqcow.formats.words import dump_be64

if TYPE_CHECKING:
    from nbdqcow.formats.qcow1.driver import Qcow1Driver


class _Picture:
    """What was dirty at one moment, in the form that goes to disk."""

    def __init__(self, image: "Qcow1Driver") -> None:
        tables = image.tables
        self.fresh = dict(tables.fresh)
        self.slices = list(tables.dirty.values())
        self.slice_ranges = [(s.dirty_first, s.dirty_end) for s in self.slices]
        self.entry_writes: list[tuple[int, bytes]] = []
        for s in self.slices:
            if tables.l1_index(s.key) not in self.fresh:
                first, end = s.dirty_first, s.dirty_end
                offset = tables.slice_offset(s.key) + first * 8
                self.entry_writes.append((offset, dump_be64(s.words[first:end])))
            s.dirty_first = s.dirty_end = 0
            s.pins += 1
        tables.dirty.clear()
        self.table_writes = [
            (offset, tables.table_content(index))
            for index, (offset, _) in self.fresh.items()
        ]
        self.dirty_l1 = set(tables.dirty_l1)
        tables.dirty_l1.clear()
        self.entry_writes += [
            (tables.l1_offset + first * 8, dump_be64(array("Q", tables.l1[first:end])))
            for first, end in _runs(sorted(self.dirty_l1))
        ]

    def put_back(self, image: "Qcow1Driver") -> None:
        """The commit failed: all of it is dirty again."""
        for s, (first, end) in zip(self.slices, self.slice_ranges, strict=True):
            image.tables.mark_dirty(s, first, end)
        image.tables.dirty_l1 |= self.dirty_l1

    def release(self) -> None:
        """Let the cache drop what was pinned for the commit."""
        for s in self.slices:
            s.pins -= 1


def _runs(indices: list[int]) -> Iterator[tuple[int, int]]:
    """Yield half-open ranges of neighbours; ``indices`` ascend."""
    start = end = -1
    for index in indices:
        if index != end:
            if start >= 0:
                yield start, end
            start = index
        end = index + 1
    if start >= 0:
        yield start, end


class Writeback:
    """The commits of one image.

    Attributes:
        running: see `SharedCommits`.
    """

    def __init__(self, image: "Qcow1Driver") -> None:
        self._image = image
        self._commits = SharedCommits(self._commit)
        self.running = self._commits.running

    async def make_room(self) -> None:
        """Wait for a commit if much of the table cache is dirty."""
        tables = self._image.tables
        if tables.dirty_bytes > tables.dirty_limit:
            await self.flush()

    async def flush(self) -> None:
        """Make all that was answered before this call durable."""
        await self._commits.run()

    async def _commit(self) -> None:
        image, storage = self._image, self._image.storage
        if not image.tables.is_dirty:
            storage.announce("flush_to_disk")
            await storage.flush()
            return
        async with image.lock:
            picture = _Picture(image)
        try:
            for offset, data in picture.table_writes:
                storage.announce("l2_update")
                await storage.pwritev(offset, [data])
            storage.announce("flush_to_disk")
            await storage.flush()
            # The tables are whole now. From here on a change to one of them
            # may go to disk only after what it names, like any other's.
            for index in picture.fresh:
                del image.tables.fresh[index]
            for offset, data in picture.entry_writes:
                is_l1 = 0 <= offset - image.tables.l1_offset < image.header.l1_bytes
                storage.announce("l1_update" if is_l1 else "l2_update")
                await storage.pwritev(offset, [data])
            if picture.entry_writes:
                storage.announce("flush_to_disk")
                await storage.flush()
        except BaseException:
            picture.put_back(image)
            raise
        finally:
            picture.release()

"""The L1 table and the cache of L2 slices.

An L2 table has 512 bytes to 64 KiB, whatever the cluster size, and is cached in
slices of at most 4 KiB, so that a miss costs one small read. In memory a slice
is an ``array('Q')`` in native byte order.

Entries that name what is past the file's end can only be damage. New clusters
go to the end of the file, so such an entry would soon name another cluster's
bytes; it is taken out of the tables in memory (and not on disk) when they are
read, and reading or writing through it fails.
"""

from array import array
from bisect import bisect_left
from typing import Final

from nbdqcow.block.storage import StorageDriver
from nbdqcow.errors import CorruptImage
from nbdqcow.formats.qcow1.header import COMPRESSED, Header, compressed_range
from nbdqcow.formats.qcow1.l1_table import L1Words, used_entries
from nbdqcow.formats.words import dump_be64, load_be64
from nbdqcow.types import Buffer
from nbdqcow.units import SECTOR_SIZE

SLICE_BYTES: Final = 4096
DAMAGED: Final = 1
"""What stands in memory for an entry that can't be right: not aligned."""

_NB_AT_A_TIME: Final = 512
"""L1 entries looked at for one answer: there may be millions."""
_ALIGNMENT_MASK: Final = SECTOR_SIZE - 1


class L2Slice:
    """A part of one L2 table, all of it if the table is small.

    Attributes:
        key: guest offset divided by the bytes that a slice maps.
        words: the entries, native order.
        checked: for each entry, whether its cluster was found not to overlap
            with metadata; that never changes, for metadata does not move.
        damaged: whether an entry is `DAMAGED` here. The file keeps what it
            has, so such a slice must not be written.
        dirty_first, dirty_end: the words changed since the last write-back
            began, as a half-open range; empty when equal.
        pins: users that keep the slice in the cache.
    """

    __slots__ = (
        "checked",
        "damaged",
        "dirty_end",
        "dirty_first",
        "key",
        "pins",
        "words",
    )

    def __init__(self, key: int, words: "array[int]") -> None:
        self.key = key
        self.words = words
        self.checked = bytearray(len(words))
        self.damaged = False
        self.dirty_first = 0
        self.dirty_end = 0
        self.pins = 0


class Tables:
    """L1 in memory, L2 in a bounded cache, and what of both is not on disk.

    The cache has two generations: a hit in ``young`` costs one dictionary
    access and no bookkeeping; when ``young`` is half the budget it becomes
    ``old``, and what has not been used by the next turn is dropped: the least
    used leaves first. Slices that are dirty or pinned survive every turn.

    Attributes:
        l1: the entries, native order.
        l1_offset: where the table is in the file.
        slice_shift: ``guest_offset >> slice_shift`` is a slice's key.
        fresh: L1 index to host offset of L2 tables that were allocated but
            never written, and to where the file ended before.
        dirty: slices by key with changes that are not on disk.
        dirty_l1: indices of L1 entries that are not on disk.
        table_offsets: of all L2 tables, ascending.
    """

    def __init__(
        self,
        storage: StorageDriver,
        header: Header,
        l1: L1Words,
        *,
        file_end: int,
        cache_bytes: int,
    ) -> None:
        """``file_end`` is where the file ended when it was opened, rounded up
        to a cluster: nothing that is in the tables now lies behind it."""
        self.storage = storage
        self.l1 = l1
        self.l1_offset = header.l1_table_offset
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.table_bytes = header.l2_table_bytes
        self.slice_bytes = min(SLICE_BYTES, self.table_bytes)
        self.slice_entries = self.slice_bytes // 8
        self.slice_shift = self.cluster_bits + self.slice_entries.bit_length() - 1
        self._slots_bits = (self.table_bytes // self.slice_bytes).bit_length() - 1
        self.l1_shift = self.slice_shift + self._slots_bits
        self.young: dict[int, L2Slice] = {}
        self.old: dict[int, L2Slice] = {}
        # An array of n words takes 8 n + 64 bytes, their marks n + 56; the
        # slice and its places in dictionaries about 350 more.
        taken = self.slice_bytes * 9 // 8 + 470
        self._generation_limit = max(4, cache_bytes // (2 * taken))
        self.fresh: dict[int, tuple[int, int]] = {}
        self.dirty: dict[int, L2Slice] = {}
        self.dirty_l1: set[int] = set()
        self._loading: dict[int, object] = {}
        self._file_end = file_end
        # Slices that have entries of ours, which lie behind that end.
        self._extended: set[int] = set()
        self._fixed_ranges = header.ranges
        self._damaged_l1: dict[int, int] = {}
        self.table_offsets = array("Q")
        self._screen_l1()

    def _screen_l1(self) -> None:
        """Take entries out that name no place for an L2 table of its own."""
        offsets = sorted((entry, index) for index, entry in used_entries(self.l1))
        fixed_end = max(stop for _, stop in self._fixed_ranges)
        previous_end, previous_index = 0, -1
        good: dict[int, int] = {}
        for entry, index in offsets:
            end = entry + self.table_bytes
            if (
                entry & _ALIGNMENT_MASK
                or end > self._file_end
                or (entry < fixed_end and self._is_fixed(entry, end))
            ):
                self._damaged_l1[index] = entry
            elif entry < previous_end:
                # Two that overlap: nobody knows which of them is right.
                self._damaged_l1[index] = entry
                self._damaged_l1[previous_index] = self.l1[previous_index]
                good.pop(previous_index, None)
                previous_end = max(previous_end, end)
            else:
                good[index] = entry
                previous_end, previous_index = end, index
        self.table_offsets.extend(good.values())
        for index in self._damaged_l1:
            self.l1[index] = DAMAGED

    # -- looking up ------------------------------------------------------

    def l1_index(self, key: int) -> int:
        """Return the index of the L1 entry above the slice ``key``."""
        return key >> self._slots_bits

    def table_offset(self, l1_index: int) -> int:
        """Return the host offset of an L2 table, 0 if there is none.

        Raises `CorruptImage` if the entry can't be right.
        """
        offset = self.l1[l1_index]
        if offset == DAMAGED:
            raise CorruptImage(
                f"L2 table offset {self._damaged_l1[l1_index]:#x} can't be right"
                f" (L1 index: {l1_index:#x})"
            )
        return offset

    def empty_until(self, offset: int, end: int) -> int:
        """Return how far (at most ``end``) no L2 table maps guest bytes from
        ``offset`` on; ``offset`` itself if one does."""
        l1, l1_index = self.l1, offset >> self.l1_shift
        first = l1_index
        last = min((end - 1) >> self.l1_shift, first + _NB_AT_A_TIME)
        while l1_index <= last and not l1[l1_index]:
            l1_index += 1
        if l1_index == first:
            return offset
        return min(end, l1_index << self.l1_shift)

    def cached(self, key: int) -> L2Slice | None:
        """Return a slice if it is in memory."""
        found = self.young.get(key)
        if found is None:
            found = self.old.pop(key, None)
            if found is not None:
                self._insert(found)
        return found

    def try_load(self, key: int) -> L2Slice | None:
        """Return a slice that is in memory or in reach without waiting.

        The caller has made sure that its L2 table exists.
        """
        found = self.cached(key)
        if found is not None:
            return found
        if self.l1_index(key) in self.fresh:
            return self._insert(L2Slice(key, array("Q", bytes(self.slice_bytes))))
        data = self.storage.try_pread(self.slice_offset(key), self.slice_bytes)
        return None if data is None else self._insert(self._parse(key, data))

    async def load(self, key: int) -> L2Slice:
        """Return a slice, reading it if needed. Its L2 table exists, or did
        before the image was emptied."""
        found = self.try_load(key)
        while found is None:
            # While we wait, somebody else may load the slice, change it, and
            # see it written back and dropped: what we read is stale then.
            ticket = self._loading.setdefault(key, object())
            if not self.table_offset(self.l1_index(key)):
                return L2Slice(key, array("Q", bytes(self.slice_bytes)))
            self.storage.announce("l2_load")
            data = await self.storage.pread(self.slice_offset(key), self.slice_bytes)
            found = self.cached(key)
            if found is None and self._loading.get(key) is ticket:
                found = self._insert(self._parse(key, data))
        return found

    def _parse(self, key: int, data: Buffer) -> L2Slice:
        """Return a slice as it was read, its impossible entries taken out."""
        loaded = L2Slice(key, load_be64(data))
        words, end = loaded.words, self._file_end
        if key in self._extended or max(words) <= end - self.cluster_size:
            return loaded
        for index, entry in enumerate(words):
            if entry & COMPRESSED:
                offset, length = compressed_range(entry, self.cluster_bits)
                entry_end = offset + length
            else:
                entry_end = entry + self.cluster_size if entry else 0
            if entry_end > end:
                words[index] = DAMAGED
                loaded.damaged = True
        return loaded

    def slice_offset(self, key: int) -> int:
        """Return where a slice is in the file; its L2 table exists."""
        slot = key & ((1 << self._slots_bits) - 1)
        return self.table_offset(self.l1_index(key)) + slot * self.slice_bytes

    def table_content(self, l1_index: int) -> bytes:
        """Return what a fresh table is to hold on disk."""
        content = bytearray(self.table_bytes)
        first_key = l1_index << self._slots_bits
        for slot in range(1 << self._slots_bits):
            found = self.young.get(first_key + slot) or self.old.get(first_key + slot)
            if found is not None:
                start = slot * self.slice_bytes
                data = dump_be64(found.words)
                content[start : start + self.slice_bytes] = data
        return bytes(content)

    def _insert(self, new: L2Slice) -> L2Slice:
        if len(self.young) >= self._generation_limit:
            kept = {k: s for k, s in self.old.items() if s.pins or k in self.dirty}
            kept.update(self.young)
            self.old = kept
            # In place: the mapping holds on to this very dictionary.
            self.young.clear()
        self.young[new.key] = new
        self._loading.pop(new.key, None)
        return new

    def overlaps_metadata(self, offset: int) -> bool:
        """Whether the cluster at a host offset overlaps with a table, the
        header or the backing file's name."""
        end = offset + self.cluster_size
        if self._is_fixed(offset, end):
            return True
        offsets = self.table_offsets
        index = bisect_left(offsets, end)
        return index > 0 and offsets[index - 1] + self.table_bytes > offset

    def _is_fixed(self, offset: int, end: int) -> bool:
        return any(offset < stop and start < end for start, stop in self._fixed_ranges)

    # -- changing --------------------------------------------------------

    def mark_dirty(self, changed: L2Slice, first: int, end: int) -> None:
        """Words ``first`` to ``end`` (half-open) of a slice have changed."""
        self._extended.add(changed.key)
        if changed.dirty_first == changed.dirty_end:
            changed.dirty_first, changed.dirty_end = first, end
            self.dirty[changed.key] = changed
        else:
            changed.dirty_first = min(changed.dirty_first, first)
            changed.dirty_end = max(changed.dirty_end, end)

    def mark_l1_dirty(self) -> None:
        """All of the L1 table may be missing on disk."""
        self.dirty_l1.update(
            index for index, entry in used_entries(self.l1) if entry != DAMAGED
        )

    def add_table(self, l1_index: int, offset: int, old_end: int) -> None:
        """Link a new, all-zero L2 table whose place nobody has written; the
        file's used part ended at ``old_end`` before."""
        self.fresh[l1_index] = offset, old_end
        self.l1[l1_index] = offset
        self.dirty_l1.add(l1_index)
        self.table_offsets.append(offset)

    def drop_table(self, l1_index: int) -> None:
        """Unlink a fresh table that maps nothing; it was the last one made."""
        offset, _ = self.fresh.pop(l1_index)
        assert self.table_offsets[-1] == offset
        self.table_offsets.pop()
        self.l1[l1_index] = 0
        self.dirty_l1.discard(l1_index)
        first_key = l1_index << self._slots_bits
        for key in range(first_key, first_key + (1 << self._slots_bits)):
            self.young.pop(key, None)
            self.old.pop(key, None)
            self.dirty.pop(key, None)

    def protect(self, start: int, end: int) -> None:
        """Keep guest data off a new place of metadata."""
        self._fixed_ranges.append((start, end))

    def clear(self, file_end: int) -> None:
        """Forget all L2 tables: none is linked any more, nothing is dirty.

        ``file_end`` is where the file is going to end, rounded up.
        """
        for index, _ in used_entries(self.l1):
            self.l1[index] = 0
        # In place: the mapping holds on to this very dictionary. Whoever is
        # reading a slice misses its ticket, and looks at L1 again.
        self.young.clear()
        self.old.clear()
        self.fresh.clear()
        self.dirty.clear()
        self.dirty_l1.clear()
        self._loading.clear()
        self._extended.clear()
        self._damaged_l1.clear()
        del self.table_offsets[:]
        self._file_end = file_end

    @property
    def dirty_bytes(self) -> int:
        """Memory that can't be given back before a write-back."""
        return len(self.dirty) * self.slice_bytes

    @property
    def dirty_limit(self) -> int:
        """The `dirty_bytes` at which a writer should start a write-back."""
        return max(4, self._generation_limit // 2) * self.slice_bytes

    @property
    def is_dirty(self) -> bool:
        """Whether any L1 or L2 entry is not on disk."""
        return bool(self.dirty or self.dirty_l1 or self.fresh)

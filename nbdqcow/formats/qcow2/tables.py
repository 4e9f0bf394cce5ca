"""The active L1 table and the cache of L2 slices.

An L2 table is cached in slices of at most 4 KiB, so that a miss on a large
image costs one small read. In memory a slice is an ``array('Q')`` in native
byte order: a scalar read of an array costs a third of one of numpy.

Source: qcow2.txt, "Cluster mapping".
"""

from array import array
from collections.abc import Callable, Iterator
from typing import Final

from nbdqcow.block.storage import StorageDriver
from nbdqcow.errors import CorruptImage
from nbdqcow.formats.qcow2.entries import OFFSET_MASK
from nbdqcow.formats.words import dump_be64, load_be64
from nbdqcow.types import Buffer
from nbdqcow.units import format_hex

SLICE_BYTES: Final = 4096
_NB_AT_A_TIME: Final = 512
"""L1 entries looked at for one answer: there may be 4 million."""
_EMPTY: Final = array("Q", bytes(8 * _NB_AT_A_TIME))


class L2Slice:
    """A part of one L2 table, all of it if the clusters are small.

    Attributes:
        key: guest offset divided by the bytes that a slice maps.
        words: the entries (two words each with extended L2), native order.
        dirty_first, dirty_end: the words changed since the last write-back
            began, as a half-open range; empty when equal.
        pins: users that keep the slice in the cache.
    """

    __slots__ = ("dirty_end", "dirty_first", "key", "pins", "words")

    def __init__(self, key: int, words: "array[int]") -> None:
        self.key = key
        self.words = words
        self.dirty_first = 0
        self.dirty_end = 0
        self.pins = 0


class Tables:
    """L1 in memory, L2 in a bounded cache, and what of both is not on disk.

    The cache has two generations: a hit in ``young`` costs one dictionary
    access and no bookkeeping; when ``young`` is half the budget it becomes
    ``old``, and what has not been used by the next turn is dropped. That
    bounds memory like an LRU list does without its cost on every lookup.
    Slices that are dirty or pinned survive every turn.

    Attributes:
        l1: the entries, native order.
        l1_offset: where the table is in the file.
        entry_words: 64-bit words of an L2 entry: 1, or 2 with extended L2.
        slice_shift: ``guest_offset >> slice_shift`` is a slice's key.
        fresh: L1 index to host offset of L2 tables that were allocated but
            never written: on disk there is garbage under them.
        dirty: slices by key with changes that are not on disk.
        dirty_l1: indices of L1 entries that are not on disk.
        dirty_limit: the `dirty_bytes` at which a writer should start a
            write-back.
        load_entries, dump_entries: turn L2 entries on disk into those in
            memory, and back.
    """

    def __init__(
        self,
        storage: StorageDriver,
        l1: "array[int]",
        l1_offset: int,
        cluster_bits: int,
        cache_bytes: int,
        entry_words: int = 1,
    ) -> None:
        self.storage = storage
        self.l1 = l1
        self.l1_offset = l1_offset
        self.cluster_bits = cluster_bits
        self.cluster_size = 1 << cluster_bits
        self.slice_bytes = min(SLICE_BYTES, self.cluster_size)
        self.entry_words = entry_words
        self.slice_entries = self.slice_bytes // (8 * entry_words)
        self.slice_shift = cluster_bits + self.slice_entries.bit_length() - 1
        self._slices_per_table_bits = (
            self.cluster_size // self.slice_bytes
        ).bit_length() - 1
        self.l1_shift = self.slice_shift + self._slices_per_table_bits
        self.young: dict[int, L2Slice] = {}
        self.old: dict[int, L2Slice] = {}
        # An array of n words takes 8 n + 64 bytes; the slice and its places
        # in dictionaries about 300 more.
        self._generation_limit = max(4, cache_bytes // (2 * (self.slice_bytes + 364)))
        self.dirty_limit = max(4, self._generation_limit // 2) * self.slice_bytes
        self.fresh: dict[int, int] = {}
        self.dirty: dict[int, L2Slice] = {}
        self.dirty_l1: set[int] = set()
        self._loading: dict[int, object] = {}
        self.load_entries: Callable[[Buffer], array[int]] = load_be64
        self.dump_entries: Callable[[array[int]], bytes] = dump_be64

    # -- looking up ------------------------------------------------------

    def l1_index(self, key: int) -> int:
        """Return the index of the L1 entry above the slice ``key``."""
        return key >> self._slices_per_table_bits

    def table_offset(self, l1_index: int) -> int:
        """Return the host offset of an L2 table, 0 if there is none.

        Raises `CorruptImage` if the entry can't be right.
        """
        if l1_index >= len(self.l1):
            return 0
        offset = self.l1[l1_index] & OFFSET_MASK
        if offset & (self.cluster_size - 1):
            raise CorruptImage(
                f"L2 table offset {offset:#x} unaligned"
                f" (L1 index: {format_hex(l1_index)})"
            )
        return offset

    def empty_until(self, offset: int, end: int) -> int:
        """Return how far (at most ``end``) no L2 table maps guest bytes from
        ``offset`` on, as far as one look at the L1 table goes; ``offset``
        itself if one does."""
        l1, l1_index = self.l1, offset >> self.l1_shift
        first, last = l1_index, (end - 1) >> self.l1_shift
        if last >= len(l1):
            # The disk has become smaller.
            last = len(l1) - 1
        if l1_index > last:
            return end
        if last - first >= _NB_AT_A_TIME:
            if l1[first : first + _NB_AT_A_TIME] == _EMPTY:
                return (first + _NB_AT_A_TIME) << self.l1_shift
            last = first + _NB_AT_A_TIME - 1
        while l1_index <= last and not l1[l1_index] & OFFSET_MASK:
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

        The caller has seen that its L2 table exists; one that has gone since then
        gives an empty slice that is kept nowhere.
        """
        found = self.cached(key)
        if found is not None:
            return found
        l1_index = key >> self._slices_per_table_bits
        if l1_index in self.fresh:
            return self._insert(L2Slice(key, array("Q", bytes(self.slice_bytes))))
        if not self.table_offset(l1_index):
            return L2Slice(key, array("Q", bytes(self.slice_bytes)))
        data = self.storage.try_pread(self.slice_offset(key), self.slice_bytes)
        return (
            None
            if data is None
            else self._insert(L2Slice(key, self.load_entries(data)))
        )

    async def load(self, key: int) -> L2Slice:
        """Do as `try_load` does, reading the slice if needed."""
        while (found := self.try_load(key)) is None:
            # While we wait, somebody else may load the slice, change it, and
            # see it written back and dropped: what we read is stale then.
            ticket = self._loading.setdefault(key, object())
            offset = self.slice_offset(key)
            self.storage.announce("l2_load")
            data = await self.storage.pread(offset, self.slice_bytes)
            if (
                self._loading.get(key) is ticket
                and self.cached(key) is None
                and self.slice_offset(key) == offset
            ):
                return self._insert(L2Slice(key, self.load_entries(data)))
        return found

    def slice_offset(self, key: int) -> int:
        """Return where a slice is in the file; its L2 table exists."""
        slot = key & ((1 << self._slices_per_table_bits) - 1)
        return (
            self.table_offset(key >> self._slices_per_table_bits)
            + slot * self.slice_bytes
        )

    def cached_slices(self, l1_index: int) -> Iterator[tuple[int, L2Slice]]:
        """Yield ``(slot, slice)`` for the slices of one table in memory."""
        first_key = l1_index << self._slices_per_table_bits
        for slot in range(1 << self._slices_per_table_bits):
            found = self.young.get(first_key + slot) or self.old.get(first_key + slot)
            if found is not None:
                yield slot, found

    def _insert(self, new: L2Slice) -> L2Slice:
        if len(self.young) >= self._generation_limit:
            self.turn()
        self.young[new.key] = new
        self._loading.pop(new.key, None)
        return new

    def turn(self) -> None:
        """Drop what was not used since the last turn."""
        kept = {k: s for k, s in self.old.items() if s.pins or k in self.dirty}
        kept.update(self.young)
        self.old = kept
        # In place: the mapping holds on to this very dictionary.
        self.young.clear()

    # -- changing --------------------------------------------------------

    def replace(self, l1: "array[int]", l1_offset: int) -> None:
        """Take another active L1 table. Nothing of the old one is dirty."""
        self.l1 = l1
        self.l1_offset = l1_offset
        # In place: the mapping holds on to this very dictionary. Whoever is
        # reading a slice misses its ticket, and reads again.
        self.young.clear()
        self.old.clear()
        self._loading.clear()

    def mark_dirty(self, changed: L2Slice, first: int, end: int) -> None:
        """Words ``first`` to ``end`` (half-open) of a slice have changed."""
        if changed.dirty_first == changed.dirty_end:
            changed.dirty_first, changed.dirty_end = first, end
            self.dirty[changed.key] = changed
        else:
            changed.dirty_first = min(changed.dirty_first, first)
            changed.dirty_end = max(changed.dirty_end, end)

    def add_table(self, l1_index: int, entry: int) -> None:
        """Link a new, all-zero L2 table whose cluster nobody has written."""
        self.fresh[l1_index] = entry & OFFSET_MASK
        self.l1[l1_index] = entry
        self.dirty_l1.add(l1_index)

    async def copy_table(self, l1_index: int, entry: int) -> None:
        """Replace a shared L2 table by a copy of it in a new cluster."""
        first_key = l1_index << self._slices_per_table_bits
        keys = range(first_key, first_key + (1 << self._slices_per_table_bits))
        slices: list[L2Slice] = []
        try:
            self.storage.announce("l2_alloc_cow_read")
            for key in keys:
                found = await self.load(key)
                found.pins += 1
                slices.append(found)
            self.add_table(l1_index, entry)
            for found in slices:
                self.mark_dirty(found, 0, len(found.words))
        finally:
            for found in slices:
                found.pins -= 1

    @property
    def dirty_bytes(self) -> int:
        """Memory that can't be given back before a write-back."""
        return len(self.dirty) * self.slice_bytes

    @property
    def is_dirty(self) -> bool:
        """Whether any L1 or L2 entry is not on disk."""
        return bool(self.dirty or self.dirty_l1 or self.fresh)

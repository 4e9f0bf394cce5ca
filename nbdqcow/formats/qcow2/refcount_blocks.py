"""Refcount blocks in memory: which are read, which are kept, what is not on disk.

Source: qcow2.txt, "Host cluster management".
"""

from array import array

from nbdqcow.block.storage import StorageDriver
from nbdqcow.errors import CorruptImage
from nbdqcow.formats.qcow2.entries import (
    REFTABLE_OFFSET_MASK,
    REFTABLE_RESERVED_MASK,
)
from nbdqcow.formats.qcow2.header import Header
from nbdqcow.formats.qcow2.refcount_codec import unpack_counts
from nbdqcow.units import format_hex


class RefcountBlock:
    """One refcount block in memory.

    ``changed_first`` and ``changed_end`` bound the counts that differ from
    the disk, half-open; equal when there are none.
    """

    __slots__ = ("changed_end", "changed_first", "counts", "pins")

    def __init__(self, counts: "array[int]") -> None:
        self.counts = counts
        self.changed_first = 0
        self.changed_end = 0
        self.pins = 0


class RefcountBlocks:
    """The blocks that a refcount table names, a part of them in memory.

    Attributes:
        table: offsets of the refcount blocks, native order.
        blocks: block index to block, those in memory.
        dirty: block index to block, with counts that are not on disk.
    """

    def __init__(
        self,
        storage: StorageDriver,
        header: Header,
        table: "array[int]",
        cache_bytes: int,
    ) -> None:
        self._cache_bytes = cache_bytes
        self.storage = storage
        self.header = header
        self.table = table
        self.cluster_bits = header.cluster_bits
        self.cluster_size = 1 << header.cluster_bits
        self._set_width(header.refcount_order)
        self.blocks: dict[int, RefcountBlock] = {}
        self.dirty: dict[int, RefcountBlock] = {}

    def _set_width(self, order: int) -> None:
        self.order = order
        self.max_count = (1 << (1 << order)) - 1
        self.block_entries = self.cluster_size * 8 >> order
        # A count of 1, 2 or 4 bits takes a whole byte in memory.
        in_memory = self.cluster_size << max(0, 3 - order)
        self._max_blocks = max(4, self._cache_bytes // in_memory)

    @property
    def many_dirty(self) -> bool:
        """Whether half of the cache can't be given up before a write-back."""
        return len(self.dirty) > self._max_blocks // 2

    async def count(self, cluster_index: int) -> int:
        """Return the refcount of a host cluster."""
        block_index, entry_index = divmod(cluster_index, self.block_entries)
        block = await self._block(block_index)
        return 0 if block is None else block.counts[entry_index]

    async def nb_clusters(self) -> int:
        """Return how many clusters the file has up to the last one in use."""
        for block_index in range(len(self.table) - 1, -1, -1):
            block = await self._block(block_index)
            if block is not None:
                used = block.counts.tobytes().rstrip(b"\0")
                if used:
                    nb_used = -(-len(used) // block.counts.itemsize)
                    return block_index * self.block_entries + nb_used
        return 0

    async def _block(self, block_index: int) -> RefcountBlock | None:
        """Return a block, None if it does not exist."""
        block = self.blocks.get(block_index)
        if block is not None:
            return block
        if block_index >= len(self.table) or not self.table[block_index]:
            return None
        offset = self.table[block_index]
        if offset & REFTABLE_RESERVED_MASK or offset & (self.cluster_size - 1):
            raise CorruptImage(
                f"Refblock offset {offset:#x} unaligned"
                f" (reftable index: {format_hex(block_index)})"
            )
        self.storage.announce("refblock_load")
        data = await self.storage.pread(
            offset & REFTABLE_OFFSET_MASK, self.cluster_size
        )
        return self._keep(block_index, RefcountBlock(unpack_counts(data, self.order)))

    def _keep(self, block_index: int, block: RefcountBlock) -> RefcountBlock:
        while len(self.blocks) >= self._max_blocks:
            victim = next(
                (
                    index
                    for index, b in self.blocks.items()
                    if index not in self.dirty and not b.pins
                ),
                None,
            )
            if victim is None:
                break
            del self.blocks[victim]
        self.blocks[block_index] = block
        return block

    def turn(self) -> None:
        """Give up the blocks that can be read again."""
        for index in [i for i in self.blocks if i not in self.dirty]:
            if not self.blocks[index].pins:
                del self.blocks[index]

    def _mark(
        self, block_index: int, block: RefcountBlock, first: int, end: int
    ) -> None:
        if block.changed_first == block.changed_end:
            block.changed_first, block.changed_end = first, end
            self.dirty[block_index] = block
        else:
            block.changed_first = min(block.changed_first, first)
            block.changed_end = max(block.changed_end, end)

    def mark_whole(self, block_index: int, block: RefcountBlock) -> None:
        """All counts of a block must be written (again)."""
        self._mark(block_index, block, 0, self.block_entries)

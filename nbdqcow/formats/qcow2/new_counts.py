"""The refcounts of a new generation: changed blocks go to new clusters."""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from nbdqcow.block.storage import StorageDriver
from nbdqcow.errors import BlockError, CorruptImage
from nbdqcow.formats.qcow2.refcount import Refcounts
from nbdqcow.formats.qcow2.refcount_codec import pack_refcounts, unpack_refcounts

_CACHE_BYTES: Final = 64 << 20
_DTYPES: Final = {4: np.uint16, 5: np.uint32, 6: np.uint64}


class NewCounts:
    """Counts that start as those on disk and end in clusters of their own.

    The old blocks are not touched. Nothing of the old ones is dirty.

    Attributes:
        table: the new refcount table.
        replaced: cluster indices of blocks that the new table does not name.
        freed: after `finish`, by block index, packed bits of the counts that
            fell to 0. On disk they are 1 still.
    """

    def __init__(
        self,
        storage: StorageDriver,
        refcounts: Refcounts,
        take_cluster: Callable[[], int],
        write_new: Callable[[int, bytes], Awaitable[None]],
    ) -> None:
        """``take_cluster`` returns a cluster for a block, ``write_new`` is what
        writes to it first, at its offset."""
        self._storage = storage
        self._cluster_bits = refcounts.cluster_bits
        self._cluster_size = refcounts.cluster_size
        self._order = refcounts.order
        self._max_count = refcounts.max_count
        self._block_entries = refcounts.block_entries
        self._take_cluster = take_cluster
        self._write_new = write_new
        self._dtype = _DTYPES.get(self._order, np.uint8)
        in_memory = self._block_entries * np.dtype(self._dtype).itemsize
        self._max_blocks = max(4, _CACHE_BYTES // in_memory)
        self.table = refcounts.table[:]
        self.replaced: list[int] = []
        self.freed: dict[int, bytes] = {}
        self._blocks: dict[int, npt.NDArray[np.unsignedinteger[npt.NBitBase]]] = {}
        self._were_used: dict[int, bytes] = {}
        self._written: set[int] = set()

    async def add(self, clusters: "npt.NDArray[np.uint64]", change: int) -> None:
        """Add ``change`` (1 or -1) to the count of each cluster, as often as
        it is listed.

        Raises `BlockError` if a count would get too large, `CorruptImage` if
        one would fall below 0.
        """
        for block_index, chosen in self._split(clusters):
            counts = await self._own_block(block_index)
            low = int(chosen.min())
            times = np.bincount((chosen - np.uint64(low)).astype(np.int64))
            part = counts[low : low + len(times)]
            if change > 0:
                if int(times.max()) > self._max_count or bool(
                    (self._max_count - part < times.astype(part.dtype)).any()
                ):
                    raise BlockError(
                        errno.EINVAL, f"refcount would exceed {self._max_count}"
                    )
                part += times.astype(part.dtype)
            else:
                short = np.flatnonzero(part.astype(np.uint64) < times.astype(np.uint64))
                if len(short):
                    index = block_index * self._block_entries + low + int(short[0])
                    raise CorruptImage(
                        f"refcount of a cluster in use is too low"
                        f" (host cluster {index:#x}): image is corrupt"
                    )
                part -= times.astype(part.dtype)

    async def look_up(
        self, clusters: "npt.NDArray[np.uint64]"
    ) -> "npt.NDArray[np.uint64]":
        """Return the count of each cluster."""
        found = np.zeros(len(clusters), np.uint64)
        of_block = clusters // np.uint64(self._block_entries)
        for block_index, chosen in self._split(clusters):
            counts = self._blocks.get(block_index)
            if counts is None:
                counts = await self._read(block_index)
            found[of_block == block_index] = counts[chosen.astype(np.int64)]
        return found

    def _split(
        self, clusters: "npt.NDArray[np.uint64]"
    ) -> list[tuple[int, "npt.NDArray[np.uint64]"]]:
        """Return block indices, and of each the indices in it, in order."""
        if not len(clusters):
            return []
        entries = np.uint64(self._block_entries)
        of_block = clusters // entries
        first = of_block[0]
        if (of_block == first).all():
            return [(int(first), clusters - first * entries)]
        return [
            (int(index), clusters[of_block == index] - index * entries)
            for index in np.unique(of_block)
        ]

    async def _own_block(
        self, block_index: int
    ) -> "npt.NDArray[np.unsignedinteger[npt.NBitBase]]":
        """Return a block for changing; it gets a new cluster the first time."""
        counts = self._blocks.get(block_index)
        if counts is not None:
            return counts
        if len(self._blocks) >= self._max_blocks:
            await self._write_blocks()
            self._blocks.clear()
        counts = await self._read(block_index)
        self._blocks[block_index] = counts
        if block_index not in self._were_used:
            self._were_used[block_index] = np.packbits(counts != 0).tobytes()
            self.replaced.append(self.table[block_index] >> self._cluster_bits)
            self.table[block_index] = self._take_cluster() << self._cluster_bits
        return counts

    async def _read(
        self, block_index: int
    ) -> "npt.NDArray[np.unsignedinteger[npt.NBitBase]]":
        offset = self.table[block_index] if block_index < len(self.table) else 0
        if not offset or offset & (self._cluster_size - 1):
            raise CorruptImage(
                f"refcount block {block_index:#x} of a cluster in use is missing"
            )
        self._storage.announce("refblock_load")
        data = await self._storage.pread(offset, self._cluster_size)
        if self._order < 3:
            return unpack_refcounts(data, self._order).astype(np.uint8)
        return np.frombuffer(data, np.dtype(self._dtype).newbyteorder(">")).astype(
            self._dtype
        )

    async def _write_blocks(self) -> None:
        self._storage.announce("refblock_update_part")
        for block_index, counts in self._blocks.items():
            if self._order < 3:
                data = pack_refcounts(counts.astype(np.uint64), self._order)
            else:
                data = counts.astype(counts.dtype.newbyteorder(">")).tobytes()
            if block_index in self._written:
                await self._storage.pwritev(self.table[block_index], [data])
            else:
                await self._write_new(self.table[block_index], data)
                self._written.add(block_index)

    async def finish(self) -> None:
        """Write all blocks. Clusters that nothing names any more are noted in
        ``freed`` and keep a count of 1."""
        for block_index in list(self._were_used):
            counts = await self._own_block(block_index)
            packed = np.frombuffer(self._were_used[block_index], np.uint8)
            were_used = np.unpackbits(packed, count=len(counts)).astype(np.bool_)
            freed = were_used & (counts == 0)
            if freed.any():
                counts[freed] = 1
                self.freed[block_index] = np.packbits(freed).tobytes()
            await asyncio.sleep(0)
        await self._write_blocks()


def runs(clusters: "npt.NDArray[np.uint64]") -> list[tuple[int, int]]:
    """Return ascending clusters as ranges: first cluster, how many."""
    if not len(clusters):
        return []
    starts = np.concatenate(([0], np.flatnonzero(np.diff(clusters) != 1) + 1))
    lengths = np.diff(np.append(starts, len(clusters)))
    return list(zip(clusters[starts].tolist(), lengths.tolist(), strict=True))

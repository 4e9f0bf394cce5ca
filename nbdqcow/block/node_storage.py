"""A whole image as a file of bytes: for filters above its format, and for a
window of its disk."""

import asyncio
import errno
import os
from typing import ClassVar

from nbdqcow.block.node import Node
from nbdqcow.block.storage import StorageDriver
from nbdqcow.errors import BlockError, NotSupported
from nbdqcow.types import COMPRESSED, DATA, UNALLOCATED, Buffer, Buffers


def below_filters(node: Node) -> Node:
    """Return the image that ``node`` shows through filters above its format."""
    while node.driver.name == "raw":
        storage = node.driver.storage
        while storage.inner is not None:
            storage = storage.inner
        if not isinstance(storage, NodeStorage) or storage.node.size != node.size:
            break
        node = storage.node
    return node


class NodeStorage(StorageDriver):
    """The disk that ``node`` shows, which it closes."""

    name: ClassVar[str] = "node"

    def __init__(self, node: Node) -> None:
        self.node = node
        self.filename = node.filename
        self.read_only = node.read_only
        self.zero_beyond_end = True
        self._growing = asyncio.Lock()

    @property
    def length(self) -> int:  # type: ignore[override]
        """The virtual size."""
        return self.node.size

    def room(self) -> int:
        """See `StorageDriver.room`."""
        return self.node.driver.room()

    def try_pread(self, offset: int, length: int) -> Buffer | None:
        """Read what is in reach."""
        if offset + length > self.node.size:
            return None
        return self.node.try_pread(offset, length)

    async def pread(self, offset: int, length: int) -> Buffer:
        """Read; behind the end there are zeroes."""
        inside = max(0, min(length, self.node.size - offset))
        data = await self.node.pread(offset, inside) if inside else b""
        return data if inside == length else bytes(data).ljust(length, b"\0")

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        """Write where that needs no waiting, inside the disk."""
        # What is behind a window is somebody else's.
        if offset + len(data) > self.node.size:
            return False
        return self.node.try_pwrite(offset, data)

    async def pwritev(
        self, offset: int, buffers: Buffers, *, fua: bool = False
    ) -> None:
        """Write; a raw disk that ends with its file grows."""
        await self._make_room(offset + sum(map(len, buffers)))
        data = b"".join(buffers) if len(buffers) != 1 else buffers[0]
        await self.node.pwrite(offset, data, fua=fua)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool = False
    ) -> None:
        """Zero a range; a raw disk that ends with its file grows."""
        await self._make_room(offset + length)
        await self.node.write_zeroes(
            offset, length, may_unmap=may_unmap, no_fallback=no_fallback
        )

    async def _make_room(self, end: int) -> None:
        """Let the disk reach ``end``. Raises `BlockError` (ENOSPC) if it can't."""
        if end <= self.node.size:
            return
        full = BlockError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if end > self.room():
            raise full
        async with self._growing:
            if end > self.node.size:
                try:
                    await self.node.resize(end)
                except NotSupported:
                    raise full from None

    async def discard(self, offset: int, length: int) -> None:
        """Discard a range inside the disk."""
        await self.node.discard(offset, length)

    async def flush(self) -> None:
        """Make what was written durable."""
        await self.node.flush()

    async def truncate(self, length: int) -> None:
        """Resize the disk."""
        await self.node.resize(length)

    async def block_status(self, offset: int, length: int) -> tuple[bool, int]:
        """Say of a stretch whether any image of the chain has data for it."""
        node: Node | None = self.node
        while node is not None and offset < node.size:
            kind, _, covered = await node.driver.map(
                offset, min(length, node.size - offset)
            )
            length = min(length, covered)
            if kind != UNALLOCATED:
                return kind in (DATA, COMPRESSED), length
            node = node.backing
        return False, length

    async def allocated_length(self) -> int | None:
        """Return what the image's own file takes."""
        return await self.node.driver.storage.allocated_length()

    async def prefetch(self, offset: int, length: int) -> None:
        """Bring a range near."""
        await self.node.prefetch(offset, length)

    async def close(self) -> None:
        """Close the image."""
        await self.node.close()

"""An open image as the file under another one: a disk in a disk."""

from typing import ClassVar

from nbdqcow.block.node import Node
from nbdqcow.block.storage import StorageDriver
from nbdqcow.types import COMPRESSED, DATA, UNALLOCATED, Buffer, Buffers


class NodeStorage(StorageDriver):
    """The guest's bytes of a node. Closing it closes the node."""

    name: ClassVar[str] = "node"

    def __init__(self, node: Node) -> None:
        self.filename = node.filename
        self.read_only = node.read_only
        self.length = node.size
        # It does not grow.
        self.zero_beyond_end = False
        self._node = node

    def try_pread(self, offset: int, length: int) -> Buffer | None:
        """See `Node.try_pread`."""
        return self._node.try_pread(offset, length)

    async def pread(self, offset: int, length: int) -> Buffer:
        """See `Node.pread`."""
        return await self._node.pread(offset, length)

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        """See `Node.try_pwrite`."""
        return self._node.try_pwrite(offset, data)

    async def pwritev(
        self, offset: int, buffers: Buffers, *, fua: bool = False
    ) -> None:
        """Write the buffers as one request to the node."""
        data = buffers[0] if len(buffers) == 1 else b"".join(buffers)
        await self._node.pwrite(offset, data, fua=fua)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool = False
    ) -> None:
        """See `Node.write_zeroes`."""
        await self._node.write_zeroes(
            offset, length, may_unmap=may_unmap, no_fallback=no_fallback
        )

    async def discard(self, offset: int, length: int) -> None:
        """See `Node.discard`."""
        await self._node.discard(offset, length)

    async def flush(self) -> None:
        """See `Node.flush`."""
        await self._node.flush()

    async def truncate(self, length: int) -> None:
        """Set the disk's size."""
        await self._node.resize(length)
        self.length = length

    async def block_status(self, offset: int, length: int) -> tuple[bool, int]:
        """Tell data from what reads as zeroes by the look of the maps."""
        node: Node | None = self._node
        while node is not None and offset < node.size:
            length = min(length, node.size - offset)
            kind, _, length = await node.driver.map(offset, length)
            if kind != UNALLOCATED:
                return kind in (DATA, COMPRESSED), length
            node = node.backing
        return False, length

    async def prefetch(self, offset: int, length: int) -> None:
        """See `Node.prefetch`."""
        await self._node.prefetch(offset, length)

    async def close(self) -> None:
        """See `Node.close`."""
        await self._node.close()

"""The raw driver: the guest's bytes are the file's."""

import asyncio
from collections.abc import Mapping
from typing import Any, Self

from nbdqcow.block.driver import FormatDriver, WritePlan
from nbdqcow.block.inflight import Epochs
from nbdqcow.block.storage import StorageDriver
from nbdqcow.types import DATA, ZERO, Run


class RawDriver(FormatDriver):
    """A file as a disk. Its size is the file's length when it was opened."""

    name = "raw"
    cluster_size = 1

    def __init__(self, storage: StorageDriver, *, read_only: bool) -> None:
        self.storage = self.data = storage
        self.size = storage.length
        self.read_only = read_only
        self.lock = asyncio.Lock()
        self.epochs = Epochs()

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """Anything may be raw, if it is nothing else."""
        return 1

    @classmethod
    async def open(
        cls, storage: StorageDriver, *, read_only: bool, options: Mapping[str, Any]
    ) -> Self:
        """Open ``storage`` as it is; there are no options."""
        return cls(storage, read_only=read_only)

    def try_map(self, offset: int, length: int) -> Run | None:
        """All of it counts as data here: holes read as fast."""
        return DATA, offset, length

    async def map(self, offset: int, length: int) -> Run:
        """Tell data from holes where the file system can."""
        allocated, run = await self.storage.block_status(offset, length)
        return (DATA, offset, run) if allocated else (ZERO, 0, run)

    def try_map_write(self, offset: int, length: int) -> int:
        """Every write is in place."""
        return offset

    async def begin_write(self, offset: int, length: int) -> WritePlan:
        """Every write is in place."""
        return WritePlan(offset, length, offset)

    def end_write(self, plan: WritePlan) -> None:
        """There is nothing to link."""

    def abort_write(self, plan: WritePlan) -> None:
        """There is nothing to give back."""

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool
    ) -> None:
        """The storage driver zeroes a range, or writes zeroes out."""
        await self.storage.write_zeroes(
            offset, length, may_unmap=may_unmap, no_fallback=no_fallback
        )

    async def discard(self, offset: int, length: int) -> None:
        """The storage driver frees the range's space."""
        await self.storage.discard(offset, length)

    async def flush(self) -> None:
        """Make the file's data durable."""
        await self.storage.flush()

    async def close(self) -> None:
        """There is nothing to write back but what a flush has to."""
        if not self.read_only:
            await self.storage.flush()

"""The raw driver: the guest's bytes are the file's, or a window of it."""

import asyncio
import errno
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, Final, Self

from nbdqcow.block.driver import FormatDriver, WritePlan
from nbdqcow.block.inflight import Epochs, Writers
from nbdqcow.block.status import Kinds
from nbdqcow.block.storage import StorageDriver
from nbdqcow.block.tools import parse_window
from nbdqcow.errors import BlockError, NotSupported
from nbdqcow.types import DATA, ZERO, Run

_NB_AHEAD: Final = 256


class RawDriver(FormatDriver):
    """A file as a disk.

    Options: ``offset``, where in the file the disk begins, and ``size``, how
    long it is; without them it is the file, or the rest of it.
    """

    name = "raw"
    cluster_size = 1

    def __init__(
        self,
        storage: StorageDriver,
        *,
        read_only: bool,
        offset: int,
        size: int,
        fixed: bool = False,
    ) -> None:
        """``fixed``: the size can't change, for others use what is behind it."""
        self.storage = self.data = storage
        self.size = size
        self.read_only = read_only
        self.lock = asyncio.Lock()
        self.epochs = Epochs()
        self._writers = Writers(self.epochs)
        # Nobody begins to write any more.
        self._frozen = read_only
        self._offset = offset
        self._is_fixed = fixed
        # Stretches of the file from an offset on, and where each ends: who asks
        # for one asks for those behind it, and each costs a hop to a thread.
        self._known_from = 0
        self._known_ends: list[int] = []
        self._known_allocated: list[bool] = []

    @classmethod
    async def open(
        cls, storage: StorageDriver, *, read_only: bool, options: Mapping[str, Any]
    ) -> Self:
        """Open ``storage`` as it is, or the window that ``options`` name.

        Raises `ImageError` if the window is not within the file.
        """
        offset, size = parse_window(options, storage.length)
        fixed = options.get("size") is not None
        return cls(storage, read_only=read_only, offset=offset, size=size, fixed=fixed)

    def try_map(self, offset: int, length: int) -> Run | None:
        """All of it counts as data here: holes read as fast."""
        return DATA, self._offset + offset, length

    async def map(self, offset: int, length: int) -> Run:
        """Tell data from holes where the file system can."""
        host_offset = self._offset + offset
        if not self.read_only:
            allocated, run = await self.storage.block_status(host_offset, length)
            return DATA if allocated else ZERO, host_offset, run
        ends = self._known_ends
        if not ends or not self._known_from <= host_offset < ends[-1]:
            rest = self.size - offset
            found = await self.storage.extents(host_offset, rest, _NB_AHEAD)
            ends = list(accumulate((run for _, run in found), initial=host_offset))[1:]
            self._known_from, self._known_ends = host_offset, ends
            self._known_allocated = [allocated for allocated, _ in found]
        index = bisect_right(ends, host_offset)
        kind = DATA if self._known_allocated[index] else ZERO
        return kind, host_offset, min(ends[index] - host_offset, length)

    async def extents(self, offset: int, length: int, limit: int) -> Kinds:
        """See `FormatDriver.extents`."""
        import numpy as np

        found = await self.storage.extents(self._offset + offset, length, limit)
        table = np.array(found, np.uint64)
        kinds = np.where(table[:, 0], DATA, ZERO).astype(np.uint8)
        return Kinds(table[:, 1].copy(), kinds)

    def try_map_write(self, offset: int, length: int) -> int:
        """Every write is in place."""
        return self._offset + offset

    async def begin_write(self, offset: int, length: int) -> WritePlan:
        """Every write is in place."""
        self._check_change(offset, length)
        plan = WritePlan(offset, length, self._offset + offset)
        plan.private = self._writers.enter_in_place()
        return plan

    def end_write(self, plan: WritePlan) -> None:
        """There is nothing to link."""
        self._writers.leave_in_place(plan.private)

    def abort_write(self, plan: WritePlan) -> None:
        """There is nothing to give back."""
        self._writers.leave_in_place(plan.private)

    def _check_change(self, offset: int, length: int) -> None:
        if self._frozen:
            raise BlockError(errno.EROFS, "the image is read-only")
        if offset + length > self.size:
            raise BlockError(errno.ENOSPC, "the disk has become smaller")

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool
    ) -> None:
        """The storage driver zeroes a range, or writes zeroes out."""
        self._check_change(offset, length)
        epoch = self._writers.enter_in_place()
        try:
            await self.storage.write_zeroes(
                self._offset + offset,
                length,
                may_unmap=may_unmap,
                no_fallback=no_fallback,
            )
        finally:
            self._writers.leave_in_place(epoch)

    async def discard(self, offset: int, length: int) -> None:
        """The storage driver frees the range's space."""
        self._check_change(offset, length)
        epoch = self._writers.enter_in_place()
        try:
            await self.storage.discard(self._offset + offset, length)
        finally:
            self._writers.leave_in_place(epoch)

    def room(self) -> int:
        """See `FormatDriver.room`."""
        if self._is_fixed or not self.storage.resizable:
            return self.size
        return max(self.size, self.storage.room() - self._offset)

    async def resize(self, size: int, *, preallocation: str = "off") -> None:
        """Set the file's length. Raises `BlockError`."""
        if not self.storage.resizable:
            raise NotSupported("Image format driver does not support resize")
        if size != self.size and (what := self.storage.fixed_as) is not None:
            raise NotSupported(f"Cannot resize {what}")
        if preallocation == "metadata":
            raise NotSupported("Unsupported preallocation mode: metadata")
        if self._is_fixed:
            raise NotSupported("Cannot resize fixed-size raw disks")
        if size < self.size and preallocation != "off":
            raise BlockError(
                errno.EINVAL, "Preallocation can only be used for growing images"
            )
        old_size, old_length = self.size, self.storage.length
        try:
            if size < old_size:
                # From here on nobody begins to read or write what goes.
                self.size = size
                self.when_rebound()
                await self.epochs.quiet()
            await self._set_length(self.size, size, preallocation)
            self.size = size
        except BaseException:
            # What is new would be the disk's for whoever opens it next.
            await self.storage.cut_off(old_length)
            # Whoever is cancelled may find the file shorter already.
            self.size = min(old_size, self.storage.length - self._offset)
            raise
        finally:
            self.when_rebound()

    async def _set_length(self, start: int, size: int, preallocation: str) -> None:
        if preallocation == "off":
            await self.storage.truncate(self._offset + size)
        elif preallocation == "falloc":
            await self.storage.write_zeroes(
                self._offset + start, size - start, may_unmap=False
            )
        else:
            await self.storage.write_zero_data(self._offset + start, size - start)

    async def reopen(self, *, read_only: bool) -> None:
        """See `FormatDriver.reopen`."""
        if read_only and not self.read_only:
            self._frozen = True
            try:
                await self._writers.quiet()
                await self.storage.flush()
            except BaseException:
                self._frozen = False
                raise
        self._frozen = self.read_only = read_only
        self._known_ends = []

    async def flush(self) -> None:
        """Make the file's data durable."""
        self.storage.announce("flush_to_disk")
        await self.storage.flush()

    async def close(self) -> None:
        """There is nothing to write back but what a flush has to."""
        if not self.read_only:
            await self.storage.flush()

"""An image whose every write is stored compressed: QEMU's ``compress`` filter."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from nbdqcow.block.driver import FormatDriver
from nbdqcow.block.inflight import InFlightRanges
from nbdqcow.block.node import Node
from nbdqcow.units import KiB, round_down, round_up

_MAX_MINIMUM: Final = 64 * KiB
"""The largest minimum block size that the protocol has."""


class CompressingNode(Node):
    """A `Node` that compresses what it is given.

    Only whole clusters are compressed. For a part of one the rest is read, so
    nothing else may change those clusters meanwhile. A cluster that was written
    before is compressed anew, also where it is not compressed yet, at which QEMU's
    fails.
    """

    def __init__(self, driver: FormatDriver, **how: Any) -> None:
        """``how`` is as for `Node`. Writes to a format without compressed clusters
        fail."""
        super().__init__(driver, **how)
        self._changing = InFlightRanges()
        self._inline_writes = False

    def _allow_changes(self, allowed: bool) -> None:
        super()._allow_changes(allowed)
        self._inline_writes = False

    @property
    def minimum_block_size(self) -> int:
        """See `Node`: whole clusters need no reading; but all of the disk must be
        in reach."""
        size = self.size
        return min(self.driver.cluster_size, _MAX_MINIMUM, size & -size or _MAX_MINIMUM)

    @property
    def moves_data(self) -> bool:
        """See `WriteRequests`: each byte must pass through here."""
        return False

    async def _store(self, offset: int, view: memoryview) -> None:
        end = offset + len(view)
        async with self._alone(offset, end) as (start, stop):
            if (start, stop) != (offset, end):
                head = await self.pread(start, offset - start)
                tail = await self.pread(end, stop - end)
                view = memoryview(b"".join((head, view, tail)))
            # As with QEMU zeroes are data, unless they are looked for.
            await self.pwrite_compressed(start, view, store_zeroes=True)

    async def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        may_unmap: bool = True,
        no_fallback: bool = False,
        fua: bool = False,
    ) -> None:
        """See `Node`."""
        async with self._alone(offset, offset + length):
            await super().write_zeroes(
                offset, length, may_unmap=may_unmap, no_fallback=no_fallback, fua=fua
            )

    @asynccontextmanager
    async def _alone(self, offset: int, end: int) -> AsyncIterator[tuple[int, int]]:
        """Be the only one to change the clusters of a range; enter with where they
        begin and end, at the disk's end at the latest."""
        size = self.driver.cluster_size
        start, stop = round_down(offset, size), round_up(end, size)
        while (busy := self._changing.first_overlap(start, stop)) is not None:
            await busy.wait()
        changing = self._changing.add(start, stop)
        try:
            yield start, max(end, min(stop, self.size))
        finally:
            self._changing.remove(changing)

"""Requests that read, and may wait."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from typing import Final

from nbdqcow.block.inline_requests import InlineRequests
from nbdqcow.buffers import zero_views
from nbdqcow.errors import BlockError
from nbdqcow.types import COMPRESSED, DATA, UNALLOCATED, Buffer

_MAX_DECOMPRESSING: Final = 16
"""Clusters of one read that are decompressed at a time."""


class ReadRequests(InlineRequests):
    """The part of a `Node` that reads."""

    filename: str

    async def pread(self, offset: int, length: int) -> Buffer:
        """Return ``length`` bytes."""
        pieces = [piece async for piece in self.pread_pieces(offset, length)]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def pread_pieces(self, offset: int, length: int) -> AsyncIterator[Buffer]:
        """Read ``length`` bytes and yield them in order, as their map has them.

        A failure comes where it happened: what was read before it has been
        yielded. What the maps say is zero, `nbdqcow.buffers.is_zeroes` knows.
        """
        driver = self.driver
        self._check_inside(offset, length, errno.EINVAL)
        epoch = driver.epochs.enter()
        try:
            while length:
                run = self._try_map(offset, length)
                kind, host_offset, covered = run or await driver.map(offset, length)
                if kind == DATA:
                    data: Buffer | None = self._storage_try_pread(host_offset, covered)
                    if data is None:
                        driver.storage.announce("read_aio")
                        data = await driver.data.pread(host_offset, covered)
                    yield data
                elif kind == COMPRESSED and covered == length:
                    start = offset & (driver.cluster_size - 1)
                    yield await driver.read_compressed_part(host_offset, start, covered)
                elif kind == COMPRESSED:
                    first = host_offset, offset & (driver.cluster_size - 1), covered
                    places = self._compressed_places(offset, length, first)
                    covered = 0
                    async for piece in driver.read_compressed_parts(places):
                        covered += len(piece)
                        yield piece
                else:
                    inside = 0
                    if kind == UNALLOCATED and self.backing is not None:
                        inside = max(0, min(covered, self.backing.size - offset))
                        if inside:
                            driver.storage.announce("read_backing_aio")
                        async for piece in self.backing.pread_pieces(offset, inside):
                            yield piece
                    for piece in zero_views(covered - inside):
                        yield piece
                offset, length = offset + covered, length - covered
        finally:
            driver.epochs.leave(epoch)

    def _compressed_places(
        self, offset: int, length: int, first: tuple[int, int, int]
    ) -> list[tuple[int, int, int]]:
        """Return where the compressed clusters from ``offset`` on are, up to
        one that is not, or that needs a table: as many as are decompressed at
        a time.

        ``first`` has been found already: nothing may be in reach any more, if the
        disk has become smaller.
        """
        places = [first]
        end, cluster_mask = offset + length, self.driver.cluster_size - 1
        offset += first[2]
        while offset < end and len(places) < _MAX_DECOMPRESSING:
            run = self._try_map(offset, end - offset)
            if run is None or run[0] != COMPRESSED:
                break
            places.append((run[1], offset & cluster_mask, run[2]))
            offset += run[2]
        return places

    async def reads_zero(self, offset: int, length: int) -> bool:
        """Whether a range reads as zeroes by the look of the maps alone.

        What is past the end of the image counts as zero.
        """
        end = min(offset + length, self.size)
        while offset < end:
            kind, _, covered = await self.driver.map(offset, end - offset)
            if kind in (DATA, COMPRESSED):
                return False
            if (
                kind == UNALLOCATED
                and self.backing is not None
                and not await self.backing.reads_zero(offset, covered)
            ):
                return False
            offset += covered
        return True

    async def prefetch(self, offset: int, length: int) -> None:
        """Bring a range into the page cache and its map into memory."""
        end = offset + length
        while offset < end:
            kind, host_offset, covered = await self.driver.map(offset, end - offset)
            if kind == DATA:
                await self.driver.data.prefetch(host_offset, covered)
            elif kind == UNALLOCATED and self.backing is not None:
                inside = min(covered, self.backing.size - offset)
                if inside > 0:
                    await self.backing.prefetch(offset, inside)
            offset += covered
            # Where there is nothing to read, nothing else gives way to others.
            await asyncio.sleep(0)

    def _check_inside(
        self, offset: int, length: int, error: int = errno.ENOSPC
    ) -> None:
        if length and offset + length > self.size:
            raise BlockError(
                error,
                f"{os.strerror(error)} ({self.filename} has {self.size} bytes: the "
                "request goes past them)",
            )

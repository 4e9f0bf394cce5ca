"""Requests that write, and may wait: copy-on-write, zeroes, fallbacks."""

import asyncio
import errno
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

from nbdqcow.block.driver import WritePlan
from nbdqcow.block.inline_requests import GUARD_LENGTH, MAX_INLINE
from nbdqcow.block.read_requests import ReadRequests
from nbdqcow.block.storage import StorageDriver, WriteBlocking
from nbdqcow.buffers import ZERO_VIEW, zero_bytes
from nbdqcow.errors import BlockError, NotSupported
from nbdqcow.types import DATA, UNALLOCATED, Buffer
from nbdqcow.units import MiB

if TYPE_CHECKING:
    from nbdqcow.block.node import Node

_MAX_COMPRESSING: Final = 32
"""Clusters of one write that are compressed at a time."""

Work: TypeAlias = Callable[[int, int, WriteBlocking], None]
"""See `WriteRequests.pwrite_by`."""
Find: TypeAlias = Callable[[int, int], Iterable[tuple[StorageDriver, int, int]]]
"""See `WriteRequests.copy_by`."""

_UNGUARDED: Final = nullcontext()


class WriteRequests(ReadRequests):
    """The part of a `Node` that writes."""

    read_only: bool
    _detect_zeroes: str
    _discard: bool
    _guard_lock: asyncio.Lock
    _reopening: asyncio.Lock
    _unsafe: bool
    _writethrough: bool

    async def copy_range(
        self, offset: int, source: "Node", source_offset: int, length: int
    ) -> None:
        """Copy data of another image, letting the files below do it.

        Raises `NotSupported` if they can't, or not all of it is plain data;
        some of it may be copied then.
        """
        self._check_copying()
        epoch = source.driver.epochs.enter()
        try:
            while length:
                kind, host_offset, covered = await source.driver.map(
                    source_offset, length
                )
                below = source.backing
                if kind == DATA:
                    place = partial(_place, source.driver.data, host_offset)
                    await self.copy_by(offset, covered, place)
                elif kind == UNALLOCATED and below and source_offset < below.size:
                    covered = min(covered, below.size - source_offset)
                    await self.copy_range(offset, below, source_offset, covered)
                else:
                    raise NotSupported("only plain data can be copied so")
                offset, source_offset = offset + covered, source_offset + covered
                length -= covered
        finally:
            source.driver.epochs.leave(epoch)

    @property
    def moves_data(self) -> bool:
        """Whether data may get here without being looked at."""
        return self._guard is None and self._detect_zeroes == "off"

    def _check_copying(self) -> None:
        self._check_writable()
        if not self.moves_data:
            raise NotSupported("written data must be looked at")

    async def copy_by(self, offset: int, length: int, find: Find) -> None:
        """Copy bytes of files, letting these do it.

        ``find(start, count)`` says where those of a stretch are, with ``start``
        counting from ``offset``. Raises as `copy_range` does.
        """
        self._check_copying()
        self._check_inside(offset, length)
        await self._write_pieces(
            offset,
            length,
            lambda plan, done: self._copy_planned(plan, find(done, plan.length)),
        )

    async def _copy_planned(
        self, plan: WritePlan, places: Iterable[tuple[StorageDriver, int, int]]
    ) -> None:
        """Have ``places`` (a file, the offset in it, and the length) copied to
        where a plan has the place for them."""
        offset = plan.guest_offset
        end = offset + plan.length
        for start, count in ((offset - plan.head, plan.head), (end, plan.tail)):
            if count and await self._old_content(start, count, plan.reads_zero):
                raise NotSupported("old content stands beside the copy")
        host_offset = plan.host_offset
        for source, source_offset, count in places:
            await self.driver.data.copy_from(source, source_offset, host_offset, count)
            host_offset += count

    async def pwrite(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Write ``data``; with ``fua`` it is durable on return."""
        self._check_writable()
        length = len(data)
        self._check_inside(offset, length)
        if (
            self._detect_zeroes != "off"
            and length
            and bytes(data) == zero_bytes(length)
        ):
            await self.write_zeroes(
                offset, length, may_unmap=self._detect_zeroes == "unmap", fua=fua
            )
            return
        async with self._guarded(offset, data):
            await self._store(offset, memoryview(data))
        if fua or self._writethrough:
            await self.flush()

    @property
    def writes_in_threads(self) -> bool:
        """Whether it has `pwrite_by`."""
        return (
            self.driver.data.writes_in_threads
            and self.moves_data
            and not self._writethrough
        )

    async def pwrite_by(self, offset: int, length: int, work: Work) -> None:
        """Let ``work`` write ``length`` bytes in worker threads.

        It is called as ``work(start, count, write)`` for one stretch after the
        other, with ``start`` counting from ``offset``, and there calls
        ``write(position, data)`` for all of the stretch, the position counting
        from ``start``. Only in a raw image may it leave bytes as they are.
        """
        self._check_writable()
        self._check_inside(offset, length)
        await self._write_pieces(
            offset,
            length,
            lambda plan, done: self._write_piece_by(
                plan, partial(work, done, plan.length)
            ),
        )

    async def pwrite_runs_by(self, runs: Iterable[tuple[int, int]], work: Work) -> None:
        """Let ``work`` write several runs, given by offset and length, of which none
        touches another's clusters.

        It is called as `pwrite_by` does, but with ``start`` counting through all of
        the runs as if nothing were between them, and a stretch may be several whose
        new clusters are neighbours: one call of a thread does much.
        """
        self._check_writable()
        driver = self.driver
        waiting = deque(runs)
        for offset, length in waiting:
            self._check_inside(offset, length)
        done = 0
        while waiting:
            offset, length = waiting.popleft()
            plan = await driver.begin_write(offset, length)
            if plan.length < length:
                waiting.appendleft((offset + plan.length, length - plan.length))
            plans = [plan]
            try:
                # Nobody waits for another's clusters while this holds some.
                if not plan.head and not plan.tail:
                    host_end = plan.host_offset + plan.length
                    plans.extend(self._plan_neighbours(host_end, waiting))
                length = sum(plan.length for plan in plans)
                work_on = partial(work, done, length)
                if len(plans) == 1:
                    await self._write_piece_by(plan, work_on)
                else:
                    await driver.data.write_by(plan.host_offset, length, work_on)
            except BaseException:
                for plan in plans:
                    driver.abort_write(plan)
                raise
            for plan in plans:
                driver.end_write(plan)
            done += length

    def _plan_neighbours(
        self, host_offset: int, waiting: deque[tuple[int, int]]
    ) -> Iterator[WritePlan]:
        """Yield plans for the runs that ``waiting`` begins with, as far as they are
        whole clusters and one follows the other in the file, from ``host_offset``
        on; take them from there."""
        driver = self.driver
        while waiting:
            offset, length = waiting[0]
            if offset % driver.cluster_size or length % driver.cluster_size:
                return
            if offset + length > driver.size:
                # The disk has become smaller.
                return
            plan = driver.try_begin_long_write(offset, length)
            if plan is None:
                return
            if plan.host_offset != host_offset:
                driver.cancel_write(plan)
                return
            waiting.popleft()
            host_offset += plan.length
            yield plan

    async def _write_piece_by(
        self, plan: WritePlan, work: Callable[[WriteBlocking], None]
    ) -> None:
        """Do as `_write_piece` does with what ``work`` writes."""
        storage = self.driver.data
        head, tail = await self._old_around(plan)
        if head is None and tail is None:
            await storage.write_by(plan.host_offset, plan.length, work)
            return
        nb_before = 0 if head is None else len(head)
        nb_after = 0 if tail is None else len(tail)

        def write_all(write: WriteBlocking) -> None:
            if head is not None:
                write(0, head)
            work(lambda position, data: write(nb_before + position, data))
            if tail is not None:
                write(nb_before + plan.length, tail)

        await storage.write_by(
            plan.host_offset - nb_before, nb_before + plan.length + nb_after, write_all
        )

    def _guarded(self, offset: int, data: Buffer) -> AbstractAsyncContextManager[None]:
        """Write ``data`` inside, of which only what comes before `GUARD_LENGTH`
        must be there. Entering it raises `BlockError` (EPERM)."""
        if self._guard is None or offset >= GUARD_LENGTH:
            return _UNGUARDED
        return self._checked(offset, data)

    @asynccontextmanager
    async def _checked(self, offset: int, data: Buffer) -> AsyncIterator[None]:
        async with self._guard_lock:
            await self._check_guard(offset, data)
            yield

    async def _check_guard(self, offset: int, data: Buffer) -> None:
        """Refuse to turn a guessed raw image into one of another format."""
        assert self._guard is not None
        head = bytearray(await self.pread(0, min(GUARD_LENGTH, self.size)))
        end = min(offset + len(data), len(head))
        head[offset:end] = memoryview(data)[: end - offset]
        if self._guard(bytes(head)):
            raise BlockError(
                errno.EPERM,
                f"{self.filename}: its format was guessed as raw, so the header of"
                " another format can't be written to it; name the format",
            )

    async def _store(self, offset: int, view: memoryview) -> None:
        """Write what a guest has sent."""
        await self._write_data(offset, view)

    async def _write_data(self, offset: int, view: memoryview) -> None:
        await self._write_pieces(
            offset,
            len(view),
            lambda plan, done: self._write_piece(plan, view[done : done + plan.length]),
        )

    async def _write_pieces(
        self,
        offset: int,
        length: int,
        write: Callable[[WritePlan, int], Awaitable[None]],
    ) -> None:
        """Plan a range piece by piece, and have ``write(plan, done)`` write each,
        ``done`` being the bytes in front of it."""
        driver = self.driver
        done = 0
        while done < length:
            plan = await driver.begin_write(offset + done, length - done)
            try:
                await write(plan, done)
            except BaseException:
                driver.abort_write(plan)
                raise
            driver.end_write(plan)
            done += plan.length

    async def _write_piece(self, plan: WritePlan, view: memoryview) -> None:
        """Write one planned piece, with what copy-on-write adds around it."""
        storage = self.driver.data
        if not plan.head and not plan.tail:
            if not storage.try_pwrite(plan.host_offset, view):
                self.driver.storage.announce("write_aio")
                await storage.pwritev(plan.host_offset, [view])
            return
        buffers: list[Buffer] = [view]
        host_offset = plan.host_offset
        head, tail = await self._old_around(plan)
        if head is not None:
            buffers.insert(0, head)
            host_offset -= plan.head
        if tail is not None:
            buffers.append(tail)
        if plan.head + plan.length + plan.tail <= MAX_INLINE and storage.try_pwritev(
            host_offset, buffers
        ):
            return
        if len(buffers) > 1:
            self.driver.storage.announce("cow_write")
        self.driver.storage.announce("write_aio")
        await storage.pwritev(host_offset, buffers)

    async def _old_around(self, plan: WritePlan) -> tuple[Buffer | None, Buffer | None]:
        """Return what must stand before and behind the data of a plan."""
        start, end = plan.guest_offset, plan.guest_offset + plan.length
        head = tail = None
        if plan.head:
            head = await self._old_content(
                start - plan.head, plan.head, plan.reads_zero
            )
        if plan.tail:
            tail = await self._old_content(end, plan.tail, plan.reads_zero)
        return head, tail

    async def _old_content(
        self, offset: int, length: int, skip_zeroes: bool
    ) -> Buffer | None:
        """Return what must stand beside new data in a new cluster.

        None if that is zeroes and the place reads as zeroes already.
        """
        if await self.reads_zero(offset, length):
            return None if skip_zeroes else bytes(length)
        inside = min(length, self.size - offset)
        self.driver.storage.announce("cow_read")
        old = await self.pread(offset, inside)
        return old if inside == length else bytes(old) + bytes(length - inside)

    async def pwrite_compressed(
        self, offset: int, data: Buffer, *, store_zeroes: bool = False
    ) -> None:
        """Write whole clusters (the end of the image counts as such), stored
        compressed where that saves space. ``store_zeroes``: also those that
        hold nothing but zeroes.

        Raises `NotSupported` if the image can't have compressed clusters.
        """
        self._check_writable()
        self._check_inside(offset, len(data))
        size, end = self.driver.cluster_size, offset + len(data)
        if offset % size or (end % size and end != self.size):
            raise BlockError(errno.EINVAL, "only whole clusters can be compressed")
        view = memoryview(data)
        step = size * self.driver.compressed_at_once
        for group in range(0, len(view), size * _MAX_COMPRESSING):
            end = min(group + size * _MAX_COMPRESSING, len(view))
            writes = (
                self.driver.write_compressed(
                    offset + start,
                    view[start : min(start + step, end)],
                    store_zeroes=store_zeroes,
                )
                for start in range(group, end, step)
            )
            done = await asyncio.gather(*writes, return_exceptions=True)
            for error in filter(None, done):
                raise error
        if self._writethrough:
            await self.flush()

    async def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        may_unmap: bool = True,
        no_fallback: bool = False,
        fua: bool = False,
    ) -> None:
        """Make a range read as zeroes.

        ``may_unmap``: its clusters may be freed. ``no_fallback``: raise
        `NotSupported`, changing nothing, rather than write zeroes out.
        """
        self._check_writable()
        self._check_inside(offset, length)
        may_unmap = may_unmap and self._discard
        end = offset + length
        try:
            async with self._guarded(offset, ZERO_VIEW[: min(length, GUARD_LENGTH)]):
                await self._write_zeroes(offset, end, may_unmap, no_fallback)
        finally:
            if length:
                await self.driver.note_request(offset, length)
        if fua or self._writethrough:
            await self.flush()

    async def _write_zeroes(
        self, offset: int, end: int, may_unmap: bool, no_fallback: bool
    ) -> None:
        """Do as `write_zeroes` does, for ``[offset, end)``."""
        unit = self.driver.subcluster_size
        first = -(-offset // unit) * unit
        last = end // unit * unit if end < self.size else end
        if first > last:
            first = last = end
        for start, stop in ((offset, min(first, end)), (last, end)):
            if start < stop and not await self._claim_zero(start, stop):
                if no_fallback:
                    raise NotSupported("the range does not cover whole clusters")
                await self.write_zero_bytes(start, stop - start)
        for start, stop in self._whole_clusters_apart(first, last):
            try:
                await self.driver.write_zeroes(
                    start, stop - start, may_unmap=may_unmap, no_fallback=no_fallback
                )
            except NotSupported:
                if no_fallback:
                    raise
                await self._write_zeroes_out(start, stop)

    def _whole_clusters_apart(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Split a range of whole subclusters: those before the first whole
        cluster, all whole clusters, and those behind."""
        size = self.driver.cluster_size
        clusters_start = min(-(-first // size) * size, last)
        clusters_end = last // size * size if last < self.size else last
        clusters_end = max(clusters_end, clusters_start)
        for start, stop in (
            (first, clusters_start),
            (clusters_start, clusters_end),
            (clusters_end, last),
        ):
            if start < stop:
                yield start, stop

    async def _claim_zero(self, start: int, end: int) -> bool:
        """Zero part of a subcluster by metadata, if its other bytes are zero.

        Those of the backing node can be looked at beforehand: it is
        read-only. What this image stores, the driver looks at under its lock.
        """
        size = self.driver.subcluster_size
        cluster_start = start // size * size
        cluster_end = min(cluster_start + size, self.size)
        backing = self.backing
        backing_zero = backing is None or (
            await backing.reads_zero(cluster_start, start - cluster_start)
            and await backing.reads_zero(end, cluster_end - end)
        )
        if not await self.driver.claim_zero(cluster_start, backing_zero):
            return False
        # At once: the image may be made read-only before the rest is done.
        await self.driver.note_request(start, end - start)
        return True

    async def _write_zeroes_out(self, offset: int, end: int) -> None:
        """Write zeroes, but not where nothing is stored and nothing shows through."""
        driver = self.driver
        covering = driver.is_covering
        while offset < end:
            kind, _, length = await driver.map(offset, end - offset)
            if kind != UNALLOCATED or covering:
                await self.write_zero_bytes(offset, length)
            offset += length

    async def write_zero_bytes(self, offset: int, length: int) -> None:
        """Write zeroes out, also behind the end in the last cluster."""
        end = offset + length
        for start in range(offset, end, MiB):
            await self._write_data(start, ZERO_VIEW[: min(MiB, end - start)])

    async def discard(self, offset: int, length: int) -> None:
        """Free the whole clusters of a range. A hint: parts of clusters are
        left as they are."""
        self._check_writable()
        self._check_inside(offset, length)
        if not self._discard or not length:
            return
        size = self.driver.cluster_size
        start, end = -(-offset // size) * size, offset + length
        if end < self.size:
            end = end // size * size
        try:
            if start < end:
                zeroes = ZERO_VIEW[: min(end - start, GUARD_LENGTH)]
                async with self._guarded(start, zeroes):
                    await self.driver.discard(start, end - start)
        finally:
            # As with QEMU, dirty bitmaps show the request, not what came of it.
            await self.driver.note_request(offset, length)

    async def flush(self) -> None:
        """Make every write answered before this call durable."""
        # What was written before may still be on its way to a reopened image.
        if self._unsafe or (self.read_only and not self._reopening.locked()):
            return
        self.driver.storage.announce("flush_to_os")
        await self.driver.flush()

    def _check_writable(self) -> None:
        if self.read_only:
            raise BlockError(errno.EPERM, f"{self.filename} is open read-only")


def _place(
    storage: StorageDriver, host_offset: int, start: int, count: int
) -> list[tuple[StorageDriver, int, int]]:
    """Be the `Find` of bytes that are all in one place."""
    return [(storage, host_offset + start, count)]

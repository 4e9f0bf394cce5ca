"""Requests that are answered at once, if what they need is in reach."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from nbdqcow.block.driver import FormatDriver
from nbdqcow.buffers import ZERO_VIEW, is_zeroes, zero_views
from nbdqcow.types import (
    COMPRESSED,
    DATA,
    UNALLOCATED,
    ZERO,
    ZERO_ALLOCATED,
    Buffer,
    Run,
)
from nbdqcow.units import KiB, MiB

if TYPE_CHECKING:
    from nbdqcow.block.node import Node

GUARD_LENGTH: Final = 2048
_COPIED_HOLE: Final = 4 * KiB
"""Clusters from which on a small read copies zeroes between data: the coroutine
keeps them apart, for a client to see a hole, but costs more."""
MAX_INLINE: Final = 64 * KiB
"""Bytes of a write, copy-on-write included, up to which writing them at once
is cheaper than a hop to a worker thread."""


class InlineRequests:
    """The part of a `Node` whose methods never wait: None or False means "take
    the coroutine"."""

    driver: FormatDriver
    size: int
    backing: "Node | None"
    _guard: Callable[[bytes], bool] | None
    _inline_writes: bool
    _largest_size: int

    def _bind(self) -> None:
        # Bound once: the inline path pays for every attribute on the way.
        driver = self.driver
        self.size = driver.size
        self._largest_size = max(self._largest_size, self.size)
        self._try_map = driver.try_map
        self._try_map_write = driver.try_map_write
        if self.size < self._largest_size:
            # There may be clients that do not know.
            self._try_map = self._try_map_inside
            self._try_map_write = self._try_map_write_inside
        self._storage_try_pread = driver.data.try_pread
        self._storage_try_pwrite = driver.data.try_pwrite

    def _try_map_inside(self, offset: int, length: int) -> Run | None:
        """As `FormatDriver.try_map`, and None past the end."""
        if offset + length > self.size:
            return None
        return self.driver.try_map(offset, length)

    def _try_map_write_inside(self, offset: int, length: int) -> int:
        """As `FormatDriver.try_map_write`, and -1 past the end."""
        if offset + length > self.size:
            return -1
        return self.driver.try_map_write(offset, length)

    def try_pread(self, offset: int, length: int) -> Buffer | None:
        """Return ``length`` bytes if all of them are in reach."""
        run = self._try_map(offset, length)
        if run is None:
            return None
        kind, host_offset, covered = run
        if covered != length:
            return self._try_pread_pieces(offset, length)
        if kind == DATA:
            return self._storage_try_pread(host_offset, length)
        if kind == COMPRESSED:
            start = offset & (self.driver.cluster_size - 1)
            return self.driver.try_read_compressed(host_offset, start, length)
        if kind == UNALLOCATED and self.backing is not None:
            return self._try_pread_backing(offset, length)
        return ZERO_VIEW[:length] if length <= MiB else bytes(length)

    def try_pread_into(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` if what belongs there is one piece of plain data in
        reach. If not, anything may be in it."""
        run = self._try_map(offset, len(view))
        if run is None or run[0] != DATA or run[2] != len(view):
            return False
        return self.driver.data.try_pread_into(run[1], view)

    @property
    def defers_reads(self) -> bool:
        """Whether `try_pread_later` is worth its while."""
        return self.driver.data.defers_reads

    def try_pread_later(self, offset: int, length: int) -> Buffer | None:
        """Do as `try_pread` does; the bytes are right after `finish_reads`."""
        run = self._try_map(offset, length)
        if run is not None and run[0] == DATA and run[2] == length:
            return self.driver.data.try_pread_later(run[1], length)
        return self.try_pread(offset, length)

    def finish_reads(self) -> None:
        """Make the bytes right that `try_pread_later` has returned."""
        self.driver.data.finish_reads()

    def _try_pread_backing(self, offset: int, length: int) -> Buffer | None:
        backing = self.backing
        assert backing is not None
        inside = backing.size - offset
        if inside >= length:
            return backing.try_pread(offset, length)
        if inside <= 0:
            return ZERO_VIEW[:length] if length <= MiB else bytes(length)
        data = backing.try_pread(offset, inside)
        return None if data is None else bytes(data) + bytes(length - inside)

    def _try_pread_pieces(self, offset: int, length: int) -> bytes | None:
        pieces = []
        end = offset + length
        has_holes = 1 < self.driver.cluster_size < _COPIED_HOLE
        while offset < end:
            run = self._try_map(offset, end - offset)
            if run is None:
                return None
            piece = self.try_pread(offset, run[2])
            if piece is None or (has_holes and is_zeroes(piece)):
                return None
            pieces.append(piece)
            offset += run[2]
        return b"".join(pieces)

    def try_pread_views(
        self, offset: int, length: int
    ) -> tuple[list[Buffer], int] | None:
        """Return ``length`` bytes as buffers that need no copy, and a token.

        The buffers may show the live file: hand them to the kernel, and give
        the token to `release` once they have left or were copied.
        """
        views: list[Buffer] = []
        end = offset + length
        while offset < end:
            run = self._try_map(offset, end - offset)
            if run is None:
                return None
            kind, host_offset, covered = run
            if kind == DATA:
                piece: Buffer | None = self.driver.data.try_view(host_offset, covered)
                if piece is None:
                    piece = self._storage_try_pread(host_offset, covered)
                if piece is None:
                    return None
                views.append(piece)
            elif kind == COMPRESSED:
                start = offset & (self.driver.cluster_size - 1)
                piece = self.driver.try_read_compressed(host_offset, start, covered)
                if piece is None:
                    return None
                views.append(piece)
            elif kind == UNALLOCATED and self.backing is not None:
                piece = self._try_pread_backing(offset, covered)
                if piece is None:
                    return None
                views.append(piece)
            else:
                views += zero_views(covered)
            offset += covered
        return views, self.driver.epochs.enter()

    def try_locate(self, offset: int, length: int) -> int:
        """Return where `sendfile` finds a range: -1 unless it is one piece of
        plain data in page cache."""
        run = self._try_map(offset, length)
        if run is None or run[0] != DATA or run[2] != length:
            return -1
        return run[1] if self.driver.data.is_resident(run[1], length) else -1

    def sendfile(
        self, socket_fd: int, host_offset: int, length: int
    ) -> tuple[int, int]:
        """Send what `try_locate` has just found to a socket, uncopied.

        Returns how many bytes have left, and a token for `release` once the
        peer has read them.
        """
        nb_sent = self.driver.data.sendfile(socket_fd, host_offset, length)
        return nb_sent, self.driver.epochs.enter()

    def release(self, token: int) -> None:
        """The buffers of `try_pread_views` have left the process."""
        self.driver.epochs.leave(token)

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        """Overwrite bytes in place, if that is all it takes and cheap."""
        if not self._inline_writes:
            return False
        if self._guard is not None and offset < GUARD_LENGTH:
            return False
        host_offset = self._try_map_write(offset, len(data))
        if host_offset >= 0:
            return self._storage_try_pwrite(host_offset, data)
        return len(data) <= MAX_INLINE and self._try_pwrite_new(offset, data)

    def _try_pwrite_new(self, offset: int, data: Buffer) -> bool:
        """Write to new clusters, or to subclusters that were not stored yet,
        copy-on-write included, without waiting.

        Nothing else runs between the look at the old content and the link to
        the new, so the two agree.
        """
        driver, size = self.driver, self.driver.subcluster_size
        if offset + len(data) > self.size:
            return False
        head, tail = offset % size, -(offset + len(data)) % size
        if head + len(data) + tail > MAX_INLINE:
            return False
        old = self._try_old_parts(offset, len(data), head, tail)
        if old is None:
            return False
        old_head, old_tail = old
        plan = driver.try_begin_write(offset, len(data))
        if plan is None:
            return False
        host_offset = plan.host_offset
        try:
            if plan.head or plan.tail:
                # One of them may be stored where it belongs already.
                old_head = old_head if plan.head else b""
                old_tail = old_tail if plan.tail else b""
                if not plan.reads_zero:
                    old_head, old_tail = (
                        old_head or bytes(plan.head),
                        old_tail or bytes(plan.tail),
                    )
                if old_head:
                    host_offset -= head
                done = driver.data.try_pwritev(host_offset, (old_head, data, old_tail))
            else:
                done = self._storage_try_pwrite(host_offset, data)
        except BaseException:
            driver.cancel_write(plan)
            raise
        if done:
            driver.end_write(plan)
        else:
            driver.cancel_write(plan)
        return done

    def _try_old_parts(
        self, offset: int, length: int, head: int, tail: int
    ) -> tuple[Buffer, Buffer] | None:
        """Return the old content of ``head`` bytes before a write and ``tail``
        bytes behind it; see `_try_old_content`."""
        if head and tail and head + length + tail == self.driver.subcluster_size:
            # One look and one read are cheaper, although some of it is not needed.
            old = self._try_old_content(offset - head, head + length + tail)
            if not old:
                return None if old is None else (b"", b"")
            view = memoryview(old)
            return view[:head], view[head + length :]
        old_head = self._try_old_content(offset - head, head) if head else b""
        old_tail = self._try_old_content(offset + length, tail) if tail else b""
        if old_head is None or old_tail is None:
            return None
        return old_head, old_tail

    def _try_old_content(self, offset: int, length: int) -> Buffer | None:
        """Return the old content of part of a cluster: empty if it is all
        zeroes by the map, None if it is not in reach."""
        end = min(offset + length, self.size)
        if offset >= end:
            return b""
        run = self._try_map(offset, end - offset)
        if run is None:
            return None
        kind, _, covered = run
        if covered < end - offset or kind not in (UNALLOCATED, ZERO, ZERO_ALLOCATED):
            old = self.try_pread(offset, end - offset)
        elif kind == UNALLOCATED and self.backing and offset < self.backing.size:
            old = self._try_pread_backing(offset, covered)
        else:
            return b""
        if old is None or end == offset + length:
            return old
        return bytes(old) + bytes(offset + length - end)

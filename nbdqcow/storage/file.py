"""Files and block devices of this machine.

Reads go inline by ``preadv(RWF_NOWAIT)``, which takes what is in page cache
and refuses to wait for the rest. Small writes go inline by ``pwrite`` for as
long as that is cheap. All else runs in worker threads (`nbdqcow.pool`).
"""

import asyncio
import contextlib
import errno
import os
import stat
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar, TypeVarTuple

from nbdqcow.block.inflight import Epochs
from nbdqcow.block.storage import FileRole, RoleOf, StorageDriver, WriteBlocking
from nbdqcow.buffers import zero_views
from nbdqcow.errors import BlockError, ImageError, NotSupported, UsageError
from nbdqcow.pool import Lane, Pool
from nbdqcow.storage import locks
from nbdqcow.storage.holes import Holes
from nbdqcow.storage.inline_file import InlineFile
from nbdqcow.storage.linux import (
    EXT4_MAGIC,
    TMPFS_MAGIC,
    copy_file_range,
    filesystem_type,
    pread_all,
    pread_into,
    pwrite_all,
)
from nbdqcow.storage.open_file import open_file
from nbdqcow.storage.opening import CacheMode
from nbdqcow.storage.reopening import reopen_blocking
from nbdqcow.types import Buffer, Buffers
from nbdqcow.units import MiB

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class FileStorage(InlineFile):
    """A regular file, a block device, or /dev/null as an empty disk.

    If the kernel once fails to make written data durable, it may have dropped
    that data, and the next fdatasync(2) would succeed over the loss. So from
    then on every `flush` and FUA write fails, until the file is opened anew.

    A device has a fixed length: writing past it is ENOSPC.

    Attributes:
        locking: which image locks are held; None for none.
    """

    name: ClassVar[str] = "file"
    reads_in_threads: ClassVar[bool] = True
    writes_in_threads: ClassVar[bool] = True

    def __init__(
        self,
        fd: int,
        filename: str,
        *,
        read_only: bool,
        cache: CacheMode,
        unmap: bool,
        pool: Pool,
    ) -> None:
        """Take over ``fd``, which is open and locked. Use `open` instead.

        Runs in a worker thread: on a network file system even a look at the
        length may wait.
        """
        status = os.fstat(fd)
        self.filename = filename
        self.read_only = read_only
        self.length = os.lseek(fd, 0, os.SEEK_END)
        self._is_device = not stat.S_ISREG(status.st_mode)
        self.zero_beyond_end = not self._is_device
        self.fixed_as = "device files" if self._is_device else None
        self._fd = fd
        self._closed = False
        self._pool = pool
        self._cache = cache
        self._unmap = unmap

        self._set_up_inline(status)
        self._filesystem = self._find_filesystem()
        self._plain_copies_on = self._find_plain_copies(status)
        # On tmpfs it would fill pages with zeroes first.
        self._reserves = self._filesystem == EXT4_MAGIC
        # The kernel has one writer to a file at a time.
        self._copying = Lane()
        self.locking: locks.Locking | None = None

        self._holes = Holes(fd, self._is_device, self._pwritev_blocking)
        self._has_dsync = True
        # Writes that have ended, and how many of them are known durable. What was
        # written before is one of them: whoever did it may have been killed, and
        # those who were answered ask us to flush it. /dev/null has nothing to flush.
        nothing = read_only or stat.S_ISCHR(status.st_mode)
        self._write_sequence = 0 if nothing else 1
        self._durable_sequence = 0
        self._sync_waiters: list[asyncio.Future[None]] | None = None
        self._sync_error: OSError | None = None
        self._durable_changes = Epochs()

    # -- opening -----------------------------------------------------------

    @classmethod
    async def open(
        cls,
        filename: str,
        *,
        read_only: bool = False,
        cache: str = "writeback",
        discard: str = "unmap",
        locking: bool = True,
        shared: bool = False,
        role: FileRole | RoleOf = FileRole.IMAGE,
        resizes: bool = False,
    ) -> "FileStorage":
        """Open a file that exists.

        Args:
            filename: a path.
            read_only: open it without the right to write.
            cache: a key of `nbdqcow.storage.opening.CACHE_MODES`.
            discard: ``unmap`` frees the space of discarded ranges, ``ignore``
                does not.
            locking: take QEMU's image locks (`nbdqcow.storage.locks`).
            shared: let others write to the file meanwhile (``-U``); only with
                ``read_only``.
            role: what the file is, which says what others may do with it
                meanwhile; or a function that tells it, in a worker thread.
            resizes: its length is to be changed.

        Raises `ImageError` (`ImageInUse` for a lock) with one clear message.
        """
        if shared and not read_only:
            raise UsageError("an image can be shared with writers only read-only")
        flags = os.O_RDONLY if read_only else os.O_RDWR
        return await open_file(
            cls, filename, flags, role,
            locks.Locking(FileRole.IMAGE, shared, resizes) if locking else None,
            read_only, cache, discard,
        )  # fmt: skip

    @classmethod
    async def create(
        cls,
        filename: str,
        length: int = 0,
        *,
        cache: str = "writeback",
        discard: str = "unmap",
        locking: bool = True,
    ) -> "FileStorage":
        """Create a file of ``length`` zero bytes and open it read-write.

        A file that is there loses its content, unless somebody has it locked.
        A block device must be long enough, and keeps its content. Raises
        `ImageError` and `OSError`.
        """
        flags = os.O_RDWR | os.O_CREAT
        storage = await open_file(
            cls, filename, flags, FileRole.IMAGE,
            locks.Locking(FileRole.IMAGE, False, False) if locking else None,
            False, cache, discard,
        )  # fmt: skip
        try:
            if not storage._is_device:
                await storage.truncate(0)
            await storage.truncate(length)
        except BaseException as error:
            await storage.close()
            if isinstance(error, OSError):
                raise ImageError(
                    f"Could not resize '{filename}': {error.strerror}"
                ) from error
            raise
        return storage

    def room(self) -> int:
        """See `StorageDriver.room`. A logical volume may have been made larger."""
        if not self._is_device:
            return super().room()
        self.length = max(self.length, self._find_length())
        return self.length

    # -- reading and writing -------------------------------------------------

    async def pread(self, offset: int, length: int) -> Buffer:
        """Return exactly ``length`` bytes."""
        return await self._pool.run(self._pread_blocking, offset, length)

    def pread_into_blocking(self, offset: int, view: memoryview) -> None:
        """Fill ``view``, with zeroes where the file has ended."""
        pread_into(self._fd, offset, view)

    def _pread_blocking(self, offset: int, length: int) -> Buffer:
        return pread_all(self._fd, offset, length)

    async def pwritev(
        self, offset: int, buffers: Buffers, *, fua: bool = False
    ) -> None:
        """Write ``buffers`` from ``offset``; durable if ``fua``."""
        durable = (fua or self._cache.write_through) and not self._cache.no_flush
        end = offset + sum(map(len, buffers))
        if offset == end:
            return
        await self._change(
            offset, end, durable, self._pwritev_blocking, offset, buffers, durable
        )

    def _pwritev_blocking(self, offset: int, buffers: Buffers, durable: bool) -> None:
        if not durable:
            pwrite_all(self._fd, offset, buffers)
            return
        self._raise_sync_error()
        failure = None
        if self._has_dsync:
            try:
                pwrite_all(self._fd, offset, buffers, os.RWF_DSYNC)
                return
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP:
                    self._has_dsync = False
                else:
                    failure = error
        if failure is not None and failure.errno == errno.EIO:
            raise self._fail_syncs(failure)
        # Did the write fail, which harms nobody else, or the syncing of it?
        pwrite_all(self._fd, offset, buffers)
        if failure is not None:
            raise self._fail_syncs(failure)
        self._sync_blocking()

    async def write_by(
        self, offset: int, length: int, work: Callable[[WriteBlocking], None]
    ) -> None:
        """See `StorageDriver.write_by`."""
        durable = self._cache.write_through and not self._cache.no_flush

        def write(position: int, data: Buffer) -> None:
            if self._reserves:
                self._holes.reserve_blocking(offset + position, len(data))
            self._pwritev_blocking(offset + position, [data], durable)

        await self._change(offset, offset + length, durable, work, write)

    async def _change(
        self,
        offset: int,
        end: int,
        durable: bool,
        function: Callable[[*Ts], T],
        *arguments: *Ts,
        lane: Lane | None = None,
    ) -> T:
        """Run a call that changes ``[offset, end)``, keeping account of it.

        ``durable``: nothing is left for `flush` to do. ``lane``: see `Pool.run_in`.
        """
        if self.read_only:
            raise BlockError(errno.EBADF, f"'{self.filename}' is open read-only")
        epoch = self._durable_changes.enter() if durable else -1
        try:
            result = await self._pool.run_in(lane, function, *arguments)
        except asyncio.CancelledError:
            self._note_growth(end)
            raise
        except Exception:
            if end > self.length:
                # Some of it may be there.
                length = await self._pool.run(self._find_length)
                self.length = max(self.length, length)
            raise
        finally:
            if durable:
                self._durable_changes.leave(epoch)
            else:
                self._write_sequence += 1
        if durable:
            # Another one may have been told of the loss that is ours.
            self._raise_sync_error()
        self._note_growth(end)
        return result

    def _note_growth(self, end: int) -> None:
        if end > self.length and not self._is_device:
            self.length = end

    def _find_length(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_END)

    def copies_plainly(self, source: StorageDriver) -> bool:
        """See `StorageDriver.copies_plainly`."""
        return (
            isinstance(source, FileStorage)
            and self._plain_copies_on is not None
            and self._plain_copies_on == source._plain_copies_on
        )

    def _find_plain_copies(self, status: os.stat_result) -> int | None:
        """Return on which device the kernel copies page cache to page cache, if
        on any: other file systems may share the blocks, or ask their server."""
        known = self._filesystem in (EXT4_MAGIC, TMPFS_MAGIC)
        return status.st_dev if known else None

    def _find_filesystem(self) -> int | None:
        """Return which one has the file, if what is written goes to page cache."""
        cache = self._cache
        if self._is_device or cache.direct or cache.write_through:
            return None
        with contextlib.suppress(OSError):
            return filesystem_type(self._fd)
        return None

    async def copy_from(
        self, source: StorageDriver, source_offset: int, offset: int, length: int
    ) -> None:
        """Let the kernel copy, which on some file systems shares the blocks. Raises
        `NotSupported` if ``source`` is no file."""
        if not isinstance(source, FileStorage) or not length:
            raise NotSupported("the kernel copies between files only")
        await self._change(
            offset, offset + length, False, copy_file_range,
            source._fd, source_offset, self._fd, offset, length, lane=self._copying,
        )  # fmt: skip

    # -- durability ----------------------------------------------------------

    async def flush(self) -> None:
        """Make every write completed before this call durable.

        Once this has failed it keeps failing: see the class.
        """
        if self._cache.no_flush:
            return
        target = self._write_sequence
        self._raise_sync_error()
        while self._durable_sequence < target:
            if self._sync_waiters is None:
                await self._sync()
            else:
                # It may have begun too early for us; then we go round again,
                # and all who wait with us share the next one.
                waiter = asyncio.get_running_loop().create_future()
                self._sync_waiters.append(waiter)
                await waiter
            self._raise_sync_error()

    async def _sync(self) -> None:
        """Run one fdatasync, then wake those who came meanwhile."""
        sequence = self._write_sequence
        waiters: list[asyncio.Future[None]] = []
        self._sync_waiters = waiters
        try:
            if self._overwriter is not None:
                self._overwriter.written_back()
            await self._pool.run(self._sync_blocking)
            # The kernel tells an error once. A durable change that is on its
            # way may have it, and not have come to saying so.
            await self._durable_changes.quiet()
            self._raise_sync_error()
            self._durable_sequence = sequence
        finally:
            self._sync_waiters = None
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def _sync_blocking(self) -> None:
        # The thread keeps the error itself: the task may have been cancelled,
        # and the kernel reports it only once.
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise self._fail_syncs(error) from error

    def _fail_syncs(self, error: OSError) -> OSError:
        self._sync_error = error
        return self._make_sync_error(error)

    def _make_sync_error(self, error: OSError) -> OSError:
        return BlockError(
            error.errno or errno.EIO,
            f"'{self.filename}': written data may be lost ({error.strerror});"
            " no flush can succeed until it is opened anew",
        )

    def _raise_sync_error(self) -> None:
        if self._sync_error is not None:
            raise self._make_sync_error(self._sync_error)

    # -- zeroes, holes, length -------------------------------------------------

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool = False
    ) -> None:
        """Make a range read as zeroes, by fallocate(2) where that works."""
        if not length:
            return
        end = offset + length
        unmap = may_unmap and self._unmap
        durable = self._cache.write_through
        try:
            await self._change(
                offset,
                end,
                durable,
                self._zero_blocking,
                offset,
                length,
                unmap,
                no_fallback,
            )
            return
        except NotSupported:
            if no_fallback:
                raise
        for start in range(offset, end, 8 * MiB):
            await self.pwritev(start, zero_views(min(8 * MiB, end - start)))

    def _zero_blocking(
        self, offset: int, length: int, unmap: bool, no_fallback: bool
    ) -> None:
        self._holes.zero_blocking(offset, length, unmap, no_fallback)
        if self._cache.write_through:
            self._sync_blocking()

    async def discard(self, offset: int, length: int) -> None:
        """Free the space of a range, unless opened with ``discard=ignore``."""
        end = min(offset + length, self.length)
        if self._unmap and offset < end:
            await self._change(
                offset, end, False, self._holes.discard_blocking, offset, end
            )

    async def truncate(self, length: int) -> None:
        """Set the file's length. No write past ``length`` is in flight.

        A block device can't grow, which raises `BlockError`; a shorter length leaves
        it as it is.
        """
        if self._is_device:
            if length > self.length:
                raise BlockError(
                    errno.ENOTSUP, f"'{self.filename}' is a device and can't grow"
                )
            return
        if length < self.length:
            if self._mapped is not None:
                self._mapped.forget()
            if self._overwriter is not None:
                self._overwriter.forget()
        start, end = sorted((length, self.length))
        # Views keep off the lost part from here on.
        self.length = start
        try:
            await self._change(start, end, False, os.ftruncate, self._fd, length)
        except OSError:
            length = await self._pool.run(self._find_length)
            raise
        finally:
            self.length = length

    async def grow(self, length: int) -> None:
        """See `StorageDriver.grow`. A block device is as long as it is."""
        if length > self.length and not self._is_device:
            await self._change(
                self.length, length, False, self._holes.grow_blocking, length
            )

    async def block_status(self, offset: int, length: int) -> tuple[bool, int]:
        """Tell data from holes, by SEEK_DATA and SEEK_HOLE."""
        if self._is_device:
            return True, length
        return await self._pool.run(self._holes.find_blocking, offset, length)

    async def extents(
        self, offset: int, length: int, limit: int
    ) -> Sequence[tuple[bool, int]]:
        """As `block_status`, with one hop to a worker thread for many of them."""
        if self._is_device:
            return [(True, length)]
        return await self._pool.run(
            self._holes.find_all_blocking, offset, length, limit
        )

    async def allocated_length(self) -> int | None:
        """Return the bytes that the file takes of its file system."""
        if self._is_device:
            return None
        status = await self._pool.run(os.fstat, self._fd)
        return status.st_blocks * 512

    async def prefetch(self, offset: int, length: int) -> None:
        """Start reading a range into page cache."""
        if length and not self._cache.direct:
            await self._pool.run(
                os.posix_fadvise, self._fd, offset, length, os.POSIX_FADV_WILLNEED
            )

    def expect_sequential(self, sequential: bool) -> None:
        """Tell the kernel, which then reads further ahead."""
        advice = os.POSIX_FADV_SEQUENTIAL if sequential else os.POSIX_FADV_NORMAL
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, 0, 0, advice)

    async def reopen(self, *, read_only: bool) -> None:
        """See `StorageDriver.reopen`. At no moment is the file without locks."""
        if read_only == self.read_only:
            return
        locking = self.locking
        if locking is not None and locking.shared:
            raise ImageError(f"'{self.filename}' is shared with writers")
        await self._pool.run(
            reopen_blocking, self._fd, self.filename, locking, read_only
        )
        self.read_only = read_only
        if not read_only:
            self._write_sequence += 1
        self._set_inline_writes()

    async def close(self) -> None:
        """Wait for what is in flight, then close the file and drop its locks.

        Closing twice is harmless; a cancelled close is complete.
        """
        if self._closed:
            return
        self._closed = True
        try:
            await self._pool.wait_idle()
        finally:
            fd, self._fd = self._fd, -1
            if self._mapped is not None:
                self._mapped.close()
                self._mapped = None
            if self._overwriter is not None:
                self._overwriter.close()
                self._overwriter = None
            try:
                await self._pool.run(os.close, fd)
            finally:
                await self._pool.close()

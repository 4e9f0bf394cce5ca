"""The contract of storage drivers: where the bytes of an image live.

A storage driver is a byte-addressed file. Requests of any offset and length
are welcome: a driver with coarser needs (O_DIRECT) bounces inside. Reading
past the end gives zeroes; writing past the end grows the file, and what lies
between the old end and the write reads as zeroes.

``try_*`` methods are for the event loop: they never block, and None (or
False) means "not now, take the coroutine". Errors are `OSError`s.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum
from typing import ClassVar, Final, Protocol, TypeAlias

from nbdqcow.errors import NotSupported
from nbdqcow.types import Buffer, Buffers
from nbdqcow.units import MiB

WriteBlocking: TypeAlias = Callable[[int, Buffer], None]
"""Writes bytes at a position, in a worker thread."""


class FileRole(Enum):
    """What a file is to who opens it, which says what others may do with it
    meanwhile."""

    IMAGE = "image"
    """It has metadata: nobody else writes to it, or changes its length."""
    DATA = "data"
    """It has guest data, at places that its length bounds: nobody else changes that."""
    PLAIN = "plain"
    """It is the disk: nothing here is wrong if others write to it."""
    SOURCE = "source"
    """It is the disk, or data of one, that is copied: nobody else changes it."""
    KEYS = "keys"
    """It is an encrypted disk whose key slots are changed: nobody else reads them."""


RoleOf: TypeAlias = Callable[[Buffer], FileRole]
"""Tells the role of a file from its beginning: `HEAD_LENGTH` bytes, fewer of a
shorter file."""
HEAD_LENGTH: Final = 4096


class BlockingSource(Protocol):
    """Bytes that worker threads read."""

    def pread_into_blocking(self, offset: int, view: memoryview) -> None:
        """Fill ``view``. Raises `OSError`."""


class StorageDriver(ABC):
    """A byte-addressed file with explicit durability.

    Attributes:
        name: the registry's name of the driver, such as ``file``.
        reads_in_threads: whether it has `pread_into_blocking`.
        writes_in_threads: whether it has `write_by`.
        filename: what messages call this file.
        read_only: True if no request may change the file.
        length: bytes in the file as far as this process knows: kept up to
            date by our own writes, no system call to read it.
        zero_beyond_end: True if bytes past the end are certain to read as
            zeroes once the file grows over them (a regular file; not a disk).
        read_alignment: what is read begins and ends with a multiple of so many
            bytes in the file: it is open past the page cache.
        resizable: whether it can be given another length by who asks for it.
        fixed_as: what has a length that nobody can set, in QEMU's word for it: an
            image of just such a file is not resized. None for others.
        inner: the file that this one is a filter over, if it is one.
        shows_context: True if a map of the file is to show a metadata context
            of the server's, `context_extents`, in the place of what is where.
        tells_states: whether `context_extents` knows holes from zeroes that have a
            place: then a map of the file as a disk shows that.
    """

    name: ClassVar[str]
    reads_in_threads: ClassVar[bool] = False
    writes_in_threads: ClassVar[bool] = False
    filename: str
    read_only: bool
    length: int
    zero_beyond_end: bool
    defers_reads: ClassVar[bool] = False
    resizable: ClassVar[bool] = True
    fixed_as: str | None = None
    shows_context: bool = False
    tells_states: bool = False
    read_alignment: int = 1
    inner: "StorageDriver | None" = None

    def announce(self, event: str) -> None:
        """Hear of what is about to happen to the file, under the name that QEMU
        has for it (its ``BlkdebugEvent``). Nobody says it on an inline path;
        most drivers don't listen."""

    def room(self) -> int:
        """Return where the file ends that can't get longer; 2**63 for one that can,
        whether its disk is full or not. Never waits."""
        return 1 << 63 if self.inner is None else self.inner.room()

    @abstractmethod
    def try_pread(self, offset: int, length: int) -> Buffer | None:
        """Return exactly ``length`` bytes if they need no waiting."""

    def try_pread_later(self, offset: int, length: int) -> Buffer | None:
        """Do as `try_pread` does, but the bytes need not be right before the
        next `finish_reads`; only where `defers_reads` says so, they are not."""
        return self.try_pread(offset, length)

    def finish_reads(self) -> None:
        """Make the bytes right that `try_pread_later` has returned."""

    def try_pick(self, offset: int, length: int, step: int) -> Sequence[int] | None:
        """Return numbers, of which each is 0 only if the byte at the beginning of
        one ``step`` bytes long part of a range is 0; None if that means waiting."""
        return None

    def try_pread_into(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` if that needs no waiting. If not, anything may be in it."""
        return False

    def try_view(self, offset: int, length: int) -> memoryview | None:
        """Return resident bytes without copying them, or None.

        The view shows the live file: while it is in use the caller keeps the
        clusters under it from being reused, and never touches its bytes
        itself, but hands them to the kernel (a shrunk file would fault).
        """
        return None

    def is_resident(self, offset: int, length: int) -> bool:
        """Whether `sendfile` of a range would not wait; never if unsure."""
        return False

    def sendfile(self, socket_fd: int, offset: int, length: int) -> int:
        """Send resident bytes to a non-blocking socket without copying them.

        Returns how many have left, 0 if the socket is full. What was said of
        `try_view` holds until the peer has read them.
        """
        raise AssertionError("this driver has no file to send")

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        """Write ``data`` now if that has lately been cheap; False if not."""
        return False

    def try_pwritev(self, offset: int, buffers: Buffers) -> bool:
        """Do as `try_pwrite` does with ``buffers`` one after the other."""
        return self.try_pwrite(offset, b"".join(buffers))

    @abstractmethod
    async def pread(self, offset: int, length: int) -> Buffer:
        """Return exactly ``length`` bytes."""

    def pread_into_blocking(self, offset: int, view: memoryview) -> None:
        """Fill ``view``; for work in a worker thread that begins with reading.
        The file stays open until the thread is done."""
        raise AssertionError("this driver reads on the loop only")

    @abstractmethod
    async def pwritev(
        self, offset: int, buffers: Buffers, *, fua: bool = False
    ) -> None:
        """Write ``buffers`` one after the other from ``offset``.

        ``fua``: the bytes (and what is needed to find them again) are durable
        on return. The buffers must not change until then.
        """

    async def write_by(
        self, offset: int, length: int, work: Callable[[WriteBlocking], None]
    ) -> None:
        """Run ``work(write)`` in a worker thread.

        There ``write(position, data)`` writes at ``offset + position``, as often
        as ``work`` likes, but nowhere outside of ``length`` bytes. Then there are
        so many bytes from ``offset`` on, what was not written being as it was.
        """
        raise AssertionError("this driver writes on the loop only")

    @abstractmethod
    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool = False
    ) -> None:
        """Make a range read as zeroes, freeing its space if ``may_unmap``.

        ``no_fallback``: raise `NotSupported` rather than write out zeroes.
        """

    @abstractmethod
    async def discard(self, offset: int, length: int) -> None:
        """Free the space of a range; what it reads as is undefined. A hint."""

    def copies_plainly(self, source: "StorageDriver") -> bool:
        """Whether `copy_from` copies from ``source`` as reading and writing would,
        the copy sharing no blocks with it, at less cost than that."""
        return False

    async def copy_from(
        self, source: "StorageDriver", source_offset: int, offset: int, length: int
    ) -> None:
        """Write bytes of another file that never pass through this process.

        Raises `NotSupported` if that can't be done; some may be written then.
        """
        raise NotSupported("this storage can't copy by itself")

    @abstractmethod
    async def flush(self) -> None:
        """Make every write completed before this call durable."""

    @abstractmethod
    async def truncate(self, length: int) -> None:
        """Set the file's length; a grown part reads as zeroes if it can.

        No write past ``length`` may be in flight, or begin: it would be cut off.
        """

    async def cut_off(self, length: int) -> None:
        """Make the file at most ``length`` bytes long if that can be: what is behind
        is nobody's, and stays where the file can't be cut. See `truncate`."""
        if self.length > length:
            with suppress(OSError):
                await self.truncate(length)

    async def grow(self, length: int) -> None:
        """Make the file at least ``length`` bytes long, whatever is written to
        it meanwhile; what is new reads as zeroes if it can."""
        if self.length < length:
            await self.truncate(length)

    async def write_zero_data(self, offset: int, length: int) -> None:
        """Write zeroes out as data is: they take their space for certain."""
        zeroes = memoryview(bytes(min(length, MiB)))
        for start in range(0, length, MiB):
            await self.pwritev(offset + start, [zeroes[: length - start]])

    async def block_status(self, offset: int, length: int) -> tuple[bool, int]:
        """Return ``(allocated, run)``: whether ``offset`` holds data, and for
        how many bytes (1 to ``length``) that holds. Default: all data."""
        return True, length

    async def extents(
        self, offset: int, length: int, limit: int
    ) -> Sequence[tuple[bool, int]]:
        """Return `block_status` of at most ``limit`` stretches in a row, which
        may cover less than ``length``."""
        return [await self.block_status(offset, length)]

    async def context_extents(
        self, offset: int, length: int
    ) -> Sequence[tuple[int, int]]:
        """Return lengths and flags of the context that `shows_context` is
        about, else the ``STATE_*`` bits of `nbdqcow.block.status`, for at least
        the first byte of a range and at most all of it."""
        raise AssertionError("this driver has no contexts")

    async def allocated_length(self) -> int | None:
        """Return the bytes that the file takes of its file system, None if
        that is not known."""
        return None

    async def prefetch(self, offset: int, length: int) -> None:
        """Bring a range near, if the driver can. A hint."""

    def expect_sequential(self, sequential: bool) -> None:
        """Say that reads will mostly follow one another, or no longer. A hint."""

    async def reopen(self, *, read_only: bool) -> None:
        """Give up the right to change the file, or take it again.

        No write is in flight. Raises `ImageError` (`ImageInUse` for a lock)
        and leaves all as it was if that can't be.
        """
        raise NotSupported(f"'{self.filename}' can't be opened otherwise")

    @abstractmethod
    async def close(self) -> None:
        """Release the file and its locks. Does not flush."""

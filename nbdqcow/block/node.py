"""A node: one open image with its backing chain, and the moving of bytes.

The format driver says where bytes are; the node reads and writes them, fills
in what is missing from the backing node, does copy-on-write, aligns what has
to be aligned, and falls back where a driver can't do something.
"""

import asyncio
import errno
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Self

from nbdqcow.block.driver import FormatDriver
from nbdqcow.block.resizing import prepare_growing
from nbdqcow.block.status import DEFAULT_LIMIT, DirtyBitmap, Extents, block_status
from nbdqcow.block.tools import PREALLOCATIONS, OptionValue, Progress
from nbdqcow.block.write_requests import WriteRequests
from nbdqcow.errors import BlockError, ImageError
from nbdqcow.outliving import run_to_end
from nbdqcow.units import SECTOR_SIZE


class Node(WriteRequests):
    """One open image. All offsets and lengths are bytes inside ``[0, size]``.

    ``try_*`` methods never wait; None or False means "take the coroutine".

    Attributes:
        size: the virtual size.
        read_only: True if no request may change the image.
        filename: as messages and lists name it.
        backing: the node below, or None; it may be shorter or longer.
    """

    def __init__(
        self,
        driver: FormatDriver,
        *,
        filename: str,
        backing: "Node | None" = None,
        writethrough: bool = False,
        unsafe: bool = False,
        discard: bool = True,
        detect_zeroes: str = "off",
        guard: Callable[[bytes], bool] | None = None,
    ) -> None:
        """``guard`` is for a raw image whose format was guessed: it says of
        the image's first `GUARD_LENGTH` bytes whether they look like another
        format. A guest that writes such bytes is refused, or the next one to
        guess would follow whatever backing file it wrote there."""
        self.driver = driver
        self.size = self._largest_size = driver.size
        self.read_only = driver.read_only
        self.filename = filename
        self.backing = backing
        self._writethrough = writethrough
        self._unsafe = unsafe
        self._discard = discard
        self._detect_zeroes = detect_zeroes
        self._inline_writes = not (
            self.read_only or writethrough or detect_zeroes != "off"
        )
        self._guard = guard
        self._guard_lock = asyncio.Lock()
        self._reopening = asyncio.Lock()
        # The image is read-only, its file is not: neither way could be gone.
        self._still_writable = False
        # Sizes are set one after the other, and not in the middle of one.
        self._resizing = asyncio.Lock()
        driver.has_backing = backing is not None
        self._bind()
        driver.when_rebound = self._bind
        driver.write_plain = self._write_data
        driver.prepare_growing = partial(prepare_growing, self)

    @property
    def format_name(self) -> str:
        """The name of the format driver."""
        return self.driver.name

    @property
    def guessed_raw(self) -> bool:
        """Whether this is raw for want of the signs of another format, which
        can't be written to it."""
        return self._guard is not None

    @property
    def minimum_block_size(self) -> int:
        """Bytes that clients should align to: whole sectors for an image whose
        format is guessed, if it has whole sectors."""
        return SECTOR_SIZE if self.guessed_raw and self.size % SECTOR_SIZE == 0 else 1

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    @property
    def dirty_bitmaps(self) -> Mapping[str, DirtyBitmap]:
        """The image's dirty bitmaps that can be read, by name."""
        return self.driver.dirty_bitmaps

    def find_bitmap(self, name: str) -> DirtyBitmap | None:
        """Return the dirty bitmap of that name: the image's, or else that of the
        uppermost image below that has one, and a disk of the same size."""
        node: Node | None = self
        while node is not None:
            bitmap = node.dirty_bitmaps.get(name)
            if bitmap is not None and node.size == self.size:
                return bitmap
            node = node.backing
        return None

    async def block_status(
        self, offset: int, length: int, limit: int = DEFAULT_LIMIT
    ) -> Extents:
        """Return at most ``limit`` extents from ``offset`` on; see `Extents`."""
        self._check_inside(offset, length, errno.EINVAL)
        return await block_status(self, offset, length, limit)

    # -- the image as a whole --------------------------------------------

    async def resize(self, size: int, *, preallocation: str = "off") -> None:
        """Set ``size``, in bytes; what is new reads as zeroes.

        Requests past the end of a disk that has become smaller fail, whatever
        their clients think that its size is. ``preallocation`` is one of
        `nbdqcow.block.tools.PREALLOCATIONS`. Raises `BlockError`.
        """
        self._check_writable()
        if preallocation not in PREALLOCATIONS:
            raise BlockError(
                errno.EINVAL, f"Unsupported preallocation mode '{preallocation}'"
            )
        if size < 0:
            raise BlockError(errno.EINVAL, "The new size is below 0")
        async with self._resizing:
            await self.driver.resize(size, preallocation=preallocation)

    async def amend(
        self, options: Mapping[str, OptionValue], progress: Progress
    ) -> None:
        """See `FormatDriver.amend`."""
        self._check_writable()
        async with self._resizing:
            await self.driver.amend(options, progress)

    async def change_backing_file(
        self, filename: str | None, format_name: str | None
    ) -> None:
        """Name another backing file in the image, or none, durably.

        What is open stays open: the new one counts when the image is opened
        again. Nothing is copied. Raises `BlockError`.
        """
        self._check_writable()
        await self.driver.change_backing_file(filename, format_name)
        await self.driver.flush()

    async def reopen(self, *, read_only: bool) -> None:
        """Let the image be changed, or no longer, while it is in use.

        Writes that have begun end first, and are durable; later ones fail
        with EPERM. Other programs may open the file as they like to meanwhile,
        short of changing it. Raises `BlockError` and `ImageError`, and leaves
        all as it was then; if that can't be either, the image is read-only, and
        either way may be tried again.
        """
        await self._reopening.acquire()
        # Half of it might leave bitmaps marked as in use for good. Like other
        # operations it runs to its end even if its caller is cancelled.
        await run_to_end(asyncio.create_task(self._reopen(read_only)), self.filename)

    async def _reopen(self, read_only: bool) -> None:
        storage = self.driver.storage
        try:
            if read_only and self.read_only:
                if self._still_writable:
                    await storage.reopen(read_only=True)
                    self._still_writable = False
            elif read_only:
                await self._stop_changes()
            elif self.read_only:
                await storage.reopen(read_only=False)
                self._still_writable = True
                try:
                    await self.driver.reopen(read_only=False)
                except BaseException:
                    # What went wrong first is what is told.
                    with suppress(OSError, ImageError):
                        await storage.reopen(read_only=True)
                        self._still_writable = False
                    raise
                self._still_writable = False
                self._allow_changes(True)
        finally:
            self._reopening.release()

    async def _stop_changes(self) -> None:
        self._allow_changes(False)
        try:
            await self.driver.reopen(read_only=True)
        except BaseException:
            self._allow_changes(True)
            raise
        try:
            await self.driver.storage.reopen(read_only=True)
        except BaseException:
            self._still_writable = True
            with suppress(OSError, ImageError):
                await self.driver.reopen(read_only=False)
                self._still_writable = False
                self._allow_changes(True)
            raise

    def _allow_changes(self, allowed: bool) -> None:
        self.read_only = not allowed
        self._inline_writes = (
            allowed and not self._writethrough and self._detect_zeroes == "off"
        )

    def expect_sequential(self, sequential: bool) -> None:
        """Say that reads will mostly follow one another, or no longer. A hint
        for the files of the whole chain."""
        self.driver.storage.expect_sequential(sequential)
        if self.backing is not None:
            self.backing.expect_sequential(sequential)

    async def close(self) -> None:
        """Write back all metadata and close the whole chain."""
        try:
            async with self._reopening:
                await self.driver.close()
        finally:
            await self.driver.close_files()
            if self.backing is not None:
                await self.backing.close()

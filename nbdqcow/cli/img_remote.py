"""Exports of NBD servers, and what else is no local file, for commands without
an event loop."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, Self, TypeVar

from nbdqcow.block.filter_names import is_filtered
from nbdqcow.block.open import OpenOptions, open_storage
from nbdqcow.block.storage import StorageDriver
from nbdqcow.errors import ImageError
from nbdqcow.types import Buffer

T = TypeVar("T")


class RemoteFile:
    """An export, or a file with a filter over it (`BlockingFile`).

    A thread runs the loop that the connection needs, so that this works in a
    coroutine of another loop, too: it blocks that one.
    """

    def __init__(self, filename: str) -> None:
        """Start the thread; use `open`."""
        self.filename = filename
        self.is_device = not is_filtered(filename)
        self.length = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._storage: StorageDriver | None = None

    @classmethod
    def open(cls, filename: str, *, read_only: bool, force_share: bool = False) -> Self:
        """Connect to the export that a URI names, or open what a filter is over.

        Raises `ImageError`.
        """
        file = cls(filename)
        options = OpenOptions(read_only=read_only, force_share=force_share)
        try:
            file._storage = file._run(open_storage(filename, options))
        except BaseException:
            file.close()
            raise
        file.length = file._storage.length
        return file

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @property
    def _open_storage(self) -> StorageDriver:
        assert self._storage is not None
        return self._storage

    def pread(self, offset: int, length: int) -> Buffer:
        """Return exactly ``length`` bytes, zeroes past the end."""
        inside = max(0, min(length, self.length - offset))
        data = self._run(self._open_storage.pread(offset, inside)) if inside else b""
        return bytes(data).ljust(length, b"\0")

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Write all of ``data``."""
        self._run(self._open_storage.pwritev(offset, [data]))
        self.length = max(self.length, offset + len(data))

    def truncate(self, length: int) -> None:
        """Set the length; an export keeps its own, which is to be enough.

        Raises `ImageError`.
        """
        if not self.is_device:
            self._run(self._open_storage.truncate(length))
            self.length = length
        elif length > self.length:
            raise ImageError("Cannot grow NBD nodes")

    def allocate(self, offset: int, length: int) -> None:
        """Leave that to the server."""

    def write_zeroes(self, offset: int, length: int) -> None:
        """Let a range read as zeroes."""
        if length:
            self._run(self._open_storage.write_zeroes(offset, length, may_unmap=False))

    def flush(self) -> None:
        """Make all writes so far durable."""
        self._run(self._open_storage.flush())

    def allocated_length(self) -> int:
        """Return -1, for servers don't say; a null file takes nothing."""
        length = self._run(self._open_storage.allocated_length())
        return -1 if length is None else length

    def close(self) -> None:
        """Leave the server."""
        try:
            if self._storage is not None:
                self._run(self._storage.close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

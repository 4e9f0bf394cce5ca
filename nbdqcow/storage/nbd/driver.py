"""The storage driver ``nbd``: a file that is an export of an NBD server."""

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Final

from nbdqcow.block.inflight import InFlightRanges
from nbdqcow.block.storage import StorageDriver
from nbdqcow.errors import (
    BlockError,
    CredentialsError,
    ImageError,
    NotSupported,
    ProtocolError,
    UsageError,
)
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.client_transmission import Call
from nbdqcow.nbd.uri import NbdUri, parse_place
from nbdqcow.storage.nbd.client import Client
from nbdqcow.storage.nbd.connection import BASE_ALLOCATION
from nbdqcow.types import Buffer, Buffers
from nbdqcow.units import GiB, KiB, MiB, round_down, round_up

_MAX_LENGTH: Final = 1 * GiB
"""Bytes of a request without data: any server takes so many, and is back soon."""
_MAX_BLOCK: Final = 64 * KiB
_MAX_SIZE: Final = (1 << 63) - 1 * GiB
"""Bytes of an export. Whatever is rounded up is an offset of a file, still."""
_ZEROES: Final = bytes(1 * MiB)
_ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
_OPEN_DELAY: Final = 0.5
"""Seconds between two attempts to connect for the first time."""


class NbdStorage(StorageDriver):
    """An export. Its length is fixed: writing past it is ENOSPC.

    `nbdqcow.storage.nbd.client` says what happens when the connection breaks.
    """

    name: ClassVar[str] = "nbd"
    fixed_as = "NBD nodes"

    def __init__(self, client: Client, filename: str, *, read_only: bool) -> None:
        """Take over ``client``, which is connected. Use `open` instead.

        Raises `ImageError` if the export is not what is asked for.
        """
        export = client.export
        minimum, _, maximum = export.block_sizes or (
            nbd.DEFAULT_MINIMUM_BLOCK_SIZE,
            nbd.DEFAULT_PREFERRED_BLOCK_SIZE,
            nbd.DEFAULT_MAXIMUM_PAYLOAD,
        )
        # proto.md "Size constraints" has these limits of the minimum.
        if minimum & (minimum - 1) or not 1 <= minimum <= min(maximum, _MAX_BLOCK):
            raise ImageError(f"the server has a minimum block size of {minimum}")
        if export.size > _MAX_SIZE:
            raise ImageError(f"the export is too large: {export.size} bytes")
        if not read_only and export.flags & nbd.FLAG_READ_ONLY:
            raise ImageError("the export is read-only")
        self.filename = filename
        self.read_only = read_only
        self.zero_beyond_end = False
        self.length = round_down(export.size, minimum)
        self.shows_context = client.context != BASE_ALLOCATION
        self._client = client
        self._flags = export.flags
        self._block = minimum
        self._max_payload = round_down(
            min(maximum, nbd.DEFAULT_MAXIMUM_PAYLOAD), minimum
        )
        # Writes, where those of less than a block read the rest of it first.
        self._writing = InFlightRanges()

    @classmethod
    async def open(
        cls,
        filename: str,
        *,
        read_only: bool = False,
        connect_timeout: float = 10.0,
        reconnect_delay: float = 30.0,
        request_timeout: float = 0.0,
    ) -> "NbdStorage":
        """Connect to the export that an NBD URI, or ``nbd:HOST:PORT``, names.

        The timeouts are those of `nbdqcow.storage.nbd.client.Client`; parameters
        of the URI, ``x-reconnect-delay`` and ``x-open-timeout``, say for how many
        seconds to wait for a server that has gone, or is not there yet. Raises
        `ImageError` with one clear message.
        """
        try:
            uri = parse_place(filename)
            reconnect_delay = _wait(uri, "x-reconnect-delay", reconnect_delay)
            open_timeout = _wait(uri, "x-open-timeout", 0.0)
        except UsageError as exc:
            # Who opens it names it.
            raise ImageError(str(exc).removeprefix(f"'{filename}': ")) from None
        client = Client(
            uri,
            connect_timeout=connect_timeout,
            reconnect_delay=reconnect_delay,
            request_timeout=request_timeout,
        )
        try:
            await _open(client, open_timeout)
            return cls(client, filename, read_only=read_only)
        except (ImageError, ProtocolError, CredentialsError) as exc:
            await client.close()
            raise ImageError(f"Could not open '{filename}': {exc}") from None
        except OSError as exc:
            await client.close()
            if isinstance(exc, socket.gaierror):
                failed = f"address resolution failed for {uri.place}"
            else:
                failed = f"Failed to connect to '{uri.place}'"
            raise ImageError(f"{failed}: {_reason(exc)}") from exc
        except BaseException:
            await client.close()
            raise

    async def close(self) -> None:
        """Disconnect. Does not flush."""
        await self._client.close()

    def room(self) -> int:
        """See `StorageDriver.room`."""
        return self.length

    @property
    def tells_states(self) -> bool:  # type: ignore[override]
        """Whether the server does: one after a reconnect may be another."""
        return self._client.has_status and not self.shows_context

    # -- reading -----------------------------------------------------------

    def try_pread(self, offset: int, length: int) -> bytes | None:
        """Say that every read must wait."""
        return None

    async def pread(self, offset: int, length: int) -> Buffer:
        """Return exactly ``length`` bytes."""
        end = min(offset + length, self.length)
        if offset >= end:
            return bytes(length)
        first = round_down(offset, self._block)
        last = round_up(end, self._block)
        if last - first <= self._max_payload:
            data = (await self._call(nbd.CMD_READ, first, last - first)).data
        else:
            pieces = await _all(
                self._call(nbd.CMD_READ, start, size)
                for start, size in _pieces(first, last, self._max_payload)
            )
            data = bytearray().join(piece.data for piece in pieces)
        if (first, last) == (offset, offset + length):
            return data
        return bytes(memoryview(data)[offset - first : end - first]).ljust(
            length, b"\0"
        )

    async def block_status(self, offset: int, length: int) -> tuple[bool, int]:
        """Say what the server does; all is data where it does not tell."""
        if offset >= self.length:
            return False, length
        if not self._client.has_status or self.shows_context:
            return True, length
        extents = await self.context_extents(offset, length)
        zero = extents[0][1] & nbd.STATE_ZERO
        run = 0
        for extent_length, flags in extents:
            if flags & nbd.STATE_ZERO != zero:
                break
            run += extent_length
        return not zero, run

    async def context_extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Return lengths in bytes, and flags, from ``offset`` on, which is in the
        file. Raises `BlockError`."""
        length = min(length, self.length - offset)
        first = round_down(offset, self._block)
        size = round_up(offset + length, self._block) - first
        call = await self._call(
            nbd.CMD_BLOCK_STATUS, first, min(size, self._max_effect)
        )
        found = []
        position = first
        for extent_length, flags in call.extents[self._client.context]:
            start = max(position, offset)
            position += extent_length
            run = min(position, offset + length) - start
            if self._client.context == _ALLOCATION_DEPTH:
                # No bits but a number: 2 is any image below the top one.
                flags = min(flags, 2)
            if run > 0:
                found.append((run, flags))
        if not found:
            raise BlockError(errno.EIO, "block status of less than a block")
        return found

    async def prefetch(self, offset: int, length: int) -> None:
        """Ask the server to bring a range near."""
        end = round_up(min(offset + length, self.length), self._block)
        if self._flags & nbd.FLAG_SEND_CACHE:
            first = round_down(offset, self._block)
            for start, size in _pieces(first, end, self._max_effect):
                await self._call(nbd.CMD_CACHE, start, size)

    # -- writing -----------------------------------------------------------

    async def pwritev(
        self, offset: int, buffers: Buffers, *, fua: bool = False
    ) -> None:
        """Write ``buffers`` one after the other from ``offset``."""
        length = sum(map(len, buffers))
        self._check_range(offset, length)
        if not length:
            return
        async with self._exclusive(offset, offset + length) as (first, last):
            if (first, last) != (offset, offset + length):
                head = await self.pread(first, offset - first)
                tail = await self.pread(offset + length, last - offset - length)
                buffers = [head, *buffers, tail]
            with_fua = fua and bool(self._flags & nbd.FLAG_SEND_FUA)
            flags = nbd.CMD_FLAG_FUA if with_fua else 0
            if last - first > self._max_payload:
                whole = memoryview(b"".join(buffers))
                await _all(
                    self._call(
                        nbd.CMD_WRITE, start, size, flags,
                        (whole[start - first : start - first + size],),
                    )
                    for start, size in _pieces(first, last, self._max_payload)
                )  # fmt: skip
            else:
                await self._call(nbd.CMD_WRITE, first, last - first, flags, buffers)
        if fua and not with_fua:
            await self.flush()

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool = False
    ) -> None:
        """Have the server zero a range, or send it zeroes; with ``no_fallback`` raise
        `NotSupported` rather."""
        self._check_range(offset, length)
        needed = nbd.FLAG_SEND_WRITE_ZEROES | (
            nbd.FLAG_SEND_FAST_ZERO if no_fallback else 0
        )
        end = offset + length
        first, last = round_up(offset, self._block), round_down(end, self._block)
        if self._flags & needed != needed or first >= last:
            if no_fallback:
                raise NotSupported("the NBD server has no fast zeroes")
            for start, size in _pieces(offset, end, len(_ZEROES)):
                await self.pwritev(start, (memoryview(_ZEROES)[:size],))
            return
        flags = (0 if may_unmap else nbd.CMD_FLAG_NO_HOLE) | (
            nbd.CMD_FLAG_FAST_ZERO if no_fallback else 0
        )
        for start, stop in ((offset, first), (last, end)):
            if start < stop:
                await self.pwritev(start, (bytes(stop - start),))
        async with self._exclusive(first, last):
            for start, size in _pieces(first, last, self._max_effect):
                await self._call(nbd.CMD_WRITE_ZEROES, start, size, flags)

    async def discard(self, offset: int, length: int) -> None:
        """Have the server free a range, if it does that."""
        first = round_up(offset, self._block)
        last = round_down(min(offset + length, self.length), self._block)
        if not self._flags & nbd.FLAG_SEND_TRIM or first >= last:
            return
        async with self._exclusive(first, last):
            for start, size in _pieces(first, last, self._max_effect):
                await self._call(nbd.CMD_TRIM, start, size)

    async def flush(self) -> None:
        """Make every write completed before this call durable."""
        if self._flags & nbd.FLAG_SEND_FLUSH and not self.read_only:
            await self._call(nbd.CMD_FLUSH)

    async def truncate(self, length: int) -> None:
        """Accept the length that the export has, or one within it; raise `BlockError`
        for a longer one."""
        if length > self.length:
            raise BlockError(
                errno.ENOSPC, f"'{self.filename}' has {self.length} bytes for ever"
            )

    # -- requests ----------------------------------------------------------

    @property
    def _max_effect(self) -> int:
        return round_down(_MAX_LENGTH, self._block)

    async def _call(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        payload: Buffers = (),
    ) -> Call:
        call = Call(command, offset, length, flags=flags, payload=payload)
        return await self._client.request(call)

    def _check_range(self, offset: int, length: int) -> None:
        if self.read_only:
            raise BlockError(errno.EBADF, f"'{self.filename}' is open read-only")
        if offset + length > self.length:
            raise BlockError(
                errno.ENOSPC, f"'{self.filename}' has no room after {self.length} bytes"
            )

    @asynccontextmanager
    async def _exclusive(self, offset: int, end: int) -> AsyncIterator[tuple[int, int]]:
        """Give the range in whole blocks, when no other write is in them.

        With blocks of one byte, writes are the server's to order.
        """
        if self._block == 1:
            yield offset, end
            return
        first, last = round_down(offset, self._block), round_up(end, self._block)
        while (other := self._writing.find(first, last)) is not None:
            await other.wait()
        mine = self._writing.add(first, last)
        try:
            yield first, last
        finally:
            self._writing.remove(mine)


def _reason(exc: OSError) -> str:
    """Return why there is no connection, in the system's words."""
    if isinstance(exc, TimeoutError):
        return "the server does not answer"
    if isinstance(exc, socket.gaierror) or not exc.errno:
        return exc.strerror or str(exc)
    # asyncio puts a sentence of its own in strerror.
    return os.strerror(exc.errno)


def _pieces(start: int, end: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield offset and length of pieces that make up a range."""
    while start < end:
        size = min(length, end - start)
        yield start, size
        start += size


async def _all(coroutines: Iterator[Coroutine[Any, Any, Call]]) -> list[Call]:
    """Run all at once; the first failure is raised when all have ended."""
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if isinstance(result, Call)]


def _wait(uri: NbdUri, name: str, default: float) -> float:
    """Return the seconds that a parameter says. Raises `UsageError`."""
    text = uri.parameters.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit()) or len(text) > 10:
        raise UsageError(f"'{uri}': {name} is a number of seconds")
    return float(text)


async def _open(client: Client, timeout: float) -> None:
    """Connect; try again for so many seconds where nobody answers."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    while True:
        try:
            return await client.open()
        except OSError:
            left = deadline - loop.time()
            if left <= 0:
                raise
            await asyncio.sleep(min(_OPEN_DELAY, left))

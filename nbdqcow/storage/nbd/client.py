"""Requests to an NBD server that survive the loss of a connection."""

import asyncio
import errno
import logging
import os
from collections import deque
from contextlib import suppress
from typing import Final

from nbdqcow.errors import BlockError, NbdQcowError, NotSupported, ProtocolError
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.client import RemoteExport
from nbdqcow.nbd.client_transmission import Call
from nbdqcow.nbd.uri import NbdUri
from nbdqcow.outliving import forget, outcome
from nbdqcow.storage.nbd.connection import (
    BASE_ALLOCATION,
    CONTEXT_PARAMETER,
    Connection,
    connect,
)
from nbdqcow.units import KiB, MiB

logger = logging.getLogger(__name__)

MAX_UNFLUSHED: Final = 32 * MiB
"""Bytes of answered writes that are kept until a flush has covered them."""
_ENTRY_COST: Final = 1 * KiB
"""Bytes that an entry counts besides its data: bounds the number of them."""
_FIRST_DELAY: Final = 0.05
_LONGEST_DELAY: Final = 5.0
"""Seconds between two attempts to connect: doubled from one to the other."""
_REPLAY_BATCH: Final = 64
_MAX_LOSSES: Final = 5
"""Connections that a request may see break: it may be what breaks them."""
_CANCEL_DELAY: Final = 10.0
"""Seconds that a cancelled change waits for its answer."""

_LOGGED: Final = frozenset((nbd.CMD_WRITE, nbd.CMD_WRITE_ZEROES))
_CHANGES: Final = _LOGGED | {nbd.CMD_TRIM}


class _Request(Call):
    """A call that somebody waits for.

    Attributes:
        future: done when the call is, or has failed.
        started: the loop's time when it was asked for.
        covers: of a FLUSH, how many writes had been answered before it.
        nb_losses: how many connections it has seen break.
        unwanted: whoever asked for it was cancelled; it is not sent again.
    """

    __slots__ = ("covers", "future", "nb_losses", "started", "unwanted")

    def __init__(self, call: Call, future: "asyncio.Future[None]", now: float) -> None:
        super().__init__(
            call.command, call.offset, call.length,
            flags=call.flags, payload=call.payload,
        )  # fmt: skip
        self.future = future
        self.started = now
        self.covers = 0
        self.nb_losses = 0
        self.unwanted = False


class Client:
    """An export of an NBD server, over one connection after another.

    A server that goes away may take with it what it was told to write and not
    to flush. So answered writes are kept, up to `MAX_UNFLUSHED` bytes, until a
    flush has covered them; after a reconnect they are sent again, in order,
    before anything else. Then come the requests that were in flight: nothing
    in them depends on what the old connection had done of them. The export
    must have no other writer meanwhile.

    If a flush fails, or a write does that is sent again, the data is lost and
    every later flush fails too: a server's next success would hide the loss.

    Attributes:
        export: what the server says of the export.
    """

    def __init__(
        self,
        uri: NbdUri,
        *,
        connect_timeout: float,
        reconnect_delay: float,
        request_timeout: float,
    ) -> None:
        """Use `open` afterwards. All in seconds.

        Args:
            uri: the export.
            connect_timeout: of one attempt to connect.
            reconnect_delay: how long requests wait for a new connection
                before they fail; attempts go on after that.
            request_timeout: how long a request may take in all; 0 for ever.
        """
        self.export = RemoteExport()
        self._uri = uri
        self._connect_timeout = connect_timeout
        self._reconnect_delay = reconnect_delay
        self._request_timeout = request_timeout
        self._connection: Connection | None = None
        self._reconnecting: asyncio.Task[None] | None = None
        # Why requests fail at once, after too long without a connection.
        self._gone: str | None = None
        self._closed = False
        # Unanswered, in the order in which they were asked for.
        self._requests: dict[_Request, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._log: deque[tuple[int, Call]] = deque()
        self._log_length = 0
        self._nb_written = 0
        self._room = asyncio.Event()
        self._room.set()
        self._own_flush: asyncio.Task[None] | None = None
        self._flush_error: OSError | None = None

    # -- opening and closing -----------------------------------------------

    async def open(self) -> None:
        """Connect. Raises `ImageError`, `ProtocolError` or `OSError`."""
        connection = await connect(self._uri, timeout=self._connect_timeout)
        self.export = connection.export
        self._take(connection)

    async def close(self) -> None:
        """Disconnect; what is unanswered fails."""
        self._closed = True
        tasks = [t for t in (self._reconnecting, self._own_flush) if t is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        if self._connection is not None:
            connection, self._connection = self._connection, None
            await connection.close()
        self._fail_all("the connection was closed")

    @property
    def extended(self) -> bool:
        """Whether lengths may have more than 32 bits, on any connection."""
        return self._connection is not None and self._connection.extended

    @property
    def has_status(self) -> bool:
        """Whether block status can be asked for just now."""
        return self._connection is not None and self._connection.has_status

    @property
    def context(self) -> str:
        """The metadata context that block status is of."""
        return self._uri.parameters.get(CONTEXT_PARAMETER, BASE_ALLOCATION)

    # -- requests ----------------------------------------------------------

    async def request(self, call: Call) -> Call:
        """Send a request and return it with its answer.

        Raises `BlockError` with the server's error, with EIO for the loss of
        the connection, and with ETIMEDOUT. One that changes something and is
        cancelled has ended when `asyncio.CancelledError` comes: its place may be
        another's then, and its data must not come after that one's.
        """
        if call.command in _LOGGED and self._logs:
            await self._room.wait()
        while self._connection is not None and not self._connection.is_writable:
            await self._connection.writable()
        if self._closed:
            raise BlockError(errno.EIO, "the connection is closed")
        if self._gone is not None:
            raise BlockError(errno.EIO, self._gone)
        if self._flush_error is not None and _is_durable(call):
            raise self._flush_error
        loop = asyncio.get_running_loop()
        request = _Request(call, loop.create_future(), loop.time())
        request.covers = self._nb_written
        self._requests[request] = None
        if self._connection is not None:
            self._connection.submit(request)
        if self._request_timeout and self._timer is None:
            self._timer = loop.call_later(self._request_timeout, self._check_timeouts)
        try:
            await outcome(request.future)
        except asyncio.CancelledError:
            forget(request.future)
            # Without a connection, nothing of it is on its way any more.
            if call.command in _CHANGES and self._connection is not None:
                request.unwanted = True
                await self._see_end(request)
            if call.command != nbd.CMD_FLUSH:
                # The answer to a flush counts all the same: of a loss a server
                # may tell once.
                self._requests.pop(request, None)
            raise
        return request

    async def _see_end(self, request: _Request) -> None:
        """Wait until a server can't be about to carry a request out."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _CANCEL_DELAY
        while not request.future.done():
            left = deadline - loop.time()
            if left <= 0 and self._connection is not None:
                # As with one that takes too long.
                self._connection.abort()
            with suppress(asyncio.CancelledError):
                await asyncio.wait((request.future,), timeout=max(left, 0))

    @property
    def _logs(self) -> bool:
        """Whether answered writes are kept."""
        return bool(self.export.flags & nbd.FLAG_SEND_FLUSH) and not self._flush_error

    def _on_complete(self, call: Call) -> None:
        request = call
        if not isinstance(request, _Request) or request not in self._requests:
            # Nobody waits for it any more.
            return
        if request.error == errno.ESHUTDOWN and self._connection is not None:
            # The server is about to go, and may come back.
            self._connection.abort()
            return
        del self._requests[request]
        if request.command == nbd.CMD_FLUSH:
            if request.error:
                self._lose_data(_error(request))
            else:
                self._forget_writes(request.covers)
        elif request.command in _LOGGED and not request.error and self._logs:
            self._keep_write(request)
        if request.future.done():
            return
        if request.error:
            request.future.set_exception(_error(request))
        else:
            request.future.set_result(None)

    def _fail_all(self, text: str) -> None:
        for request in self._requests:
            if not request.future.done():
                request.future.set_exception(BlockError(errno.EIO, text))
        self._requests.clear()

    def _check_timeouts(self) -> None:
        """Fail requests that took too long, with the connection they took."""
        self._timer = None
        loop = asyncio.get_running_loop()
        limit = loop.time() - self._request_timeout
        late = [request for request in self._requests if request.started <= limit]
        for request in late:
            del self._requests[request]
            if not request.future.done():
                request.future.set_exception(
                    BlockError(errno.ETIMEDOUT, f"{self._uri} does not answer")
                )
        if late and self._connection is not None:
            # It might answer later, and a late write must not come after others.
            self._connection.abort()
        if self._requests:
            oldest = next(iter(self._requests))
            self._timer = loop.call_at(
                oldest.started + self._request_timeout, self._check_timeouts
            )

    # -- answered writes that no flush has covered -------------------------

    def _keep_write(self, call: Call) -> None:
        self._nb_written += 1
        data = b"".join(call.payload)
        self._log.append((self._nb_written, _copy(call, data)))
        self._log_length += len(data) + _ENTRY_COST
        if self._log_length >= MAX_UNFLUSHED:
            self._room.clear()
        if self._log_length >= MAX_UNFLUSHED // 2 and self._own_flush is None:
            self._own_flush = asyncio.get_running_loop().create_task(self._flush())

    def _forget_writes(self, covered: int) -> None:
        """The first ``covered`` writes are durable."""
        log = self._log
        while log and log[0][0] <= covered:
            _, call = log.popleft()
            self._log_length -= sum(map(len, call.payload)) + _ENTRY_COST
        if self._log_length < MAX_UNFLUSHED:
            self._room.set()

    def _lose_data(self, exc: OSError) -> None:
        """Answered writes may be gone: no flush may succeed any more."""
        if self._flush_error is None:
            logger.error("%s: written data is lost: %s", self._uri, exc)
            self._flush_error = exc
        self._forget_writes(self._nb_written)
        for request in [r for r in self._requests if _is_durable(r)]:
            del self._requests[request]
            if not request.future.done():
                request.future.set_exception(self._flush_error)

    async def _flush(self) -> None:
        """Flush for the sake of `_log_length`."""
        try:
            # A failure stays, for those who ask for a flush.
            with suppress(OSError):
                await self.request(Call(nbd.CMD_FLUSH))
        finally:
            self._own_flush = None
            if self._log_length >= MAX_UNFLUSHED and not self._closed:
                # It did not come to the server: the next write tries again.
                self._room.set()

    # -- connections -------------------------------------------------------

    def _take(self, connection: Connection) -> None:
        """Use ``connection`` from now on."""
        connection.start(self._on_complete, self._on_lost)
        self._connection = connection
        self._gone = None
        for request in self._requests:
            request.reset()
            connection.submit(request)

    def _on_lost(self, exc: Exception) -> None:
        self._connection = None
        if self._closed:
            return
        logger.warning("%s: connection lost: %s", self._uri, exc)
        for request in tuple(self._requests):
            request.nb_losses += 1
            if request.unwanted and not request.future.done():
                del self._requests[request]
                request.future.set_result(None)
            elif request.nb_losses >= _MAX_LOSSES:
                del self._requests[request]
                if not request.future.done():
                    text = f"lost {_MAX_LOSSES} connections to {self._uri}: {exc}"
                    request.future.set_exception(BlockError(errno.EIO, text))
        self._reconnecting = asyncio.get_running_loop().create_task(self._reconnect())

    async def _reconnect(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._reconnect_delay
        delay = _FIRST_DELAY
        while True:
            await asyncio.sleep(delay)
            delay = min(delay * 2, _LONGEST_DELAY)
            timeout = self._connect_timeout
            if self._gone is None:
                timeout = min(timeout, max(deadline - loop.time(), _FIRST_DELAY))
            try:
                connection = await connect(self._uri, timeout=timeout)
                try:
                    self._check_same(connection.export)
                    await _replay(connection, [call for _, call in self._log])
                    self._take(connection)
                except _ReplayError as exc:
                    self._lose_data(exc)
                    self._take(connection)
                except BaseException:
                    connection.abort()
                    raise
            except (OSError, NbdQcowError) as exc:
                reason = str(exc) or type(exc).__name__
            else:
                logger.warning("%s: connected again", self._uri)
                return
            if loop.time() >= deadline and self._gone is None:
                self._gone = f"no connection to {self._uri}: {reason}"
                logger.error("%s", self._gone)
                self._fail_all(self._gone)

    def _check_same(self, export: RemoteExport) -> None:
        """Raise `ProtocolError` if this can't be the export that we had."""
        if (export.size, export.flags) != (self.export.size, self.export.flags):
            raise ProtocolError("the server has another export there now")


class _ReplayError(BlockError):
    """The server would not take a write again."""


async def _replay(connection: Connection, calls: list[Call]) -> None:
    """Send writes again. Those that overlap go one after the other.

    Raises `_ReplayError` if the server refuses one, and whatever broke the
    connection.
    """
    changed = asyncio.Event()
    pending: dict[Call, None] = {}
    lost: list[Exception] = []
    refused: list[OSError] = []

    def on_complete(call: Call) -> None:
        del pending[call]
        if call.error:
            refused.append(_error(call))
        changed.set()

    def on_lost(exc: Exception) -> None:
        lost.append(exc)
        changed.set()

    async def wait(most: int) -> None:
        while len(pending) > most and not lost:
            changed.clear()
            await changed.wait()
        if lost:
            raise lost[0]

    connection.start(on_complete, on_lost)
    for call in calls:
        if any(_overlap(call, other) for other in pending):
            await wait(0)
        await wait(_REPLAY_BATCH)
        await connection.writable()
        again = _copy(call, b"".join(call.payload))
        pending[again] = None
        connection.submit(again)
    await wait(0)
    if refused:
        raise _ReplayError(errno.EIO, f"a write failed when sent again: {refused[0]}")


def _overlap(a: Call, b: Call) -> bool:
    return a.offset < b.offset + b.length and b.offset < a.offset + a.length


def _copy(call: Call, data: bytes) -> Call:
    """Return a call to be sent again. Zeroes that were fast need not be so then:
    the server may have kept some of what was written afterwards."""
    return Call(
        call.command, call.offset, call.length,
        flags=call.flags & ~nbd.CMD_FLAG_FAST_ZERO, payload=(data,) if data else (),
    )  # fmt: skip


def _is_durable(call: Call) -> bool:
    """Whether the answer to ``call`` promises durability."""
    return call.command == nbd.CMD_FLUSH or bool(call.flags & nbd.CMD_FLAG_FUA)


def _error(call: Call) -> BlockError:
    name = nbd.COMMAND_NAMES[call.command]
    detail = f": {call.text}" if call.text else ""
    # The error's own words first: they are what is looked for in a message.
    text = f"{os.strerror(call.error)} (the NBD server failed a {name}{detail})"
    if call.error == errno.ENOTSUP:
        return NotSupported(text)
    return BlockError(call.error, text)

"""The slow way of a request: a task that waits for the node."""

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from nbdqcow.buffers import BufferPool
from nbdqcow.errors import BlockError
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.errno_map import nbd_errno
from nbdqcow.nbd.requests import Request
from nbdqcow.server.export import ExportedNode
from nbdqcow.types import Buffer
from nbdqcow.units import MiB

logger = logging.getLogger(__name__)

Reply = Callable[[bytes, int, Buffer], None]
"""Called with the cookie, the NBD error or 0, and a read's data."""


def request_error(exc: Exception) -> int:
    """Return what to tell the client. An exception that is no `OSError` is a
    bug of ours: it goes to the log with its traceback."""
    if not isinstance(exc, OSError | MemoryError):
        logger.error("unexpected error in a request", exc_info=exc)
    return nbd_errno(exc)


@dataclass(slots=True)
class Shared:
    """What all connections of a server share.

    Attributes:
        pool: payload buffers.
        max_bytes: bytes of data in flight that all connections may have
            together; each may have one request above it.
        nb_bytes: bytes of data in flight now.
        tasks: every request in flight.
    """

    pool: BufferPool
    max_bytes: int = 512 * MiB
    nb_bytes: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class Dispatcher:
    """The requests of one connection that are in flight as tasks.

    The owner asks `full` before it submits: then at most ``max_requests`` are
    in flight, and at most one payload more than ``max_bytes``.
    """

    __slots__ = (
        "nb_requests",
        "_loop",
        "_max_bytes",
        "_max_requests",
        "_nb_bytes",
        "_node",
        "_reply",
        "_shared",
    )

    def __init__(
        self,
        node: ExportedNode,
        reply: Reply,
        shared: Shared,
        *,
        max_requests: int,
        max_bytes: int,
    ) -> None:
        self.nb_requests = 0
        self._node = node
        self._reply = reply
        self._shared = shared
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._nb_bytes = 0
        self._loop = asyncio.get_running_loop()

    @property
    def full(self) -> bool:
        """Whether no further request may be submitted now. Never without a
        request in flight, whose end changes it."""
        if not self.nb_requests:
            return False
        return (
            self.nb_requests >= self._max_requests
            or self._nb_bytes >= self._max_bytes
            or self._shared.nb_bytes >= self._shared.max_bytes
        )

    def submit(self, request: Request) -> None:
        """Start a request that `Export.check` found good."""
        nb_bytes = request.length if request.command in _WITH_DATA else 0
        self.nb_requests += 1
        self._nb_bytes += nb_bytes
        self._shared.nb_bytes += nb_bytes
        task = self._loop.create_task(self._run(request, nb_bytes))
        self._shared.tasks.add(task)
        task.add_done_callback(self._shared.tasks.discard)

    async def _run(self, request: Request, nb_bytes: int) -> None:
        error = 0
        data: Buffer = b""
        payload = request.payload
        try:
            data = await _COMMANDS[request.command](self._node, request)
        except asyncio.CancelledError:
            # The server is made to stop. A worker thread may still use the
            # payload, so it does not go back to the pool.
            payload = None
            error = nbd.ESHUTDOWN
        except Exception as exc:
            error = request_error(exc)
            if error == nbd.ENOTSUP and not request.flags & nbd.CMD_FLAG_FAST_ZERO:
                # The protocol has it for fast zeroes only.
                error = nbd.EIO
        self.nb_requests -= 1
        self._nb_bytes -= nb_bytes
        self._shared.nb_bytes -= nb_bytes
        if payload is not None:
            self._shared.pool.release(payload)
        self._reply(request.cookie, error, data)


async def _read(node: ExportedNode, request: Request) -> Buffer:
    data = await node.pread(request.offset, request.length)
    if len(data) != request.length:
        # Sent as it is, the client would take the next reply for data.
        raise BlockError(
            errno.EIO, f"a read of {request.length} bytes gave {len(data)}"
        )
    return data


async def _write(node: ExportedNode, request: Request) -> Buffer:
    assert request.payload is not None
    fua = bool(request.flags & nbd.CMD_FLAG_FUA)
    await node.pwrite(request.offset, request.payload, fua=fua)
    return b""


async def _flush(node: ExportedNode, request: Request) -> Buffer:
    await node.flush()
    return b""


async def _trim(node: ExportedNode, request: Request) -> Buffer:
    await node.discard(request.offset, request.length)
    if request.flags & nbd.CMD_FLAG_FUA:
        await node.flush()
    return b""


async def _cache(node: ExportedNode, request: Request) -> Buffer:
    await node.prefetch(request.offset, request.length)
    return b""


async def _write_zeroes(node: ExportedNode, request: Request) -> Buffer:
    flags = request.flags
    await node.write_zeroes(
        request.offset,
        request.length,
        may_unmap=not flags & nbd.CMD_FLAG_NO_HOLE,
        no_fallback=bool(flags & nbd.CMD_FLAG_FAST_ZERO),
        fua=bool(flags & nbd.CMD_FLAG_FUA),
    )
    return b""


_WITH_DATA: Final = frozenset((nbd.CMD_READ, nbd.CMD_WRITE))

_COMMANDS: Final[dict[int, Callable[[ExportedNode, Request], Awaitable[Buffer]]]] = {
    nbd.CMD_READ: _read,
    nbd.CMD_WRITE: _write,
    nbd.CMD_FLUSH: _flush,
    nbd.CMD_TRIM: _trim,
    nbd.CMD_CACHE: _cache,
    nbd.CMD_WRITE_ZEROES: _write_zeroes,
}

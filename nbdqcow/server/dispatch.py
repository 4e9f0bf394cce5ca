"""The slow way of a request: a task that waits for the node."""

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from nbdqcow.buffers import BufferPool
from nbdqcow.errors import BlockError
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.errno_map import nbd_errno
from nbdqcow.nbd.replies import Replies
from nbdqcow.nbd.requests import Request, context_ids
from nbdqcow.server.block_status import block_status
from nbdqcow.server.export import ExportedNode
from nbdqcow.server.failures import FailureLog
from nbdqcow.server.poller import Poller
from nbdqcow.server.tls import TlsMemory
from nbdqcow.types import Buffer, Buffers
from nbdqcow.units import KiB, MiB

logger = logging.getLogger(__name__)

Reply = Callable[[Buffers], None]
"""Called with the buffers of a complete reply."""

MAX_STAGED: Final = 64 * KiB + 64
"""The head of a reply, and its data."""

_STATUS_BYTES: Final = 4 * MiB
"""What a BLOCK_STATUS counts as: its arrays and its reply."""


def _new_staging() -> memoryview:
    return memoryview(bytearray(MAX_STAGED))


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
        poller: keeps the event loop awake.
        max_bytes: bytes of data in flight that all connections may have
            together; each may have one request above it.
        nb_bytes: bytes of data in flight now.
        tasks: every request in flight.
        staging: memory in which a reply of at most `MAX_STAGED` bytes is put
            together to be encrypted. One for all: the processor's cache has it.
        tls: memory of the connections that are encrypted.
    """

    pool: BufferPool
    poller: Poller
    max_bytes: int = 512 * MiB
    nb_bytes: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    staging: memoryview = field(default_factory=_new_staging)
    tls: TlsMemory = field(default_factory=TlsMemory)


class Dispatcher:
    """The requests of one connection that are in flight as tasks.

    The owner asks `full` before it submits: then at most ``max_requests`` are
    in flight, and at most one payload more than ``max_bytes``.
    """

    __slots__ = (
        "nb_requests",
        "_contexts",
        "_failures",
        "_loop",
        "_max_bytes",
        "_max_requests",
        "_nb_bytes",
        "_node",
        "_replies",
        "_reply",
        "_shared",
    )

    def __init__(
        self,
        node: ExportedNode,
        replies: Replies,
        meta_contexts: Sequence[str],
        reply: Reply,
        shared: Shared,
        failures: FailureLog,
        *,
        max_requests: int,
        max_bytes: int,
    ) -> None:
        self.nb_requests = 0
        self._node = node
        self._replies = replies
        self._contexts = tuple(enumerate(meta_contexts))
        self._reply = reply
        self._shared = shared
        self._failures = failures
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
        nb_bytes = 0
        if request.command in _WITH_DATA:
            nb_bytes = request.length
        elif request.command == nbd.CMD_BLOCK_STATUS:
            nb_bytes = _STATUS_BYTES
        self.nb_requests += 1
        self._nb_bytes += nb_bytes
        self._shared.nb_bytes += nb_bytes
        task = self._loop.create_task(self._run(request, nb_bytes))
        self._shared.tasks.add(task)
        task.add_done_callback(self._shared.tasks.discard)

    async def _run(self, request: Request, nb_bytes: int) -> None:
        payload = request.payload
        try:
            reply = await self._serve(request)
        except asyncio.CancelledError:
            # The server is made to stop. A worker thread may still use the
            # payload, so it does not go back to the pool.
            payload = None
            reply = [
                self._replies.error(
                    request.cookie,
                    request.offset,
                    nbd.ESHUTDOWN,
                    "the server is shutting down",
                )
            ]
        except Exception as exc:
            error, text = self._failure(request, exc)
            reply = [self._replies.error(request.cookie, request.offset, error, text)]
        self.nb_requests -= 1
        self._nb_bytes -= nb_bytes
        self._shared.nb_bytes -= nb_bytes
        if payload is not None:
            self._shared.pool.release(payload)
        self._reply(reply)

    async def _serve(self, request: Request) -> list[Buffer]:
        """Return the reply to a request, or raise what is to be its error."""
        if request.command == nbd.CMD_READ:
            return await self._read(request)
        if request.command == nbd.CMD_BLOCK_STATUS:
            return await self._block_status(request)
        await _COMMANDS[request.command](self._node, request)
        return [self._replies.success(request.cookie, request.offset)]

    async def _read(self, request: Request) -> list[Buffer]:
        _, flags, cookie, offset, length, _ = request
        whole = bool(flags & nbd.CMD_FLAG_DF)
        data: list[Buffer] = []
        try:
            async for piece in self._node.pread_pieces(offset, length):
                # Not a comprehension: what came before a failure is sent.
                data.append(piece)  # noqa: PERF401
        except Exception as exc:
            error, text = self._failure(request, exc)
            if whole:
                data.clear()
            return self._replies.read_until(cookie, offset, data, error, text)
        nb_read = sum(map(len, data))
        if nb_read != length:
            # Sent as it is, the client would take the next reply for data.
            raise BlockError(errno.EIO, f"a read of {length} bytes gave {nb_read}")
        return self._replies.read(cookie, offset, data, whole=whole)

    async def _block_status(self, request: Request) -> list[Buffer]:
        contexts = self._contexts
        if request.flags & nbd.CMD_FLAG_PAYLOAD_LEN:
            assert request.payload is not None
            contexts = tuple(contexts[i] for i in context_ids(request.payload))
        rows = await block_status(self._node, request, contexts)
        return self._replies.block_status(request.cookie, request.offset, rows)

    def _failure(self, request: Request, exc: Exception) -> tuple[int, str]:
        """Return what to tell the client of a request that failed."""
        error = request_error(exc)
        if error == nbd.ENOTSUP:
            if request.flags & nbd.CMD_FLAG_FAST_ZERO:
                # Zeroes that are not fast: nothing is wrong with the image.
                return error, error_text(exc)
            # The protocol has it for fast zeroes only.
            error = nbd.EIO
        if isinstance(exc, OSError | MemoryError):
            what = nbd.COMMAND_NAMES[request.command]
            if request.command != nbd.CMD_FLUSH:
                what += f" of {request.length} bytes at {request.offset}"
            self._failures.note(what, exc, self._loop.time())
        return error, error_text(exc)


def error_text(exc: Exception) -> str:
    """Return what to tell people; of a bug, only that there is one."""
    if isinstance(exc, OSError):
        return str(exc.strerror or exc)
    return "out of memory" if isinstance(exc, MemoryError) else "internal error"


async def _write(node: ExportedNode, request: Request) -> None:
    assert request.payload is not None
    fua = bool(request.flags & nbd.CMD_FLAG_FUA)
    await node.pwrite(request.offset, request.payload, fua=fua)


async def _flush(node: ExportedNode, request: Request) -> None:
    await node.flush()


async def _trim(node: ExportedNode, request: Request) -> None:
    await node.discard(request.offset, request.length)
    if request.flags & nbd.CMD_FLAG_FUA:
        await node.flush()


async def _cache(node: ExportedNode, request: Request) -> None:
    await node.prefetch(request.offset, request.length)


async def _write_zeroes(node: ExportedNode, request: Request) -> None:
    flags = request.flags
    await node.write_zeroes(
        request.offset,
        request.length,
        may_unmap=not flags & nbd.CMD_FLAG_NO_HOLE,
        no_fallback=bool(flags & nbd.CMD_FLAG_FAST_ZERO),
        fua=bool(flags & nbd.CMD_FLAG_FUA),
    )


_WITH_DATA: Final = frozenset((nbd.CMD_READ, nbd.CMD_WRITE))

_COMMANDS: Final[dict[int, Callable[[ExportedNode, Request], Awaitable[None]]]] = {
    nbd.CMD_WRITE: _write,
    nbd.CMD_FLUSH: _flush,
    nbd.CMD_TRIM: _trim,
    nbd.CMD_CACHE: _cache,
    nbd.CMD_WRITE_ZEROES: _write_zeroes,
}

"""Listeners, exports, and an orderly end."""

import asyncio
import errno
import logging
import signal
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from nbdqcow.buffers import BufferPool, keep_freed_memory
from nbdqcow.errors import BlockError
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.handshake import ExportInfo
from nbdqcow.server.connection import Connection
from nbdqcow.server.dispatch import Shared
from nbdqcow.server.export import Export, ExportedNode
from nbdqcow.server.options import ServerOptions
from nbdqcow.server.poller import Poller
from nbdqcow.server.sockets import (
    Listener,
    SocketFile,
    as_stream,
    bind_tcp,
    bind_vsock,
    listen_unix_blocking,
)
from nbdqcow.server.tls import ServerTls

logger = logging.getLogger(__name__)

_MAX_WAITING: Final = 128
_MAX_REFUSED: Final = 16
"""Clients at a time that are told why they are refused; more are just closed."""
_CHECK_INTERVAL: Final = 1.0
"""Seconds between two looks at who has gone quiet, at the most."""
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_HANGUP: Final = signal.SIGHUP
"""Its terminal is gone: no reason to lose what clients have written."""
_CANCEL_TIMEOUT: Final = 1.0
"""Seconds that requests have to end once they are cancelled."""


class Server:
    """Serves exports on any number of listening sockets, on one event loop.

    Create it on the loop that it will run on. The nodes stay the caller's: it
    closes them after `run_until_stopped`.

    Attributes:
        on_last_disconnect: called when a client that had chosen an export
            leaves and no client is left.
        on_stopping: called when the end begins.
        before_stopping: awaited next, while clients are served as before; given
            up if the end must come at once.
    """

    def __init__(
        self, options: ServerOptions | None = None, tls: ServerTls | None = None
    ) -> None:
        self.on_last_disconnect: Callable[[], None] | None = None
        self.on_stopping: Callable[[], None] | None = None
        self.before_stopping: Callable[[], Awaitable[None]] | None = None
        self._options = options or ServerOptions()
        self._tls = tls
        poller = Poller(asyncio.get_running_loop(), self._options.poll_time)
        self._shared = Shared(BufferPool(), poller, self._options.max_total_bytes)
        self._exports: dict[str, Export] = {}
        self._source = _Exports(self._exports, self._options.sole_is_default)
        self._listeners: list[Listener] = []
        # Clients that are accepted and have no `Connection` yet.
        self._accepting: set[asyncio.Task[None]] = set()
        self._connections: set[Connection] = set()
        # Clients that have a place to wait for, longest first.
        self._waiting: deque[Connection] = deque()
        # Clients that are being told that there is no place.
        self._refused: set[Connection] = set()
        self._refusing = False
        self._stopping = False
        self._abandoned = False
        self._signalled = False
        # Set whenever one of these or the connections have changed.
        self._changed = asyncio.Event()

    # -- exports ---------------------------------------------------------------

    def add_export(
        self,
        name: str,
        node: ExportedNode,
        *,
        read_only: bool = False,
        description: str = "",
        multi_conn: bool = True,
        meta_contexts: Sequence[str] | None = None,
        minimum_block_size: int = nbd.DEFAULT_MINIMUM_BLOCK_SIZE,
        tls_only: bool = False,
        may_use: Callable[[bytes | None], bool] = lambda certificate: True,
    ) -> None:
        """Offer ``node`` under ``name``; "" is the default export; without one a
        sole export is it (`ServerOptions.sole_is_default`). ``meta_contexts`` are
        those offered: None for all that the node has. ``minimum_block_size`` is
        what clients that ask are told, in bytes.

        One that is ``tls_only`` can't be had without TLS, and ``may_use`` says
        which clients have it, by their certificates (DER, or None).

        Raises `ValueError` if the name is taken or can't be sent.
        """
        if name in self._exports:
            raise ValueError(f"there is an export {name!r} already")
        self._exports[name] = Export(
            name,
            node,
            read_only=read_only,
            description=description,
            multi_conn=multi_conn,
            meta_contexts=meta_contexts,
            minimum_block_size=minimum_block_size,
            maximum_payload=self._options.max_payload,
            tls_only=tls_only,
            may_use=may_use,
        )

    # -- listening ---------------------------------------------------------------

    async def listen_tcp(self, host: str | None, port: int) -> list[tuple[str, int]]:
        """Listen on all addresses of ``host`` (None: of this machine).

        Returns the address and port of each socket. Port 0 takes a free one,
        perhaps a different one for each address. Raises `OSError`.
        """
        sockets = await bind_tcp(host, port)
        try:
            for sock in sockets:
                self._listen(sock)
        except BaseException:
            for sock in sockets:
                self._forget(sock)
            raise
        return [sock.getsockname()[:2] for sock in sockets]

    async def listen_unix(
        self,
        path: str,
        *,
        mode: int | None = None,
        owner: tuple[int, int] | None = None,
        label: str | None = None,
    ) -> None:
        """Listen on a unix socket, which is removed at the end.

        ``path`` begins with NUL for an abstract one; ``mode`` and ``owner``
        (user and group) are the file's, ``label`` is the socket's in SELinux.
        A socket file that nobody listens on
        any more is replaced. Raises `OSError` (EADDRINUSE if something else
        is there).
        """
        sock, file = await asyncio.to_thread(
            listen_unix_blocking, path, mode=mode, owner=owner, label=label
        )
        self._listen(sock, file)

    async def listen_vsock(self, cid: int, port: int) -> tuple[int, int]:
        """Listen on a vsock port of ``cid``; returns both as they are then.
        Raises `OSError`."""
        sock = bind_vsock(cid, port)
        self._listen(sock)
        found: tuple[int, int] = sock.getsockname()
        return found

    async def listen_socket(self, sock: socket.socket) -> None:
        """Listen on a bound stream socket, which the server closes."""
        self._listen(sock)

    async def serve_socket(self, sock: socket.socket) -> None:
        """Serve the client on a connected stream socket, which the server
        closes. Without any listener the server stops when it leaves."""
        self._on_accepted(sock)

    def _listen(self, sock: socket.socket, file: SocketFile | None = None) -> None:
        try:
            listener = Listener(sock, self._on_accepted, file)
        except BaseException:
            sock.close()
            if file is not None:
                file.remove()
            raise
        self._listeners.append(listener)

    def _forget(self, sock: socket.socket) -> None:
        """Undo `_listen`, if it came to that."""
        for listener in [each for each in self._listeners if each.sock is sock]:
            self._listeners.remove(listener)
            listener.close()
        sock.close()

    # -- running -------------------------------------------------------------------

    def stop(self) -> None:
        """Ask for an orderly end."""
        self._stopping = True
        self._changed.set()

    def abandon(self) -> None:
        """Ask for an end at once, whatever is in flight."""
        self._abandoned = True
        self.stop()

    async def run_until_stopped(self, *, last: bool = False) -> None:
        """Serve until `stop`, SIGTERM, SIGINT or SIGHUP, then end in order.

        No client is accepted any more, requests in flight are finished, and
        all exports are flushed. A second signal (or `abandon`) cuts this
        short: requests in flight are given up and nothing is flushed. Raises
        `OSError` if an export could not be flushed.

        ``last``: only the closing of images comes after this, and one Ctrl-C too
        many must not cut that short: SIGINT and SIGHUP are ignored from then on.
        """
        keep_freed_memory()
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        # nohup(1) has it ignored, and then it stays so. As a session ends it may
        # come twice, which is no second wish.
        hangs_up = signal.getsignal(_HANGUP) is signal.SIG_DFL
        if hangs_up:
            loop.add_signal_handler(_HANGUP, self.stop)
        checking = loop.create_task(self._check_quiet())
        try:
            while not self._stopping:
                await self._wait_for_change()
            if self.on_stopping is not None:
                self.on_stopping()
            if self.before_stopping is not None:
                await self._prepare_to_stop(self.before_stopping)
            self._close_listeners()
            for connection in (*self._connections, *self._waiting, *self._refused):
                connection.drain()
            while self._connections and not self._abandoned:
                await self._wait_for_change()
            if not self._abandoned:
                await self._flush_exports()
        finally:
            checking.cancel()
            self._close_listeners()
            await self._give_up()
            for number in (*_SIGNALS, *((_HANGUP,) if hangs_up else ())):
                # A first SIGTERM that comes only now asks for what is being done.
                ends = number == signal.SIGTERM and self._signalled
                _release_signal(loop, number, ignore=last and not ends)

    async def _prepare_to_stop(self, prepare: Callable[[], Awaitable[None]]) -> None:
        preparing = asyncio.ensure_future(prepare())
        preparing.add_done_callback(lambda _: self._changed.set())
        try:
            while not (preparing.done() or self._abandoned):
                await self._wait_for_change()
        finally:
            preparing.cancel()
        if preparing.done():
            preparing.result()

    def _on_signal(self) -> None:
        if self._signalled:
            self.abandon()
        self._signalled = True
        self.stop()

    async def _check_quiet(self) -> None:
        timeouts = (self._options.idle_timeout, self._options.reply_timeout)
        interval = min([_CHECK_INTERVAL, *(t / 4 for t in timeouts if t)])
        loop = asyncio.get_running_loop()
        last = loop.time()
        while True:
            await asyncio.sleep(interval)
            now = loop.time()
            held_up = now - last > 2 * interval
            last = now
            for connection in tuple(self._connections):
                connection.check_quiet(now, held_up=held_up)

    async def _wait_for_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def _give_up(self) -> None:
        """Cancel whatever is left."""
        for connection in (*self._connections, *self._waiting, *self._refused):
            connection.abort()
        tasks = self._shared.tasks
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CANCEL_TIMEOUT)

    async def _flush_exports(self) -> None:
        failure: OSError | None = None
        for node in {id(e.node): e.node for e in self._exports.values()}.values():
            try:
                await node.flush()
            except OSError as exc:
                failure = failure or _flush_error(node, exc)
        if failure is not None:
            raise failure

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    # -- clients -----------------------------------------------------------------

    def _on_accepted(self, sock: socket.socket) -> None:
        task = asyncio.get_running_loop().create_task(self._connect(as_stream(sock)))
        self._accepting.add(task)
        task.add_done_callback(self._accepting.discard)

    async def _connect(self, sock: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._make_connection, sock
            )
        except OSError as exc:
            logger.warning("a client was lost at once: %s", exc)
            sock.close()
            self._stop_if_deserted()

    def _make_connection(self) -> Connection:
        return Connection(
            self._exports,
            self._source,
            self._shared,
            self._options,
            self._tls,
            self._on_made,
            self._on_closed,
        )

    def _on_made(self, connection: Connection) -> bool:
        if self._stopping:
            return False
        if len(self._connections) < self._options.max_connections:
            self._connections.add(connection)
            connection.start()
            return True
        if self._options.wait_when_full and len(self._waiting) < _MAX_WAITING:
            self._waiting.append(connection)
            connection.wait()
            return True
        if not self._refusing:
            logger.warning(
                "client refused: there are %d already", len(self._connections)
            )
        # Once is enough: a client that tries again and again fills the log.
        self._refusing = True
        if len(self._refused) >= _MAX_REFUSED:
            return False
        self._refused.add(connection)
        connection.start(
            f"the server has {self._options.max_connections} clients already, "
            f"and takes no more"
        )
        return True

    def _on_closed(self, connection: Connection) -> None:
        if connection in self._refused:
            self._refused.remove(connection)
            return
        self._refusing = False
        self._changed.set()
        if connection not in self._connections:
            self._waiting.remove(connection)
            return
        self._connections.remove(connection)
        if (
            connection.negotiated
            and not self._connections
            and not self._stopping
            and self.on_last_disconnect is not None
        ):
            self.on_last_disconnect()
        if self._waiting and not self._stopping:
            waiting = self._waiting.popleft()
            self._connections.add(waiting)
            waiting.start()
        self._stop_if_deserted()

    def _stop_if_deserted(self) -> None:
        """Stop if nobody is there and nobody can come any more."""
        if not (self._listeners or self._connections):
            self.stop()


class _Exports:
    """The exports as the handshake looks for them."""

    def __init__(self, exports: dict[str, Export], sole_is_default: bool) -> None:
        self._exports = exports
        self._sole_is_default = sole_is_default

    def list_exports(self) -> Sequence[ExportInfo]:
        return [export.info for export in self._exports.values()]

    def find_export(self, name: str) -> ExportInfo | None:
        export = self._exports.get(name)
        if (
            export is None
            and self._sole_is_default
            and not name
            and len(self._exports) == 1
        ):
            (export,) = self._exports.values()
        return None if export is None else export.info


def _flush_error(node: ExportedNode, exc: OSError) -> OSError:
    """Return an error of a last flush with words that name the image."""
    text = exc.strerror or str(exc)
    if node.filename in text:
        return exc
    return BlockError(exc.errno or errno.EIO, f"'{node.filename}': {text}")


def _release_signal(
    loop: asyncio.AbstractEventLoop, number: signal.Signals, *, ignore: bool
) -> None:
    while True:
        try:
            loop.remove_signal_handler(number)
            if ignore:
                signal.signal(number, signal.SIG_IGN)
            return
        except KeyboardInterrupt:
            # Between the two it is Python's own.
            if not ignore:
                raise

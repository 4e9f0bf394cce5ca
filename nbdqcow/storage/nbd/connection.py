"""One connection to an NBD server."""

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final, cast

from nbdqcow.errors import ImageError, ProtocolError
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.client import (
    ClientHandshake,
    ClientState,
    OptionResult,
    RemoteExport,
)
from nbdqcow.nbd.client_transmission import Call, ClientTransmission
from nbdqcow.nbd.uri import NbdUri
from nbdqcow.storage.nbd.tls import client_context_blocking
from nbdqcow.tls import describe_tls_error
from nbdqcow.transports import mend_writelines
from nbdqcow.types import Buffer
from nbdqcow.units import KiB, MiB

BASE_ALLOCATION: Final = "base:allocation"
CONTEXT_PARAMETER: Final = "x-dirty-bitmap"
"""The parameter of a URI that names another context in its place."""
_HANDSHAKE_BUFFER: Final = 64 * KiB
_SEND_BUFFER: Final = 1 * MiB
_CLOSE_SECONDS: Final = 1.0
_ANSWER_SECONDS: Final = 3.0
"""How long an end waits for what the server still owes."""
_VSOCK_TIMEOUT: Final = 10.0
"""Seconds that connecting may take."""


class Connection(asyncio.BufferedProtocol):
    """A connection in the transmission phase; `connect` makes one.

    Attributes:
        export: what the server says of the export.
        extended: whether lengths may have more than 32 bits.
        context: the metadata context that BLOCK_STATUS tells.
        has_status: whether the server has it.
    """

    def __init__(self, uri: NbdUri) -> None:
        self.export = RemoteExport()
        self.extended = False
        self.context = uri.parameters.get(CONTEXT_PARAMETER, BASE_ALLOCATION)
        self.has_status = False
        self._uri = uri
        self._handshake = ClientHandshake()
        self._buffer = memoryview(bytearray(_HANDSHAKE_BUFFER))
        self._transmission: ClientTransmission | None = None
        self._transport: asyncio.Transport | None = None
        self._changed = asyncio.Event()
        self._lost: Exception | None = None
        self._on_complete: Callable[[Call], None] | None = None
        self._on_lost: Callable[[Exception], None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._gone = asyncio.Event()

    # -- the transport's callbacks -----------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Set what a connection of ours has."""
        self._transport = cast(asyncio.Transport, transport)
        mend_writelines(self._transport)
        sock = transport.get_extra_info("socket")
        with suppress(OSError):
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Say where the next bytes go: `asyncio.BufferedProtocol`."""
        if self._transmission is not None:
            return self._transmission.get_buffer()
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take what has arrived: `asyncio.BufferedProtocol`."""
        try:
            if self._transmission is None:
                self._handshake.receive_data(self._buffer[:nbytes])
                self._changed.set()
            else:
                self._complete(self._transmission.received(nbytes))
        except ProtocolError as exc:
            self._lose(exc)

    def pause_writing(self) -> None:
        """Hold back requests with data: see `writable`."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Let them go."""
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever waits for something."""
        self._gone.set()
        self._lose(exc or ConnectionResetError("the server closed the connection"))

    # -- the handshake -----------------------------------------------------

    async def negotiate(self) -> None:
        """Choose the export. Raises `ImageError` if the server refuses, and
        `ProtocolError` or `OSError`."""
        handshake, name = self._handshake, self._uri.export
        while handshake.state is ClientState.GREETING:
            await self._wait()
        if self._uri.tls:
            await self._start_tls()
        if not handshake.server_flags & nbd.FLAG_FIXED_NEWSTYLE:
            handshake.export_name(name)
            self._begin(await self._answer(), structured=False, contexts={})
            return
        handshake.extended_headers()
        self.extended = structured = not (await self._answer()).error
        if not structured:
            handshake.structured_reply()
            structured = not (await self._answer()).error
        contexts: dict[int, str] = {}
        if structured:
            handshake.set_meta_contexts(name, (self.context,))
            contexts = (await self._answer()).context_ids
        handshake.go(name, (nbd.INFO_BLOCK_SIZE,))
        answer = await self._answer()
        if answer.error == nbd.REP_ERR_UNSUP:
            handshake.export_name(name)
            answer = await self._answer()
        if answer.error:
            raise ImageError(answer.refusal)
        self._begin(answer, structured=structured, contexts=contexts)

    async def _start_tls(self) -> None:
        """Go on encrypted. Raises `ImageError` or `CredentialsError`."""
        context, hostname = await asyncio.to_thread(client_context_blocking, self._uri)
        if not self._handshake.server_flags & nbd.FLAG_FIXED_NEWSTYLE:
            raise ImageError("the server is too old to offer TLS")
        self._handshake.starttls()
        answer = await self._answer()
        if answer.error:
            raise ImageError(answer.refusal)
        assert self._transport is not None
        try:
            transport = await asyncio.get_running_loop().start_tls(
                self._transport,
                self,
                context,
                server_hostname=hostname if context.check_hostname else None,
            )
        except (OSError, ValueError) as exc:
            raise ImageError(f"TLS: {describe_tls_error(exc)}") from None
        if transport is None or transport.is_closing():
            raise ConnectionAbortedError("the server closed the connection")
        self._transport = transport

    def _begin(
        self, answer: OptionResult, *, structured: bool, contexts: dict[int, str]
    ) -> None:
        assert answer.export is not None
        self.export = answer.export
        self.has_status = self.context in contexts.values()
        if not self.has_status and self.context != BASE_ALLOCATION:
            raise ImageError(f"requested {CONTEXT_PARAMETER} {self.context} not found")
        self._transmission = ClientTransmission(
            structured=structured, extended=self.extended, contexts=contexts
        )
        if self._handshake.trailing:
            raise ProtocolError("the server speaks without being asked")
        self._buffer = memoryview(b"")

    async def _answer(self) -> OptionResult:
        """Send what was asked and wait for the answer."""
        assert self._transport is not None
        self._transport.write(self._handshake.data_to_send())
        while self._handshake.state is ClientState.WAITING:
            await self._wait()
        assert self._handshake.result is not None
        return self._handshake.result

    async def _wait(self) -> None:
        await self._changed.wait()
        self._changed.clear()
        if self._lost is not None:
            raise self._lost
        assert self._transport is not None
        if self._handshake.state is ClientState.IDLE:
            # The client's flags, after the greeting.
            self._transport.write(self._handshake.data_to_send())

    # -- requests ----------------------------------------------------------

    def start(
        self, on_complete: Callable[[Call], None], on_lost: Callable[[Exception], None]
    ) -> None:
        """Say who is told of complete calls and, once, of the end."""
        if self._lost is not None:
            raise self._lost
        self._on_complete = on_complete
        self._on_lost = on_lost

    @property
    def is_writable(self) -> bool:
        """Whether `writable` need not be waited for."""
        return self._writable.is_set()

    async def writable(self) -> None:
        """Wait until the server takes what was sent, or is lost."""
        await self._writable.wait()

    def submit(self, call: Call) -> None:
        """Send a request; ``on_complete`` follows."""
        assert self._transport is not None
        assert self._transmission is not None
        head: Buffer = self._transmission.request(call)
        if call.payload:
            self._transport.writelines([head, *call.payload])
        else:
            self._transport.write(head)

    def _complete(self, calls: list[Call]) -> None:
        for call in calls:
            if self._on_complete is not None:
                self._on_complete(call)

    def _lose(self, exc: Exception) -> None:
        if self._lost is not None:
            return
        self._lost = exc
        self._changed.set()
        self._writable.set()
        if self._transport is not None:
            self._transport.abort()
        if self._on_lost is not None:
            self._on_lost(exc)

    async def close(self) -> None:
        """Say DISC if that is what the phase wants, and close. Nobody is told.

        Requests that nobody waits for any more are answered first: some servers,
        nbdkit 1.32 for one, fall over a client that leaves before.
        """
        answered = asyncio.Event()
        self._on_complete = lambda _: answered.set()
        self._on_lost = lambda _: answered.set()
        if self._transport is None:
            return
        if self._lost is None:
            if self._transmission is not None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_ANSWER_SECONDS):
                        while self._transmission.calls and self._lost is None:
                            answered.clear()
                            await answered.wait()
                if self._lost is None:
                    self.submit(Call(nbd.CMD_DISC))
            self._transport.close()
        await self.wait_closed()

    async def wait_closed(self) -> None:
        """Wait until the transport has gone; not for long. An event loop that is
        closed before that may complain."""
        if self._transport is None:
            return
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._gone.wait()
        except TimeoutError:
            self._transport.abort()
            await asyncio.sleep(0)

    def abort(self) -> None:
        """Break the connection."""
        self._lose(ConnectionAbortedError("the connection was given up"))


async def connect(uri: NbdUri, *, timeout: float) -> Connection:
    """Return a connection to the export that ``uri`` names.

    Raises `ImageError` if the server refuses, `ProtocolError`, and `OSError`
    (`TimeoutError` after ``timeout`` seconds).
    """
    connection = Connection(uri)
    try:
        async with asyncio.timeout(timeout):
            await _open_transport(uri, connection)
            await connection.negotiate()
    except BaseException:
        connection.abort()
        await connection.wait_closed()
        raise
    return connection


async def _open_transport(uri: NbdUri, connection: Connection) -> None:
    loop = asyncio.get_running_loop()

    def factory() -> Connection:
        return connection

    if uri.transport == "unix":
        await loop.create_unix_connection(factory, uri.socket)
    elif uri.transport == "vsock":
        sock = await asyncio.to_thread(_connect_vsock, int(uri.host), uri.port)
        await loop.create_unix_connection(factory, sock=sock)
    else:
        await loop.create_connection(factory, uri.host, uri.port)


def _connect_vsock(cid: int, port: int) -> socket.socket:
    """Return a connected vsock socket in the disguise of a unix one: event
    loops know no other stream socket besides TCP's."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
        sock.settimeout(_VSOCK_TIMEOUT)
        sock.connect((cid, port))
        sock.setblocking(False)
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=sock.detach())

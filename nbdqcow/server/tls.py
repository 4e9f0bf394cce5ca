"""TLS on the server's connections."""

import asyncio
import logging
import ssl
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, cast

from nbdqcow.errors import TlsError
from nbdqcow.nbd.handshake import TlsMode
from nbdqcow.server.sockets import peer_name
from nbdqcow.server.tls_engine import PythonEngine, TlsEngine
from nbdqcow.tls import TlsCredentials
from nbdqcow.types import Buffer
from nbdqcow.units import KiB

logger = logging.getLogger(__name__)

_JOIN_BELOW: Final = 16 * KiB
"""Bytes below which a buffer is joined with its neighbours: each one that is
encrypted by itself is a record, and a call, of its own."""
_PIECE: Final = 64 * KiB
"""Bytes that are encrypted, then sent, at a time."""


def _new_incoming() -> memoryview:
    return memoryview(bytearray(256 * KiB))


def _new_outgoing() -> memoryview:
    # Every record has a head and a tag.
    return memoryview(bytearray(_PIECE + 1 * KiB))


@dataclass(slots=True)
class TlsMemory:
    """Where encrypted bytes are between a socket and OpenSSL, for all connections
    of a server: the processor's cache has it.

    Attributes:
        incoming: what one read of a socket has brought.
        outgoing: what one write takes; new if the socket keeps it.
    """

    incoming: memoryview = field(default_factory=_new_incoming)
    outgoing: memoryview = field(default_factory=_new_outgoing)


@dataclass(frozen=True, slots=True)
class ServerTls:
    """What a server's TLS is made of; ``mode`` is not OFF."""

    credentials: TlsCredentials[Any]
    mode: TlsMode = TlsMode.REQUIRED


def _new_engine(context: object) -> TlsEngine:
    if isinstance(context, ssl.SSLContext):
        return PythonEngine(context)
    from nbdqcow.server.tls_openssl import OpenSslEngine

    return OpenSslEngine(cast(Any, context))


async def start_tls(
    wire: asyncio.Transport,
    protocol: asyncio.BufferedProtocol,
    tls: ServerTls,
    memory: TlsMemory,
    *,
    close_timeout: float,
) -> "TlsTransport":
    """Upgrade a connection whose reading is paused; return its new transport,
    whose reading is paused, too. ``close_timeout`` is that of `ServerOptions`.

    Raises `OSError` if there is no connection any more, or if the peer can't
    have one: then ``connection_lost`` may or may not have been called.
    """
    context = await asyncio.to_thread(tls.credentials.context_blocking)
    if wire.is_closing():
        raise ConnectionAbortedError
    if wire.get_write_buffer_size():
        # It waits for the reply: only one that ignores them all gets here.
        raise ConnectionAbortedError("the client reads no replies")
    engine = _new_engine(context)
    transport = TlsTransport(wire, protocol, engine, memory, close_timeout)
    await transport.established
    if wire.get_write_buffer_size():
        raise ConnectionAbortedError("the client reads no replies")
    return transport


class TlsTransport(asyncio.Transport, asyncio.BufferedProtocol):
    """The protocol of a socket's transport, the ``wire``, and the transport of
    the protocol behind it; in between everything is encrypted.

    What belongs together is encrypted in few pieces. All of it at once: what waits
    does so in the wire, in memory that nobody changes.

    Attributes:
        established: done, or failed with `OSError`, when the handshake is.
    """

    def __init__(
        self,
        wire: asyncio.Transport,
        protocol: asyncio.BufferedProtocol,
        engine: TlsEngine,
        memory: TlsMemory,
        close_timeout: float,
    ) -> None:
        """Begin the handshake."""
        super().__init__()
        self.established: asyncio.Future[None] = (
            asyncio.get_running_loop().create_future()
        )
        self._wire = wire
        self._protocol = protocol
        self._engine = engine
        self._memory = memory
        self._close_timeout = close_timeout
        self._abort_timer: asyncio.TimerHandle | None = None
        # Until the handshake's end nothing is decrypted for the protocol.
        self._shaking = True
        # The protocol wants nothing more for now.
        self._paused = True
        self._pulling = False
        # Nothing comes from the wire until it has sent what TLS had to say.
        self._held = False
        # The wire has brought its last byte.
        self._eof = False
        self._eof_told = False
        self._closing = False
        wire.set_write_buffer_limits(high=0, low=0)
        wire.set_protocol(self)
        wire.resume_reading()

    # -- what the wire calls -------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        """Say where encrypted bytes go: `asyncio.BufferedProtocol`."""
        return self._memory.incoming

    def buffer_updated(self, nbytes: int) -> None:
        """Decrypt what has come: `asyncio.BufferedProtocol`."""
        # Behind the end of TLS nothing can come, and nobody would take it.
        if self._closing or self._engine.at_end:
            return
        self._engine.receive(self._memory.incoming[:nbytes])
        if self._shaking:
            self._shake()
        else:
            self._pull()

    def eof_received(self) -> bool:
        """The peer has ended its direction, whether it has said so or not."""
        self._eof = True
        if self._shaking:
            return False
        self._pull()
        # Closing is up to the protocol.
        return True

    def pause_writing(self) -> None:
        """The peer does not keep up."""
        if not self._shaking:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """The peer has taken everything."""
        if self._held:
            self._held = False
            if not (self._paused or self._wire.is_closing()):
                self._wire.resume_reading()
        if not self._shaking:
            self._protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing comes or goes any more."""
        self._closing = True
        if self._abort_timer is not None:
            self._abort_timer.cancel()
        if not self._shaking:
            self._protocol.connection_lost(exc)
        elif not self.established.done():
            self.established.set_exception(exc or ConnectionAbortedError())

    def _shake(self) -> None:
        try:
            done = self._engine.handshake()
        except TlsError as exc:
            self._fail(exc)
            return
        self._send()
        if done:
            self._shaking = False
            # What has come behind it waits until the protocol is ready.
            if not self._wire.is_closing():
                self._wire.pause_reading()
            if not self.established.done():
                self.established.set_result(None)

    def _pull(self) -> None:
        """Let the protocol have what there is, as long as it wants any."""
        if self._pulling:
            return
        self._pulling = True
        engine = self._engine
        try:
            while not (self._paused or self._closing):
                nb_read = engine.read_into(
                    cast(memoryview, self._protocol.get_buffer(-1))
                )
                if nb_read:
                    self._protocol.buffer_updated(nb_read)
                    continue
                if (self._eof or engine.at_end) and not self._eof_told:
                    self._eof_told = True
                    if not self._protocol.eof_received():
                        self.close()
                break
            if not self._closing:
                self._answer()
        except TlsError as exc:
            self._fail(exc)
        finally:
            self._pulling = False

    def _answer(self) -> None:
        """Send what TLS itself says to what was read: its new keys for the peer's,
        or that nothing is negotiated anew.

        A peer can ask for it again and again, and take none of it.
        """
        wire = self._wire
        if self._send() and wire.get_write_buffer_size() and not wire.is_closing():
            self._held = True
            wire.pause_reading()

    def _fail(self, exc: TlsError) -> None:
        """Tell the peer why it ends here, but do not wait for ever until it listens."""
        if not self._closing:
            self._closing = True
            if self._shaking:
                if not self.established.done():
                    self.established.set_exception(exc)
            else:
                logger.warning("%s closed: TLS: %s", peer_name(self._wire), exc)
            self._send()
            self._wire.close()
            self._abort_timer = asyncio.get_running_loop().call_later(
                self._close_timeout, self._wire.abort
            )

    def _send(self) -> bool:
        """Write what the engine has encrypted; say whether that was anything."""
        memory = self._memory
        wire = self._wire
        nb_sent = 0
        while nb_bytes := self._engine.take(memory.outgoing):
            nb_sent += nb_bytes
            data = memory.outgoing[:nb_bytes]
            if wire.get_write_buffer_size():
                wire.write(bytes(data))
                continue
            wire.write(data)
            if wire.get_write_buffer_size():
                memory.outgoing = _new_outgoing()
        return nb_sent > 0

    # -- what the protocol calls -----------------------------------------------------

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Change the protocol."""
        self._protocol = cast(asyncio.BufferedProtocol, protocol)

    def get_extra_info(self, name: str, default: object = None) -> object:
        """Return what the wire says."""
        return self._wire.get_extra_info(name, default)

    def peer_certificate(self) -> bytes | None:
        """Return the verified certificate of the client as DER; None without one."""
        return self._engine.peer_certificate()

    def set_write_buffer_limits(
        self, high: int | None = None, low: int | None = None
    ) -> None:
        """Have writing paused above ``high`` encrypted bytes."""
        self._wire.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        """Return the encrypted bytes that wait to be sent."""
        return self._wire.get_write_buffer_size()

    def pause_reading(self) -> None:
        """Take nothing more from the client for now."""
        self._paused = True
        if not self._wire.is_closing():
            self._wire.pause_reading()

    def resume_reading(self) -> None:
        """Take from the client again."""
        if not self._paused:
            return
        self._paused = False
        if self._wire.is_closing():
            return
        if not self._held:
            self._wire.resume_reading()
        if not self._pulling:
            # Some may have been received, but not decrypted.
            asyncio.get_running_loop().call_soon(self._pull)

    def write(self, data: Buffer) -> None:
        """Encrypt and send a buffer, of which nothing is kept."""
        if self._closing:
            return
        view = memoryview(data)
        try:
            for start in range(0, len(view), _PIECE):
                self._engine.write(view[start : start + _PIECE])
                self._send()
        except TlsError as exc:
            self._fail(exc)

    def writelines(self, list_of_data: Iterable[Buffer]) -> None:
        """Send buffers, of which nothing is kept.

        Each piece leaves as soon as it is encrypted: the client decrypts it
        while the next one is encrypted.
        """
        for buffer in _joined(list_of_data):
            self.write(buffer)

    def close(self) -> None:
        """Send what is queued, end TLS, close."""
        if self._closing:
            return
        self._closing = True
        self._engine.end()
        self._send()
        self._wire.close()

    def abort(self) -> None:
        """Close at once."""
        self._closing = True
        self._wire.abort()


def _joined(buffers: Iterable[Buffer]) -> Iterator[Buffer]:
    """Yield the bytes of all buffers, small ones that are neighbours as one."""
    small: list[Buffer] = []
    nb_small = 0
    for buffer in buffers:
        is_small = len(buffer) < _JOIN_BELOW
        if small and (not is_small or nb_small >= _PIECE):
            yield b"".join(small)
            small.clear()
            nb_small = 0
        if is_small:
            small.append(buffer)
            nb_small += len(buffer)
        else:
            yield buffer
    if small:
        yield b"".join(small)

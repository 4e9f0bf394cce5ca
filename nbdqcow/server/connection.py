"""One client: its socket, its handshake, and how it ends."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final, cast

from nbdqcow.errors import OptionError
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.handshake import (
    ExportInfo,
    ExportSource,
    HandshakeState,
    ServerHandshake,
    TlsMode,
)
from nbdqcow.nbd.option_data import quote
from nbdqcow.nbd.replies import ReplyStyle
from nbdqcow.nbd.requests import COMPACT, EXTENDED, RequestReader
from nbdqcow.server.dispatch import Shared
from nbdqcow.server.export import Export
from nbdqcow.server.inline import Transmission
from nbdqcow.server.options import ServerOptions
from nbdqcow.server.sockets import peer_name, tune
from nbdqcow.server.tls import ServerTls, TlsTransport, start_tls
from nbdqcow.tls import describe_tls_error
from nbdqcow.transports import mend_writelines
from nbdqcow.units import KiB, MiB

logger = logging.getLogger(__name__)

_SEND_BUFFER: Final = 1 * MiB
_HANDSHAKE_BUFFER: Final = 8 * KiB
_DRAIN_TIMEOUT: Final = 0.5
"""Seconds that a client has to hear of the server's end while it haggles."""


class Connection(asyncio.BufferedProtocol):
    """The handshake of a client; hands the transport to a `Transmission`.

    Attributes:
        negotiated: whether the client has come to the transmission phase.
    """

    def __init__(
        self,
        exports: Mapping[str, Export],
        source: ExportSource,
        shared: Shared,
        options: ServerOptions,
        tls: ServerTls | None,
        on_made: Callable[["Connection"], bool],
        on_closed: Callable[["Connection"], None],
    ) -> None:
        """``on_made`` says whether the client is welcome, and calls `start` at
        once or, after `wait`, later. ``on_closed`` is called once for each that
        is welcome, when nothing of it is left."""
        self.negotiated = False
        self._exports = exports
        self._shared = shared
        self._options = options
        self._on_made = on_made
        self._on_closed = on_closed
        self._tls = tls
        self._handshake = ServerHandshake(
            source,
            tls=tls.mode if tls else TlsMode.OFF,
            may_use=self._may_use,
            max_option_length=options.max_option_length,
            admit=self._admit,
            structured_replies=options.structured_replies,
        )
        self._certificate: bytes | None = None
        self._upgrading = False
        self._buffer = memoryview(bytearray(_HANDSHAKE_BUFFER))
        self._transmission: Transmission | None = None
        self._transport: asyncio.Transport | None = None
        self._peer = "client"
        self._timer: asyncio.TimerHandle | None = None
        self._welcome = False
        self._waiting = False
        self._failed = False
        self._lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let the server `start` the client, or close one too many."""
        self._transport = cast(asyncio.Transport, transport)
        mend_writelines(self._transport)
        self._welcome = self._on_made(self)
        if not self._welcome:
            self._transport.abort()

    def start(self, refusal: str | None = None) -> None:
        """Greet the client; with ``refusal`` only to tell it why it can't
        stay, whatever it asks for."""
        assert self._transport is not None
        if refusal is not None:
            self._handshake.refusal = OptionError(nbd.REP_ERR_POLICY, refusal)
        if self._waiting:
            self._waiting = False
            self._transport.resume_reading()
        # Not when there is something to tell: the socket may be gone by then.
        self._peer = peer_name(self._transport)
        with suppress(OSError):
            tune(self._transport.get_extra_info("socket"), send_buffer=_SEND_BUFFER)
        self._timer = asyncio.get_running_loop().call_later(
            self._options.handshake_timeout, self._time_out
        )
        self._transport.write(self._handshake.data_to_send())

    def wait(self) -> None:
        """Leave the client alone until `start`."""
        self._waiting = True
        # Not now: a transport starts to read after `connection_made`.
        asyncio.get_running_loop().call_soon(self._pause)

    def _pause(self) -> None:
        assert self._transport is not None
        if self._waiting:
            self._transport.pause_reading()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Say where the next bytes go: `asyncio.BufferedProtocol`."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Go on with the handshake: `asyncio.BufferedProtocol`."""
        assert self._transport is not None
        handshake = self._handshake
        handshake.receive_data(self._buffer[:nbytes])
        if handshake.state is HandshakeState.STARTTLS:
            # Before the client can answer: what it sends next is for TLS.
            self._transport.pause_reading()
        reply = handshake.data_to_send()
        if reply:
            self._transport.write(reply)
        if handshake.state is HandshakeState.TRANSMISSION:
            self._enter_transmission(self._transport)
        elif handshake.state is HandshakeState.STARTTLS:
            self._upgrading = True
            task = asyncio.get_running_loop().create_task(
                self._upgrade(self._transport)
            )
            self._shared.tasks.add(task)
            task.add_done_callback(self._shared.tasks.discard)
        elif handshake.state is HandshakeState.CLOSED:
            if handshake.error:
                self._log_closed(handshake.error)
            self._transport.close()
        elif handshake.shutting_down and reply:
            self._transport.close()

    def pause_writing(self) -> None:
        """Take no more options from a client that does not read replies."""
        assert self._transport is not None
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """The client has read its replies."""
        assert self._transport is not None
        if not self._upgrading:
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a client that never came to the transmission phase."""
        if self._lost:
            return
        self._lost = True
        if self._timer is not None:
            self._timer.cancel()
        if self._welcome:
            if not self._failed:
                refused = self._handshake.refused
                reason = f" (it was told: {refused})" if refused else ""
                logger.debug("%s left without an export%s", self._peer, reason)
            self._on_closed(self)

    def check_quiet(self, now: float, *, held_up: bool) -> None:
        """See `Transmission.check_quiet`; the handshake has its own deadline."""
        if self._transmission is not None:
            self._transmission.check_quiet(now, held_up=held_up)

    # -- TLS -------------------------------------------------------------------

    async def _upgrade(self, transport: asyncio.Transport) -> None:
        """Go on encrypted, or not at all."""
        assert self._tls is not None
        upgraded: TlsTransport | None = None
        try:
            upgraded = await start_tls(
                transport,
                self,
                self._tls,
                self._shared.tls,
                close_timeout=self._options.close_timeout,
            )
        except OSError as exc:
            self._fail(f"TLS: {describe_tls_error(exc)}")
        finally:
            if upgraded is None:
                transport.abort()
                # Of one that is lost before TLS has begun we are not told.
                self.connection_lost(None)
        if upgraded is None or self._lost:
            return
        self._upgrading = False
        self._transport = upgraded
        self._certificate = upgraded.peer_certificate()
        self._handshake.tls_started()
        upgraded.resume_reading()

    def _may_use(self, export: ExportInfo) -> bool:
        return self._exports[export.name].may_use(self._certificate)

    # -- ending ----------------------------------------------------------------

    def drain(self) -> None:
        """Let requests in flight end, then close."""
        if self._transmission is not None:
            self._transmission.drain()
        elif self._transport is not None and self._timer is not None:
            # The next option gets an error that says why.
            self._handshake.shutting_down = True
            self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_later(
                _DRAIN_TIMEOUT, self._transport.abort
            )
        elif self._transport is not None:
            self._transport.abort()

    def abort(self) -> None:
        """Close now, whatever is in flight."""
        if self._transport is not None:
            self._transport.abort()

    def _time_out(self) -> None:
        self._fail("no handshake in time")

    def _fail(self, reason: str) -> None:
        assert self._transport is not None
        if not (self._lost or self._failed):
            self._log_closed(reason)
        self._transport.abort()

    def _log_closed(self, reason: str) -> None:
        self._failed = True
        logger.warning("%s closed: %s", self._peer, reason)

    def _admit(self, info: ExportInfo) -> None:
        """Keep the client from an export that has enough of them."""
        limit = self._options.max_export_connections
        if limit and self._exports[info.name].nb_clients >= limit:
            raise OptionError(
                nbd.REP_ERR_POLICY,
                f"the export has {limit} clients already, and takes no more",
            )

    def _enter_transmission(self, transport: asyncio.Transport) -> None:
        assert self._handshake.export is not None
        assert self._timer is not None
        self._timer.cancel()
        export = self._exports[self._handshake.export.name]
        export.nb_clients += 1
        terms = self._handshake.terms
        logger.debug(
            "%s uses the export %s: %s replies, %s",
            self._peer,
            quote(export.name),
            terms.style.name.lower(),
            "TLS" if self._handshake.encrypted else "no TLS",
        )
        reader = RequestReader(
            self._shared.pool,
            export.maximum_payload,
            EXTENDED if terms.style is ReplyStyle.EXTENDED else COMPACT,
        )
        trailing = self._handshake.trailing
        if trailing:
            reader.get_buffer()[: len(trailing)] = trailing
            reader.received(len(trailing))
        self._transmission = Transmission(
            transport,
            reader,
            export,
            terms,
            self._shared,
            self._options,
            lambda: self._leave(export),
        )
        self.negotiated = True
        self._buffer = memoryview(b"")
        transport.set_protocol(self._transmission)
        # `pause_writing` may have stopped it, and `resume_writing` goes to the
        # new protocol.
        transport.resume_reading()
        self._transmission.start()

    def _leave(self, export: Export) -> None:
        export.nb_clients -= 1
        logger.debug("%s has left the export %s", self._peer, quote(export.name))
        self._on_closed(self)

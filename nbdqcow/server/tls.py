"""TLS on the server's connections."""

import asyncio
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from nbdqcow.nbd.handshake import TlsMode
from nbdqcow.tls import TlsCredentials
from nbdqcow.types import Buffer
from nbdqcow.units import KiB

_JOIN_BELOW: Final = 16 * KiB
"""Bytes below which a buffer is joined with its neighbours: each one that is
encrypted by itself is a record, and a call, of its own."""
_PIECE: Final = 64 * KiB
"""Bytes that are encrypted, then sent, at a time."""


@dataclass(frozen=True, slots=True)
class ServerTls:
    """What a server's TLS is made of; ``mode`` is not OFF."""

    credentials: TlsCredentials
    mode: TlsMode = TlsMode.REQUIRED


async def start_tls(
    transport: asyncio.Transport,
    protocol: asyncio.BufferedProtocol,
    tls: ServerTls,
    timeout: float,
) -> asyncio.Transport:
    """Upgrade a connection whose reading is paused; return its new transport.

    Decrypted bytes may come to ``protocol`` before this returns. Raises
    `OSError` if there is no connection any more: then ``connection_lost`` may
    or may not have been called.
    """
    context = await asyncio.to_thread(tls.credentials.context_blocking)
    if transport.is_closing():
        raise ConnectionAbortedError
    if transport.get_write_buffer_size():
        # It waits for the reply: only one that ignores them all gets here.
        raise ConnectionAbortedError("the client reads no replies")
    # What is encrypted waits in the outer transport until the client reads.
    transport.set_write_buffer_limits(high=0, low=0)
    upgraded = await asyncio.get_running_loop().start_tls(
        transport,
        protocol,
        context,
        server_side=True,
        ssl_handshake_timeout=timeout,
    )
    # It is closed, or None, where the connection was lost meanwhile.
    if upgraded is None or upgraded.is_closing():
        raise ConnectionAbortedError
    return upgraded


def peer_certificate(transport: asyncio.Transport) -> bytes | None:
    """Return the verified certificate of the client as DER; None without one."""
    connection = transport.get_extra_info("ssl_object")
    assert isinstance(connection, ssl.SSLObject)
    if connection.context.verify_mode is ssl.CERT_NONE:
        return None
    return connection.getpeercert(binary_form=True)


class TlsTransport(asyncio.Transport):
    """A transport of `start_tls`, as the transmission phase wants one: what
    belongs together is encrypted in few pieces."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport

    def get_extra_info(self, name: str, default: object = None) -> object:
        """Return what the encrypted transport says."""
        return self._transport.get_extra_info(name, default)

    def set_write_buffer_limits(
        self, high: int | None = None, low: int | None = None
    ) -> None:
        """Have writing paused above ``high`` bytes, as a plain transport does.

        The transports of TLS pause it at the limit, so with 0 for ever.
        """
        self._transport.set_write_buffer_limits(None if high is None else high + 1, low)

    def get_write_buffer_size(self) -> int:
        """Return the bytes that wait to be sent or encrypted."""
        return self._transport.get_write_buffer_size()

    def pause_reading(self) -> None:
        """Take nothing more from the client for now."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Take from the client again."""
        self._transport.resume_reading()

    def write(self, data: Buffer) -> None:
        """Send a buffer, which is kept while `get_write_buffer_size` is not 0."""
        self._transport.write(data)

    def writelines(self, list_of_data: Iterable[Buffer]) -> None:
        """Send buffers, of which nothing is kept.

        Each piece leaves as soon as it is encrypted: the client decrypts it
        while the next one is encrypted.
        """
        small: list[Buffer] = []
        nb_small = 0
        for buffer in list_of_data:
            if len(buffer) < _JOIN_BELOW:
                small.append(buffer)
                nb_small += len(buffer)
                if nb_small >= _PIECE:
                    self._transport.writelines(_joined(small))
                    small.clear()
                    nb_small = 0
                continue
            # A view, because OpenSSL takes 16 KiB at a time, and what is left
            # of ``bytes`` would be copied each time.
            view = memoryview(buffer)
            self._transport.writelines((*_joined(small), view[:_PIECE]))
            small.clear()
            nb_small = 0
            for start in range(_PIECE, len(view), _PIECE):
                self._transport.write(view[start : start + _PIECE])
        self._transport.writelines(_joined(small))

    def close(self) -> None:
        """Send what is queued, end TLS, close."""
        self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()


def _joined(buffers: list[Buffer]) -> tuple[memoryview, ...]:
    """Return all buffers as one, if there are any."""
    return (memoryview(b"".join(buffers)),) if buffers else ()

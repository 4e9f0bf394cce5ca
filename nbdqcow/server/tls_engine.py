"""What encrypts one connection: bytes in, bytes out, no socket.

`PythonEngine` is Python's own ``ssl``, which alone knows pre-shared keys;
certificates have the one of `nbdqcow.server.tls_openssl`.
"""

import contextlib
import ssl
from abc import ABC, abstractmethod
from typing import cast

from nbdqcow.errors import TlsError
from nbdqcow.tls import describe_tls_error
from nbdqcow.types import Buffer


class TlsEngine(ABC):
    """The server's end of one TLS connection.

    `handshake`, `read_into` and `write` raise `TlsError` where the peer is refused or
    breaks the protocol; what `take` then has tells the peer.

    Attributes:
        at_end: the peer has said that nothing more comes from it.
    """

    at_end = False

    @abstractmethod
    def receive(self, data: memoryview) -> None:
        """Take bytes that have come from the peer, of which nothing is kept."""

    @abstractmethod
    def handshake(self) -> bool:
        """Go on with the handshake; say whether it is done."""

    @abstractmethod
    def read_into(self, buffer: memoryview) -> int:
        """Decrypt to the start of ``buffer``; return the bytes there are now, 0
        if more must come first, or never will."""

    @abstractmethod
    def write(self, data: Buffer) -> None:
        """Encrypt bytes for `take`. The handshake is done."""

    @abstractmethod
    def take(self, buffer: memoryview) -> int:
        """Move bytes for the peer to the start of ``buffer``; return how many."""

    @abstractmethod
    def end(self) -> None:
        """Say to the peer that nothing more comes, if it can be said."""

    @abstractmethod
    def peer_certificate(self) -> bytes | None:
        """Return the verified certificate of the peer as DER; None without one."""


class PythonEngine(TlsEngine):
    """TLS by Python's ``ssl``."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._verifies = context.verify_mode is not ssl.CERT_NONE
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)

    def receive(self, data: memoryview) -> None:
        """See `TlsEngine`."""
        self._incoming.write(data)

    def handshake(self) -> bool:
        """See `TlsEngine`."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as exc:
            raise TlsError(describe_tls_error(exc)) from exc
        return True

    def read_into(self, buffer: memoryview) -> int:
        """See `TlsEngine`."""
        nb_read = 0
        try:
            while nb_read < len(buffer):
                left = len(buffer) - nb_read
                nb_more = cast(int, self._tls.read(left, buffer[nb_read:]))
                if not nb_more:
                    self.at_end = True
                    break
                nb_read += nb_more
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.at_end = True
        except ssl.SSLError as exc:
            raise TlsError(describe_tls_error(exc)) from exc
        return nb_read

    def write(self, data: Buffer) -> None:
        """See `TlsEngine`."""
        view = memoryview(data)
        try:
            while view:
                view = view[self._tls.write(view) :]
        except ssl.SSLError as exc:
            raise TlsError(describe_tls_error(exc)) from exc

    def take(self, buffer: memoryview) -> int:
        """See `TlsEngine`."""
        data = self._outgoing.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def end(self) -> None:
        """See `TlsEngine`."""
        # It wants to see the peer's own word of it, too.
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()

    def peer_certificate(self) -> bytes | None:
        """See `TlsEngine`."""
        return self._tls.getpeercert(binary_form=True) if self._verifies else None

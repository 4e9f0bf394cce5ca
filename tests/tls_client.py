"""`NbdClient` over TLS, with both directions under the test's control."""

import select
import socket
import ssl
import struct
from pathlib import Path

from tests.nbd_client import NbdClient

_OPT_STARTTLS = 5
_REP_ACK = 1


class TlsSocket:
    """What `NbdClient` needs of a socket that does not block, encrypted.

    `send` waits until all has left, and takes in what comes meanwhile.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self.plain = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            self._incoming, self._outgoing, server_hostname="localhost"
        )
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                self._fill(60)
            else:
                self._flush()
                return

    @property
    def pending(self) -> bool:
        """Whether some may be read without the socket."""
        return bool(self._incoming.pending or self.tls.pending())

    def fileno(self) -> int:
        return self.plain.fileno()

    def setsockopt(self, *arguments: int | bytes) -> None:
        self.plain.setsockopt(*arguments)

    def send(self, data: bytes | memoryview) -> int:
        nb_bytes = self.tls.write(memoryview(data)[: 1 << 16])
        self._flush()
        return nb_bytes

    def recv(self, nb_bytes: int) -> bytes:
        """Raises `BlockingIOError`; returns nothing at the end of TLS only."""
        if not self.pending and not self._fill(0):
            raise BlockingIOError
        data = bytearray()
        try:
            while len(data) < nb_bytes:
                piece = self.tls.read(nb_bytes - len(data))
                if not piece:
                    break
                data += piece
        except ssl.SSLZeroReturnError:
            pass
        except ssl.SSLWantReadError:
            if not data:
                raise BlockingIOError from None
        return bytes(data)

    def end(self) -> None:
        """Say that nothing more comes from us."""
        try:
            self.tls.unwrap()
        except ssl.SSLError as exc:
            # It waits for the peer's own word, or has data before that.
            if exc.reason not in (None, "APPLICATION_DATA_AFTER_CLOSE_NOTIFY"):
                raise
        self._flush()

    def record(self, data: bytes) -> bytes:
        """Return the records of ``data``, which are not sent."""
        self.tls.write(data)
        return self._outgoing.read()

    def close(self) -> None:
        self.plain.close()

    def _flush(self) -> None:
        rest = memoryview(self._outgoing.read())
        poll = select.poll()
        poll.register(self.plain, select.POLLIN | select.POLLOUT)
        while rest:
            ready = poll.poll(60_000)
            if not ready:
                raise TimeoutError("the server takes nothing")
            if ready[0][1] & select.POLLOUT:
                rest = rest[self.plain.send(rest) :]
            if ready[0][1] & ~select.POLLOUT:
                self._fill(0)

    def _fill(self, seconds: float) -> bool:
        """Take what comes within some seconds; whether that was anything."""
        if not select.select([self.plain], [], [], seconds)[0]:
            return False
        data = self.plain.recv(1 << 18)
        if not data:
            raise ConnectionResetError("the server closed the connection")
        self._incoming.write(data)
        return True


class TlsNbdClient(NbdClient):
    """A client that begins with STARTTLS."""

    def __init__(self, address: Path, context: ssl.SSLContext) -> None:
        self._context = context
        super().__init__(address)

    @property
    def socket(self) -> TlsSocket:
        assert isinstance(self._socket, TlsSocket)
        return self._socket

    def _wait_for(self, events: int) -> int:
        if isinstance(self._socket, TlsSocket) and self._socket.pending:
            return events
        return super()._wait_for(events)

    def _greet(self) -> None:
        super()._greet()
        self._send(struct.pack(">QII", 0x49484156454F5054, _OPT_STARTTLS, 0))
        _, option, kind, length = struct.unpack(">QIII", self._take(20))
        assert (option, kind, length) == (_OPT_STARTTLS, _REP_ACK, 0)
        self._socket = TlsSocket(self._socket, self._context)

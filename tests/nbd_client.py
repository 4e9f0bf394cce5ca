"""A small blocking NBD client for tests: raw, pipelining, simple replies only.

It shares no code with the server under test, so that a misunderstanding of
the protocol cannot hide in both. It validates nothing on the way out: tests
send what they like and look at the error that comes back.
"""

import contextlib
import select
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES = range(
    7
)

CMD_FLAG_FUA = 1 << 0
CMD_FLAG_NO_HOLE = 1 << 1
CMD_FLAG_FAST_ZERO = 1 << 4

FLAG_READ_ONLY = 1 << 1
FLAG_SEND_FLUSH = 1 << 2
FLAG_SEND_FUA = 1 << 3
FLAG_SEND_TRIM = 1 << 5
FLAG_SEND_WRITE_ZEROES = 1 << 6
FLAG_CAN_MULTI_CONN = 1 << 8
FLAG_SEND_CACHE = 1 << 10
FLAG_SEND_FAST_ZERO = 1 << 11

EPERM, EIO, ENOMEM, EINVAL, ENOSPC, ENOTSUP = 1, 5, 12, 22, 28, 95

_REQUEST = struct.Struct(">IHHQQI")
_REQUEST_MAGIC = 0x25609513
_SIMPLE_REPLY = struct.Struct(">IIQ")
_SIMPLE_REPLY_MAGIC = 0x67446698
_OPTION_MAGIC = 0x49484156454F5054
_OPTION_REPLY = struct.Struct(">QIII")
_OPTION_REPLY_MAGIC = 0x3E889045565A9
_OPT_GO = 7
_REP_ACK, _REP_INFO = 1, 3
_INFO_EXPORT = 0


class NbdError(Exception):
    """The server answered a request with an error."""

    def __init__(self, error: int, text: str) -> None:
        super().__init__(f"{text}: NBD error {error}")
        self.error = error


@dataclass(frozen=True, slots=True)
class Reply:
    """One simple reply; ``data`` only for a successful read."""

    cookie: int
    error: int
    data: bytes


class NbdClient:
    """One connection in its transmission phase.

    Sending never deadlocks against a server that is itself blocked sending:
    while the socket takes nothing, replies are read and kept. Everything
    fails with `TimeoutError` after ``timeout`` seconds without progress.
    """

    def __init__(
        self,
        address: str | Path | tuple[str, int],
        export: str = "",
        *,
        timeout: float = 60.0,
    ) -> None:
        if isinstance(address, tuple):
            self._socket = socket.create_connection(address, timeout=timeout)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.connect(str(address))
            except OSError:
                self._socket.close()
                raise
        self._socket.setblocking(False)
        self._timeout = timeout
        self._inbox = bytearray()
        self._next_cookie = 1
        self._lengths: dict[int, int] = {}
        self._early: dict[int, Reply] = {}
        try:
            self.size, self.flags = self._negotiate(export.encode())
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- requests --------------------------------------------------------

    def submit(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        data: bytes | memoryview = b"",
        flags: int = 0,
    ) -> int:
        """Send one request and return its cookie; the reply comes later."""
        cookie = self._next_cookie
        self._next_cookie += 1
        self._lengths[cookie] = length if command == CMD_READ else 0
        head = _REQUEST.pack(_REQUEST_MAGIC, flags, command, cookie, offset, length)
        self._send(head + data)
        return cookie

    def receive(self) -> Reply:
        """Return the next reply in the order in which the server sent them."""
        if self._early:
            return self._early.pop(next(iter(self._early)))
        return self._receive()

    def wait(self, cookie: int) -> Reply:
        """Return the reply to one request, keeping others for later."""
        while cookie not in self._early:
            reply = self._receive()
            self._early[reply.cookie] = reply
        return self._early.pop(cookie)

    def reply_waiting(self) -> bool:
        """Say whether `receive` has something to start on without waiting."""
        return bool(self._early or self._inbox)

    def fileno(self) -> int:
        """For `select`; see `reply_waiting` for what was read already."""
        return self._socket.fileno()

    @property
    def nb_in_flight(self) -> int:
        """Requests without a reply as yet."""
        return len(self._lengths)

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        data: bytes | memoryview = b"",
        flags: int = 0,
    ) -> Reply:
        """Send one request and wait for its reply, whatever it says."""
        return self.wait(self.submit(command, offset, length, data, flags))

    def _succeed(self, text: str, reply: Reply) -> bytes:
        if reply.error:
            raise NbdError(reply.error, text)
        return reply.data

    def read(self, offset: int, length: int) -> bytes:
        reply = self.request(CMD_READ, offset, length)
        return self._succeed(f"read {offset}+{length}", reply)

    def write(self, offset: int, data: bytes | memoryview, flags: int = 0) -> None:
        reply = self.request(CMD_WRITE, offset, len(data), data, flags)
        self._succeed(f"write {offset}+{len(data)}", reply)

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        reply = self.request(CMD_WRITE_ZEROES, offset, length, flags=flags)
        self._succeed(f"write zeroes {offset}+{length}", reply)

    def trim(self, offset: int, length: int) -> None:
        reply = self.request(CMD_TRIM, offset, length)
        self._succeed(f"trim {offset}+{length}", reply)

    def flush(self) -> None:
        self._succeed("flush", self.request(CMD_FLUSH))

    def disconnect(self) -> None:
        """Send DISC, and see that the server closes its side."""
        self._send(_REQUEST.pack(_REQUEST_MAGIC, 0, CMD_DISC, 0, 0, 0))
        self._wait_for(select.POLLIN)
        with contextlib.suppress(ConnectionResetError):
            rest = self._socket.recv(1)
            assert rest == b"", f"the server sent {rest!r} after DISC"
        self.close()

    def close(self) -> None:
        """Drop the connection without a word."""
        self._socket.close()

    # -- bytes -----------------------------------------------------------

    def _wait_for(self, events: int) -> int:
        poll = select.poll()
        poll.register(self._socket, events)
        ready = poll.poll(self._timeout * 1000)
        if not ready:
            raise TimeoutError(
                f"no answer within {self._timeout:.0f} s, {self.nb_in_flight} in flight"
            )
        return ready[0][1]

    def _fill(self) -> None:
        with contextlib.suppress(BlockingIOError):
            piece = self._socket.recv(1 << 20)
            if not piece:
                raise ConnectionResetError("the server closed the connection")
            self._inbox += piece

    def _send(self, data: bytes) -> None:
        rest = memoryview(data)
        deadline = time.monotonic() + self._timeout
        while rest:
            ready = self._wait_for(select.POLLIN | select.POLLOUT)
            if ready & select.POLLIN:
                self._fill()
            if ready & select.POLLOUT:
                with contextlib.suppress(BlockingIOError):
                    rest = rest[self._socket.send(rest) :]
            elif ready & (select.POLLERR | select.POLLHUP):
                raise ConnectionResetError("the server closed the connection")
            if time.monotonic() > deadline:
                raise TimeoutError("the server does not take our request")

    def _take(self, length: int) -> bytes:
        while len(self._inbox) < length:
            self._wait_for(select.POLLIN)
            self._fill()
        data = bytes(memoryview(self._inbox)[:length])
        del self._inbox[:length]
        return data

    def _receive(self) -> Reply:
        magic, error, cookie = _SIMPLE_REPLY.unpack(self._take(_SIMPLE_REPLY.size))
        assert magic == _SIMPLE_REPLY_MAGIC, f"bad reply magic {magic:#x}"
        assert cookie in self._lengths, f"reply to no request: cookie {cookie}"
        length = self._lengths.pop(cookie)
        return Reply(cookie, error, b"" if error else self._take(length))

    def _greet(self) -> None:
        greeting = self._take(18)
        assert greeting[:16] == b"NBDMAGICIHAVEOPT", greeting
        (server_flags,) = struct.unpack(">H", greeting[16:])
        assert server_flags & 1, "not fixed newstyle"
        self._send(struct.pack(">I", server_flags & 3))

    def _negotiate(self, export: bytes) -> tuple[int, int]:
        self._greet()
        payload = struct.pack(">I", len(export)) + export + struct.pack(">H", 0)
        self._send(struct.pack(">QII", _OPTION_MAGIC, _OPT_GO, len(payload)) + payload)
        size = flags = None
        while True:
            magic, option, kind, length = _OPTION_REPLY.unpack(self._take(20))
            assert (magic, option) == (_OPTION_REPLY_MAGIC, _OPT_GO)
            body = self._take(length)
            if kind == _REP_ACK:
                assert size is not None, "ACK without an export info"
                assert flags is not None
                return size, flags
            if kind != _REP_INFO:
                raise NbdError(kind, f"GO refused: {body.decode(errors='replace')}")
            if struct.unpack(">H", body[:2])[0] == _INFO_EXPORT:
                size, flags = struct.unpack(">QH", body[2:])

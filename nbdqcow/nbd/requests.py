"""The transmission phase as the server sees it, without input or output.

`RequestReader` owns the bytes that have arrived. Its buffer and the marks
``start`` and ``end`` are open to the inline path (`nbdqcow.server.inline`),
which serves the most frequent requests right out of the buffer; whatever that
does not take, `RequestReader.next_request` parses.
"""

from struct import Struct
from typing import Final, NamedTuple

from nbdqcow.buffers import BufferPool
from nbdqcow.errors import ProtocolError
from nbdqcow.nbd import constants as nbd
from nbdqcow.units import KiB

REQUEST_HEAD: Final = Struct(">Q8sQI")
"""A request in the fewest fields: magic, flags and command in one word, then
cookie, offset, length. A comparison of the word tells a plain command."""
HEAD_LENGTH: Final = REQUEST_HEAD.size

PLAIN_READ: Final = nbd.REQUEST_MAGIC << 32 | nbd.CMD_READ
PLAIN_WRITE: Final = nbd.REQUEST_MAGIC << 32 | nbd.CMD_WRITE
"""First words of requests without flags."""

_REPLY: Final = Struct(">II8s")
REPLY_OK: Final = nbd.SIMPLE_REPLY_MAGIC.to_bytes(4, "big") + bytes(4)
"""A successful simple reply up to its cookie."""

STAGED_PAYLOAD: Final = 64 * KiB
"""Bytes of payload up to which a write waits in the buffer until complete."""
_CAPACITY: Final = 256 * KiB
_WINDOW_AFTER_PAYLOAD: Final = 4 * KiB
"""Bytes asked for after a large payload: what follows is likely another large
write, and all of it that arrives with its header must be copied."""


def simple_reply(cookie: bytes, error: int) -> bytes:
    """Return a simple reply without data; ``cookie`` as it came."""
    return _REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, error, cookie)


class Request(NamedTuple):
    """One request (proto.md "Request message").

    Attributes:
        command: ``CMD_*``, perhaps an unknown one.
        flags: ``CMD_FLAG_*``.
        cookie: the 8 bytes to send back.
        offset, length: bytes; unchecked.
        payload: the data of a WRITE, from the reader's pool: whoever takes the
            request releases it. None for any other command, and for a write
            of more than ``maximum_payload``, whose data is dropped.
    """

    command: int
    flags: int
    cookie: bytes
    offset: int
    length: int
    payload: memoryview | None


class RequestReader:
    """The receive buffer of one connection, and the requests in it.

    Memory is bounded: the buffer, and one payload of ``maximum_payload`` at
    the most. A larger one is dropped as it arrives, whatever its length, so
    that the client gets its error and stays connected.

    Attributes:
        buffer: bytes ``start`` to ``end`` have arrived and are not yet parsed.
        maximum_payload: bytes of data that a WRITE may have.
        at_header: whether ``start`` is at a request's header.
    """

    __slots__ = (
        "at_header",
        "buffer",
        "end",
        "maximum_payload",
        "start",
        "_head",
        "_nb_filled",
        "_nb_skip",
        "_payload",
        "_pool",
        "_window",
    )

    def __init__(self, pool: BufferPool, maximum_payload: int) -> None:
        self.buffer = memoryview(bytearray(_CAPACITY))
        self.start = 0
        self.end = 0
        self.maximum_payload = maximum_payload
        self.at_header = True
        self._pool = pool
        self._window = self.buffer
        self._nb_skip = 0
        # A payload that is received where it will be used.
        self._payload: memoryview | None = None
        self._nb_filled = 0
        self._head: tuple[int, bytes, int, int] = (0, b"", 0, 0)

    @property
    def full(self) -> bool:
        """Whether nothing more can be received before something is parsed."""
        return self.end - self.start == _CAPACITY

    def get_buffer(self) -> memoryview:
        """Return where to put the bytes that arrive next. Not for a full one."""
        payload = self._payload
        if payload is not None and self._nb_filled < len(payload):
            return payload[self._nb_filled :]
        start, end = self.start, self.end
        if start == end:
            self.start = self.end = 0
            window = self._window
            self._window = self.buffer
            return window
        if start and end > _CAPACITY // 2:
            self.buffer[: end - start] = self.buffer[start:end]
            self.start = 0
            self.end = end = end - start
        return self.buffer[end:]

    def received(self, length: int) -> None:
        """``length`` bytes are now where `get_buffer` said."""
        payload = self._payload
        if payload is not None and self._nb_filled < len(payload):
            self._nb_filled += length
        else:
            self.end += length

    def next_request(self) -> Request | None:
        """Take the next request, or return None until more has arrived.

        Raises `ProtocolError` if what comes next is no request.
        """
        if not self.at_header and not self._finish_payload():
            return None
        if self._payload is not None:
            return self._take_payload(self._payload)
        start = self.start
        nb_available = self.end - start
        if nb_available < HEAD_LENGTH:
            return None
        word, cookie, offset, length = REQUEST_HEAD.unpack_from(self.buffer, start)
        if word >> 32 != nbd.REQUEST_MAGIC:
            raise ProtocolError(f"bad request magic {word >> 32:#010x}")
        command = word & 0xFFFF
        flags = word >> 16 & 0xFFFF
        start += HEAD_LENGTH
        payload = None
        if command == nbd.CMD_WRITE:
            if length > self.maximum_payload:
                self._nb_skip = length
                self.at_header = False
            elif length <= nb_available - HEAD_LENGTH:
                payload = self._pool.acquire(length)
                payload[:] = self.buffer[start : start + length]
                start += length
            elif length <= STAGED_PAYLOAD:
                return None
            else:
                self._head = (flags, cookie, offset, length)
                self._begin_payload(start, length)
                return None
        self.start = start
        return Request(command, flags, cookie, offset, length, payload)

    def close(self) -> None:
        """Give back a payload that will not be completed."""
        if self._payload is not None:
            self._pool.release(self._payload)
            self._payload = None

    def _begin_payload(self, start: int, length: int) -> None:
        """Move the part of a large payload that is here to its own buffer."""
        self._payload = self._pool.acquire(length)
        self._nb_filled = self.end - start
        self._payload[: self._nb_filled] = self.buffer[start : self.end]
        self.start = self.end = 0
        self.at_header = False

    def _finish_payload(self) -> bool:
        """Drop what has arrived of an oversize payload; tell whether the
        payload under way is complete."""
        if self._payload is not None:
            return self._nb_filled == len(self._payload)
        nb_dropped = min(self._nb_skip, self.end - self.start)
        self._nb_skip -= nb_dropped
        self.start += nb_dropped
        self.at_header = not self._nb_skip
        return self.at_header

    def _take_payload(self, payload: memoryview) -> Request:
        self._payload = None
        self.at_header = True
        self._window = self.buffer[:_WINDOW_AFTER_PAYLOAD]
        flags, cookie, offset, length = self._head
        return Request(nbd.CMD_WRITE, flags, cookie, offset, length, payload)

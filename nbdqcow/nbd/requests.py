"""The requests of the transmission phase as the server sees them.

`RequestReader` owns the bytes that have arrived. Its buffer and the marks
``start`` and ``end`` are open to the inline path (`nbdqcow.server.inline`),
which serves the most frequent requests right out of the buffer; whatever that
does not take, `RequestReader.next_request` parses.
"""

import mmap
from struct import Struct
from typing import Final, NamedTuple

from nbdqcow.buffers import BufferPool
from nbdqcow.errors import ProtocolError
from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd
from nbdqcow.types import Buffer
from nbdqcow.units import KiB


class Layout(NamedTuple):
    """How requests are laid out, for those who take them out of the buffer.

    Attributes:
        head: a request's header in the fewest fields: magic, flags and command
            in one word, then cookie, offset, length.
        length: bytes of a header.
        plain_read: the first word of a read without flags.
        plain_writes: first words of writes without further flags. QEMU's
            client leaves out the flag that says that a payload follows.
        extended: whether a flag says that there is a payload.
    """

    head: Struct
    length: int
    plain_read: int
    plain_writes: tuple[int, ...]
    extended: bool


COMPACT: Final = Layout(
    Struct(">Q8sQI"),
    codec.REQUEST.size,
    nbd.REQUEST_MAGIC << 32 | nbd.CMD_READ,
    (nbd.REQUEST_MAGIC << 32 | nbd.CMD_WRITE,),
    extended=False,
)
EXTENDED: Final = Layout(
    Struct(">Q8sQQ"),
    codec.EXTENDED_REQUEST.size,
    nbd.EXTENDED_REQUEST_MAGIC << 32 | nbd.CMD_READ,
    (
        nbd.EXTENDED_REQUEST_MAGIC << 32
        | nbd.CMD_FLAG_PAYLOAD_LEN << 16
        | nbd.CMD_WRITE,
        nbd.EXTENDED_REQUEST_MAGIC << 32 | nbd.CMD_WRITE,
    ),
    extended=True,
)

STAGED_PAYLOAD: Final = 64 * KiB
"""Bytes of payload up to which a write waits in the buffer until complete."""
_CAPACITY: Final = 256 * KiB
_WINDOW_AFTER_PAYLOAD: Final = 4 * KiB
"""Bytes asked for after a large payload: what follows is likely another large
write, and all of it that arrives with its header must be copied."""


class Request(NamedTuple):
    """One request (proto.md "Request message").

    Attributes:
        command: ``CMD_*``, perhaps an unknown one.
        flags: ``CMD_FLAG_*``; PAYLOAD_LEN is taken off a write that has it.
        cookie: the 8 bytes to send back.
        offset, length: bytes; unchecked.
        payload: the data of a WRITE, or what an extended BLOCK_STATUS brings,
            from the reader's pool: whoever takes the request releases it. None
            for any other command, and for a payload that was too large and
            has been dropped.
    """

    command: int
    flags: int
    cookie: bytes
    offset: int
    length: int
    payload: memoryview | None


def expand_status(request: Request) -> Request:
    """Take the payload of an extended BLOCK_STATUS apart.

    The result has the effect length as its length, and as its payload the IDs
    of the contexts asked for, 4 bytes each; no IDs for a malformed payload.
    """
    payload = request.payload
    if payload is None:
        return request._replace(length=0)
    if len(payload) < codec.U64.size or len(payload) % 4:
        return request._replace(length=0, payload=payload[:0])
    (length,) = codec.U64.unpack_from(payload)
    return request._replace(length=length, payload=payload[codec.U64.size :])


def context_ids(payload: Buffer) -> tuple[int, ...]:
    """Return the IDs in the payload of an expanded BLOCK_STATUS."""
    return Struct(f">{len(payload) // 4}I").unpack(payload)


class RequestReader:
    """The receive buffer of one connection, and the requests in it.

    Memory is bounded: the buffer, and one payload of ``maximum_payload`` at
    the most. A larger one is dropped as it arrives, whatever its length, so
    that the client gets its error and stays connected.

    Attributes:
        buffer: bytes ``start`` to ``end`` have arrived and are not yet parsed.
        maximum_payload: bytes of data that a WRITE may have.
        at_header: whether ``start`` is at a request's header.
        nb_ahead: the owner's own mark in the payload of the `arriving` write,
            and in that of the request returned last; 0 to begin with.
        layout: of the headers.
    """

    __slots__ = (
        "at_header",
        "buffer",
        "end",
        "layout",
        "maximum_payload",
        "nb_ahead",
        "start",
        "_head",
        "_nb_filled",
        "_nb_skip",
        "_pages",
        "_payload",
        "_pool",
        "_window",
    )

    def __init__(
        self, pool: BufferPool, maximum_payload: int, layout: Layout = COMPACT
    ) -> None:
        self.layout = layout
        # Pages that nothing was received into take no memory.
        self._pages: mmap.mmap | None = mmap.mmap(
            -1, _CAPACITY, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        self.buffer = memoryview(self._pages)
        self.start = 0
        self.end = 0
        self.maximum_payload = maximum_payload
        self.at_header = True
        self.nb_ahead = 0
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

    @property
    def arriving(self) -> Request | None:
        """The large write whose data is under way, with what is here of it."""
        if self._payload is None:
            return None
        flags, cookie, offset, length = self._head
        payload = self._payload[: self._nb_filled]
        return Request(nbd.CMD_WRITE, flags, cookie, offset, length, payload)

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

        Raises `ProtocolError` if what comes next is no request, `MemoryError` if
        there is no room for its data.
        """
        if not self.at_header and not self._finish_payload():
            return None
        if self._payload is not None:
            return self._take_payload(self._payload)
        start = self.start
        nb_available = self.end - start
        layout = self.layout
        if nb_available < layout.length:
            return None
        word, cookie, offset, length = layout.head.unpack_from(self.buffer, start)
        if word >> 32 != layout.plain_read >> 32:
            raise ProtocolError(f"bad request magic {word >> 32:#010x}")
        self.nb_ahead = 0
        command = word & 0xFFFF
        flags = word >> 16 & 0xFFFF
        payload_length = self._payload_length(command, flags, length)
        if command == nbd.CMD_WRITE and layout.extended:
            flags &= ~nbd.CMD_FLAG_PAYLOAD_LEN
        start += layout.length
        payload = None
        if payload_length is not None:
            if payload_length > self._wanted_payload(command):
                self._nb_skip = payload_length
                self.at_header = False
            elif payload_length <= nb_available - layout.length:
                payload = self._pool.acquire(payload_length)
                payload[:] = self.buffer[start : start + payload_length]
                start += payload_length
            elif payload_length <= STAGED_PAYLOAD:
                return None
            else:
                self._head = (flags, cookie, offset, length)
                self._begin_payload(start, payload_length)
                return None
        self.start = start
        return Request(command, flags, cookie, offset, length, payload)

    def _payload_length(self, command: int, flags: int, length: int) -> int | None:
        """Return the bytes of payload behind a header, None without one.

        Raises `ProtocolError` for more than anybody may send.
        """
        if not self.layout.extended:
            return length if command == nbd.CMD_WRITE else None
        if command != nbd.CMD_WRITE and not flags & nbd.CMD_FLAG_PAYLOAD_LEN:
            return None
        if length > max(nbd.DEFAULT_MAXIMUM_PAYLOAD, self.maximum_payload):
            raise ProtocolError(f"a payload of {length} bytes")
        return length

    def _wanted_payload(self, command: int) -> int:
        """Return the bytes of payload that are kept for a command."""
        if command == nbd.CMD_WRITE:
            return self.maximum_payload
        return STAGED_PAYLOAD if command == nbd.CMD_BLOCK_STATUS else -1

    def shrink(self) -> None:
        """Give back the memory of an empty buffer, until it is filled again."""
        if self.start == self.end and self._pages is not None:
            self._pages.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Give back all memory: nothing will be received any more."""
        self.buffer = self._window = memoryview(b"")
        self.start = self.end = 0
        self._pages = None
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

"""The client's half of the transmission phase, without input or output.

The shell sends what `ClientTransmission.request` returns (and a write's data
after it), receives into `ClientTransmission.get_buffer`, and is handed each
`Call` that is complete::

    head = transmission.request(call)
    ... send head and call.payload; receive into get_buffer() ...
    for call in transmission.received(nb_bytes): ...

The data of a read goes from the socket to where it will be used, but for what
comes along with a header. Whatever the server sends, no more memory is taken
than what reads have asked for and ``_MAX_PAYLOAD``.
"""

import errno
from collections.abc import Callable, Mapping
from struct import Struct
from typing import Final

from nbdqcow.errors import ProtocolError
from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd
from nbdqcow.types import Buffers
from nbdqcow.units import SECTOR_SIZE, KiB, MiB

_CAPACITY: Final = 64 * KiB
_MAX_PAYLOAD: Final = 16 * MiB
"""Bytes of a chunk that is no data: block status of a million extents."""

_FURTHER_CHUNKS: Final = 1024
"""Chunks that a reply may have besides one for each sector of a read: a server
that sends more of them does not mean to come to an end."""

_STATUS_EXT: Final = Struct(">II")
_EXTENT: Final = Struct(">II")
_EXTENT_EXT: Final = Struct(">QQ")

_ERRNO: Final = {
    nbd.EPERM: errno.EPERM,
    nbd.EIO: errno.EIO,
    nbd.ENOMEM: errno.ENOMEM,
    nbd.EINVAL: errno.EINVAL,
    nbd.ENOSPC: errno.ENOSPC,
    nbd.EOVERFLOW: errno.EOVERFLOW,
    nbd.ENOTSUP: errno.ENOTSUP,
    nbd.ESHUTDOWN: errno.ESHUTDOWN,
}


class Call:
    """One request and, once it is complete, its answer.

    Attributes:
        command: ``CMD_*``.
        flags: ``CMD_FLAG_*``.
        offset, length: bytes.
        payload: the data of a WRITE.
        data: of a READ, ``length`` bytes; whole only without an error.
        error: an errno of this machine, or 0.
        text: what the server said to it; may be empty.
        extents: of a BLOCK_STATUS, for each context's name the length and the
            flags of each extent, from ``offset``.
    """

    __slots__ = (
        "command", "data", "error", "extents", "flags", "length", "offset",
        "payload", "text", "_chunks", "_nb_chunks_left",
    )  # fmt: skip

    def __init__(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: Buffers = (),
    ) -> None:
        self.command = command
        self.flags = flags
        self.offset = offset
        self.length = length
        self.payload = payload
        self.reset()

    def reset(self) -> None:
        """Forget an incomplete answer, to ask again."""
        self.data = bytearray(self.length if self.command == nbd.CMD_READ else 0)
        self.error = 0
        self.text = ""
        self.extents: dict[str, list[tuple[int, int]]] = {}
        # Ranges of a read that have been answered: start and end.
        self._chunks: list[tuple[int, int]] = []
        self._nb_chunks_left = len(self.data) // SECTOR_SIZE + _FURTHER_CHUNKS

    def count_chunk(self) -> None:
        """Take note of one more chunk. Raises `ProtocolError` for too many."""
        self._nb_chunks_left -= 1
        if self._nb_chunks_left < 0:
            raise ProtocolError("a reply of too many chunks")

    def add_chunk(self, offset: int, length: int) -> int:
        """Take note that a part of a read is answered, of the export's bytes.

        Returns where in ``data`` it begins. Raises `ProtocolError` if it is
        not within the request.
        """
        start = offset - self.offset
        if not length or start < 0 or start + length > self.length:
            raise ProtocolError(
                f"a reply with bytes {offset} to {offset + length} to a read of "
                f"{self.offset} to {self.offset + self.length}"
            )
        self._chunks.append((start, start + length))
        return start

    def fail(self, error: int, text: str = "") -> None:
        """Take note of an error of the server; the first one stays.

        ``error`` is the protocol's; one that it does not know is EINVAL
        (proto.md "Error values").
        """
        if not self.error:
            self.error = _ERRNO.get(error, errno.EINVAL)
            self.text = text

    def check_complete(self) -> None:
        """Raise `ProtocolError` if a good answer lacks something."""
        if self.error:
            return
        if self.command == nbd.CMD_READ:
            position = 0
            for start, end in sorted(self._chunks):
                if start != position:
                    raise ProtocolError("a reply to a read with a gap or an overlap")
                position = end
            if position != self.length:
                raise ProtocolError("a reply to a read that is too short")
        elif self.command == nbd.CMD_BLOCK_STATUS and not self.extents:
            raise ProtocolError("a reply without block status")


class ClientTransmission:
    """The transmission phase of one connection, seen from the client.

    Attributes:
        calls: requests that have no complete answer yet, by cookie.
    """

    def __init__(
        self,
        *,
        structured: bool = False,
        extended: bool = False,
        contexts: Mapping[int, str] | None = None,
    ) -> None:
        """``structured`` and ``extended`` say what was negotiated, and
        ``contexts`` the name of each metadata context by its number."""
        self.calls: dict[int, Call] = {}
        self._structured = structured or extended
        self._extended = extended
        self._contexts = dict(contexts or {})
        self._cookie = 0
        self._buffer = memoryview(bytearray(_CAPACITY))
        self._start = 0
        self._end = 0
        # A payload that is being received, and what to do when it is here.
        self._payload: memoryview | None = None
        self._nb_filled = 0
        self._finish: Callable[[], Call | None] = _nothing

    def request(self, call: Call) -> bytes:
        """Return the header of ``call``'s request; a write's data follows it."""
        self._cookie += 1
        self.calls[self._cookie] = call
        flags = call.flags
        if not self._extended:
            return codec.request(
                call.command, self._cookie, call.offset, call.length, flags
            )
        if call.command == nbd.CMD_WRITE:
            flags |= nbd.CMD_FLAG_PAYLOAD_LEN
        return codec.extended_request(
            call.command, self._cookie, call.offset, call.length, flags
        )

    def get_buffer(self) -> memoryview:
        """Return where to put the bytes that arrive next."""
        if self._payload is not None:
            return self._payload[self._nb_filled :]
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end > _CAPACITY // 2:
            rest = self._end - self._start
            self._buffer[:rest] = self._buffer[self._start : self._end]
            self._start, self._end = 0, rest
        return self._buffer[self._end :]

    def received(self, nbytes: int) -> list[Call]:
        """``nbytes`` are now where `get_buffer` said; return the calls that are
        complete. Raises `ProtocolError`: then close."""
        complete: list[Call] = []
        if self._payload is not None:
            self._nb_filled += nbytes
            if self._nb_filled < len(self._payload):
                return complete
            self._payload = None
            self._add(complete, self._finish())
        else:
            self._end += nbytes
        while self._payload is None and self._step(complete):
            pass
        return complete

    @staticmethod
    def _add(complete: list[Call], call: Call | None) -> None:
        if call is not None:
            complete.append(call)

    def _step(self, complete: list[Call]) -> bool:
        """Take one message from the buffer; False if it is not complete."""
        nb_available = self._end - self._start
        if nb_available < codec.U32.size:
            return False
        (magic,) = codec.U32.unpack_from(self._buffer, self._start)
        if magic == nbd.SIMPLE_REPLY_MAGIC and not self._extended:
            if nb_available < codec.SIMPLE_REPLY.size:
                return False
            return self._take_simple(complete)
        if magic == nbd.STRUCTURED_REPLY_MAGIC and (
            self._structured and not self._extended
        ):
            if nb_available < codec.STRUCTURED_REPLY.size:
                return False
            _, flags, kind, cookie, length = codec.STRUCTURED_REPLY.unpack_from(
                self._buffer, self._start
            )
            return self._take_chunk(
                complete, flags, kind, cookie, length, codec.STRUCTURED_REPLY.size
            )
        if magic == nbd.EXTENDED_REPLY_MAGIC and self._extended:
            if nb_available < codec.EXTENDED_REPLY.size:
                return False
            _, flags, kind, cookie, _, length = codec.EXTENDED_REPLY.unpack_from(
                self._buffer, self._start
            )
            return self._take_chunk(
                complete, flags, kind, cookie, length, codec.EXTENDED_REPLY.size
            )
        raise ProtocolError(f"bad reply magic {magic:#010x}")

    def _find(self, cookie: int) -> Call:
        call = self.calls.get(cookie)
        if call is None:
            raise ProtocolError(f"a reply to no request (cookie {cookie})")
        return call

    def _receive(
        self,
        complete: list[Call],
        payload: memoryview,
        finish: Callable[[], Call | None],
    ) -> None:
        """Fill ``payload`` with what comes next, then ``finish``."""
        nb_here = min(len(payload), self._end - self._start)
        payload[:nb_here] = self._buffer[self._start : self._start + nb_here]
        self._start += nb_here
        if nb_here == len(payload):
            self._add(complete, finish())
            return
        self._payload = payload
        self._nb_filled = nb_here
        self._finish = finish

    # -- simple replies ----------------------------------------------------

    def _take_simple(self, complete: list[Call]) -> bool:
        _, error, cookie = codec.SIMPLE_REPLY.unpack_from(self._buffer, self._start)
        call = self._find(cookie)
        with_payload = call.command in (nbd.CMD_READ, nbd.CMD_BLOCK_STATUS)
        if not error and with_payload and self._structured:
            raise ProtocolError("a simple reply where a structured one is due")
        self._start += codec.SIMPLE_REPLY.size
        del self.calls[cookie]
        if error:
            call.fail(error)
        elif call.command == nbd.CMD_READ and call.length:
            call.add_chunk(call.offset, call.length)
            self._receive(complete, memoryview(call.data), lambda: call)
            return True
        call.check_complete()
        complete.append(call)
        return True

    # -- structured and extended replies -----------------------------------

    def _take_chunk(
        self,
        complete: list[Call],
        flags: int,
        kind: int,
        cookie: int,
        length: int,
        head_length: int,
    ) -> bool:
        """Take a chunk's header, and begin with its payload. False if the
        offset of its data is not here yet."""
        call = self._find(cookie)
        start = self._start + head_length

        def finish() -> Call | None:
            if not flags & nbd.REPLY_FLAG_DONE:
                return None
            del self.calls[cookie]
            call.check_complete()
            return call

        if kind == nbd.REPLY_TYPE_OFFSET_DATA:
            if call.command != nbd.CMD_READ or length <= codec.U64.size:
                raise ProtocolError(f"OFFSET_DATA of {length} bytes out of place")
            if self._end - start < codec.U64.size:
                return False
            (offset,) = codec.U64.unpack_from(self._buffer, start)
            length -= codec.U64.size
            first = call.add_chunk(offset, length)
            call.count_chunk()
            self._start = start + codec.U64.size
            self._receive(
                complete, memoryview(call.data)[first : first + length], finish
            )
            return True
        if length > _MAX_PAYLOAD:
            raise ProtocolError(f"a reply of type {kind} with {length} bytes")
        call.count_chunk()
        payload = bytearray(length)

        def take() -> Call | None:
            self._take_payload(call, flags, kind, bytes(payload))
            return finish()

        self._start = start
        self._receive(complete, memoryview(payload), take)
        return True

    def _take_payload(self, call: Call, flags: int, kind: int, payload: bytes) -> None:
        """Take a chunk that is no data. Raises `ProtocolError`."""
        if kind & nbd.REPLY_TYPE_FLAG_ERROR:
            _take_error(call, payload)
        elif kind == nbd.REPLY_TYPE_NONE:
            if payload or not flags & nbd.REPLY_FLAG_DONE:
                raise ProtocolError("a NONE that is not the end of a reply")
        elif kind == nbd.REPLY_TYPE_OFFSET_HOLE and call.command == nbd.CMD_READ:
            if len(payload) != codec.HOLE.size:
                raise ProtocolError(f"an OFFSET_HOLE of {len(payload)} bytes")
            # ``data`` is zero from the beginning.
            call.add_chunk(*codec.HOLE.unpack(payload))
        elif call.command == nbd.CMD_BLOCK_STATUS and kind == (
            nbd.REPLY_TYPE_BLOCK_STATUS_EXT
            if self._extended
            else nbd.REPLY_TYPE_BLOCK_STATUS
        ):
            self._take_status(call, payload)
        else:
            raise ProtocolError(
                f"a reply of type {kind} to {nbd.COMMAND_NAMES.get(call.command)}"
            )

    def _take_status(self, call: Call, payload: bytes) -> None:
        head, extent = (
            (_STATUS_EXT, _EXTENT_EXT) if self._extended else (codec.U32, _EXTENT)
        )
        body = payload[head.size :]
        if not body or len(body) % extent.size:
            raise ProtocolError(f"a block status of {len(payload)} bytes")
        fields = head.unpack_from(payload)
        if self._extended and fields[1] != len(body) // extent.size:
            raise ProtocolError("a block status with a wrong number of extents")
        name = self._contexts.get(fields[0])
        if name is None or name in call.extents:
            raise ProtocolError(f"a block status of context {fields[0]} out of place")
        extents = list(extent.iter_unpack(body))
        if not all(length for length, _ in extents):
            raise ProtocolError("a block status with an empty extent")
        call.extents[name] = extents


def _take_error(call: Call, payload: bytes) -> None:
    """Take an error chunk of any type: they begin alike."""
    if len(payload) < codec.ERROR.size:
        raise ProtocolError(f"an error chunk of {len(payload)} bytes")
    error, length = codec.ERROR.unpack_from(payload)
    text = payload[codec.ERROR.size : codec.ERROR.size + length]
    if len(text) != length:
        raise ProtocolError("an error chunk that is shorter than its text")
    # A server that reports an error has one, whatever the number.
    call.fail(error or nbd.EIO, text.decode(errors="replace"))


def _nothing() -> Call | None:
    return None

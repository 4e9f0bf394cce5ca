"""Replies of the transmission phase, in the style that was negotiated.

proto.md "Simple reply message", "Structured reply chunk message" and
"Structured reply types", and "Extended reply chunk message" of its extension
EXTENDED_HEADERS. A reply is a list of buffers to be sent one after the other;
data that a client reads is never copied.
"""

import enum
from collections.abc import Iterable, Sequence
from itertools import chain, groupby
from struct import Struct
from typing import TYPE_CHECKING, Final

from nbdqcow.buffers import is_zeroes
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.codec import ERROR, HOLE, U32, U64
from nbdqcow.types import Buffer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    StatusRow = tuple[int, npt.NDArray[np.integer], npt.NDArray[np.generic]]

REPLY_OK: Final = nbd.SIMPLE_REPLY_MAGIC.to_bytes(4, "big") + bytes(4)
"""A successful simple reply up to its cookie."""

_SIMPLE: Final = Struct(">II8s")
_CHUNK: Final = Struct(">IHH8sI")
_EXTENDED_CHUNK: Final = Struct(">IHH8sQQ")

# A whole reply to a read that has no error, up to the data: the inline path
# packs it in one call. The first word is magic, flags and type.
STRUCTURED_DATA: Final = Struct(">Q8sIQ")
"""STRUCTURED_DATA_WORD, cookie, length of the data + 8, offset."""
STRUCTURED_DATA_WORD: Final = (
    nbd.STRUCTURED_REPLY_MAGIC << 32
    | nbd.REPLY_FLAG_DONE << 16
    | nbd.REPLY_TYPE_OFFSET_DATA
)
EXTENDED_DATA: Final = Struct(">Q8sQQQ")
"""EXTENDED_DATA_WORD, cookie, offset, length of the data + 8, offset."""
EXTENDED_DATA_WORD: Final = (
    nbd.EXTENDED_REPLY_MAGIC << 32
    | nbd.REPLY_FLAG_DONE << 16
    | nbd.REPLY_TYPE_OFFSET_DATA
)

_EXTENDED_NONE: Final = Struct(">Q8sQQ")
_EXTENDED_NONE_WORD: Final = (
    nbd.EXTENDED_REPLY_MAGIC << 32 | nbd.REPLY_FLAG_DONE << 16 | nbd.REPLY_TYPE_NONE
)

_MIN_HOLE: Final = 512
"""A shorter hole beside data is sent as data. Clusters have at least so much, and
clients look for the holes that the image's map has."""


class ReplyStyle(enum.Enum):
    """The layout of requests and replies."""

    SIMPLE = enum.auto()
    STRUCTURED = enum.auto()
    EXTENDED = enum.auto()


def simple_reply(cookie: bytes, error: int) -> bytes:
    """Return a simple reply without data; ``cookie`` as it came."""
    return _SIMPLE.pack(nbd.SIMPLE_REPLY_MAGIC, error, cookie)


class Replies:
    """Builds replies of one style.

    In every method ``cookie`` is as it came, and ``offset`` that of the
    request.
    """

    __slots__ = ("style",)

    def __init__(self, style: ReplyStyle) -> None:
        self.style = style

    def success(self, cookie: bytes, offset: int) -> bytes:
        """Return the reply to a request without data in its reply."""
        if self.style is ReplyStyle.EXTENDED:
            return _EXTENDED_NONE.pack(_EXTENDED_NONE_WORD, cookie, offset, 0)
        if self.style is ReplyStyle.SIMPLE:
            return REPLY_OK + cookie
        return self._chunk(cookie, offset, nbd.REPLY_TYPE_NONE, 0)

    def data_head(self, cookie: bytes, offset: int, length: int) -> bytes:
        """Return what stands before all the data of a successful read."""
        if self.style is ReplyStyle.STRUCTURED:
            return STRUCTURED_DATA.pack(
                STRUCTURED_DATA_WORD, cookie, length + 8, offset
            )
        if self.style is ReplyStyle.EXTENDED:
            return EXTENDED_DATA.pack(
                EXTENDED_DATA_WORD, cookie, offset, length + 8, offset
            )
        return REPLY_OK + cookie

    def error(
        self,
        cookie: bytes,
        offset: int,
        error: int,
        text: str,
        error_offset: int | None = None,
    ) -> bytes:
        """Return the reply to a request that failed.

        ``error_offset`` is where it did, if that is known: in the request's
        range. A simple reply has no place for it, nor for ``text``.
        """
        if self.style is ReplyStyle.SIMPLE:
            return simple_reply(cookie, error)
        message = encode_text(text)
        payload = ERROR.pack(error, len(message)) + message
        if error_offset is None:
            kind = nbd.REPLY_TYPE_ERROR
        else:
            kind = nbd.REPLY_TYPE_ERROR_OFFSET
            payload += U64.pack(error_offset)
        return self._chunk(cookie, offset, kind, len(payload)) + payload

    def read(
        self, cookie: bytes, offset: int, data: Sequence[Buffer], *, whole: bool = False
    ) -> list[Buffer]:
        """Return the reply to a successful read: ``data`` is all of it.

        Zeroes that `is_zeroes` knows become holes, unless the client wants
        the data in one chunk (``whole``: CMD_FLAG_DF) or the style has none.
        """
        if whole or self.style is ReplyStyle.SIMPLE or not any(map(is_zeroes, data)):
            return [self.data_head(cookie, offset, sum(map(len, data))), *data]
        return self._content(cookie, offset, data, done=True)

    def read_until(
        self,
        cookie: bytes,
        offset: int,
        data: Sequence[Buffer],
        error: int,
        text: str,
    ) -> list[Buffer]:
        """Return the reply to a read that failed behind ``data``."""
        if self.style is ReplyStyle.SIMPLE:
            return [simple_reply(cookie, error)]
        reply = self._content(cookie, offset, data, done=False)
        failed = offset + sum(map(len, data))
        reply.append(self.error(cookie, offset, error, text, failed))
        return reply

    def block_status(
        self, cookie: bytes, offset: int, rows: Sequence["StatusRow"]
    ) -> list[Buffer]:
        """Return the reply to BLOCK_STATUS: a row for each metadata context.

        A row is the context's ID, lengths of extents in bytes, and their
        flags. Outside of the extended style lengths have 32 bits.
        """
        import numpy as np

        extended = self.style is ReplyStyle.EXTENDED
        reply: list[Buffer] = []
        for index, (context_id, lengths, flags) in enumerate(rows, 1):
            head = U32.pack(context_id)
            if extended:
                kind = nbd.REPLY_TYPE_BLOCK_STATUS_EXT
                head += U32.pack(len(lengths))
            else:
                kind = nbd.REPLY_TYPE_BLOCK_STATUS
            descriptors = np.empty((len(lengths), 2), ">u8" if extended else ">u4")
            descriptors[:, 0] = lengths
            descriptors[:, 1] = flags
            length = len(head) + descriptors.nbytes
            done = index == len(rows)
            reply.append(self._chunk(cookie, offset, kind, length, done=done) + head)
            reply.append(descriptors.data.cast("B"))
        return reply

    def _content(
        self, cookie: bytes, offset: int, data: Iterable[Buffer], *, done: bool
    ) -> list[Buffer]:
        """Return content chunks; the last one ends the reply if ``done``."""
        reply: list[Buffer] = []
        position = offset
        parts = _split_parts(data)
        for index, (is_hole, buffers) in enumerate(parts, 1):
            last = done and index == len(parts)
            length = sum(map(len, buffers))
            if is_hole:
                payload = HOLE.pack(position, length)
                kind, payload_length = nbd.REPLY_TYPE_OFFSET_HOLE, len(payload)
                buffers = []
            else:
                payload = U64.pack(position)
                kind, payload_length = nbd.REPLY_TYPE_OFFSET_DATA, len(payload) + length
            reply.append(
                self._chunk(cookie, offset, kind, payload_length, done=last) + payload
            )
            reply += buffers
            position += length
        return reply

    def _chunk(
        self, cookie: bytes, offset: int, kind: int, length: int, *, done: bool = True
    ) -> bytes:
        """Return a chunk's header; ``length`` is that of its payload."""
        flags = nbd.REPLY_FLAG_DONE if done else 0
        if self.style is ReplyStyle.EXTENDED:
            return _EXTENDED_CHUNK.pack(
                nbd.EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, length
            )
        return _CHUNK.pack(nbd.STRUCTURED_REPLY_MAGIC, flags, kind, cookie, length)


def _split_parts(data: Iterable[Buffer]) -> list[tuple[bool, list[Buffer]]]:
    """Return what becomes a chunk each: whether it is a hole, and its buffers."""
    runs = [(zero, list(buffers)) for zero, buffers in groupby(data, is_zeroes)]

    def is_hole(run: tuple[bool, list[Buffer]]) -> bool:
        zero, buffers = run
        return zero and (len(runs) == 1 or sum(map(len, buffers)) >= _MIN_HOLE)

    return [
        (hole, list(chain.from_iterable(buffers for _, buffers in group)))
        for hole, group in groupby(runs, is_hole)
    ]


def encode_text(text: str) -> bytes:
    """Return a message as the protocol has it: UTF-8, at most 4096 bytes."""
    encoded = text.encode(errors="replace")[: nbd.MAX_STRING_LENGTH]
    return encoded.decode(errors="ignore").replace("\0", " ").encode()

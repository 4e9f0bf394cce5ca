"""Replies of the transmission phase taken apart, by the book and by hand."""

import struct
from dataclasses import dataclass, field

SIMPLE, STRUCTURED, EXTENDED = 0x67446698, 0x668E33EF, 0x6E8A278C
NONE, DATA, HOLE, STATUS, STATUS_EXT = 0, 1, 2, 5, 6
ERROR, ERROR_OFFSET = 0x8001, 0x8002
DONE = 1


@dataclass
class Chunk:
    """One chunk, or a simple reply's header (``kind`` None).

    Attributes:
        cookie: the request's.
        offset: in an extended reply, what it says the request's is.
        payload: as it is on the wire.
    """

    kind: int | None
    cookie: int
    done: bool = True
    offset: int | None = None
    payload: bytes = b""
    error: int = 0


@dataclass
class Reply:
    """All chunks of a request.

    Attributes:
        pieces: offset and data of each content chunk; None for a hole.
        contexts: extents (length, flags) by context ID.
        error, text, error_offset: of an error chunk.
    """

    pieces: list[tuple[int, bytes | int]] = field(default_factory=list)
    contexts: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    error: int = 0
    text: str = ""
    error_offset: int | None = None

    def data(self, offset: int, length: int) -> bytes:
        """Return a read's data, which the chunks must give exactly once."""
        covered = 0
        result = bytearray(length)
        for start, piece in self.pieces:
            content = bytes(piece) if isinstance(piece, int) else piece
            assert offset <= start
            assert start + len(content) <= offset + length
            assert content
            result[start - offset : start - offset + len(content)] = content
            covered += len(content)
        starts = [start for start, _ in self.pieces]
        assert len(set(starts)) == len(starts)
        assert covered == length
        return bytes(result)


def head_length(magic: int) -> int:
    """Return the bytes of a header behind its magic."""
    return {SIMPLE: 12, STRUCTURED: 16, EXTENDED: 28}[magic]


def parse_head(magic: int, head: bytes) -> tuple[Chunk, int]:
    """Return a chunk without payload, and the payload's length."""
    if magic == SIMPLE:
        error, cookie = struct.unpack(">IQ", head)
        return Chunk(None, cookie, error=error), 0
    if magic == STRUCTURED:
        flags, kind, cookie, length = struct.unpack(">HHQI", head)
        offset = None
    else:
        flags, kind, cookie, offset, length = struct.unpack(">HHQQQ", head)
    assert flags in (0, DONE)
    return Chunk(kind, cookie, bool(flags), offset), length


def parse_chunks(data: bytes) -> list[Chunk]:
    """Split a stream of replies; simple ones must have no data."""
    chunks = []
    while data:
        (magic,) = struct.unpack_from(">I", data)
        end = 4 + head_length(magic)
        chunk, length = parse_head(magic, data[4:end])
        chunk.payload = data[end : end + length]
        assert len(chunk.payload) == length
        chunks.append(chunk)
        data = data[end + length :]
    return chunks


def add_chunk(reply: Reply, chunk: Chunk) -> None:
    """Add what ``chunk`` says to ``reply``; every length must be right."""
    payload = chunk.payload
    match chunk.kind:
        case None:
            reply.error = chunk.error
        case 0:
            assert chunk.done
            assert not payload
        case 1:
            assert len(payload) > 8
            reply.pieces.append((struct.unpack_from(">Q", payload)[0], payload[8:]))
        case 2:
            start, length = struct.unpack(">QI", payload)
            assert length
            reply.pieces.append((start, length))
        case 5:
            assert len(payload) >= 12
            (context,) = struct.unpack_from(">I", payload)
            assert context not in reply.contexts
            reply.contexts[context] = list(struct.iter_unpack(">II", payload[4:]))
        case 6:
            assert len(payload) >= 24
            context, count = struct.unpack_from(">II", payload)
            assert len(payload) == 8 + 16 * count
            assert context not in reply.contexts
            reply.contexts[context] = list(struct.iter_unpack(">QQ", payload[8:]))
        case 0x8001 | 0x8002:
            reply.error, length = struct.unpack_from(">IH", payload)
            assert reply.error
            assert length <= 4096
            reply.text = payload[6 : 6 + length].decode()
            rest = payload[6 + length :]
            if chunk.kind == ERROR_OFFSET:
                (reply.error_offset,) = struct.unpack(">Q", rest)
            else:
                assert not rest
        case _:
            raise AssertionError(f"unknown chunk {chunk}")


def join_chunks(chunks: list[Chunk]) -> Reply:
    """Return the reply of one request from all its chunks."""
    reply = Reply()
    for chunk in chunks:
        add_chunk(reply, chunk)
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    return reply

"""Replies as a client sees them: whole, byte by byte, with a trailer."""

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdqcow.errors import ProtocolError
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.client_transmission import Call, ClientTransmission

DONE = nbd.REPLY_FLAG_DONE
CONTEXTS = {5: "base:allocation", 6: "other:thing"}


def simple(cookie=1, error=0, data=b""):
    return struct.pack(">IIQ", nbd.SIMPLE_REPLY_MAGIC, error, cookie) + data


def chunk(kind, payload=b"", flags=DONE, cookie=1):
    return struct.pack(
        ">IHHQI", nbd.STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(payload)
    ) + payload  # fmt: skip


def extended(kind, payload=b"", flags=DONE, cookie=1, offset=0):
    return struct.pack(
        ">IHHQQQ", nbd.EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, len(payload)
    ) + payload  # fmt: skip


def data(offset, content, flags=0, cookie=1):
    payload = struct.pack(">Q", offset) + content
    return chunk(nbd.REPLY_TYPE_OFFSET_DATA, payload, flags, cookie)


def hole(offset, length, flags=0):
    payload = struct.pack(">QI", offset, length)
    return chunk(nbd.REPLY_TYPE_OFFSET_HOLE, payload, flags)


def error(number, text=b"", kind=nbd.REPLY_TYPE_ERROR, more=b"", flags=DONE):
    return chunk(kind, struct.pack(">IH", number, len(text)) + text + more, flags)


def status(context, *extents, flags=DONE):
    payload = struct.pack(">I", context)
    payload += b"".join(struct.pack(">II", *extent) for extent in extents)
    return chunk(nbd.REPLY_TYPE_BLOCK_STATUS, payload, flags)


def status_ext(context, *extents, count=None):
    payload = struct.pack(">II", context, len(extents) if count is None else count)
    payload += b"".join(struct.pack(">QQ", *extent) for extent in extents)
    return extended(nbd.REPLY_TYPE_BLOCK_STATUS_EXT, payload)


def feed(transmission, stream, step):
    complete = []
    while stream:
        buffer = transmission.get_buffer()
        assert len(buffer) > 0
        piece = stream[: min(step, len(buffer))]
        buffer[: len(piece)] = piece
        complete += transmission.received(len(piece))
        stream = stream[len(piece) :]
    return complete


def answer(call, stream, step=1 << 20, **negotiated):
    """Return ``call`` once ``stream`` has answered it."""
    negotiated = negotiated or {"structured": True, "contexts": CONTEXTS}
    transmission = ClientTransmission(**negotiated)
    transmission.request(call)
    assert feed(transmission, stream, step) == [call]
    assert not transmission.calls
    return call


def read(offset=100, length=10):
    return Call(nbd.CMD_READ, offset, length)


STEPS = pytest.mark.parametrize("step", [1, 7, 1 << 20])


def test_requests():
    plain = ClientTransmission()
    assert plain.request(Call(nbd.CMD_WRITE, 3, 4, flags=1)) == bytes.fromhex(
        "25609513 0001 0001 0000000000000001 0000000000000003 00000004"
    )
    big = ClientTransmission(extended=True)
    assert big.request(Call(nbd.CMD_TRIM, 3, 1 << 40)) == bytes.fromhex(
        "21e41c71 0000 0004 0000000000000001 0000000000000003 0000010000000000"
    )
    # A payload is announced.
    assert big.request(Call(nbd.CMD_WRITE, 3, 4))[4:6] == b"\0\x20"


@STEPS
def test_simple_replies(step):
    call = answer(read(), simple(data=b"0123456789"), step, structured=False)
    assert call.data == b"0123456789"
    call = answer(read(), simple(error=nbd.EIO), step, structured=False)
    assert (call.error, call.text) == (errno.EIO, "")
    for structured in (False, True):
        call = answer(Call(nbd.CMD_FLUSH), simple(), step, structured=structured)
        assert call.error == 0
    assert answer(Call(nbd.CMD_TRIM), simple(error=77), step).error == errno.EINVAL


@STEPS
def test_structured_read(step):
    stream = data(105, b"fghij") + hole(100, 4) + data(104, b"e", DONE)
    assert answer(read(), stream, step).data == b"\0\0\0\0efghij"
    stream = data(100, b"0123456789") + chunk(nbd.REPLY_TYPE_NONE)
    assert answer(read(), stream, step).data == b"0123456789"


@STEPS
def test_errors(step):
    call = answer(read(), data(100, b"01") + error(nbd.EIO, b"bad"), step)
    assert (call.error, call.text) == (errno.EIO, "bad")
    call = answer(
        read(),
        error(nbd.ENOMEM, b"no \xff", nbd.REPLY_TYPE_ERROR_OFFSET, bytes(8), 0)
        + error(nbd.EIO, b"later"),
        step,
    )
    assert (call.error, call.text) == (errno.ENOMEM, "no \ufffd")
    # Of an unknown type; and without a number.
    call = answer(read(), error(0, b"x", nbd.REPLY_TYPE_FLAG_ERROR + 99), step)
    assert call.error == errno.EIO


@STEPS
def test_block_status(step):
    call = answer(
        Call(nbd.CMD_BLOCK_STATUS, 0, 100),
        status(5, (10, 3), (90, 0), flags=0) + status(6, (100, 7)),
        step,
    )
    assert call.extents == {
        "base:allocation": [(10, 3), (90, 0)],
        "other:thing": [(100, 7)],
    }


@STEPS
def test_extended_replies(step):
    negotiated = {"extended": True, "contexts": CONTEXTS}
    payload = struct.pack(">Q", 100) + b"0123456789"
    stream = extended(nbd.REPLY_TYPE_OFFSET_DATA, payload, offset=100)
    assert answer(read(), stream, step, **negotiated).data == b"0123456789"
    call = Call(nbd.CMD_BLOCK_STATUS, 0, 1 << 40)
    answer(call, status_ext(5, (1 << 39, 3), (1 << 39, 1 << 40)), step, **negotiated)
    assert call.extents["base:allocation"][1] == (1 << 39, 1 << 40)


@STEPS
def test_interleaved(step):
    transmission = ClientTransmission(structured=True)
    first, second, third = read(0, 4), read(0, 100000), Call(nbd.CMD_FLUSH)
    for call in (first, second, third):
        transmission.request(call)
    big = bytes(range(250)) * 400
    complete = feed(
        transmission,
        data(0, big[:70000], cookie=2)
        + data(2, b"cd", cookie=1)
        + simple(cookie=3)
        + data(70000, big[70000:], DONE, cookie=2)
        + data(0, b"ab", DONE, cookie=1),
        step if step > 1 else 1000,
    )
    assert complete == [third, second, first]
    assert second.data == big
    assert first.data == b"abcd"


BAD = [
    ("bad magic", read(), b"\0\0\0\0", {}),
    ("structured replies were not negotiated", read(), chunk(0), {"structured": False}),
    ("extended headers were not", read(), extended(0), {}),
    ("simple replies after extended headers", read(), simple(), {"extended": True}),
    ("structured ones, too", read(), chunk(0), {"extended": True}),
    ("cookie", read(), simple(cookie=2), {}),
    ("a structured one is due", read(), simple(), {}),
    ("a gap", read(), data(100, b"01234", DONE), {}),
    ("an overlap", read(), data(100, b"0123456789") + hole(100, 1, DONE), {}),
    ("nothing", read(), chunk(0), {}),
    ("before", read(), data(99, b"0", DONE), {}),
    ("behind", read(), data(109, b"01", DONE), {}),
    ("a hole behind", read(), hole(100, 11, DONE), {}),
    ("an empty hole", read(), hole(100, 0, DONE), {}),
    ("no data", read(), data(100, b"", DONE), {}),
    ("a short hole", read(), chunk(nbd.REPLY_TYPE_OFFSET_HOLE, bytes(11)), {}),
    ("NONE with data", read(), chunk(0, b"x"), {}),
    ("NONE in the middle", read(), chunk(0, flags=0), {}),
    ("a short error", read(), chunk(nbd.REPLY_TYPE_ERROR, bytes(5)), {}),
    ("a short text", read(),
     chunk(nbd.REPLY_TYPE_ERROR, struct.pack(">IH", 5, 3) + b"xx"), {}),
    ("an unknown type", read(), chunk(99), {}),
    ("status for a read", read(), status(5, (1, 0)), {}),
    ("data for a flush", Call(nbd.CMD_FLUSH), data(0, b"x", DONE), {}),
    ("a hole for a flush", Call(nbd.CMD_FLUSH), hole(0, 1, DONE), {}),
    ("unknown context", Call(nbd.CMD_BLOCK_STATUS, 0, 9), status(7, (1, 0)), {}),
    ("context twice", Call(nbd.CMD_BLOCK_STATUS, 0, 9),
     status(5, (1, 0), flags=0) + status(5, (1, 0)), {}),
    ("no extents", Call(nbd.CMD_BLOCK_STATUS, 0, 9), status(5), {}),
    ("an empty extent", Call(nbd.CMD_BLOCK_STATUS, 0, 9), status(5, (0, 0)), {}),
    ("no status", Call(nbd.CMD_BLOCK_STATUS, 0, 9), chunk(0), {}),
    ("half an extent", Call(nbd.CMD_BLOCK_STATUS, 0, 9),
     chunk(nbd.REPLY_TYPE_BLOCK_STATUS, bytes(15)), {}),
    ("old status", Call(nbd.CMD_BLOCK_STATUS, 0, 9),
     extended(nbd.REPLY_TYPE_BLOCK_STATUS, bytes(12)), {"extended": True}),
    ("wrong count", Call(nbd.CMD_BLOCK_STATUS, 0, 9), status_ext(5, (1, 0), count=2),
     {"extended": True, "contexts": CONTEXTS}),
    ("a huge error", read(), struct.pack(
        ">IHHQI", nbd.STRUCTURED_REPLY_MAGIC, 1, nbd.REPLY_TYPE_ERROR, 1, 1 << 31), {}),
    ("huge data", read(), struct.pack(
        ">IHHQIQ", nbd.STRUCTURED_REPLY_MAGIC, 1, nbd.REPLY_TYPE_OFFSET_DATA, 1,
        (1 << 32) - 1, 100), {}),
    ("huge extended data", read(), struct.pack(
        ">IHHQQQQ", nbd.EXTENDED_REPLY_MAGIC, 1, nbd.REPLY_TYPE_OFFSET_DATA, 1, 0,
        (1 << 64) - 1, 100), {"extended": True}),
]  # fmt: skip


@STEPS
@pytest.mark.parametrize(
    ("call", "stream", "negotiated"), [row[1:] for row in BAD], ids=[r[0] for r in BAD]
)
def test_broken_servers(call, stream, negotiated, step):
    call.reset()
    with pytest.raises(ProtocolError):
        answer(call, stream, step, **negotiated)


@pytest.mark.parametrize(
    ("call", "piece"),
    [
        (read(0, 4096), data(7, b"x")),
        (read(0, 4096), hole(7, 1)),
        (read(0, 4096), error(5, b"no", flags=0)),
        (Call(nbd.CMD_FLUSH), error(5, b"no", flags=0)),
        (Call(nbd.CMD_BLOCK_STATUS, 0, 1 << 20), error(5, b"no", flags=0)),
    ],
)
def test_a_reply_without_end(call, piece):
    """Chunks of it are neither taken for ever nor kept."""
    with pytest.raises(ProtocolError, match="a reply of too many chunks"):
        answer(call, piece * 1100)


def test_a_chunk_for_each_sector():
    call = read(0, 2 << 20)
    stream = b"".join(
        data(at, bytes([at >> 9 & 0xFF]) * 512) for at in range(0, call.length, 512)
    )
    answer(call, stream + chunk(0))
    assert call.data == b"".join(bytes([i & 0xFF]) * 512 for i in range(4096))


def test_a_second_answer():
    transmission = ClientTransmission()
    transmission.request(Call(nbd.CMD_FLUSH))
    with pytest.raises(ProtocolError, match="a reply to no request"):
        feed(transmission, simple() + simple(), 1 << 20)


MAGICS = st.sampled_from(
    [nbd.SIMPLE_REPLY_MAGIC, nbd.STRUCTURED_REPLY_MAGIC, nbd.EXTENDED_REPLY_MAGIC]
)


@given(
    st.lists(
        st.tuples(
            MAGICS, st.integers(0, 3), st.sampled_from([0, 1, 2, 5, 6, 0x8001, 0x8002]),
            st.integers(1, 4), st.binary(max_size=40),
        ),
        max_size=6,
    ),
    st.booleans(),
    st.integers(1, 60),
)  # fmt: skip
def test_only_protocol_errors(messages, is_extended, step):
    transmission = ClientTransmission(
        structured=True, extended=is_extended, contexts=CONTEXTS
    )
    for call in (read(0, 20), Call(nbd.CMD_BLOCK_STATUS, 0, 9), Call(nbd.CMD_FLUSH)):
        transmission.request(call)
    stream = b""
    for magic, flags, kind, cookie, payload in messages:
        if magic == nbd.SIMPLE_REPLY_MAGIC:
            stream += simple(cookie, kind, payload)
        elif magic == nbd.STRUCTURED_REPLY_MAGIC:
            stream += chunk(kind, payload, flags, cookie)
        else:
            stream += extended(kind, payload, flags, cookie)
    try:
        feed(transmission, stream, step)
    except ProtocolError:
        return

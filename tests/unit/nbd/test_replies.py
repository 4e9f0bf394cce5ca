"""Replies of all styles, byte by byte and as a client takes them apart."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdqcow.buffers import ZERO_VIEW, zero_views
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.replies import (
    EXTENDED_DATA,
    EXTENDED_DATA_WORD,
    STRUCTURED_DATA,
    STRUCTURED_DATA_WORD,
    Replies,
    ReplyStyle,
    simple_reply,
)
from tests import chunks

SIMPLE = Replies(ReplyStyle.SIMPLE)
STRUCTURED = Replies(ReplyStyle.STRUCTURED)
EXTENDED = Replies(ReplyStyle.EXTENDED)
CHUNKED = pytest.mark.parametrize("replies", [STRUCTURED, EXTENDED], ids=["32", "64"])
COOKIE = b"cookie!!"
NUMBER = int.from_bytes(COOKIE, "big")
OFFSET = 0x1122334455667788


def joined(reply):
    return b"".join(bytes(buffer) for buffer in reply)


def reply_of(replies, buffers):
    parsed = chunks.parse_chunks(joined(buffers))
    for chunk in parsed:
        assert chunk.cookie == NUMBER
        assert chunk.offset == (OFFSET if replies is EXTENDED else None)
    return chunks.join_chunks(parsed)


def test_success():
    assert SIMPLE.success(COOKIE, OFFSET) == bytes.fromhex("67446698 00000000") + COOKIE
    assert STRUCTURED.success(COOKIE, OFFSET) == (
        bytes.fromhex("668e33ef 0001 0000") + COOKIE + bytes(4)
    )
    assert EXTENDED.success(COOKIE, OFFSET) == (
        bytes.fromhex("6e8a278c 0001 0000")
        + COOKIE
        + bytes.fromhex("1122334455667788")
        + bytes(8)
    )


def test_error():
    text = "no sp\u00e4ce"
    message = text.encode()
    assert SIMPLE.error(COOKIE, OFFSET, 28, text, 5) == simple_reply(COOKIE, 28)
    assert STRUCTURED.error(COOKIE, OFFSET, 28, text) == (
        bytes.fromhex("668e33ef 0001 8001")
        + COOKIE
        + bytes([0, 0, 0, 6 + len(message), 0, 0, 0, 28, 0, len(message)])
        + message
    )
    assert STRUCTURED.error(COOKIE, OFFSET, 5, "", 9) == (
        bytes.fromhex("668e33ef 0001 8002")
        + COOKIE
        + bytes.fromhex("0000000e 00000005 0000 0000000000000009")
    )
    assert EXTENDED.error(COOKIE, OFFSET, 5, "x", 9) == (
        bytes.fromhex("6e8a278c 0001 8002")
        + COOKIE
        + bytes.fromhex("1122334455667788 000000000000000f 00000005 0001 78")
        + bytes.fromhex("0000000000000009")
    )


@CHUNKED
@given(text=st.text(), repeat=st.sampled_from([1, 100, 5000]))
def test_any_text_can_be_sent(replies, text, repeat):
    reply = reply_of(replies, [replies.error(COOKIE, OFFSET, 5, text * repeat)])
    assert reply.error == 5
    assert "\0" not in reply.text
    if text.isprintable() and len(text) * repeat < 1000:
        assert reply.text == text * repeat


def test_the_inline_heads_are_what_a_read_begins_with():
    data = b"d" * 100
    assert joined(STRUCTURED.read(COOKIE, OFFSET, [data])) == (
        STRUCTURED_DATA.pack(STRUCTURED_DATA_WORD, COOKIE, 108, OFFSET) + data
    )
    assert joined(EXTENDED.read(COOKIE, OFFSET, [data])) == (
        EXTENDED_DATA.pack(EXTENDED_DATA_WORD, COOKIE, OFFSET, 108, OFFSET) + data
    )


def test_simple_read():
    reply = SIMPLE.read(COOKIE, OFFSET, [b"ab", ZERO_VIEW[:4096], b"c"])
    assert joined(reply) == simple_reply(COOKIE, 0) + b"ab" + bytes(4096) + b"c"
    assert SIMPLE.read_until(COOKIE, OFFSET, [b"ab"], 5, "x") == [
        simple_reply(COOKIE, 5)
    ]


@CHUNKED
def test_holes(replies):
    whole_hole = reply_of(replies, replies.read(COOKIE, OFFSET, [ZERO_VIEW[:512]]))
    assert whole_hole.pieces == [(OFFSET, 512)]
    pieces = [b"a" * 512, ZERO_VIEW[:511], b"b", ZERO_VIEW[:4096], ZERO_VIEW[:10]]
    reply = reply_of(replies, replies.read(COOKIE, OFFSET, pieces))
    # The short one would cost more than its bytes.
    data = b"a" * 512 + bytes(511) + b"b"
    assert reply.pieces == [(OFFSET, data), (OFFSET + len(data), 4106)]
    # Real zeroes are data, whatever they look like.
    reply = reply_of(replies, replies.read(COOKIE, OFFSET, [bytes(4096)]))
    assert reply.pieces == [(OFFSET, bytes(4096))]


PIECE = st.one_of(
    st.binary(min_size=1, max_size=50),
    st.integers(1, 3 << 20).map(zero_views),
)


@CHUNKED
@given(pieces=st.lists(PIECE, min_size=1), whole=st.booleans())
def test_any_read(replies, pieces, whole):
    data = [b for p in pieces for b in (p if isinstance(p, list) else [p])]
    expected = joined(data)
    reply = reply_of(replies, replies.read(COOKIE, OFFSET, data, whole=whole))
    assert reply.data(OFFSET, len(expected)) == expected
    assert not reply.error
    if whole:
        assert reply.pieces == [(OFFSET, expected)]


@CHUNKED
@pytest.mark.parametrize("data", [[], [b"x" * 10], [b"x", ZERO_VIEW[:8192]]])
def test_a_read_that_breaks_off(replies, data):
    reply = reply_of(replies, replies.read_until(COOKIE, OFFSET, data, 5, "broken"))
    length = len(joined(data))
    assert reply.data(OFFSET, length) == joined(data)
    assert (reply.error, reply.text) == (5, "broken")
    assert reply.error_offset == OFFSET + length


@CHUNKED
@given(
    rows=st.lists(
        st.lists(
            st.tuples(st.integers(1, (1 << 32) - 1), st.integers(0, (1 << 32) - 1)),
            min_size=1,
        ),
        min_size=1,
        max_size=5,
    )
)
def test_block_status(replies, rows):
    table = [
        (
            7 + index,
            np.array([length for length, _ in row], np.uint64),
            np.array([flags for _, flags in row], np.uint32),
        )
        for index, row in enumerate(rows)
    ]
    reply = reply_of(replies, replies.block_status(COOKIE, OFFSET, table))
    assert reply.contexts == {7 + index: row for index, row in enumerate(rows)}


def test_long_extents_and_flags_of_a_bitmap():
    row = (3, np.array([1 << 40, 1], np.uint64), np.array([True, False]))
    reply = reply_of(EXTENDED, EXTENDED.block_status(COOKIE, OFFSET, [row]))
    assert reply.contexts == {3: [(1 << 40, 1), (1, 0)]}
    assert nbd.REPLY_TYPE_BLOCK_STATUS_EXT == chunks.STATUS_EXT

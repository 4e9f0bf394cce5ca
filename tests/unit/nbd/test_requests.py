"""The request parser: whole, in pieces, with something behind."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdqcow.buffers import BufferPool
from nbdqcow.errors import ProtocolError
from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.replies import simple_reply
from nbdqcow.nbd.requests import (
    COMPACT,
    EXTENDED,
    Request,
    RequestReader,
    context_ids,
    expand_status,
)

KiB, MiB = 1 << 10, 1 << 20


class Feeder:
    """Feeds a reader as a transport would, and takes all that it parses."""

    def __init__(self, maximum_payload=MiB, layout=COMPACT):
        self.pool = BufferPool()
        self.reader = RequestReader(self.pool, maximum_payload, layout)
        self.requests = []

    def feed(self, data):
        data = memoryview(data)
        while data:
            assert not self.reader.full
            buffer = self.reader.get_buffer()
            assert len(buffer)
            length = min(len(buffer), len(data))
            buffer[:length] = data[:length]
            self.reader.received(length)
            data = data[length:]
            self.parse()

    def parse(self):
        while (request := self.reader.next_request()) is not None:
            if request.payload is not None:
                payload = bytes(request.payload)
                self.pool.release(request.payload)
                request = request._replace(payload=payload)
            self.requests.append(request)


def stream_of(rng, nb_requests, maximum_payload):
    stream, expected = bytearray(), []
    for cookie in range(nb_requests):
        command = rng.choice([0, 1, 1, 3, 4, 7, 0xFFFF])
        flags = rng.choice([0, 0, 1, 0xFFFF])
        offset = rng.choice([0, 1 << 63, rng.getrandbits(64)])
        length = rng.choice([0, 1, 511, 4096, 64 * KiB, 64 * KiB + 1, 300 * KiB])
        payload = None
        stream += codec.request(command, cookie, offset, length, flags)
        if command == nbd.CMD_WRITE:
            data = rng.randbytes(length)
            stream += data
            payload = data if length <= maximum_payload else None
        expected.append(
            Request(command, flags, cookie.to_bytes(8, "big"), offset, length, payload)
        )
    return stream, expected


@pytest.mark.parametrize("piece", [1 << 30, 5000, 4096, 29, 1])
@pytest.mark.parametrize("maximum_payload", [MiB, 4096, 0])
def test_streams(seed, piece, maximum_payload):
    rng = random.Random(seed)
    stream, expected = stream_of(rng, 100 if piece > 100 else 10, maximum_payload)
    for trailing in (b"", codec.request(0, 0)[:27]):
        feeder = Feeder(maximum_payload)
        whole = stream + trailing
        for start in range(0, len(whole), piece):
            feeder.feed(whole[start : start + piece])
        assert feeder.requests == expected
        assert feeder.reader.end - feeder.reader.start == len(trailing)


def test_pieces_of_any_length(seed):
    rng = random.Random(seed)
    stream, expected = stream_of(rng, 300, MiB)
    feeder = Feeder()
    while stream:
        length = rng.choice([1, 27, 28, 100, 5000, 200_000])
        feeder.feed(stream[:length])
        del stream[:length]
    assert feeder.requests == expected


def test_full_without_parsing():
    reader = RequestReader(BufferPool(), MiB)
    stream = b"".join(codec.request(0, cookie) for cookie in range(20_000))
    taken = 0
    while not reader.full:
        buffer = reader.get_buffer()
        length = min(len(buffer), 1000)
        buffer[:length] = stream[taken : taken + length]
        reader.received(length)
        taken += length
    nb_whole = taken // 28
    for cookie in range(nb_whole):
        request = reader.next_request()
        assert request is not None
        assert int.from_bytes(request.cookie, "big") == cookie
        assert not reader.full
    assert reader.next_request() is None
    assert len(reader.get_buffer()) >= 100_000


def test_a_large_payload_is_received_in_place():
    reader = RequestReader(BufferPool(), MiB)
    head = codec.request(nbd.CMD_WRITE, 1, 0, MiB)
    buffer = reader.get_buffer()
    buffer[:30] = head + b"ab"
    reader.received(30)
    assert reader.next_request() is None
    assert not reader.at_header
    rest = reader.get_buffer()
    assert len(rest) == MiB - 2
    rest[:] = b"c" * len(rest)
    reader.received(len(rest))
    # What comes before the request is taken goes elsewhere.
    reader.get_buffer()[:28] = codec.request(nbd.CMD_READ, 2, 3, 4)
    reader.received(28)
    request = reader.next_request()
    assert request is not None
    assert request.payload == b"ab" + b"c" * (MiB - 2)
    assert request.payload.obj is rest.obj
    assert reader.at_header
    assert reader.next_request() == Request(0, 0, bytes(7) + b"\2", 3, 4, None)


def test_what_follows_a_large_payload_is_not_copied():
    reader = RequestReader(BufferPool(), MiB)
    reader.get_buffer()[:28] = codec.request(nbd.CMD_WRITE, 1, 0, MiB)
    reader.received(28)
    assert reader.next_request() is None
    reader.received(len(reader.get_buffer()))
    assert reader.next_request() is not None
    assert len(reader.get_buffer()) == 4096
    reader.received(0)
    assert len(reader.get_buffer()) == 256 * KiB


def test_close_gives_a_payload_back():
    pool = BufferPool()
    reader = RequestReader(pool, MiB)
    reader.get_buffer()[:28] = codec.request(nbd.CMD_WRITE, 1, 0, MiB)
    reader.received(28)
    assert reader.next_request() is None
    under_way = reader.get_buffer().obj
    reader.close()
    reader.close()
    assert pool.acquire(MiB).obj is under_way


@pytest.mark.parametrize(
    "magic", [0, nbd.REQUEST_MAGIC + 1, nbd.SIMPLE_REPLY_MAGIC, nbd.OPTION_REPLY_MAGIC]
)
def test_bad_magic(magic):
    feeder = Feeder()
    good = codec.request(nbd.CMD_READ, 1)
    with pytest.raises(ProtocolError, match="bad request magic 0x"):
        feeder.feed(good + magic.to_bytes(8, "big") + bytes(20))
    assert len(feeder.requests) == 1


def test_simple_reply():
    assert simple_reply(b"cookie!!", 5) == bytes.fromhex("67446698 00000005") + (
        b"cookie!!"
    )
    assert codec.simple_reply(7, 22) == simple_reply(bytes(7) + b"\7", 22)


# -- extended headers ----------------------------------------------------------

PAYLOAD = nbd.CMD_FLAG_PAYLOAD_LEN


def extended_stream_of(rng, nb_requests, maximum_payload):
    stream, expected = bytearray(), []
    for cookie in range(nb_requests):
        command = rng.choice([0, 1, 1, 1, 3, 4, 7, 7, 0xFFFF])
        flags = rng.choice([0, 1, 0xFFDF]) | rng.choice([0, PAYLOAD, PAYLOAD])
        offset = rng.getrandbits(64)
        length = rng.choice([0, 1, 511, 4096, 64 * KiB, 64 * KiB + 1, 300 * KiB])
        has_payload = command == nbd.CMD_WRITE or flags & PAYLOAD
        if not has_payload:
            length = rng.choice([length, 1 << 40, (1 << 64) - 1])
        stream += codec.extended_request(command, cookie, offset, length, flags)
        payload = None
        if has_payload:
            data = rng.randbytes(length)
            stream += data
            wanted = {1: maximum_payload, 7: 64 * KiB}.get(command, -1)
            payload = data if length <= wanted else None
        if command == nbd.CMD_WRITE:
            flags &= ~PAYLOAD
        expected.append(
            Request(command, flags, cookie.to_bytes(8, "big"), offset, length, payload)
        )
    return stream, expected


@pytest.mark.parametrize("piece", [1 << 30, 5000, 33, 1])
@pytest.mark.parametrize("maximum_payload", [MiB, 0])
def test_extended_streams(seed, piece, maximum_payload):
    rng = random.Random(seed)
    stream, expected = extended_stream_of(
        rng, 200 if piece > 100 else 10, maximum_payload
    )
    for trailing in (b"", codec.extended_request(0, 0)[:31]):
        feeder = Feeder(maximum_payload, EXTENDED)
        whole = stream + trailing
        for start in range(0, len(whole), piece):
            feeder.feed(whole[start : start + piece])
        assert feeder.requests == expected
        assert feeder.reader.end - feeder.reader.start == len(trailing)


def test_layouts_do_not_mix():
    for layout, request in (
        (EXTENDED, codec.request(0, 1) + bytes(4)),
        (COMPACT, codec.extended_request(0, 1)),
    ):
        with pytest.raises(ProtocolError, match="bad request magic"):
            Feeder(layout=layout).feed(request)


@pytest.mark.parametrize("command", [0, 1, 7, 999])
@pytest.mark.parametrize("length", [(32 << 20) + 1, 1 << 32, (1 << 64) - 1])
def test_a_payload_beyond_all_limits_closes(command, length):
    request = codec.extended_request(command, 1, 0, length, PAYLOAD)
    with pytest.raises(ProtocolError, match=f"a payload of {length} bytes"):
        Feeder(32 * MiB, EXTENDED).feed(request)


def status(payload):
    return Request(7, PAYLOAD, b"cookie!!", 5, 99, payload)


def test_expand_status():
    payload = (1 << 40).to_bytes(8, "big") + bytes([0, 0, 0, 3, 0, 0, 1, 0])
    expanded = expand_status(status(memoryview(payload)))
    assert expanded[:5] == (7, PAYLOAD, b"cookie!!", 5, 1 << 40)
    assert context_ids(expanded.payload) == (3, 256)


@pytest.mark.parametrize("length", [None, 0, 1, 7, 9, 11, 13])
def test_expand_malformed_status(length):
    payload = None if length is None else memoryview(bytes(length))
    expanded = expand_status(status(payload))
    assert expanded.length == 0
    assert not expanded.payload


# -- any bytes at all ----------------------------------------------------------

WORD = st.integers(0, 0xFFFF)
REQUESTS = st.lists(
    st.one_of(
        st.binary(max_size=80),
        st.builds(
            lambda build, *fields, tail: build(*fields) + tail,
            st.sampled_from([codec.request, codec.extended_request]),
            st.one_of(st.integers(0, 8), WORD),
            st.integers(0, (1 << 64) - 1),
            st.integers(0, (1 << 64) - 1),
            st.integers(0, (1 << 32) - 1),
            st.one_of(st.just(0), st.just(PAYLOAD), WORD),
            tail=st.binary(max_size=100),
        ),
    ),
    max_size=6,
)


@given(pieces=REQUESTS, layout=st.sampled_from([COMPACT, EXTENDED]))
def test_any_bytes_are_requests_or_an_error(pieces, layout):
    stream = b"".join(pieces)
    outcomes = []
    for step in (len(stream) or 1, 1, 13):
        feeder = Feeder(4096, layout)
        error = ""
        try:
            for start in range(0, len(stream), step):
                feeder.feed(stream[start : start + step])
        except ProtocolError as exc:
            error = str(exc)
        outcomes.append((feeder.requests, error))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    for request in outcomes[0][0]:
        if request.command == nbd.CMD_BLOCK_STATUS and request.flags & PAYLOAD:
            expand_status(request)

"""The server handshake: one case, three ways of delivery, no socket."""

import tracemalloc
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.handshake import ExportInfo, HandshakeState, ServerHandshake

FIXED = nbd.FLAG_C_FIXED_NEWSTYLE
NO_ZEROES = nbd.FLAG_C_NO_ZEROES
HAS = nbd.FLAG_HAS_FLAGS

DEFAULT = ExportInfo("", 10 << 20, nbd.FLAG_SEND_FLUSH)
DISK = ExportInfo(
    "disk",
    (1 << 63) - 1,
    nbd.FLAG_READ_ONLY,
    description="the first disk",
    minimum_block_size=512,
    preferred_block_size=65536,
    maximum_payload=1 << 20,
)
ALIASED = ExportInfo("alias", 5, 0, canonical_name="true name")
LONG = ExportInfo("é" * 2048, 7, 0)
EXPORTS = (DEFAULT, DISK, ALIASED, LONG)


class Exports:
    def __init__(self, exports=EXPORTS):
        self.exports = exports

    def list_exports(self):
        return self.exports

    def find_export(self, name):
        return next((e for e in self.exports if e.name == name), None)


@dataclass
class Reply:
    """What one option is answered with, to be compared and shown."""

    option: int
    reply: int
    data: bytes = b""


def parse_replies(data):
    replies = []
    while data:
        magic, option, reply, length = codec.OPTION_REPLY.unpack_from(data)
        assert magic == nbd.OPTION_REPLY_MAGIC
        body = data[codec.OPTION_REPLY.size : codec.OPTION_REPLY.size + length]
        assert len(body) == length
        if reply & nbd.REP_FLAG_ERROR:
            text = body.decode()
            assert 0 < len(body) <= nbd.MAX_STRING_LENGTH
            assert text.isprintable()
        replies.append(Reply(option, reply, body))
        data = data[codec.OPTION_REPLY.size + length :]
    return replies


def flags(value):
    return codec.CLIENT_FLAGS.pack(value)


def ask(option, data=b""):
    return codec.option_request(option, data)


def info(name, *infos, option=nbd.OPT_INFO):
    return ask(option, codec.info_request(name, infos))


GO = info("", option=nbd.OPT_GO)


class Outcome:
    def __init__(self, handshake, output):
        self.state = handshake.state
        self.error = handshake.error
        self.export = handshake.export
        self.trailing = handshake.trailing
        self.output = output

    def key(self):
        return self.state, self.error, self.export, self.output


def run(pieces, **limits):
    handshake = ServerHandshake(Exports(), **limits)
    output = handshake.data_to_send()
    for piece in pieces:
        handshake.receive_data(piece)
        output += handshake.data_to_send()
    greeting, output = output[:18], output[18:]
    assert greeting == b"NBDMAGICIHAVEOPT\0\3"
    return Outcome(handshake, output)


def deliver(data, **limits):
    """Run ``data`` whole, byte by byte, and with trailing data; return the
    outcome, which must be the same."""
    whole = run([data], **limits)
    bytewise = run([data[i : i + 1] for i in range(len(data))], **limits)
    assert bytewise.key() == whole.key()
    assert bytewise.trailing == whole.trailing
    memory = run([memoryview(bytearray(data))], **limits)
    assert memory.key() == whole.key()
    if whole.state is not HandshakeState.HANDSHAKING:
        trailed = run([data + b"trailing data"], **limits)
        assert trailed.key() == whole.key()
        transmission = whole.state is HandshakeState.TRANSMISSION
        assert trailed.trailing == (b"trailing data" if transmission else b"")
    return whole


def replies_to(data, *, state=HandshakeState.HANDSHAKING, **limits):
    """Return the replies to ``data``, sent by a fixed newstyle client, and
    check that the stream is still in sync by a GO after it."""
    start = flags(FIXED | NO_ZEROES) + data
    outcome = deliver(start, **limits)
    assert outcome.state is state
    replies = parse_replies(outcome.output)
    if state is HandshakeState.HANDSHAKING:
        after = deliver(start + GO, **limits)
        assert after.state is HandshakeState.TRANSMISSION
        assert after.export == DEFAULT
        assert parse_replies(after.output)[: len(replies)] == replies
    return replies


# -- greeting and client flags ------------------------------------------------


@pytest.mark.parametrize("value", [4, 0x80, 0x80000000, 0xFFFFFFFF, 5])
def test_unknown_client_flags_close(value):
    outcome = deliver(flags(value))
    assert outcome.state is HandshakeState.CLOSED
    assert outcome.output == b""
    assert "flags" in outcome.error


@pytest.mark.parametrize("value", range(4))
def test_known_client_flags(value):
    assert deliver(flags(value)).state is HandshakeState.HANDSHAKING


def test_bad_option_magic_closes():
    outcome = deliver(flags(FIXED) + b"GET / HTTP/1.1\r\n\r\n"[:16])
    assert outcome.state is HandshakeState.CLOSED
    assert outcome.output == b""


# -- EXPORT_NAME ---------------------------------------------------------------


@pytest.mark.parametrize("client_flags", range(4))
@pytest.mark.parametrize("export", EXPORTS, ids=lambda e: e.name[:8] or "default")
def test_export_name(client_flags, export):
    outcome = deliver(
        flags(client_flags) + ask(nbd.OPT_EXPORT_NAME, export.name.encode())
    )
    assert outcome.state is HandshakeState.TRANSMISSION
    assert outcome.export == export
    expected = codec.EXPORT.pack(export.size, export.flags | HAS)
    if not client_flags & NO_ZEROES:
        expected += bytes(124)
    assert outcome.output == expected


@pytest.mark.parametrize("client_flags", range(4))
@pytest.mark.parametrize(
    "name",
    [b"unknown", b"\xff\xfe", b"nul\0", b"x" * 4096, b"Disk", b"disk "],
    ids=["unknown", "not-utf8", "nul", "long", "case", "space"],
)
def test_export_name_that_fails_closes(client_flags, name):
    outcome = deliver(flags(client_flags) + ask(nbd.OPT_EXPORT_NAME, name))
    assert outcome.state is HandshakeState.CLOSED
    assert outcome.output == b""
    assert outcome.error


@pytest.mark.parametrize("length", [4097, 1 << 16, 0xFFFFFFFF])
def test_export_name_too_long_closes_at_its_header(length):
    header = codec.OPTION.pack(nbd.IHAVEOPT_MAGIC, nbd.OPT_EXPORT_NAME, length)
    outcome = deliver(flags(FIXED) + header)
    assert outcome.state is HandshakeState.CLOSED
    assert outcome.output == b""


@pytest.mark.parametrize("option", [2, 3, 5, 6, 7, 8, 9, 10, 11, 999])
@pytest.mark.parametrize("data", [b"", b"12345"])
def test_only_export_name_without_fixed_newstyle(option, data):
    outcome = deliver(flags(NO_ZEROES) + ask(option, data))
    assert outcome.state is HandshakeState.CLOSED
    assert outcome.output == b""


# -- ABORT ---------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 500])
def test_abort(length):
    replies = replies_to(ask(nbd.OPT_ABORT, bytes(length)), state=HandshakeState.CLOSED)
    assert replies == [Reply(nbd.OPT_ABORT, nbd.REP_ACK)]


def test_abort_is_no_error_and_ends_everything():
    outcome = deliver(flags(FIXED) + ask(nbd.OPT_ABORT) + GO)
    assert outcome.error is None
    assert outcome.export is None
    assert outcome.state is HandshakeState.CLOSED


# -- LIST ----------------------------------------------------------------------


def test_list():
    replies = replies_to(ask(nbd.OPT_LIST))
    assert replies[-1] == Reply(nbd.OPT_LIST, nbd.REP_ACK)
    listed = []
    for reply in replies[:-1]:
        assert (reply.option, reply.reply) == (nbd.OPT_LIST, nbd.REP_SERVER)
        (length,) = codec.U32.unpack_from(reply.data)
        name, tail = reply.data[4 : 4 + length], reply.data[4 + length :]
        listed.append((name.decode(), tail.decode()))
    assert listed == [(e.name, e.description) for e in EXPORTS]


def test_list_of_nothing():
    handshake = ServerHandshake(Exports(()))
    handshake.data_to_send()
    handshake.receive_data(flags(FIXED) + ask(nbd.OPT_LIST))
    assert parse_replies(handshake.data_to_send()) == [Reply(nbd.OPT_LIST, nbd.REP_ACK)]


@pytest.mark.parametrize("length", [1, 4, 65536])
def test_list_with_data(length):
    (reply,) = replies_to(ask(nbd.OPT_LIST, bytes(length)))
    assert reply.reply == nbd.REP_ERR_INVALID


# -- INFO and GO ---------------------------------------------------------------

TEXT = {
    e.name: {
        nbd.INFO_EXPORT: codec.INFO_EXPORT.pack(0, e.size, e.flags | HAS),
        nbd.INFO_NAME: b"\0\1" + (e.canonical_name or e.name).encode(),
        nbd.INFO_DESCRIPTION: b"\0\2" + e.description.encode(),
        nbd.INFO_BLOCK_SIZE: codec.INFO_BLOCK_SIZE.pack(
            3, e.minimum_block_size, e.preferred_block_size, e.maximum_payload
        ),
    }
    for e in EXPORTS
}


@pytest.mark.parametrize("option", [nbd.OPT_INFO, nbd.OPT_GO])
@pytest.mark.parametrize("export", EXPORTS, ids=lambda e: e.name[:8] or "default")
@pytest.mark.parametrize(
    "infos",
    [
        (),
        (0,),
        (1,),
        (2,),
        (3,),
        (3, 2, 1, 0),
        (1, 1, 3, 3),
        (9, 0xFFFF, 3),
        tuple(range(500)),
    ],
    ids=str,
)
def test_info_and_go(option, export, infos):
    outcome = deliver(flags(FIXED) + info(export.name, *infos, option=option))
    replies = parse_replies(outcome.output)
    assert replies.pop() == Reply(option, nbd.REP_ACK)
    wanted = {nbd.INFO_EXPORT} | (set(infos) & {1, 2, 3})
    if not export.description:
        wanted -= {nbd.INFO_DESCRIPTION}
    texts = dict(TEXT[export.name])
    if 3 not in infos:
        if option == nbd.OPT_GO:
            texts[nbd.INFO_BLOCK_SIZE] = codec.INFO_BLOCK_SIZE.pack(
                3, 1, export.preferred_block_size, export.maximum_payload
            )
        if option == nbd.OPT_GO or export.minimum_block_size == 1:
            wanted |= {nbd.INFO_BLOCK_SIZE}
    assert all(r.option == option and r.reply == nbd.REP_INFO for r in replies)
    assert sorted(r.data for r in replies) == sorted(texts[i] for i in wanted)
    if option == nbd.OPT_GO:
        assert outcome.state is HandshakeState.TRANSMISSION
        assert outcome.export == export
    else:
        assert outcome.state is HandshakeState.HANDSHAKING
        assert outcome.export is None


def malformed(name_length, name, nb_infos, infos):
    return b"".join(
        (
            codec.U32.pack(name_length),
            name,
            codec.U16.pack(nb_infos),
            *(codec.U16.pack(i) for i in infos),
        )
    )


MALFORMED = {
    "empty": b"",
    "1 byte": b"\0",
    "only a length": bytes(4),
    "5 bytes": bytes(5),
    "name past the end": malformed(5, b"disk", 0, ()),
    "name takes the count": malformed(6, b"disk", 0, ()),
    "name length of 4 GiB": malformed(0xFFFFFFFF, b"disk", 0, ()),
    "name length below its name": malformed(3, b"disk", 0, ()),
    "more infos than sent": malformed(4, b"disk", 2, (1,)),
    "fewer infos than sent": malformed(4, b"disk", 1, (1, 2)),
    "65535 infos": malformed(4, b"disk", 65535, (1,)),
    "a byte more": malformed(4, b"disk", 1, (1,)) + b"x",
    "a byte less": malformed(4, b"disk", 1, (1,))[:-1],
    "not UTF-8": malformed(2, b"\xc3\x28", 0, ()),
    "a lone surrogate": malformed(3, b"\xed\xa0\x80", 0, ()),
    "a NUL": malformed(5, b"di\0sk", 0, ()),
}


@pytest.mark.parametrize("option", [nbd.OPT_INFO, nbd.OPT_GO])
@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_malformed_info(option, data):
    (reply,) = replies_to(ask(option, data))
    assert (reply.option, reply.reply) == (option, nbd.REP_ERR_INVALID)


@pytest.mark.parametrize("option", [nbd.OPT_INFO, nbd.OPT_GO])
def test_info_cut_at_every_byte(option):
    data = codec.info_request("disk", (1, 3))
    for length in range(len(data)):
        (reply,) = replies_to(ask(option, data[:length]))
        assert reply.reply == nbd.REP_ERR_INVALID


@pytest.mark.parametrize("option", [nbd.OPT_INFO, nbd.OPT_GO])
@pytest.mark.parametrize(
    ("name", "reply"),
    [
        ("unknown", nbd.REP_ERR_UNKNOWN),
        ("bell \a and \n new line", nbd.REP_ERR_UNKNOWN),
        ("é" * 2047, nbd.REP_ERR_UNKNOWN),
        ("x" * 4096, nbd.REP_ERR_UNKNOWN),
        ("x" * 4097, nbd.REP_ERR_TOO_BIG),
        ("x" * 60000, nbd.REP_ERR_TOO_BIG),
    ],
    ids=["unknown", "control", "wide", "4096", "4097", "60000"],
)
def test_info_of_no_export(option, name, reply):
    (got,) = replies_to(info(name, option=option))
    assert (got.option, got.reply) == (option, reply)


# -- the others ----------------------------------------------------------------


@pytest.mark.parametrize("option", [0, 4, 12, 999, 0xFFFFFFFF])
@pytest.mark.parametrize("length", [0, 1, 4, 1024, 70000])
def test_unsupported_options(option, length):
    (reply,) = replies_to(ask(option, b"\xff" * length))
    assert (reply.option, reply.reply) == (option, nbd.REP_ERR_UNSUP)


@pytest.mark.parametrize("option", [nbd.OPT_LIST, nbd.OPT_INFO, nbd.OPT_GO])
def test_long_data_is_skipped(option):
    (reply,) = replies_to(ask(option, bytes((64 << 10) + 1)))
    assert (reply.option, reply.reply) == (option, nbd.REP_ERR_TOO_BIG)


@pytest.mark.parametrize("option", [3, 5, 6, 7, 8, 9, 10, 11, 999])
@pytest.mark.parametrize("length", [(32 << 20) + 1, 1 << 31, 0xFFFFFFFF])
def test_absurd_length_is_answered_and_closed(option, length):
    header = codec.OPTION.pack(nbd.IHAVEOPT_MAGIC, option, length)
    (reply,) = replies_to(header, state=HandshakeState.CLOSED)
    assert (reply.option, reply.reply) == (option, nbd.REP_ERR_TOO_BIG)


def test_skipped_data_is_not_kept():
    handshake = ServerHandshake(Exports())
    handshake.data_to_send()
    handshake.receive_data(
        flags(FIXED) + codec.OPTION.pack(nbd.IHAVEOPT_MAGIC, 999, 32 << 20)
    )
    chunk = bytes(1 << 16)
    tracemalloc.start()
    for _ in range((32 << 20) // len(chunk)):
        assert handshake.data_to_send() == b""
        handshake.receive_data(chunk)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    (reply,) = parse_replies(handshake.data_to_send())
    assert reply.reply == nbd.REP_ERR_UNSUP


def test_option_with_all_of_its_data_is_bounded_by_the_limit():
    replies = replies_to(info("disk", *range(9)), max_option_length=27)
    assert replies[0].reply == nbd.REP_ERR_TOO_BIG or len(replies) > 1
    (reply,) = replies_to(info("disk", *range(9)), max_option_length=26)
    assert reply.reply == nbd.REP_ERR_TOO_BIG


def test_flood_of_options_closes():
    outcome = deliver(flags(FIXED) + ask(999) * 5, max_options=4)
    assert outcome.state is HandshakeState.CLOSED
    assert len(parse_replies(outcome.output)) == 4
    assert "options" in outcome.error
    assert deliver(flags(FIXED) + ask(999) * 4, max_options=4).error is None


def test_flood_without_reading_closes():
    handshake = ServerHandshake(
        Exports([ExportInfo(f"{n}{'x' * 4000}", 0, 0) for n in range(100)])
    )
    handshake.receive_data(flags(FIXED) + ask(nbd.OPT_LIST) * 4000)
    assert handshake.state is HandshakeState.CLOSED
    assert len(handshake.data_to_send()) < 2 << 20


def test_haggling_goes_on_after_errors():
    replies = replies_to(
        ask(nbd.OPT_STARTTLS)
        + ask(nbd.OPT_GO, b"bad")
        + info("unknown", option=nbd.OPT_GO)
        + ask(nbd.OPT_LIST, b"x")
        + ask(12345, b"y" * 999)
    )
    assert [r.reply for r in replies] == [
        nbd.REP_ERR_POLICY,
        nbd.REP_ERR_INVALID,
        nbd.REP_ERR_UNKNOWN,
        nbd.REP_ERR_INVALID,
        nbd.REP_ERR_UNSUP,
    ]


def test_shutdown_refuses_all_but_abort():
    handshake = ServerHandshake(Exports())
    handshake.data_to_send()
    handshake.receive_data(flags(FIXED))
    handshake.shutting_down = True
    handshake.receive_data(ask(nbd.OPT_LIST) + GO + ask(999, b"123"))
    replies = parse_replies(handshake.data_to_send())
    assert [r.reply for r in replies] == [nbd.REP_ERR_SHUTDOWN] * 3
    handshake.receive_data(ask(nbd.OPT_ABORT))
    assert parse_replies(handshake.data_to_send())[0].reply == nbd.REP_ACK


def test_shutdown_closes_export_name():
    handshake = ServerHandshake(Exports())
    handshake.data_to_send()
    handshake.shutting_down = True
    handshake.receive_data(flags(FIXED) + ask(nbd.OPT_EXPORT_NAME))
    assert handshake.state is HandshakeState.CLOSED
    assert handshake.data_to_send() == b""


def test_data_after_the_end():
    handshake = ServerHandshake(Exports())
    handshake.receive_data(flags(FIXED) + GO + b"one")
    handshake.receive_data(b" two")
    assert handshake.trailing == b"one two"
    closed = ServerHandshake(Exports())
    closed.receive_data(b"\xff" * 4)
    closed.receive_data(GO)
    assert closed.state is HandshakeState.CLOSED
    assert closed.trailing == b""


@pytest.mark.parametrize("text", ["a\0b", "x" * 4097, "é" * 2049, "\udc80"])
def test_export_info_refuses_what_cannot_be_sent(text):
    for arguments in (
        {"name": text},
        {"name": "", "description": text},
        {"name": "", "canonical_name": text},
    ):
        with pytest.raises(ValueError, match="the export"):
            ExportInfo(size=0, flags=0, **arguments)


# -- anything at all -----------------------------------------------------------

OPTIONS = st.one_of(
    st.binary(max_size=64),
    st.builds(ask, st.integers(0, 13), st.binary(max_size=64)),
    st.builds(
        lambda option, length: codec.OPTION.pack(nbd.IHAVEOPT_MAGIC, option, length),
        st.integers(0, 0xFFFFFFFF),
        st.integers(0, 0xFFFFFFFF),
    ),
    st.builds(
        lambda option, name, infos, count: ask(
            option, malformed(len(name), name, count, infos)
        ),
        st.sampled_from([nbd.OPT_INFO, nbd.OPT_GO]),
        st.sampled_from([b"", b"disk", b"alias", b"\xff", b"no"]),
        st.lists(st.integers(0, 5), max_size=4),
        st.integers(0, 4),
    ),
)


@settings(max_examples=400, deadline=None)
@given(
    start=st.one_of(st.sampled_from([flags(n) for n in range(4)]), st.binary()),
    messages=st.lists(OPTIONS, max_size=8),
    cut=st.integers(1, 50),
)
def test_random_input_never_raises(start, messages, cut):
    data = start + b"".join(messages)
    whole = run([data])
    pieces = run([data[i : i + cut] for i in range(0, len(data), cut)])
    assert pieces.key() == whole.key()
    assert pieces.trailing == whole.trailing
    if whole.state is HandshakeState.TRANSMISSION:
        assert whole.export in EXPORTS
        assert data.endswith(whole.trailing)
    else:
        assert whole.export is None
    if whole.state is HandshakeState.HANDSHAKING:
        assert whole.error is None
        if start[:4] in (flags(1), flags(3)):
            parse_replies(whole.output)

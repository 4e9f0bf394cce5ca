"""What is negotiated beside the export: styles and metadata contexts."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.handshake import ExportInfo, HandshakeState, ServerHandshake, Terms
from nbdqcow.nbd.replies import ReplyStyle
from tests.unit.nbd.test_handshake import (
    FIXED,
    NO_ZEROES,
    Reply,
    ask,
    flags,
    info,
    parse_replies,
)

CONTEXTS = (
    "base:allocation",
    "qemu:allocation-depth",
    "qemu:dirty-bitmap:b0",
    "qemu:dirty-bitmap:b0:old",
)
EXPORTS = {
    "": ExportInfo("", 1 << 20, 0, meta_contexts=CONTEXTS),
    "plain": ExportInfo("plain", 1 << 20, 0, meta_contexts=CONTEXTS[:1]),
    "bare": ExportInfo("bare", 1 << 20, 0),
}
LIST, SET = nbd.OPT_LIST_META_CONTEXT, nbd.OPT_SET_META_CONTEXT
BOTH = pytest.mark.parametrize("option", [LIST, SET], ids=["list", "set"])
SR = ask(nbd.OPT_STRUCTURED_REPLY)
EH = ask(nbd.OPT_EXTENDED_HEADERS)
ACK = nbd.REP_ACK


class Exports:
    def list_exports(self):
        return list(EXPORTS.values())

    def find_export(self, name):
        return EXPORTS.get(name)


def go(name=""):
    return info(name, option=nbd.OPT_GO)


def query(option, name, *queries):
    return ask(option, codec.meta_context_request(name, queries))


def run(data):
    """Run a fixed newstyle client's options, whole and byte by byte; return
    the handshake and the replies."""
    data = flags(FIXED | NO_ZEROES) + data
    outcomes = []
    for pieces in ([data], [data[i : i + 1] for i in range(len(data))]):
        handshake = ServerHandshake(Exports())
        handshake.data_to_send()
        for piece in pieces:
            handshake.receive_data(piece)
        outcomes.append((handshake, handshake.data_to_send()))
    (whole, output), (bytewise, other_output) = outcomes
    assert output == other_output
    assert (whole.state, whole.terms, whole.export, whole.trailing) == (
        bytewise.state,
        bytewise.terms,
        bytewise.export,
        bytewise.trailing,
    )
    return whole, output


def replies(data):
    handshake, output = run(data)
    assert handshake.state is HandshakeState.HANDSHAKING
    return parse_replies(output)


def terms(data, name=""):
    handshake, _ = run(data + go(name))
    assert handshake.state is HandshakeState.TRANSMISSION
    assert handshake.export == EXPORTS[name]
    return handshake.terms


def contexts(data, name=""):
    return list(terms(data, name).meta_contexts)


def codes(data):
    return [reply.reply for reply in replies(data)]


def found(option, *queries, name=""):
    """Return ID and name of the contexts in the answer."""
    *listed, ack = replies(SR + query(option, name, *queries))[1:]
    assert ack == Reply(option, ACK)
    result = []
    for reply in listed:
        assert (reply.option, reply.reply) == (option, nbd.REP_META_CONTEXT)
        result.append((struct.unpack(">I", reply.data[:4])[0], reply.data[4:].decode()))
    return result


# -- styles ------------------------------------------------------------------------


def test_styles():
    assert terms(b"") == Terms()
    assert terms(SR).style is ReplyStyle.STRUCTURED
    assert terms(EH).style is ReplyStyle.EXTENDED
    assert terms(SR + EH).style is ReplyStyle.EXTENDED


def test_style_options_twice():
    assert codes(SR + SR) == [ACK, nbd.REP_ERR_INVALID]
    assert codes(EH + EH) == [ACK, nbd.REP_ERR_INVALID]
    # There is no way back to compact headers.
    assert codes(EH + SR) == [ACK, nbd.REP_ERR_EXT_HEADER_REQD]
    assert terms(SR + SR).style is ReplyStyle.STRUCTURED
    assert terms(EH + SR).style is ReplyStyle.EXTENDED


@pytest.mark.parametrize("option", [8, 11])
@pytest.mark.parametrize("length", [1, 4, 65536])
def test_style_options_with_data(option, length):
    data = ask(option, bytes(length))
    assert codes(data) == [nbd.REP_ERR_INVALID]
    assert terms(data).style is ReplyStyle.SIMPLE


def export_flags(data, name="", option=nbd.OPT_GO):
    *replies, ack = parse_replies(run(data + info(name, option=option))[1])
    assert ack.reply == ACK
    told = [reply.data for reply in replies if reply.reply == nbd.REP_INFO]
    (export_info,) = (d for d in told if d[:2] == nbd.INFO_EXPORT.to_bytes(2))
    return codec.INFO_EXPORT.unpack(export_info)[2]


def test_flags_follow_what_was_negotiated():
    selected = query(SET, "", "base:allocation")
    assert not export_flags(b"") & nbd.FLAG_SEND_DF
    assert export_flags(SR) & nbd.FLAG_SEND_DF
    assert export_flags(EH) & nbd.FLAG_SEND_DF
    payload = nbd.FLAG_BLOCK_STATUS_PAYLOAD
    assert not export_flags(SR + selected) & payload
    assert not export_flags(EH) & payload
    assert export_flags(EH + selected) & payload
    assert not export_flags(EH + selected, "plain") & payload
    # Who only asks may select contexts later.
    assert not export_flags(SR, option=nbd.OPT_INFO) & payload
    assert export_flags(EH, option=nbd.OPT_INFO) & payload


def test_export_name_after_structured_reply():
    handshake, output = run(SR + ask(nbd.OPT_EXPORT_NAME, b""))
    assert handshake.terms.style is ReplyStyle.STRUCTURED
    _, export_flags = codec.EXPORT.unpack(output[-codec.EXPORT.size :])
    assert export_flags == nbd.FLAG_HAS_FLAGS | nbd.FLAG_SEND_DF


def test_export_name_after_extended_headers_closes():
    handshake, output = run(EH + ask(nbd.OPT_EXPORT_NAME, b""))
    assert handshake.state is HandshakeState.CLOSED
    assert parse_replies(output) == [Reply(nbd.OPT_EXTENDED_HEADERS, ACK)]


# -- queries -----------------------------------------------------------------------


def test_list():
    everything = [(0, name) for name in CONTEXTS]
    assert found(LIST) == everything
    assert found(LIST, "base:") == everything[:1]
    assert found(LIST, "qemu:") == everything[1:]
    assert found(LIST, "qemu:dirty-bitmap:") == everything[2:]
    assert found(LIST, "qemu:", "base:", "qemu:") == everything
    assert found(LIST, "qemu:dirty-bitmap:b0") == everything[2:3]
    assert found(LIST, "base:allocation", "base:other") == everything[:1]
    assert found(LIST, name="bare") == []
    assert found(LIST, "base:", name="bare") == []


@BOTH
@pytest.mark.parametrize(
    "text",
    ["x-other:", "base:alloc", "base:allocation:", "Base:", "qemu:dirty-bitmap:b",
     "qemu:dirty-bitmap:b0:", "qemu:dirty-bitmap", ":", "::", "base::", " base:"],
)  # fmt: skip
def test_unknown_queries_find_nothing(option, text):
    assert found(option, text) == []


def test_set():
    assert found(SET) == []
    assert found(SET, "base:", "qemu:", "qemu:dirty-bitmap:") == []
    assert found(SET, "base:allocation") == [(0, "base:allocation")]
    answer = found(SET, CONTEXTS[3], "nobody:knows", CONTEXTS[1], CONTEXTS[3])
    assert answer == [(0, CONTEXTS[1]), (1, CONTEXTS[3])]
    selected = contexts(SR + query(SET, "", CONTEXTS[3], CONTEXTS[1]))
    assert selected == [CONTEXTS[1], CONTEXTS[3]]


# -- life cycle --------------------------------------------------------------------

BASE = query(SET, "", "base:allocation")
DEPTH = query(SET, "", "qemu:allocation-depth")


def test_the_last_set_counts():
    assert contexts(SR + BASE) == ["base:allocation"]
    assert contexts(SR + BASE + DEPTH) == ["qemu:allocation-depth"]
    assert contexts(SR + BASE + query(SET, "")) == []
    assert contexts(SR + BASE + query(SET, "", "no:such")) == []
    assert contexts(SR + BASE + query(LIST, "", "qemu:")) == ["base:allocation"]
    assert contexts(SR + BASE + info("plain") + go("unknown")) == ["base:allocation"]
    assert contexts(SR + BASE + EH) == ["base:allocation"]


@pytest.mark.parametrize(
    "failing",
    [
        query(SET, "unknown", "base:allocation"),
        query(SET, "", "without a colon"),
        ask(SET),
        ask(SET, b"\xff" * 100),
    ],
    ids=["export", "query", "empty", "garbage"],
)
def test_a_set_that_fails_clears_the_contexts(failing):
    assert contexts(SR + BASE + failing) == []
    assert contexts(SR + BASE + failing + DEPTH) == ["qemu:allocation-depth"]


def test_contexts_are_those_of_one_export():
    assert contexts(SR + BASE, "plain") == []
    assert contexts(SR + query(SET, "plain", "base:allocation")) == []
    selected = query(SET, "plain", "base:allocation")
    assert contexts(SR + selected, "plain") == ["base:allocation"]
    handshake, _ = run(SR + BASE + ask(nbd.OPT_EXPORT_NAME, b"plain"))
    assert handshake.terms.meta_contexts == ()
    handshake, _ = run(SR + BASE + ask(nbd.OPT_EXPORT_NAME, b""))
    assert handshake.terms.meta_contexts == ("base:allocation",)


# -- bad input ---------------------------------------------------------------------


@BOTH
def test_without_structured_replies(option):
    request = query(option, "", "base:allocation")
    assert codes(request) == [nbd.REP_ERR_INVALID]
    assert contexts(request) == []


U32 = struct.Struct(">I").pack
BAD_DATA = {
    "empty": b"",
    "short": bytes(7),
    "name too long": U32(5) + b"name" + U32(0),
    "name of 4 GiB": U32(0xFFFFFFFF) + bytes(8),
    "trailing": bytes(9),
    "query missing": U32(0) + U32(1),
    "query cut": U32(0) + U32(1) + U32(6) + b"base:",
    "query of 4 GiB": U32(0) + U32(1) + U32(0xFFFFFFFF) + b"base:",
    "one query more": U32(0) + U32(1) + U32(5) + b"base:" + U32(5) + b"base:",
    "one query less": U32(0) + U32(2) + U32(5) + b"base:",
    "no namespace": U32(0) + U32(1) + U32(4) + b"base",
    "empty query": U32(0) + U32(1) + U32(0),
    "not UTF-8": U32(0) + U32(1) + U32(6) + b"base:\xff",
    "NUL": U32(0) + U32(1) + U32(6) + b"base:\0",
    "name not UTF-8": U32(1) + b"\xff" + U32(0),
}


@BOTH
@pytest.mark.parametrize("data", BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data(option, data):
    assert codes(SR + ask(option, data)) == [ACK, nbd.REP_ERR_INVALID]


@BOTH
def test_every_truncation(option):
    data = codec.meta_context_request("plain", ["base:allocation", "qemu:x"])
    for length in range(len(data)):
        assert codes(SR + ask(option, data[:length])) == [ACK, nbd.REP_ERR_INVALID]


@BOTH
def test_too_much(option):
    too_big = [ACK, nbd.REP_ERR_TOO_BIG]
    assert codes(SR + query(option, "", *["a:"] * 1025)) == too_big
    assert codes(SR + query(option, "", "base:" + "x" * 4092)) == too_big
    assert codes(SR + query(option, "x" * 4097)) == too_big
    assert codes(SR + ask(option, U32(0) + U32(0xFFFFFFFF))) == too_big
    assert codes(SR + ask(option, bytes((64 << 10) + 1))) == too_big
    most = query(option, "", *["base:allocation"] * 1024)
    assert codes(SR + most) == [ACK, nbd.REP_META_CONTEXT, ACK]


@BOTH
def test_unknown_export(option):
    assert codes(SR + query(option, "x", "base:")) == [ACK, nbd.REP_ERR_UNKNOWN]


@settings(max_examples=300)
@given(
    st.lists(
        st.one_of(
            st.just(SR),
            st.just(EH),
            st.builds(
                query,
                st.sampled_from([LIST, SET]),
                st.sampled_from(["", "plain", "bare", "unknown"]),
                st.sampled_from([*CONTEXTS, "base:", "qemu:", "x"]),
            ),
            st.builds(ask, st.sampled_from([8, 9, 10, 11]), st.binary(max_size=40)),
        ),
        max_size=8,
    )
)
def test_any_order_keeps_in_sync(options):
    handshake, output = run(b"".join(options) + go("plain"))
    assert handshake.state is HandshakeState.TRANSMISSION
    assert set(handshake.terms.meta_contexts) <= {"base:allocation"}
    finals = [
        reply
        for reply in parse_replies(output)
        if reply.reply not in (nbd.REP_INFO, nbd.REP_META_CONTEXT)
    ]
    assert len(finals) == len(options) + 1


def test_styles_can_be_switched_off():
    handshake = ServerHandshake(Exports(), structured_replies=False)
    handshake.data_to_send()
    handshake.receive_data(flags(FIXED | NO_ZEROES) + SR + EH + go())
    refused, also_refused, *others = parse_replies(handshake.data_to_send())
    for reply in (refused, also_refused):
        assert reply.reply == nbd.REP_ERR_UNSUP
        assert b"switched off" in reply.data
    assert others[-1].reply == ACK
    assert handshake.terms == Terms(ReplyStyle.SIMPLE)

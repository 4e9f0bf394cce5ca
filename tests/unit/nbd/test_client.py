"""The client handshake: against our server half, and against bad servers."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdqcow.errors import ProtocolError
from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.client import ClientHandshake, ClientState, RemoteExport
from nbdqcow.nbd.handshake import ExportInfo, HandshakeState, ServerHandshake

ALL_INFOS = (nbd.INFO_NAME, nbd.INFO_DESCRIPTION, nbd.INFO_BLOCK_SIZE)
GREETING = codec.greeting(nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES)


class Exports:
    exports = (
        ExportInfo("", 1 << 20, nbd.FLAG_SEND_FLUSH),
        ExportInfo("disk", 5, nbd.FLAG_READ_ONLY, "a disk"),
    )

    def list_exports(self):
        return self.exports

    def find_export(self, name):
        return next((e for e in self.exports if e.name == name), None)


def connect(step=1 << 20, **options):
    """Return a client that has been greeted, its server, and a function that
    carries bytes both ways, ``step`` at a time, until nothing moves."""
    client = ClientHandshake(**options)
    server = ServerHandshake(Exports())

    def carry():
        moved = True
        while moved:
            moved = False
            for source, target in ((server, client), (client, server)):
                data = source.data_to_send()
                moved = moved or bool(data)
                for i in range(0, len(data), step):
                    target.receive_data(data[i : i + step])

    carry()
    assert client.state is ClientState.IDLE
    return client, server, carry


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_list_info_and_go(step):
    client, server, carry = connect(step)
    assert client.server_flags == nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES
    client.list_exports()
    assert client.result is None
    carry()
    assert client.result.exports == [("", ""), ("disk", "a disk")]
    client.info("disk", ALL_INFOS)
    carry()
    assert client.result.export == RemoteExport(
        5,
        nbd.FLAG_READ_ONLY | nbd.FLAG_HAS_FLAGS,
        "disk",
        "a disk",
        (1, 4096, 32 << 20),
    )
    client.info("no such export")
    carry()
    assert client.result.error == nbd.REP_ERR_UNKNOWN
    assert "no such export" in client.result.text
    assert client.state is ClientState.IDLE
    client.structured_reply()
    carry()
    client.list_meta_contexts("disk")
    carry()
    assert client.result.option == nbd.OPT_LIST_META_CONTEXT
    client.go("")
    carry()
    assert client.state is ClientState.TRANSMISSION
    assert server.state is HandshakeState.TRANSMISSION
    assert client.result.export.size == 1 << 20
    # Told unasked.
    assert client.result.export.block_sizes == (1, 4096, 32 << 20)


@pytest.mark.parametrize("fixed_newstyle", [False, True])
@pytest.mark.parametrize("no_zeroes", [False, True])
@pytest.mark.parametrize("step", [1, 1 << 20])
def test_export_name(fixed_newstyle, no_zeroes, step):
    client, _, carry = connect(step, fixed_newstyle=fixed_newstyle, no_zeroes=no_zeroes)
    client.export_name("disk")
    carry()
    assert client.state is ClientState.TRANSMISSION
    assert client.result.export.size == 5
    assert client.trailing == b""
    client.receive_data(b"transmission")
    assert client.trailing == b"transmission"


def test_abort():
    client, server, carry = connect()
    client.abort()
    carry()
    assert server.state is HandshakeState.CLOSED
    assert client.result.error == 0


def test_flags_are_only_those_the_server_offers():
    client = ClientHandshake()
    client.receive_data(codec.greeting(0))
    assert client.data_to_send() == bytes(4)


def reply(option, kind, data=b""):
    return codec.option_reply(option, kind, data)


INFO = codec.info_export(5, 1)
BAD_ANSWERS = {
    "bad magic": (nbd.OPT_LIST, b"x" * 20),
    "other option": (nbd.OPT_LIST, reply(nbd.OPT_GO, nbd.REP_ACK)),
    "too long": (
        nbd.OPT_LIST,
        codec.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, 3, 2, 0xFFFFFFFF),
    ),
    "ack with data": (nbd.OPT_LIST, reply(3, nbd.REP_ACK, b"x")),
    "unknown reply": (nbd.OPT_LIST, reply(3, 99)),
    "info to LIST": (nbd.OPT_LIST, reply(3, nbd.REP_INFO, INFO)),
    "server too short": (nbd.OPT_LIST, reply(3, nbd.REP_SERVER, b"abc")),
    "server name too long": (nbd.OPT_LIST, reply(3, nbd.REP_SERVER, b"\0\0\0\4abc")),
    "server name not text": (
        nbd.OPT_LIST,
        reply(3, nbd.REP_SERVER, b"\0\0\0\1\xff"),
    ),
    "error text too long": (nbd.OPT_LIST, reply(3, nbd.REP_ERR_POLICY, b"x" * 4097)),
    "server to GO": (nbd.OPT_GO, reply(7, nbd.REP_SERVER, b"\0\0\0\0")),
    "ack without info": (nbd.OPT_GO, reply(7, nbd.REP_ACK)),
    "info without type": (nbd.OPT_GO, reply(7, nbd.REP_INFO, b"\0")),
    "short export": (nbd.OPT_GO, reply(7, nbd.REP_INFO, INFO[:-1])),
    "no HAS_FLAGS": (nbd.OPT_GO, reply(7, nbd.REP_INFO, codec.info_export(5, 2))),
    "short block size": (nbd.OPT_GO, reply(7, nbd.REP_INFO, b"\0\3\0\0")),
    "short context": (nbd.OPT_LIST_META_CONTEXT, reply(9, nbd.REP_META_CONTEXT)),
}


@pytest.mark.parametrize(("option", "data"), BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_bad_answers(option, data):
    client = ClientHandshake()
    client.receive_data(GREETING)
    if option == nbd.OPT_LIST:
        client.list_exports()
    elif option == nbd.OPT_GO:
        client.go("x")
    else:
        client.list_meta_contexts("x")
    with pytest.raises(ProtocolError):
        client.receive_data(data)


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1", "not an NBD server"),
        (b"NBDMAGIC" + bytes.fromhex("00420281861253") + bytes(20), "newstyle"),
        (GREETING + b"x", "without being asked"),
    ],
)
def test_bad_greetings(greeting, reason):
    with pytest.raises(ProtocolError, match=reason):
        ClientHandshake().receive_data(greeting)


def test_meta_contexts_and_unknown_infos():
    client = ClientHandshake()
    client.receive_data(GREETING)
    client.list_meta_contexts("x")
    client.receive_data(
        reply(9, nbd.REP_META_CONTEXT, b"\0\0\0\0base:allocation")
        + reply(9, nbd.REP_ACK)
    )
    assert client.result.contexts == ["base:allocation"]
    client.info("x")
    client.receive_data(
        reply(6, nbd.REP_INFO, b"\0\x09future")
        + reply(6, nbd.REP_INFO, INFO)
        + reply(6, nbd.REP_ACK)
    )
    assert client.result.export == RemoteExport(5, 1)


def test_endless_answer_is_cut():
    client = ClientHandshake()
    client.receive_data(GREETING)
    client.list_exports()
    chunk = reply(3, nbd.REP_SERVER, b"\0\0\0\0" + b"x" * 4000) * 100
    with pytest.raises(ProtocolError, match="too long"):
        for _ in range(1000):
            client.receive_data(chunk)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200), option=st.sampled_from([3, 6, 7]))
def test_random_answers_raise_nothing_else(data, option):
    for start in (
        b"",
        codec.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, option, 2, 10),
        codec.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, option, 3, 12),
    ):
        client = ClientHandshake()
        client.receive_data(GREETING)
        if option == nbd.OPT_LIST:
            client.list_exports()
        elif option == nbd.OPT_INFO:
            client.info("x")
        else:
            client.go("x")
        with contextlib.suppress(ProtocolError):
            client.receive_data(start + data)

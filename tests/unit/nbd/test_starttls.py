"""STARTTLS and the TLS modes in the server handshake, without a connection."""

import pytest

from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.handshake import (
    ExportInfo,
    HandshakeState,
    ServerHandshake,
    Terms,
    TlsMode,
)
from tests.unit.nbd.test_handshake import (
    FIXED,
    NO_ZEROES,
    Exports,
    Reply,
    ask,
    flags,
    info,
    parse_replies,
)

OPEN = ExportInfo("open", 1 << 20, 0, meta_contexts=("base:allocation",))
SECRET = ExportInfo("secret", 2 << 20, 0, tls_only=True)
STARTTLS = ask(nbd.OPT_STARTTLS)
ACK = Reply(nbd.OPT_STARTTLS, nbd.REP_ACK)
ENCRYPTING = [TlsMode.ON, TlsMode.REQUIRED]


class Talk:
    """A handshake with a fixed newstyle client, after its flags."""

    def __init__(self, mode, *, exports=(OPEN, SECRET), client_flags=3, **arguments):
        self.handshake = ServerHandshake(Exports(exports), tls=mode, **arguments)
        self.handshake.data_to_send()
        self.handshake.receive_data(flags(client_flags))

    def say(self, data):
        self.handshake.receive_data(data)
        return parse_replies(self.handshake.data_to_send())

    def reply(self, data):
        (reply,) = self.say(data)
        return reply.reply

    def start_tls(self):
        assert self.say(STARTTLS) == [ACK]
        assert self.state is HandshakeState.STARTTLS
        self.handshake.tls_started()
        assert self.state is HandshakeState.HANDSHAKING

    def list(self):
        *listed, last = self.say(ask(nbd.OPT_LIST))
        assert last == Reply(nbd.OPT_LIST, nbd.REP_ACK)
        return [reply.data[4:].decode() for reply in listed]

    @property
    def state(self):
        return self.handshake.state


@pytest.mark.parametrize("mode", ENCRYPTING)
def test_starttls(mode):
    talk = Talk(mode)
    assert not talk.handshake.encrypted
    talk.start_tls()
    assert talk.handshake.encrypted
    assert talk.list() == ["open", "secret"]
    talk.say(info("secret", option=nbd.OPT_GO))
    assert talk.state is HandshakeState.TRANSMISSION
    assert talk.handshake.export == SECRET


@pytest.mark.parametrize("mode", ENCRYPTING)
def test_starttls_byte_by_byte(mode):
    talk = Talk(mode)
    for byte in STARTTLS[:-1]:
        assert talk.say(bytes((byte,))) == []
    assert talk.say(STARTTLS[-1:]) == [ACK]
    assert talk.state is HandshakeState.STARTTLS


@pytest.mark.parametrize("mode", TlsMode)
@pytest.mark.parametrize("length", [1, 4, 65536])
def test_starttls_with_data(mode, length):
    talk = Talk(mode)
    assert talk.reply(ask(nbd.OPT_STARTTLS, bytes(length))) == nbd.REP_ERR_INVALID
    assert talk.state is HandshakeState.HANDSHAKING
    assert not talk.handshake.encrypted


@pytest.mark.parametrize("mode", ENCRYPTING)
def test_starttls_twice(mode):
    talk = Talk(mode)
    talk.start_tls()
    assert talk.reply(STARTTLS) == nbd.REP_ERR_INVALID
    assert talk.state is HandshakeState.HANDSHAKING
    assert talk.handshake.encrypted
    assert talk.list() == ["open", "secret"]


def test_starttls_without_tls():
    talk = Talk(TlsMode.OFF)
    assert talk.reply(STARTTLS) == nbd.REP_ERR_POLICY
    assert talk.list() == ["open"]


def test_starttls_while_shutting_down():
    talk = Talk(TlsMode.ON)
    talk.handshake.shutting_down = True
    assert talk.reply(STARTTLS) == nbd.REP_ERR_SHUTDOWN


@pytest.mark.parametrize("mode", ENCRYPTING)
def test_starttls_needs_fixed_newstyle(mode):
    talk = Talk(mode, client_flags=NO_ZEROES)
    assert talk.say(STARTTLS) == []
    assert talk.state is HandshakeState.CLOSED


STRUCTURED = ask(nbd.OPT_STRUCTURED_REPLY)
EXTENDED = ask(nbd.OPT_EXTENDED_HEADERS)


def meta(option, name, *queries):
    words = [name, *queries]
    encoded = [codec.U32.pack(len(w)) + w.encode() for w in words]
    encoded.insert(1, codec.U32.pack(len(queries)))
    return ask(option, b"".join(encoded))


@pytest.mark.parametrize("before", [STRUCTURED, EXTENDED])
def test_nothing_negotiated_before_remains(before):
    talk = Talk(TlsMode.ON)
    assert talk.reply(before) == nbd.REP_ACK
    select = meta(nbd.OPT_SET_META_CONTEXT, "open", "base:allocation")
    replies = talk.say(select)
    assert [r.reply for r in replies] == [nbd.REP_META_CONTEXT, nbd.REP_ACK]
    talk.start_tls()
    assert talk.handshake.terms == Terms()
    # And it may be negotiated again, where twice would be an error.
    assert talk.reply(select) == nbd.REP_ERR_INVALID
    assert talk.reply(before) == nbd.REP_ACK
    talk.say(info("open", option=nbd.OPT_GO))
    assert talk.handshake.terms.meta_contexts == ()


@pytest.mark.parametrize(
    "option", [nbd.OPT_LIST_META_CONTEXT, nbd.OPT_SET_META_CONTEXT]
)
def test_contexts_of_an_export_that_needs_tls(option):
    # TLS_REQD is for INFO, GO and EXPORT_NAME only.
    talk = Talk(TlsMode.ON)
    assert talk.reply(STRUCTURED) == nbd.REP_ACK
    assert talk.reply(meta(option, "secret", "base:allocation")) == nbd.REP_ERR_UNKNOWN
    talk.start_tls()
    assert talk.reply(STRUCTURED) == nbd.REP_ACK
    assert talk.say(meta(option, "secret", "base:allocation"))[-1].reply == nbd.REP_ACK


# -- unencrypted bytes behind it ---------------------------------------------------


@pytest.mark.parametrize("mode", ENCRYPTING)
@pytest.mark.parametrize(
    "injected", [b"\0", STARTTLS, info("open", option=nbd.OPT_GO), b"\x16\x03\x01"]
)
def test_bytes_with_starttls_close(mode, injected):
    talk = Talk(mode)
    assert talk.say(STARTTLS + injected) == []
    assert talk.state is HandshakeState.CLOSED
    assert "unencrypted" in talk.handshake.error
    assert talk.handshake.trailing == b""


@pytest.mark.parametrize("mode", ENCRYPTING)
def test_bytes_before_tls_has_started_close(mode):
    talk = Talk(mode)
    assert talk.say(STARTTLS) == [ACK]
    assert talk.say(b"\0") == []
    assert talk.state is HandshakeState.CLOSED
    assert talk.say(info("open", option=nbd.OPT_GO)) == []
    assert talk.handshake.export is None


def test_refused_starttls_keeps_what_follows():
    # Without an upgrade they are the client's own.
    talk = Talk(TlsMode.OFF)
    assert [r.reply for r in talk.say(STARTTLS + ask(nbd.OPT_LIST, b"x"))] == [
        nbd.REP_ERR_POLICY,
        nbd.REP_ERR_INVALID,
    ]


# -- TLS required ------------------------------------------------------------------


@pytest.mark.parametrize("option", [0, 3, 4, 6, 7, 8, 9, 10, 11, 999])
@pytest.mark.parametrize("length", [0, 10, 70000])
def test_required_refuses_all_other_options(option, length):
    talk = Talk(TlsMode.REQUIRED)
    assert talk.reply(ask(option, bytes(length))) == nbd.REP_ERR_TLS_REQD
    talk.start_tls()
    assert all(
        reply.reply != nbd.REP_ERR_TLS_REQD
        for reply in talk.say(ask(option, bytes(length)))
    )


@pytest.mark.parametrize("client_flags", range(4))
def test_required_closes_on_export_name(client_flags):
    talk = Talk(TlsMode.REQUIRED, client_flags=client_flags)
    talk.handshake.receive_data(ask(nbd.OPT_EXPORT_NAME, b"open"))
    assert talk.handshake.data_to_send() == b""
    assert talk.state is HandshakeState.CLOSED
    assert talk.handshake.export is None


def test_required_takes_abort():
    talk = Talk(TlsMode.REQUIRED)
    assert talk.say(ask(nbd.OPT_ABORT)) == [Reply(nbd.OPT_ABORT, nbd.REP_ACK)]
    assert talk.state is HandshakeState.CLOSED
    assert talk.handshake.error is None


def test_required_takes_export_name_once_encrypted():
    talk = Talk(TlsMode.REQUIRED)
    talk.start_tls()
    talk.handshake.receive_data(ask(nbd.OPT_EXPORT_NAME, b"open"))
    assert talk.state is HandshakeState.TRANSMISSION


# -- TLS for some exports ----------------------------------------------------------


def test_list_hides_exports_that_need_tls():
    talk = Talk(TlsMode.ON)
    assert talk.list() == ["open"]
    talk.start_tls()
    assert talk.list() == ["open", "secret"]


@pytest.mark.parametrize("option", [nbd.OPT_INFO, nbd.OPT_GO])
def test_export_that_needs_tls(option):
    talk = Talk(TlsMode.ON)
    assert talk.reply(info("secret", option=option)) == nbd.REP_ERR_TLS_REQD
    assert talk.reply(info("none", option=option)) == nbd.REP_ERR_UNKNOWN
    talk.start_tls()
    assert talk.reply(info("none", option=option)) == nbd.REP_ERR_UNKNOWN
    assert talk.say(info("secret", option=option))[-1].reply == nbd.REP_ACK


def test_export_name_of_one_that_needs_tls_closes():
    talk = Talk(TlsMode.ON)
    talk.handshake.receive_data(ask(nbd.OPT_EXPORT_NAME, b"secret"))
    assert talk.state is HandshakeState.CLOSED
    assert talk.handshake.data_to_send() == b""


@pytest.mark.parametrize("option", [nbd.OPT_INFO, nbd.OPT_GO, nbd.OPT_EXPORT_NAME])
def test_export_that_does_not_need_tls(option):
    for encrypt in (False, True):
        talk = Talk(TlsMode.ON)
        if encrypt:
            talk.start_tls()
        data = b"open" if option == nbd.OPT_EXPORT_NAME else codec.info_request("open")
        talk.handshake.receive_data(ask(option, data))
        assert (talk.state is HandshakeState.TRANSMISSION) == (option != nbd.OPT_INFO)


# -- who may use what --------------------------------------------------------------


def test_client_that_may_not_use_an_export():
    talk = Talk(TlsMode.ON, may_use=lambda export: export.name == "open")
    talk.start_tls()
    assert talk.list() == ["open"]
    for option in (nbd.OPT_INFO, nbd.OPT_GO):
        (reply,) = talk.say(info("secret", option=option))
        assert reply.reply == nbd.REP_ERR_POLICY
        assert b"not allowed" in reply.data
    talk.handshake.receive_data(ask(nbd.OPT_EXPORT_NAME, b"secret"))
    assert talk.state is HandshakeState.CLOSED


def test_permission_is_asked_only_with_tls_where_that_is_needed():
    asked = []
    talk = Talk(TlsMode.ON, may_use=lambda export: not asked.append(export.name))
    talk.say(info("secret"))
    talk.list()
    assert asked == ["open"]


def test_only_fixed_newstyle_flag_is_needed():
    talk = Talk(TlsMode.REQUIRED, client_flags=FIXED)
    talk.start_tls()
    talk.handshake.receive_data(ask(nbd.OPT_EXPORT_NAME, b"open"))
    assert len(talk.handshake.data_to_send()) == 10 + 124

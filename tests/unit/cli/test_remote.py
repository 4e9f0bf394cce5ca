"""The listing of nbdqcow-nbd --list."""

import pytest

from nbdqcow.cli.remote import ListedExport, connect, format_exports, list_exports
from nbdqcow.errors import NbdQcowError, ProtocolError
from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.client import RemoteExport
from nbdqcow.nbd.handshake import ExportInfo, HandshakeState, ServerHandshake


def test_format():
    full = RemoteExport(10 << 20, 0xDED, "foo", "desc", (1, 4096, 32 << 20))
    assert format_exports(
        [
            ListedExport("foo", "desc", full, ["base:allocation"]),
            ListedExport("", "", RemoteExport(0, 3), []),
            ListedExport("old", "", None, []),
        ]
    ).splitlines() == [
        "exports available: 3",
        " export: 'foo'",
        "  description: desc",
        "  size:  10485760",
        "  flags: 0xded ( flush fua trim zeroes df multi cache fast-zero )",
        "  min block: 1",
        "  opt block: 4096",
        "  max block: 33554432",
        "  available meta contexts: 1",
        "   base:allocation",
        " export: ''",
        "  size:  0",
        "  flags: 0x3 ( readonly )",
        " export: 'old'",
    ]


class Exports:
    def list_exports(self):
        return [ExportInfo("a", 5, nbd.FLAG_SEND_FUA, "an a"), ExportInfo("b", 6, 0)]

    def find_export(self, name):
        return next((e for e in self.list_exports() if e.name == name), None)


class Wire:
    """A connected socket as far as `list_exports` uses one."""

    def __init__(self, server):
        self.server = server

    def sendall(self, data):
        self.server.receive_data(data)

    def recv(self, length):
        data = self.server.data_to_send()
        assert len(data) <= length
        return data


class Scripted:
    """A server that says these things, one for each time it is read from."""

    def __init__(self, *says):
        self.says = [*says]

    def receive_data(self, data):
        pass

    def data_to_send(self):
        return self.says.pop(0) if self.says else b""


def test_all_exports_are_listed():
    server = ServerHandshake(Exports())
    exports = list_exports(Wire(server))
    assert [(e.name, e.description, e.details.size) for e in exports] == [
        ("a", "an a", 5),
        ("b", "", 6),
    ]
    assert server.state is HandshakeState.CLOSED
    assert server.error is None


def refusal(option):
    return codec.option_reply(option, nbd.REP_ERR_POLICY, b"no")


@pytest.mark.parametrize(
    ("server", "error", "text"),
    [
        (Scripted(), ProtocolError, "closed the connection"),
        (Scripted(codec.greeting(0)), ProtocolError, "too old"),
        (
            Scripted(
                codec.greeting(nbd.FLAG_FIXED_NEWSTYLE),
                refusal(nbd.OPT_STRUCTURED_REPLY),
                refusal(nbd.OPT_LIST),
            ),
            NbdQcowError,
            r"Denied by server for option 3 \(list\)\nserver reported: no",
        ),
    ],
)
def test_servers_that_do_not_list(server, error, text):
    with pytest.raises(error, match=text):
        list_exports(Wire(server))


def test_connect_fails(tmp_path):
    with pytest.raises(FileNotFoundError):
        connect("", "", str(tmp_path / "none"))

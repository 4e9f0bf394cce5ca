"""The handshake feature by feature, each proven by a client that is named.

docs/protocol.md has the same table for people. A row that is not here is
proven elsewhere; the document says where.
"""

import json
import re
import socket
from collections.abc import Callable

import pytest

from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd
from tests.interop.protocol_table import NEW, OLD, SIZE, GiB, MiB, Rows, Table, table
from tests.serving import REFERENCE, need, run

__all__ = ["table"]

pytestmark = pytest.mark.skipif(REFERENCE, reason="for our server")

row: Rows[Table] = Rows("1a")


@pytest.mark.parametrize(("check", "client"), row.cases)
def test_row(table: Table, check: Callable[[Table, str], None], client: str) -> None:
    check(table, client)


@row("handshake flags", OLD, NEW)
def handshake_flags(table: Table, client: str) -> None:
    script = """
sizes = []
for flags in range(4):
    h = nbd.NBD()
    h.set_handshake_flags(flags)
    h.connect_uri(uri)
    sizes.append(h.get_size())
    h.shutdown()
result = sizes
"""
    assert table.nbdsh(script, client) == [SIZE] * 4


@row("an unknown client flag closes", "raw socket")
def unknown_client_flag(table: Table, client: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(table.server.socket))
        sock.sendall(codec.CLIENT_FLAGS.pack(0x83))
        answer = b""
        while piece := sock.recv(4096):
            answer += piece
    assert len(answer) == 18


@row("EXPORT_NAME", OLD)
def export_name(table: Table, client: str) -> None:
    script = """
h.set_handshake_flags(0)
h.connect_uri(uri)
result = [h.get_size(), h.get_protocol(), h.pread(512, 0) == bytes(512)]
"""
    assert table.nbdsh(script, client) == [SIZE, "newstyle", True]


@row("ABORT", OLD, NEW)
def abort(table: Table, client: str) -> None:
    script = """
h.set_opt_mode(True)
h.connect_uri(uri)
h.opt_abort()
result = h.aio_is_closed()
"""
    assert table.nbdsh(script, client)


@row("LIST", "nbdinfo", "qemu-nbd 7.2", "nbd-client", NEW)
def list_exports(table: Table, client: str) -> None:
    socket = str(table.server.socket)
    uri = f"nbd+unix:///?socket={socket}"
    if client == "qemu-nbd 7.2":
        need("qemu-nbd")
        output = run("qemu-nbd", "-L", "-k", socket).stdout
        names = re.findall(r"export: '(.*)'", output)
    elif client == "nbd-client":
        need("nbd-client")
        path = table.images / "nbd-client"
        if not path.exists():
            from tests.conftest import find_tool

            path.symlink_to(find_tool("nbd-client"))
        output = run(path, "-l", "-unix", socket).stdout
        names = output.splitlines()[-2:]
    else:
        words = ("nbdinfo", "--list", "--json", uri)
        command = table.newer(*words) if client == NEW else words
        names = [e["export-name"] for e in json.loads(run(*command).stdout)["exports"]]
    assert names == ["disk", "chain"]


@row("INFO and GO tell the same", OLD, NEW)
def info_and_go(table: Table, client: str) -> None:
    script = """
h.set_opt_mode(True)
h.connect_uri(uri)
def told():
    return [h.get_size(), h.is_read_only(), h.can_df(), h.can_fast_zero(),
            h.get_block_size(nbd.SIZE_MAXIMUM), h.get_canonical_export_name()]
h.set_full_info(True)
h.opt_info()
first = told()
h.opt_go()
result = [first, told()]
"""
    first, second = table.nbdsh(script, client)
    assert first == second == [SIZE, False, True, True, 32 * MiB, "disk"]


@row("STRUCTURED_REPLY", "nbdinfo", NEW)
def structured_reply(table: Table, client: str) -> None:
    if client == "nbdinfo":
        answer = json.loads(run("nbdinfo", "--json", table.uri()).stdout)
        assert answer["structured"]
        return
    script = """
h.set_request_structured_replies(False)
h.set_opt_mode(True)
h.connect_uri(uri)
result = [h.opt_structured_reply(), h.opt_structured_reply()]
h.opt_go()
result.append(h.get_structured_replies_negotiated())
result.append(h.pread(5, 0) == bytes(5))
"""
    assert table.nbdsh(script, client) == [True, False, True, True]


LISTING = """
def listed(*queries):
    found = []
    h.clear_meta_contexts()
    for query in queries:
        h.add_meta_context(query)
    h.opt_list_meta_context(found.append)
    return found
h.set_opt_mode(True)
h.connect_uri(uri)
"""


@row("LIST_META_CONTEXT", OLD, NEW)
def list_meta_context(table: Table, client: str) -> None:
    script = LISTING + (
        "result = [listed(), listed('base:'), listed('qemu:'), listed('x-other:')]"
    )
    base, depth = "base:allocation", "qemu:allocation-depth"
    assert table.nbdsh(script, client) == [[base, depth], [base], [depth], []]


@row("SET_META_CONTEXT", NEW)
def set_meta_context(table: Table, client: str) -> None:
    script = LISTING + (
        """
def chosen(*queries):
    found = []
    h.opt_set_meta_context_queries(list(queries), found.append)
    return found
result = [chosen('base:'), chosen('base:allocation', 'qemu:allocation-depth'),
          chosen('qemu:allocation-depth')]
h.set_export_name('chain')
h.set_request_meta_context(False)
h.opt_go()
# They were for the other export.
h.set_strict_mode(0)
result.append(error(h.block_status, 512, 0, lambda *a: 0) is not None)
"""
    )
    base, depth = "base:allocation", "qemu:allocation-depth"
    found = table.nbdsh(script, client)
    assert found == [[], [base, depth], [depth], True]


@row("EXTENDED_HEADERS", "qemu-io 10", NEW)
def extended_headers(table: Table, client: str) -> None:
    if client == "qemu-io 10":
        trace = ["--trace", "enable=nbd_send_request"]
        zero = ["-c", "write -zu -n 0 8G"]
        command = table.newer("qemu-io", *trace, "-f", "raw", *zero, table.uri())
        output = run(*command)
        sent = [
            line
            for line in (output.stdout + output.stderr).splitlines()
            if "nbd_send_request" in line and "type = 6" in line
        ]
        assert len(sent) == 1, output
        assert f"len = {8 * GiB}" in sent[0]
        return
    script = """
h.set_request_structured_replies(False)
h.set_opt_mode(True)
h.connect_uri(uri)
result = [h.opt_extended_headers(), h.opt_extended_headers()]
h.opt_go()
result += [h.get_extended_headers_negotiated(), h.get_protocol()]
h.zero(6 << 30, 1 << 30)
h.trim(5 << 30, 1 << 30)
h.cache(6 << 30, 0)
h.pwrite(b'extended', 100)
result.append(h.pread(8, 100).decode())
h.shutdown()
"""
    assert table.nbdsh(script, client) == [
        True, False, True, "newstyle-fixed", "extended",
    ]  # fmt: skip


@row("an unknown option is refused in sync", "raw socket")
def unknown_option(table: Table, client: str) -> None:
    go = codec.option_request(nbd.OPT_GO, codec.info_request("disk"))
    answer = table.raw(
        codec.option_request(999, bytes(1024))
        + go
        + codec.request(nbd.CMD_READ, 7, 0, 16)
        + codec.request(nbd.CMD_DISC, 8)
    )
    _, option, reply, length = codec.OPTION_REPLY.unpack_from(answer)
    assert (option, reply) == (999, nbd.REP_ERR_UNSUP)
    assert answer[20 : 20 + length].decode()
    assert answer[-32:-16] == codec.simple_reply(7)


@row("INFO types", "nbdinfo", NEW)
def info_types(table: Table, client: str) -> None:
    words = ("nbdinfo", "--json", table.uri("chain"))
    command = table.newer(*words) if client == NEW else words
    (export,) = json.loads(run(*command).stdout)["exports"]
    assert export["export-name"] == "chain"
    assert export["export-size"] == 16 * MiB
    sizes = [export[f"block_size_{n}"] for n in ("minimum", "preferred", "maximum")]
    assert sizes == [1, 4096, 32 * MiB]


@row("error replies have a text", "nbdinfo", "raw socket")
def error_texts(table: Table, client: str) -> None:
    if client == "nbdinfo":
        done = run("nbdinfo", table.uri("nobody"), check=False)
        assert done.returncode
        assert "nobody" in done.stderr
        return
    wanted = [
        (codec.option_request(12345), nbd.REP_ERR_UNSUP),
        (codec.option_request(nbd.OPT_LIST, b"x"), nbd.REP_ERR_INVALID),
        (codec.option_request(nbd.OPT_GO, bytes(70000)), nbd.REP_ERR_TOO_BIG),
        (
            codec.option_request(nbd.OPT_GO, codec.info_request("nobody")),
            nbd.REP_ERR_UNKNOWN,
        ),
        (codec.option_request(nbd.OPT_EXTENDED_HEADERS), nbd.REP_ACK),
        (
            codec.option_request(nbd.OPT_STRUCTURED_REPLY),
            nbd.REP_ERR_EXT_HEADER_REQD,
        ),
        (codec.option_request(nbd.OPT_ABORT), nbd.REP_ACK),
    ]
    answer = table.raw(b"".join(option for option, _ in wanted))
    for _, code in wanted:
        _, _, reply, length = codec.OPTION_REPLY.unpack_from(answer)
        text, answer = answer[20 : 20 + length].decode(), answer[20 + length :]
        assert reply == code
        assert bool(text) == (code != nbd.REP_ACK)
        assert text.isprintable()
    assert not answer

"""The protocol feature by feature, each proven by a client that is named.

docs/protocol.md has the same table for people. A row that is not here is
proven elsewhere; the document says where.
"""

import json
import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd
from tests.nbd_client import NbdClient
from tests.serving import REFERENCE, Server, check_image, need, run, serving

pytestmark = pytest.mark.skipif(REFERENCE, reason="for our server")
MiB, GiB = 1 << 20, 1 << 30
SIZE = 10 * GiB


@dataclass
class Table:
    """What the rows run on: a server with a writable export without data
    ("disk"), a read-only view of its own ("frozen") and a chain ("chain")."""

    server: Server
    newer: Callable[..., list[str]]
    images: Path

    def uri(self, name: str = "disk") -> str:
        return f"nbd+unix:///{name}?socket={self.server.socket}"

    def nbdsh(self, script: str, client: str, name: str = "disk") -> Any:
        """Run ``script`` with a handle ``h`` that is not connected and the
        export's ``uri``; return what it assigns to ``result``."""
        program = (
            "import errno, json, sys, nbd\n"
            "h, uri = nbd.NBD(), sys.argv[1]\n"
            "def error(call, *arguments):\n"
            "    try:\n"
            "        call(*arguments)\n"
            "    except nbd.Error as exc:\n"
            "        return exc.errno\n"
            "    return None\n"
            f"{script}\n"
            "print(json.dumps(result))\n"
        )
        python = ["/usr/bin/python3"]
        if client == "libnbd 1.22":
            python = self.newer("python3")
        elif subprocess.run(
            [*python, "-c", "import nbd"], capture_output=True, check=False
        ).returncode:
            pytest.skip("/usr/bin/python3 has no module nbd (python3-libnbd)")
        return json.loads(run(*python, "-c", program, self.uri(name)).stdout)

    def raw(self, data: bytes, length: int = 1 << 20) -> bytes:
        """Send bytes behind a client's flags; return what is behind the
        greeting, until the server closes or ``length`` bytes have come."""
        import socket

        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(str(self.server.socket))
            sock.sendall(codec.CLIENT_FLAGS.pack(3) + data)
            answer = b""
            while len(answer) < 18 + length:
                piece = sock.recv(1 << 16)
                if not piece:
                    break
                answer += piece
        return answer[18:]


ROWS: list[Any] = []


def row(
    section: str, feature: str, *clients: str
) -> Callable[[Callable[[Table, str], None]], None]:
    """Add a row for each of ``clients`` that proves ``feature``."""

    def add(check: Callable[[Table, str], None]) -> None:
        for client in clients:
            name = f"{section} {feature} [{client}]"
            ROWS.append(pytest.param(check, client, id=name))

    return add


@pytest.fixture(scope="module")
def table(
    tmp_path_factory: pytest.TempPathFactory, newer_clients: Callable[..., list[str]]
) -> Iterator[Table]:
    need("qemu-img", "qemu-io")
    images = tmp_path_factory.mktemp("images")
    disk, base, top = (images / f"{n}.qcow2" for n in ("disk", "base", "top"))
    run("qemu-img", "create", "-q", "-f", "qcow2", disk, str(SIZE))
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "16M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 4M", base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    run("qemu-img", "bitmap", "--add", top, "b0")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 2 1M 1M", "-c", "write -z 3M 1M", top)
    run("qemu-img", "bitmap", "--disable", top, "b0")
    with serving(
        Path(f"disk={disk}"), options=(f"chain={top}",), image_format="qcow2"
    ) as server:
        yield Table(server, newer_clients, images)
    check_image(disk)


@pytest.mark.parametrize(("check", "client"), ROWS)
def test_row(table: Table, check: Callable[[Table, str], None], client: str) -> None:
    check(table, client)


OLD, NEW = "libnbd 1.14", "libnbd 1.22"

# -- 1a: handshake -----------------------------------------------------------------


@row("1a", "handshake flags", OLD, NEW)
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


@row("1a", "an unknown client flag closes", "raw socket")
def unknown_client_flag(table: Table, client: str) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(table.server.socket))
        sock.sendall(codec.CLIENT_FLAGS.pack(0x83))
        answer = b""
        while piece := sock.recv(4096):
            answer += piece
    assert len(answer) == 18


@row("1a", "EXPORT_NAME", OLD)
def export_name(table: Table, client: str) -> None:
    script = """
h.set_handshake_flags(0)
h.connect_uri(uri)
result = [h.get_size(), h.get_protocol(), h.pread(512, 0) == bytes(512)]
"""
    assert table.nbdsh(script, client) == [SIZE, "newstyle", True]


@row("1a", "ABORT", OLD, NEW)
def abort(table: Table, client: str) -> None:
    script = """
h.set_opt_mode(True)
h.connect_uri(uri)
h.opt_abort()
result = h.aio_is_closed()
"""
    assert table.nbdsh(script, client)


@row("1a", "LIST", "nbdinfo", "qemu-nbd 7.2", "nbd-client", NEW)
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


@row("1a", "INFO and GO tell the same", OLD, NEW)
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


@row("1a", "STRUCTURED_REPLY", "nbdinfo", NEW)
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


@row("1a", "LIST_META_CONTEXT", OLD, NEW)
def list_meta_context(table: Table, client: str) -> None:
    script = LISTING + (
        "result = [listed(), listed('base:'), listed('qemu:'), listed('x-other:')]"
    )
    base, depth = "base:allocation", "qemu:allocation-depth"
    assert table.nbdsh(script, client) == [[base, depth], [base], [depth], []]


@row("1a", "SET_META_CONTEXT", NEW)
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


@row("1a", "EXTENDED_HEADERS", "qemu-io 10", NEW)
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


@row("1a", "an unknown option is refused in sync", "raw socket")
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


@row("1a", "INFO types", "nbdinfo", NEW)
def info_types(table: Table, client: str) -> None:
    words = ("nbdinfo", "--json", table.uri("chain"))
    command = table.newer(*words) if client == NEW else words
    (export,) = json.loads(run(*command).stdout)["exports"]
    assert export["export-name"] == "chain"
    assert export["export-size"] == 16 * MiB
    sizes = [export[f"block_size_{n}"] for n in ("minimum", "preferred", "maximum")]
    assert sizes == [1, 4096, 32 * MiB]


@row("1a", "error replies have a text", "nbdinfo", "raw socket")
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


# -- 1b: transmission --------------------------------------------------------------

CHAIN = b"\1" * MiB + b"\2" * MiB + b"\1" * MiB + bytes(13 * MiB)


@row("1b", "READ as data and holes", OLD, NEW)
def sparse_read(table: Table, client: str) -> None:
    script = """
h.connect_uri(uri)
chunks = []
def chunk(data, offset, status, error):
    chunks.append([offset, len(data), status])
h.pread_structured(6 << 20, 0, chunk)
result = sorted(chunks)
"""
    found = table.nbdsh(script, client, "chain")
    data, hole = 1, 2
    assert found == [[0, 3 * MiB, data], [3 * MiB, 3 * MiB, hole]]


@row("1b", "errors have a text", NEW)
def error_chunk_text(table: Table, client: str) -> None:
    script = """
messages = []
h.set_debug(True)
h.set_debug_callback(lambda context, message: messages.append(message))
h.set_strict_mode(0)
h.connect_uri(uri)
result = [error(h.pread, 512, 1 << 60)]
result.append([m for m in messages if 'past the end of the export' in m] != [])
"""
    assert table.nbdsh(script, client) == ["EINVAL", True]


@row("1b", "DF", OLD, NEW)
def do_not_fragment(table: Table, client: str) -> None:
    script = """
h.connect_uri(uri)
chunks = []
def chunk(data, offset, status, error):
    chunks.append([offset, len(data), status])
h.pread_structured(16 << 20, 0, chunk, nbd.CMD_FLAG_DF)
result = [h.can_df(), chunks]
"""
    assert table.nbdsh(script, client, "chain") == [True, [[0, 16 * MiB, 1]]]


@row("1b", "WRITE with FUA", "qemu-io 7.2", "qemu-io 10")
def write_fua(table: Table, client: str) -> None:
    words = (
        "qemu-io",
        "-f",
        "raw",
        "-c",
        "write -f -P 5 1G 8k",
        "-c",
        "read -P 5 1G 8k",
    )
    command = table.newer(*words) if client == "qemu-io 10" else words
    output = run(*command, table.uri())
    assert "failed" not in output.stdout + output.stderr


@row("1b", "DISC", OLD, NEW)
def disconnect(table: Table, client: str) -> None:
    script = "h.connect_uri(uri); h.shutdown(); result = h.aio_is_closed()"
    assert table.nbdsh(script, client)


@row("1b", "FLUSH, TRIM, CACHE", OLD, NEW)
def flush_trim_cache(table: Table, client: str) -> None:
    script = """
h.connect_uri(uri)
h.pwrite(b'x' * 131072, 2 << 30)
h.flush()
h.cache(131072, 2 << 30)
h.trim(131072, 2 << 30, nbd.CMD_FLAG_FUA)
result = h.pread(131072, 2 << 30) == bytes(131072)
"""
    assert table.nbdsh(script, client)


@row("1b", "WRITE_ZEROES, NO_HOLE, FAST_ZERO", OLD, NEW)
def write_zeroes(table: Table, client: str) -> None:
    script = """
h.add_meta_context('base:allocation')
h.connect_uri(uri)
h.pwrite(b'x' * 393216, 3 << 30)
h.zero(131072, 3 << 30)
h.zero(131072, (3 << 30) + 131072, nbd.CMD_FLAG_NO_HOLE)
h.zero(131072, (3 << 30) + 262144, nbd.CMD_FLAG_FAST_ZERO)
slow = error(h.zero, 100, 0, nbd.CMD_FLAG_FAST_ZERO)
result = [h.pread(393216, 3 << 30) == bytes(393216), slow]
"""
    read, slow = table.nbdsh(script, client)
    assert read
    assert slow in (None, "ENOTSUP")


STATUS = """
h.add_meta_context('base:allocation')
h.add_meta_context('qemu:allocation-depth')
h.connect_uri(uri)
found = {}
def extents(context, offset, entries, error):
    found[context] = [offset, entries]
"""


@row("1b", "BLOCK_STATUS and REQ_ONE", OLD, NEW)
def block_status(table: Table, client: str) -> None:
    script = STATUS + (
        """
h.block_status(16 << 20, 0, extents)
result = [dict(found)]
h.block_status(16 << 20, 0, extents, nbd.CMD_FLAG_REQ_ONE)
result.append(dict(found))
"""
    )
    whole, one = table.nbdsh(script, client, "chain")
    base, depth = "base:allocation", "qemu:allocation-depth"
    assert whole == {
        base: [0, [3 * MiB, 0, 13 * MiB, 3]],
        depth: [0, [MiB, 2, MiB, 1, MiB, 2, MiB, 1, 12 * MiB, 0]],
    }
    assert one == {base: [0, [3 * MiB, 0]], depth: [0, [MiB, 2]]}


@row("1b", "BLOCK_STATUS with a payload", NEW)
def block_status_payload(table: Table, client: str) -> None:
    script = STATUS + (
        """
result = [h.can_block_status_payload()]
h.block_status_filter(16 << 20, 0, ['qemu:allocation-depth'], extents)
result.append(found)
"""
    )
    can, found = table.nbdsh(script, client, "chain")
    assert can
    assert list(found) == ["qemu:allocation-depth"]


@row("1b", "BLOCK_STATUS_EXT", NEW, "qemu-img 10")
def block_status_ext(table: Table, client: str) -> None:
    if client == "qemu-img 10":
        words = table.newer("qemu-img", "map", "--output=json", table.uri("chain"))
        extents = json.loads(run(*words).stdout)
        assert [(e["start"], e["data"]) for e in extents] == [
            (0, True),
            (3 * MiB, False),
        ]
        return
    script = STATUS + (
        """
h.zero(7 << 30, 0)
h.block_status_64(7 << 30, 0, extents)
result = found['base:allocation']
"""
    )
    # One extent, longer than 32 bits can say.
    assert table.nbdsh(script, client) == [0, [[7 * GiB, 3]]]


@row("1b", "RESIZE is refused", "raw socket")
def resize(table: Table, client: str) -> None:
    with NbdClient(table.server.socket, "disk") as raw:
        assert raw.request(nbd.CMD_RESIZE, 0, 4096).error == nbd.EINVAL
        assert raw.read(0, 1)


@row("1b", "unknown commands and flags", OLD, "raw socket")
def unknown_commands(table: Table, client: str) -> None:
    if client == OLD:
        script = """
h.set_strict_mode(0)
h.connect_uri(uri)
result = [error(h.pread, 512, 0, 1 << 9), error(h.flush, 1 << 12),
          error(h.pread, 512, h.get_size()), len(h.pread(512, 0))]
"""
        found = table.nbdsh(script, client)
        assert found == ["EINVAL", "EINVAL", "EINVAL", 512]
        return
    with NbdClient(table.server.socket, "disk") as raw:
        for command in (8, 9, 200, 0xFFFF):
            assert raw.request(command, 0, 512).error == nbd.EINVAL
        assert raw.read(0, 1)


@row("1b", "an oversize WRITE is dropped in sync", "raw socket")
def oversize_write(table: Table, client: str) -> None:
    with NbdClient(table.server.socket, "disk") as raw:
        length = 32 * MiB + 1
        reply = raw.request(nbd.CMD_WRITE, 0, length, bytes(length))
        assert reply.error == nbd.EINVAL
        assert raw.read(0, 1)


@row("1b", "many requests in flight", "nbdcopy", NEW)
def many_in_flight(table: Table, client: str) -> None:
    need("nbdcopy")
    copy = table.images / f"copy-{client[:7]}"
    words = ("nbdcopy", "--requests=64", table.uri("chain"), str(copy))
    run(*(table.newer(*words) if client == NEW else words))
    assert copy.read_bytes() == CHAIN
    # A copied hole is a hole.
    assert copy.stat().st_blocks * 512 < 8 * MiB


@row("1b", "zero-length and unaligned requests", OLD, "raw socket")
def odd_requests(table: Table, client: str) -> None:
    if client == OLD:
        script = """
h.connect_uri(uri)
h.pwrite(b'abc', 4 << 30)
h.pwrite(b'z', (4 << 30) + 1)
result = h.pread(5, (4 << 30) - 1).decode('latin1')
"""
        assert table.nbdsh(script, client) == "\0azc\0"
        return
    with NbdClient(table.server.socket, "disk") as raw:
        for command in (nbd.CMD_READ, nbd.CMD_WRITE, nbd.CMD_TRIM):
            assert raw.request(command, 5, 0).error == 0


# -- 1c: metadata contexts ---------------------------------------------------------


@row("1c", "base:allocation", "nbdinfo", NEW)
def base_allocation(table: Table, client: str) -> None:
    words = ("nbdinfo", "--map", "--totals", table.uri("chain"))
    output = run(*(table.newer(*words) if client == NEW else words)).stdout
    totals = re.findall(r"(\d+)\s+[\d.]+%\s+(\d)", output)
    assert sorted(totals) == [(str(13 * MiB), "3"), (str(3 * MiB), "0")]


@row("1c", "qemu:allocation-depth", "nbdinfo", NEW)
def allocation_depth(table: Table, client: str) -> None:
    words = ("nbdinfo", "--map=qemu:allocation-depth", "--json", table.uri("chain"))
    output = run(*(table.newer(*words) if client == NEW else words)).stdout
    depths = [(e["offset"] // MiB, e["type"]) for e in json.loads(output)]
    assert depths == [(0, 2), (1, 1), (2, 2), (3, 1), (4, 0)]


DIRTY = [(0, 1, False), (1, 1, True), (2, 1, False), (3, 1, True), (4, 12, False)]
"""Offset and length in MiB of what b0 of the chain's top says."""


@row("1c", "qemu:dirty-bitmap:NAME", "nbdinfo", NEW)
def dirty_bitmap(table: Table, client: str) -> None:
    words = ("nbdinfo", "--map=qemu:dirty-bitmap:b0", "--json", table.uri("chain"))
    output = run(*(table.newer(*words) if client == NEW else words)).stdout
    found = [
        (e["offset"] // MiB, e["length"] // MiB, bool(e["type"]))
        for e in json.loads(output)
    ]
    assert found == DIRTY


@row("1c", "qemu:dirty-bitmap:NAME as QEMU's client maps it", "qemu-img 7.2")
def dirty_bitmap_mapped(table: Table, client: str) -> None:
    place = f"server.type=unix,server.path={table.server.socket}"
    options = f"driver=nbd,export=chain,{place}"
    options += ",x-dirty-bitmap=qemu:dirty-bitmap:b0"
    output = run("qemu-img", "map", "--output=json", "--image-opts", options).stdout
    # Dirty is what it takes for a hole.
    found = [
        (e["start"] // MiB, e["length"] // MiB, not e["data"])
        for e in json.loads(output)
    ]
    assert found == DIRTY


@row("1c", "an unknown bitmap", "nbdinfo")
def unknown_bitmap(table: Table, client: str) -> None:
    words = ("nbdinfo", "--map=qemu:dirty-bitmap:none", table.uri("chain"))
    done = run(*words, check=False)
    assert done.returncode
    assert "does not support" in done.stderr


def test_layouts_of_the_table_are_those_of_the_wire() -> None:
    assert struct.calcsize(">IHHQQQ") == codec.EXTENDED_REQUEST.size == 32

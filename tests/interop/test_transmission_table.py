"""Commands and metadata contexts, each proven by a client that is named.

The rows of sections 1b and 1c, as `test_handshake_table` has those before them.
"""

import json
import re
from collections.abc import Callable

import pytest

from nbdqcow.nbd import constants as nbd
from tests.interop.protocol_table import NEW, OLD, GiB, MiB, Rows, Table, table
from tests.nbd_client import NbdClient
from tests.serving import REFERENCE, need, run

__all__ = ["table"]

pytestmark = pytest.mark.skipif(REFERENCE, reason="for our server")

row: Rows[Table] = Rows("1b")
context: Rows[Table] = Rows("1c")


CHAIN = b"\1" * MiB + b"\2" * MiB + b"\1" * MiB + bytes(13 * MiB)


@row("READ as data and holes", OLD, NEW)
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


@row("errors have a text", NEW)
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


@row("DF", OLD, NEW)
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


@row("WRITE with FUA", "qemu-io 7.2", "qemu-io 10")
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


@row("DISC", OLD, NEW)
def disconnect(table: Table, client: str) -> None:
    script = "h.connect_uri(uri); h.shutdown(); result = h.aio_is_closed()"
    assert table.nbdsh(script, client)


@row("FLUSH, TRIM, CACHE", OLD, NEW)
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


@row("WRITE_ZEROES, NO_HOLE, FAST_ZERO", OLD, NEW)
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


@row("BLOCK_STATUS and REQ_ONE", OLD, NEW)
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


@row("BLOCK_STATUS with a payload", NEW)
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


@row("BLOCK_STATUS_EXT", NEW, "qemu-img 10")
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


@row("RESIZE is refused", "raw socket")
def resize(table: Table, client: str) -> None:
    with NbdClient(table.server.socket, "disk") as raw:
        assert raw.request(nbd.CMD_RESIZE, 0, 4096).error == nbd.EINVAL
        assert raw.read(0, 1)


@row("unknown commands and flags", OLD, "raw socket")
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


@row("an oversize WRITE is dropped in sync", "raw socket")
def oversize_write(table: Table, client: str) -> None:
    with NbdClient(table.server.socket, "disk") as raw:
        length = 32 * MiB + 1
        reply = raw.request(nbd.CMD_WRITE, 0, length, bytes(length))
        assert reply.error == nbd.EINVAL
        assert raw.read(0, 1)


@row("many requests in flight", "nbdcopy", NEW)
def many_in_flight(table: Table, client: str) -> None:
    need("nbdcopy")
    copy = table.images / f"copy-{client[:7]}"
    words = ("nbdcopy", "--requests=64", table.uri("chain"), str(copy))
    run(*(table.newer(*words) if client == NEW else words))
    assert copy.read_bytes() == CHAIN
    # A copied hole is a hole.
    assert copy.stat().st_blocks * 512 < 8 * MiB


@row("zero-length and unaligned requests", OLD, "raw socket")
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


@context("base:allocation", "nbdinfo", NEW)
def base_allocation(table: Table, client: str) -> None:
    words = ("nbdinfo", "--map", "--totals", table.uri("chain"))
    output = run(*(table.newer(*words) if client == NEW else words)).stdout
    totals = re.findall(r"(\d+)\s+[\d.]+%\s+(\d)", output)
    assert sorted(totals) == [(str(13 * MiB), "3"), (str(3 * MiB), "0")]


@context("qemu:allocation-depth", "nbdinfo", NEW)
def allocation_depth(table: Table, client: str) -> None:
    words = ("nbdinfo", "--map=qemu:allocation-depth", "--json", table.uri("chain"))
    output = run(*(table.newer(*words) if client == NEW else words)).stdout
    depths = [(e["offset"] // MiB, e["type"]) for e in json.loads(output)]
    assert depths == [(0, 2), (1, 1), (2, 2), (3, 1), (4, 0)]


DIRTY = [(0, 1, False), (1, 1, True), (2, 1, False), (3, 1, True), (4, 12, False)]
"""Offset and length in MiB of what b0 of the chain's top says."""


@context("qemu:dirty-bitmap:NAME", "nbdinfo", NEW)
def dirty_bitmap(table: Table, client: str) -> None:
    words = ("nbdinfo", "--map=qemu:dirty-bitmap:b0", "--json", table.uri("chain"))
    output = run(*(table.newer(*words) if client == NEW else words)).stdout
    found = [
        (e["offset"] // MiB, e["length"] // MiB, bool(e["type"]))
        for e in json.loads(output)
    ]
    assert found == DIRTY


@context("qemu:dirty-bitmap:NAME as QEMU's client maps it", "qemu-img 7.2")
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


@context("an unknown bitmap", "nbdinfo")
def unknown_bitmap(table: Table, client: str) -> None:
    words = ("nbdinfo", "--map=qemu:dirty-bitmap:none", table.uri("chain"))
    done = run(*words, check=False)
    assert done.returncode
    assert "does not support" in done.stderr


@pytest.mark.parametrize(("check", "client"), [*row.cases, *context.cases])
def test_row(table: Table, check: Callable[[Table, str], None], client: str) -> None:
    check(table, client)

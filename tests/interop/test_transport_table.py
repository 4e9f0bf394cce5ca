"""TLS, transports and limits feature by feature, each proven by a named client.

The rows of section 1d, as `test_handshake_table` has those before it.
docs/protocol.md has the same for people.
"""

import json
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd
from tests.certificates import Authority
from tests.conftest import find_free_port, own_environment
from tests.interop.protocol_table import NEW, OLD, MiB, Rows
from tests.nbd_client import NbdClient
from tests.serving import REFERENCE, need, run, serving

pytestmark = pytest.mark.skipif(REFERENCE, reason="for our server")
SIZE = 8 * MiB

OLD_QEMU, NEW_QEMU = "qemu-img 7.2", "qemu-img 10"


@dataclass
class Place:
    """A server over TCP and unix sockets at once; TLS is possible everywhere and
    needed for the export "secret"; "alice" alone may use "hers"."""

    socket: Path
    ports: tuple[int, int]
    home: Path
    newer: Callable[..., list[str]]
    stack: ExitStack
    authority: Authority = field(default_factory=Authority)

    def words(self, client: str, *words: str) -> list[str]:
        """Return the command line of a client's program."""
        return self.newer(*words) if client in (NEW, NEW_QEMU) else list(words)

    def info(
        self, client: str, uri: str, *options: str
    ) -> "subprocess.CompletedProcess[str]":
        return run(*self.words(client, "nbdinfo", *options, uri), check=False)

    def size(self, client: str, uri: str) -> int | str:
        """Return what nbdinfo says of the size, or its complaint."""
        done = self.info(client, uri, "--size")
        return int(done.stdout) if done.returncode == 0 else done.stderr

    def unix(self, export: str, who: str | None = None) -> str:
        """Return a URI, with TLS for one who has certificates."""
        if who is None:
            return f"nbd+unix:///{export}?socket={self.socket}"
        query = f"socket={self.socket}&tls-certificates={self.home / who}"
        return f"nbds+unix:///{export}?{query}"

    def nbdsh(self, client: str, script: str) -> Any:
        """Run ``script`` with the module; return what it assigns to ``result``."""
        program = f"import json, nbd\n{script}\nprint(json.dumps(result))\n"
        python = self.words(client, "python3")
        if client == OLD:
            python = ["/usr/bin/python3"]
        return json.loads(run(*python, "-c", program).stdout)

    def serve(self, *options: str, image_format: str = "qcow2") -> Path:
        """Serve the disk once more, in this row's way, until the row ends."""
        disk = self.home / "row.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", disk, str(SIZE))
        server = self.stack.enter_context(
            serving(disk, options=options, image_format=image_format)
        )
        return server.socket


def read_exactly(sock: socket.socket, length: int) -> bytes:
    """Read so many bytes, or what there is until the end."""
    data = b""
    while len(data) < length and (piece := sock.recv(length - len(data))):
        data += piece
    return data


row: Rows[Place] = Rows("1d")


@pytest.fixture(scope="module")
def common(
    tmp_path_factory: pytest.TempPathFactory, newer_clients: Callable[..., list[str]]
) -> Iterator[Place]:
    need("qemu-img", "nbdinfo", "nbdcopy")
    home = tmp_path_factory.mktemp("home")
    authority = Authority()
    authority.write_server(home / "server")
    authority.write_client(home / "alice", authority.client("alice"))
    authority.write_client(home / "bob", authority.client("bob"))
    disks = [home / f"{name}.qcow2" for name in ("open", "secret", "hers", "spare")]
    for disk in disks:
        run("qemu-img", "create", "-q", "-f", "qcow2", disk, str(SIZE))
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", disks[0])
    ports = (find_free_port(), find_free_port())
    options = [f"{disk.stem}={disk}" for disk in disks[1:3]]
    for port, host in zip(ports, ("127.0.0.1", "[::1]"), strict=True):
        options += ["--listen", f"{host}:{port}"]
    options += ["--tls", "on", "--tls-certificates", str(home / "server")]
    options += ["--tls-verify-peer", "optional"]
    options += ["--tls-only", "secret", "--tls-only", "hers"]
    options += ["--tls-export-allow-dn", "hers", "O=Example,CN=alice"]
    with serving(Path(f"open={disks[0]}"), options=options) as server:
        yield Place(server.socket, ports, home, newer_clients, ExitStack(), authority)


@pytest.mark.parametrize(("check", "client"), row.cases)
def test_row(common: Place, check: Callable[[Place, str], None], client: str) -> None:
    with common.stack:
        check(common, client)


# -- TLS ---------------------------------------------------------------------------


@row("X.509", OLD, NEW, OLD_QEMU, NEW_QEMU)
def x509(place: Place, client: str) -> None:
    if client in (OLD, NEW):
        assert place.size(client, place.unix("secret", "alice")) == SIZE
        return
    directory = place.home / "alice"
    words = place.words(client, "qemu-img", "info", "--output=json")
    words += ["--object", f"tls-creds-x509,id=t,endpoint=client,dir={directory}"]
    options = f"driver=nbd,server.type=unix,server.path={place.socket},export=secret"
    words += ["--image-opts", f"{options},tls-creds=t,tls-hostname=localhost"]
    assert json.loads(run(*words).stdout)["virtual-size"] == SIZE


@row("SELECTIVETLS: an export for TLS alone is refused and hidden without", OLD, NEW)
def selective(place: Place, client: str) -> None:
    assert place.size(client, place.unix("open")) == SIZE
    assert isinstance(place.size(client, place.unix("secret")), str)
    for who, names in ((None, ["open"]), ("alice", ["open", "secret", "hers"])):
        done = place.info(client, place.unix("", who), "--list", "--json")
        listed = json.loads(done.stdout)["exports"]
        assert [export["export-name"] for export in listed] == names


@row("authorisation by the client's name, for each export", OLD, NEW)
def authorisation(place: Place, client: str) -> None:
    assert place.size(client, place.unix("hers", "alice")) == SIZE
    assert isinstance(place.size(client, place.unix("hers", "bob")), str)
    assert place.size(client, place.unix("secret", "bob")) == SIZE


@row("the name of the server is in its certificate", OLD, NEW)
def server_name(place: Place, client: str) -> None:
    query = f"tls-certificates={place.home / 'alice'}"
    uri = f"nbds://localhost:{place.ports[0]}/secret?{query}"
    assert place.size(client, uri) == SIZE


# -- transports --------------------------------------------------------------------


@row("TCP by IPv4 and IPv6, and a unix socket, at once", OLD, NEW)
def everywhere(place: Place, client: str) -> None:
    first, second = place.ports
    for uri in (f"nbd://127.0.0.1:{first}/open", f"nbd://[::1]:{second}/open"):
        assert place.size(client, uri) == SIZE
    assert place.size(client, place.unix("open")) == SIZE


@row("socket activation", OLD)
def activation(place: Place, client: str) -> None:
    disk = place.home / "spare.qcow2"
    command = [sys.executable, "-m", "nbdqcow", "serve", "-r", str(disk)]
    # The server tells its place on standard output, which is also the result's.
    command = ["sh", "-c", 'exec "$@" >/dev/null', "sh", *command]
    script = f"h = nbd.NBD()\nh.connect_systemd_socket_activation({command!r})\n"
    assert place.nbdsh(client, f"{script}result = h.get_size()") == SIZE


@row("one client on standard input and output", OLD)
def standard_streams(place: Place, client: str) -> None:
    disk = place.home / "spare.qcow2"
    command = [sys.executable, "-m", "nbdqcow", "serve", "-r", "--stdio", str(disk)]
    script = f"h = nbd.NBD()\nh.connect_command({command!r})\n"
    assert place.nbdsh(client, f"{script}result = h.get_size()") == SIZE


@row("an inherited descriptor", "raw socket")
def descriptor(place: Place, client: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-m", "nbdqcow", "serve", "-r"]
        command += ["--fd", str(theirs.fileno()), str(place.home / "spare.qcow2")]
        process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            env=own_environment(),
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        ours.settimeout(60)
        assert read_exactly(ours, 18)[:8] == b"NBDMAGIC"
        ours.sendall(codec.CLIENT_FLAGS.pack(3) + codec.option_request(nbd.OPT_ABORT))
        assert len(read_exactly(ours, 20)) == 20
    assert process.wait(60) == 0


# -- limits ------------------------------------------------------------------------


@row("the largest payload is told", OLD, NEW)
def largest_payload(place: Place, client: str) -> None:
    done = place.info(client, place.unix("open"), "--json")
    (export,) = json.loads(done.stdout)["exports"]
    assert export["block_size_maximum"] == 32 * MiB
    assert export["block_size_minimum"] == 1


@row("another largest payload", "raw socket", OLD)
def another_payload(place: Place, client: str) -> None:
    path = place.serve("--max-payload", "48M")
    if client == OLD:
        done = place.info(client, f"nbd+unix:///?socket={path}", "--json")
        (export,) = json.loads(done.stdout)["exports"]
        assert export["block_size_maximum"] == 48 * MiB
        return
    with NbdClient(path, "") as raw:
        for length in (48 * MiB, 48 * MiB + 1):
            refused = nbd.EINVAL if length > 48 * MiB else nbd.ENOSPC
            reply = raw.request(nbd.CMD_WRITE, 0, length, bytes(length))
            assert reply.error == refused
        assert raw.read(0, 1)


def closed_within(sock: socket.socket, seconds: float) -> bool:
    sock.settimeout(seconds)
    while sock.recv(4096):
        pass
    return True


@row("a silent client is closed", "raw socket")
def handshake_timeout(place: Place, client: str) -> None:
    path = place.serve("--handshake-timeout", "0.5")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(path))
        assert closed_within(silent, 60)


@row("an idle client is closed", OLD, NEW)
def idle_timeout(place: Place, client: str) -> None:
    path = place.serve("--idle-timeout", "0.5")
    script = f"""
h = nbd.NBD()
h.connect_unix({str(path)!r})
size = h.get_size()
while not (h.aio_is_closed() or h.aio_is_dead()):
    h.poll(1000)
result = size
"""
    assert place.nbdsh(client, script) == SIZE


@row("one client too many is told so", OLD, NEW)
def too_many(place: Place, client: str) -> None:
    path = place.serve("--max-connections", "2")
    script = f"""
handles = [nbd.NBD() for _ in range(3)]
result = []
for h in handles:
    try:
        h.connect_unix({str(path)!r})
        result.append(h.get_size())
    except nbd.Error as exc:
        result.append(exc.string)
"""
    first, second, third = place.nbdsh(client, script)
    assert first == second == SIZE
    assert isinstance(third, str)


@row("giant and endless options are bounded", "raw socket")
def option_flood(place: Place, client: str) -> None:
    with socket.socket(socket.AF_UNIX) as flood:
        flood.connect(str(place.socket))
        flood.sendall(codec.CLIENT_FLAGS.pack(3))
        flood.sendall(struct.pack(">8sII", b"IHAVEOPT", nbd.OPT_LIST, 0xFFFFFFFF))
        flood.settimeout(60)
        answer = read_exactly(flood, 18 + 20)
        assert struct.unpack(">QIII", answer[18:])[2] == nbd.REP_ERR_TOO_BIG
    with socket.socket(socket.AF_UNIX) as flood:
        flood.connect(str(place.socket))
        flood.settimeout(60)
        one = codec.option_request(nbd.OPT_LIST)
        flood.sendall(codec.CLIENT_FLAGS.pack(3))
        try:
            for _ in range(5000):
                flood.sendall(one)
                flood.recv(1 << 16)
        except OSError:
            return
        assert closed_within(flood, 60)


@row("TCP_NODELAY and keepalive", "ss")
def socket_options(place: Place, client: str) -> None:
    need("ss")
    with socket.create_connection(("127.0.0.1", place.ports[0])) as connection:
        connection.settimeout(60)
        assert read_exactly(connection, 8) == b"NBDMAGIC"
        port = connection.getsockname()[1]
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            out = run("ss", "-tno", "state", "established", f"dport = :{port}").stdout
            if re.search(r"timer:\(keepalive", out):
                return
            time.sleep(0.1)
    raise AssertionError(out)

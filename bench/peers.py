"""The servers that are compared: how each is started, watched and stopped."""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.cells import NBDKIT, OURS, QEMU, QEMU_URING
from tests.certificates import Authority

_TICKS = os.sysconf("SC_CLK_TCK")
_START_SECONDS = 30.0
_STOP_SECONDS = 60.0


class BenchError(Exception):
    """The benchmark can't go on; the text says why, in one line."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One server; ``raw`` means that it serves the raw copy of the data."""

    name: str
    program: str
    raw: bool = False

    def missing(self) -> bool:
        """Say whether this machine lacks the program."""
        return shutil.which(self.program) is None

    def command(
        self,
        image: Path,
        socket: Path,
        l2_cache_size: int | None,
        certificates: Path | None,
        secret: Path | None,
    ) -> list[str]:
        """Return the command that serves ``image`` on a unix socket; ``secret``
        is the file with its passphrase."""
        command = self._command(image, socket, l2_cache_size, secret)
        if certificates is None:
            return command
        if self.name == OURS:
            return [*command, "--tls-certificates", str(certificates)]
        if self.name == NBDKIT:
            options = ["--tls=require", f"--tls-certificates={certificates}"]
            return [command[0], *options, *command[1:]]
        credentials = "tls-creds-x509,id=tls0,endpoint=server,verify-peer=off"
        options = ["--object", f"{credentials},dir={certificates}"]
        return [command[0], *options, "--tls-creds=tls0", *command[1:]]

    def _command(
        self,
        image: Path,
        socket: Path,
        l2_cache_size: int | None,
        secret: Path | None,
    ) -> list[str]:
        if self.name == OURS:
            command = [sys.executable, "-m", "nbdqcow", "serve", str(image)]
            command += ["--unix", str(socket), "--format", image.suffix[1:]]
            if secret is not None:
                command += ["--key-file", str(secret)]
            if l2_cache_size is not None:
                command += ["--l2-cache-size", str(l2_cache_size)]
            return command
        if self.name == NBDKIT:
            return ["nbdkit", "-f", "-U", str(socket), "file", str(image)]
        command = ["qemu-nbd", "-t", "-e", "0", "-k", str(socket)]
        aio = "threads"
        if self.name == QEMU_URING:
            aio = "io_uring"
            command += ["--aio=io_uring", "--cache=writeback"]
        if l2_cache_size is None and secret is None:
            return [*command, "-f", image.suffix[1:], str(image)]
        options = "driver=qcow2,file.driver=file"
        if l2_cache_size is not None:
            options += f",l2-cache-size={l2_cache_size}"
        if secret is not None:
            command += ["--object", f"secret,id=s,file={secret}"]
            options += ",encrypt.key-secret=s"
        options += f",file.aio={aio},file.filename={image}"
        return [*command, "--image-opts", options]


PEERS = (
    Peer(OURS, sys.executable),
    Peer(QEMU, "qemu-nbd"),
    Peer(QEMU_URING, "qemu-nbd"),
    Peer(NBDKIT, "nbdkit", raw=True),
)


class Server:
    """A running peer.

    Attributes:
        client_environment: variables that a client needs besides the URI.
    """

    def __init__(
        self, process: subprocess.Popen[str], socket: Path, home: Path | None
    ) -> None:
        """``home`` is where libnbd looks for certificates, if it needs any."""
        self._process = process
        self._scheme = "nbd+unix" if home is None else "nbds+unix"
        self.socket = socket
        self.client_environment: Mapping[str, str] = (
            {} if home is None else {"HOME": str(home)}
        )

    @property
    def uri(self) -> str:
        """Return what libnbd and qemu call the export."""
        return f"{self._scheme}:///?socket={self.socket}"

    def cpu_seconds(self) -> float:
        """Return user and system time so far, of children too."""
        return sum(_cpu_ticks(pid) for pid in _family(self._process.pid)) / _TICKS

    def memory(self) -> dict[str, int]:
        """Return VmRSS, VmHWM, RssAnon and RssFile in bytes, children added."""
        totals: dict[str, int] = {}
        for pid in _family(self._process.pid):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                key, _, value = line.partition(":")
                if key in ("VmRSS", "VmHWM", "RssAnon", "RssFile"):
                    totals[key] = totals.get(key, 0) + int(value.split()[0]) * 1024
        return totals


def make_certificates(server: Path, home: Path) -> None:
    """Make a server's directory of certificates, and a home for its clients: fio
    gives libnbd no other way to find them."""
    client = home / ".pki" / "libnbd"
    client.parent.mkdir(parents=True)
    authority = Authority()
    authority.write_server(server)
    authority.write_client(client)


def _family(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    pids = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            pids += _family(int(child))
    return pids


def _cpu_ticks(pid: int) -> int:
    # The name, in parentheses, may contain spaces; utime is the 14th field.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _wait_until_ready(
    peer: Peer, process: subprocess.Popen[str], socket: Path, log: Path
) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if peer.name != OURS:
            if socket.exists():
                return
            time.sleep(0.01)
        elif process.stdout is not None:
            ready = select.select([process.stdout], [], [], 0.1)[0]
            if ready and process.stdout.readline():
                return
    process.kill()
    process.wait()
    text = log.read_text(errors="replace").strip().splitlines()
    raise BenchError(f"{peer.name} did not start: {text[-1] if text else 'no message'}")


@contextlib.contextmanager
def running(
    peer: Peer,
    image: Path,
    *,
    l2_cache_size: int | None = None,
    tls: bool = False,
    options: Sequence[str] = (),
    secret: Path | None = None,
) -> Iterator[Server]:
    """Serve ``image`` with a peer while the block runs.

    ``options`` are added to the peer's command line.
    """
    with tempfile.TemporaryDirectory(prefix="nbdq-bench-") as directory:
        socket, log = Path(directory) / "s", Path(directory) / "log"
        certificates = home = None
        if tls:
            certificates, home = Path(directory) / "server", Path(directory) / "home"
            make_certificates(certificates, home)
        with log.open("w") as errors:
            process = subprocess.Popen(
                [
                    *peer.command(image, socket, l2_cache_size, certificates, secret),
                    *options,
                ],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            _wait_until_ready(peer, process, socket, log)
            yield Server(process, socket, home)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()

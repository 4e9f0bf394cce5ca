"""Command lines given to qemu-nbd and to us: what differs.

    python -m tests.interop.nbd_random --seconds 600 --seed 1
    python -m tests.interop.nbd_random --table
    python -m tests.interop.nbd_random --line "-t -k {dir}/s base.qcow2"

prints each line that is answered differently, made as short as it can be. A server
that comes up is looked at by nbdinfo, nbdcopy, qemu-io and qemu-nbd's own client;
then it is told to end, or ends after its last client. Ours runs in a forked
process, or, where a line redirects standard streams, in a new one.
"""

import argparse
import contextlib
import ctypes
import hashlib
import io
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any, Final
from urllib.parse import quote

import nbdqcow
from nbdqcow.cli import nbd
from nbdqcow.cli.nbd_options import Settings, parse_arguments
from nbdqcow.cli.program import Answered
from nbdqcow.errors import NbdQcowError
from tests.certificates import Authority
from tests.conftest import own_environment, with_luks
from tests.interop.img_intended import Difference
from tests.interop.img_lines import shrink
from tests.interop.img_random import describe, look_at, shape_of
from tests.interop.img_random import prepare as prepare_images
from tests.interop.nbd_intended import unintended
from tests.interop.nbd_lines import (
    LINES,
    PROGRAM,
    REDIRECTIONS,
    NbdLines,
    is_harmless,
    words_of,
)

SECONDS: Final = 8.0
"""After so many a program is killed."""
_CLIENT_SECONDS: Final = 5
_OURS: Final = (
    f"import sys; sys.argv[0] = '{PROGRAM}'; from nbdqcow.cli.nbd import main; "
    "sys.exit(main())"
)
_PR_SET_CHILD_SUBREAPER: Final = 36
_LISTENING: Final = b"00010000"
"""Of the flags of a unix socket (``__SO_ACCEPTCON``)."""
_SPEED: Final = re.compile(rb"\n.* ops/sec\)")
Look = dict[str, Any]
"""What was seen of a program, by what it is."""


def prepare(directory: Path, authority: Authority) -> None:
    """Fill a directory with what `nbd_lines` names."""
    prepare_images(directory)
    for path in directory.glob("*.qcow2"):
        # Without holes: of what is none for the image, QEMU asks the file.
        path.write_bytes(path.read_bytes())
    base = (directory / "base.raw").read_bytes()
    for name in ("\udcff.raw", "l" * 250):
        (directory / name).write_bytes(base[: 1 << 20])
    os.mkfifo(directory / "fifo")
    (directory / "used").touch()
    authority.write_server(directory / "tls")
    authority.write_client(directory / "tls", authority.client("client"))


@contextlib.contextmanager
def held_images(directory: Path, pristine: Path) -> Iterator[None]:
    """Keep images open, and servers up, in ``directory`` while the block runs."""
    directory.mkdir()
    for name in ("locked.qcow2", "served.qcow2", "listed.qcow2"):
        shutil.copy(pristine / "bitmaps.qcow2", directory / name)
    server = ["qemu-nbd", "-t", "-e", "0", "-f", "qcow2", "-A"]
    x509 = f"tls-creds-x509,id=t,endpoint=server,dir={pristine}/tls"
    commands = [
        ["qemu-io", "-f", "qcow2", "locked.qcow2"],
        [*server, "-k", f"{directory}/served", "-r", "served.qcow2"],
        [*server, "-k", f"{directory}/s", "-x", "listed", "-D", "what it is",
         "-B", "b0", "-r", "listed.qcow2"],
        [*server, "-k", f"{directory}/tls", "--object", x509, "--tls-creds", "t",
         "-r", "listed.qcow2"],
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        for command in commands:
            process = subprocess.Popen(
                command,
                cwd=directory,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
        deadline = time.monotonic() + SECONDS
        while not all((directory / name).exists() for name in ("served", "s", "tls")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield


def load() -> None:
    """Import what our command may need, once for all forked processes."""
    for module in walk_packages(nbdqcow.__path__, "nbdqcow."):
        if not module.name.endswith("__main__"):
            import_module(module.name)


# -- a process -----------------------------------------------------------------


@dataclass
class Running:
    """A program that was started; ``status`` when it has ended."""

    process: int
    status: int | None = None

    def poll(self) -> int | None:
        if self.status is None:
            found, status = os.waitpid(self.process, os.WNOHANG)
            if found:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self, seconds: float = SECONDS) -> int | str:
        """Return the exit status; what has not ended by then is killed."""
        if wait_for(lambda: self.poll() is not None, seconds):
            assert self.status is not None
            return self.status
        os.kill(self.process, signal.SIGKILL)
        wait_for(lambda: self.poll() is not None)
        return "killed"

    def signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.process, number)


def wait_for(condition: Callable[[], object], seconds: float = SECONDS) -> bool:
    """Wait until ``condition``; return whether that came in time."""
    deadline = time.monotonic() + seconds
    delay = 0.002
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(delay)
        delay = min(delay * 1.3, 0.05)
    return True


def start(words: list[str], directory: Path, *, ours: bool, out: int, err: int) -> int:
    """Start a program in a forked process; return its ID."""
    redirections = [word for word in words if word in REDIRECTIONS]
    line = [word for word in words if word not in REDIRECTIONS]
    program = [sys.executable, "-c", _OURS] if ours else [PROGRAM]
    command = [*program, *line[1:]]
    if redirections:
        shell = f'exec "$@" {" ".join(redirections)}'
        command = ["sh", "-c", shell, "sh", *command]
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        os.chdir(directory)
        null = os.open(os.devnull, os.O_RDONLY)
        for number, descriptor in enumerate((null, out, err)):
            os.dup2(descriptor, number)
        if redirections or not ours:
            os.execvpe(command[0], command, own_environment())
        for name, number in (("stdout", 1), ("stderr", 2)):
            stream = io.TextIOWrapper(
                io.FileIO(number, "w", closefd=False), "utf-8", "backslashreplace"
            )
            setattr(sys, name, stream)
        sys.argv = line
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = nbd.main()
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(status)


def children() -> set[int]:
    """Return the processes that are ours, forked servers included."""
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return set(map(int, text.split()))


@contextlib.contextmanager
def adopting() -> Iterator[None]:
    """Make servers that fork off children of this process, which waits for them."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    assert prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


# -- what is seen of it --------------------------------------------------------


@dataclass
class Place:
    """Where a line runs, and what its words stand for."""

    directory: Path
    held: Path
    ports: dict[str, int] = field(default_factory=dict)

    def words(self, line: list[str]) -> list[str]:
        return [self._fill(word) for word in line]

    def _fill(self, word: str) -> str:
        word = word.replace("{dir}", str(self.directory))
        word = word.replace("{held}", str(self.held))
        for name, port in self.ports.items():
            word = word.replace(name, str(port))
        return word

    def settle(self, text: bytes) -> bytes:
        """Return what a program said without what is the place's alone."""
        text = text.replace(os.fsencode(self.directory), b"{dir}")
        return text.rstrip(b"\n")


class Observer:
    """Runs one program with one line, and looks at what it does."""

    def __init__(self, place: Place, line: list[str], *, ours: bool) -> None:
        self._place = place
        self._words = place.words(line)
        self._ours = ours
        self._settings = _settings_of(self._words)
        self.look: Look = {}

    def run(self) -> Look:
        before, names = children(), set(os.listdir(self._place.directory))
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = start(
                self._words,
                self._place.directory,
                ours=self._ours,
                out=out.fileno(),
                err=err.fileno(),
            )
            running = Running(process)
            wait_for(lambda: running.poll() is not None or self._is_listening())
            if self._settings.fork:
                running.wait()
            others = [Running(child) for child in children() - before - {process}]
            servers = [other for other in others if other.poll() is None]
            server = servers[0] if servers else running
            if server.poll() is None and self._is_listening():
                self._serve(server)
            elif server.poll() is None:
                self.look["listens"] = False
                server.signal(signal.SIGTERM)
            self.look["server status"] = server.wait()
            self.look["status"] = running.wait()
            for extra in servers[1:]:
                extra.signal(signal.SIGKILL)
                extra.wait()
            for what, file in (("out", out), ("err", err)):
                file.seek(0)
                self.look[what] = self._place.settle(file.read())
        self._look_at_files(names)
        return self.look

    # -- the server --

    def _is_listening(self) -> bool:
        """Whether anybody listens there. A connection would be a client."""
        settings = self._settings
        if settings.list or settings.disconnect:
            return False
        if settings.socket is not None:
            path = b" %b" % os.fsencode(settings.socket)
            return any(
                row.endswith(path) and row.split()[3] == _LISTENING
                for row in Path("/proc/net/unix").read_bytes().splitlines()
            )
        if not settings.port.isdigit():
            return False
        port = f":{int(settings.port):04X} "
        rows = [
            row
            for name in ("tcp", "tcp6")
            for row in Path(f"/proc/net/{name}").read_text().splitlines()
        ]
        return any(port in row[:48] and " 0A " in row for row in rows)

    def _serve(self, server: Running) -> None:
        uri = self._uri(self._settings.export_name)
        self.look["info"] = self._client("nbdinfo", "--json", "--no-content", uri)
        if self.look["info"][0] and server.poll() is not None:
            # It failed after it had begun to listen, as QEMU's does.
            del self.look["info"]
            return
        self.look["came up"] = True
        if self._settings.pid_file is not None:
            path = Path(self._place.directory, self._settings.pid_file)
            is_file = path.is_file()
            content = path.read_text() if is_file else ""
            self.look["pid file"] = is_file, content == f"{server.process}\n"
        if not self._settings.tls_creds and self._settings.socket:
            listed = self._client("qemu-nbd", "-L", "-k", self._settings.socket)
            self.look["list"] = listed
        if not self._settings.persistent:
            # The first that has an export, rather than asking about it.
            self.look["content"] = self._content(uri)
            if not wait_for(lambda: server.poll() is not None, 2):
                self.look["after the last client"] = "goes on"
                server.signal(signal.SIGTERM)
            return
        contexts = ["base:allocation"]
        if self._settings.allocation_depth:
            contexts.append("qemu:allocation-depth")
        contexts += [f"qemu:dirty-bitmap:{name}" for name in self._settings.bitmaps]
        for context in contexts:
            self.look[f"map {context[:40]}"] = self._map(context, uri)
        self.look["content"] = self._content(uri)
        if "e" in self._settings.given:
            self.look["clients at a time"] = self._count_clients()
        if not self._settings.tls_creds:
            commands = ("write -P 9 300k 70k", "write -z 1M 100k", "discard 2M 64k",
                        "read -P 9 300k 70k", "flush")  # fmt: skip
            words = [word for command in commands for word in ("-c", command)]
            self.look["writing"] = self._client("qemu-io", "-f", "raw", *words, uri)
        server.signal(signal.SIGTERM)

    def _uri(self, export: str) -> str:
        settings = self._settings
        scheme = "nbds" if settings.tls_creds else "nbd"
        tls = f"tls-certificates={self._place.directory}/tls" * bool(settings.tls_creds)
        name = quote(os.fsencode(export), safe="")
        if settings.socket is not None:
            path = quote(os.fsencode(settings.socket))
            tls = f"&{tls}&tls-verify-peer=false" * bool(tls)
            return f"{scheme}+unix:///{name}?socket={path}{tls}"
        host = settings.host
        host = "localhost" if host in ("", "0.0.0.0", "127.0.0.1") else host
        host = f"[{host}]" if ":" in host else host
        return f"{scheme}://{host}:{settings.port}/{name}" + (f"?{tls}" if tls else "")

    def _client(
        self, *command: str, pass_fds: Sequence[int] = ()
    ) -> tuple[object, bytes, bytes]:
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=_CLIENT_SECONDS,
                check=False,
                pass_fds=pass_fds,
            )
        except subprocess.TimeoutExpired:
            return "no answer", b"", b""
        settle = self._place.settle
        return (
            done.returncode,
            _SPEED.sub(b"", settle(done.stdout)),
            settle(done.stderr),
        )

    def _map(self, context: str, uri: str) -> object:
        """Return a map; neighbours of one kind are one extent."""
        status, out, err = self._client("nbdinfo", f"--map={context}", uri)
        extents: list[list[Any]] = []
        for row in out.decode().splitlines():
            offset, length, kind = row.split()[:3]
            if extents and extents[-1][2] == kind:
                extents[-1][1] += int(length)
            else:
                extents.append([int(offset), int(length), kind])
        return status, extents, err

    def _content(self, uri: str) -> object:
        with tempfile.TemporaryFile() as copy:
            command = "nbdcopy", uri, f"/proc/self/fd/{copy.fileno()}"
            status, _, err = self._client(*command, pass_fds=[copy.fileno()])
            return status, hashlib.file_digest(copy, "sha256").hexdigest(), err

    def _count_clients(self) -> int | str:
        """Return how many clients are greeted while all stay."""
        if self._settings.socket is None:
            return "?"
        count = 0
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.settimeout(0.3)
                try:
                    sock.connect(self._settings.socket)
                    count += len(sock.recv(18)) == 18
                except OSError:
                    break
        # They must have left before the next client comes.
        time.sleep(0.05)
        return count

    def _look_at_files(self, before: set[str]) -> None:
        after = set(os.listdir(self._place.directory))
        self.look["new files"] = sorted(after - before)
        self.look["lost files"] = sorted(before - after)


def _settings_of(words: list[str]) -> Settings:
    """Return what a line asks for; a wrong one asks for nothing."""
    line = [word for word in words[1:] if word not in REDIRECTIONS]
    try:
        return parse_arguments(line)
    except (NbdQcowError, Answered):
        return Settings(port="")


class Pair:
    """Two copies of a directory in which lines are run."""

    def __init__(self, scratch: Path) -> None:
        self._pristine = scratch / "pristine"
        self._held = scratch / "held"
        self._copies = scratch / "a", scratch / "b"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Pair":
        with_luks(lambda: prepare(self._pristine, Authority()))
        load()
        self._contents = _contents(self._pristine)
        self._stack.enter_context(adopting())
        self._stack.enter_context(held_images(self._held, self._pristine))
        taken = self._stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._ports = {
                "{taken}": taken.getsockname()[1],
                "{port}": free.getsockname()[1],
            }
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def differences(self, line: list[str]) -> list[Difference]:
        """Run ``line`` in both copies; return what differs, expected ones included."""
        looks = []
        for copy, ours in zip(self._copies, (False, True), strict=True):
            shutil.rmtree(copy, ignore_errors=True)
            subprocess.run(["cp", "-a", "--", self._pristine, copy], check=True)
            place = Place(copy, self._held, self._ports)
            looks.append(Observer(place, line, ours=ours).run())
        theirs, ours_ = looks
        found = [
            Difference(what, theirs.get(what), ours_.get(what))
            for what in dict.fromkeys((*theirs, *ours_))
            if theirs.get(what) != ours_.get(what)
        ]
        return found + self._images()

    def unintended(self, line: list[str]) -> Sequence[Difference]:
        """Return what differs against every rule, and twice: a busy machine may
        let a client wait for too long once."""
        found = unintended(self.differences(line))
        return found and unintended(self.differences(line))

    def _images(self) -> list[Difference]:
        """Compare the images that a client has written to."""
        theirs, ours = map(_contents, self._copies)
        found = []
        for name, before in self._contents.items():
            one, other = theirs.get(name), ours.get(name)
            if one == other or (before in (one, other) and None in (one, other)):
                continue
            looks = [look_at(copy, name) for copy in self._copies]
            if looks[0] != looks[1]:
                found.append(Difference(f"file {name}", *looks))
            images = [str(copy / name) for copy in self._copies]
            compare = ["qemu-img", "compare", "-U", *images]
            done = subprocess.run(compare, capture_output=True, check=False)
            if done.returncode == 1:
                found.append(Difference(f"content of {name}", None, done.stdout))
        return found


def _contents(directory: Path) -> dict[str, bytes]:
    return {
        name: path.read_bytes()
        for name in sorted(os.listdir(directory))
        if (path := directory / name).is_file() and not path.is_symlink()
    }


def _shorten(line: list[str], found: Sequence[Difference], pair: Pair) -> list[str]:
    shape = shape_of(found)

    def fails(candidate: list[str]) -> bool:
        return is_harmless(candidate) and shape_of(pair.unintended(candidate)) == shape

    return shrink(line, fails)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--oddness", type=float, default=0.15)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--line", action="append")
    parser.add_argument("--all", action="store_true", help="intended ones, too")
    given = parser.parse_args()
    made = given.table or given.line
    lines: Any = NbdLines(given.seed, given.oddness)
    if made:
        lines = map(words_of, given.line or LINES)
    with (
        tempfile.TemporaryDirectory(prefix="nbd-") as scratch,
        Pair(Path(scratch)) as pair,
    ):
        seen: set[object] = set()
        end = time.monotonic() + given.seconds
        count = 0
        for line in lines:
            if time.monotonic() > end and not made:
                break
            count += 1
            found = (pair.differences if given.all else pair.unintended)(line)
            if not found:
                continue
            shape = shape_of(found)
            if shape in seen and not made:
                continue
            seen.add(shape)
            short = line if made else _shorten(line, found, pair)
            print(f"--- {shlex.join(short[1:])!a}")
            if not made:
                print(f"    (from: {shlex.join(line[1:])!a})")
                found = pair.unintended(short)
            print(describe(found), flush=True)
        print(f"{count} lines, seed {given.seed}, {len(seen)} differ")
    return 1 if seen else 0


if __name__ == "__main__":
    sys.exit(main())

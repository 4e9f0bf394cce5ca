"""Start and stop the server under test as a process of its own.

``NBDQCOW_TEST_SERVER=qemu-nbd`` runs the same tests against QEMU's server:
that is how a test is told apart from the bug it claims to have found.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.conftest import START_SECONDS, STOP_SECONDS, find_tool, own_environment
from tests.nbd_client import NbdClient

REFERENCE = os.environ.get("NBDQCOW_TEST_SERVER", "") == "qemu-nbd"


def need(*tools: str) -> None:
    """Skip the calling test where one of the programs is missing."""
    for tool in tools:
        find_tool(tool)


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end; with ``check``, its failure fails the test."""
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=100,
        env=own_environment(),
    )
    if check:
        assert done.returncode == 0, (
            f"{command} exited {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return done


def nbdqcow_img(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run our own image tool; its failure fails the test."""
    if REFERENCE:
        return run("qemu-img", *words)
    program = "import sys; from nbdqcow.cli.img import main; sys.exit(main())"
    return run(sys.executable, "-c", program, *words)


def server_command(
    image: Path,
    socket: Path,
    *,
    image_format: str,
    read_only: bool = False,
    options: Sequence[str] = (),
) -> list[str]:
    """Return the command that serves ``image`` on a unix socket."""
    if REFERENCE:
        command = ["qemu-nbd", "-t", "-e", "0", "-f", image_format]
        command += ["--discard=unmap", "-k", str(socket)]
        return [*command, *(["-r"] if read_only else []), str(image)]
    command = [sys.executable, "-m", "nbdqcow", "serve", str(image)]
    command += ["--unix", str(socket), "--format", image_format]
    return [*command, *(["--read-only"] if read_only else []), *options]


class Server:
    """A running server; ``socket`` is where it listens."""

    def __init__(
        self,
        process: subprocess.Popen[str],
        socket: Path,
        errors: Path,
    ) -> None:
        self.process = process
        self.socket = socket
        self._errors = errors

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    def errors(self) -> str:
        """Return what the server wrote to stderr so far."""
        return self._errors.read_text(errors="replace")

    def stop(self) -> None:
        """SIGTERM: the server must drain, close cleanly and exit 0, silently."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(STOP_SECONDS)
        assert status == 0, f"exit status {status} after SIGTERM\n{self.errors()}"
        assert "Traceback" not in self.errors(), self.errors()

    def kill(self) -> None:
        """SIGKILL: nothing gets a chance to be written back."""
        self.process.kill()
        self.process.wait(STOP_SECONDS)


def _wait_until_ready(server: Server) -> None:
    """Wait for the ready line (qemu-nbd has none: for its socket)."""
    deadline = time.monotonic() + START_SECONDS
    assert server.process.stdout is not None
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        if REFERENCE:
            # It binds before it listens, and loses a SIGTERM that comes before
            # its main loop runs: only an answer shows that it is up.
            with contextlib.suppress(OSError), NbdClient(server.socket):
                return
            time.sleep(0.01)
        elif select.select([server.process.stdout], [], [], 0.1)[0]:
            if server.process.stdout.readline():
                return
            break
    raise AssertionError(f"the server did not start\n{server.errors()}")


@contextlib.contextmanager
def serving(
    image: Path,
    *,
    image_format: str = "qcow2",
    read_only: bool = False,
    options: Sequence[str] = (),
) -> Iterator[Server]:
    """Serve ``image`` on a unix socket while the block runs.

    On leaving, a server that still runs is stopped and must exit 0; after a
    failure inside the block it is killed, so that the failure is what shows.
    """
    # Unix socket paths have 107 bytes: pytest's own directories are too deep.
    with tempfile.TemporaryDirectory(prefix="nbdq-") as directory:
        socket = Path(directory) / "s"
        errors = Path(directory) / "stderr"
        command = server_command(
            image,
            socket,
            image_format=image_format,
            read_only=read_only,
            options=options,
        )
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=own_environment(),
            )
        server = Server(process, socket, errors)
        try:
            _wait_until_ready(server)
            yield server
            if process.poll() is None:
                server.stop()
        finally:
            if process.poll() is None:
                server.kill()
            if process.stdout is not None:
                process.stdout.close()


def check_image(image: Path, *, leaks_allowed: bool = False) -> None:
    """Let ``qemu-img check`` look: no corruption ever, and leaks only on leave."""
    done = run("qemu-img", "check", "--output=json", image, check=False)
    assert done.returncode in ({0, 3} if leaks_allowed else {0}), (
        f"qemu-img check {image} exited {done.returncode}\n{done.stdout}{done.stderr}"
    )
    report = json.loads(done.stdout)
    assert not report.get("corruptions"), report
    assert not report["check-errors"], report
    assert leaks_allowed or not report.get("leaks"), report


def compare_images(
    first: Path, second: Path, *, first_format: str = "raw", second_format: str
) -> None:
    """Let ``qemu-img compare`` find the guest content of both identical."""
    run("qemu-img", "compare", "-f", first_format, "-F", second_format, first, second)

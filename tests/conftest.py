"""What all tests share: the rules of a run, and the server as a process.

``CI`` in the environment makes every skip a failure: a run that could not
test something must not look like one that did.
"""

import asyncio
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import pytest
import uvloop

# What these find different is shown as in the tests themselves.
pytest.register_assert_rewrite("tests.interop.img_beside_qemu")

T = TypeVar("T")

REPOSITORY = Path(__file__).resolve().parent.parent
IN_CI = os.environ.get("CI", "") not in ("", "0", "false")
SEED = int(os.environ.get("NBDQCOW_SEED") or random.SystemRandom().getrandbits(32))
# Those who share the work of this run draw theirs from the same one.
os.environ["NBDQCOW_SEED"] = str(SEED)

# A machine under load is no failure.
hypothesis.settings.register_profile(
    "nbdqcow",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("nbdqcow")

START_SECONDS = 20.0
STOP_SECONDS = 30.0


# -- the rules of a run --------------------------------------------------------


def pytest_configure() -> None:
    # A shell has its background jobs ignore it, and so would all the programs
    # under test, those that are to be interrupted too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    return f"seed: {SEED} (NBDQCOW_SEED={SEED} repeats it)"


def _fail_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not IN_CI or report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr
    report.outcome = "failed"
    report.longrepr = (
        f"skipped, which CI counts as a failure: "
        f"{reason[2] if isinstance(reason, tuple) else reason}"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report = yield
    _fail_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    report = yield
    _fail_skip(report)
    return report


def pytest_asyncio_loop_factories() -> Mapping[
    str, Callable[[], asyncio.AbstractEventLoop]
]:
    """Run every asyncio test on both loops that the server runs on.

    A test for one of them says so:
    ``@pytest.mark.asyncio(loop_factories=["asyncio"])``.
    """
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


# -- what a run has done ---------------------------------------------------------

_FIGURE = "figure"


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Takes a line about what a test has explored, for the end of the run."""

    def add(line: str) -> None:
        # With the report, which reaches whoever sums up the run.
        request.node.user_properties.append((_FIGURE, line))

    return add


_COUNT = re.compile(
    r"(\d+) (disks|cuts|calls failed|inputs|runs|requests|cancelled|awaits|kills|"
    r"processes|MiB verified|flushed)"
)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    lines = [
        value
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == _FIGURE
    ]
    if not lines:
        return
    terminalreporter.section("what was explored")
    totals: Counter[tuple[str, str]] = Counter()
    for line in sorted(lines):
        terminalreporter.write_line(line)
        kind = re.split("[,:]", line)[0].removesuffix(" at length")
        for number, what in _COUNT.findall(line):
            totals[kind, what] += int(number)
    terminalreporter.section("in all")
    for (kind, what), number in totals.items():
        terminalreporter.write_line(f"{kind:<24} {number:>12,} {what}")


# -- fixtures ------------------------------------------------------------------


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed for this test, drawn from the run's; shown if the test fails."""
    value = zlib.crc32(request.node.nodeid.encode(), SEED)
    print(f"seed {value}; NBDQCOW_SEED={SEED} repeats it")
    return value


def find_tool(name: str) -> str:
    """Return the path of a program, or skip the test (in CI: fail it)."""
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{name} is not installed (tools/setup-system.sh test)")
    return path


def with_luks(run: Callable[[], T]) -> T:
    """Return what a program of QEMU's said that makes a LUKS header: version 7.2 gives
    up with "Unable to get accurate CPU usage" now and then on some virtual machines."""
    for _ in range(30):
        said = run()
        if "accurate CPU usage" not in str(said):
            break
    return said


@pytest.fixture
def tool() -> Callable[[str], str]:
    """`find_tool`, as a fixture: ``tool("qemu-img")`` is a path."""
    return find_tool


@pytest.fixture(scope="session")
def newer_clients() -> Callable[..., list[str]]:
    """``newer_clients("nbdinfo", "--size", uri)`` is the command line of a program
    of Debian 13: QEMU 10 and libnbd 1.22 (tools/newer-clients.sh)."""
    directory = REPOSITORY / "var" / "newer-clients"
    script = REPOSITORY / "tools" / "newer-clients.sh"
    done = subprocess.run(
        [script, directory], capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        pytest.skip(f"no newer clients: {done.stderr.strip()}")
    return lambda *words: [str(directory / "run"), *map(str, words)]


def own_environment() -> dict[str, str]:
    """Return an environment in which this checkout is the package that runs."""
    path = os.environ.get("PYTHONPATH", "")
    joined = f"{REPOSITORY}{os.pathsep}{path}" if path else str(REPOSITORY)
    return {**os.environ, "PYTHONPATH": joined}


def find_free_port() -> int:
    """Return a TCP port on 127.0.0.1 that nobody listened on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def free_port() -> int:
    """`find_free_port`, as a fixture, for a test that needs one."""
    return find_free_port()


def wait_until_listening(path: Path, process: subprocess.Popen[Any]) -> None:
    """Wait until ``process`` listens on the unix socket ``path``.

    The socket's name is there a little earlier. Trying to connect is no way to
    find out: some programs serve one client and end.
    """
    listening = " 00010000 0001 01 "
    deadline = time.monotonic() + START_SECONDS
    while not any(
        listening in line and line.endswith(f" {path}")
        for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()
    ):
        assert process.poll() is None, f"{process.args} exited {process.returncode}"
        assert time.monotonic() < deadline, f"{process.args} does not listen"
        time.sleep(0.01)


class ServedProcess:
    """``python -m nbdqcow serve`` (or another command) in a process of its own.

    Attributes:
        process: the process; its pid is the only one that is ever signalled.
        stdout, stderr: files with what it has printed so far.
    """

    def __init__(self, command: list[str], directory: Path) -> None:
        self.command = command
        self.stdout = directory / "stdout"
        self.stderr = directory / "stderr"
        with self.stdout.open("wb") as stdout, self.stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=own_environment(),
            )

    def describe(self) -> str:
        """Return the command, its exit status and what it printed."""
        return (
            f"{' '.join(self.command)}\n"
            f"exit status {self.process.poll()}\n"
            f"-- stdout --\n{self.stdout.read_text(errors='replace')}"
            f"-- stderr --\n{self.stderr.read_text(errors='replace')}"
        )

    def wait_ready(self, is_ready: Callable[[], bool] | None = None) -> None:
        """Wait for the first whole line on stdout, or for ``is_ready``."""
        if is_ready is None:

            def is_ready() -> bool:
                return b"\n" in self.stdout.read_bytes()

        deadline = time.monotonic() + START_SECONDS
        while not is_ready():
            assert self.process.poll() is None, f"no start: {self.describe()}"
            assert time.monotonic() < deadline, f"not ready: {self.describe()}"
            time.sleep(0.01)

    def stop(self) -> None:
        """SIGTERM: it must finish what is in flight and exit 0, untroubled."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"still there after SIGTERM: {self.describe()}")
        assert self.process.returncode == 0, self.describe()
        assert "Traceback" not in self.stderr.read_text(errors="replace"), (
            self.describe()
        )

    def kill(self) -> None:
        """SIGKILL: nothing gets a chance to be written back."""
        self.process.kill()
        self.process.wait(STOP_SECONDS)


@pytest.fixture
def served(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., ServedProcess]]:
    """``served("disk.qcow2", "--unix", path)`` starts our server.

    Returns once it is ready. At the end of the test a server that still runs
    must end well on SIGTERM. ``command=`` starts another program instead, and
    ``is_ready=`` then says when it is up.
    """
    started: list[ServedProcess] = []

    def start(
        *arguments: Any,
        command: list[str] | None = None,
        is_ready: Callable[[], bool] | None = None,
    ) -> ServedProcess:
        if command is None:
            command = [sys.executable, "-m", "nbdqcow", "serve"]
        server = ServedProcess(
            [*command, *map(str, arguments)], tmp_path_factory.mktemp("served")
        )
        started.append(server)
        server.wait_ready(is_ready)
        return server

    try:
        yield start
        for server in started:
            if server.process.returncode is None:
                server.stop()
    finally:
        for server in started:
            if server.process.poll() is None:
                server.kill()
            print(server.describe())

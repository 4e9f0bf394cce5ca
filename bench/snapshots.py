"""How long a client waits while an internal snapshot of its disk is made.

Ours beside QEMU's storage daemon: the same image, the same requests. The
snapshot of ours is made through the library, by a server of this module's:
``python -m bench.snapshots IMAGE SOCKET`` makes one for each line that it reads.
"""

import asyncio
import contextlib
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import uvloop

from bench import images
from bench.cells import KiB
from bench.peers import BenchError
from nbdqcow import open_image
from nbdqcow.server.server import Server
from tests.nbd_client import NbdClient

DAEMON: Final = "qemu-storage-daemon"
_LENGTH: Final = 4 * KiB
_START_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 120.0
_LEAD_SECONDS: Final = 0.5

TakeSnapshot = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Waits:
    """Of one snapshot, in seconds: its own time, the longest wait of a client
    while it was made, and the longest of the half second before."""

    snapshot: float
    longest: float
    before: float


class _Load:
    """4 KiB reads and writes in turns, one at a time, in a thread."""

    def __init__(self, address: Path, seed: int) -> None:
        self._address = address
        self._source = random.Random(seed)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._error: Exception | None = None
        self.requests: list[tuple[float, float]] = []
        """Of each request when it began and ended, by `time.perf_counter`."""

    def __enter__(self) -> "_Load":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._error is not None:
            raise BenchError(f"the client failed: {self._error}")

    def longest(self, start: float, end: float) -> float:
        """Return the longest wait of the requests in flight from start to end."""
        waits = [b - a for a, b in self.requests if b >= start and a <= end]
        return max(waits, default=0.0)

    def _run(self) -> None:
        try:
            with NbdClient(self._address, timeout=_STOP_SECONDS) as client:
                data = self._source.randbytes(_LENGTH)
                while not self._ended.is_set():
                    offset = self._source.randrange(client.size // _LENGTH) * _LENGTH
                    began = time.perf_counter()
                    if len(self.requests) % 2:
                        client.write(offset, data)
                    else:
                        client.read(offset, _LENGTH)
                    self.requests.append((began, time.perf_counter()))
        except Exception as error:
            self._error = error


def measure(name: str, source: Path, seed: int) -> Waits:
    """Let one server make a snapshot of a copy of ``source``, under load."""
    image = source.with_name("snapshot.qcow2")
    image.unlink(missing_ok=True)
    # Which keeps the holes.
    subprocess.run(["cp", "--sparse=auto", source, image], check=True)
    images.write_back(image)
    serve = _daemon if name == DAEMON else _ours
    try:
        with tempfile.TemporaryDirectory(prefix="nbdq-bench-") as directory:
            address = Path(directory) / "s"
            with serve(image, address) as take, _Load(address, seed) as load:
                time.sleep(_LEAD_SECONDS)
                start = time.perf_counter()
                take()
                end = time.perf_counter()
                # A request that was held up ends a little later.
                time.sleep(_LEAD_SECONDS)
        return Waits(
            end - start,
            load.longest(start, end),
            load.longest(start - _LEAD_SECONDS, start),
        )
    finally:
        image.unlink()


@contextlib.contextmanager
def _started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


@contextlib.contextmanager
def _ours(image: Path, address: Path) -> Iterator[TakeSnapshot]:
    command = [sys.executable, "-m", "bench.snapshots", str(image), str(address)]
    with _started(command) as process:

        def wait_for_line() -> None:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise BenchError("our server has ended")

        def take() -> None:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            wait_for_line()

        wait_for_line()
        yield take


@contextlib.contextmanager
def _daemon(image: Path, address: Path) -> Iterator[TakeSnapshot]:
    monitor = address.with_name("monitor")
    command = [
        DAEMON,
        *("--blockdev", f"driver=file,node-name=file,filename={image}"),
        *("--blockdev", "driver=qcow2,node-name=disk,file=file"),
        *("--nbd-server", f"addr.type=unix,addr.path={address}"),
        *("--export", "nbd,id=e,node-name=disk,name=,writable=on"),
        *("--chardev", f"socket,id=m,path={monitor},server=on,wait=off"),
        *("--monitor", "m"),
    ]
    with _started(command) as process, socket.socket(socket.AF_UNIX) as connection:
        deadline = time.monotonic() + _START_SECONDS
        while connection.connect_ex(str(monitor)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"{DAEMON} did not start")
            time.sleep(0.01)
        with connection.makefile("rw") as lines:
            # The greeting.
            lines.readline()

            def execute(command: str, **arguments: Any) -> None:
                words = {"execute": command, "arguments": arguments}
                lines.write(json.dumps(words) + "\n")
                lines.flush()
                answer = json.loads(lines.readline())
                if "error" in answer:
                    raise BenchError(f"{DAEMON}: {answer['error']['desc']}")

            execute("qmp_capabilities")
            yield lambda: execute(
                "blockdev-snapshot-internal-sync", device="disk", name="now"
            )


async def _serve(image: str, address: str) -> None:
    loop = asyncio.get_running_loop()
    snapshots: set[asyncio.Task[None]] = set()
    async with open_image(image, format="qcow2") as node:

        async def take() -> None:
            await node.driver.snapshot_create("now")
            print("taken", flush=True)

        def on_line() -> None:
            if not sys.stdin.readline():
                loop.remove_reader(sys.stdin)
                return
            task = loop.create_task(take())
            snapshots.add(task)
            task.add_done_callback(snapshots.discard)

        server = Server()
        server.add_export("", node)
        await server.listen_unix(address)
        loop.add_reader(sys.stdin, on_line)
        print("ready", flush=True)
        await server.run_until_stopped()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(*sys.argv[1:]))

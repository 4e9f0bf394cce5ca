"""SIGTERM and SIGKILL under load: what was flushed is there afterwards."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import find_tool, own_environment
from tests.differential.geometries import Geometry, content_by_qemu
from tests.differential.model import NEVER, DiskModel
from tests.differential.operations import Generator, Weights
from tests.differential.runner import NbdTarget, Runner
from tests.nbd_client import NbdClient
from tests.serving import check_image, need, run, server_command, serving

MiB = 1 << 20


def create(path: Path, size: int, options: str = "cluster_size=64k") -> Path:
    need("qemu-img")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(size))
    return path


FIO_VERIFY = (
    "--rw=randwrite",
    "--bsrange=4k-64k",
    "--verify=crc32c",
    "--verify_interval=4k",
    "--verify_fatal=1",
    "--verify_state_save=0",
    "--iodepth=16",
    "--numjobs=4",
    "--size=12M",
    "--offset_increment=12M",
    "--fsync=100",
    "--group_reporting",
)


def test_fio_verifies_checksums_over_four_connections(tmp_path: Path) -> None:
    need("fio")
    image = create(tmp_path / "a.qcow2", 48 * MiB)
    for verify in ("--do_verify=1", "--verify_only"):
        # The second time a new server must find what the first one wrote.
        with serving(image) as server:
            engine = ("--ioengine=nbd", f"--uri={server.uri}")
            run("fio", "--name=verify", *engine, *FIO_VERIFY, verify)
        check_image(image)


def test_sigterm_under_load_loses_no_answered_write(tmp_path: Path, seed: int) -> None:
    """Requests in flight are drained, the image is closed clean, exit is 0.

    Every write that was answered is there, flushed or not; one that got no
    answer is there or not, byte by byte.
    """
    source = random.Random(seed)
    geometry = Geometry("term", 8 * MiB + 512)
    image = create(tmp_path / "a.qcow2", geometry.size)
    model = DiskModel(content_by_qemu(image, geometry, tmp_path))
    for _ in range(3):
        with serving(image) as server, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(NbdClient(server.socket)) for _ in range(4)]
            target = NbdTarget(clients, source)
            weights = Weights(read=10, write=70, zero=8, trim=8, flush=4, cache=0)
            generator = Generator(source, model.size, 64 << 10, weights)
            runner = Runner(target, model, generator, source, depth=24, stops=True)
            timer = threading.Timer(
                source.uniform(0.1, 0.6),
                server.process.send_signal,
                [signal.SIGTERM],
            )
            timer.start()
            with pytest.raises(ConnectionError):
                runner.run(1_000_000)
            runner.collect_rest()
            timer.join()
            assert server.process.wait(30) == 0, server.errors()
            assert "Traceback" not in server.errors()
        check_image(image)
        content = content_by_qemu(image, geometry, tmp_path).tobytes()
        model.check_read(0, content, model.tick())
        model.settle([(0, content)])


def test_a_client_that_connects_again_sees_no_error_of_a_restart(
    tmp_path: Path,
) -> None:
    """Requests that a stopping server has not begun get no answer: with an error
    QEMU's client would not repeat them, and its guest would have an I/O error."""
    image = create(tmp_path / "a.qcow2", 256 * MiB)
    with tempfile.TemporaryDirectory(prefix="nbdq-") as directory:
        address = Path(directory) / "s"
        command = server_command(image, address, image_format="qcow2")
        options = f"driver=nbd,server.type=unix,server.path={address}"
        bench = ["qemu-img", "bench", "-w", "-c", "4096", "-d", "64", "-s", "64k"]
        bench += ["--flush-interval", "256"]
        bench += ["--image-opts", f"{options},reconnect-delay=100"]
        client = None
        for done in (16, 64, 128, 192, 256):
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, env=own_environment()
            ) as server:
                assert server.stdout is not None
                assert "ready" in server.stdout.readline()
                client = client or subprocess.Popen(
                    bench, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
                )
                while image.stat().st_size < done * MiB and client.poll() is None:
                    time.sleep(0.01)
                if done == 256:
                    assert client.communicate() == (None, "")
                server.send_signal(signal.SIGTERM)
                assert server.wait(60) == 0
        assert client is not None
        assert client.returncode == 0
    check_image(image)


def test_sigkill_keeps_what_another_connection_flushed(
    tmp_path: Path, seed: int
) -> None:
    """CAN_MULTI_CONN: a flush on B covers what was answered on A."""
    source = random.Random(seed)
    image = create(tmp_path / "a.qcow2", 64 * MiB)
    written: dict[int, bytes] = {}
    for _ in range(4):
        with (
            serving(image) as server,
            NbdClient(server.socket) as first,
            NbdClient(server.socket) as second,
        ):
            for _ in range(25):
                slot = source.randrange(400)
                written[slot] = source.randbytes(source.randint(1, 150_000))
                first.write(slot * 160_000, written[slot])
            second.flush()
            server.kill()
        check_image(image, leaks_allowed=True)
        with serving(image) as server, NbdClient(server.socket) as client:
            for slot, data in written.items():
                assert client.read(slot * 160_000, len(data)) == data, slot


def test_sigkill_keeps_what_was_written_with_fua(tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)
    geometry = Geometry("fua", 4 * MiB)
    image = create(tmp_path / "a.qcow2", geometry.size, "cluster_size=4k")
    with serving(image) as server, NbdClient(server.socket) as client:
        pieces = []
        for _ in range(40):
            offset, data = source.randrange(4 * MiB - 9000), source.randbytes(8999)
            client.write(offset, data, flags=1)
            pieces.append((offset, data))
        server.kill()
    check_image(image, leaks_allowed=True)
    content = content_by_qemu(image, geometry, tmp_path)
    model = DiskModel(content * 0)
    for offset, data in pieces:
        model.end(model.begin(offset, len(data), data))
    model.fold(NEVER)
    model.check_read(0, content.tobytes(), model.tick())


def test_sigint_and_a_second_sigterm_end_it_as_well(tmp_path: Path) -> None:
    image = create(tmp_path / "a.qcow2", MiB)
    for signals in ([signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]):
        with serving(image) as server, NbdClient(server.socket) as client:
            client.write(0, b"kept")
            for number in signals:
                server.process.send_signal(number)
            server.process.wait(30)
            assert "Traceback" not in server.errors()
        check_image(image)
        with serving(image) as server, NbdClient(server.socket) as client:
            assert client.read(0, 4) == b"kept"


def test_no_number_of_interrupts_leaves_a_traceback(tmp_path: Path) -> None:
    image = create(tmp_path / "a.qcow2", MiB)
    for _ in range(3):
        with serving(image) as server:
            with NbdClient(server.socket) as client:
                client.write(0, bytes(MiB))
            while server.process.poll() is None:
                server.process.send_signal(signal.SIGINT)
                # As fast as a key repeats, not as fast as a program can.
                time.sleep(0.02)
            assert server.errors() == ""
            assert server.process.returncode == 0
        check_image(image)


AFTER_THE_LAST_CLIENT = """
import asyncio, os, signal
from nbdqcow.server.options import ServerOptions
from nbdqcow.server.server import Server

async def serve():
    server = Server(ServerOptions())
    server.stop()
    await server.run_until_stopped(last=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("closed")

asyncio.run(serve())
"""


def test_sigterm_does_not_cut_the_closing_short():
    """libnbd sends it to the server it has started, as soon as it has left."""
    command = [sys.executable, "-c", AFTER_THE_LAST_CLIENT]
    found = subprocess.run(command, capture_output=True, check=False)
    assert (found.returncode, found.stdout) == (0, b"closed\n")


def test_sigterm_ends_the_first_process_of_a_container_at_any_time(
    tmp_path: Path,
) -> None:
    """Also while it still opens its images: here one whose server says nothing. The
    kernel drops signals that the first process has no handler for."""
    command = [find_tool("unshare"), "--fork", "--pid", "--kill-child"]
    if os.getuid():
        command += ["--user", "--map-root-user"]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        image = f"nbd://127.0.0.1:{silent.getsockname()[1]}"
        serve = [sys.executable, "-m", "nbdqcow", "serve", image, "--format", "raw"]
        with subprocess.Popen(
            [*command, *serve, "--listen", "127.0.0.1:0"], env=own_environment()
        ) as process:
            try:
                silent.settimeout(60)
                with silent.accept()[0]:
                    task = Path(f"/proc/{process.pid}/task/{process.pid}")
                    (child,) = (task / "children").read_text().split()
                    os.kill(int(child), signal.SIGTERM)
                    assert process.wait(20) == 128 + signal.SIGTERM
            finally:
                process.kill()

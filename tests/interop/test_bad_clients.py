"""Clients that misbehave, and what the server has left for the others."""

import contextlib
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import find_tool, own_environment
from tests.nbd_client import NbdClient

KiB, MiB = 1 << 10, 1 << 20
GREETING_LENGTH = 18
# EXPORT_NAME of the default export, from a client that wants no zeroes.
CHOOSE = b"\0\0\0\3IHAVEOPT\0\0\0\1\0\0\0\0"
CHOSEN_LENGTH = 10


def request(command, offset=0, length=0):
    return b"\x25\x60\x95\x13\0\0" + command.to_bytes(2, "big") + b"cookie!!" + (
        offset.to_bytes(8, "big") + length.to_bytes(4, "big")
    )  # fmt: skip


def status(server, name):
    """Return a field of the server's status, such as VmRSS, in bytes."""
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * KiB


def nb_descriptors(server):
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def connect(path, *, choose=True):
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(30)
    client.connect(str(path))
    assert len(client.recv(GREETING_LENGTH, socket.MSG_WAITALL)) == GREETING_LENGTH
    if choose:
        client.sendall(CHOOSE)
        assert len(client.recv(CHOSEN_LENGTH, socket.MSG_WAITALL)) == CHOSEN_LENGTH
    return client


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def many_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"no more than {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_thousand_idle_clients(served, images, short_path, many_files):
    path = short_path / "s"
    server = served(images["qcow2"], "--unix", path, "--max-connections", "1001")
    before = status(server, "VmRSS")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(path)) for _ in range(1000)]
        # What a client that did something leaves behind must go, too.
        batch = b"".join(request(1, i * 4096, 4096) + bytes(4096) for i in range(50))
        for client in clients:
            client.sendall(batch)
        for client in clients:
            assert len(client.recv(50 * 16, socket.MSG_WAITALL)) == 50 * 16
        wait_until(lambda: status(server, "VmRSS") < 100 * MiB)
        print(f"{before >> 10} KiB, with 1000 idle {status(server, 'VmRSS') >> 10} KiB")
        with NbdClient(path) as other:
            assert other.read(0, 4096) == bytes(4096)
        # One more finds the door closed, and is told so.
        with connect(path) as one, connect(path, choose=False) as two:
            one.sendall(request(2))
            two.sendall(b"\0\0\0\3IHAVEOPT\0\0\0\3\0\0\0\0")
            assert b"1001 clients already" in two.recv(4096)


def test_thousand_come_and_go(served, images, short_path):
    path = short_path / "s"
    server = served(images["qcow2"], "--unix", path)

    def come_and_go(nb):
        for i in range(nb):
            with connect(path, choose=bool(i % 3)) as client:
                if i % 3 == 2:
                    client.sendall(request(0, 0, 4096))
                    client.recv(16 + 4096, socket.MSG_WAITALL)

    come_and_go(100)
    # The first client's end may still be on its way.
    time.sleep(0.5)
    fds, memory = nb_descriptors(server), status(server, "VmRSS")
    come_and_go(1000)
    wait_until(lambda: nb_descriptors(server) <= fds)
    assert status(server, "VmRSS") < memory + 4 * MiB


def test_client_that_never_reads(served, images, short_path):
    path = short_path / "s"
    server = served(images["qcow2"], "--unix", path, "--reply-timeout", "1")
    with connect(path) as stuck, NbdClient(path) as other:
        before = status(server, "VmRSS")
        stuck.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                stuck.send(request(0, 0, 3 * MiB))
        wait_until(
            lambda: (
                other.read(0, 512)
                and "took no replies for 1 seconds" in server.stderr.read_text()
            )
        )
        assert status(server, "VmRSS") < before + 100 * MiB


def test_client_that_drips(served, images, short_path):
    path = short_path / "s"
    server = served(images["qcow2"], "--unix", path, "--handshake-timeout", "1")
    with (
        connect(path, choose=False) as slow,
        NbdClient(path) as other,
        pytest.raises(BrokenPipeError),
    ):
        for byte in b"\0\0\0\3IHAVEOPT\0\0\0\3\0\0\0\0" * 100:
            slow.send(bytes([byte]))
            assert other.read(0, 512)
            time.sleep(0.2)
    assert "no handshake in time" in server.stderr.read_text()


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_clients_killed_in_the_middle(served, images, short_path, image_format, seed):
    path = short_path / "s"
    server = served(images[image_format], "-f", image_format, "--unix", path)
    rng = random.Random(seed)
    writer = (
        "import os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        "s.recv(18, socket.MSG_WAITALL)\n"
        f"s.sendall({CHOOSE!r}); s.recv({CHOSEN_LENGTH}, socket.MSG_WAITALL)\n"
        "print(flush=True)\n"
        "while True:\n"
        f"    s.sendall({request(1, MiB, MiB)!r} + os.urandom({MiB})\n"
        f"              + {request(0, 0, 3 * MiB)!r})\n"
        "    s.recv(100000)\n"
    )
    with NbdClient(path) as other:
        content = other.read(0, 512)
        for _ in range(8):
            process = subprocess.Popen(
                [sys.executable, "-c", writer, str(path)], stdout=subprocess.PIPE
            )
            process.stdout.readline()
            time.sleep(rng.random() / 10)
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
            assert other.read(0, 512) == content
        other.write(0, b"alive" * 100)
        other.flush()
    wait_until(lambda: nb_descriptors(server) < 40)
    server.stop()
    if image_format == "qcow2":
        done = subprocess.run(
            [find_tool("qemu-img"), "check", images["qcow2"]],
            capture_output=True, text=True, timeout=60,
            env=own_environment(),
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

"""The ways to reach ``nbdqcow serve``, each taken by clients of others."""

import os
import pwd
import re
import socket
import stat
import subprocess
import sys

import pytest

from tests.conftest import find_tool, own_environment, wait_until_listening
from tests.interop.commands import info, listeners, run

MiB = 1 << 20
GREETING = b"NBDMAGICIHAVEOPT"
SERVE = [sys.executable, "-m", "nbdqcow", "serve"]


def greeting(address, family=socket.AF_UNIX):
    with socket.socket(family) as sock:
        sock.settimeout(20)
        sock.connect(address)
        return sock.recv(16, socket.MSG_WAITALL)


def test_everywhere_at_once(served, images, short_path):
    server = served(
        images["qcow2"], "--format", "qcow2",
        "--listen", "127.0.0.1:0", "--listen", "[::1]:0",
        "--unix", short_path / "a", "--unix", short_path / "b",
        "--unix", f"@nbdqcow-test-{os.getpid()}",
    )  # fmt: skip
    v4, v6, first, second, abstract = listeners(server)
    assert v4.startswith("127.0.0.1:")
    assert v6.startswith("[::1]:")
    for uri in (
        f"nbd://{v4}",
        f"nbd://{v6}",
        f"nbd+unix:///?socket={first}",
        f"nbd+unix:///?socket={second}",
    ):
        assert info(uri)["export-size"] == 3 * MiB + 512
    assert abstract == f"@nbdqcow-test-{os.getpid()}"
    assert greeting("\0" + abstract[1:]) == GREETING
    server.stop()
    assert list(short_path.iterdir()) == []


def test_mode_and_owner(served, images, short_path):
    if os.geteuid() != 0:
        pytest.skip("only root may give files away")
    nobody = pwd.getpwnam("nobody")
    path = short_path / "s"
    served(
        images["qcow2"], "--unix", path, "--unix-mode", "620",
        "--unix-owner", f"nobody:{nobody.pw_gid}",
    )  # fmt: skip
    status = path.stat()
    assert stat.S_IMODE(status.st_mode) == 0o620
    assert (status.st_uid, status.st_gid) == (nobody.pw_uid, nobody.pw_gid)


def test_inherited_listener(images):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = subprocess.Popen(
            [*SERVE, images["qcow2"], "--fd", str(listener.fileno())],
            pass_fds=[listener.fileno()],
            stdout=subprocess.PIPE,
            env=own_environment(),
            text=True,
        )
        fd, port = listener.fileno(), listener.getsockname()[1]
    # The listener is ours to connect to before the server is up.
    assert info(f"nbd://127.0.0.1:{port}")["export-size"] == 3 * MiB + 512
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert f"ready on fd {fd}, 127.0.0.1:{port}\n" in out


def test_inherited_connection(images):
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [*SERVE, images["qcow2"], "--fd", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdout=subprocess.PIPE,
            env=own_environment(),
        )
    ours.settimeout(20)
    assert ours.recv(16, socket.MSG_WAITALL) == GREETING
    ours.close()
    # Its only client has left.
    assert process.communicate(timeout=30)[0] == b""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("fd", "reason"),
    [("99", "Bad file descriptor"), ("0", "Socket operation on non-socket")],
)
def test_no_socket_is_inherited(images, fd, reason):
    done = subprocess.run(
        [*SERVE, images["qcow2"], "--fd", fd],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        env=own_environment(),
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == (
        f"nbdqcow: Descriptor {fd} is no stream socket that listens or is "
        f"connected: {reason}\n"
    )


def test_libnbd_activates_us(images, tmp_path):
    command = [*SERVE, str(images["qcow2"])]
    copy = tmp_path / "copy"
    done = subprocess.run(
        [find_tool("nbdcopy"), "--", "[", *command, "]", str(copy)],
        capture_output=True, text=True, timeout=60, env=own_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert copy.read_bytes() == images["raw"].read_bytes()


def test_stdio_socket(images):
    find_tool("nbdsh")
    command = [*SERVE, str(images["qcow2"]), "--stdio", "--verbose"]
    script = f"h.connect_command({command})\nprint(h.get_size(), h.pread(99, 512))"
    done = subprocess.run(
        # nbdsh, as the system's Python has it whatever comes first in PATH.
        ["/usr/bin/python3", "-c", f"import nbd\nh = nbd.NBD()\n{script}"],
        capture_output=True, text=True, timeout=60, env=own_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = bytearray(images["raw"].read_bytes()[512 : 512 + 99])
    assert done.stdout == f"{3 * MiB + 512} {data}\n"
    # libnbd has had extended headers since 1.18.
    assert re.sub("(?m)^.* unix socket | (extended|structured)", "", done.stderr) == (
        "uses the export '': replies, no TLS\nhas left the export ''\n"
    )


def test_stdio_pipes(images):
    def option(number, data):
        return (
            b"IHAVEOPT" + number.to_bytes(4, "big") + len(data).to_bytes(4, "big")
        ) + data

    def request(command, offset, length):
        return (b"\x25\x60\x95\x13\0\0" + command.to_bytes(2, "big") + b"cookie!!") + (
            offset.to_bytes(8, "big") + length.to_bytes(4, "big")
        )

    done = subprocess.run(
        [*SERVE, images["raw"], "--format=raw", "--stdio"],
        input=b"\0\0\0\3" + option(1, b"")
        + request(0, 512, 3 * MiB) + request(2, 0, 0),
        capture_output=True, timeout=60, env=own_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(GREETING)
    data = images["raw"].read_bytes()[512:]
    # Greeting, size and flags of the export, header of the reply.
    assert done.stdout[18 + 10 + 16 :] == data
    assert done.stderr == b""


def test_stdio_closed_at_once(images):
    done = subprocess.run(
        [*SERVE, images["qcow2"], "--stdio"],
        stdin=subprocess.DEVNULL, capture_output=True, timeout=60,
        env=own_environment(),
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout == GREETING + b"\0\3"


@pytest.mark.parametrize("command", ["serve", "nbd"])
def test_socket_activation(images, short_path, command):
    activate = find_tool("systemd-socket-activate")
    arguments = [*SERVE[:3], command, str(images["qcow2"])]
    places = [f"--listen={short_path}/a"]
    if command == "serve":
        # And one of its own besides.
        places.append(f"--listen={short_path}/b")
        arguments += ["--unix", str(short_path / "c")]
    process = subprocess.Popen(
        [activate, *places, "--fdname=one:two"[: len(places) * 4 + 8], *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=own_environment(),
    )  # fmt: skip
    try:
        names = ["a", "b", "c"] if command == "serve" else ["a"]
        wait_until_listening(short_path / "a", process)
        for name in names:
            uri = f"nbd+unix:///?socket={short_path}/{name}"
            assert info(uri)["export-size"] == 3 * MiB + 512
        if command == "serve":
            process.terminate()
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, err
    if command == "serve":
        assert f"ready on fd 3 (one), {short_path}/a\n" in out
        assert f"ready on fd 4 (two), {short_path}/b\n" in out
        # What systemd made stays, what we made goes.
        assert sorted(path.name for path in short_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("option", "what"),
    [
        ("--socket=/tmp/none", "Unix socket"),
        ("--bind=::1", "The interface"),
        ("--port=99", "TCP port number"),
    ],
)
def test_activation_has_no_other_place(images, option, what):
    program = (
        "import os, sys; os.environ |= {'LISTEN_FDS': '1', 'LISTEN_PID': "
        "str(os.getpid())}; os.execv(sys.argv[1], sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *SERVE[:3], "nbd", option, images["qcow2"]],
        capture_output=True, text=True, timeout=60, env=own_environment(),
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == (
        f"nbdqcow-nbd: {what} can't be set when using socket activation\n"
    )


@pytest.mark.parametrize("abstract", [False, True])
def test_service_manager_is_told(served, images, short_path, monkeypatch, abstract):
    name = f"\0nbdqcow-notify-{os.getpid()}" if abstract else str(short_path / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name)
        manager.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", name.replace("\0", "@"))
        server = served(images["qcow2"], "--unix", short_path / "s")
        assert manager.recv(4096) == f"READY=1\nSTATUS=Ready on {short_path}/s".encode()
        server.stop()
        assert manager.recv(4096) == b"STOPPING=1"


def has_vsock_loopback():
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((1, 0xFFFFFFFF))
        except OSError:
            return False
    return True


def test_vsock(served, images):
    if not has_vsock_loopback():
        _, err = run(*SERVE, images["qcow2"], "--vsock", "1:99", status=1)
        reason = "Cannot assign requested address"
        assert err == (
            f"nbdqcow: Failed to listen on vsock port 99 of CID 1: {reason}\n"
        )
        return
    server = served(images["qcow2"], "--vsock", "1:4294967295")
    (place,) = listeners(server)
    cid, port = place.removeprefix("vsock ").split(":")
    assert info(f"nbd+vsock://{cid}:{port}/")["export-size"] == 3 * MiB + 512


def test_bad_combinations(images):
    for arguments, message in (
        (["--stdio", "--unix", "/s"], "--stdio serves one client"),
        (["--unix-mode", "600"], "need --unix=PATH"),
        (["--unix", "@x", "--unix-owner", "root"], "need --unix=PATH"),
        (["--unix-mode", "8", "--unix", "/s"], "octal number"),
        (["--unix-owner", "no-such-user", "--unix", "/s"], "there is no user"),
        (["--vsock", "x"], "[CID:]PORT"),
        (["--max-option-length", "1K"], "at least 8K"),
    ):
        _, err = run(*SERVE, images["qcow2"], *arguments, status=2)
        assert message in err
        assert "Traceback" not in err

"""`convert` from standard input and to standard output, and `map` at a terminal."""

import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.conftest import SEED, own_environment
from tests.interop.img_programs import run_ours

MiB = 1 << 20
COMMAND = [sys.executable, "-m", "nbdqcow.cli.img", "convert"]
CONTENT = random.Random(SEED).randbytes(MiB) + bytes(2 * MiB) + b"x" * 512


def convert(
    directory: Path, *arguments: str, given: bytes = b""
) -> "subprocess.CompletedProcess[bytes]":
    """Run the command between two pipes."""
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=directory,
        env=own_environment(),
        input=given,
        capture_output=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed (tools/setup-system.sh test)")
    (tmp_path / "disk.raw").write_bytes(CONTENT)
    subprocess.run(
        ["qemu-img", "convert", "-O", "qcow2", "disk.raw", "disk.qcow2"],
        cwd=tmp_path, check=True, timeout=60,
    )  # fmt: skip
    return tmp_path


def test_from_pipe_to_pipe(directory):
    image = (directory / "disk.qcow2").read_bytes()
    for arguments, given in (
        (("-f", "raw", "-", "-"), CONTENT),
        (("-", "-"), image),
        (("disk.qcow2", "-"), b""),
    ):
        done = convert(directory, *arguments, given=given)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout == CONTENT


def test_between_files(directory):
    with (
        (directory / "disk.qcow2").open("rb") as source,
        (directory / "out").open("wb") as target,
    ):
        subprocess.run(
            [*COMMAND, "-", "-"],
            cwd=directory, env=own_environment(), stdin=source, stdout=target,
            check=True, timeout=60,
        )  # fmt: skip
    assert (directory / "out").read_bytes() == CONTENT


def test_a_pipe_into_an_image(directory):
    before = sorted(os.listdir(directory))
    arguments = ("-f", "raw", "-O", "qcow2", "-", "out.qcow2")
    assert convert(directory, *arguments, given=CONTENT).returncode == 0
    assert sorted(os.listdir(directory)) == sorted([*before, "out.qcow2"])
    subprocess.run(
        ["qemu-img", "compare", "disk.raw", "out.qcow2"],
        cwd=directory, check=True, timeout=60, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def test_several_disks_in_whole_sectors(directory):
    done = convert(directory, "-f", "raw", "-", "disk.raw", "-", given=b"abc")
    assert done.stdout == b"abc".ljust(512, b"\0") + CONTENT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-O qcow2 disk.raw -", "Only a raw image can be written to standard output"),
        ("-p disk.raw -", "-p can't be used with standard output"),
        ("-n disk.raw -", "-n can't be used with standard output"),
        ("- - out", "Standard input can be only one of the images"),
        ("-f qcow2 - out", "Could not open '-': Image is not in qcow2 format"),
    ],
)
def test_what_is_refused(directory, arguments, message):
    before = sorted(os.listdir(directory))
    done = convert(directory, *arguments.split(), given=b"no image")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode().rstrip("\n").endswith(message)
    assert sorted(os.listdir(directory)) == before


def test_a_file_of_that_name(directory):
    """Called `qemu-img` it has no streams, and ``./-`` is always a file."""
    assert run_ours("convert disk.qcow2 -", directory) == (0, b"", b"")
    assert (directory / "-").read_bytes() == CONTENT
    assert convert(directory, "-f", "raw", "./-", "./out").returncode == 0
    assert (directory / "out").read_bytes() == CONTENT


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("arguments", [("-f", "raw", "-", "out"), ("disk.raw", "-")])
def test_waiting_for_a_pipe_can_be_interrupted(directory, arguments, number):
    """Nobody writes to the one pipe, nor reads from the other one."""
    before = sorted(os.listdir(directory))
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=directory, env=own_environment(),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with process:
        # It is at work once it has taken more than fits into the pipe, or has
        # put something into it.
        if "-f" in arguments:
            process.stdin.write(CONTENT)
            process.stdin.flush()
        else:
            assert process.stdout.read(1) == CONTENT[:1]
        process.send_signal(number)
        assert process.wait(60) == -number
    assert sorted(os.listdir(directory)) == before


def test_map_draws_a_bar_at_a_terminal_only(directory):
    command = [sys.executable, "-m", "nbdqcow.cli.img", "map", "disk.qcow2"]
    piped = subprocess.run(
        command, cwd=directory, env=own_environment(), capture_output=True, timeout=60,
        check=True,
    ).stdout  # fmt: skip
    assert piped == run_ours("map disk.qcow2", directory)[1]
    ours, theirs = pty.openpty()
    # As lines would come from a pipe.
    attributes = termios.tcgetattr(theirs)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)
    environment = own_environment() | {"COLUMNS": "32"}
    subprocess.run(
        command, cwd=directory, env=environment, stdout=theirs, timeout=60, check=True
    )
    shown = os.read(ours, 1 << 16)
    os.close(ours)
    os.close(theirs)
    assert shown.startswith(piped)
    bar, legend = shown.removeprefix(piped).decode().splitlines()
    assert bar == "[" + 10 * "#" + 19 * "." + "#]"
    assert legend.startswith("# data ")

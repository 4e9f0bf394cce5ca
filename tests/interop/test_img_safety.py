"""What the image tool leaves behind when it fails, and whom it keeps out."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.block.qemu import qemu_img
from tests.conftest import own_environment
from tests.interop.img_programs import IN_A_PROCESS, run_ours

MiB = 1 << 20


def start(directory: Path, *arguments: str, **options) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [*IN_A_PROCESS, *arguments], cwd=directory, env=own_environment(), **options
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "source").write_bytes(os.urandom(4 * MiB))
    (tmp_path / "old").write_text("what was there before")
    return tmp_path


def interrupt_once_begun(process, number, directory, before):
    """Send a signal as soon as the directory has more than ``before``."""
    deadline = time.monotonic() + 60
    while sorted(os.listdir(directory)) == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("target", ["old", "new"])
def test_an_interrupted_convert_leaves_what_was_there(directory, number, target):
    before = sorted(os.listdir(directory))
    # At this rate it would take an hour.
    process = start(directory, "convert", "-O", "qcow2", "-r", "1k", "source", target)
    interrupt_once_begun(process, number, directory, before)
    # As a program ends that has no handler: scripts and their shells see that.
    assert process.wait(60) == -number
    assert sorted(os.listdir(directory)) == before
    assert (directory / "old").read_text() == "what was there before"


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
)
@pytest.mark.parametrize(
    "line",
    [
        "create -q -f raw -o preallocation=full new 4G",
        "create -q -f qcow2 -o preallocation=full new 4G",
        "create -q -f qcow2 -o preallocation=full,data_file=data new 4G",
        "dd bs=1M if=long of=new",
    ],
)
def test_an_interrupted_command_leaves_no_part(directory, number, line):
    """`create` writes in place, and `dd` has no progress to tell of at SIGUSR1."""
    # Nobody is through with it before the signal comes.
    with (directory / "long").open("wb") as file:
        file.truncate(1 << 40)
    before = sorted(os.listdir(directory))
    process = start(directory, *line.split())
    interrupt_once_begun(process, number, directory, before)
    assert process.wait(60) == -number
    assert sorted(os.listdir(directory)) == before


def test_a_failing_dd_says_so_in_qemus_words(directory):
    limits = (MiB, MiB)
    answers = []
    for command in (["qemu-img"], IN_A_PROCESS):
        done = subprocess.run(
            [*command, "dd", "-Oqcow2", "bs=1M", "if=source", "of=new"],
            cwd=directory, env=own_environment(), capture_output=True, timeout=60,
            check=False, restore_signals=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
        )  # fmt: skip
        answers.append((done.returncode, done.stderr))
        (directory / "new").unlink(missing_ok=True)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", ["\u3042" * 85, "a" * 255])
def test_a_name_as_long_as_names_can_be(directory, name):
    for line in (f"convert -O qcow2 source {name}", f"dd if=source of={name}"):
        for _ in range(2):
            assert run_ours(line, directory) == (0, b"", b"")
    qemu_img("compare", "-f", "raw", directory / "source", directory / name)


@pytest.mark.parametrize("target", ["old", "new"])
def test_a_failing_convert_leaves_what_was_there(directory, target):
    before = sorted(os.listdir(directory))
    limits = (MiB, MiB)
    process = start(
        directory, "convert", "-O", "qcow2", "source", target,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
    )  # fmt: skip
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith(b"qemu-img: error while writing at byte ")
    assert err.endswith(b": File too large\n")
    line = f"convert -O qcow2 -o cluster_size=3 source {target}"
    assert run_ours(line, directory)[0] == 1
    assert sorted(os.listdir(directory)) == before
    assert (directory / "old").read_text() == "what was there before"


def test_the_new_image_is_like_the_old_file(directory):
    old = directory / "old"
    old.chmod(0o640)
    (directory / "link").symlink_to("old")
    assert run_ours("convert -O qcow2 source link", directory) == (0, b"", b"")
    assert (directory / "link").is_symlink()
    assert old.stat().st_mode & 0o777 == 0o640
    qemu_img("compare", directory / "source", old)
    assert run_ours("convert -O qcow2 source new", directory) == (0, b"", b"")
    mask = os.umask(0)
    os.umask(mask)
    assert (directory / "new").stat().st_mode & 0o777 == 0o644 & ~mask


def test_all_names_of_a_file_see_the_new_image(directory):
    (directory / "other").hardlink_to(directory / "old")
    assert run_ours("convert -O qcow2 source old", directory) == (0, b"", b"")
    qemu_img("compare", directory / "source", directory / "other")


def test_an_image_in_use_is_not_overwritten(directory):
    qemu_img("create", "-q", "-f", "qcow2", directory / "used", "4M")
    before = (directory / "used").read_bytes()
    holder = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", "used"],
        cwd=directory,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write(b"length\n")
        holder.stdin.flush()
        assert holder.stdout.read(1)
        for line in ("convert source used", "dd if=source of=used"):
            status, _, err = run_ours(line, directory)
            assert status == 1
            assert b"lock" in err
        assert (directory / "used").read_bytes() == before
    finally:
        holder.communicate()


def test_progress_on_a_signal(directory):
    process = start(
        directory, "convert", "-r", "1k", "source", "new", stderr=subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        deadline = time.monotonic() + 60
        while len(os.listdir(directory)) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        line = process.stderr.readline()
        assert line.startswith(b"    (")
        assert line.endswith(b"/100%)\n")
    finally:
        process.terminate()
        process.communicate()


def test_a_small_command_loads_no_event_loop(directory):
    qemu_img("create", "-q", "-f", "qcow2", directory / "image", "4M")
    program = (
        "import sys; sys.argv = ['qemu-img', *sys.argv[1:]]; "
        "from nbdqcow.cli.img import main; status = main(); "
        "print(sorted({'asyncio', 'uvloop'} & set(sys.modules)), status)"
    )
    for line in (
        "create -q -f qcow2 new 1G",
        "info image",
        "check image",
        "snapshot -l image",
        "measure --size 1G -O qcow2",
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *line.split()],
            cwd=directory,
            env=own_environment(),
            capture_output=True,
            check=True,
            timeout=60,
        )
        assert done.stdout.splitlines()[-1] == b"[] 0", line


def test_an_image_that_has_no_room_is_removed(tmp_path: Path) -> None:
    """A full disk, as far as the program can tell: files have a limit."""
    process = start(
        tmp_path,
        *("create", "-q", "-f", "qcow2", "-o", "preallocation=full", "new", "1M"),
        stderr=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (MiB, MiB)),
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors == (
        b"qemu-img: new: The image size is too large for file format 'qcow2'\n"
    )
    assert os.listdir(tmp_path) == []

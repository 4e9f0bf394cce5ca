"""Image locks: QEMU and our server keep each other out, on the same bytes."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import own_environment
from tests.nbd_client import NbdClient
from tests.serving import (
    REFERENCE,
    need,
    run,
    server_command,
    serving,
)

ours_only = pytest.mark.skipif(REFERENCE, reason="about our own messages")


@pytest.fixture(params=["qcow2", "raw"])
def image_format(request: pytest.FixtureRequest) -> str:
    if REFERENCE and request.param == "raw":
        pytest.skip("qemu-nbd lets others write a raw image that it serves")
    return str(request.param)


@pytest.fixture
def image(tmp_path: Path, image_format: str) -> Path:
    need("qemu-img", "qemu-io")
    path = tmp_path / f"locked.{image_format}"
    run("qemu-img", "create", "-q", "-f", image_format, path, "16M")
    return path


@contextlib.contextmanager
def held_by_qemu_io(
    image: Path, image_format: str, *, read_only: bool = False
) -> Iterator[int]:
    """Keep the image open in a qemu-io while the block runs; gives its pid."""
    command = ["qemu-io", "-f", image_format, str(image)]
    process = subprocess.Popen(
        [*command[:1], *(["-r"] if read_only else []), *command[1:]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        # Once it answers, the image is open.
        process.stdin.write("length\n")
        process.stdin.flush()
        assert "16 MiB" in process.stdout.readline()
        yield process.pid
    finally:
        process.communicate("quit\n", timeout=30)


def refusal(
    image: Path, image_format: str, socket: Path, *, read_only: bool = False
) -> str:
    """Serve an image that is in use: exit 1, and the one line it said."""
    command = server_command(
        image, socket, image_format=image_format, read_only=read_only
    )
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=own_environment()
    )
    assert done.returncode == 1, done
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert str(image) in lines[0]
    return lines[0]


def test_qemu_img_is_kept_out_while_we_serve(image: Path, image_format: str) -> None:
    with serving(image, image_format=image_format) as server:
        if image_format != "raw":  # of a raw image info reads nothing
            done = run("qemu-img", "info", "-f", image_format, image, check=False)
            assert done.returncode == 1
            assert 'Failed to get shared "write" lock' in done.stderr
            assert "Is another process using the image" in done.stderr
        run("qemu-img", "info", "-U", "-f", image_format, image)
        done = run("qemu-io", "-f", image_format, "-c", "length", image, check=False)
        assert "lock" in done.stderr
        with NbdClient(server.socket) as client:
            client.write(0, b"served all the same")
    run("qemu-img", "info", "-f", image_format, image)


def test_readers_share_an_image(image: Path, image_format: str) -> None:
    with serving(image, image_format=image_format, read_only=True):
        run("qemu-img", "info", "-f", image_format, image)
        run("qemu-io", "-r", "-f", image_format, "-c", "read 0 64k", image)
        with serving(image, image_format=image_format, read_only=True):
            pass
        done = run(
            "qemu-io", "-f", image_format, "-c", "write 0 64k", image, check=False
        )
        assert "lock" in done.stderr


def test_killed_server_leaves_no_lock(image: Path, image_format: str) -> None:
    with serving(image, image_format=image_format) as server:
        server.kill()
    run("qemu-io", "-f", image_format, "-c", "write 0 64k", image)


@ours_only
@pytest.mark.parametrize("read_only", [False, True])
def test_an_image_that_qemu_writes_is_refused_and_the_holder_named(
    image: Path, image_format: str, read_only: bool, tmp_path: Path
) -> None:
    with held_by_qemu_io(image, image_format) as pid:
        line = refusal(image, image_format, tmp_path / "s", read_only=read_only)
    assert str(pid) in line.replace(str(image), "")
    with serving(image, image_format=image_format, read_only=read_only):
        pass


@ours_only
def test_an_image_that_qemu_reads_is_not_served_for_writing(
    image: Path, image_format: str, tmp_path: Path
) -> None:
    if image_format == "raw":
        # A reader of a raw image lets others write it, in QEMU.
        with (
            held_by_qemu_io(image, image_format, read_only=True),
            serving(image, image_format=image_format),
        ):
            return
    with held_by_qemu_io(image, image_format, read_only=True) as pid:
        line = refusal(image, image_format, tmp_path / "s")
        with serving(image, image_format=image_format, read_only=True):
            pass
    assert str(pid) in line.replace(str(image), "")


@ours_only
def test_two_of_our_servers_keep_each_other_out(
    image: Path, image_format: str, tmp_path: Path
) -> None:
    with serving(image, image_format=image_format) as server:
        line = refusal(image, image_format, tmp_path / "s")
        assert str(server.process.pid) in line.replace(str(image), "")
        refusal(image, image_format, tmp_path / "s", read_only=True)


def test_backing_files_are_locked_against_writers_only(tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    base = tmp_path / "base.qcow2"
    overlays = [tmp_path / f"overlay{index}.qcow2" for index in range(2)]
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "16M")
    for overlay in overlays:
        run(
            *("qemu-img", "create", "-q", "-f", "qcow2"),
            *("-b", base.name, "-F", "qcow2", overlay),
        )
    with serving(overlays[0]), serving(overlays[1]):
        run("qemu-img", "info", "-f", "qcow2", base)
        done = run("qemu-io", "-f", "qcow2", "-c", "write 0 64k", base, check=False)
        assert "lock" in done.stderr

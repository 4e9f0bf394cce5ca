"""Standard input, output and error that are closed, or can't be written to."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import own_environment
from tests.nbd_client import NbdClient
from tests.serving import nbdqcow_img, serving

MiB = 1 << 20
CLOSED = {"<&-", ">&-", "2>&-", "<&- >&- 2>&-"}
PROGRAMS = {
    "nbdqcow": "from nbdqcow.cli.main import main",
    "nbdqcow-img": "from nbdqcow.cli.img import script as main",
    "nbdqcow-nbd": "from nbdqcow.cli.nbd import main",
}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.qcow2"
    nbdqcow_img("create", "-q", "-f", "qcow2", path, str(MiB))
    return path


def start(program: str, *words: str | Path, streams: str) -> subprocess.Popen[str]:
    """Start one of our programs from a shell, with redirections."""
    code = f"import sys; sys.argv[0] = '{program}'; {PROGRAMS[program]}; "
    shell = ["sh", "-c", f'exec "$@" {streams}', "sh"]
    command = [sys.executable, "-c", code + "sys.exit(main())", *map(str, words)]
    environment = own_environment()
    # Mostly it is not set, and what is printed waits for the end.
    environment.pop("PYTHONUNBUFFERED", None)
    return subprocess.Popen(
        shell + command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("streams", sorted(CLOSED))
def test_a_server_with_closed_streams(image: Path, tmp_path: Path, streams: str):
    """Its sockets and its image have other numbers."""
    socket, pid_file = tmp_path / "s", tmp_path / "pid"
    words = "-f", "qcow2", "-k", socket, "--pid-file", pid_file, image
    process = start("nbdqcow-nbd", "--fork", *words, streams=streams)
    assert finish(process) == (0, "", "")
    process_id = pid_file.read_text().strip()
    with NbdClient(socket) as client:
        client.write(0, b"x" * 4096)
        assert client.read(0, 4096) == b"x" * 4096
    # It ends with its only client.
    while Path("/proc", process_id).exists():
        time.sleep(0.01)
    with serving(image) as server, NbdClient(server.socket) as client:
        assert client.read(0, 4096) == b"x" * 4096


@pytest.mark.parametrize("streams", sorted(CLOSED))
def test_a_copy_with_closed_streams(image: Path, tmp_path: Path, streams: str):
    words = "convert", "-O", "raw", image, tmp_path / "a.raw"
    assert finish(start("nbdqcow-img", *words, streams=streams)) == (0, "", "")
    assert (tmp_path / "a.raw").read_bytes() == bytes(MiB)


@pytest.mark.parametrize("stream", ["<&-", ">&-"])
def test_no_client_on_closed_streams(image: Path, stream: str):
    status, out, err = finish(
        start("nbdqcow", "serve", image, "--stdio", streams=stream)
    )
    assert (status, out) == (1, "")
    assert err == "nbdqcow: --stdio: standard input or output is closed\n"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("nbdqcow", ["--version"]),
        ("nbdqcow", ["serve", "--help"]),
        ("nbdqcow", ["serve", "IMAGE"]),
        ("nbdqcow-img", ["--version"]),
        ("nbdqcow-img", ["--help"]),
        ("nbdqcow-img", ["info", "IMAGE"]),
        ("nbdqcow-nbd", ["--version"]),
        ("nbdqcow-nbd", ["--help"]),
    ],
)
def test_what_can_not_be_printed(image: Path, program: str, words: list[str]):
    words = [word.replace("IMAGE", str(image)) for word in words]
    said = finish(start(program, *words, streams=">/dev/full"))
    assert said == (1, "", f"{program}: No space left on device\n")

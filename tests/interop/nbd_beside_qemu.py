"""``nbdqcow-nbd`` and qemu-nbd, started alike: the fixtures of tests beside it."""

import subprocess
import sys
import time

import pytest

from tests.conftest import REPOSITORY, find_tool, wait_until_listening
from tests.interop.commands import run


@pytest.fixture
def ours(tmp_path):
    """A program called qemu-nbd that is ours."""
    path = tmp_path / "bin" / "qemu-nbd"
    path.parent.mkdir()
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from nbdqcow.cli.nbd import main\nsys.exit(main())\n"
    )
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def theirs():
    return find_tool("qemu-nbd")


@pytest.fixture(params=["ours", "theirs"])
def program(request):
    """Either of the two: what is asserted of ours must hold of qemu-nbd."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.qcow2"
    run(find_tool("qemu-img"), "create", "-q", "-f", "qcow2", path, "10M")
    return path


@pytest.fixture
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("s") / "s"


@pytest.fixture
def start(program, path):
    """``start(*arguments)`` starts the program on the unix socket ``path``."""
    processes = []

    def begin(*arguments):
        process = subprocess.Popen(
            [program, "-k", str(path), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        wait_until_listening(path, process)
        return process

    yield begin
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait(20)
        process.stderr.close()


def wait_gone(path):
    deadline = time.monotonic() + 20
    while path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # The image is closed a little after its socket is.
    time.sleep(0.3)

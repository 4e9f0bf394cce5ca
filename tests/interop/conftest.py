"""What the tests beside other people's programs share."""

import random
from pathlib import Path

import pytest

from tests.conftest import find_tool
from tests.interop.commands import run
from tests.interop.img_beside_qemu import prepare

MiB = 1 << 20


@pytest.fixture(scope="session")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that `prepare` fills: no test may change what is in it."""
    find_tool("qemu-img")
    directory = tmp_path_factory.mktemp("commands") / "disks"
    prepare(directory)
    return directory


@pytest.fixture
def images(tmp_path: Path, seed: int) -> dict[str, Path]:
    """A qcow2 and a raw image of 3 MiB + 512 with the same random bytes."""
    raw, qcow2 = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(random.Random(seed).randbytes(3 * MiB + 512))
    run(find_tool("qemu-img"), "convert", "-f", "raw", "-O", "qcow2", raw, qcow2)
    return {"raw": raw, "qcow2": qcow2}


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for unix sockets, whose paths have 107 bytes at most."""
    path = tmp_path_factory.mktemp("s")
    assert len(str(path)) < 90
    return path

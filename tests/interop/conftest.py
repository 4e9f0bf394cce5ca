"""What the tests beside QEMU's programs share."""

from pathlib import Path

import pytest

from tests.conftest import find_tool
from tests.interop.img_beside_qemu import prepare


@pytest.fixture(scope="session")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that `prepare` fills: no test may change what is in it."""
    find_tool("qemu-img")
    directory = tmp_path_factory.mktemp("commands") / "disks"
    prepare(directory)
    return directory

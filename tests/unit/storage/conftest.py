import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(params=["disk", "tmpfs"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system with RWF_NOWAIT (if /tmp is on one), and one
    on tmpfs."""
    if request.param == "disk":
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(prefix="nbdqcow-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)

"""Commands that people wait for load nothing that they don't need."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.builder import ImageBuilder

REPOSITORY = Path(__file__).resolve().parents[3]
HEAVY = {
    *("asyncio", "numpy", "cryptography", "click", "uvloop", "argparse", "json"),
    *("urllib.parse", "ipaddress"),
}


# asyncio needs some more of these.
HEAVY_FOR_JOBS = {
    *("numpy", "cryptography", "click", "uvloop", "argparse", "json", "pathlib"),
    *("urllib.parse", "tempfile", "shutil", "deflate", "zlib_ng"),
}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["info", "image"],
        ["info", "--output=json", "image"],
        ["create", "-q", "-f", "qcow2", "new", "1G"],
    ],
)
def test_no_heavy_imports(arguments, tmp_path):
    assert HEAVY & modules_of(arguments, tmp_path) == set()


@pytest.mark.parametrize(
    "arguments",
    [["convert", "-O", "qcow2", "image", "new"], ["compare", "image", "image"]],
)
def test_jobs_load_little(arguments, tmp_path):
    assert HEAVY_FOR_JOBS & modules_of(arguments, tmp_path) == set()


def modules_of(arguments, tmp_path):
    """Return the modules that a command has loaded when it ends."""
    (tmp_path / "image").write_bytes(ImageBuilder().build())
    program = (
        "import sys\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "from nbdqcow.cli.img import main\n"
        "status = main()\n"
        "print('\\n', *sorted(sys.modules))\n"
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())

"""qemu-img and nbdqcow-img, each run with one command line."""

import io
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nbdqcow.cli.img import main
from tests.conftest import with_luks
from tests.interop.img_versions import Outcome, as_7_2_says, words_for

IN_A_PROCESS = [
    sys.executable,
    "-c",
    "import sys; sys.argv[0] = 'qemu-img'; from nbdqcow.cli.img import main; "
    "sys.exit(main())",
]
TIME_ZONE = "Asia/Kathmandu"


def run_theirs(line: str, directory: Path) -> Outcome:
    """Run qemu-img; return exit status, standard output and error, as 7.2 says them."""
    done = with_luks(
        lambda: subprocess.run(
            ["qemu-img", *words_for(line)],
            cwd=directory,
            capture_output=True,
            timeout=60,
            check=False,
            env={**os.environ, "TZ": TIME_ZONE},
        )
    )
    # Some of its hints lack their newline.
    outcome = done.returncode, done.stdout, done.stderr.rstrip(b"\n")
    return as_7_2_says(shlex.split(line), outcome)


def run_ours(line: str, directory: Path) -> Outcome:
    """Run our command in this process, which takes a tenth of the time."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setenv("TZ", TIME_ZONE)
        patch.setattr(sys, "argv", ["qemu-img", *shlex.split(line)])
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        time.tzset()
        status = main()
    time.tzset()
    out, err = (bytes(stream.detach().getvalue()) for stream in streams)
    return status, out, err.rstrip(b"\n")


def look_at(directory: Path, name: str) -> list[Outcome]:
    """Return what qemu-img says of an image, but for how much of it a file system has
    allocated: that depends on how it was written."""
    quoted = shlex.quote(name)
    status, out, err = run_theirs(f"info {quoted}", directory)
    info = status, re.sub(rb"disk size: .*", b"", out), err
    return [info, run_theirs(f"check --output=json {quoted}", directory)]


def files_of(directory: Path) -> list[str]:
    """Return the names of all files below a directory."""
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file()
    )

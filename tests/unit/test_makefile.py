"""``make serve``: what it gives to the server."""

import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, find_tool

ADDRESS = "127.0.0.1:10809"


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["IMAGE=disk.raw"], ["--listen", ADDRESS, "--", "disk.raw"]),
        (
            ["IMAGE=disk.raw", "FORMAT=raw", "LISTEN=[::1]:1"],
            ["--listen", "[::1]:1", "--format", "raw", "--", "disk.raw"],
        ),
        # Names that a shell, or the server, would take for something else.
        (
            ["IMAGE=/my disks/\"a\" `id` 'b'.qcow2"],
            ["--listen", ADDRESS, "--", "/my disks/\"a\" `id` 'b'.qcow2"],
        ),
        (["IMAGE=-r"], ["--listen", ADDRESS, "--", "-r"]),
    ],
)
def test_serve(words: list[str], given: list[str], tmp_path: Path) -> None:
    program = tmp_path / "nbdqcow"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    command = [find_tool("make"), "-s", "-o", "setup-serve", "serve"]
    done = subprocess.run(
        [*command, f"BIN={tmp_path}", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        # Not those of a make that runs the tests.
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    assert done.stdout.splitlines() == ["serve", *given]

"""qemu-img beside the drivers under test: it makes images, and judges them."""

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.conftest import find_tool

MiB = 1 << 20


def run_qemu_img(
    *arguments: object, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run qemu-img; with ``check``, its failure fails the test."""
    command = [find_tool("qemu-img"), *map(str, arguments)]
    return subprocess.run(command, check=check, capture_output=True, text=True)


def qemu_img(*arguments: object) -> str:
    """Return what qemu-img prints."""
    return run_qemu_img(*arguments).stdout


def create(
    path: Path, size: int = 4 * MiB, *, backing: Path | None = None, **options: object
) -> Path:
    """Make a qcow2 image; ``backing`` is a raw one below it."""
    words: list[object] = []
    if options:
        words += ["-o", ",".join(f"{k}={v}" for k, v in options.items())]
    if backing is not None:
        words += ["-b", backing, "-F", "raw"]
    qemu_img("create", "-qf", "qcow2", *words, path, size)
    return path


def check(path: Path, *options: object) -> dict[str, Any]:
    """No corruption and no leak, says QEMU; return its figures."""
    report: dict[str, Any] = json.loads(
        qemu_img("check", "--output=json", *options, path)
    )
    return report

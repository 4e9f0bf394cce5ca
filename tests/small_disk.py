"""A file system of a few MiB, where mounting is allowed."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def small_disk(directory: Path, size: int) -> Iterator[bool]:
    """Mount ``size`` bytes on a directory while the block runs; yield whether that
    could be done."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    if subprocess.run(mount, capture_output=True).returncode:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def remount(directory: Path, options: str) -> None:
    """Change what such a file system was mounted with."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(directory)], check=True)

"""Names of files, made as durable as what is in the files."""

import contextlib
import os


def sync_directory_blocking(path: str | os.PathLike[str]) -> None:
    """Make the names in a directory durable, where that can be done."""
    # Some file systems sync no directories.
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

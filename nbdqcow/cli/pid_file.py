"""The file that says which process serves."""

import os

from nbdqcow.errors import UsageError


def write_pid_file(path: str) -> None:
    """Write this process's ID to ``path``. Raises `UsageError`."""
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")
    except OSError as exc:
        raise UsageError(f"Could not create '{path}': {exc.strerror}") from None

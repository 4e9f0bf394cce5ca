"""The file that says which process serves."""

import os

from nbdqcow.errors import UsageError


def write_pid_file(path: str, *, mode: int = 0o644) -> None:
    """Write this process's ID to ``path``; ``mode`` is that of a new file.

    Raises `UsageError`.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags, mode)

    try:
        with open(path, "w", encoding="ascii", opener=opener) as file:
            file.write(f"{os.getpid()}\n")
    except OSError as exc:
        raise UsageError(f"Could not create '{path}': {exc.strerror}") from None

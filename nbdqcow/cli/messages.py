"""How the commands speak: every line of an error starts with their name.

The name is argv[0]'s, so that a link called ``qemu-nbd`` speaks as qemu-nbd
does. This module imports nothing that a ``--version`` need wait for.
"""

import io
import os
import sys
from typing import Any, Final


class _Output(io.FileIO):
    """Standard output or error. That nobody can read what is printed ends no
    work on an image; `failure` says so when the work is done."""

    failure: OSError | None = None

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        """Write, or remember why that failed."""
        try:
            return super().write(data)
        except OSError as exc:
            self.failure = exc
            return len(data)


_outputs: Final[list[_Output]] = []


def secure_standard_files() -> None:
    """See that file descriptors 0 to 2 are open, and survive it if they fail.

    Of one that is not, an image could get the number, and what is printed
    would go into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # To be used in the other direction only: whoever reads or writes
            # hears that it is closed.
            os.open(os.devnull, os.O_WRONLY if number == 0 else os.O_RDONLY)
    _outputs.clear()
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            raw = _Output(number, "wb", closefd=False)
            _outputs.append(raw)
            line_buffering = number == 2 or (stream is not None and stream.isatty())
            encoding = "utf-8" if stream is None else stream.encoding
            stream = io.TextIOWrapper(
                io.BufferedWriter(raw), encoding, line_buffering=line_buffering
            )
            setattr(sys, name, stream)
        # File names are any bytes, and they leave as they came.
        stream.reconfigure(errors="surrogateescape")


def output_failure() -> OSError | None:
    """Return why something of what was printed is lost; None if nothing is."""
    sys.stdout.flush()
    return next((raw.failure for raw in _outputs if raw.failure is not None), None)


def program_name() -> str:
    """Return what messages call this program."""
    name = os.path.basename(sys.argv[0])
    return "nbdqcow" if name in ("__main__.py", "-c", "") else name


def is_our_name() -> bool:
    """Whether we go by our own name: if not, we stand in for qemu-img, and do
    nothing that it does not do."""
    return program_name() != "qemu-img"


def error(text: str) -> None:
    """Print an error to stderr."""
    print(f"{program_name()}: {printable(text)}", file=sys.stderr, flush=True)


def warning(text: str) -> None:
    """Print a warning to stderr, in the form of QEMU's tools."""
    print(f"WARNING: {printable(text)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Return ``text`` with what is no text escaped: control characters, which
    a terminal would obey, and lone surrogates, which stand for the bytes of
    file names that are not UTF-8."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode()
        for c in text
    )


def describe(exc: BaseException) -> str:
    """Return what an exception says, without Python's own decoration."""
    if isinstance(exc, OSError) and exc.strerror:
        if exc.filename is not None:
            return f"{os.fsdecode(exc.filename)}: {exc.strerror}"
        return exc.strerror
    return str(exc) or type(exc).__name__

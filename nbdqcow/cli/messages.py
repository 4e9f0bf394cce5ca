"""How the commands speak: every line of an error starts with their name.

The name is argv[0]'s, so that a link called ``qemu-nbd`` speaks as qemu-nbd
does. This module imports nothing that a ``--version`` need wait for.
"""

import os
import sys
from typing import Final

_QEMU_VERSION: Final = "7.2.22"
"""The version of QEMU that our command lines and what they print are compared with."""


def program_name() -> str:
    """Return what messages call this program."""
    name = os.path.basename(sys.argv[0])
    return "nbdqcow" if name in ("__main__.py", "-c", "") else name


def is_our_name() -> bool:
    """Whether we go by our own name: if not, we stand in for qemu-img or qemu-nbd,
    and do nothing that these do not do."""
    return program_name() not in ("qemu-img", "qemu-nbd")


def version() -> str:
    """Return our version. By the name of one of QEMU's programs it is that of QEMU
    whose options we have: scripts read the first number and decide by it what they
    may ask for."""
    from nbdqcow import __version__

    if is_our_name():
        return __version__
    return f"{_QEMU_VERSION} (nbdqcow {__version__})"


def error(text: str) -> None:
    """Print an error to stderr."""
    if not is_our_name():
        text = _without_holders(text)
    print(f"{program_name()}: {printable(text)}", file=sys.stderr, flush=True)


def _without_holders(text: str) -> str:
    """Return what QEMU's programs say: they do not know who has an image in use."""
    if "[" not in text:
        return text
    from nbdqcow.errors import HELD_BY

    lines = text.split("\n")
    return "\n".join(
        line.partition(HELD_BY)[0] if line.startswith("Is another process") else line
        for line in lines
    )


def warning(text: str) -> None:
    """Print a warning to stderr, in the form of QEMU's tools."""
    print(f"WARNING: {printable(text)}", file=sys.stderr, flush=True)


def warn_of_guess(name: str) -> None:
    """Say that an image which is written to was only guessed to be raw."""
    print(
        f"WARNING: Image format was not specified for '{printable(name)}' and probing "
        "guessed raw.\n"
        "         Automatically detecting the format is dangerous for raw images, "
        "write operations on block 0 will be restricted.\n"
        "         Specify the 'raw' format explicitly to remove the restrictions.",
        file=sys.stderr,
        flush=True,
    )


def printable(text: str) -> str:
    """Return ``text`` with what is no text escaped: control characters, which
    a terminal would obey, and the bytes of file names that are not UTF-8."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _escaped(c) for c in text)


def _escaped(char: str) -> str:
    code = ord(char)
    # Such a surrogate stands for one byte.
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code & 0xFF:02x}"
    return char.encode("unicode_escape").decode()


def describe(exc: BaseException) -> str:
    """Return what an exception says, without Python's own decoration."""
    if isinstance(exc, OSError) and exc.strerror:
        if exc.filename is not None:
            return f"{os.fsdecode(exc.filename)}: {exc.strerror}"
        return exc.strerror
    return str(exc) or type(exc).__name__

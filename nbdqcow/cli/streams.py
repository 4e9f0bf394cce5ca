"""Standard input, output and errors, where whoever started us closed them."""

import os
import sys


def open_standard_streams() -> None:
    """Open /dev/null in the place of those that are closed.

    Otherwise the next files that are opened, an image or a socket, would take
    their numbers, and be what others take for standard output.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest number that is free: this one.
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(fd, True)
            if getattr(sys, name) is None:
                mode = "r" if name == "stdin" else "w"
                stream = os.fdopen(fd, mode, encoding="utf-8", closefd=False)
                setattr(sys, name, stream)

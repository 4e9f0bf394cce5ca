"""What every command does first and last: standard streams and exit status.

Like `nbdqcow.cli.messages` it imports nothing that ``--version`` need wait for.
"""

import os
import sys
from collections.abc import Callable
from typing import Final

from nbdqcow.cli.messages import describe, error

_INTERRUPTED: Final = 130


def run_program(main: Callable[[], int]) -> int:
    """Return the exit status of ``main``; output that can't be written, and an
    interrupt, are failures in one line at most."""
    open_standard_streams()
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone; so has the wish for the rest.
        _drop_output()
        return 1
    except OSError as exc:
        error(describe(exc))
        _drop_output()
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    return status


def open_standard_streams() -> None:
    """Open what was closed of standard input, output and error.

    The next files to be opened would have their numbers: an image would be where
    messages go, and an event loop does not close such a number. They can be
    neither read nor written to, as if they were closed; what is printed is lost.
    """
    for fd, useless in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_RDONLY)):
        try:
            os.fstat(fd)
        except OSError:
            # Those below are open, so this is the first free one.
            os.set_inheritable(os.open(os.devnull, useless), True)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _drop_output() -> None:
    # Python would flush again at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""What every command does first and last: standard streams and exit status.

Like `nbdqcow.cli.messages` it imports nothing that ``--version`` need wait for.
"""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn

from nbdqcow.cli.messages import describe, error, is_our_name

SWITCH_INTERVAL: Final = 0.0001
"""Seconds after which a thread that wants the interpreter gets it. A worker thread has
a few lines to run between two calls that take 100 us; by Python's own 5 ms it could
wait for the loop for as long as fifty of them."""


ENDING: Final = (signal.SIGTERM, signal.SIGHUP)
"""Signals at which a command tidies up, as at SIGINT, before they end it."""


class Signalled(BaseException):
    """A signal ends the program, which has tidied up.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Answered(BaseException):
    """An option's value asked what there is; that is printed, and all is done."""


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


def run_program(main: Callable[[], int], *, print_failures_last: bool = False) -> int:
    """Return the exit status of ``main``; output that can't be written, and an
    interrupt, are failures in one line at most.

    ``print_failures_last``: the work is done although nobody reads about it.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    _end_as_others_do()
    open_standard_streams()
    outputs = _remember_failures() if print_failures_last else []
    status = 0
    try:
        with contextlib.suppress(Answered):
            status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone; so has the wish for the rest.
        _drop_output()
        return 1
    except OSError as exc:
        if not status:
            # Otherwise the command has said so itself.
            error(describe(exc))
        _drop_output()
        return status or 1
    except KeyboardInterrupt:
        return _die_of(signal.SIGINT)
    except Signalled as exc:
        return _die_of(exc.number)
    failure = next((raw.failure for raw in outputs if raw.failure is not None), None)
    if failure is None or not is_our_name():
        # QEMU's tool does not look.
        return status
    if not isinstance(failure, BrokenPipeError):
        error(describe(failure))
    return status or 1


def _end_as_others_do() -> None:
    """Let SIGTERM end us if we are the first process of a container.

    The kernel drops what such a process has no handler for: a server that is told
    to end while it still opens its images would go on, until it is killed.
    """
    if os.getpid() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        # Threads but the first one can't.
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, _end_at_once)


def _end_at_once(number: int, _frame: object) -> NoReturn:
    os._exit(128 + number)


def is_unhandled(number: int) -> bool:
    """Whether nobody has decided yet what a signal does, such as nohup(1)."""
    return signal.getsignal(number) in (signal.SIG_DFL, _end_at_once)


@contextlib.contextmanager
def signals_raised() -> Iterator[None]:
    """Raise `Signalled` where the block is when a signal wants to end the program, as
    `KeyboardInterrupt` comes, so that it can take away what it has not completed."""

    def end(number: int, _frame: object) -> NoReturn:
        raise Signalled(number)

    replaced: dict[signal.Signals, Any] = {}
    try:
        # Only the main thread can; tests have others.
        with contextlib.suppress(ValueError):
            for number in (*ENDING, signal.SIGUSR1):
                if is_unhandled(number):
                    replaced[number] = signal.signal(number, end)
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


def leave(status: int) -> NoReturn:
    """End the process, without taking the interpreter apart: that would be a tenth of
    what a short command takes.

    It is for programs that have closed their files and leave no threads at work.
    """
    _flush_outputs()
    os._exit(status)


def _die_of(number: int) -> int:
    """End as a program does that has no handler for the signal.

    Who waits sees that: a shell stops a script's loop for a command that died of
    SIGINT, and goes on with it after any exit status.
    """
    _flush_outputs()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    # Only if it is blocked.
    return 128 + number


def _flush_outputs() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()


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


def _remember_failures() -> list[_Output]:
    """Put an `_Output` below standard output and error, unless a caller of ours
    has put something else there."""
    outputs = []
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            raw = _Output(number, "wb", closefd=False)
            outputs.append(raw)
            line_buffering = number == 2 or stream.isatty()
            stream = io.TextIOWrapper(
                io.BufferedWriter(raw), stream.encoding, line_buffering=line_buffering
            )
            setattr(sys, name, stream)
    return outputs


def _drop_output() -> None:
    # Python would flush again at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

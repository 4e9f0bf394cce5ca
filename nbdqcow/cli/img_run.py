"""Runs the coroutine of a command, and shows how far it is."""

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

from nbdqcow.cli.messages import is_our_name, printable
from nbdqcow.cli.program import ENDING, Signalled, is_unhandled

_PATIENCE: Final = 1.0
"""Seconds that a command may take before a terminal hears how far it is."""

_SWITCH_INTERVAL: Final = 0.0005


class ProgressLine:
    """``-p``: how far a command is, as qemu-img says it.

    Without ``-p`` SIGUSR1 asks for it, on standard error; and somebody at a
    terminal who waits sees it there anyway, unless we stand in for qemu-img.
    """

    def __init__(self, shown: bool, *, quiet: bool = False, step: float = 1.0) -> None:
        """``step`` is the percentage below which nothing new is printed."""
        self._shown = shown and not quiet
        self._step = step
        self._percent = 0.0
        self._printed = float("-inf")
        self._started = time.monotonic()
        self._watched = (
            not self._shown and not quiet and sys.stderr.isatty() and is_our_name()
        )
        self._has_line = False

    def __call__(self, done: int, total: int) -> None:
        """Be a `Progress`."""
        if done:
            self.show(100.0 * done / total)

    def show(self, percent: float) -> None:
        """Say that so much is done, unless that was said a moment ago."""
        percent = self._percent = min(percent, 100.0)
        if self._shown:
            if percent > self._printed + self._step or percent in (0.0, 100.0):
                self._printed = percent
                print(f"    ({percent:.2f}/100%)", end="\r", flush=True)
        elif (
            self._watched
            and percent > self._printed + self._step
            and time.monotonic() - self._started > _PATIENCE
        ):
            self._printed = percent
            bar = "#" * int(percent / 2.5)
            print(f"\r[{bar:<40}] {percent:5.1f}%", end="", file=sys.stderr, flush=True)
            self._has_line = True

    def ask(self) -> None:
        """Somebody sent SIGUSR1."""
        if not self._shown:
            print(f"    ({self._percent:.2f}/100%)", file=sys.stderr, flush=True)

    def end(self) -> None:
        """The command is done or has failed: nothing more is shown."""
        if self._shown:
            print(flush=True)
        if self._has_line:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        self._shown = self._watched = False


class _Shown(logging.Handler):
    """Shows what is logged of an image; a record's ``shown`` is its text here,
    where there is one image and no need to name it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record, wherever standard error is now."""
        text = getattr(record, "shown", None) or record.getMessage()
        print(printable(text), file=sys.stderr, flush=True)


_SHOWN: Final = _Shown(logging.WARNING)


def run_command(
    main: Callable[[], Coroutine[Any, Any, int]], progress: ProgressLine | None = None
) -> int:
    """Run the coroutine of a command; return its exit status.

    What it raises is the caller's. SIGTERM and SIGHUP cancel it as SIGINT does, and
    SIGUSR1 if there is no ``progress`` that it could ask for,
    so that it can clean up, and are raised as `Signalled` then. Big requests go
    to worker threads, so the loop itself hardly matters, and uvloop would take
    longer to load than a small command.
    """
    from nbdqcow.buffers import keep_much_freed_memory

    keep_much_freed_memory()
    logging.getLogger("nbdqcow").addHandler(_SHOWN)
    # The loop has little to do, and must not wait long to do it.
    sys.setswitchinterval(_SWITCH_INTERVAL)
    ended_by = 0

    handlers: dict[int, Any] = {}

    async def supervised() -> int:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None

        def end(number: int) -> None:
            nonlocal ended_by
            ended_by = number
            task.cancel()

        def catch(number: int, callback: Callable[..., object], *args: object) -> None:
            # As `asyncio.Runner` catches SIGINT: `add_signal_handler` would load
            # `inspect` for a look at the callback.
            handlers[number] = signal.signal(
                number, lambda *_: loop.call_soon_threadsafe(callback, *args)
            )

        # Only the main thread can; tests have others.
        with contextlib.suppress(ValueError):
            for number in ENDING:
                # Below nohup it stays ignored.
                if is_unhandled(number):
                    catch(number, end, number)
            if progress is not None:
                catch(signal.SIGUSR1, progress.ask)
            elif is_unhandled(signal.SIGUSR1):
                # Nobody is to be told anything: it ends the command.
                catch(signal.SIGUSR1, end, signal.SIGUSR1)
        return await main()

    try:
        with asyncio.Runner() as runner:
            try:
                return runner.run(supervised())
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
    except asyncio.CancelledError:
        if not ended_by:
            raise
        raise Signalled(ended_by) from None

"""Runs the coroutine of a command, and says in one line how it failed."""

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from nbdqcow.cli.messages import describe, error, is_our_name, program_name
from nbdqcow.errors import NbdQcowError


def run(main: Callable[[], Coroutine[Any, Any, None]], *, verbose: bool = False) -> int:
    """Run ``main`` on uvloop, or on plain asyncio where that is missing.

    Returns the exit status. A failure is one line on stderr and status 1; an
    exception that is none of ours is a bug, and ``verbose`` shows all of it.
    """
    _set_up_logging(verbose)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(main())
    except (NbdQcowError, OSError) as exc:
        error(describe(exc))
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as exc:
        if verbose:
            raise
        error(f"internal error: {type(exc).__name__}: {exc} (-v shows where)")
        return 1
    return 0


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _set_up_logging(verbose: bool) -> None:
    level = logging.WARNING
    if verbose:
        # QEMU's tests have its server say all that it can, and that of clients that
        # come and go is nothing.
        level = logging.DEBUG if is_our_name() else logging.INFO
    logging.basicConfig(
        stream=sys.stderr,
        level=level,
        format=program_name().replace("%", "%%") + ": %(message)s",
    )
    # asyncio's own chatter is about this program, not about its work.
    logging.getLogger("asyncio").setLevel(logging.WARNING)

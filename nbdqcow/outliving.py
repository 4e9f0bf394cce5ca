"""Waiting for work that goes on to its end when whoever waits is cancelled.

`asyncio.shield` does that as well, but what then fails is a traceback of
asyncio's: of a task or future that nobody has asked, or, from Python 3.14 on, of
one that was shielded.
"""

import asyncio
import logging
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)


async def outcome(work: "asyncio.Future[T]") -> T:
    """Return what a future or a task ends with, or raise it; see `forget`."""
    if not work.done():
        waiter = asyncio.get_running_loop().create_future()

        def wake(_: object) -> None:
            if not waiter.done():
                waiter.set_result(None)

        work.add_done_callback(wake)
        try:
            await waiter
        finally:
            work.remove_done_callback(wake)
    return work.result()


def forget(work: "asyncio.Future[Any]") -> None:
    """Let it not count that nobody asks for the failure of ``work``."""
    work.add_done_callback(_ask)


def _ask(work: "asyncio.Future[Any]") -> None:
    if not work.cancelled():
        work.exception()


async def run_to_end(task: "asyncio.Task[T]", name: str) -> T:
    """Do as `outcome` does. If the caller is cancelled, what then fails is a line in
    the log, which calls it ``name``."""
    try:
        return await outcome(task)
    except asyncio.CancelledError:
        task.add_done_callback(partial(log_failure, name))
        raise


def log_failure(name: str, task: "asyncio.Task[Any]") -> None:
    """Log what has failed in a task that nobody waits for."""
    if not task.cancelled() and (error := task.exception()) is not None:
        reason = getattr(error, "strerror", None) or error
        log.error("%s: %s", name, reason)

"""What long work has in common: progress, pause, cancel, and a pace.

A job is a coroutine that takes a `JobControl`, says how far it is and passes
`JobControl.checkpoint` every few megabytes. Whoever started it can look,
pause, resume and cancel meanwhile.
"""

import asyncio
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Self

from nbdqcow.errors import NbdQcowError

if TYPE_CHECKING:
    from nbdqcow.block.tools import Progress


class JobCancelled(NbdQcowError):
    """The job was told to stop before its end."""


class JobControl:
    """How far a job is, and what it is to do about it.

    Attributes:
        total: how much there is to do, in the job's own measure (mostly
            bytes); it may grow.
        done: how much of it is done.
        rate: bytes that may be moved in a second; None for any number.
    """

    def __init__(
        self, on_progress: "Progress | None" = None, *, rate: int | None = None
    ) -> None:
        """``on_progress(done, total)`` is called whenever one of them changes."""
        self.total = 0
        self.done = 0
        self._on_progress = on_progress
        self.rate = rate
        self._nb_moved = 0
        self._started = time.monotonic()
        self._cancelled = False
        self._resumed: asyncio.Event | None = None

    @property
    def fraction(self) -> float:
        """How much of the total is done, 0 to 1; 0 while nothing is known."""
        return min(1.0, self.done / self.total) if self.total > 0 else 0.0

    def expect(self, amount: int) -> None:
        """There is so much (more) to do."""
        self.total += amount
        self._tell()

    def advance(self, amount: int) -> None:
        """So much more is done."""
        self.done += amount
        self._tell()

    def report(self, done: int, total: int) -> None:
        """Set both at once; it has the shape of a `Progress`."""
        self.done, self.total = done, total
        self._tell()

    def _tell(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self.done, self.total)

    def pause(self) -> None:
        """Let the job wait at its next checkpoint."""
        if self._resumed is None:
            self._resumed = asyncio.Event()

    def resume(self) -> None:
        """Let a paused job go on."""
        if self._resumed is not None:
            self._resumed.set()
            self._resumed = None

    @property
    def paused(self) -> bool:
        """Whether the job is to wait."""
        return self._resumed is not None

    def cancel(self) -> None:
        """Let the job stop at its next checkpoint, paused or not."""
        self._cancelled = True
        self.resume()

    async def checkpoint(self, nb_bytes: int = 0) -> None:
        """Wait while the job is paused or ahead of its rate.

        ``nb_bytes`` is what it goes on to move: that counts from now on, and
        what it passes by does not. Raises `JobCancelled`.
        """
        while self._resumed is not None:
            await self._resumed.wait()
        if self._cancelled:
            raise JobCancelled("The job was cancelled")
        if self.rate:
            ahead = self._nb_moved / self.rate - (time.monotonic() - self._started)
            if ahead > 0:
                await asyncio.sleep(ahead)
            self._nb_moved += nb_bytes


class Flight:
    """Tasks that run at the same time, up to a limit.

    Leaving ``async with`` early, for an error or otherwise, cancels what still
    runs and waits for its end.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running: set[asyncio.Task[None]] = set()
        self._waiter: asyncio.Future[None] | None = None
        self._error: BaseException | None = None

    def __len__(self) -> int:
        return len(self._running)

    async def add(self, work: Coroutine[Any, Any, None]) -> None:
        """Start ``work`` as soon as there is room. Raises what earlier work did."""
        try:
            while len(self._running) >= self._limit:
                await self._wait()
            self._raise_error()
        except BaseException:
            work.close()
            raise
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._end)

    async def drain(self) -> None:
        """Wait until nothing runs. Raises what the work did."""
        while self._running:
            await self._wait()
        self._raise_error()

    async def _wait(self) -> None:
        """Wait until something has ended."""
        self._raise_error()
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _end(self, task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        # A task that waited for one that failed was cancelled by it.
        if not task.cancelled():
            error = task.exception()
            self._error = self._error or error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._running:
            task.cancel()
        # What they say no longer matters, only that they have ended.
        await asyncio.gather(*self._running, return_exceptions=True)

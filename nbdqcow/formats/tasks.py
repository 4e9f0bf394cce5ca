"""What an image does beside the calls of its driver: background work, and commits."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from nbdqcow.outliving import forget, log_failure, outcome, run_to_end

T = TypeVar("T")


class ImageTasks:
    """The tasks of one image. Whoever closes it waits for them, see `settle`."""

    def __init__(self, filename: str) -> None:
        """``filename`` is what log lines call the image."""
        self._filename = filename
        self._running: set[asyncio.Task[Any]] = set()
        self._until_close: list[asyncio.Task[None]] = []

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run work that nobody waits for but `settle`; what fails is logged."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._background_done)

    def spawn_until_close(self, work: Coroutine[Any, Any, None]) -> None:
        """Run work that ends with `cancel_until_close`."""
        task = asyncio.create_task(work)
        self._until_close.append(task)
        task.add_done_callback(self._background_done)

    def cancel_until_close(self) -> None:
        """End what `spawn_until_close` has begun."""
        for task in self._until_close:
            task.cancel()

    async def run_to_end(self, operation: Coroutine[Any, Any, T]) -> T:
        """Return what ``operation`` does, which goes on if the caller is cancelled;
        then what fails is logged."""
        task = asyncio.create_task(operation)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await run_to_end(task, self._filename)

    async def settle(self) -> None:
        """Wait until no operation and no background work is left."""
        while self._running:
            await asyncio.wait(self._running)

    def _background_done(self, task: "asyncio.Task[Any]") -> None:
        self._running.discard(task)
        log_failure(self._filename, task)


class SharedCommits:
    """Runs the commits of one image, one at a time. Those who want one while another
    runs share the next.

    Attributes:
        running: held while a commit runs, and by who wants none to. Take it before
            the image's lock.
    """

    def __init__(self, commit: Callable[[], Awaitable[None]]) -> None:
        self._commit = commit
        self.running = asyncio.Lock()
        self._queued: asyncio.Task[None] | None = None

    def start(self) -> "asyncio.Task[None]":
        """Return the next commit, which begins when the present one has ended."""
        if self._queued is None:
            self._queued = asyncio.create_task(self._commit_when_free())
            # Whoever awaits it has its failure.
            forget(self._queued)
        return self._queued

    async def run(self) -> None:
        """Commit all that was dirty before this call. Raises what the commit does."""
        await outcome(self.start())

    async def _commit_when_free(self) -> None:
        async with self.running:
            self._queued = None
            await self._commit()

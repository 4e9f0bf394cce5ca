"""Worker threads for the calls that would block the event loop.

A hop to a thread and back costs about 3 us at depth 16 here and 10 to 13 us
through ``loop.run_in_executor``, because of three things: a `SimpleQueue` on
the way out, a `deque` on the way back, and one eventfd that wakes the loop
once for however many jobs have ended meanwhile.

All pools of one event loop share the same few threads. They start when there
is work for them and end when the last pool is closed.
"""

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from queue import SimpleQueue
from typing import Any, Final, TypeVar, TypeVarTuple

_NB_PROCESSORS: Final = len(os.sched_getaffinity(0))
NB_THREADS: Final = min(max(4, _NB_PROCESSORS), 16)
"""Enough for a device's requests, and to compress on all processors, of which 16 can
be had by qemu-img as well."""
_NB_SPARE: Final = max(1, _NB_PROCESSORS - 1)
"""Processors that the event loop leaves to the threads."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class _Job:
    """A call on its way through a thread."""

    __slots__ = ("arguments", "ended", "error", "function", "lane", "result", "waiter")

    def __init__(
        self,
        waiter: asyncio.Future[None],
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        lane: "Lane | None" = None,
    ) -> None:
        self.waiter = waiter
        self.function = function
        self.arguments = arguments
        self.lane = lane
        self.ended = False
        self.result: Any = None
        self.error: BaseException | None = None


class Lane:
    """Calls that go one after the other, in the order in which they came.

    For what would wait for each other in the kernel anyway: the thread that has
    ended one goes on with the next, unless other calls wait, and nobody has to be
    woken.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy = False
        self._waiting: deque[_Job] = deque()

    def enter(self, job: _Job) -> bool:
        """Whether ``job`` can go now. If not, `leave` returns it later."""
        with self._lock:
            if self._busy:
                self._waiting.append(job)
                return False
            self._busy = True
            return True

    def leave(self) -> _Job | None:
        """Return what goes next, at the end of a call."""
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            self._busy = False
            return None


class _Workers:
    """The threads of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.nb_users = 0
        self._threads: list[threading.Thread] = []
        self._nb_outstanding = 0
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._ended: deque[_Job] = deque()
        self._woken = False
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        loop.add_reader(self._eventfd, self._take_ended)

    def submit(self, job: _Job) -> None:
        """Queue a job, starting one more thread if all may be busy."""
        if self._nb_outstanding >= len(self._threads) < NB_THREADS:
            self._start_thread()
        self._nb_outstanding += 1
        if job.lane is None or job.lane.enter(job):
            self._queue.put(job)

    @property
    def nb_unfinished(self) -> int:
        """Jobs that wait for a thread or are in one."""
        return self._nb_outstanding - len(self._ended)

    def _start_thread(self) -> None:
        # A daemon: a program that ends without closing its images must not
        # hang in its own exit.
        thread = threading.Thread(target=self._work, name="nbdqcow-io", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            if not self._threads:
                raise
        else:
            self._threads.append(thread)

    def _work(self) -> None:
        """Run jobs until told to end. Runs in a worker thread."""
        while True:
            job = self._queue.get()
            if job is None:
                return
            while job is not None:
                lane = job.lane
                try:
                    job.result = job.function(*job.arguments)
                except BaseException as error:
                    # Without this frame the traceback makes no cycle through the
                    # job, so that its buffers go as soon as it is answered.
                    traceback = error.__traceback__
                    job.error = error.with_traceback(traceback and traceback.tb_next)
                    del traceback
                self._ended.append(job)
                # An idle thread must not keep the last request's buffers.
                job = None if lane is None else lane.leave()
                if job is not None and not self._queue.empty():
                    # Or a lane that never empties would have a thread for ever.
                    self._queue.put(job)
                    job = None
                # The loop clears the flag before it empties the deque, so a flag
                # that is set here means that it will still see the job.
                if not self._woken:
                    self._woken = True
                    os.eventfd_write(self._eventfd, 1)

    def _take_ended(self) -> None:
        """Wake the tasks whose jobs have ended. Called by the loop."""
        os.eventfd_read(self._eventfd)
        self._woken = False
        ended = self._ended
        while ended:
            job = ended.popleft()
            self._nb_outstanding -= 1
            job.ended = True
            if not job.waiter.done():
                job.waiter.set_result(None)

    def shut_down(self) -> None:
        """End the threads; nothing is outstanding."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self.loop.remove_reader(self._eventfd)
        os.close(self._eventfd)


_workers: dict[asyncio.AbstractEventLoop, _Workers] = {}


class Pool:
    """One user's handle on the worker threads of the running loop.

    ``await pool.run(function, *arguments)`` calls it in a thread. Make a pool
    inside the loop that is to use it, and close it there.
    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        workers = _workers.get(loop)
        if workers is None:
            workers = _workers[loop] = _Workers(loop)
        workers.nb_users += 1
        self._workers = workers
        self._nb_running = 0
        self._idle_waiters: list[asyncio.Future[None]] = []
        self._closed = False

    def is_saturated(self) -> bool:
        """Whether the threads have enough to compute: each processor beside the
        loop's has a call, and one more waits."""
        return self._workers.nb_unfinished > _NB_SPARE

    def run(
        self, function: Callable[[*Ts], T], *arguments: *Ts
    ) -> Coroutine[Any, Any, T]:
        """Call ``function`` in a worker thread; return or raise what it does.

        A call that has begun can't be stopped. If the waiting task is
        cancelled, `asyncio.CancelledError` comes once the call has ended (its
        result is lost): whoever sees it may reuse the buffers, and nothing
        still writes to the place that it was writing to.
        """
        return self.run_in(None, function, *arguments)

    async def run_in(
        self, lane: Lane | None, function: Callable[[*Ts], T], *arguments: *Ts
    ) -> T:
        """Do as `run` does, once the calls that came to ``lane`` before have ended."""
        if self._closed:
            raise RuntimeError("the pool is closed")
        job = _Job(self._workers.loop.create_future(), function, arguments, lane)
        self._workers.submit(job)
        self._nb_running += 1
        try:
            await job.waiter
        except asyncio.CancelledError:
            while not job.ended:
                job.waiter = self._workers.loop.create_future()
                try:
                    await job.waiter
                except asyncio.CancelledError:
                    continue
            raise
        finally:
            self._end_call()
        if job.error is not None:
            try:
                raise job.error
            finally:
                # The traceback holds this frame, and with it the job.
                del job
        return job.result  # type: ignore[no-any-return]

    def start(
        self,
        on_end: Callable[[T | None], None],
        function: Callable[[*Ts], T],
        *arguments: *Ts,
    ) -> None:
        """Call ``function`` in a worker thread, and ``on_end`` in the loop with
        what it returned, or with None if it failed."""
        if self._closed:
            raise RuntimeError("the pool is closed")
        job = _Job(self._workers.loop.create_future(), function, arguments)

        def end(_: asyncio.Future[None]) -> None:
            self._end_call()
            on_end(None if job.error is not None else job.result)

        job.waiter.add_done_callback(end)
        self._workers.submit(job)
        self._nb_running += 1

    def _end_call(self) -> None:
        self._nb_running -= 1
        if not self._nb_running:
            self._wake_idle_waiters()

    def _wake_idle_waiters(self) -> None:
        for waiter in self._idle_waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._idle_waiters.clear()

    async def wait_idle(self) -> None:
        """Wait until no call of this pool is running, cancelled or not."""
        cancelled: asyncio.CancelledError | None = None
        while self._nb_running:
            waiter = self._workers.loop.create_future()
            self._idle_waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

    async def close(self) -> None:
        """Wait for this pool's calls, then let go of the threads.

        The last pool of a loop ends them. Closing twice is harmless. A
        cancelled close is complete, as a cancelled call is.
        """
        if self._closed:
            return
        self._closed = True
        try:
            await self.wait_idle()
        finally:
            workers = self._workers
            workers.nb_users -= 1
            if not workers.nb_users:
                del _workers[workers.loop]
                workers.shut_down()

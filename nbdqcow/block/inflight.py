"""Which requests are in flight, and what must wait for them."""

import asyncio
from collections.abc import Callable


class Epochs:
    """Tells when everything that was in flight at some moment has ended.

    A request that moves guest data outside the image's lock enters, and
    leaves when its bytes have been moved (a reply from mapped pages: when it
    has left the socket). `when_quiet` calls back once all that had entered
    before it have left, so that a freed cluster is not reused under a late
    read or write. Entering and leaving cost a dictionary access: an epoch
    number is shared by all requests between two `when_quiet` calls.
    """

    __slots__ = ("_current", "_counts", "_waiting")

    def __init__(self) -> None:
        self._current = 0
        self._counts: dict[int, int] = {0: 0}
        self._waiting: list[tuple[int, Callable[[], None]]] = []

    def enter(self) -> int:
        """Begin a request; give the number returned to `leave`."""
        epoch = self._current
        self._counts[epoch] += 1
        return epoch

    def leave(self, epoch: int) -> None:
        """End a request."""
        counts = self._counts
        counts[epoch] -= 1
        if counts[epoch] == 0 and epoch != self._current:
            del counts[epoch]
            self._run_ready()

    def when_quiet(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once all requests now in flight have left; at
        once if there are none."""
        if len(self._counts) == 1 and self._counts[self._current] == 0:
            callback()
            return
        epoch = self._current
        self._current = epoch + 1
        self._counts[self._current] = 0
        if self._counts[epoch] == 0:
            del self._counts[epoch]
        self._waiting.append((epoch, callback))

    async def quiet(self) -> None:
        """Wait until all requests now in flight have left."""
        future = asyncio.get_running_loop().create_future()

        def wake() -> None:
            if not future.done():
                future.set_result(None)

        self.when_quiet(wake)
        await future

    @property
    def busy(self) -> bool:
        """Whether any request is in flight."""
        return len(self._counts) > 1 or self._counts[self._current] > 0

    def _run_ready(self) -> None:
        oldest = min(self._counts)
        while self._waiting and self._waiting[0][0] < oldest:
            self._waiting.pop(0)[1]()


class InFlightRanges:
    """Half-open guest ranges that a request works on and others wait for.

    Few are in flight at once (the server bounds them), so a plain list is
    searched from end to end.
    """

    __slots__ = ("_ranges",)

    def __init__(self) -> None:
        self._ranges: list[InFlightRange] = []

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def find(self, start: int, end: int) -> "InFlightRange | None":
        """Return a range that overlaps ``[start, end)``, or None."""
        for r in self._ranges:
            if r.start < end and start < r.end:
                return r
        return None

    def first_overlap(self, start: int, end: int) -> "InFlightRange | None":
        """Return the overlapping range that starts lowest, or None."""
        best = None
        for r in self._ranges:
            if (
                r.start < end
                and start < r.end
                and (best is None or r.start < best.start)
            ):
                best = r
        return best

    def add(self, start: int, end: int) -> "InFlightRange":
        """Register ``[start, end)``."""
        r = InFlightRange(start, end)
        self._ranges.append(r)
        return r

    def remove(self, r: "InFlightRange") -> None:
        """The request on ``r`` has ended: wake all that wait for it."""
        self._ranges.remove(r)
        for waiter in r.waiters:
            if not waiter.done():
                waiter.set_result(None)
        r.waiters.clear()


class Writers:
    """The guest writes of an image: those in place, which are only counted, and
    those that allocate, whose ranges others may have to wait for.

    Attributes:
        allocating: guest ranges of allocations that are not linked yet.
    """

    __slots__ = ("allocating", "_epochs", "_in_place_done", "_nb_in_place")

    def __init__(self, epochs: Epochs) -> None:
        """``epochs`` is the image's: a write in place enters it."""
        self.allocating = InFlightRanges()
        self._epochs = epochs
        self._nb_in_place = 0
        self._in_place_done: asyncio.Future[None] | None = None

    def enter_in_place(self) -> int:
        """Begin a write in place; give the number to `leave_in_place`."""
        self._nb_in_place += 1
        return self._epochs.enter()

    def leave_in_place(self, epoch: int) -> None:
        """End a write in place."""
        self._epochs.leave(epoch)
        self._nb_in_place -= 1
        if not self._nb_in_place and self._in_place_done is not None:
            if not self._in_place_done.done():
                self._in_place_done.set_result(None)
            self._in_place_done = None

    async def quiet(self) -> None:
        """Wait for all writes that have begun. The image's lock is held, so none
        of those that wait can begin. Reads may take as long as they like."""
        while (busy := self.allocating.first_overlap(0, 1 << 64)) is not None:
            await busy.wait()
        if self._nb_in_place:
            self._in_place_done = asyncio.get_running_loop().create_future()
            await self._in_place_done


class InFlightRange:
    """One half-open range ``[start, end)`` and the requests waiting for it."""

    __slots__ = ("end", "start", "waiters")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.waiters: list[asyncio.Future[None]] = []

    async def wait(self) -> None:
        """Wait until the range is removed. Look everything up again then."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        await waiter

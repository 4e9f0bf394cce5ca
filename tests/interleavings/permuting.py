"""An event loop that runs what is ready in any order, and a file to go with it."""

import asyncio
import mmap
import random
from collections.abc import Callable, Sequence

from nbdqcow.block.storage import StorageDriver
from nbdqcow.types import Buffer, Buffers

SECTOR = 512


class Deadlock(AssertionError):
    """Something waits, and nothing is left that could wake it."""


class PermutingLoop(asyncio.SelectorEventLoop):
    """Each turn runs some of the callbacks that are ready, in an order drawn
    from a seed. There must be no thread and no timer.

    Attributes:
        nb_choices: turns in which there was more than one order.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._rnd = random.Random(seed)
        self.nb_choices = 0

    def _run_once(self) -> None:
        ready = self._ready  # type: ignore[attr-defined]
        later = []
        if not ready:
            raise Deadlock("all tasks wait for one another")
        if len(ready) > 1:
            self.nb_choices += 1
            handles = list(ready)
            self._rnd.shuffle(handles)
            now = self._rnd.randint(1, len(handles))
            ready.clear()
            ready.extend(handles[:now])
            later = handles[now:]
        super()._run_once()  # type: ignore[misc]
        ready.extend(later)


class PermutedStorage(StorageDriver):
    """A file in memory whose requests take turns, and happen sector by sector.

    A request that is cancelled is carried out all the same, and only then is
    the cancellation seen: so does `nbdqcow.pool.Pool`.
    """

    name = "permuted"

    def __init__(
        self, data: bytes, rnd: random.Random, capacity: int = 16 << 20
    ) -> None:
        self.filename = "permuted"
        self.read_only = False
        self.zero_beyond_end = True
        self.length = len(data)
        # Views into it stay valid: it never moves. Images refer to themselves, and
        # many may wait for the garbage collector: what nobody wrote to takes nothing.
        self._bytes = mmap.mmap(
            -1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        self._bytes[: len(data)] = data
        self._rnd = rnd
        # Now and then a disk that answers late.
        self._turns = rnd.choice(((0, 0, 1, 1, 2, 5), (0, 1, 1, 40)))

    @property
    def content(self) -> bytes:
        return bytes(self._bytes[: self.length])

    async def _carry_out(self, pieces: Sequence[Callable[[], object]]) -> None:
        cancelled: asyncio.CancelledError | None = None
        pieces = [*pieces, lambda: None]
        for piece in pieces:
            for _ in range(self._rnd.choice(self._turns)):
                try:
                    await asyncio.sleep(0)
                except asyncio.CancelledError as error:
                    cancelled = error
            piece()
        if cancelled is not None:
            raise cancelled

    def _put(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        self._bytes[offset:end] = data
        self.length = max(self.length, end)

    def try_pread(self, offset: int, length: int) -> bytes | None:
        if self._rnd.random() < 0.4:
            return None
        return bytes(self._bytes[offset : offset + length])

    def try_view(self, offset: int, length: int) -> memoryview | None:
        if self._rnd.random() < 0.3 or offset + length > self.length:
            return None
        return memoryview(self._bytes)[offset : offset + length]

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        if self._rnd.random() < 0.6:
            return False
        self._put(offset, bytes(data))
        return True

    async def pread(self, offset: int, length: int) -> bytes:
        parts: list[tuple[int, bytes]] = []

        def get(start: int, end: int) -> None:
            parts.append((start, bytes(self._bytes[start:end])))

        middle = offset + self._rnd.randrange(length + 1) // SECTOR * SECTOR
        ranges = [(offset, middle), (middle, offset + length)]
        self._rnd.shuffle(ranges)
        await self._carry_out([lambda r=r: get(*r) for r in ranges])  # type: ignore[misc]
        return b"".join(data for _, data in sorted(parts))

    async def pwritev(
        self, offset: int, buffers: Buffers, *, fua: bool = False
    ) -> None:
        data = b"".join(bytes(b) for b in buffers)
        starts = list(range(0, len(data), SECTOR * self._rnd.choice((1, 2, 8, 64))))
        pieces = [
            (offset + start, data[start:end])
            for start, end in zip(starts, [*starts[1:], len(data)], strict=True)
        ]
        self._rnd.shuffle(pieces)
        await self._carry_out([lambda p=p: self._put(*p) for p in pieces])  # type: ignore[misc]

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool = False
    ) -> None:
        await self.pwritev(offset, [bytes(length)])

    async def discard(self, offset: int, length: int) -> None:
        end = min(offset + length, self.length)
        if offset < end:
            await self.pwritev(offset, [bytes(end - offset)])

    async def flush(self) -> None:
        await self._carry_out([])

    async def truncate(self, length: int) -> None:
        def cut() -> None:
            end = max(length, self.length)
            self._bytes[length:end] = bytes(end - length)
            self.length = length

        await self._carry_out([cut])

    async def grow(self, length: int) -> None:
        def longer() -> None:
            self.length = max(self.length, length)

        await self._carry_out([longer])

    async def reopen(self, *, read_only: bool) -> None:
        def change() -> None:
            self.read_only = read_only

        await self._carry_out([change])

    async def close(self) -> None:
        pass


class InlinePool:
    """Stands in for `nbdqcow.pool.Pool`: no threads, but turns of the loop."""

    def is_saturated(self) -> bool:
        return False

    def start(
        self,
        on_end: Callable[[object], None],
        function: Callable[..., object],
        *arguments: object,
    ) -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: loop.call_soon(on_end, function(*arguments)))

    async def run(self, function: Callable[..., object], *arguments: object) -> object:
        await asyncio.sleep(0)
        result = function(*arguments)
        await asyncio.sleep(0)
        return result

    async def close(self) -> None:
        pass

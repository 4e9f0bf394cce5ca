"""Each step of each history is cancelled at each of its awaits in turn.

The image stays sound, what was flushed stays, nobody waits for ever for what
the step held, and the same step succeeds afterwards.
"""

import asyncio
import os
import random
from collections.abc import Awaitable, Generator

import pytest

from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.storage.memory import MemoryStorage
from tests.crash.histories import (
    HISTORIES,
    LOOKED_AT,
    SECTOR,
    Disk,
    History,
    base_content,
    filled,
)
from tests.crash.verdicts import check_by_us, is_sound
from tests.interleavings.permuting import InlinePool, PermutedStorage, PermutingLoop

NB_LONG_ROUNDS = int(os.environ.get("NBDQCOW_CANCEL_ROUNDS", "40"))


class CancelledAfter:
    """Awaits something, and has the task cancelled at an await in it.

    Attributes:
        nb_awaits: how many there were so far.
    """

    def __init__(self, work: Awaitable[object], nb_awaits: int) -> None:
        self._work = work
        self._left = nb_awaits
        self.nb_awaits = 0

    def __await__(self) -> Generator[object, None, object]:
        steps = self._work.__await__()
        value = None
        error: BaseException | None = None
        while True:
            try:
                waited = steps.throw(error) if error else steps.send(value)
            except StopIteration as stop:
                return stop.value
            if self.nb_awaits == self._left:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            self.nb_awaits += 1
            value, error = None, None
            try:
                value = yield waited
            except BaseException as thrown:
                error = thrown


async def cancel_one(history: History, seed: int, number: int, at: int) -> bool:
    """Run a history whose step ``number`` is cancelled at an await; return
    False if the step has no such await."""
    rnd = random.Random(f"{seed}/{history}/{number}/{at}")
    image = history.image()
    storage = PermutedStorage(image, rnd)
    disk = Disk(base_content(history), int.from_bytes(image[24:32], "big"))
    node = await history.open(storage)
    reached = False
    for index, step in enumerate(history.steps):
        changes = step.changes(disk)
        disk.begin(changes)
        if index == number:
            work = CancelledAfter(step.run(node), at)

            async def run(work: CancelledAfter = work) -> None:
                await work

            task = asyncio.ensure_future(run())
            await asyncio.wait([task])
            reached = work.nb_awaits > at
            if task.cancelled():
                await look(history, disk, storage.content)
                await again(node, step)
            else:
                await task
        else:
            await step.run(node)
        disk.succeed(changes, optional=step.optional)
        step.after(disk)
        if step.flushes:
            disk.flushed()
    await node.close()
    disk.flushed()
    await look(history, disk, storage.content, leaks=False)
    return reached


async def again(node, step) -> None:
    """Do a cancelled step again. One on a snapshot or a bitmap has been carried
    out all the same, and is not possible twice."""
    try:
        await step.run(node)
    except OSError:
        if not step.name.startswith(("snapshot delete", "bitmap remove")):
            raise


async def look(history: History, disk: Disk, data: bytes, *, leaks=True) -> None:
    result, text = check_by_us(data)
    assert is_sound(result, leaks=leaks), text
    storage = MemoryStorage(data)
    node = await history.open(storage)
    content = bytes(await node.pread(0, min(node.size, LOOKED_AT)))
    for sector in range(len(content) // SECTOR):
        got = content[sector * SECTOR : (sector + 1) * SECTOR]
        may = disk.later.get(sector, frozenset((disk.base(sector),)))
        assert got in may, f"sector {sector:#x} holds {got[:16].hex()}..."
    await node.close()


def cancel_all(history: History, seed: int) -> int:
    """Cancel each step at each of its awaits; return how many there were."""
    nb_cancelled = 0
    for number, step in enumerate(history.steps):
        at = 0
        while True:
            loop = PermutingLoop(seed)
            try:
                run = cancel_one(history, seed, number, at)
                reached = loop.run_until_complete(run)
            except Exception as error:
                where = f"{history}, seed {seed}, {step.name}, await {at}"
                raise AssertionError(f"{where}: {error!r}") from error
            finally:
                loop.close()
            if not reached:
                break
            nb_cancelled += 1
            at += 1
    return nb_cancelled


@pytest.fixture(autouse=True)
def no_threads(monkeypatch):
    monkeypatch.setattr("nbdqcow.formats.qcow2.compress.Pool", InlinePool)


@pytest.mark.parametrize("history", [h for h in HISTORIES if not h.costly], ids=str)
def test_each_step_is_cancelled_at_any_await(history, seed, figures):
    nb_cancelled = cancel_all(history, seed)
    figures(f"cancelled, {history}: at {nb_cancelled} awaits, seed {seed}")


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_each_step_is_cancelled_at_every_await(history, seed, figures):
    nb_cancelled = sum(cancel_all(history, seed + n) for n in range(NB_LONG_ROUNDS))
    figures(f"cancelled at length, {history}: at {nb_cancelled} awaits, seed {seed}")


async def cancel_reopening(seed: int, after: int, read_only: bool) -> bool:
    """Cancel it after some turns of the loop; return False if it has ended by
    then."""
    storage = PermutedStorage(filled(10), random.Random(seed))
    node = await HISTORIES[0].open(storage)
    node.driver.bitmap_add("all", granularity=SECTOR)
    await node.pwrite(30 * SECTOR, b"x" * SECTOR)
    if not read_only:
        await node.reopen(read_only=True)
    task = asyncio.ensure_future(node.reopen(read_only=read_only))
    for _ in range(after):
        await asyncio.sleep(0)
    in_time = task.cancel()
    await asyncio.wait([task])
    if after % 2:
        await node.reopen(read_only=False)
        await node.pwrite(31 * SECTOR, b"y" * SECTOR)
    await node.close()
    result, text = check_by_us(storage.content)
    assert is_sound(result, leaks=False), text
    node = await HISTORIES[0].open(MemoryStorage(storage.content))
    assert not any(info.inconsistent for info in node.driver.bitmap_list())
    assert bytes(await node.pread(30 * SECTOR, SECTOR)) == b"x" * SECTOR
    await node.close()
    return in_time


@pytest.mark.parametrize("read_only", [True, False])
def test_reopening_is_cancelled_at_any_moment(seed, read_only):
    after = 0
    in_time = True
    while in_time:
        loop = PermutingLoop(seed + after)
        try:
            run = cancel_reopening(seed + after, after, read_only)
            in_time = loop.run_until_complete(run)
        finally:
            loop.close()
        after += 3
    # One was in time at the least; by chance not many more.
    assert after > 3


def test_a_broken_driver_is_caught(monkeypatch, seed):
    """A mutant: a cancelled write is linked as if it had ended."""
    monkeypatch.setattr(Qcow2Driver, "abort_write", Qcow2Driver.end_write)
    with pytest.raises(AssertionError):
        for number in range(10):
            for history in HISTORIES[:4]:
                cancel_all(history, seed + number)

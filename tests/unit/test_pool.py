import asyncio
import contextlib
import gc
import os
import random
import threading
import time
import weakref

import pytest

from nbdqcow import pool as pool_module
from nbdqcow.pool import NB_THREADS, Lane, Pool


def nb_io_threads() -> int:
    return sum(t.name == "nbdqcow-io" for t in threading.enumerate())


def nb_open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.asyncio
async def test_returns_what_the_call_returns():
    pool = Pool()
    assert await pool.run(divmod, 7, 3) == (2, 1)
    assert await pool.run(threading.get_ident) != threading.get_ident()
    await pool.close()


@pytest.mark.asyncio
async def test_a_call_begins_before_anyone_waits_for_it():
    def fails() -> None:
        raise OSError(5, "broken")

    pool = Pool()
    begun = threading.Event()
    results: list[object] = []
    pool.start(results.append, lambda: (begun.set(), threading.get_ident())[1])
    # The loop has not had a turn.
    assert begun.wait(20)
    pool.start(results.append, fails)
    assert results == []
    await pool.close()
    ident, failed = sorted(results, key=lambda result: result is None)
    assert ident not in (None, threading.get_ident())
    assert failed is None


@pytest.mark.asyncio
async def test_calls_of_a_lane_go_one_after_the_other():
    pool = Pool()
    lane = Lane()
    gate = threading.Event()
    running: list[int] = []
    order: list[int] = []

    def call(number: int) -> None:
        assert not running
        running.append(number)
        assert gate.wait(20)
        order.append(number)
        running.pop()
        if number == 3:
            raise OSError(5, "broken")

    calls = [asyncio.create_task(pool.run_in(lane, call, n)) for n in range(8)]
    await asyncio.sleep(0)
    calls[5].cancel()
    # Others are not held up.
    assert await pool.run(int, "7") == 7
    gate.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert order == list(range(8))
    assert [type(result) for result in results if result is not None] == [
        OSError,
        asyncio.CancelledError,
    ]
    # It is free again.
    await pool.run_in(lane, call, 9)
    await pool.close()


@pytest.mark.asyncio
async def test_full_lanes_leave_threads_to_others():
    pool = Pool()
    gate = threading.Event()
    ended: list[str] = []

    def call(name: str) -> None:
        assert gate.wait(20)
        ended.append(name)

    lanes = [Lane() for _ in range(NB_THREADS)]
    calls = [pool.run_in(lane, call, "lane") for lane in lanes for _ in range(9)]
    running = [asyncio.create_task(one) for one in (*calls, pool.run(call, "other"))]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*running)
    assert ended.index("other") < 2 * NB_THREADS
    await pool.close()


@pytest.mark.asyncio
async def test_raises_what_the_call_raises_with_its_traceback():
    def fails() -> None:
        raise OSError(5, "broken")

    pool = Pool()
    with pytest.raises(OSError, match="broken") as caught:
        await pool.run(fails)
    assert caught.traceback[-1].name == "fails"
    assert all(entry.name != "_work" for entry in caught.traceback)
    await pool.close()


@pytest.mark.parametrize("error", [StopIteration, SystemExit, GeneratorExit])
@pytest.mark.asyncio
async def test_odd_exceptions_come_back_too(error: type[BaseException]):
    def fails() -> None:
        raise error

    pool = Pool()
    # Python turns a StopIteration that leaves a coroutine into a RuntimeError.
    with pytest.raises((error, RuntimeError)):
        await pool.run(fails)
    assert await pool.run(int, "3") == 3
    await pool.close()


@pytest.mark.asyncio
async def test_an_error_leaves_no_reference_cycle():
    class Payload(bytearray):
        pass

    def fails(payload: Payload) -> None:
        raise ValueError

    async def once() -> weakref.ref[Payload]:
        payload = Payload(100)
        with contextlib.suppress(ValueError):
            await pool.run(fails, payload)
        return weakref.ref(payload)

    pool = Pool()
    gc.collect()
    gc.disable()
    try:
        payload = await once()
        await pool.run(int)
        assert payload() is None
    finally:
        gc.enable()
    await pool.close()


@pytest.mark.asyncio
async def test_idle_threads_hold_no_buffers():
    class Payload(bytearray):
        pass

    pool = Pool()
    payload = Payload(100)
    assert await pool.run(len, payload) == 100
    alive = weakref.ref(payload)
    del payload
    assert alive() is None
    await pool.close()


@pytest.mark.asyncio
async def test_threads_start_with_need_and_end_with_the_last_pool():
    before = nb_open_fds()
    pool, other = Pool(), Pool()
    assert nb_io_threads() == 0
    await pool.run(int)
    await other.run(int)
    assert nb_io_threads() == 1
    gate = threading.Event()
    waiting = [asyncio.ensure_future(pool.run(gate.wait)) for _ in range(20)]
    await asyncio.sleep(0)
    assert nb_io_threads() == NB_THREADS
    gate.set()
    assert await asyncio.gather(*waiting) == [True] * 20
    await pool.close()
    assert nb_io_threads() == NB_THREADS
    await other.close()
    await other.close()
    assert nb_io_threads() == 0
    assert nb_open_fds() == before
    assert asyncio.get_running_loop() not in pool_module._workers


@pytest.mark.asyncio
async def test_a_closed_pool_refuses_work():
    pool = Pool()
    await pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        await pool.run(int)


@pytest.mark.asyncio
async def test_one_wake_up_for_many_ends(monkeypatch: pytest.MonkeyPatch):
    wakes = 0
    write = os.eventfd_write

    def counting_write(fd: int, value: int) -> None:
        nonlocal wakes
        wakes += 1
        write(fd, value)

    monkeypatch.setattr(os, "eventfd_write", counting_write)
    pool = Pool()
    calls = [asyncio.ensure_future(pool.run(int)) for _ in range(1000)]
    await asyncio.sleep(0)
    # The loop is held here, so it can't take the first end before the last.
    while pool._workers._queue.qsize():
        time.sleep(0.001)
    await asyncio.gather(*calls)
    assert wakes <= 1 + NB_THREADS
    await pool.close()


@pytest.mark.asyncio
async def test_waiters_wake_in_the_order_in_which_calls_end():
    pool = Pool()
    gates = [threading.Event() for _ in range(3)]
    ended: list[int] = []

    async def call(index: int) -> None:
        await pool.run(gates[index].wait)
        ended.append(index)

    tasks = [asyncio.ensure_future(call(i)) for i in range(3)]
    await asyncio.sleep(0)
    for index in (2, 0, 1):
        gates[index].set()
        await tasks[index]
    assert ended == [2, 0, 1]
    await pool.close()


@pytest.mark.asyncio
async def test_cancelling_waits_for_the_call():
    pool = Pool()
    gate, log = threading.Event(), []

    def call(buffer: bytearray) -> None:
        gate.wait()
        buffer[:] = b"done"
        log.append("ended")

    buffer = bytearray(4)
    task = asyncio.ensure_future(pool.run(call, buffer))
    await asyncio.sleep(0.01)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ["ended"]
    assert buffer == b"done"
    await pool.close()


@pytest.mark.asyncio
async def test_cancelling_a_call_that_fails_is_still_cancelling():
    pool = Pool()
    gate = threading.Event()

    def fails() -> None:
        gate.wait()
        raise OSError(5, "lost with the task")

    task = asyncio.ensure_future(pool.run(fails))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await pool.close()


@pytest.mark.asyncio
async def test_timeouts_work_around_a_call():
    pool = Pool()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await pool.run(time.sleep, 0.05)
    await pool.close()


@pytest.mark.asyncio
async def test_close_waits_even_when_cancelled():
    pool = Pool()
    gate = threading.Event()
    call = asyncio.ensure_future(pool.run(gate.wait))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(pool.close())
    await asyncio.sleep(0.01)
    closing.cancel()
    await asyncio.sleep(0.01)
    assert not closing.done()
    gate.set()
    assert await call is True
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert nb_io_threads() == 0


@pytest.mark.asyncio
async def test_works_on_when_no_thread_can_be_had(monkeypatch: pytest.MonkeyPatch):
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool = Pool()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            await pool.run(int)
    assert await pool.run(int) == 0
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert await asyncio.gather(*(pool.run(int) for _ in range(9))) == [0] * 9
    await pool.close()


@pytest.mark.asyncio
async def test_stress(seed: int):
    rng = random.Random(seed)
    pools = [Pool() for _ in range(3)]

    def call(value: int, pause: float) -> int:
        if pause:
            time.sleep(pause)
        if value % 7 == 0:
            raise ValueError(value)
        return value * 2

    async def one(value: int) -> None:
        pause = rng.choice([0, 0, 0, 0, 0.0001, 0.001])
        running = pools[value % 3].run(call, value, pause)
        try:
            if value % 11 == 0:
                async with asyncio.timeout(0.0005):
                    result = await running
            else:
                result = await running
            assert result == value * 2
        except ValueError:
            assert value % 7 == 0
        except TimeoutError:
            assert value % 11 == 0

    for start in range(0, 5000, 500):
        await asyncio.gather(*(one(v) for v in range(start, start + 500)))
    for pool in pools:
        await pool.close()
    assert nb_io_threads() == 0


def test_a_loop_has_its_own_threads():
    async def ident() -> set[int]:
        pool = Pool()
        idents = {await pool.run(threading.get_ident) for _ in range(3)}
        await pool.close()
        return idents

    assert len(asyncio.run(ident())) == 1
    assert len(asyncio.run(ident())) == 1


@pytest.mark.asyncio
async def test_knows_when_the_threads_have_enough_to_do():
    pool = Pool()
    gate = threading.Event()
    nb_spare = pool_module._NB_SPARE
    calls = []
    for nb_calls in range(nb_spare + 2):
        assert pool.is_saturated() == (nb_calls > nb_spare)
        calls.append(asyncio.create_task(pool.run(gate.wait)))
        await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*calls)
    assert not pool.is_saturated()
    await pool.close()

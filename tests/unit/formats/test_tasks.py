"""What images do beside requests: tasks that are waited for, and shared commits."""

import asyncio
import errno
import gc

import pytest

from nbdqcow.formats.tasks import ImageTasks, SharedCommits


@pytest.mark.asyncio
async def test_who_comes_while_a_commit_runs_shares_the_next():
    nb_commits = 0
    go_on = asyncio.Event()

    async def commit() -> None:
        nonlocal nb_commits
        nb_commits += 1
        await go_on.wait()

    commits = SharedCommits(commit)
    first = asyncio.create_task(commits.run())
    while not commits.running.locked():
        await asyncio.sleep(0)
    later = [asyncio.create_task(commits.run()) for _ in range(5)]
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(first, *later)
    assert nb_commits == 2


@pytest.mark.asyncio
async def test_a_commit_goes_on_without_its_caller_and_fails_for_all_others():
    async def commit() -> None:
        await asyncio.sleep(0.01)
        raise OSError(errno.ENOSPC, "no more")

    commits = SharedCommits(commit)
    callers = [asyncio.create_task(commits.run()) for _ in range(3)]
    await asyncio.sleep(0)
    callers[0].cancel()
    for caller, error in zip(
        callers, (asyncio.CancelledError, OSError, OSError), strict=True
    ):
        with pytest.raises(error):
            await caller


@pytest.mark.asyncio
async def test_settling_waits_for_operations_and_background_work(caplog):
    done = []
    tasks = ImageTasks("disk")

    async def work(name: str) -> str:
        await asyncio.sleep(0.01)
        done.append(name)
        return name

    async def fail() -> None:
        raise OSError(errno.ENOSPC, "no more")

    async def forever() -> None:
        await asyncio.sleep(3600)

    cancelled = asyncio.create_task(tasks.run_to_end(work("cancelled")))
    await asyncio.sleep(0)
    cancelled.cancel()
    tasks.spawn(fail())
    tasks.spawn_until_close(forever())
    assert await tasks.run_to_end(work("operation")) == "operation"
    await tasks.settle()
    tasks.cancel_until_close()
    assert sorted(done) == ["cancelled", "operation"]
    assert caplog.messages == ["disk: no more"]


@pytest.mark.asyncio
async def test_an_operation_that_fails_without_its_caller_is_one_line(caplog):
    """asyncio says nothing of it, which would be a traceback."""
    go_on = asyncio.Event()

    async def operate() -> None:
        await go_on.wait()
        raise OSError(errno.ENOSPC, "no more")

    tasks = ImageTasks("disk")
    caller = asyncio.create_task(tasks.run_to_end(operate()))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    go_on.set()
    await tasks.settle()
    del caller
    gc.collect()
    assert [record.getMessage() for record in caplog.records] == ["disk: no more"]

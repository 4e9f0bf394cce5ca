"""When a file's written data is durable, and what a failed sync means."""

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest

from nbdqcow.storage.file import FileStorage
from nbdqcow.storage.opening import CACHE_MODES
from tests.unit.storage.support import (
    MODES,
    make_file,
)


class Syncs:
    """Counts fdatasync calls, holds them or fails them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.gate = threading.Event()
        self.gate.set()
        self.errno = 0
        monkeypatch.setattr(os, "fdatasync", self)

    def __call__(self, fd: int) -> None:
        self.count += 1
        failing = self.errno
        assert self.gate.wait(10)
        if failing:
            raise OSError(failing, os.strerror(failing))


@pytest.mark.asyncio
async def test_flush_syncs_only_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    syncs = Syncs(monkeypatch)
    storage = await FileStorage.open(make_file(tmp_path, bytes(100)))
    # What others have written.
    await storage.flush()
    await storage.flush()
    assert syncs.count == 1
    changes = [
        lambda: storage.pwritev(0, [b"x"]),
        lambda: storage.write_zeroes(0, 5, may_unmap=True),
        lambda: storage.discard(0, 5),
        lambda: storage.truncate(200),
    ]
    for done, change in enumerate(changes, 2):
        await change()
        await storage.flush()
        await storage.flush()
        assert syncs.count == done
    assert storage.try_pwrite(0, b"x")
    await storage.flush()
    assert syncs.count == len(changes) + 2
    await storage.pwritev(0, [b"x"], fua=True)
    await storage.flush()
    assert syncs.count == len(changes) + 2
    await storage.close()


@pytest.mark.asyncio
async def test_who_may_write_again_flushes_what_others_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    syncs = Syncs(monkeypatch)
    storage = await FileStorage.open(make_file(tmp_path, bytes(100)), read_only=True)
    await storage.flush()
    assert syncs.count == 0
    for done in (1, 2):
        await storage.reopen(read_only=False)
        await storage.flush()
        await storage.flush()
        assert syncs.count == done
        await storage.reopen(read_only=True)
    await storage.close()


@pytest.mark.asyncio
async def test_flushes_share_a_sync_but_not_one_that_began_too_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    syncs = Syncs(monkeypatch)
    storage = await FileStorage.open(make_file(tmp_path))
    syncs.gate.clear()
    assert storage.try_pwrite(0, b"1")
    early = [asyncio.ensure_future(storage.flush()) for _ in range(5)]
    while syncs.count == 0:
        await asyncio.sleep(0.001)
    joined = asyncio.ensure_future(storage.flush())
    assert storage.try_pwrite(0, b"2")
    late = [asyncio.ensure_future(storage.flush()) for _ in range(5)]
    await asyncio.sleep(0.01)
    assert syncs.count == 1
    syncs.gate.set()
    await asyncio.gather(*early, joined, *late)
    assert syncs.count == 2
    await storage.close()


@pytest.mark.asyncio
async def test_a_cancelled_flush_leaves_the_others_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    syncs = Syncs(monkeypatch)
    storage = await FileStorage.open(make_file(tmp_path))
    syncs.gate.clear()
    assert storage.try_pwrite(0, b"1")
    leader = asyncio.ensure_future(storage.flush())
    follower = asyncio.ensure_future(storage.flush())
    while syncs.count == 0:
        await asyncio.sleep(0.001)
    leader.cancel()
    await asyncio.sleep(0.01)
    syncs.gate.set()
    await follower
    assert syncs.count == 2
    with pytest.raises(asyncio.CancelledError):
        await leader
    await storage.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_failed_sync_is_never_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cancelled: bool
):
    syncs = Syncs(monkeypatch)
    filename = make_file(tmp_path)
    storage = await FileStorage.open(filename)
    assert storage.try_pwrite(0, b"1")
    syncs.errno = errno.EIO
    if cancelled:
        syncs.gate.clear()
        flush = asyncio.ensure_future(storage.flush())
        while syncs.count == 0:
            await asyncio.sleep(0.001)
        flush.cancel()
        await asyncio.sleep(0.01)
        syncs.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await flush
    else:
        with pytest.raises(OSError, match=r"may be lost .Input/output error"):
            await storage.flush()
    syncs.errno = 0
    for _ in range(3):
        with pytest.raises(OSError, match="until it is opened anew") as caught:
            await storage.flush()
        assert caught.value.errno == errno.EIO
        with pytest.raises(OSError, match="may be lost"):
            await storage.pwritev(0, [b"2"], fua=True)
        await storage.pwritev(0, [b"3"])
    assert syncs.count == 1
    await storage.close()
    storage = await FileStorage.open(filename)
    assert storage.try_pwrite(0, b"4")
    await storage.flush()
    await storage.close()


class DurableWrites:
    """Stands for os.pwritev, failing those with RWF_DSYNC."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.durable = self.plain = 0
        self.durable_errno = self.plain_errno = 0
        self.real = os.pwritev
        monkeypatch.setattr(os, "pwritev", self)

    def __call__(self, fd: int, buffers: list, offset: int, flags: int = 0) -> int:
        if flags & os.RWF_DSYNC:
            self.durable += 1
            failing = self.durable_errno
        else:
            self.plain += 1
            failing = self.plain_errno
        if failing:
            raise OSError(failing, os.strerror(failing))
        return self.real(fd, buffers, offset, flags)


@pytest.mark.asyncio
@pytest.mark.parametrize("cache", MODES)
async def test_which_writes_are_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
):
    writes, syncs = DurableWrites(monkeypatch), Syncs(monkeypatch)
    storage = await FileStorage.open(make_file(tmp_path, bytes(8192)), cache=cache)
    through = CACHE_MODES[cache].write_through
    await storage.pwritev(0, [bytes(4096)])
    assert writes.durable == through
    assert storage.try_pwrite(0, b"x") is (cache in ("writeback", "unsafe"))
    await storage.pwritev(0, [bytes(4096)], fua=True)
    assert writes.durable == (0 if cache == "unsafe" else 1 + through)
    await storage.write_zeroes(0, 4096, may_unmap=True)
    assert syncs.count == through
    await storage.flush()
    # What others wrote may be in page cache.
    assert syncs.count == (0 if cache == "unsafe" else 1 + through)
    await storage.close()


@pytest.mark.asyncio
async def test_fua_without_dsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    writes, syncs = DurableWrites(monkeypatch), Syncs(monkeypatch)
    storage = await FileStorage.open(make_file(tmp_path))
    writes.durable_errno = errno.EOPNOTSUPP
    await storage.pwritev(0, [b"x"], fua=True)
    await storage.pwritev(0, [b"y"], fua=True)
    assert (writes.durable, writes.plain, syncs.count) == (1, 2, 2)
    assert await storage.pread(0, 1) == b"y"
    await storage.close()


@pytest.mark.asyncio
async def test_fua_that_fails_to_write_harms_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    writes = DurableWrites(monkeypatch)
    storage = await FileStorage.open(make_file(tmp_path))
    writes.durable_errno = writes.plain_errno = errno.ENOSPC
    with pytest.raises(OSError, match="No space left") as caught:
        await storage.pwritev(0, [b"x"], fua=True)
    assert caught.value.errno == errno.ENOSPC
    writes.durable_errno = writes.plain_errno = 0
    await storage.pwritev(0, [b"x"], fua=True)
    await storage.flush()
    await storage.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
async def test_fua_that_fails_to_sync_is_never_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
):
    writes = DurableWrites(monkeypatch)
    storage = await FileStorage.open(make_file(tmp_path))
    writes.durable_errno = error
    with pytest.raises(OSError, match="may be lost") as caught:
        await storage.pwritev(0, [b"x"], fua=True)
    assert caught.value.errno == error
    writes.durable_errno = 0
    with pytest.raises(OSError, match="may be lost"):
        await storage.flush()
    await storage.close()


@pytest.mark.asyncio
async def test_a_durable_write_that_has_the_error_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The kernel tells of lost data once: here to a durable write, whose thread
    has not come to saying so when fdatasync(2) succeeds in another."""
    syncs, told, told_us = Syncs(monkeypatch), threading.Event(), threading.Event()
    real = os.pwritev

    def pwritev(fd: int, buffers: list, offset: int, flags: int = 0) -> int:
        if not flags & os.RWF_DSYNC:
            return real(fd, buffers, offset, flags)
        told.set()
        assert told_us.wait(10)
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(os, "pwritev", pwritev)
    storage = await FileStorage.open(make_file(tmp_path))
    await storage.pwritev(0, [b"answered"])
    durable = asyncio.ensure_future(storage.pwritev(100, [b"x"], fua=True))
    while not told.is_set():
        await asyncio.sleep(0.001)
    flush = asyncio.ensure_future(storage.flush())
    while not syncs.count:
        await asyncio.sleep(0.001)
    # The thread that synced has ended when one that came after it has.
    for _ in range(8):
        await storage.pread(0, 1)
    done, _ = await asyncio.wait([flush], timeout=0.05)
    assert not done, "a flush succeeds over a loss that is known already"
    told_us.set()
    with pytest.raises(OSError, match="may be lost"):
        await flush
    with pytest.raises(OSError, match="may be lost"):
        await durable
    await storage.close()


@pytest.mark.asyncio
async def test_a_durable_write_beside_one_that_lost_data_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The other one was told of the loss, and it may be ours."""
    started, other_failed, real = threading.Event(), threading.Event(), os.pwritev

    def pwritev(fd: int, buffers: list, offset: int, flags: int = 0) -> int:
        if flags & os.RWF_DSYNC and offset:
            raise OSError(errno.EIO, "lost")
        if flags & os.RWF_DSYNC:
            started.set()
            assert other_failed.wait(10)
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "pwritev", pwritev)
    storage = await FileStorage.open(make_file(tmp_path))
    ours = asyncio.ensure_future(storage.pwritev(0, [b"ours"], fua=True))
    while not started.is_set():
        await asyncio.sleep(0.001)
    with pytest.raises(OSError, match="may be lost"):
        await storage.pwritev(4096, [b"other"], fua=True)
    other_failed.set()
    with pytest.raises(OSError, match="may be lost"):
        await ours
    await storage.close()

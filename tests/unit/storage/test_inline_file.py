"""What files do in the turn of the loop in which they are asked."""

import errno
import os
import random
import resource
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from nbdqcow.storage import inline_file as file_module
from nbdqcow.storage import mapped
from nbdqcow.storage.file import FileStorage
from nbdqcow.storage.linux import OVERLAYFS_MAGIC
from nbdqcow.storage.mapped import MIN_LENGTH
from nbdqcow.storage.overwrite import Overwriter
from tests.unit.storage.support import (
    drop_page_cache,
    make_file,
)

# -- inline reads --------------------------------------------------------------


@pytest.mark.asyncio
async def test_inline_reads_of_page_cache(directory: Path, seed: int):
    data = random.Random(seed).randbytes(300_000)
    storage = await FileStorage.open(make_file(directory, data))
    for offset, length in (
        (0, 4096),
        (4096, 4096),
        (1, 511),
        (0, 0),
        (1000, 100_000),
        (299_999, 1),
        (0, 131_072),
    ):
        assert storage.try_pread(offset, length) == data[offset : offset + length]
    assert storage.try_pread(0, 131_073) is None
    assert storage.try_pread(299_990, 100) == data[-10:] + bytes(90)
    assert storage.try_pread(300_000, 5) == bytes(5)
    assert storage.try_pread(1 << 40, 5) == bytes(5)
    first = storage.try_pread(0, 4096)
    assert storage.try_pread(8192, 4096) == data[8192:12288]
    assert first == data[:4096]
    await storage.close()


@pytest.mark.asyncio
async def test_inline_reads_do_not_wait_for_the_disk(tmp_path: Path, seed: int):
    data = random.Random(seed).randbytes(1 << 20)
    filename = make_file(tmp_path, data)
    storage = await FileStorage.open(filename)
    if not storage._read_flags:
        pytest.skip("the file system has no RWF_NOWAIT")
    drop_page_cache(filename)
    cold = [o for o in range(0, 1 << 20, 65536) if storage.try_pread(o, 65536) is None]
    assert cold
    for offset in cold:
        assert await storage.pread(offset, 65536) == data[offset : offset + 65536]
        assert storage.try_pread(offset, 65536) == data[offset : offset + 65536]
    await storage.close()


@pytest.mark.asyncio
async def test_a_partly_cached_range_is_not_cut_short(tmp_path: Path, seed: int):
    data = random.Random(seed).randbytes(1 << 20)
    filename = make_file(tmp_path, data)
    storage = await FileStorage.open(filename)
    if not storage._read_flags:
        pytest.skip("the file system has no RWF_NOWAIT")
    drop_page_cache(filename)
    fd = os.open(filename, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, 1, 512 * 1024)
    os.close(fd)
    got = storage.try_pread(512 * 1024, 65536)
    assert got is None or got == data[512 * 1024 : 512 * 1024 + 65536]
    await storage.close()


@pytest.mark.asyncio
async def test_reads_go_to_threads_where_nowait_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(fd: int, buffers: object, offset: int, flags: int = 0) -> int:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    filename = make_file(tmp_path, b"abc")
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", refuse)
        patch.setattr(file_module, "filesystem_type", lambda fd: 0x6969)
        storage = await FileStorage.open(filename)
    assert storage.try_pread(0, 3) is None
    assert await storage.pread(0, 3) == b"abc"
    await storage.close()


@pytest.mark.asyncio
async def test_mincore_stands_in_for_nowait_on_overlayfs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
):
    def refuse(fd: int, buffers: object, offset: int, flags: int = 0) -> int:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    data = random.Random(seed).randbytes(100_000)
    filename = make_file(tmp_path, data)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", refuse)
        patch.setattr(file_module, "filesystem_type", lambda fd: OVERLAYFS_MAGIC)
        storage = await FileStorage.open(filename)
    drop_page_cache(filename)
    assert storage.try_pread(0, 4096) is None
    await storage.pread(0, 100_000)
    for offset, length in ((0, 4096), (0, 100_000), (4000, 200), (99_999, 1)):
        assert storage.try_pread(offset, length) == data[offset : offset + length]
    assert storage.try_pread(99_999, 2) is None
    assert storage.try_pwrite(100_000, b"x" * 10_000)
    assert storage.try_pread(99_999, 10_001) == data[-1:] + b"x" * 10_000
    os.truncate(filename, 50_000)
    assert storage.try_pread(60_000, 10) is None
    await storage.close()


@pytest.mark.asyncio
async def test_reads_resume_after_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    storage = await FileStorage.open(make_file(tmp_path, b"0123456789"))
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, offset: real(fd, min(n, 3), offset))
    assert await storage.pread(1, 8) == b"12345678"
    assert await storage.pread(6, 10) == b"6789" + bytes(6)
    await storage.close()


# -- views ----------------------------------------------------------------------


@pytest.mark.asyncio
async def test_views_show_the_live_file(directory: Path, seed: int):
    data = random.Random(seed).randbytes(400_000)
    storage = await FileStorage.open(make_file(directory, data))
    await storage.pread(0, len(data))
    view = storage.try_view(5000, 100_000)
    assert view is not None
    assert view.readonly
    assert view.nbytes == 100_000
    assert view == data[5000:105_000]
    assert storage.try_pwrite(5000, b"changed")
    assert view[:7] == b"changed"
    await storage.close()
    assert view[:7] == b"changed"


@pytest.mark.asyncio
async def test_views_stay_within_the_file(directory: Path):
    storage = await FileStorage.open(make_file(directory, b"x" * 200_000))
    assert storage.try_view(0, 200_000) is not None
    assert storage.try_view(0, 200_001) is None
    assert storage.try_view(150_000, MIN_LENGTH) is None
    assert storage.try_view(0, MIN_LENGTH - 1) is None
    await storage.truncate(100_000)
    assert storage.try_view(0, 150_000) is None
    assert storage.try_view(0, 100_000) is not None
    await storage.pwritev(100_000, [b"y" * 100_000])
    view = storage.try_view(90_000, 110_000)
    assert view is not None
    assert view == b"x" * 10_000 + b"y" * 100_000
    await storage.close()


@pytest.mark.asyncio
async def test_views_do_not_wait_for_the_disk(tmp_path: Path):
    filename = make_file(tmp_path, b"x" * (1 << 20))
    storage = await FileStorage.open(filename)
    drop_page_cache(filename)
    assert storage.try_view(0, 1 << 20) is None
    await storage.pread(0, 1 << 20)
    assert storage.try_view(0, 1 << 20) is not None
    await storage.close()


@pytest.mark.asyncio
async def test_views_leave_no_mappings_and_bounded_memory(
    directory: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(mapped, "BUDGET", 8 << 20)
    filename = make_file(directory, bytes(32 << 20))
    storage = await FileStorage.open(filename)
    name = os.path.realpath(filename)

    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(name)

    def take(offset: int, length: int) -> memoryview:
        view = storage.try_view(offset, length)
        assert view is not None
        return view

    # What is touched over and over counts once.
    kept = [take(offset, 1 << 16) for offset in range(0, 2 << 20, 1 << 16)]
    assert mappings() == 1
    # A little of each large page is as much as all of it.
    kept = [take(offset, 1 << 16) for offset in range(0, 32 << 20, 2 << 20)]
    assert mappings() == 4
    kept = [take(offset, 4 << 20) for offset in range(0, 32 << 20, 4 << 20)]
    assert mappings() == 4
    kept.clear()
    assert mappings() == 1
    await storage.close()
    assert mappings() == 0


@pytest.mark.asyncio
async def test_a_view_does_not_keep_the_lock(directory: Path):
    filename = make_file(directory, b"x" * 100_000)
    storage = await FileStorage.open(filename)
    view = storage.try_view(0, 100_000)
    assert view is not None
    await storage.close()
    storage = await FileStorage.open(filename)
    await storage.close()


@pytest.mark.asyncio
async def test_no_views_where_mincore_would_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    filename = make_file(tmp_path, b"x" * 100_000)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    storage = await FileStorage.open(filename, read_only=True)
    assert storage.try_view(0, 100_000) is None
    await storage.close()


@pytest.mark.asyncio
async def test_no_views_past_the_page_cache(directory: Path):
    storage = await FileStorage.open(make_file(directory, b"x" * 100_000), cache="none")
    assert storage.try_view(0, 100_000) is None
    assert storage.try_pread(0, 512) is None
    assert storage.try_pwrite(0, b"x") is False
    await storage.prefetch(0, 100)
    await storage.close()


# -- writes ---------------------------------------------------------------------


@pytest.mark.asyncio
async def test_inline_writes(directory: Path):
    filename = make_file(directory, b"0123456789")
    storage = await FileStorage.open(filename)
    assert storage.try_pwrite(2, b"ab")
    assert storage.try_pwrite(9, memoryview(b"cdef"))
    assert storage.length == 13
    assert storage.try_pwrite(20, bytearray(b"g"))
    assert storage.length == 21
    assert storage.try_pwrite(0, bytes(file_module.MAX_INLINE_WRITE + 1)) is False
    assert storage.try_pwrite(0, b"") is True
    assert Path(filename).read_bytes() == b"01ab45678cdef" + bytes(7) + b"g"
    await storage.close()


class SlowDisk:
    """A clock and a disk: writes take ``cost`` seconds, waiting or not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.cost, self.waits = 1000.0, 0.0, False
        self.nb_waits = 0
        self.write = os.pwrite
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(os, "pwrite", self.pwrite)
        monkeypatch.setattr(Overwriter, "try_write", lambda *arguments: False)
        monkeypatch.setattr(resource, "getrusage", self.getrusage)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        self.now += self.cost
        self.nb_waits += self.waits
        return self.write(fd, data, offset)

    def getrusage(self, who: int) -> SimpleNamespace:
        assert who == resource.RUSAGE_THREAD
        return SimpleNamespace(ru_nvcsw=self.nb_waits)


@pytest.mark.asyncio
@pytest.mark.parametrize("cost", [0.003, 0.1])
async def test_writes_that_wait_for_the_disk_go_to_threads_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cost: float
):
    storage = await FileStorage.open(make_file(tmp_path))
    disk = SlowDisk(monkeypatch)

    def seconds_off() -> float:
        """Write slowly; return for how long inline writes are refused then."""
        disk.cost, disk.waits = cost, True
        nb_slow = 0
        while storage.try_pwrite(0, b"x"):
            nb_slow += 1
        assert 1 <= nb_slow <= 2
        disk.cost, disk.waits = 0.0, False
        start = disk.now
        while not storage.try_pwrite(0, b"x"):
            disk.now += 0.01
        return disk.now - start

    for expected in (0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0):
        assert seconds_off() == pytest.approx(expected, abs=0.02)
    disk.now += 2
    assert seconds_off() == pytest.approx(0.05, abs=0.02)
    for _ in range(100):
        assert storage.try_pwrite(0, b"x") is True
        assert storage.try_pwrite(0, bytes(file_module.MAX_INLINE_WRITE + 1)) is False
    disk.now += 2
    assert seconds_off() == pytest.approx(0.05, abs=0.02)
    await storage.close()


@pytest.mark.asyncio
async def test_writes_stay_inline_when_only_the_processor_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    storage = await FileStorage.open(make_file(tmp_path))
    disk = SlowDisk(monkeypatch)
    for index in range(1000):
        disk.cost = 0.05 if index % 5 == 0 else 0.0
        assert storage.try_pwrite(0, b"x") is True
    # A wait that is short is no harm either.
    disk.cost, disk.waits = 0.0001, True
    for _ in range(100):
        assert storage.try_pwrite(0, b"x") is True
    await storage.close()

import asyncio
import errno
import fcntl
import gc
import os
import random
import resource
import stat
import struct
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from nbdqcow.errors import ImageError, NotSupported, UsageError
from nbdqcow.storage import holes, mapped
from nbdqcow.storage import inline_file as file_module
from nbdqcow.storage.file import FileStorage
from nbdqcow.storage.linux import BLKDISCARD, OVERLAYFS_MAGIC, PAGE_SIZE
from nbdqcow.storage.mapped import MIN_LENGTH
from nbdqcow.storage.opening import CACHE_MODES
from nbdqcow.storage.overwrite import Overwriter

MODES = list(CACHE_MODES)
BUFFERED = ["writeback", "writethrough", "unsafe"]


def make_file(directory: Path, data: bytes = b"") -> str:
    path = directory / "disk"
    path.write_bytes(data)
    return str(path)


def drop_page_cache(filename: str) -> None:
    fd = os.open(filename, os.O_RDONLY)
    mapped_file = mapped.MappedFile(fd)
    os.fsync(fd)
    # It is only advice: pages that a processor has just put aside to move
    # between the kernel's lists stay. Others push them out of there.
    last = os.stat(filename).st_size - PAGE_SIZE
    cpus = os.sched_getaffinity(0)
    for _ in range(100):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if not mapped_file.is_resident(max(last, 0), 1):
            break
        for cpu in cpus:
            os.sched_setaffinity(0, {cpu})
            for index in range(40):
                Path(f"{filename}.{index}").write_bytes(b"x")
    os.sched_setaffinity(0, cpus)
    mapped_file.close()
    os.close(fd)


def allocated_bytes(filename: str) -> int:
    return os.stat(filename).st_blocks * 512


# -- opening -----------------------------------------------------------------


@pytest.mark.asyncio
async def test_opens_and_closes_without_leaving_anything(directory: Path):
    filename = make_file(directory, b"abc")
    fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for cache in MODES:
        storage = await FileStorage.open(filename, cache=cache)
        assert storage.length == 3
        assert storage.filename == filename
        assert storage.zero_beyond_end
        assert not storage.read_only
        await storage.close()
        await storage.close()
    assert len(os.listdir("/proc/self/fd")) == fds
    assert threading.active_count() == threads


@pytest.mark.asyncio
@pytest.mark.parametrize("cache", ["writeback", "none"])
async def test_says_why_it_can_not_open(tmp_path: Path, cache: str):
    fds = len(os.listdir("/proc/self/fd"))
    missing = str(tmp_path / "nope")
    with pytest.raises(ImageError) as caught:
        await FileStorage.open(missing, cache=cache)
    assert str(caught.value) == f"Could not open '{missing}': No such file or directory"
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        for read_only in (True, False):
            with pytest.raises(ImageError) as caught:
                await FileStorage.open(str(special), cache=cache, read_only=read_only)
            assert str(caught.value) == (
                f"Could not open '{special}': not a regular file or block device"
            )
    with pytest.raises(ImageError, match="null byte"):
        await FileStorage.open("a\0b", cache=cache)
    with pytest.raises(ImageError, match="File name too long"):
        await FileStorage.open("x" * 5000, cache=cache)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ImageError, match="Not a directory"):
        await FileStorage.open(str(tmp_path / "file" / "x"), cache=cache)
    assert len(os.listdir("/proc/self/fd")) == fds


@pytest.mark.asyncio
async def test_refuses_unknown_options(tmp_path: Path):
    filename = make_file(tmp_path)
    with pytest.raises(UsageError, match="invalid cache mode 'fast'"):
        await FileStorage.open(filename, cache="fast")
    with pytest.raises(UsageError, match="invalid discard mode 'maybe'"):
        await FileStorage.open(filename, discard="maybe")
    with pytest.raises(UsageError, match="only read-only"):
        await FileStorage.open(filename, shared=True)


@pytest.mark.asyncio
async def test_says_that_o_direct_is_not_to_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    filename = make_file(tmp_path)
    real = os.open

    def refuse(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ImageError, match="filesystem does not support O_DIRECT"):
        await FileStorage.open(filename, cache="none")


@pytest.mark.asyncio
async def test_a_cancelled_open_leaves_nothing(tmp_path: Path):
    filename = make_file(tmp_path)
    fds = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        task = asyncio.ensure_future(FileStorage.open(filename))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == fds
    storage = await FileStorage.open(filename)
    await storage.close()


@pytest.mark.asyncio
async def test_creates(directory: Path):
    filename = str(directory / "new")
    storage = await FileStorage.create(filename, 12345)
    assert storage.length == os.path.getsize(filename) == 12345
    assert storage.try_pwrite(0, b"x")
    await storage.close()
    storage = await FileStorage.create(filename, 10)
    assert await storage.pread(0, 10) == bytes(10)
    await storage.close()
    with pytest.raises(ImageError, match="No such file or directory"):
        await FileStorage.create(str(directory / "no" / "dir"))


@pytest.mark.asyncio
async def test_says_why_it_can_not_create(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(fd: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    fds = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "ftruncate", full)
    with pytest.raises(ImageError, match=r"Could not resize .*: No space left"):
        await FileStorage.create(str(tmp_path / "new"), 1 << 30)
    assert len(os.listdir("/proc/self/fd")) == fds


@pytest.mark.asyncio
@pytest.mark.parametrize("cache", MODES)
async def test_read_only_refuses_changes(directory: Path, cache: str):
    filename = make_file(directory, b"abc")
    storage = await FileStorage.open(filename, read_only=True, cache=cache)
    assert await storage.pread(0, 3) == b"abc"
    assert storage.try_pwrite(0, b"x") is False
    for change in (
        storage.pwritev(0, [b"x"]),
        storage.write_zeroes(0, 1, may_unmap=True),
        storage.discard(0, 1),
        storage.truncate(1),
        storage.truncate(100),
    ):
        with pytest.raises(OSError, match="read-only") as caught:
            await change
        assert caught.value.errno == errno.EBADF
    await storage.flush()
    assert storage.length == 3
    await storage.close()


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
    assert storage.try_pwrite(0, bytes(65537)) is False
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
        assert storage.try_pwrite(0, bytes(65537)) is False
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


@pytest.mark.asyncio
@pytest.mark.parametrize("cache", MODES)
async def test_many_buffers_and_short_writes(
    directory: Path, cache: str, seed: int, monkeypatch: pytest.MonkeyPatch
):
    rng = random.Random(seed)
    storage = await FileStorage.open(make_file(directory), cache=cache)
    buffers = [rng.randbytes(rng.randrange(40)) for _ in range(5000)]
    await storage.pwritev(100, buffers)
    data = b"".join(buffers)
    assert storage.length == 100 + len(data)
    assert await storage.pread(100, len(data)) == data
    if cache in BUFFERED:
        real = os.pwritev

        def short(fd, buffers, offset, flags=0):
            return real(fd, [memoryview(b)[:7] for b in buffers[:1]], offset, flags)

        monkeypatch.setattr(os, "pwritev", short)
        await storage.pwritev(3, [data[:1000], b"", data[1000:1001]], fua=True)
        assert await storage.pread(3, 1001) == data[:1001]
    await storage.close()


@pytest.mark.asyncio
async def test_the_end_of_the_disk_is_enospc(tmp_path: Path):
    storage = await FileStorage.open(make_file(tmp_path, b"x"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            await storage.pwritev(5000, [b"y" * 10_000])
        assert storage.length == 10_000
        assert storage.try_pwrite(9990, b"z" * 20) is False
        with pytest.raises(OSError, match="File too large"):
            storage.try_pwrite(10_000, b"z")
        with pytest.raises(OSError, match="File too large"):
            await storage.truncate(20_000)
        assert storage.length == 10_000
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    await storage.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("cache", ["writeback", "none"])
async def test_concurrent_appends_keep_each_other(
    directory: Path, cache: str, seed: int
):
    rng = random.Random(seed)
    filename = make_file(directory)
    storage = await FileStorage.open(filename, cache=cache)
    pieces, end = [], 0
    for _ in range(200):
        length = rng.choice([512, 4096, 65536, 100, 7000])
        pieces.append((end, rng.choice("wwwz"), length))
        end += length
    rng.shuffle(pieces)
    expected = bytearray(end)

    async def apply(start: int, kind: str, length: int) -> None:
        if kind == "z":
            await storage.write_zeroes(start, length, may_unmap=bool(start % 3))
        else:
            fill = bytes([start % 251 + 1]) * length
            expected[start : start + length] = fill
            await storage.pwritev(start, [fill])

    await asyncio.gather(*(apply(*piece) for piece in pieces))
    assert storage.length == end
    await storage.close()
    assert Path(filename).read_bytes() == expected


# -- durability -------------------------------------------------------------------


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
    await storage.flush()
    assert syncs.count == 0
    changes = [
        lambda: storage.pwritev(0, [b"x"]),
        lambda: storage.write_zeroes(0, 5, may_unmap=True),
        lambda: storage.discard(0, 5),
        lambda: storage.truncate(200),
    ]
    for done, change in enumerate(changes, 1):
        await change()
        await storage.flush()
        await storage.flush()
        assert syncs.count == done
    assert storage.try_pwrite(0, b"x")
    await storage.flush()
    assert syncs.count == len(changes) + 1
    await storage.pwritev(0, [b"x"], fua=True)
    await storage.flush()
    assert syncs.count == len(changes) + 1
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
    await storage.write_zeroes(0, 100, may_unmap=True)
    assert syncs.count == through
    await storage.flush()
    assert syncs.count == (0 if cache == "unsafe" else 1)
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


# -- zeroes and holes -----------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("cache", MODES)
async def test_zeroes_and_discards_free_space_or_keep_it(directory: Path, cache: str):
    filename = make_file(directory, b"x" * (1 << 20))
    storage = await FileStorage.open(filename, cache=cache)
    await storage.write_zeroes(65536, 65536, may_unmap=False, no_fallback=True)
    assert allocated_bytes(filename) >= 1 << 20
    await storage.write_zeroes(131072, 65536, may_unmap=True, no_fallback=True)
    await storage.discard(0, 65536)
    assert allocated_bytes(filename) <= (1 << 20) - 131072 + 4 * PAGE_SIZE
    data = await storage.pread(65536, 3 * 65536)
    assert data == bytes(131072) + b"x" * 65536
    assert storage.length == 1 << 20
    await storage.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("may_unmap", [False, True])
async def test_zeroes_past_the_end_grow_the_file(directory: Path, may_unmap: bool):
    filename = make_file(directory, b"x" * 1000)
    storage = await FileStorage.open(filename)
    await storage.write_zeroes(500, 10_000, may_unmap=may_unmap)
    assert storage.length == os.path.getsize(filename) == 10_500
    await storage.write_zeroes(0, 0, may_unmap=may_unmap)
    await storage.discard(10_000, 1 << 30)
    assert storage.length == os.path.getsize(filename) == 10_500
    assert Path(filename).read_bytes() == b"x" * 500 + bytes(10_000)
    await storage.close()


@pytest.mark.asyncio
async def test_discard_ignore_keeps_space(directory: Path):
    filename = make_file(directory, b"x" * 65536)
    storage = await FileStorage.open(filename, discard="ignore")
    await storage.discard(0, 65536)
    assert await storage.pread(0, 65536) == b"x" * 65536
    await storage.write_zeroes(0, 65536, may_unmap=True)
    assert allocated_bytes(filename) >= 65536
    await storage.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("cache", MODES)
@pytest.mark.parametrize("may_unmap", [False, True])
async def test_zeroes_are_written_where_fallocate_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str, may_unmap: bool
):
    def refuse(fd: int, mode: int, offset: int, length: int) -> None:
        nonlocal calls
        calls += 1
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    calls = 0
    filename = make_file(tmp_path, b"x" * 100_000)
    storage = await FileStorage.open(filename, cache=cache)
    monkeypatch.setattr(holes, "fallocate", refuse)
    with pytest.raises(NotSupported) as caught:
        await storage.write_zeroes(
            1000, 20 << 20, may_unmap=may_unmap, no_fallback=True
        )
    assert caught.value.errno == errno.ENOTSUP
    assert storage.length == 100_000
    await storage.write_zeroes(1000, 20 << 20, may_unmap=may_unmap)
    await storage.write_zeroes(5, 7, may_unmap=may_unmap)
    await storage.discard(0, 5)
    assert calls == 2
    assert storage.length == 1000 + (20 << 20)
    await storage.close()
    data = Path(filename).read_bytes()
    assert data == b"x" * 5 + bytes(7) + b"x" * 988 + bytes(20 << 20)


@pytest.mark.asyncio
@pytest.mark.parametrize("cache", ["writeback", "none"])
async def test_growth_where_only_holes_can_be_punched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
):
    real = holes.fallocate

    def refuse(fd: int, mode: int, offset: int, length: int) -> None:
        if not mode & 0x02:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        real(fd, mode, offset, length)

    filename = make_file(tmp_path, b"x" * 1000)
    storage = await FileStorage.open(filename, cache=cache)
    monkeypatch.setattr(holes, "fallocate", refuse)
    await storage.write_zeroes(900, 123_456, may_unmap=True, no_fallback=True)
    assert storage.length == os.path.getsize(filename) == 900 + 123_456
    assert await storage.pread(890, 20) == b"x" * 10 + bytes(10)
    await storage.close()


@pytest.mark.asyncio
async def test_other_errors_of_fallocate_are_the_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    storage = await FileStorage.open(make_file(tmp_path, b"x" * 1000))
    monkeypatch.setattr(holes, "fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        await storage.write_zeroes(0, 5000, may_unmap=False)
    assert storage.length == 1000
    await storage.close()


@pytest.mark.asyncio
async def test_block_status_tells_holes(directory: Path):
    filename = make_file(directory)
    fd = os.open(filename, os.O_RDWR)
    os.pwrite(fd, b"x" * 65536, 131072)
    os.truncate(fd, 1 << 20)
    os.close(fd)
    storage = await FileStorage.open(filename)
    assert await storage.block_status(0, 1 << 20) == (False, 131072)
    assert await storage.block_status(4096, 100) == (False, 100)
    assert await storage.block_status(131072, 1 << 20) == (True, 65536)
    assert await storage.block_status(131073, 100) == (True, 100)
    assert await storage.block_status(1 << 19, 1 << 19) == (False, 1 << 19)
    assert await storage.block_status(1 << 30, 5) == (False, 5)
    await storage.close()


@pytest.mark.asyncio
async def test_many_extents_at_once(directory: Path):
    path = directory / "striped"
    with path.open("wb") as file:
        for index in range(100):
            file.seek(index * 131072)
            file.write(b"x" * 65536)
        file.truncate(100 * 131072)
    storage = await FileStorage.open(str(path), read_only=True)
    found = await storage.extents(0, 100 * 131072, 1000)
    assert found == [(True, 65536), (False, 65536)] * 100
    assert await storage.extents(0, 100 * 131072, 3) == found[:3]
    assert await storage.extents(65535, 3, 9) == [(True, 1), (False, 2)]
    await storage.close()


@pytest.mark.asyncio
async def test_block_status_where_holes_are_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    storage = await FileStorage.open(make_file(tmp_path, bytes(100)))

    def refuse(fd: int, offset: int, whence: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    with monkeypatch.context() as patch:
        patch.setattr(os, "lseek", refuse)
        assert await storage.block_status(0, 50) == (True, 50)
    await storage.close()


@pytest.mark.asyncio
async def test_prefetch_brings_pages(tmp_path: Path):
    filename = make_file(tmp_path, b"x" * (1 << 20))
    drop_page_cache(filename)
    storage = await FileStorage.open(filename)
    await storage.prefetch(0, 0)
    await storage.prefetch(0, 1 << 20)
    for _ in range(500):
        if storage.try_view(0, 1 << 20) is not None:
            break
        await asyncio.sleep(0.01)
    assert storage.try_view(0, 1 << 20) is not None
    await storage.close()


# -- the end ---------------------------------------------------------------------


@pytest.mark.asyncio
async def test_close_waits_for_writes_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    filename = make_file(tmp_path)
    storage = await FileStorage.open(filename)
    gate, real = threading.Event(), os.pwritev

    def slow(fd, buffers, offset, flags=0):
        gate.wait(10)
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "pwritev", slow)
    write = asyncio.ensure_future(storage.pwritev(0, [b"late"]))
    await asyncio.sleep(0.01)
    write.cancel()
    closing = asyncio.ensure_future(storage.close())
    await asyncio.sleep(0.02)
    assert not closing.done()
    gate.set()
    await closing
    with pytest.raises(asyncio.CancelledError):
        await write
    assert storage.length == 4
    assert Path(filename).read_bytes() == b"late"
    with pytest.raises(OSError, match="Bad file descriptor"):
        storage.try_pread(0, 1)


@pytest.mark.asyncio
async def test_a_cancelled_close_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    filename = make_file(tmp_path)
    fds = len(os.listdir("/proc/self/fd"))
    storage = await FileStorage.open(filename)
    gate, real = threading.Event(), os.pwritev

    def slow(fd, buffers, offset, flags=0):
        gate.wait(10)
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "pwritev", slow)
    write = asyncio.ensure_future(storage.pwritev(0, [b"late"]))
    await asyncio.sleep(0.01)
    closing = [asyncio.ensure_future(storage.close()) for _ in range(3)]
    await asyncio.sleep(0.01)
    for _ in range(2):
        closing[0].cancel()
        await asyncio.sleep(0.01)
        assert not closing[0].done()
    gate.set()
    await write
    with pytest.raises(asyncio.CancelledError):
        await closing[0]
    await asyncio.gather(*closing[1:])
    assert len(os.listdir("/proc/self/fd")) == fds
    # And its locks are gone.
    await (await FileStorage.open(filename)).close()


# -- block devices ------------------------------------------------------------------


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file that passes for a block device."""
    monkeypatch.setattr(stat, "S_ISBLK", lambda mode: True)
    monkeypatch.setattr(stat, "S_ISREG", lambda mode: False)
    return make_file(tmp_path, b"x" * 65536)


@pytest.mark.asyncio
async def test_a_device_keeps_its_length(device: str):
    storage = await FileStorage.open(device)
    assert not storage.zero_beyond_end
    assert storage.length == 65536
    await storage.truncate(65536)
    await storage.truncate(5)
    assert storage.length == 65536
    with pytest.raises(OSError, match="can't grow") as caught:
        await storage.truncate(65537)
    assert caught.value.errno == errno.ENOTSUP
    with pytest.raises(ImageError, match="is a device and can't grow"):
        await FileStorage.create(device, 65537, locking=False)
    assert await storage.block_status(5, 100) == (True, 100)
    assert storage.try_view(0, 65536) is None
    await storage.close()
    storage = await FileStorage.create(device, 4096)
    assert await storage.pread(0, 65536) == b"x" * 65536
    await storage.close()


@pytest.mark.asyncio
async def test_a_device_discards_whole_blocks(
    device: str, monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def ioctl(fd: int, request: int, argument: bytes) -> None:
        calls.append((request, struct.unpack("QQ", argument)))
        if failing:
            raise OSError(failing, os.strerror(failing))

    failing = 0
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    storage = await FileStorage.open(device)
    await storage.discard(1, 10_000)
    await storage.discard(4097, 8190)
    await storage.discard(61440, 1 << 20)
    assert calls == [(BLKDISCARD, (4096, 4096)), (BLKDISCARD, (61440, 4096))]
    failing = errno.EOPNOTSUPP
    await storage.discard(0, 4096)
    failing = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        await storage.discard(0, 4096)
    await storage.close()


@pytest.mark.asyncio
async def test_a_device_zeroes(device: str, monkeypatch: pytest.MonkeyPatch):
    modes = []

    def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
        modes.append(mode)
        if offset % 512 or length % 512:
            raise OSError(errno.EINVAL, "Invalid argument")
        os.pwrite(fd, bytes(length), offset)

    monkeypatch.setattr(holes, "fallocate", fallocate)
    storage = await FileStorage.open(device)
    await storage.write_zeroes(0, 512, may_unmap=True, no_fallback=True)
    await storage.write_zeroes(512, 512, may_unmap=False)
    with pytest.raises(NotSupported):
        await storage.write_zeroes(1024, 512, may_unmap=False, no_fallback=True)
    with pytest.raises(NotSupported):
        await storage.write_zeroes(1024, 1, may_unmap=True, no_fallback=True)
    await storage.write_zeroes(1024, 1, may_unmap=True)
    # The first is a hole, the second stays allocated; odd ranges try both.
    assert modes == [3, 16, 3, 3, 16]
    assert await storage.pread(0, 1026) == bytes(1025) + b"x"
    await storage.close()

import asyncio
import contextlib
import errno
import fcntl
import gc
import os
import random
import resource
import socket
import stat
import struct
import threading
from pathlib import Path

import pytest

from nbdqcow.block.storage import WriteBlocking
from nbdqcow.errors import ImageError, NotSupported, UsageError
from nbdqcow.storage import holes
from nbdqcow.storage.file import FileStorage
from nbdqcow.storage.linux import BLKDISCARD, PAGE_SIZE
from tests.unit.storage.support import (
    BUFFERED,
    MODES,
    allocated_bytes,
    drop_page_cache,
    make_file,
)

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
async def test_says_why_it_can_not_open(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
):
    fds = len(os.listdir("/proc/self/fd"))
    missing = str(tmp_path / "nope")
    with pytest.raises(ImageError) as caught:
        await FileStorage.open(missing, cache=cache)
    assert str(caught.value) == f"Could not open '{missing}': No such file or directory"
    os.mkfifo(tmp_path / "pipe")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(tmp_path / "socket"))
    for special in (
        *(tmp_path, tmp_path / "pipe", tmp_path / "socket"),
        Path("/dev/zero"),
    ):
        for read_only in (True, False):
            with pytest.raises(ImageError) as caught:
                await FileStorage.open(str(special), cache=cache, read_only=read_only)
            reason = f"'file' driver requires '{special}' to be a regular file"
            if special == tmp_path and not read_only:
                reason = "Is a directory"
            elif special.name == "socket":
                reason = "No such device or address"
            assert str(caught.value) == f"Could not open '{special}': {reason}"
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *arguments, **options: False)
        with pytest.raises(ImageError, match="Permission denied"):
            await FileStorage.open(str(tmp_path), cache=cache, read_only=True)
    with pytest.raises(ImageError, match="embedded null"):
        await FileStorage.open("a\0b", cache=cache)
    with pytest.raises(ImageError, match="File name too long"):
        await FileStorage.open("x" * 5000, cache=cache)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ImageError, match="Not a directory"):
        await FileStorage.open(str(tmp_path / "file" / "x"), cache=cache)
    assert len(os.listdir("/proc/self/fd")) == fds


@pytest.mark.asyncio
async def test_the_null_device_is_an_empty_disk():
    storage = await FileStorage.open("/dev/null")
    assert (storage.length, storage.room(), storage.fixed_as) == (0, 0, "device files")
    await storage.flush()
    with pytest.raises(OSError, match="Bad file descriptor"):
        await storage.pwritev(0, (b"x",))
    await storage.close()


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


# -- writes ---------------------------------------------------------------------


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
async def test_a_hole_tells_nothing_of_the_disks_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What is read from a hole does not come from the disk: any length will do. The
    same length is refused when it is written."""
    filename = make_file(tmp_path)
    os.truncate(filename, 1 << 20)

    unit = 1

    def read(fd, buffers, offset, flags=0):
        if offset % unit or len(buffers[0]) % unit:
            raise OSError(errno.EINVAL, "Invalid argument")
        return len(buffers[0])

    monkeypatch.setattr(os, "preadv", read)
    for size, alignment in ((1, 4096), (512, 512), (2048, 2048), (4096, 4096)):
        unit = size
        storage = await FileStorage.open(filename, cache="none")
        assert storage.read_alignment == alignment
        await storage.close()


@pytest.mark.asyncio
async def test_past_the_page_cache_parts_of_blocks_are_written_as_zeroes(
    tmp_path: Path,
):
    filename = make_file(tmp_path)
    os.truncate(filename, 10 * PAGE_SIZE + 10)
    storage = await FileStorage.open(filename, cache="none")
    await storage.pwritev(4 * PAGE_SIZE, [b"x" * 4 * PAGE_SIZE])
    await storage.write_zeroes(10 * PAGE_SIZE, 10, may_unmap=True)
    await storage.write_zeroes(0, PAGE_SIZE, may_unmap=True)
    assert allocated_bytes(filename) == 4 * PAGE_SIZE
    await storage.write_zeroes(PAGE_SIZE + 7, 1, may_unmap=True)
    assert allocated_bytes(filename) == 5 * PAGE_SIZE
    await storage.write_zeroes(5 * PAGE_SIZE - 3, 2 * PAGE_SIZE + 6, may_unmap=True)
    assert allocated_bytes(filename) == 3 * PAGE_SIZE
    data = bytes(await storage.pread(4 * PAGE_SIZE, 4 * PAGE_SIZE))
    assert data == b"x" * (PAGE_SIZE - 3) + bytes(2 * PAGE_SIZE + 6) + b"x" * (
        PAGE_SIZE - 3
    )
    assert storage.length == 10 * PAGE_SIZE + 10
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
@pytest.mark.parametrize("failure", [None, errno.ENOSPC, errno.EOPNOTSUPP])
async def test_threads_take_space_for_what_they_write_and_no_more(
    directory: Path, monkeypatch: pytest.MonkeyPatch, failure: int | None
):
    def fail(fd: int, mode: int, offset: int, length: int) -> None:
        assert failure is not None
        raise OSError(failure, os.strerror(failure))

    def work(write: WriteBlocking) -> None:
        for index in range(1, 8, 2):
            write(index << 18, b"x" * (1 << 18))

    filename = make_file(directory, b"y" * 1000)
    storage = await FileStorage.open(filename)
    # Without a test, on ext4 alone.
    storage._reserves = True
    if failure is not None:
        monkeypatch.setattr(holes, "fallocate", fail)
    await storage.write_by(1 << 18, 1 << 22, work)
    # Not as long as the range, and with holes, as by writes alone.
    assert os.path.getsize(filename) == 9 << 18
    assert (1 << 20) + 4096 <= allocated_bytes(filename) <= (1 << 20) + (1 << 16)
    await storage.close()
    data = Path(filename).read_bytes()
    assert data == b"y" * 1000 + bytes((1 << 19) - 1000) + b"".join(
        (b"x" * (1 << 18), bytes(1 << 18))[index % 2] for index in range(7)
    )


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
    for _ in range(50):
        # A kernel that is short of memory may not do it at once, or at all.
        await storage.prefetch(0, 1 << 20)
        await asyncio.sleep(0.1)
        if found := storage.try_view(0, 1 << 20):
            break
    assert found is not None
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

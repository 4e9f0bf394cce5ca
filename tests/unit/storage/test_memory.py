import errno

import pytest

from nbdqcow.errors import ImageError
from nbdqcow.storage.memory import MemoryStorage
from nbdqcow.storage.null import NullStorage


@pytest.mark.asyncio
async def test_memory_reads_what_was_written():
    storage = MemoryStorage(b"0123456789")
    assert storage.length == 10
    assert storage.try_pread(2, 3) == b"234"
    assert storage.try_pwrite(8, memoryview(b"abcd")) is True
    assert storage.length == 12
    await storage.pwritev(14, [b"x", bytearray(b"y"), b""], fua=True)
    assert storage.data == b"01234567abcd\0\0xy"
    assert await storage.pread(13, 5) == b"\0xy\0\0"
    assert storage.try_pread(100, 2) == b"\0\0"
    assert storage.try_view(0, 4) is None
    await storage.flush()
    await storage.close()
    assert len(storage.data) == storage.length == 16


@pytest.mark.asyncio
async def test_memory_zeroes_discards_and_truncates():
    storage = MemoryStorage(b"x" * 10)
    await storage.write_zeroes(1, 2, may_unmap=True, no_fallback=True)
    await storage.discard(5, 1)
    await storage.discard(9, 100)
    await storage.discard(50, 1)
    assert storage.data == b"x\0\0xx\0xxx\0"
    await storage.write_zeroes(9, 3, may_unmap=False)
    assert storage.length == 12
    await storage.truncate(4)
    await storage.truncate(6)
    assert storage.data == b"x\0\0x\0\0"
    assert storage.length == 6
    assert await storage.block_status(0, 6) == (True, 6)
    await storage.prefetch(0, 6)


@pytest.mark.asyncio
async def test_memory_is_full_at_its_limit():
    storage = MemoryStorage(max_length=100)
    with pytest.raises(OSError, match="limited to 100 bytes") as caught:
        await storage.pwritev(99, [b"ab"])
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError):
        await storage.truncate(101)
    assert storage.length == 0


@pytest.mark.asyncio
async def test_memory_read_only_refuses_changes():
    storage = MemoryStorage(b"abc", read_only=True)
    for change in (
        storage.pwritev(0, [b"x"]),
        storage.write_zeroes(0, 1, may_unmap=True),
        storage.discard(0, 1),
        storage.truncate(1),
    ):
        with pytest.raises(OSError, match="read-only"):
            await change
    with pytest.raises(OSError, match="read-only"):
        storage.try_pwrite(0, b"x")
    assert storage.data == b"abc"


@pytest.mark.asyncio
async def test_null_reads_zeroes_and_swallows_writes():
    storage = NullStorage(1 << 40)
    assert storage.try_pread(1 << 39, 3) == bytes(3)
    assert await storage.pread(5, 4) == bytes(4)
    assert storage.try_pwrite(0, b"x" * 10) is True
    await storage.pwritev(0, [b"x"])
    assert storage.try_pread(0, 10) == bytes(10)
    assert storage.length == 1 << 40
    view = storage.try_view(4096, 65536)
    assert view is not None
    assert view == bytes(65536)
    assert view.readonly
    assert storage.try_view((1 << 40) - 1, 2) is None
    assert storage.try_view(0, 1 << 30) is None
    assert await storage.block_status(0, 100) == (False, 100)
    await storage.discard(0, 10)
    await storage.flush()
    await storage.close()


@pytest.mark.asyncio
async def test_null_keeps_its_length():
    storage = NullStorage()
    storage.try_pwrite(5, b"x")
    assert storage.length == 6
    await storage.pwritev(6, [b"xy", b"z"])
    assert storage.length == 9
    await storage.write_zeroes(9, 1, may_unmap=False)
    assert storage.length == 10
    await storage.truncate(3)
    assert storage.length == 3


@pytest.mark.asyncio
async def test_null_has_a_name():
    storage = await NullStorage.open("null-co://", read_only=True)
    assert (storage.length, storage.read_only) == (1 << 30, True)
    assert await storage.allocated_length() == 0
    assert (await NullStorage.open("null-aio://?size=3k")).length == 3072


@pytest.mark.asyncio
async def test_null_that_takes_its_time():
    storage = await NullStorage.open("null-co://?latency-ns=1000")
    assert storage.try_pread(0, 1) is None
    assert storage.try_view(0, 1) is None
    assert storage.try_pwrite(0, b"x") is False
    await storage.pwritev(0, [b"x"])
    assert await storage.pread(0, 1) == b"\0"
    await storage.flush()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("null-co:a", "The only allowed filename for this driver is 'null-co://'"),
        ("null-co://?size=x", "Parameter 'size': invalid size 'x'"),
        ("null-co://?size=8E", "too large"),
        ("null-co://?a=1", "no option 'a'"),
    ],
)
async def test_null_has_no_other_names(name, text):
    with pytest.raises(ImageError, match=text):
        await NullStorage.open(name)

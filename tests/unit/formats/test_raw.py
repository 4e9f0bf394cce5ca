from pathlib import Path

import pytest

from nbdqcow.errors import BlockError, ImageError, NotSupported
from nbdqcow.formats.raw import RawDriver
from nbdqcow.storage.file import FileStorage
from nbdqcow.storage.memory import MemoryStorage
from nbdqcow.types import DATA, ZERO


async def open_raw(storage, read_only=False, **options):
    return await RawDriver.open(storage, read_only=read_only, options=options)


@pytest.mark.asyncio
async def test_is_the_file():
    storage = MemoryStorage(bytes(1000))
    raw = await open_raw(storage)
    assert raw.size == 1000
    assert raw.storage is raw.data is storage
    assert not raw.read_only
    assert raw.backing_filename is None
    assert raw.try_map(10, 20) == await raw.map(10, 20) == (DATA, 10, 20)
    assert raw.try_map_write(10, 20) == 10
    plan = await raw.begin_write(5, 7)
    assert (plan.guest_offset, plan.length, plan.host_offset) == (5, 7, 5)
    assert (plan.head, plan.tail) == (0, 0)
    raw.end_write(plan)
    raw.abort_write(await raw.begin_write(5, 7))
    await raw.close()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("options", "offset", "size"),
    [
        ({"offset": 100}, 100, 900),
        ({"offset": 100, "size": 50}, 100, 50),
        ({"size": 1000}, 0, 1000),
        ({"size": "0", "offset": "1000"}, 1000, 0),
        ({"offset": "0x10", "size": "512"}, 16, 512),
        ({"offset": None, "size": None}, 0, 1000),
    ],
)
async def test_windows(options: dict[str, object], offset: int, size: int):
    raw = await open_raw(MemoryStorage(bytes(1000)), **options)
    assert raw.size == size
    assert raw.try_map(0, 5) == await raw.map(0, 5) == (DATA, offset, 5)
    assert raw.try_map_write(3, 5) == offset + 3
    if size:
        plan = await raw.begin_write(3, 5)
        assert plan.host_offset == offset + 3
        raw.end_write(plan)
    with pytest.raises(BlockError, match="smaller"):
        await raw.begin_write(size, 1)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offset": 1001}, r"Offset \(1001\) cannot be greater than size of the "),
        (
            {"offset": 1, "size": 1000},
            r"The sum of offset \(1\) and size \(1000\) has to be smaller",
        ),
        (
            {"size": "1k"},
            r"The sum of offset \(0\) and size \(1024\) has to be smaller",
        ),
        ({"size": -1}, "Parameter 'size' expects a non-negative number"),
        ({"offset": "-1"}, "Parameter 'offset' expects a non-negative number"),
        ({"offset": 1.5}, "Parameter 'offset' expects a non-negative number"),
        ({"offset": "much"}, "Parameter 'offset' expects a non-negative number"),
    ],
)
async def test_refuses_windows_outside_the_file(
    options: dict[str, object], message: str
):
    with pytest.raises(ImageError, match=message):
        await open_raw(MemoryStorage(bytes(1000)), **options)


@pytest.mark.asyncio
async def test_changes_stay_within_the_window():
    storage = MemoryStorage(b"x" * 100)
    raw = await open_raw(storage, offset=10, size=20)
    await raw.write_zeroes(0, 5, may_unmap=True, no_fallback=True)
    await raw.discard(15, 5)
    await raw.flush()
    assert storage.data == b"x" * 10 + bytes(5) + b"x" * 10 + bytes(5) + b"x" * 70
    await raw.close()


@pytest.mark.asyncio
async def test_holes_of_the_file_are_zeroes(tmp_path: Path):
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(1 << 20)
        file.seek(131072)
        file.write(b"x" * 65536)
    storage = await FileStorage.open(str(path))
    raw = await open_raw(storage, offset=65536)
    assert raw.size == (1 << 20) - 65536
    assert raw.try_map(0, 1 << 18) == (DATA, 65536, 1 << 18)
    assert await raw.map(0, 1 << 18) == (ZERO, 65536, 65536)
    assert await raw.map(65536, 1 << 18) == (DATA, 131072, 65536)
    await raw.write_zeroes(65536, 65536, may_unmap=True, no_fallback=True)
    assert await raw.map(0, 1 << 18) == (ZERO, 65536, 1 << 18)
    await raw.close()
    await storage.close()


@pytest.mark.asyncio
async def test_passes_on_that_zeroes_must_be_written():
    class Slow(MemoryStorage):
        async def write_zeroes(self, offset, length, *, may_unmap, no_fallback=False):
            if no_fallback:
                raise NotSupported("slow")
            await super().write_zeroes(offset, length, may_unmap=may_unmap)

    storage = Slow(b"x" * 10)
    raw = await open_raw(storage)
    with pytest.raises(NotSupported):
        await raw.write_zeroes(0, 5, may_unmap=False, no_fallback=True)
    await raw.write_zeroes(0, 5, may_unmap=False, no_fallback=False)
    assert storage.data == bytes(5) + b"x" * 5


@pytest.mark.asyncio
async def test_a_read_only_image_is_closed_untouched():
    class Unflushable(MemoryStorage):
        async def flush(self) -> None:
            raise AssertionError

    raw = await open_raw(Unflushable(b"abc"), read_only=True)
    assert raw.read_only
    await raw.close()

"""Jobs on disks in memory: what they copy, find, report, and leave behind."""

import asyncio
import errno
import gc
import itertools
import os
import random
import time

import pytest

from nbdqcow.block.node import Node
from nbdqcow.block.open import open_image
from nbdqcow.cli.img import main
from nbdqcow.errors import BlockError
from nbdqcow.formats.qcow2.create import CreateOptions, create
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.formats.raw import RawDriver
from nbdqcow.jobs.commit import commit
from nbdqcow.jobs.compare import CompareError, Comparison, compare
from nbdqcow.jobs.control import Flight, JobCancelled, JobControl
from nbdqcow.jobs.convert import convert
from nbdqcow.jobs.copy import copy
from nbdqcow.jobs.errors import CopyError
from nbdqcow.jobs.map import HAS_DATA, HAS_OFFSET, IS_PRESENT, IS_ZERO, map_disk
from nbdqcow.jobs.pieces import ConvertOptions
from nbdqcow.jobs.stream import stream
from nbdqcow.jobs.zeroes import data_runs, is_zero
from nbdqcow.storage.memory import MemoryStorage
from tests.conftest import SEED

MiB = 1 << 20

pytestmark = pytest.mark.asyncio


class BadStorage(MemoryStorage):
    """A file with a sector that can't be read, and one not written."""

    bad_read = -1
    bad_write = -1

    def try_pread(self, offset, length):
        if offset <= self.bad_read < offset + length:
            return None
        return super().try_pread(offset, length)

    async def pread(self, offset, length):
        if offset <= self.bad_read < offset + length:
            raise BlockError(5, "bad sector")
        return await super().pread(offset, length)

    def try_pwrite(self, offset, data):
        if offset <= self.bad_write < offset + len(data):
            return False
        return super().try_pwrite(offset, data)

    async def pwritev(self, offset, buffers, *, fua=False):
        if offset <= self.bad_write < offset + sum(map(len, buffers)):
            raise BlockError(28, "no room")
        await super().pwritev(offset, buffers, fua=fua)


async def raw(data, **options):
    storage = BadStorage(data)
    for name, value in options.items():
        setattr(storage, name, value)
    return Node(
        await RawDriver.open(storage, read_only=False, options={}), filename="raw"
    )


async def qcow2(size, backing=None, **options):
    storage = MemoryStorage()
    if backing is not None:
        options |= {"backing_file": "below", "backing_format": "raw"}
    await create(storage, CreateOptions(size=size, **options))
    driver = await Qcow2Driver.open(storage, read_only=False, options={})
    return Node(driver, filename="qcow2", backing=backing)


def some_data(rng, nb_pieces=40, piece=32768):
    kinds = [
        bytes(piece),
        rng.randbytes(piece),
        rng.randbytes(700) + bytes(piece - 700),
    ]
    return b"".join(rng.choice(kinds) for _ in range(nb_pieces))


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("sparse", [0, 512, 4096, 65536])
@pytest.mark.parametrize("compressed", [True, False])
async def test_convert_to_qcow2(in_order, sparse, compressed):
    rng = random.Random(SEED)
    data = some_data(rng) + rng.randbytes(512 * 3)
    source, target = await raw(data), await qcow2(len(data))
    options = ConvertOptions(
        sparse=sparse, compressed=compressed, target_is_zero=True, in_order=in_order
    )
    control = JobControl()
    await convert([source], target, options, control)
    assert bytes(await target.pread(0, len(data))) == data
    assert control.done == control.total
    found = await compare(source, target, JobControl())
    assert found == Comparison()


async def test_convert_several_disks_into_one():
    rng = random.Random(SEED)
    parts = [
        rng.randbytes(700),
        bytes(70_000),
        rng.randbytes(3 * MiB),
        rng.randbytes(1),
    ]
    expected = b"".join(part.ljust(-(-len(part) // 512) * 512, b"\0") for part in parts)
    for compressed in (False, True):
        target = await qcow2(len(expected))
        await convert(
            [await raw(part) for part in parts],
            target,
            ConvertOptions(compressed=compressed, target_is_zero=True),
            JobControl(),
        )
        assert bytes(await target.pread(0, len(expected))) == expected


async def test_convert_over_old_data_writes_zeroes():
    rng = random.Random(SEED)
    data = some_data(rng)
    for target in (await raw(rng.randbytes(len(data))), await qcow2(len(data))):
        await target.pwrite(0, rng.randbytes(len(data)))
        await convert([await raw(data)], target, ConvertOptions(), JobControl())
        assert bytes(await target.pread(0, len(data))) == data


async def test_convert_leaves_the_backing_files_data_to_it():
    below = await raw(random.Random(SEED).randbytes(4 * MiB))
    source = await qcow2(5 * MiB, below)
    await source.pwrite(MiB, b"x" * 65536)
    await source.write_zeroes(2 * MiB, 65536)
    target = await qcow2(5 * MiB, below)
    options = ConvertOptions(target_has_backing=True, backing_size=below.size)
    await convert([source], target, options, JobControl())
    assert await compare(source, target, JobControl()) == Comparison()
    present = [row[:3] async for rows in map_disk(target, 0, 5 * MiB)
               for row in rows if row[4] == 0 and row[2] & IS_PRESENT]  # fmt: skip
    assert present == [
        (MiB, 65536, HAS_DATA | IS_PRESENT | HAS_OFFSET),
        (2 * MiB, 65536, IS_ZERO | IS_PRESENT),
    ]


async def test_errors_say_where():
    data = b"x" * (8 * MiB)
    with pytest.raises(CopyError, match="error while reading at byte 4194304: bad"):
        await convert(
            [await raw(data, bad_read=5 * MiB)], await raw(bytes(8 * MiB)),
            ConvertOptions(), JobControl(),
        )  # fmt: skip
    with pytest.raises(CopyError, match="error while writing at byte 2097152: no room"):
        await convert(
            [await raw(data)], await raw(bytes(8 * MiB), bad_write=3 * MiB),
            ConvertOptions(), JobControl(),
        )  # fmt: skip
    with pytest.raises(CompareError, match="bad sector") as caught:
        await compare(await raw(data), await raw(data, bad_read=5 * MiB), JobControl())
    assert (caught.value.which, caught.value.offset) == (1, 4 * MiB)


async def test_salvage_loses_one_sector():
    data = b"x" * MiB
    salvaged = []
    target = await raw(bytes(MiB))
    await convert(
        [await raw(data, bad_read=70_000)],
        target,
        ConvertOptions(salvage=True),
        JobControl(),
        lambda *lost: salvaged.append(lost),
    )
    start = 70_000 // 512 * 512
    assert salvaged == [("offset", start, "bad sector")]
    expected = data[:start] + bytes(512) + data[start + 512 :]
    assert bytes(await target.pread(0, MiB)) == expected


async def test_salvage_goes_on_where_the_map_fails(monkeypatch):
    source, target = await raw(b"x" * MiB), await raw(bytes(MiB))
    mapped = source.driver.map
    bad = 70_144

    async def fails_at_one_sector(offset, length):
        if offset == bad:
            raise OSError(errno.EIO, "bad map")
        end = bad if offset < bad else MiB
        return await mapped(offset, min(length, end - offset))

    monkeypatch.setattr(source.driver, "map", fails_at_one_sector)
    salvaged = []
    options = ConvertOptions(salvage=True)
    await convert(
        [source], target, options, JobControl(), lambda *lost: salvaged.append(lost)
    )
    assert salvaged == [("block status at offset", bad, "bad map")]
    assert bytes(await target.pread(0, MiB)) == b"x" * MiB
    expected = f"reading block status at offset {bad}: bad map"
    with pytest.raises(CopyError, match=expected):
        await convert([source], target, ConvertOptions(), JobControl())


async def test_pause_resume_cancel():
    control = JobControl()
    control.pause()
    task = asyncio.create_task(
        convert([await raw(b"x" * (64 * MiB))], await raw(bytes(64 * MiB)),
                ConvertOptions(), control)
    )  # fmt: skip
    for _ in range(20):
        await asyncio.sleep(0)
    assert control.paused
    assert control.done == 0
    control.resume()
    while control.done == 0:
        await asyncio.sleep(0)
    control.cancel()
    with pytest.raises(JobCancelled):
        await task
    assert 0 < control.done < control.total


@pytest.mark.parametrize("count_data", [False, True])
async def test_what_is_passed_by_is_no_matter_of_the_rate(count_data):
    source = await qcow2(1024 * MiB)
    for offset in (0, 300 * MiB, 900 * MiB):
        await source.pwrite(offset, b"x" * 65536)
    options = ConvertOptions(target_is_zero=True, count_data=count_data)
    target = await qcow2(1024 * MiB)
    async with asyncio.timeout(20):
        await convert([source], target, options, JobControl(rate=4 * MiB))
        top = await qcow2(1024 * MiB)
        top.backing = target
        for offset in (100 * MiB, 800 * MiB):
            await top.pwrite(offset, b"y" * 65536)
        await commit(top, target, JobControl(rate=4 * MiB))
    assert bytes(await target.pread(800 * MiB, 1)) == b"y"
    assert bytes(await target.pread(900 * MiB, 1)) == b"x"


@pytest.mark.parametrize("job", ["convert", "commit", "stream"])
async def test_what_is_in_flight_counts_for_the_rate(job):
    length = 12 * MiB
    source, target = await qcow2(length), await qcow2(length)
    await source.pwrite(0, b"x" * length)
    control = JobControl(rate=length)

    async def write(data):
        pass

    begun = time.monotonic()
    if job == "convert":
        await convert([source], target, ConvertOptions(), control)
    elif job == "commit":
        source.backing = target
        await commit(source, target, control)
    else:
        await stream([source], write, control)
    # The last piece waits for the others' time to pass, not for its own.
    assert time.monotonic() - begun > 0.75


async def test_progress_is_told():
    told = []
    control = JobControl(lambda done, total: told.append((done, total)))
    await copy(await raw(b"x" * 5000), await raw(bytes(5000)), 100, 4000, control)
    assert told[0] == (0, 4000)
    assert told[-1] == (4000, 4000)
    assert control.fraction == 1


async def test_the_first_of_several_failures_is_told():
    ended = []

    async def work(number):
        try:
            await asyncio.sleep(0 if number else 3600)
            raise OSError(number, "failed")
        finally:
            ended.append(number)

    with pytest.raises(OSError, match="failed"):
        async with Flight(3) as flight:
            for number in (0, 1, 2):
                await flight.add(work(number))
            await flight.drain()
    assert sorted(ended) == [0, 1, 2]


async def test_the_other_failures_are_no_warnings():
    told = []
    asyncio.get_running_loop().set_exception_handler(lambda *given: told.append(given))

    async def work():
        raise OSError(5, "failed")

    with pytest.raises(OSError, match="failed"):
        async with Flight(3) as flight:
            for _ in range(3):
                await flight.add(work())
            await flight.drain()
    # Whoever forgets a failed task hears of it when the task goes.
    del flight
    await asyncio.sleep(0)
    gc.collect()
    assert told == []


async def test_a_flight_runs_so_many_at_a_time():
    running, most = 0, 0

    async def work():
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    async with Flight(3) as flight:
        for _ in range(20):
            await flight.add(work())
        await flight.drain()
        assert len(flight) == 0
    assert (running, most) == (0, 3)


@pytest.mark.parametrize("offset", [0, 511, 512, 3 * MiB + 5, 6 * MiB - 1])
async def test_compare_finds_the_sector(offset):
    data = bytearray(random.Random(SEED).randbytes(6 * MiB))
    first = await raw(data)
    data[offset] ^= 1
    found = await compare(first, await raw(data), JobControl())
    assert found == Comparison(content_offset=offset // 512 * 512)


@pytest.mark.parametrize("offset", [0, 256 * 1024 - 1, MiB + 5, 3 * MiB - 1])
async def test_compare_of_files_finds_the_sector(tmp_path, offset):
    data = bytearray(random.Random(SEED).randbytes(3 * MiB))
    (tmp_path / "first").write_bytes(data)
    data[offset] ^= 1
    (tmp_path / "second").write_bytes(data)
    async with (
        await open_image(str(tmp_path / "first"), format="raw") as first,
        await open_image(str(tmp_path / "second"), format="raw") as second,
    ):
        found = await compare(first, second, JobControl())
        assert found == Comparison(content_offset=offset // 512 * 512)
        assert await compare(first, first, JobControl()) == Comparison()


async def test_compare_of_data_and_holes(tmp_path):
    """The first of several differences counts, in whatever order threads find them."""
    rng = random.Random(SEED)
    size, piece = 64 * MiB, 128 << 10
    data = {
        place: rng.randbytes(piece) for place in range(0, size, 2 * piece) if place % 7
    }
    for name in ("first", "second"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
            for place, content in data.items():
                os.pwrite(file.fileno(), content, place)
    places = sorted(rng.randrange(size) for _ in range(5))
    (tmp_path / "third").write_bytes((tmp_path / "first").read_bytes())
    with (tmp_path / "third").open("r+b") as file:
        for place in places:
            os.pwrite(file.fileno(), b"different"[: size - place], place)
    done = []
    async with (
        await open_image(str(tmp_path / "first"), format="raw") as first,
        await open_image(str(tmp_path / "second"), format="raw") as second,
        await open_image(str(tmp_path / "third"), format="raw") as third,
    ):
        control = JobControl(lambda *progress: done.append(progress))
        assert await compare(first, second, control) == Comparison()
        assert done[-1] == (size, size)
        assert len(done) >= len(data)
        found = await compare(first, third, JobControl())
        assert found == Comparison(content_offset=places[0] // 512 * 512)


@pytest.mark.parametrize("differs", [False, True])
async def test_compare_of_a_damaged_map(tmp_path, differs):
    """What is before the damage counts first."""
    for name in ("first", "second"):
        assert main(["create", "-q", "-f", "qcow2", str(tmp_path / name), "3G"]) == 0
        async with await open_image(str(tmp_path / name)) as node:
            for place in (0, MiB, 600 * MiB):
                await node.pwrite(place, b"some data" * 100)
            if differs and name == "second":
                await node.pwrite(MiB, b"other data")
    with (tmp_path / "second").open("r+b") as file:
        file.seek(40)
        l1_offset = int.from_bytes(file.read(8))
        file.seek(l1_offset + 8)
        file.write(((1 << 63) | 0x1000200).to_bytes(8))
    async with (
        await open_image(str(tmp_path / "first"), read_only=True) as first,
        await open_image(str(tmp_path / "second"), read_only=True) as second,
    ):
        if differs:
            found = await compare(first, second, JobControl())
            assert found == Comparison(content_offset=MiB)
            return
        with pytest.raises(CompareError) as caught:
            await compare(first, second, JobControl())
        assert caught.value.which == 1
        assert MiB < caught.value.offset <= 512 * MiB


async def test_compare_of_different_sizes():
    first, second = await raw(b"x" * 1024), await raw(b"x" * 1024 + bytes(4096))
    told = []
    found = await compare(first, second, JobControl(), on_longer=lambda: told.append(1))
    assert (found, told) == (Comparison(sizes_differ=True), [1])
    found = await compare(first, second, JobControl(), strict=True)
    assert found == Comparison(sizes_differ=True)
    longer = await raw(b"x" * 1024 + bytes(1024) + b"y")
    found = await compare(longer, first, JobControl())
    assert found == Comparison(content_offset=2048, sizes_differ=True)


@pytest.mark.parametrize("seed", range(20))
async def test_data_runs(seed):
    rng = random.Random(SEED + seed)
    unit = rng.choice([8, 512, 4096])
    data = b"".join(
        rng.choice([bytes(unit), bytes(unit - 1) + b"x", rng.randbytes(unit)])
        for _ in range(rng.randrange(20))
    ) + rng.choice([b"", bytes(5), b"\0\0\1"])
    expected = [
        not is_zero(data[start : start + unit]) for start in range(0, len(data), unit)
    ]
    runs = data_runs(data, unit) if data else []
    assert sum(length for _, length in runs) == len(data)
    found = [has_data for has_data, length in runs for _ in range(0, length, unit)]
    assert found == expected
    assert all(a[0] != b[0] for a, b in itertools.pairwise(runs))


@pytest.mark.parametrize("cluster_size", [512, 65536])
async def test_many_clusters_are_mapped_as_one_by_one(cluster_size, monkeypatch):
    rng = random.Random(SEED)
    node = await qcow2(1500 * cluster_size, cluster_size=cluster_size)
    for _ in range(400):
        offset = rng.randrange(1500) * cluster_size
        if rng.random() < 0.3:
            await node.write_zeroes(offset, cluster_size)
        else:
            await node.pwrite(offset, b"x" * cluster_size)

    async def rows(start):
        return [row async for part in map_disk(node, start, node.size) for row in part]

    for start in (0, 5 * cluster_size + 17):
        slow = await rows(start)
        with monkeypatch.context() as patch:
            patch.setattr("nbdqcow.formats.qcow2.driver._MANY_CLUSTERS", 0)
            assert await rows(start) == slow

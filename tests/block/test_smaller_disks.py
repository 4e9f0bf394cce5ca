"""Requests that meet a disk, or its tables, that have become smaller."""

import asyncio
import errno

import pytest

from nbdqcow import open_image
from nbdqcow.block.node import Node
from nbdqcow.errors import BlockError
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.formats.raw import RawDriver
from nbdqcow.storage.memory import MemoryStorage
from tests.block.qemu import create
from tests.crash.histories import created

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
pytestmark = pytest.mark.asyncio


class LateStorage(MemoryStorage):
    """A file whose reads end only once `gate` is open, if there is one."""

    gate: asyncio.Event | None = None

    def try_pread(self, offset, length):
        return None if self.gate else super().try_pread(offset, length)

    async def pread(self, offset, length):
        data, gate = super().try_pread(offset, length), self.gate
        if gate is not None:
            await gate.wait()
        return data


async def disk_of(size):
    storage = LateStorage(created(size=size, cluster_size=65536))
    driver = await Qcow2Driver.open(storage, read_only=False, options={})
    return Node(driver, filename="disk"), storage


async def forget_tables(node, storage):
    """Let all tables be read anew, once the gate that is returned is open."""
    await node.flush()
    node.driver.tables.turn()
    node.driver.tables.turn()
    storage.gate = asyncio.Event()
    return storage.gate


async def turns():
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize("ask", ["read", "status"])
async def test_an_l2_table_that_goes_while_it_is_read(ask):
    """What is in the file where a table at offset 0 would be is no table."""
    node, storage = await disk_of(64 * MiB)
    await node.driver.snapshot_create("empty")
    await node.pwrite(0, b"x" * 64 * KiB)
    gate = await forget_tables(node, storage)
    asked = asyncio.create_task(
        node.pread(0, 512) if ask == "read" else node.block_status(0, MiB)
    )
    await turns()
    storage.gate = None
    await node.driver.snapshot_apply("empty")
    gate.set()
    await asked
    # The header's words would be read as clusters, of which one is metadata.
    for offset in range(0, MiB, 64 * KiB):
        assert bytes(await node.pread(offset, 64 * KiB)) == bytes(64 * KiB)
    await node.close()


async def test_past_the_new_end_nothing_can_be_asked(tmp_path):
    path = create(tmp_path / "a", 4 * GiB)
    async with open_image(path) as node:
        node.driver.bitmap_add("b")
        await node.pwrite(MiB, b"x")
        await node.resize(64 * MiB)
        bitmap = node.find_bitmap("b")
        for request in (
            node.pread(3 * GiB, 512),
            node.block_status(3 * GiB, MiB),
            bitmap.extents(3 * GiB, MiB, 4),
        ):
            with pytest.raises(BlockError) as error:
                await request
            assert error.value.errno == errno.EINVAL
        lengths, dirty = await bitmap.extents(0, 4 * GiB, 9)
        assert dirty.tolist() == [False, True, False]
        assert lengths.sum() == 64 * MiB


async def test_a_status_of_a_disk_that_shrinks_meanwhile():
    node, storage = await disk_of(4 * GiB)
    await node.pwrite(0, b"x")
    gate = await forget_tables(node, storage)
    asked = asyncio.create_task(node.block_status(0, 4 * GiB))
    await turns()
    storage.gate = None
    await node.resize(64 * MiB)
    gate.set()
    assert int((await asked).lengths.sum()) <= 4 * GiB
    await node.close()


@pytest.mark.parametrize("format_", ["qcow2", "raw"])
async def test_two_new_sizes_at_the_same_time(tmp_path, format_):
    """What one cuts off within a cluster, the other does not show."""
    path = tmp_path / "a"
    if format_ == "qcow2":
        create(path, MiB)
    else:
        path.write_bytes(bytes(MiB))
    async with open_image(path, format=format_) as node:
        await node.pwrite(0, b"x" * MiB)
        await asyncio.gather(node.resize(100 * KiB), node.resize(120 * KiB))
        assert node.size == 120 * KiB
        data = bytes(await node.pread(0, 120 * KiB))
    assert data == b"x" * 100 * KiB + bytes(20 * KiB)


@pytest.mark.parametrize("raw", ["off", "on"])
async def test_a_data_file_is_cut_once_its_bytes_have_left(tmp_path, raw):
    data_file = tmp_path / "data"
    path = create(tmp_path / "a", MiB, data_file=data_file, data_file_raw=raw)
    async with open_image(path) as node:
        await node.pwrite(0, b"x" * MiB)
        found = node.try_pread_views(512 * KiB, 512 * KiB)
        assert found is not None
        resizing = asyncio.create_task(node.resize(256 * KiB))
        await asyncio.sleep(0.5)
        assert data_file.stat().st_size == MiB
        node.release(found[1])
        await resizing
    assert data_file.stat().st_size == 256 * KiB


async def test_a_late_write_past_the_end_does_not_come_to_a_raw_data_file(tmp_path):
    """The disk still has its cluster, and shows what it has when it grows."""
    data_file = tmp_path / "data"
    path = create(tmp_path / "a", MiB, data_file=data_file, data_file_raw="on")
    async with open_image(path) as node:
        size = 96 * KiB + 512
        await node.resize(size)
        for offset, length in ((100 * KiB, 512), (96 * KiB, 1024)):
            with pytest.raises(BlockError, match="has become smaller"):
                await node.driver.begin_write(offset, length)
        node.driver.abort_write(await node.driver.begin_write(96 * KiB, 512))


async def test_a_disk_that_becomes_another_before_it_grows():
    """What a snapshot's disk has behind its end stays hidden, although a resize
    was asked for while the disk was another one."""
    storage = MemoryStorage(created(size=16 * KiB, cluster_size=4096))
    driver = await Qcow2Driver.open(storage, read_only=False, options={})
    node = Node(driver, filename="disk")
    await node.pwrite(0, b"x" * 16 * KiB)
    await node.resize(8 * KiB + 512)
    await driver.snapshot_create("old")
    async with driver.operating:
        applied = asyncio.create_task(driver.snapshot_apply("old"))
        await turns()
        resized = asyncio.create_task(node.resize(12 * KiB))
        await turns()
    await applied
    await resized
    assert await node.pread(8 * KiB, 4 * KiB) == b"x" * 512 + bytes(3584)
    await node.close()


class LateTruncation(MemoryStorage):
    """A file that tells of another length only once `gate` is open."""

    def __init__(self, data):
        super().__init__(data)
        self.gate = asyncio.Event()

    async def truncate(self, length):
        await super().truncate(length)
        await self.gate.wait()


@pytest.mark.parametrize("is_read", [True, False])
async def test_a_cancelled_resize_of_a_raw_image(is_read):
    """The disk is as long as its file, cut already or not yet."""
    storage = LateTruncation(b"x" * 8 * KiB)
    driver = await RawDriver.open(storage, read_only=False, options={})
    node = Node(driver, filename="disk")
    reading = driver.epochs.enter() if is_read else None
    task = asyncio.create_task(node.resize(4 * KiB))
    await turns()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    if reading is not None:
        driver.epochs.leave(reading)
    assert node.size == storage.length == (8 if is_read else 4) * KiB
    assert await node.pread(0, node.size) == b"x" * node.size
    await node.close()


@pytest.mark.timeout(20)
async def test_a_read_of_compressed_clusters_ends():
    """What is asked of its map goes past the new end, so nothing is in reach."""
    size, cluster = 64 * 4096, 4096
    storage = MemoryStorage(created(size=size, cluster_size=cluster))
    driver = await Qcow2Driver.open(storage, read_only=False, options={})
    node = Node(driver, filename="disk")
    content = b"".join(bytes([n]) * cluster for n in range(1, 65))
    await node.pwrite_compressed(0, content)
    pieces = node.pread_pieces(0, size)
    found = bytes(await anext(pieces))
    await node.resize(40 * cluster)
    found += b"".join([bytes(piece) async for piece in pieces])
    assert len(found) == size
    assert found[: 40 * cluster] == content[: 40 * cluster]
    await node.close()


async def test_zeroes_in_a_cluster_that_goes_while_the_backing_image_is_looked_at():
    below, storage = await disk_of(MiB)
    await below.pwrite(0, b"data")
    gate = await forget_tables(below, storage)
    node, _ = await disk_of(MiB)
    node = Node(node.driver, filename="disk", backing=below)
    zeroing = asyncio.create_task(node.write_zeroes(MiB // 2 + 512, 512))
    await turns()
    await node.resize(64 * KiB)
    gate.set()
    with pytest.raises(BlockError, match="has become smaller"):
        await zeroing
    await node.close()

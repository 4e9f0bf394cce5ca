"""Lazy refcounts: the mark, what a crash leaves, and the repair."""

import asyncio
import json
import random
import subprocess

import pytest

from nbdqcow import open_image
from nbdqcow.block.node import Node
from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.formats.qcow2.header import Header
from nbdqcow.storage.memory import MemoryStorage
from tests.block.qemu import check, create
from tests.block.qemu import run_qemu_img as qemu_img
from tests.crash.histories import created
from tests.crash.verdicts import check_by_us, is_sound
from tests.faults.faulty import WRITE, FaultyStorage, Rule

KiB, MiB = 1 << 10, 1 << 20


def header(path):
    return Header.parse(path.read_bytes()[:65536])


def crash(path, work):
    """Do ``work`` and flush; return the file as it is before the close."""

    async def run():
        async with open_image(path, lock=False) as node:
            await work(node)
            await node.flush()
            return path.read_bytes()

    return asyncio.run(run())


async def write(node):
    rnd = random.Random(5)
    for _ in range(40):
        offset = rnd.randrange(node.size - 70_000)
        await node.pwrite(offset, rnd.randbytes(rnd.randrange(1, 70_000)))
    await node.discard(0, MiB)
    await node.flush()
    await node.pwrite(100_000, b"last")


@pytest.mark.parametrize("refcount_bits", [1, 16, 64])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_after_a_crash_qemu_and_we_repair(tmp_path, cluster_size, refcount_bits):
    options = {"cluster_size": cluster_size, "refcount_bits": refcount_bits}
    path = create(tmp_path / "a", lazy_refcounts="on", **options)
    left = crash(path, write)
    assert not header(path).dirty
    assert check(path)["check-errors"] == 0
    whole = tmp_path / "whole"
    qemu_img("convert", "-O", "raw", path, whole)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.write_bytes(left)
    theirs.write_bytes(left)
    assert header(ours).dirty
    assert "corruptions" in json.loads(
        qemu_img("check", "--output=json", theirs, check=False).stdout
    )

    async def read_only():
        async with open_image(ours, read_only=True) as node:
            assert bytes(await node.pread(0, node.size)) == whole.read_bytes()

    async def open_and_close():
        async with open_image(ours) as node:
            assert not node.driver.header.dirty
            await node.pwrite(3 * MiB, b"more")

    asyncio.run(read_only())
    assert header(ours).dirty
    asyncio.run(open_and_close())
    assert not header(ours).dirty
    check(ours)
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 109 3M 1", theirs],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    check(theirs)
    qemu_img("compare", theirs, whole, check=False)
    ours_raw = tmp_path / "ours.raw"
    qemu_img("convert", "-O", "raw", ours, ours_raw)
    expected = bytearray(whole.read_bytes())
    expected[3 * MiB : 3 * MiB + 4] = b"more"
    assert ours_raw.read_bytes() == expected


def test_no_refcount_is_written_before_the_close(tmp_path):
    path = create(tmp_path / "a", lazy_refcounts="on")

    async def allocate(node):
        await node.pwrite(0, b"x" * MiB)

    before = path.read_bytes()
    left = crash(path, allocate)
    assert left[2 * 65536 : 3 * 65536] == before[2 * 65536 : 3 * 65536]
    assert path.read_bytes()[2 * 65536 : 3 * 65536] != before[2 * 65536 : 3 * 65536]


def test_a_write_in_place_leaves_no_mark(tmp_path):
    path = create(tmp_path / "a", lazy_refcounts="on", preallocation="metadata")

    async def overwrite(node):
        await node.pwrite(0, b"x" * MiB)

    crash_header = Header.parse(crash(path, overwrite)[:65536])
    assert not crash_header.dirty


def test_operations_find_the_refcounts_they_need(tmp_path):
    path = create(tmp_path / "a", lazy_refcounts="on")
    qemu_img("bitmap", "--add", path, "b")

    async def work(node):
        await write(node)
        await node.driver.snapshot_create("s")
        await write(node)
        await node.resize(9 * MiB)
        await node.driver.snapshot_delete("s")

    left = crash(path, work)
    check(path)
    copy = tmp_path / "copy"
    copy.write_bytes(left)
    check(copy, "-r", "all")
    qemu_img("compare", path, copy)


def test_the_option_comes_before_the_header(tmp_path):
    path = create(tmp_path / "a", lazy_refcounts="on")
    old = create(tmp_path / "old", compat="0.10")

    async def mark(name, wanted):
        options = {"lazy_refcounts": wanted}
        async with open_image(name, lock=False, driver_options=options) as node:
            await node.pwrite(0, b"x" * 65536 * 3)
            await node.flush()
            return header(name).dirty

    assert asyncio.run(mark(path, None))
    assert not asyncio.run(mark(create(tmp_path / "b", lazy_refcounts="on"), False))
    assert asyncio.run(mark(create(tmp_path / "c", compat="1.1"), True))
    with pytest.raises(ImageError, match=r"at least qemu 1\.1 compatibility"):
        asyncio.run(mark(old, True))


def test_a_dirty_image_that_is_damaged_is_refused(tmp_path):
    path = create(tmp_path / "a", lazy_refcounts="on")

    async def allocate(node):
        await node.pwrite(0, b"x" * MiB)

    left = bytearray(crash(path, allocate))
    l1_offset = Header.parse(bytes(left[:65536])).l1_table_offset
    left[l1_offset + 6] |= 2
    path.write_bytes(left)
    with pytest.raises(ImageError, match="Could not repair dirty image"):
        asyncio.run(mark_open(path))
    # As QEMU says where it could not check; it would open this one.


async def mark_open(path):
    async with open_image(path):
        pass


class _GatedStorage(MemoryStorage):
    """Keeps writes waiting that begin at some offset, until they may go on."""

    def __init__(self, data):
        super().__init__(data)
        self.gates = {}
        self.waiting = set()

    async def pwritev(self, offset, buffers, *, fua=False):
        gate = self.gates.get(offset)
        if gate is not None:
            self.waiting.add(offset)
            await gate.wait()
        await super().pwritev(offset, buffers)

    async def reached(self, offset):
        while offset not in self.waiting:
            await asyncio.sleep(0)


def test_the_mark_is_not_lost_to_another_change_of_the_header(tmp_path):
    """A commit sets it while the header is written as a whole."""
    path = create(tmp_path / "disk", lazy_refcounts="on", cluster_size=4096)

    async def run():
        storage = _GatedStorage(path.read_bytes())
        driver = await Qcow2Driver.open(storage, read_only=False, options={})
        node = Node(driver, filename="disk")
        await node.pwrite(0, b"\1" * 4096)
        table = driver.tables.fresh[0]
        storage.gates = {table: asyncio.Event(), 0: asyncio.Event()}
        flushing = asyncio.create_task(node.flush())
        await storage.reached(table)
        renaming = asyncio.create_task(driver.change_backing_file("base", "raw"))
        await storage.reached(0)
        storage.gates[table].set()
        for _ in range(20):
            await asyncio.sleep(0)
        storage.gates[0].set()
        await flushing
        await renaming
        before_close = bytes(storage.data)
        await node.close()
        return before_close

    assert Header.parse(asyncio.run(run())).dirty


@pytest.mark.asyncio
async def test_accurate_refcounts_are_wanted_until_they_are_on_disk():
    """A commit that has not looked at the tables yet takes over what is wanted of the
    next one. If it fails, that one has it to do."""
    image = created(lazy_refcounts=True)
    memory = MemoryStorage(image)
    storage = FaultyStorage(memory)
    driver = await Qcow2Driver.open(storage, read_only=False, options={})
    node = Node(driver, filename="disk")
    await node.pwrite(0, b"x" * 4096)
    async with driver.lock:
        first = asyncio.create_task(node.flush())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        second = asyncio.create_task(driver.writeback.flush(accurate=True))
        await asyncio.sleep(0)
        storage.rules = [Rule(kinds=[WRITE])]
    with pytest.raises(OSError, match="injected"):
        await first
    await second
    result, text = check_by_us(bytes(memory.data))
    assert is_sound(result), text
    await node.close()

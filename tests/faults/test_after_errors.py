"""An image in use after an operation on it has failed: nothing that was taken for
it stays taken, and what is in memory is what is on disk.
"""

import asyncio
import contextlib
import errno
import logging

import pytest

from nbdqcow.block.node import Node
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.formats.qcow2.header import AUTOCLEAR_FEATURES_OFFSET
from nbdqcow.formats.raw import RawDriver
from nbdqcow.storage.memory import MemoryStorage
from tests.builder import patched
from tests.crash.histories import SECTOR, created, filled
from tests.crash.verdicts import check_by_us, is_sound
from tests.faults.faulty import DISCARD, FLUSH, KINDS, READ, WRITE, FaultyStorage, Rule


async def opened(image):
    memory = MemoryStorage(image)
    storage = FaultyStorage(memory)
    driver = await Qcow2Driver.open(storage, read_only=False, options={})
    return Node(driver, filename="disk"), storage, memory


async def with_snapshot(*bitmaps):
    node, _, memory = await opened(filled(6))
    for name in bitmaps:
        node.driver.bitmap_add(name, granularity=SECTOR)
    await node.driver.snapshot_create("old", date_nanoseconds=0)
    await node.pwrite(0, b"1" * SECTOR)
    await node.write_zeroes(4 * SECTOR, 2 * SECTOR, may_unmap=False)
    await node.close()
    return bytes(memory.data)


def bitmaps_of(node):
    return {info.name for info in node.driver.bitmap_list()}


def look(memory, **options):
    result, text = check_by_us(bytes(memory.data))
    assert is_sound(result, **options), text


async def downgrade(node):
    await node.amend({"compat": "0.10"}, lambda done, total: None)


# What is done, and the bitmaps that there are before and after it.
OPERATIONS = {
    "remove a bitmap": (
        lambda node: node.driver.bitmap_remove("one"), {"one", "two"}, {"two"},
    ),
    "store bitmaps": (
        lambda node: node.reopen(read_only=True), {"one", "two"}, {"one", "two"},
    ),
    "create a snapshot": (
        lambda node: node.driver.snapshot_create("new"), set(), set(),
    ),
    "delete a snapshot": (
        lambda node: node.driver.snapshot_delete("old"), set(), set(),
    ),
    "apply a snapshot": (
        lambda node: node.driver.snapshot_apply("old"), set(), set(),
    ),
    "downgrade": (downgrade, {"one", "two"}, set()),
}  # fmt: skip


async def fail_one_call(operation, number):
    """Let one storage call of an operation fail, and do it again; return whether
    it has so many."""
    work, before, bitmaps = OPERATIONS[operation]
    node, storage, memory = await opened(await with_snapshot(*sorted(before)))
    await node.pwrite(0, b"2" * SECTOR)
    kinds = [kind for kind in KINDS if kind != DISCARD]
    storage.rules = [Rule(errno.ENOSPC, kinds=kinds, skip=number)]
    error = None
    try:
        await work(node)
    except OSError as raised:
        error = raised
    if error is not None:
        assert error.errno == errno.ENOSPC
        if not node.driver.failed:
            assert bitmaps_of(node) == before
            await work(node)
    reached = storage.nb_faults > 0
    storage.rules = []
    failed = node.driver.failed
    await node.close()
    look(memory, leaks=failed)
    node, _, _ = await opened(bytes(memory.data))
    if not failed:
        assert bitmaps_of(node) == bitmaps
        assert not any(info.inconsistent for info in node.driver.bitmap_list())
    return reached


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_failed_operation_leaves_nothing_behind(operation, caplog):
    caplog.set_level(logging.CRITICAL)
    number = 0
    while asyncio.run(fail_one_call(operation, number)):
        number += 1
    assert number > 3


def test_a_full_file_system_that_copies_on_write_fails_no_image(caplog):
    """Nothing at all can be written there, the header neither."""

    async def run():
        node, storage, memory = await opened(await with_snapshot())
        storage.rules = [Rule(errno.ENOSPC, kinds=[WRITE], count=-1)]
        with pytest.raises(OSError, match="No space left on device"):
            await node.driver.snapshot_delete("old")
        assert not node.driver.failed
        storage.rules = []
        look(memory)
        await node.driver.snapshot_delete("old")
        await node.pwrite(0, b"3" * SECTOR)
        await node.close()
        look(memory)

    asyncio.run(run())


async def until_done(work):
    while True:
        with contextlib.suppress(OSError):
            await work()
            break


async def discard_and_flush(node):
    await node.discard(0, 6 * SECTOR)
    await node.flush()


@pytest.mark.parametrize("nb_failures", [1, 2, 3])
@pytest.mark.parametrize(
    "work",
    [discard_and_flush, lambda node: node.driver.snapshot_delete("old")],
    ids=["discard", "snapshot"],
)
def test_what_can_not_be_given_back_now_is_later(work, nb_failures, caplog):
    """Its refcount block can't be read for a while: nobody tried again."""
    caplog.set_level(logging.CRITICAL)

    async def run(number):
        node, storage, memory = await opened(await with_snapshot())
        node.driver.refcounts.turn()
        block = node.driver.refcounts.table[0]
        storage.rules = [
            Rule(kinds=[READ], first=block, end=block + SECTOR, skip=number,
                 count=nb_failures),
        ]  # fmt: skip
        await until_done(lambda: work(node))
        await node.driver.tasks.settle()
        # Not to be taken for free, whatever else is written meanwhile.
        await until_done(lambda: node.pwrite(0, b"3" * 3 * SECTOR))
        reached = storage.nb_faults > 0
        await node.close()
        assert not storage.rules[0].count or not reached
        look(memory, leaks=False)
        return reached

    number = 0
    while asyncio.run(run(number)):
        number += 1
    assert number


def test_a_bitmap_that_could_not_be_removed_knows_of_writes():
    async def run():
        node, storage, memory = await opened(await with_snapshot("one", "two"))
        storage.rules = [Rule(kinds=[WRITE])]
        with pytest.raises(OSError, match="injected"):
            await node.driver.bitmap_remove("one")
        await node.pwrite(SECTOR, b"2" * SECTOR)
        await node.close()
        look(memory, leaks=False)
        node, _, _ = await opened(bytes(memory.data))
        lengths, states = await node.dirty_bitmaps["one"].extents(0, 4 * SECTOR, 10)
        assert lengths.tolist() == [2 * SECTOR, 2 * SECTOR]
        assert states.tolist() == [True, False]
        await node.close()

    asyncio.run(run())


def test_bitmaps_shrink_with_a_disk_that_could_not_be_cleaned_up():
    """They were stored for the larger disk, and the image could not be opened."""

    async def run():
        node, storage, memory = await opened(created(size=8 << 20))
        node.driver.bitmap_add("one", granularity=SECTOR)
        await node.pwrite(10 * SECTOR, b"x" * SECTOR)
        await node.flush()
        for _ in range(2):
            node.driver.tables.turn()
        table = node.driver.tables.table_offset(0)
        storage.rules = [Rule(kinds=[READ], first=table, end=table + SECTOR)]
        with pytest.raises(OSError, match="injected"):
            await node.resize(10 * SECTOR)
        assert node.size == 10 * SECTOR
        await node.close()
        look(memory)
        node, _, _ = await opened(bytes(memory.data))
        assert bitmaps_of(node) == {"one"}
        await node.resize(8 << 20)
        assert await node.pread(0, 1 << 20) == bytes(1 << 20)
        await node.close()
        look(memory)

    asyncio.run(run())


def test_refcounts_that_may_be_valid_are_not_cut_off(caplog):
    """Those of another width are behind all that the old ones count; a smaller
    disk, with less to count, lets the file end there."""
    caplog.set_level(logging.CRITICAL)

    async def run():
        node, storage, memory = await opened(filled(6))
        await node.pwrite(64 * SECTOR, b"x" * SECTOR)
        reading = node.driver.epochs.enter()
        await node.resize(6 * SECTOR)
        storage.rules = [Rule(kinds=[WRITE], first=48, end=60, effect="all")]
        with pytest.raises(OSError, match="injected"):
            await node.amend({"refcount_bits": 32}, lambda done, total: None)
        assert node.driver.failed
        node.driver.epochs.leave(reading)
        await node.driver.tasks.settle()
        await node.close()
        look(memory)

    asyncio.run(run())


def test_unknown_autoclear_bits_are_cleared_before_anything_is_written():
    """Also if that has failed once."""
    bit = 1 << 40

    async def run():
        image = patched(filled(6), (AUTOCLEAR_FEATURES_OFFSET, "Q", bit))
        memory = MemoryStorage(image)
        storage = FaultyStorage(memory)
        driver = await Qcow2Driver.open(storage, read_only=True, options={})
        node = Node(driver, filename="disk")
        storage.rules = [Rule(kinds=[WRITE])]
        with pytest.raises(OSError, match="injected"):
            await node.reopen(read_only=False)
        await node.reopen(read_only=False)
        await node.pwrite(0, b"x" * SECTOR)
        await node.close()
        assert not any(memory.data[AUTOCLEAR_FEATURES_OFFSET:][:8])

    asyncio.run(run())


async def open_at_once(storage):
    driver = await Qcow2Driver.open(storage, read_only=False, options={})
    return Node(driver, filename="disk")


async def open_and_reopen(storage):
    node = await open_read_only(storage)
    try:
        await node.reopen(read_only=False)
    except OSError:
        await node.close()
        raise
    return node


async def open_read_only(storage):
    driver = await Qcow2Driver.open(storage, read_only=True, options={})
    return Node(driver, filename="disk")


async def fail_to_open(image, opening, number, effect):
    """Let one storage call fail while an image with bitmaps is being opened for
    writing; return whether there are so many."""
    memory = MemoryStorage(image)
    storage = FaultyStorage(memory, number)
    storage.rules = [Rule(skip=number, effect=effect)]
    try:
        node = await opening(storage)
    except OSError:
        assert storage.nb_faults
    else:
        storage.rules = []
        await node.close()
    node = await open_read_only(MemoryStorage(bytes(memory.data)))
    assert not any(info.inconsistent for info in node.driver.bitmap_list())
    lengths, states = await node.dirty_bitmaps["one"].extents(0, 2 * SECTOR, 10)
    assert (lengths.tolist(), states.tolist()) == ([SECTOR, SECTOR], [True, False])
    return storage.nb_faults > 0


@pytest.mark.parametrize("effect", ["none", "all", "torn"])
@pytest.mark.parametrize("opening", [open_at_once, open_and_reopen])
def test_bitmaps_are_kept_where_nothing_could_be_written(opening, effect):
    """They were in use on disk, and nobody trusted them any more."""
    # The directory of many bitmaps has several sectors.
    names = ["one", *(f"{n:0>300}" for n in range(5))]
    image = asyncio.run(with_snapshot(*names))
    number = 0
    while asyncio.run(fail_to_open(image, opening, number, effect)):
        number += 1
    assert number > 8


def test_an_image_is_flushed_once_when_it_is_opened():
    async def run():
        node, storage, _ = await opened(filled(6))
        assert [kind for kind, *_ in storage.log].count(FLUSH) == 1
        await node.close()

    asyncio.run(run())


def test_a_raw_image_that_could_not_grow_is_as_long_as_before():
    """Or it would be a larger disk for whoever opens it next."""

    async def run():
        memory = MemoryStorage(b"x" * 5 * SECTOR, max_length=3 << 20)
        driver = await RawDriver.open(memory, read_only=False, options={})
        node = Node(driver, filename="disk")
        with pytest.raises(OSError, match="limited"):
            await node.resize(8 << 20, preallocation="full")
        assert node.size == memory.length == 5 * SECTOR
        assert await node.pread(0, node.size) == b"x" * 5 * SECTOR
        await node.close()

    asyncio.run(run())

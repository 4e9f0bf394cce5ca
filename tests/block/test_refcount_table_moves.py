"""A refcount table that moves while its pointer in the header can't be written.

Which of two tables is valid on disk nobody knows then, so that nothing may be
told to one of them alone.
"""

import asyncio
import errno

import pytest

from nbdqcow.block.node import Node
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.storage.memory import MemoryStorage
from tests.builder import ImageBuilder
from tests.crash.verdicts import check_by_us, is_sound

POINTER_OFFSET = 48


class DoubtfulStorage(MemoryStorage):
    """Fails to write the pointer a few times, or says so: it may be there."""

    nb_failures = 0
    cancels = False
    after_write = None

    async def pwritev(self, offset, buffers, *, fua=False):
        await super().pwritev(offset, buffers, fua=fua)
        if self.after_write is not None:
            self.after_write()
        if offset == POINTER_OFFSET and self.nb_failures:
            self.nb_failures -= 1
            if self.cancels:
                raise asyncio.CancelledError
            raise OSError(errno.EIO, "perhaps")


async def opened(nb_clusters=0):
    """Open an image of which so many clusters hold data."""
    made = ImageBuilder(4 << 20, refcount_order=6)
    for index in range(nb_clusters):
        made.add_data(index, b"%d" % index)
    storage = DoubtfulStorage(made.build())
    driver = await Qcow2Driver.open(storage, read_only=False, options={})
    return storage, driver, Node(driver, filename="disk")


@pytest.mark.asyncio
@pytest.mark.parametrize("cancels", [False, True])
async def test_no_block_is_told_to_one_of_two_tables(cancels):
    storage, driver, node = await opened(nb_clusters=40)
    await node.flush()
    storage.nb_failures, storage.cancels = 2, cancels
    with pytest.raises((OSError, asyncio.CancelledError)):
        # A row that needs more blocks than the table has room for.
        async with driver.lock:
            await driver.refcounts.allocate_contiguous(4200)
    for number in range(200):
        # The first of them fails, too.
        try:
            await node.pwrite(number * 512 + (1 << 20), b"%d" % number)
        except (OSError, asyncio.CancelledError):
            await node.pwrite(number * 512 + (1 << 20), b"%d" % number)
    await node.flush()
    result, text = check_by_us(bytes(storage.data))
    assert is_sound(result), text
    await node.close()
    result, text = check_by_us(bytes(storage.data))
    assert is_sound(result), text


@pytest.mark.asyncio
async def test_what_a_failed_move_has_written_is_no_zero():
    """A larger table is written, and given up; what it leaves in the file must
    not show where clusters are taken to be as empty as they were."""
    storage, driver, node = await opened()
    storage.nb_failures = 1
    with pytest.raises(OSError, match="perhaps"):
        async with driver.lock:
            await driver.refcounts.allocate_contiguous(1 << 18)
    for offset in range(0, 4 << 20, 512):
        await node.pwrite(offset, b"x")
    for offset in range(0, 4 << 20, 512):
        assert bytes(await node.pread(offset, 512)) == b"x" + bytes(511)
    await node.close()
    result, text = check_by_us(bytes(storage.data))
    assert is_sound(result), text


@pytest.mark.asyncio
async def test_no_other_table_is_written_over_one_that_may_be_valid():
    """After a failed switch more room is wanted. The disk is sound at every write."""
    storage, driver, node = await opened()
    await node.pwrite(0, b"some data")
    await node.flush()
    storage.nb_failures = 1
    with pytest.raises(OSError, match="perhaps"):
        async with driver.lock:
            await driver.refcounts.allocate_contiguous(4200)
    nb_writes = 0

    def look():
        nonlocal nb_writes
        if not driver.refcounts.may_have_moved:
            return
        nb_writes += 1
        result, text = check_by_us(bytes(storage.data))
        assert is_sound(result), text

    look()
    storage.after_write = look
    async with driver.lock:
        await driver.refcounts.allocate_contiguous(1 << 18)
    await node.flush()
    storage.after_write = None
    assert nb_writes > 2
    await node.close()
    result, text = check_by_us(bytes(storage.data))
    assert is_sound(result), text


@pytest.mark.asyncio
async def test_a_table_that_may_have_moved_is_not_cut_off():
    """A smaller disk lets the file end behind what is counted, but not in front of
    a table that the header may name."""
    storage, driver, node = await opened(nb_clusters=40)
    storage.nb_failures = 1
    with pytest.raises(OSError, match="perhaps"):
        async with driver.lock:
            await driver.refcounts.allocate_contiguous(4200)
    await node.resize(20 * 512)
    await driver.tasks.settle()
    await node.flush()
    result, text = check_by_us(bytes(storage.data))
    assert is_sound(result), text
    await node.close()
    result, text = check_by_us(bytes(storage.data))
    assert is_sound(result), text

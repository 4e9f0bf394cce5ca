"""Merging and resizing bitmaps: against a model, and without holding up the loop."""

import asyncio
import errno
import random
import resource

import pytest

from nbdqcow.block.node import Node
from nbdqcow.errors import BlockError
from nbdqcow.formats.qcow2 import memory_bitmap
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.formats.qcow2.memory_bitmap import Bitmap
from nbdqcow.storage.memory import MemoryStorage
from nbdqcow.units import MiB
from tests.crash.histories import created

GiB = 1 << 30


class Model:
    """The numbers of the bits that are set."""

    def __init__(self, bitmap):
        self.bitmap = bitmap
        self.bits = set()

    def mark(self, offset, length):
        self.bitmap.mark(offset, length)
        bits = self.bitmap.granularity_bits
        self.bits.update(range(offset >> bits, ((offset + length - 1) >> bits) + 1))

    def ranges(self):
        bits = self.bitmap.granularity_bits
        return [(n << bits, (n + 1) << bits) for n in self.bits]

    def check(self):
        data = self.bitmap.bits
        assert len(data) == (self.bitmap.nb_bits + 7) // 8
        found = {n for n in range(len(data) * 8) if data[n >> 3] >> (n & 7) & 1}
        assert found == self.bits


def mark_some(rnd, model):
    size = model.bitmap.size
    for _ in range(rnd.randrange(6)):
        offset = rnd.randrange(size)
        length = rnd.choice((1, 512, 4096, rnd.randrange(1, size + 1)))
        model.mark(offset, min(length, size - offset))


def test_merging_agrees_with_a_model(seed, monkeypatch):
    rnd = random.Random(seed)
    for _ in range(150):
        monkeypatch.setattr(memory_bitmap, "_STRIDE_BITS", rnd.choice((8, 64, 1024)))
        size = rnd.choice((1, 511, 4096, 100_000, 300_000, 1 << 20))
        own, other = (
            Model(Bitmap(name, size, rnd.choice((9, 9, 10, 11, 13, 16, 18, 31))))
            for name in "ab"
        )
        mark_some(rnd, own)
        mark_some(rnd, other)
        asyncio.run(own.bitmap.merge(other.bitmap))
        bits = own.bitmap.granularity_bits
        for start, end in other.ranges():
            last = (min(end, size) - 1) >> bits
            own.bits.update(range(start >> bits, last + 1))
        own.check()
        other.check()


def test_resizing_agrees_with_a_model(seed, monkeypatch):
    rnd = random.Random(seed)
    for mapped in (1 << 20, 100):
        monkeypatch.setattr(memory_bitmap, "_MAPPED_BYTES", mapped)
        model = Model(Bitmap("a", 10_000_000, 9))
        for _ in range(60):
            mark_some(rnd, model)
            size = rnd.choice((512, 7 * MiB, 15 * MiB, rnd.randrange(1, 40 * MiB)))
            model.bitmap.resize(size)
            model.bits = {n for n in model.bits if n < model.bitmap.nb_bits}
            model.check()


def nb_page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_a_large_bitmap_is_resized_without_copying_it():
    """There may be 1 GiB of bits, and everybody waits."""
    bitmap = Bitmap("a", 256 * GiB, 9)
    for start in range(0, 256, 8):
        bitmap.mark(start * GiB, 8 * GiB)
    before = nb_page_faults()
    for size in (300 * GiB, 200 * GiB, 250 * GiB):
        bitmap.resize(size)
    assert nb_page_faults() - before < 1000
    assert bitmap.bits[:4096] == b"\xff" * 4096
    assert bitmap.bits[25 * MiB * 2 - 1 :][:4096] == b"\xff" + bytes(4095)


@pytest.mark.parametrize("granularity_bits", [9, 10, 25])
@pytest.mark.asyncio
async def test_merging_gives_others_turns(granularity_bits):
    size = 8 * GiB
    fine, other = Bitmap("a", size, 9), Bitmap("b", size, granularity_bits)
    fine.bits[:] = b"\x55" * len(fine.bits)
    for own, source in ((other, fine), (fine, other)):
        merging = asyncio.create_task(own.merge(source))
        nb_turns = 0
        while not merging.done():
            await asyncio.sleep(0)
            nb_turns += 1
        assert nb_turns >= 16


@pytest.mark.asyncio
async def test_writes_during_a_merge_are_marked(monkeypatch):
    """And nothing else changes the bitmaps meanwhile."""
    monkeypatch.setattr(memory_bitmap, "_STRIDE_BITS", 8)
    storage = MemoryStorage(created(size=128 * 1024))
    driver = await Qcow2Driver.open(storage, read_only=False, options={})
    node = Node(driver, filename="disk")
    driver.bitmap_add("from", granularity=512)
    await node.pwrite(5 * 512, bytes(512))
    driver.bitmap_add("to", granularity=512)
    driver.bitmap_add("third", granularity=512, enabled=False)
    merging = asyncio.create_task(driver.bitmap_merge("to", "from"))
    for number in range(6, 20):
        await asyncio.sleep(0)
        await node.pwrite(number * 512, bytes(512))
    for name in ("to", "from"):
        with pytest.raises(BlockError) as error:
            driver.bitmap_clear(name)
        assert error.value.errno == errno.EBUSY
    driver.bitmap_clear("third")
    # Others are done one after the other, and it goes on if nobody waits for it.
    resized = asyncio.create_task(node.resize(64 * 1024))
    second = asyncio.create_task(driver.bitmap_merge("third", "to"))
    await asyncio.sleep(0)
    merging.cancel()
    await asyncio.wait([merging])
    await resized
    await second
    driver.bitmap_clear("from")
    for name in ("to", "third"):
        bits = driver.dirty_bitmaps[name].bits
        found = [n for n in range(len(bits) * 8) if bits[n >> 3] >> (n & 7) & 1]
        assert found == list(range(5, 20))
    await node.close()

"""All bitmaps of an image together have at most 1 GiB, of which 256 MiB may be
other than zero when it is opened, though they may be a few KiB in the file."""

import asyncio
import errno
import struct
import subprocess
from pathlib import Path

import pytest

from nbdqcow import open_image
from nbdqcow.block.node import Node
from nbdqcow.errors import BlockError, ImageError
from nbdqcow.formats.qcow2 import bitmap as bitmap_module
from nbdqcow.formats.qcow2 import driver as driver_module
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.storage.memory import MemoryStorage
from nbdqcow.units import MiB
from tests.builder import ImageBuilder
from tests.crash.histories import created

TiB = 1 << 40
LIMIT = 1024 * MiB


def image_with_bitmaps(nb: int, size: int, cluster_bits: int = 16) -> bytes:
    """Return an image with ``nb`` bitmaps of a bit for 512 bytes, all ones, whose
    tables are one and the same."""
    made = ImageBuilder(size, cluster_bits=cluster_bits)
    nb_table = size // 512 // 8 // made.cluster_size
    table = made.allocate(nb_table * 8, struct.pack(">Q", 1) * nb_table)
    data = b"".join(
        struct.pack(">QIIBBHI", table, nb_table, 2, 1, 9, 1, 0) + b"%d" % i + bytes(7)
        for i in range(nb)
    )
    offset = made.allocate(len(data), data)
    made.header.autoclear_features = 1
    made.header.set_extension(
        0x23852875, struct.pack(">IIQQ", nb, 0, len(data), offset)
    )
    return made.build()


@pytest.mark.asyncio
@pytest.mark.parametrize("read_only", [True, False])
async def test_an_image_with_more_is_refused(read_only):
    storage = MemoryStorage(image_with_bitmaps(9, TiB // 8))
    with pytest.raises(ImageError, match="take too much memory"):
        await Qcow2Driver.open(storage, read_only=read_only, options={})


@pytest.mark.asyncio
async def test_an_image_with_less_is_not():
    storage = MemoryStorage(image_with_bitmaps(3, TiB // 64))
    driver = await Qcow2Driver.open(storage, read_only=True, options={})
    assert sum(len(b.bits) for b in driver.dirty_bitmaps.values()) == 12 * MiB
    await driver.close()


def held_bytes() -> int:
    """Return the memory of this process that is its own."""
    fields = Path("/proc/self/status").read_text().split()
    return int(fields[fields.index("RssAnon:") + 1]) << 10


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_zeroes_of_a_large_bitmap_take_no_memory(tmp_path):
    """As QEMU makes it: 64 MiB of zeroes."""
    path = tmp_path / "large.qcow2"
    make = f"create -qf qcow2 -o cluster_size=2M {path} 256G"
    for line in (make, f"bitmap --add -g 512 {path} a", f"bitmap --add {path} b"):
        subprocess.run(["qemu-img", *line.split()], check=True)
    before = held_bytes()
    middle = 32 * MiB
    for _ in range(2):
        async with open_image(path) as node:
            assert len(node.driver.dirty_bitmaps["a"].bits) == 64 * MiB
            await node.write_zeroes(middle * 4096 + 4096, 65536)
            node.driver.bitmap_clear("a")
            await node.pwrite(3 * 512, b"\1" * 512)
            await node.pwrite(middle * 4096 - 512, b"\1" * 1024)
            await node.driver.bitmap_merge("a", "b")
            await node.driver.bitmap_merge("b", "a")
            assert held_bytes() - before < 32 * MiB
    async with open_image(path, read_only=True) as node:
        bits = node.driver.dirty_bitmaps["a"].bits
        # In b, a bit is for 64 KiB.
        ones = b"\xff" * 16
        assert bits[:17] == ones + b"\0"
        assert bits[middle - 17 : middle + 33] == b"\0" + ones * 3 + b"\0"
        assert held_bytes() - before < 32 * MiB
    assert subprocess.run(["qemu-img", "check", "-q", path]).returncode == 0


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_bitmaps_that_are_added_or_grow():
    size = TiB // 16
    storage = MemoryStorage(created(size=size, cluster_size=65536))
    driver = await Qcow2Driver.open(storage, read_only=False, options={})
    for number in range(LIMIT // (size // 512 // 8)):
        driver.bitmap_add(str(number), granularity=512)
    with pytest.raises(BlockError, match="too much memory") as caught:
        driver.bitmap_add("more", granularity=512)
    assert caught.value.errno == errno.EFBIG
    with pytest.raises(BlockError, match="too much memory"):
        await driver.resize(2 * size)
    assert driver.size == size
    for bitmap in list(driver.dirty_bitmaps):
        await driver.bitmap_remove(bitmap)
    await driver.close()


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.asyncio
async def test_marking_much_gives_others_turns(monkeypatch, cancelled):
    """And it goes on if whoever asked for it does not wait."""
    nb_bits = 1 << 16
    monkeypatch.setattr(driver_module, "_MARKED_BITS", nb_bits // 64, raising=False)
    size = nb_bits * 512
    storage = MemoryStorage(created(size=size, cluster_size=65536))
    driver = await Qcow2Driver.open(storage, read_only=False, options={})
    node = Node(driver, filename="disk")
    driver.bitmap_add("b", granularity=512)
    bits = driver.dirty_bitmaps["b"].bits
    task = asyncio.create_task(node.discard(0, size))
    nb_turns = nb_partly = 0
    while not task.done():
        await asyncio.sleep(0)
        nb_turns += 1
        nb_partly += 0 < bits.count(b"\xff") < len(bits)
        if cancelled and nb_partly == 5:
            task.cancel()
    assert nb_partly > (4 if cancelled else 50)
    await node.reopen(read_only=True)
    assert bits.count(b"\xff") == len(bits)
    await node.close()


@pytest.mark.parametrize(
    ("nb", "size", "cluster_bits", "least"),
    [(2, TiB // 8, 16, 12), (1, TiB // 64, 12, 50)],
    ids=["bits", "table"],
)
@pytest.mark.asyncio
async def test_opening_large_bitmaps_gives_others_turns(
    nb, size, cluster_bits, least, monkeypatch
):
    """There may be many bits in a bitmap, or many words in its table."""
    monkeypatch.setattr(bitmap_module, "_TURN_WORDS", 16)
    storage = MemoryStorage(image_with_bitmaps(nb, size, cluster_bits))
    opening = asyncio.create_task(
        Qcow2Driver.open(storage, read_only=False, options={})
    )
    nb_turns = 0
    while not opening.done():
        await asyncio.sleep(0)
        nb_turns += 1
    assert nb_turns > least
    await (await opening).close()

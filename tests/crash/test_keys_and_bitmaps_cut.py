"""Power cuts while key slots change, and while bitmaps are kept.

Whoever shall be able to open a disk can, on every disk that a cut may leave. A
bitmap that is there after a cut and says that it can be relied on has every
sector that was written since it was made.
"""

import asyncio
import os
import random

import pytest

from nbdqcow.block.node import Node
from nbdqcow.crypto import luks
from nbdqcow.crypto.luks import LuksHeader, WrongPassphrase
from nbdqcow.errors import ImageError
from nbdqcow.formats import luks_keys
from nbdqcow.formats.luks_keys import KeyChange, change_keys
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.storage.memory import MemoryStorage
from tests.crash.histories import created
from tests.crash.recording import SECTOR, RecordingStorage
from tests.crash.states import Figures, distinct_disks
from tests.crash.verdicts import check_by_us, is_sound

KiB = 1 << 10
STATES = 6
STATES_AT_LENGTH = int(os.environ.get("NBDQCOW_STATES", "600")) // 10


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(luks, "_CALIBRATION_SECONDS", 1e-4)


# -- key slots -----------------------------------------------------------------------


def add(new: bytes, slot: int | None = None, *, force: bool = False) -> KeyChange:
    return KeyChange(new=new, slot=slot, iteration_ms=1, force=force)


CHANGES = {
    "add": ([], add(b"new"), {b"one"}),
    # Its place in the header goes over the end of a sector.
    "add to slot 6": ([], add(b"new", 6), {b"one"}),
    "erase": ([add(b"new", 6)], KeyChange(old=b"new"), {b"one"}),
    "erase the first": ([add(b"two")], KeyChange(slot=0), {b"two"}),
    "replace": ([add(b"two")], add(b"new", 0, force=True), {b"two"}),
}


def opens(area: bytes, passphrase: bytes) -> bool:
    try:
        LuksHeader.parse(area).unlock_blocking(area, passphrase)
    except (ImageError, WrongPassphrase):
        return False
    return True


async def change_and_cut(name: str, seed: int, limit: int, figures: Figures) -> None:
    rnd = random.Random(f"{seed}/{name}")
    before, change, stay = CHANGES[name]
    # What opens the disk first opens it until the change.
    area = luks.create_blocking(b"one", iteration_ms=1)[2]
    first = MemoryStorage(area)
    for one in before:
        await change_keys(first, 0, len(area), b"one", one)
    storage = RecordingStorage(bytes(first.data), rnd)
    await change_keys(storage, 0, len(area), b"one", change)
    for cut, disk in distinct_disks(storage.history, limit, rnd, figures):
        for passphrase in stay:
            where = f"{name}, seed {seed}, {cut}"
            assert opens(disk, passphrase), f"{where}: {passphrase!r}"
    if change.new is not None:
        assert opens(bytes(storage.bytes), change.new)


@pytest.mark.parametrize("name", CHANGES)
def test_power_cuts_while_key_slots_change(name, seed, figures):
    found = Figures()
    asyncio.run(change_and_cut(name, seed, STATES, found))
    figures(f"power cuts, key slots, {name}: {found}, seed {seed}")


def test_a_broken_change_of_keys_is_caught(monkeypatch, seed):
    """A mutant: a slot that is replaced has no other one meanwhile."""
    monkeypatch.setitem(
        CHANGES, "replace the last", ([], add(b"new", 0, force=True), {b"one"})
    )
    monkeypatch.setattr(LuksHeader, "free_slot", lambda self: None)
    assert luks_keys.NB_SLOTS == 8
    with pytest.raises(AssertionError):
        asyncio.run(change_and_cut("replace the last", seed, STATES, Figures()))


# -- bitmaps ---------------------------------------------------------------------------


async def keep_bitmap_and_cut(seed: int, limit: int, figures: Figures) -> None:
    """Make a bitmap, write, close, open, write, close; cut it off anywhere."""
    rnd = random.Random(f"{seed}/bitmap")
    image = created(size=64 * KiB, cluster_size=rnd.choice((512, 4096)))
    storage = RecordingStorage(image, rnd)
    for number in range(2):
        driver = await Qcow2Driver.open(storage, read_only=False, options={})
        node = Node(driver, filename="disk")
        if not number:
            driver.bitmap_add("b", granularity=512)
        for _ in range(3):
            offset = rnd.randrange(node.size // SECTOR) * SECTOR
            data = rnd.randbytes(min(1024, node.size - offset))
            if not node.try_pwrite(offset, data):
                await node.pwrite(offset, data)
            if rnd.random() < 0.4:
                await node.flush()
        await node.close()
    for cut, disk in distinct_disks(storage.history, limit, rnd, figures):
        where = f"bitmap, seed {seed}, {cut}"
        result, text = check_by_us(disk)
        assert is_sound(result), f"{where}:\n{text}"
        await look_at_bitmap(disk, where)
    assert await look_at_bitmap(bytes(storage.bytes), "at the end")


async def look_at_bitmap(disk: bytes, where: str) -> bool:
    """See that the bitmap, if it is there for use, has all that was written."""
    memory = MemoryStorage(disk, read_only=True)
    driver = await Qcow2Driver.open(memory, read_only=True, options={})
    node = Node(driver, filename="disk")
    content = bytes(await node.pread(0, node.size))
    bitmap = driver.dirty_bitmaps.get("b")
    await node.close()
    if bitmap is None:
        return False
    for sector in range(len(content) // SECTOR):
        if content[sector * SECTOR :][:SECTOR].strip(b"\0"):
            marked = bitmap.bits[sector // 8] >> (sector % 8) & 1
            assert marked, f"{where}: sector {sector:#x} is not in the bitmap"
    return True


def test_power_cuts_while_a_bitmap_is_kept(seed, figures):
    found = Figures()
    for number in range(4):
        asyncio.run(keep_bitmap_and_cut(seed + number, STATES, found))
    figures(f"power cuts, a bitmap: {found}, seeds from {seed}")


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_power_cuts_of_keys_and_bitmaps_at_length(seed, figures):
    found = Figures()
    for number in range(4):
        for name in CHANGES:
            run = change_and_cut(name, seed + number, STATES_AT_LENGTH, found)
            asyncio.run(run)
    for number in range(20):
        asyncio.run(keep_bitmap_and_cut(seed + number, STATES_AT_LENGTH, found))
    figures(f"power cuts at length, keys and bitmaps: {found}, seeds from {seed}")


def test_a_bitmap_that_is_not_kept_is_caught(monkeypatch, seed):
    """A mutant: writes are not marked, as if the bitmap were not in use."""
    monkeypatch.setattr(Qcow2Driver, "track", lambda self, enabled: None)
    with pytest.raises(AssertionError):
        for number in range(20):
            asyncio.run(keep_bitmap_and_cut(seed + number, STATES, Figures()))

"""Power cuts while an image is created, or repaired.

A file whose creation was cut short is no image, or all of the new one. One
whose repair was cut short is healed by the next repair, and no sector of the
disk is worse than it was before: it holds what could be read then, or what can
be read after a repair that nothing interrupted.
"""

import asyncio
import errno
import functools
import os
import random
import struct
from collections.abc import Callable

import pytest

from nbdqcow.block.node import Node
from nbdqcow.block.tools import REPAIR_ALL, REPAIR_LEAKS
from nbdqcow.formats.qcow2 import check as qcow2_check
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.formats.qcow2.entries import OFFSET_MASK, OFLAG_COPIED, OFLAG_ZERO
from nbdqcow.formats.qcow2.header import MAGIC, Header
from nbdqcow.formats.qcow2.tool import Qcow2Tool
from nbdqcow.storage.memory import MemoryStorage
from tests.builder import ImageBuilder
from tests.crash.histories import filled
from tests.crash.recorded_file import RecordedFile
from tests.crash.recording import SECTOR
from tests.crash.states import Figures, cut_after, distinct_disks
from tests.crash.verdicts import (
    SHARE_FOR_QEMU,
    check_by_qemu,
    check_by_us,
    is_sound,
)

KiB = 1 << 10
STATES = 24
STATES_AT_LENGTH = int(os.environ.get("NBDQCOW_STATES", "600"))


async def content_of(data: bytes) -> bytes:
    """Return what a guest reads; a sector that can't be read is "?"."""
    storage = MemoryStorage(data, read_only=True)
    driver = await Qcow2Driver.open(storage, read_only=True, options={})
    if driver.header.backing_filename is not None:
        assert driver.header.backing_filename == "base"
    node = Node(driver, filename="disk")
    found = b""
    for offset in range(0, node.size, SECTOR):
        try:
            found += bytes(await node.pread(offset, SECTOR))
        except OSError:
            found += b"?" * SECTOR
    await node.close()
    return found


# -- create --------------------------------------------------------------------------

CREATIONS: dict[str, dict[str, object]] = {
    "off": {},
    "metadata": {"preallocation": "metadata"},
    "falloc": {"preallocation": "falloc"},
    "full": {"preallocation": "full"},
    "tables": {"preallocation": "metadata", "refcount_bits": 64, "size": 96 * KiB},
    "version-2": {"compat": "0.10", "preallocation": "metadata"},
    "subclusters": {
        "extended_l2": True,
        "cluster_size": 16 * KiB,
        "preallocation": "metadata",
    },
    # The header goes beyond its first sector.
    "backing-file": {"cluster_size": 4 * KiB, "backing_file": "base"},
}


def create_and_cut(
    name: str, old: bytes | None, seed: int, path, limit: int, figures: Figures
) -> None:
    """``old``: of a block device, what was there before; None: a new file."""
    rnd = random.Random(f"{seed}/{name}")
    options = {"size": 48 * KiB, "cluster_size": 512, **CREATIONS[name]}
    tool = Qcow2Tool()
    file = RecordedFile(old or b"", is_device=old is not None)
    tool.create(file, tool.prepare(options))
    size = int(str(options["size"]))
    old_head = (old or b"")[:SECTOR]
    if "backing_file" in options:
        (path.parent / "base").write_bytes(bytes(size))
    nb_images = 0
    for nb_events in range(len(file.history.events) + 1):
        cut = cut_after(file.history, nb_events)
        figures.nb_cuts += 1
        figures.nb_whole_cuts += cut.nb_states <= limit
        for number, disk in enumerate(cut.states(limit, rnd)):
            figures.nb_states += 1
            if int.from_bytes(disk[:4], "big") != MAGIC or disk[:SECTOR] == old_head:
                continue
            where = f"{name}, seed {seed}, cut {nb_events}, disk {number}"
            nb_images += 1
            result, text = check_by_us(disk)
            assert is_sound(result, leaks=False), f"{where}:\n{text}"
            found = asyncio.run(content_of(disk))
            assert found == bytes(size), where
            if rnd.random() < SHARE_FOR_QEMU:
                check_by_qemu(path, disk, where)
                figures.nb_qemu += 1
    assert nb_images, "no cut leaves the image, not even the last one"
    # What was answered is there.
    final = cut_after(file.history, len(file.history.events))
    assert final.nb_states == 1
    assert final.durable[:4] == MAGIC.to_bytes(4, "big")


def old_disk(seed: int) -> bytes:
    """Return a disk that has an image already, and garbage behind it."""
    garbage = random.Random(seed).randbytes(512 * KiB)
    image = filled(8)
    return image + garbage[len(image) :]


# There is nothing to allocate on a device.
PLACES = [
    (name, on)
    for name in CREATIONS
    for on in ("file", "device")
    if (name, on) != ("falloc", "device")
]


@pytest.mark.parametrize(("name", "on"), PLACES)
def test_power_cuts_while_an_image_is_created(name, on, tmp_path, seed, figures):
    found = Figures()
    old = old_disk(seed) if on == "device" else None
    create_and_cut(name, old, seed, tmp_path / "disk", STATES, found)
    figures(f"power cuts, create {name} on a {on}: {found}, seed {seed}")


# -- repair --------------------------------------------------------------------------


def base() -> ImageBuilder:
    made = ImageBuilder(64 * KiB)
    for index in range(24):
        made.add_data(index, random.Random(index).randbytes(SECTOR))
    made.add_compressed(40, b"forty")
    return made


def leaks() -> bytes:
    made = base()
    for _ in range(5):
        made.allocate(data=b"lost")
    made.refcounts[12] += 3
    return made.build()


def low_counts() -> bytes:
    """Clusters with two users and a count of 1."""
    made = base()
    made.add_snapshot("one")
    for index in made.refcounts:
        made.refcounts[index] = 1
    return made.build()


def no_counts() -> bytes:
    made = base()
    for index in range(3, 30):
        made.refcounts[index] = 0
    return made.build()


def no_refcount_table() -> bytes:
    made = base()
    made.refcounts = {}
    return made.build()


def wrong_flags() -> bytes:
    made = base()
    for index in range(0, 24, 3):
        made.l2[0][index] &= ~OFLAG_COPIED
    made.l1[0] &= ~OFLAG_COPIED
    return made.build()


def dirty() -> bytes:
    """Refcounts were lazy, and it was cut off before."""
    made = base()
    made.header.incompatible_features |= 1
    made.header.compatible_features |= 1
    made.refcounts = dict.fromkeys(range(14), 1)
    return made.build()


def bad_entries() -> bytes:
    """Zero clusters whose place can't be one, and leaks beside them."""
    made = ImageBuilder(64 * KiB, cluster_bits=12)
    for index in range(6):
        made.add_data(index, random.Random(index).randbytes(4096))
    for index in (3, 9, 14):
        made.set_entry(index, 0x1200 | OFLAG_ZERO | OFLAG_COPIED)
    return made.build()


DAMAGES: list[Callable[[], bytes]] = [
    leaks,
    low_counts,
    no_counts,
    no_refcount_table,
    wrong_flags,
    dirty,
    bad_entries,
]


class FullFile(RecordedFile):
    """A file that can't grow, which is not known before it is tried."""

    def pwrite(self, offset: int, data: bytes) -> None:
        if offset + len(data) > self.length:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().pwrite(offset, data)


def repair_and_cut(
    damage: Callable[[], bytes],
    repair: int,
    seed: int,
    limit: int,
    figures: Figures,
    kind: type[RecordedFile] = RecordedFile,
) -> None:
    rnd = random.Random(f"{seed}/{damage.__name__}/{repair}")
    image = damage()
    if kind is FullFile:
        image += bytes(16 * 4096)
    before, _ = check_by_us(image)
    file = kind(image)
    after = Qcow2Tool().check(file, repair, lambda line: None)
    left = bytes(file.data)
    if repair == REPAIR_ALL:
        result, text = check_by_us(left)
        assert is_sound(result, leaks=False), text
    contents = [asyncio.run(content_of(data)) for data in (image, left)]
    for cut, disk in distinct_disks(file.history, limit, rnd, figures):
        where = f"{damage.__name__}, seed {seed}, {cut}"
        result, text = check_by_us(disk)
        # Nothing is worse than it was.
        worst = max(before.corruptions, after.corruptions)
        assert result.corruptions <= worst, f"{where}:\n{text}"
        assert not result.check_errors, f"{where}:\n{text}"
        same_content(asyncio.run(content_of(disk)), contents, where)
        again = RecordedFile(disk)
        Qcow2Tool().check(again, REPAIR_ALL, lambda line: None)
        result, text = check_by_us(bytes(again.data))
        assert is_sound(result, leaks=False), f"{where}, repaired:\n{text}"
        assert not Header.parse(bytes(again.data)[:4096]).dirty, where
        same_content(asyncio.run(content_of(bytes(again.data))), contents, where)


def same_content(found: bytes, contents: list[bytes], where: str) -> None:
    for offset in range(0, len(found), SECTOR):
        may = {content[offset : offset + SECTOR] for content in contents}
        assert found[offset : offset + SECTOR] in may, f"{where}: {offset:#x}"


def _repairs(damage: Callable[[], bytes]) -> list[int]:
    # The others are refused without more rights.
    both = damage in (leaks, wrong_flags)
    return [REPAIR_LEAKS, REPAIR_ALL] if both else [REPAIR_ALL]


REPAIRS = [(damage, repair) for damage in DAMAGES for repair in _repairs(damage)]


@pytest.mark.parametrize(("damage", "repair"), REPAIRS)
def test_power_cuts_during_a_repair(damage, repair, seed, figures):
    found = Figures()
    repair_and_cut(damage, repair, seed, STATES, found)
    what = {REPAIR_LEAKS: "leaks", REPAIR_ALL: "all"}[repair]
    figures(f"power cuts, check -r {what}, {damage.__name__}: {found}, seed {seed}")


@pytest.mark.parametrize("damage", [no_counts, no_refcount_table])
def test_power_cuts_during_a_repair_without_room(damage, seed, figures):
    found = Figures()
    repair_and_cut(damage, REPAIR_ALL, seed, STATES, found, FullFile)
    figures(f"power cuts, check -r all, file is full, {damage.__name__}: {found}")


def test_a_repair_of_what_is_not_on_disk_yet(seed):
    """A server was killed that had given a cluster up: so says page cache. The disk
    still names it, and may go on doing so while its refcount goes."""
    image = base().build()
    file = RecordedFile(image)
    (l1_offset,) = struct.unpack_from(">Q", image, 40)
    (l1_entry,) = struct.unpack_from(">Q", image, l1_offset)
    file.pwrite(l1_entry & OFFSET_MASK, bytes(8))
    result = Qcow2Tool().check(file, REPAIR_LEAKS, lambda line: None)
    assert result.leaks_fixed == 1
    rnd = random.Random(seed)
    for cut, disk in distinct_disks(file.history, STATES, rnd, Figures()):
        result, text = check_by_us(disk)
        assert is_sound(result), f"{cut}:\n{text}"


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_power_cuts_of_tools_at_length(tmp_path, seed, figures):
    found = Figures()
    limit = STATES_AT_LENGTH // 4
    for name, on in PLACES:
        old = old_disk(seed) if on == "device" else None
        create_and_cut(name, old, seed, tmp_path / "disk", limit, found)
    for damage, repair in REPAIRS:
        repair_and_cut(damage, repair, seed, limit, found)
    figures(f"power cuts at length, create and check -r: {found}, seed {seed}")


# -- mutants -------------------------------------------------------------------------


def test_a_broken_creation_is_caught(tmp_path, monkeypatch, seed):
    """A mutant: the header is not held back until the rest is durable."""
    monkeypatch.setattr(RecordedFile, "flush", lambda self: None)
    with pytest.raises(AssertionError):
        create_and_cut("metadata", None, seed, tmp_path / "disk", 200, Figures())


def test_a_broken_repair_is_caught(monkeypatch, seed):
    """A mutant: new refcounts are named before they are there."""
    sound = qcow2_check.rebuild_refcounts

    @functools.wraps(sound)
    def rebuild(*arguments):
        generator, steps = sound(*arguments), []
        while True:
            try:
                steps.append(next(generator))
            except StopIteration as stop:
                yield from (*steps[-2:], *steps[:-2])
                return stop.value

    monkeypatch.setattr(qcow2_check, "rebuild_refcounts", rebuild)
    with pytest.raises((AssertionError, OSError)):
        repair_and_cut(no_refcount_table, REPAIR_ALL, seed, STATES, Figures())

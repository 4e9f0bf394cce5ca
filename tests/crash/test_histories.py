"""Power cuts in short histories: every disk that a cut can leave.

Each operation that changes metadata has a history (`tests.crash.histories`).
Of each cut all disks are looked at if they are few, else a sample. Our check
finds leaks at the most, `qemu-img check` on a part of them agrees, repair makes
the image clean, and each sector holds what it may.
"""

import asyncio
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nbdqcow.block.steps import run_steps
from nbdqcow.block.tools import REPAIR_ALL
from nbdqcow.formats.qcow2.check import check_image
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.storage.memory import MemoryStorage
from tests.crash.histories import (
    HISTORIES,
    LOOKED_AT,
    SECTOR,
    Disk,
    History,
    base_content,
)
from tests.crash.recording import RecordingStorage
from tests.crash.states import Figures, cut_after
from tests.crash.verdicts import SHARE_FOR_QEMU, check_by_qemu, check_by_us, is_sound

STATES_OF_A_CUT = 32
STATES_AT_LENGTH = int(os.environ.get("NBDQCOW_STATES", "600"))
NB_LONG_SEEDS = int(os.environ.get("NBDQCOW_LONG_SEEDS", "4"))


@dataclass(slots=True)
class Played:
    """A history that was recorded.

    Attributes:
        allowed: number of events, and what the sectors may hold from then on
            after a crash.
    """

    history: History
    storage: RecordingStorage
    disk: Disk
    allowed: list[tuple[int, dict[int, frozenset[bytes]]]] = field(default_factory=list)

    def note(self) -> None:
        nb_events = len(self.storage.history.events)
        self.allowed.append((nb_events, dict(self.disk.later)))

    def allowed_after(self, nb_events: int) -> dict[int, frozenset[bytes]]:
        return [later for first, later in self.allowed if first <= nb_events][-1]


async def play(history: History, rnd: random.Random) -> Played:
    """Run a history on a recorded disk, opening and closing included."""
    image = history.image()
    storage = RecordingStorage(image, rnd)
    # The disk's size is in the header's bytes 24 to 32.
    disk = Disk(base_content(history), int.from_bytes(image[24:32], "big"))
    played = Played(history, storage, disk)
    played.note()
    node = await history.open(storage)
    for step in history.steps:
        changes = step.changes(disk)
        disk.begin(changes)
        played.note()
        await step.run(node)
        disk.succeed(changes, optional=step.optional)
        step.after(disk)
        if step.flushes:
            disk.flushed()
        played.note()
    await node.close()
    disk.flushed()
    played.note()
    return played


async def look_at(
    history: History, data: bytes, allowed: dict[int, frozenset[bytes]], where: str
) -> None:
    """See that a disk is sound, can be repaired, and holds what it may."""
    result, text = check_by_us(data)
    assert is_sound(result), f"{where}:\n{text}"
    storage = MemoryStorage(data)
    await run_steps(check_image(len(data), REPAIR_ALL, lambda line: None), storage)
    result, text = check_by_us(bytes(storage.data))
    assert is_sound(result, leaks=False), f"{where}, repaired:\n{text}"
    node = await history.open(storage)
    try:
        content = bytes(await node.pread(0, min(node.size, LOOKED_AT)))
        base = base_content(history)
        for sector in range(len(content) // SECTOR):
            got = content[sector * SECTOR : (sector + 1) * SECTOR]
            may = allowed.get(sector)
            assert got in may if may else got == base(sector), (
                f"{where}: sector {sector:#x} holds {got[:16].hex()}..."
            )
    finally:
        await node.close()


async def explore(
    history: History, seed: int, path: Path, figures: Figures, limit: int
) -> None:
    """Look at the disks after each cut of one run of a history."""
    rnd = random.Random(f"{seed}/{history}")
    if history.costly:
        limit = 2
    if history.backing is not None:
        (path.parent / "base").write_bytes(history.backing)
    played = await play(history, rnd)
    seen = set()
    recorded = played.storage.history
    for nb_events in range(len(recorded.events) + 1):
        cut = cut_after(recorded, nb_events)
        allowed = played.allowed_after(nb_events)
        figures.nb_cuts += 1
        figures.nb_whole_cuts += cut.nb_states <= limit
        for number, data in enumerate(cut.states(limit, rnd)):
            key = hash((data, tuple(sorted(allowed.items()))))
            if key in seen:
                continue
            seen.add(key)
            where = f"{history}, seed {seed}, cut {nb_events}, disk {number}"
            await look_at(history, data, allowed, where)
            figures.nb_states += 1
            if rnd.random() < SHARE_FOR_QEMU:
                check_by_qemu(path, data, where)
                figures.nb_qemu += 1
    final = bytes(played.storage.bytes)
    await look_at(history, final, played.disk.later, f"{history}, seed {seed}, end")
    result, text = check_by_us(final)
    assert is_sound(result, leaks=not history.clean), f"{history}, end:\n{text}"
    check_by_qemu(path, final, f"{history}, seed {seed}, end")


@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_every_power_cut_of_a_short_history(history, tmp_path, seed, figures):
    found = Figures()
    asyncio.run(explore(history, seed, tmp_path / "disk", found, STATES_OF_A_CUT))
    figures(f"power cuts, {history}: {found}, seed {seed}")


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_every_power_cut_of_a_short_history_at_length(history, tmp_path, seed, figures):
    found = Figures()
    for number in range(NB_LONG_SEEDS):
        disk = tmp_path / "disk"
        asyncio.run(explore(history, seed + number, disk, found, STATES_AT_LENGTH))
    figures(f"power cuts at length, {history}: {found}, seeds from {seed}")


# -- mutants: broken drivers that this must catch ----------------------------------


def links_before_data(driver):
    """No flush between what entries name and the entries."""

    async def no_flush():
        pass

    driver.writeback.flush_files = no_flush


def skips_flushes(driver):
    """A flush of the image does nothing."""

    async def flush():
        pass

    driver.flush = flush


def counts_last(driver):
    """Refcounts go to disk after the entries that rely on them."""
    writeback = driver.writeback
    write = writeback._write_refcounts
    carry_out = writeback._carry_out

    async def later(picture):
        async def nothing(picture):
            pass

        writeback._write_refcounts = nothing
        await carry_out(picture)
        await write(picture)

    writeback._carry_out = later


def switches_in_pieces(driver):
    """The roots of a new generation are written one by one."""
    storage = driver.storage
    pwritev = storage.pwritev

    async def write_in_pieces(offset, buffers, *, fua=False):
        data = b"".join(bytes(b) for b in buffers)
        if offset == 24:
            for start in range(0, len(data), 8):
                await pwritev(offset + start, [data[start : start + 8]])
        else:
            await pwritev(offset, buffers, fua=fua)

    storage.pwritev = write_in_pieces


@pytest.mark.parametrize(
    ("mutate", "name"),
    [
        (links_before_data, "allocate"),
        (skips_flushes, "overwrite"),
        (counts_last, "allocate"),
        (switches_in_pieces, "snapshot-delete"),
    ],
)
def test_a_broken_driver_is_caught(mutate, name, tmp_path, monkeypatch, seed):
    (history,) = (h for h in HISTORIES if h.name == name)
    open_sound = Qcow2Driver.open.__func__

    async def open_broken(cls, storage, **options):
        driver = await open_sound(cls, storage, **options)
        # Only the run, not those who look at what it left.
        if isinstance(storage, RecordingStorage):
            mutate(driver)
        return driver

    monkeypatch.setattr(Qcow2Driver, "open", classmethod(open_broken))
    with pytest.raises(AssertionError):
        for number in range(40):
            run = explore(history, seed + number, tmp_path / "disk", Figures(), 40)
            asyncio.run(run)

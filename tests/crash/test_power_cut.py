"""Power cuts: whatever the disk kept, the image is sound and flushed data there.

Several clients write, zero, discard and flush on a recorded disk. For sampled
cuts the replayer makes a disk that the cut could have left; `qemu-img check`
must find no corruption (leaks are allowed), every flushed sector must hold
what was flushed or something written later, every other sector its old
content or something that was written to it.
"""

import asyncio
import os
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbdqcow.block.node import Node
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from tests.crash.recording import SECTOR, RecordingStorage

NB_HISTORIES = int(os.environ.get("NBDQCOW_CRASH_HISTORIES", "24"))
CUTS_PER_HISTORY = 20
FIRST_SEED = int(os.environ.get("NBDQCOW_SEED", "1"))
NB_CLIENTS = 4


@dataclass(slots=True)
class Change:
    """One change of one sector, with the clock and the disk's event numbers
    at its start, and the clock at its answer (0: never answered)."""

    value: bytes
    start_time: int
    start_event: int
    end_time: int = 0


class Workload:
    """Clients on one node, and what they know of each sector's history."""

    def __init__(self, node: Node, storage: RecordingStorage, rnd: random.Random):
        self.node, self.storage, self.rnd = node, storage, rnd
        self.sectors: dict[int, list[Change]] = {}
        self.flushes: list[tuple[int, int]] = []
        self.busy: set[int] = set()
        self.clock = 0

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    @property
    def event(self) -> int:
        return len(self.storage.history.events)

    async def client(self) -> None:
        rnd, node = self.rnd, self.node
        cluster = node.driver.cluster_size // SECTOR
        total = node.size // SECTOR
        for _ in range(rnd.randrange(4, 16)):
            kind = rnd.choices(("write", "zero", "discard", "flush"), (60, 10, 20, 10))[
                0
            ]
            if kind == "flush":
                started = self.tick()
                await node.flush()
                self.flushes.append((started, self.event))
                continue
            first = rnd.randrange(total)
            count = min(total - first, rnd.choice((1, 1, 2, cluster, cluster + 1)))
            if kind == "discard" or rnd.random() < 0.3:
                first -= first % cluster
                count = min(total - first, cluster * rnd.choice((1, 1, 2)))
            sectors = range(first, first + count)
            if not self.busy.isdisjoint(sectors):
                continue
            self.busy.update(sectors)
            await self.change(kind, first, count)
            self.busy.difference_update(sectors)

    async def change(self, kind: str, first: int, count: int) -> None:
        rnd, node = self.rnd, self.node
        length = count * SECTOR
        data = rnd.randbytes(length) if kind == "write" else bytes(length)
        started, event = self.tick(), self.event
        changes = []
        for i in range(count):
            value = data[i * SECTOR : (i + 1) * SECTOR]
            changes.append(Change(value, started, event))
            self.sectors.setdefault(first + i, []).append(changes[-1])
        offset = first * SECTOR
        if kind == "write":
            if not node.try_pwrite(offset, data):
                await node.pwrite(offset, data)
        elif kind == "zero":
            await node.write_zeroes(offset, len(data), may_unmap=rnd.random() < 0.7)
        else:
            await node.discard(offset, len(data))
        ended = self.tick()
        for change in changes:
            change.end_time = ended

    def allowed(self, sector: int, cut: int) -> set[bytes]:
        """Return what a sector may hold on a disk that was cut."""
        flushed = max((t for t, event in self.flushes if event <= cut), default=0)
        durable = bytes(SECTOR)
        later = set()
        for change in self.sectors[sector]:
            if change.end_time and change.end_time < flushed:
                durable = change.value
                later = set()
            elif change.start_event <= cut:
                later.add(change.value)
        return later | {durable}


async def open_node(data: bytes, rnd: random.Random) -> tuple[Node, RecordingStorage]:
    storage = RecordingStorage(data, rnd)
    driver = await Qcow2Driver.open(
        storage,
        read_only=False,
        options={"l2_cache_size": rnd.choice((None, 64 << 10))},
    )
    return Node(driver, filename="recording"), storage


async def explore(seed: int, path: Path) -> int:
    """Run one history and look at some of its cuts; return how many."""
    rnd = random.Random(seed)
    cluster_size = rnd.choice((512, 512, 4096, 65536))
    size = cluster_size * rnd.randrange(4, 60)
    options = f"cluster_size={cluster_size},compat={rnd.choice(('1.1', '0.10'))}"
    subprocess.run(
        ["qemu-img", "create", "-qf", "qcow2", "-o", options, path, str(size)],
        check=True,
    )
    node, storage = await open_node(path.read_bytes(), rnd)
    work = Workload(node, storage, rnd)
    await asyncio.gather(*(work.client() for _ in range(NB_CLIENTS)))
    history = storage.history
    for number in range(CUTS_PER_HISTORY):
        cut = rnd.randrange(len(history.events) + 1)
        disk = history.disk_at(cut, rnd)
        path.write_bytes(disk)
        where = f"seed {seed}, cut {number} after event {cut}"
        check = subprocess.run(
            ["qemu-img", "check", path], capture_output=True, text=True, check=False
        )
        assert check.returncode in (0, 3), f"{where}:\n{check.stdout}{check.stderr}"
        after, _ = await open_node(disk, rnd)
        for sector in work.sectors:
            got = bytes(await after.pread(sector * SECTOR, SECTOR))
            assert got in work.allowed(sector, cut), f"{where}: sector {sector}"
    await node.close()
    path.write_bytes(storage.bytes)
    subprocess.run(["qemu-img", "check", "-q", path], check=True)
    return CUTS_PER_HISTORY


def test_power_cuts_leave_a_sound_image_with_all_flushed_data(tmp_path):
    states = 0
    for seed in range(FIRST_SEED, FIRST_SEED + NB_HISTORIES):
        states += asyncio.run(explore(seed, tmp_path / "disk.qcow2"))
    print(f"{states} disks after a power cut, seeds from {FIRST_SEED}")


def early_free(driver):
    """A mutant: freed clusters are reused before the disk has let go of them."""
    take = driver.take_freed

    def drop_at_once():
        freed = take()
        driver.writeback._give_back(freed)
        return type(freed)()

    finish = driver.end_write

    def end_write(plan):
        finish(plan)
        driver.writeback._give_back(take())

    driver.take_freed, driver.end_write = drop_at_once, end_write


def links_before_data(driver):
    """A mutant: no flush between what entries name and the entries."""

    async def no_flush():
        pass

    driver.writeback._flush_files = no_flush


@pytest.mark.parametrize("mutate", [early_free, links_before_data])
def test_a_broken_driver_is_caught(mutate, tmp_path, monkeypatch):
    open_sound = Qcow2Driver.open.__func__

    async def open_broken(cls, *args, **options):
        driver = await open_sound(cls, *args, **options)
        mutate(driver)
        return driver

    monkeypatch.setattr(Qcow2Driver, "open", classmethod(open_broken))
    with pytest.raises(AssertionError):
        for seed in range(FIRST_SEED, FIRST_SEED + 100):
            asyncio.run(explore(seed, tmp_path / "disk.qcow2"))

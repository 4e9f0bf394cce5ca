"""Power cuts on qcow images, version 1: whatever the disk kept is sound.

The same rules as for qcow2 (`tests.crash.test_power_cut`), on a format without
refcounts: nothing may be named twice or be past the file's end, every flushed
sector is there, and every other one holds its old content or something that
was written to it. Some writes fail half-way, as on a full disk, and are rolled
back.
"""

import asyncio
import os
import random

import pytest

from nbdqcow.block.node import Node
from nbdqcow.errors import BlockError
from nbdqcow.formats.qcow1.driver import Qcow1Driver
from nbdqcow.formats.raw import RawDriver
from nbdqcow.storage.memory import MemoryStorage
from tests.crash.recording import SECTOR, RecordingStorage
from tests.crash.sectors import SectorHistory
from tests.qcow1_image import Image, Packed, Plain, check

NB_HISTORIES = int(os.environ.get("NBDQCOW_CRASH_HISTORIES", "12"))
CUTS_PER_HISTORY = 20
FIRST_SEED = int(os.environ.get("NBDQCOW_SEED", "1"))
NB_CLIENTS = 4
ENOSPC = 28


class FullDisk(RecordingStorage):
    """A recording disk on which writes of marked content fail half-way.

    That the file is cut afterwards is in no history: the longer file is what
    a power cut could leave just as well, and the harder case.
    """

    failing: bytes = b""

    async def pwritev(self, offset, buffers, *, fua=False):
        data = b"".join(bytes(b) for b in buffers)
        if self.failing and self.failing in data:
            half = len(data) // 2 // SECTOR * SECTOR
            await super().pwritev(offset, [data[:half]])
            raise OSError(ENOSPC, "full")
        await super().pwritev(offset, buffers, fua=fua)

    def try_pwrite(self, offset, data):
        if self.failing and self.failing in bytes(data):
            return False
        return super().try_pwrite(offset, data)

    async def truncate(self, length):
        await self._pause()
        assert length <= len(self.bytes)
        del self.bytes[length:]
        self.length = length
        await self._pause()


class Workload(SectorHistory):
    """Clients on one node, and what they know of each sector's history."""

    def __init__(self, node: Node, storage: FullDisk, rnd: random.Random) -> None:
        super().__init__(storage)
        self.node, self.disk, self.rnd = node, storage, rnd
        self.busy: set[int] = set()

    async def client(self) -> None:
        rnd, node = self.rnd, self.node
        cluster = node.driver.cluster_size // SECTOR
        total = node.size // SECTOR
        for _ in range(rnd.randrange(4, 16)):
            kinds = ("write", "pack", "zero", "fail", "flush")
            (kind,) = rnd.choices(kinds, (50, 15, 10, 10, 15))
            if kind == "flush":
                started = self.tick()
                await node.flush()
                self.flushes.append((started, self.event))
                continue
            first = rnd.randrange(total)
            count = min(total - first, rnd.choice((1, 1, 2, cluster, cluster + 1)))
            if kind == "pack" or rnd.random() < 0.3:
                first -= first % cluster
                count = min(total - first, cluster)
            sectors = range(first, first + count)
            if self.busy.isdisjoint(sectors):
                self.busy.update(sectors)
                await self.change(kind, first, count)
                self.busy.difference_update(sectors)

    async def change(self, kind: str, first: int, count: int) -> None:
        rnd, node = self.rnd, self.node
        offset, length = first * SECTOR, count * SECTOR
        data = rnd.randbytes(length)
        if kind == "pack":
            data = rnd.randbytes(16) * (length // 16)
        elif kind == "zero":
            data = bytes(length)
        elif kind == "fail":
            self.disk.failing = data[-16:]
        changes = self.begin(first, data)
        try:
            if kind == "pack":
                await node.driver.write_compressed(offset, data)
            elif kind == "zero":
                await node.write_zeroes(offset, length)
            elif not node.try_pwrite(offset, data):
                await node.pwrite(offset, data)
        except OSError as error:
            if (kind, error.errno) != ("fail", ENOSPC):
                raise
            # Of a write in place some sectors may be there.
            return
        self.end(changes)


async def open_node(
    data: bytes, rnd: random.Random, below: bytes | None
) -> tuple[Node, FullDisk]:
    storage = FullDisk(data, rnd)
    cache = {"l2_cache_size": rnd.choice((None, 1))}
    driver = await Qcow1Driver.open(storage, read_only=False, options=cache)
    backing = None
    if below is not None:
        raw = MemoryStorage(below, read_only=True)
        backing = Node(
            await RawDriver.open(raw, read_only=True, options={}), filename="below"
        )
    return Node(driver, filename="recording", backing=backing), storage


def some_image(rnd: random.Random) -> tuple[Image, bytes | None]:
    bits = rnd.choice((9, 9, 12, 16))
    nb_clusters = rnd.randrange(4, 60)
    below = None
    if rnd.random() < 0.5:
        below = rnd.randbytes(rnd.randrange(1, nb_clusters + 1) << bits)
    clusters: dict[int, Plain | Packed] = {}
    for index in rnd.sample(range(nb_clusters), nb_clusters // 3):
        if rnd.random() < 0.5:
            clusters[index] = Packed(rnd.randbytes(20) * 10)
        else:
            clusters[index] = Plain(rnd.randbytes(1 << bits))
    backing = b"" if below is None else b"below"
    # Small L2 tables, so that some are made.
    return Image(nb_clusters << bits, bits, 6, clusters, backing), below


async def explore(seed: int) -> int:
    """Run one history and look at some of its cuts; return how many."""
    rnd = random.Random(seed)
    image, below = some_image(rnd)
    before = image.content(below or b"")
    node, storage = await open_node(image.build(), rnd, below)
    work = Workload(node, storage, rnd)
    await asyncio.gather(*(work.client() for _ in range(NB_CLIENTS)))
    history = storage.history
    for number in range(CUTS_PER_HISTORY):
        cut = rnd.randrange(len(history.events) + 1)
        disk = history.disk_at(cut, rnd)
        where = f"seed {seed}, cut {number} after event {cut}"
        try:
            check(disk)
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from error
        after, _ = await open_node(disk, rnd, below)
        content = bytes(await after.pread(0, after.size))
        for sector in range(node.size // SECTOR):
            got = content[sector * SECTOR : (sector + 1) * SECTOR]
            old = before[sector * SECTOR : (sector + 1) * SECTOR]
            if sector in work.sectors:
                assert got in work.may_hold(sector, cut, old), f"{where}: {sector}"
            else:
                assert got == old, f"{where}: sector {sector} was never written"
        await after.close()
    storage.failing = b""
    await node.close()
    check(bytes(storage.bytes))
    return CUTS_PER_HISTORY


def test_power_cuts_leave_a_sound_image_with_all_flushed_data():
    states = 0
    for seed in range(FIRST_SEED, FIRST_SEED + NB_HISTORIES):
        states += asyncio.run(explore(seed))
    print(f"{states} disks after a power cut, seeds from {FIRST_SEED}")


def links_before_data(driver, monkeypatch):
    """A mutant: no flush between what entries name and the entries."""
    flush = FullDisk.flush
    calls = 0

    async def every_second(self):
        nonlocal calls
        calls += 1
        if calls % 2 == 0:
            await flush(self)

    monkeypatch.setattr(FullDisk, "flush", every_second)


def end_too_early(driver, monkeypatch):
    """A mutant: a failed write gives back more than it took."""
    give_back = type(driver.file_end).give_back

    def too_much(self, old_end, end):
        return give_back(self, max(0, old_end - driver.cluster_size), end)

    driver.file_end.give_back = too_much.__get__(driver.file_end)


@pytest.mark.parametrize("mutate", [links_before_data, end_too_early])
def test_a_broken_driver_is_caught(mutate, monkeypatch):
    open_sound = Qcow1Driver.open.__func__

    async def open_broken(cls, *args, **options):
        driver = await open_sound(cls, *args, **options)
        mutate(driver, monkeypatch)
        return driver

    monkeypatch.setattr(Qcow1Driver, "open", classmethod(open_broken))
    # What was overwritten may be no stream any more.
    with pytest.raises((AssertionError, BlockError)):
        for seed in range(FIRST_SEED, FIRST_SEED + 100):
            asyncio.run(explore(seed))

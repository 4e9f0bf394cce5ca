"""Power cuts: whatever the disk kept, the image is sound and flushed data there.

Several clients write, also compressed, zero, discard and flush on a recorded
disk, and in some histories one takes, deletes and applies snapshots. For
sampled cuts the replayer makes a disk that the cut could have left; `qemu-img
check` must find no corruption (leaks are allowed), every flushed sector must
hold what was flushed or something written later, every other sector its old
content or something that was written to it. A snapshot that was answered is
there, and every snapshot has one content for ever.
"""

import asyncio
import os
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbdqcow.block.node import Node
from nbdqcow.errors import BlockError, ImageError
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.formats.qcow2.write_extended import ExtendedAllocation
from nbdqcow.formats.raw import RawDriver
from nbdqcow.storage.memory import MemoryStorage
from tests.crash.recording import SECTOR, RecordingStorage
from tests.crash.sectors import SectorHistory

NB_HISTORIES = int(os.environ.get("NBDQCOW_CRASH_HISTORIES", "24"))
CUTS_PER_HISTORY = 20
FIRST_SEED = int(os.environ.get("NBDQCOW_SEED", "1"))
NB_CLIENTS = 4


@dataclass(slots=True)
class Kept:
    """A snapshot: its content, and the disk's event numbers at the answer to
    its making and at the beginning of its removal (None: neither yet)."""

    name: str
    content: bytes | None = None
    made_event: int | None = None
    removed_event: int | None = None


class Workload(SectorHistory):
    """Clients on one node, and what they know of each sector's history."""

    def __init__(
        self,
        node: Node,
        storage: RecordingStorage,
        rnd: random.Random,
        base: bytes = b"",
    ):
        super().__init__(storage)
        self.node, self.rnd, self.base = node, rnd, base
        self.busy: set[int] = set()
        self.snapshots: list[Kept] = []
        self.compresses = True

    async def client(self) -> None:
        rnd, node = self.rnd, self.node
        cluster = node.driver.cluster_size // SECTOR
        part = node.driver.subcluster_size // SECTOR
        total = node.size // SECTOR
        for _ in range(rnd.randrange(4, 16)):
            (kind,) = rnd.choices(
                ("write", "compress", "zero", "discard", "flush"),
                (45, 15 * self.compresses, 10, 20, 10),
            )
            if kind == "flush":
                started = self.tick()
                await node.flush()
                self.flushes.append((started, self.event))
                continue
            first = rnd.randrange(total)
            choices = (1, 1, 2, part, cluster, cluster + 1)
            count = min(total - first, rnd.choice(choices))
            if kind in ("compress", "discard") or rnd.random() < 0.3:
                first -= first % cluster
                count = min(total - first, cluster * rnd.choice((1, 1, 2)))
            elif part < cluster and rnd.random() < 0.3:
                first -= first % part
                count = min(total - first, part * rnd.choice((1, 2, 5)))
            sectors = range(first, first + count)
            if not self.busy.isdisjoint(sectors):
                continue
            self.busy.update(sectors)
            await self.change(kind, first, count)
            self.busy.difference_update(sectors)

    async def change(self, kind: str, first: int, count: int) -> None:
        rnd, node = self.rnd, self.node
        length = count * SECTOR
        if kind == "compress":
            # Some of it gets shorter, some does not.
            repeats = rnd.choice((1, 2, 8))
            data = b"".join(
                rnd.randbytes(SECTOR // repeats) * repeats for _ in range(count)
            )
        else:
            data = rnd.randbytes(length) if kind == "write" else bytes(length)
        changes = self.begin(first, data)
        offset = first * SECTOR
        if kind == "write":
            if not node.try_pwrite(offset, data):
                await node.pwrite(offset, data)
        elif kind == "compress":
            await node.pwrite_compressed(offset, data)
        elif kind == "zero":
            await node.write_zeroes(offset, len(data), may_unmap=rnd.random() < 0.7)
        else:
            await node.discard(offset, len(data))
        self.end(changes)

    async def snapshots_client(self) -> None:
        """Take and delete snapshots while the others write."""
        rnd, driver = self.rnd, self.node.driver
        for _ in range(rnd.randrange(1, 5)):
            for _ in range(rnd.randrange(20)):
                await asyncio.sleep(0)
            present = [k for k in self.snapshots if k.removed_event is None]
            if present and rnd.random() < 0.4:
                kept = rnd.choice(present)
                kept.removed_event = self.event
                await driver.snapshot_delete(kept.name)
            else:
                await self.take_snapshot()

    async def take_snapshot(self) -> Kept:
        kept = Kept(f"s{len(self.snapshots)}")
        self.snapshots.append(kept)
        started = self.tick()
        await self.node.driver.snapshot_create(kept.name)
        # All that was answered before it is durable with it.
        self.flushes.append((started, self.event))
        kept.made_event = self.event
        kept.content = await snapshot_content(
            bytes(self.storage.bytes), kept.name, self.base
        )
        return kept

    async def apply_snapshot(self, kept: Kept) -> None:
        """Go back, while nobody writes: each sector has what it had then."""
        assert kept.content is not None
        changes = self.begin(0, kept.content[: self.node.size // SECTOR * SECTOR])
        await self.node.driver.snapshot_apply(kept.name)
        self.end(changes)
        self.flushes.append((self.tick(), self.event))

    def allowed(self, sector: int, cut: int) -> set[bytes]:
        """Return what a sector may hold on a disk that was cut."""
        before = self.base[sector * SECTOR :][:SECTOR].ljust(SECTOR, b"\0")
        return self.may_hold(sector, cut, before)


async def snapshot_content(disk: bytes, name: str, base: bytes) -> bytes | None:
    """Return what a snapshot on a disk holds, None if it is not there."""
    storage = RecordingStorage(disk, random.Random(0))
    try:
        driver = await Qcow2Driver.open(
            storage, read_only=True, options={"snapshot": name}
        )
    except ImageError:
        return None
    node = Node(driver, filename="recording", backing=await backing_node(base))
    return bytes(await node.pread(0, node.size))


async def backing_node(base: bytes) -> Node | None:
    """Return a raw image with these bytes; None if there are none."""
    if not base:
        return None
    driver = await RawDriver.open(MemoryStorage(base), read_only=True, options={})
    return Node(driver, filename="base")


async def open_node(
    data: bytes, rnd: random.Random, base: bytes = b""
) -> tuple[Node, RecordingStorage]:
    storage = RecordingStorage(data, rnd)
    driver = await Qcow2Driver.open(
        storage,
        read_only=False,
        options={"l2_cache_size": rnd.choice((None, 64 << 10))},
    )
    backing = await backing_node(base)
    return Node(driver, filename="recording", backing=backing), storage


async def explore(
    seed: int,
    path: Path,
    *,
    with_snapshots: bool = False,
    with_subclusters: bool = False,
) -> int:
    """Run one history and look at some of its cuts; return how many."""
    rnd = random.Random(seed)
    base = b""
    if with_subclusters:
        # Few clusters, so that writers meet in them.
        cluster_size = rnd.choice((16384, 16384, 65536))
        size = cluster_size * rnd.randrange(2, 8)
        options = f"cluster_size={cluster_size},extended_l2=on"
        if seed % 3:
            base = rnd.randbytes(size - rnd.randrange(cluster_size) // SECTOR * SECTOR)
            base_path = path.with_name("base.raw")
            base_path.write_bytes(base)
            options += f",backing_file={base_path},backing_fmt=raw"
    else:
        cluster_size = rnd.choice((512, 512, 4096, 65536))
        size = cluster_size * rnd.randrange(4, 60)
        options = f"cluster_size={cluster_size}," + rnd.choice(
            ("compat=0.10", "compat=1.1", "compression_type=zstd")
            # Snapshots of shared clusters need larger counts.
            + (() if with_snapshots else ("refcount_bits=2",))
        )
    subprocess.run(
        ["qemu-img", "create", "-qf", "qcow2", "-o", options, path, str(size)],
        check=True,
    )
    node, storage = await open_node(path.read_bytes(), rnd, base)
    work = Workload(node, storage, rnd, base)
    clients = [work.client() for _ in range(NB_CLIENTS)]
    if with_snapshots:
        await asyncio.gather(*clients, work.snapshots_client())
        present = [k for k in work.snapshots if k.removed_event is None]
        if present:
            await work.apply_snapshot(rnd.choice(present))
        clients = [work.client() for _ in range(NB_CLIENTS)]
    await asyncio.gather(*clients)
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
        after, _ = await open_node(disk, rnd, base)
        for sector in work.sectors:
            got = bytes(await after.pread(sector * SECTOR, SECTOR))
            assert got in work.allowed(sector, cut), f"{where}: sector {sector}"
        for kept in work.snapshots:
            found = await snapshot_content(disk, kept.name, base)
            if kept.made_event is not None and kept.made_event <= cut:
                removed = kept.removed_event is not None and kept.removed_event <= cut
                assert found == kept.content or (removed and found is None), where
            else:
                assert found in (None, kept.content), where
    await node.close()
    path.write_bytes(storage.bytes)
    subprocess.run(["qemu-img", "check", "-q", path], check=True)
    return CUTS_PER_HISTORY


def test_power_cuts_leave_a_sound_image_with_all_flushed_data(tmp_path):
    states = 0
    for seed in range(FIRST_SEED, FIRST_SEED + NB_HISTORIES):
        states += asyncio.run(explore(seed, tmp_path / "disk.qcow2"))
    print(f"{states} disks after a power cut, seeds from {FIRST_SEED}")


def test_power_cuts_during_snapshot_operations(tmp_path):
    states = 0
    for seed in range(FIRST_SEED, FIRST_SEED + NB_HISTORIES):
        states += asyncio.run(
            explore(seed, tmp_path / "disk.qcow2", with_snapshots=True)
        )
    print(f"{states} disks after a power cut, seeds from {FIRST_SEED}")


def test_power_cuts_with_subclusters(tmp_path):
    states = 0
    for seed in range(FIRST_SEED, FIRST_SEED + NB_HISTORIES // 2):
        states += asyncio.run(
            explore(
                seed,
                tmp_path / "disk.qcow2",
                with_snapshots=bool(seed % 2),
                with_subclusters=True,
            )
        )
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

    assert driver.writeback.flush_files
    driver.writeback.flush_files = no_flush


def bits_before_data(driver):
    """A mutant: subclusters are linked while they are being written."""
    begin = driver.begin_write

    async def begin_write(offset, length):
        plan = await begin(offset, length)
        if isinstance(plan.private, ExtendedAllocation):
            plan.private.link(driver)
            # The second link, when it is written, changes nothing more.
            plan.private.reused = True
        return plan

    driver.begin_write = begin_write


@pytest.mark.parametrize(
    ("mutate", "with_subclusters"),
    [(early_free, False), (links_before_data, False), (bits_before_data, True)],
)
def test_a_broken_driver_is_caught(mutate, with_subclusters, tmp_path, monkeypatch):
    open_sound = Qcow2Driver.open.__func__

    async def open_broken(cls, *args, **options):
        driver = await open_sound(cls, *args, **options)
        mutate(driver)
        return driver

    monkeypatch.setattr(Qcow2Driver, "open", classmethod(open_broken))
    # A compressed cluster whose place another has taken is an error to read.
    with pytest.raises((AssertionError, BlockError)):
        for seed in range(FIRST_SEED, FIRST_SEED + 100):
            asyncio.run(
                explore(
                    seed, tmp_path / "disk.qcow2", with_subclusters=with_subclusters
                )
            )

"""Power cuts while an image is resized or amended, or its refcounts are lazy.

One operation after the other, each durable when it is answered: a disk that
was cut holds, sector by sector, what the last answered one left or what the one
after it would leave; its size is one of these two. `qemu-img check` finds no
corruption, after a repair if the image says that it is dirty.
"""

import asyncio
import errno
import os
import random
import subprocess

import pytest

from nbdqcow.block.node import Node
from nbdqcow.errors import BlockError
from nbdqcow.formats.qcow2 import snapshot
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.formats.qcow2.header import Header
from nbdqcow.formats.qcow2.refcount import Refcounts
from tests.crash.recording import SECTOR, RecordingStorage

NB_HISTORIES = int(os.environ.get("NBDQCOW_CRASH_HISTORIES", "24")) // 2
CUTS_PER_HISTORY = 12
FIRST_SEED = int(os.environ.get("NBDQCOW_SEED", "1"))


async def open_node(data, rnd):
    storage = RecordingStorage(data, rnd)
    driver = await Qcow2Driver.open(storage, read_only=False, options={})
    return Node(driver, filename="recording"), storage


class History:
    """Operations on one node, and what each of them left.

    ``states``: the disk's event number at the answer, and the content then.
    """

    kinds = (
        *("write", "write", "write", "zero", "resize", "resize", "amend", "snapshot"),
    )
    write_sectors = (1, 3, 20)

    def __init__(self, node, storage, rnd):
        self.max_sectors = 4 * node.driver.cluster_size // SECTOR * 16
        self.node, self.storage, self.rnd = node, storage, rnd
        self.content = bytearray(node.size)
        self.states = [(0, bytes(self.content))]
        self.names = ["created"]

    async def run(self):
        for _ in range(self.rnd.randrange(6, 16)):
            kind = self.rnd.choice(self.kinds)
            await getattr(self, kind)()
            await self.node.flush()
            self.states.append((len(self.storage.history.events), bytes(self.content)))
            self.names.append(kind)

    async def write(self):
        nb = len(self.content) // SECTOR
        if nb:
            first = self.rnd.randrange(nb)
            count = min(nb - first, self.rnd.choice(self.write_sectors))
            data = self.rnd.randbytes(count * SECTOR)
            offset = first * SECTOR
            await self.node.pwrite(offset, data)
            self.content[offset : offset + len(data)] = data

    async def zero(self):
        nb = len(self.content) // SECTOR
        if nb:
            first = self.rnd.randrange(nb)
            length = min(nb - first, 30) * SECTOR
            unmap = self.rnd.random() < 0.5
            await self.node.write_zeroes(first * SECTOR, length, may_unmap=unmap)
            self.content[first * SECTOR : first * SECTOR + length] = bytes(length)

    async def resize(self):
        size = self.rnd.randrange(1, self.max_sectors) * SECTOR
        modes = ("off", "off", "metadata") if size > self.node.size else ("off",)
        if self.node.driver.header.version < 3:
            await self.node.amend({"compat": "1.1"}, lambda done, total: None)
        await self.node.resize(size, preallocation=self.rnd.choice(modes))
        self.content = self.content[:size].ljust(size, b"\0")

    async def amend(self):
        if await self.node.driver.snapshot_list():
            options = {"lazy_refcounts": self.rnd.random() < 0.7}
        else:
            options = self.rnd.choice(
                (
                    {"compat": "0.10", "refcount_bits": 16},
                    {"compat": "1.1", "refcount_bits": self.rnd.choice((8, 16, 64))},
                    {"compat": "1.1", "lazy_refcounts": True},
                    {"compat": "1.1", "lazy_refcounts": False},
                )
            )
        if self.node.driver.header.version < 3:
            options = {"compat": "1.1"} | options
        await self.node.amend(options, lambda done, total: None)

    async def snapshot(self):
        if await self.node.driver.snapshot_list():
            await self.node.driver.snapshot_delete("s")
        else:
            await self.node.driver.snapshot_create("s")


class Snapshots(History):
    """Snapshots come and go, the oldest or the newest first."""

    kinds = ("write", "zero", "snapshot", "snapshot")

    async def snapshot(self):
        names = [one.name for one in await self.node.driver.snapshot_list()]
        if names and (len(names) > 2 or self.rnd.random() < 0.5):
            name = self.rnd.choice((names[0], names[-1]))
            await self.node.driver.snapshot_delete(name)
        else:
            await self.node.driver.snapshot_create(f"s{len(self.states)}")


class ManyBlocks(History):
    """Of an image whose clusters many refcount blocks count."""

    kinds = ("write", "write", "resize", "resize", "snapshot")
    write_sectors = (20, 200, 400)

    def __init__(self, node, storage, rnd):
        super().__init__(node, storage, rnd)
        self.max_sectors = 600


def check(path, where):
    dirty = Header.parse(path.read_bytes()[:65536]).dirty
    if dirty:
        repair = ["qemu-img", "check", "-q", "-r", "all", path]
        subprocess.run(repair, check=False, capture_output=True)
    done = subprocess.run(
        ["qemu-img", "check", path], capture_output=True, text=True, check=False
    )
    allowed = (0,) if dirty else (0, 3)
    assert done.returncode in allowed, f"{where}:\n{done.stdout}{done.stderr}"


async def explore(seed, path, kind=History):
    rnd = random.Random(seed)
    cluster_size = 512 if kind is ManyBlocks else rnd.choice((512, 4096))
    size = cluster_size * rnd.randrange(4, 60)
    options = f"cluster_size={cluster_size},lazy_refcounts={rnd.choice(('on', 'off'))}"
    if kind is ManyBlocks:
        options += ",refcount_bits=64"
    subprocess.run(
        ["qemu-img", "create", "-qf", "qcow2", "-o", options, path, str(size)],
        check=True,
    )
    node, storage = await open_node(path.read_bytes(), rnd)
    history = kind(node, storage, rnd)
    await history.run()
    events = len(storage.history.events)
    for number in range(CUTS_PER_HISTORY):
        cut = rnd.randrange(events + 1)
        last = max(i for i, (at, _) in enumerate(history.states) if at <= cut)
        names = history.names[last : last + 2]
        where = f"seed {seed}, cut {number} after event {cut}, in {names}"
        disk = storage.history.disk_at(cut, rnd)
        path.write_bytes(disk)
        check(path, where)
        after, _ = await open_node(disk, rnd)
        states = [content for _, content in history.states[last : last + 2]]
        sizes = {len(content) for content in states}
        # An amended image may have gone through another version first.
        assert after.size in sizes, where
        found = bytes(await after.pread(0, after.size))
        for offset in range(0, after.size, SECTOR):
            allowed = {
                content[offset : offset + SECTOR].ljust(SECTOR, b"\0")
                for content in states
            }
            assert found[offset : offset + SECTOR] in allowed, f"{where}: {offset}"
    await node.close()
    path.write_bytes(storage.bytes)
    subprocess.run(["qemu-img", "check", "-q", path], check=True)


def test_power_cuts_during_operations(tmp_path):
    for seed in range(FIRST_SEED, FIRST_SEED + NB_HISTORIES):
        asyncio.run(explore(seed, tmp_path / "disk.qcow2"))


def test_power_cuts_while_snapshots_go_without_room(tmp_path, monkeypatch):
    async def refuse(*args):
        raise BlockError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(snapshot, "_delete_at_once", refuse)
    for seed in range(FIRST_SEED, FIRST_SEED + NB_HISTORIES):
        asyncio.run(explore(seed, tmp_path / "disk.qcow2", Snapshots))


def test_power_cuts_while_refcount_blocks_come_and_go(tmp_path):
    for seed in range(FIRST_SEED, FIRST_SEED + NB_HISTORIES // 2):
        asyncio.run(explore(seed, tmp_path / "disk.qcow2", ManyBlocks))


def test_blocks_that_go_before_their_counts_are_caught(tmp_path, monkeypatch):
    async def all_blocks(self):
        return [i for i, offset in enumerate(self.table) if i and offset]

    monkeypatch.setattr(Refcounts, "empty_blocks", all_blocks)
    with pytest.raises((AssertionError, OSError, subprocess.CalledProcessError)):
        for seed in range(FIRST_SEED, FIRST_SEED + 100):
            asyncio.run(explore(seed, tmp_path / "disk.qcow2", ManyBlocks))


def test_a_driver_that_forgets_the_mark_is_caught(tmp_path, monkeypatch):
    async def forget(self):
        pass

    monkeypatch.setattr(Qcow2Driver, "mark_dirty", forget)
    with pytest.raises(AssertionError):
        for seed in range(FIRST_SEED, FIRST_SEED + 100):
            asyncio.run(explore(seed, tmp_path / "disk.qcow2"))

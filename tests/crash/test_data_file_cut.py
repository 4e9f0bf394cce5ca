"""Power cuts of images with an external data file: two disks, one moment.

What the image says after a cut must be true of the data file after the same
cut: a cluster is not linked before its data is there. A raw data file holds
what the disk holds, whatever the tables say.
"""

import asyncio
import os
import random
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from nbdqcow.block.node import Node
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from tests.crash.recording import SECTOR, History, RecordingStorage
from tests.crash.test_power_cut import CUTS_PER_HISTORY, FIRST_SEED, Workload

NB_HISTORIES = int(os.environ.get("NBDQCOW_CRASH_HISTORIES", "6"))
OPTIONS = (
    "cluster_size=512",
    "cluster_size=4096",
    "cluster_size=65536",
    "cluster_size=4096,data_file_raw=on",
    "cluster_size=16384,extended_l2=on",
    "cluster_size=16384,extended_l2=on,data_file_raw=on",
)


class Timeline(list):
    """Whose event came when: 0 for the image, 1 for the data file."""

    def record(self, history: History, number: int) -> None:
        timeline = self

        class Events(list):
            def append(self, event):
                super().append(event)
                timeline.append(number)

        history.events = Events()


async def open_node(image, data, rnd):
    files = [RecordingStorage(content, rnd) for content in (image, data)]

    async def open_data_file(name):
        assert name == "data"
        return files[1]

    driver = await Qcow2Driver.open(
        files[0],
        read_only=False,
        options={
            "l2_cache_size": rnd.choice((None, 64 << 10)),
            "open_data_file": open_data_file,
        },
    )
    return Node(driver, filename="recording"), files


async def explore(seed: int, directory: Path) -> int:
    """Run one history and look at some of its cuts; return how many."""
    rnd = random.Random(seed)
    options = rnd.choice(OPTIONS)
    cluster_size = int(options.partition("=")[2].partition(",")[0])
    size = cluster_size * rnd.randrange(2, 40)
    paths = directory / "image", directory / "data"
    subprocess.run(
        ["qemu-img", "create", "-qf", "qcow2", "-o", f"data_file=data,{options}",
         "image", str(size)],
        check=True, cwd=directory,
    )  # fmt: skip
    node, files = await open_node(*(path.read_bytes() for path in paths), rnd)
    timeline = Timeline()
    for number, file in enumerate(files):
        timeline.record(file.history, number)
    both = SimpleNamespace(history=SimpleNamespace(events=timeline))
    work = Workload(node, both, rnd)
    work.compresses = False
    await asyncio.gather(*(work.client() for _ in range(4)))
    for number in range(CUTS_PER_HISTORY):
        cut = rnd.randrange(len(timeline) + 1)
        disks = [
            file.history.disk_at(timeline[:cut].count(index), rnd)
            for index, file in enumerate(files)
        ]
        for path, disk in zip(paths, disks, strict=True):
            path.write_bytes(disk)
        where = f"seed {seed} ({options}), cut {number} after event {cut}"
        check = subprocess.run(
            ["qemu-img", "check", "image"],
            capture_output=True, text=True, cwd=directory,
        )  # fmt: skip
        assert check.returncode in (0, 3), f"{where}:\n{check.stdout}{check.stderr}"
        after, _ = await open_node(*disks, rnd)
        raw = disks[1].ljust(size, b"\0") if "raw" in options else None
        for sector in work.sectors:
            offset = sector * SECTOR
            got = bytes(await after.pread(offset, SECTOR))
            assert got in work.allowed(sector, cut), f"{where}: sector {sector}"
            if raw is not None:
                got = raw[offset : offset + SECTOR]
                assert got in work.allowed(sector, cut), f"{where}: raw {sector}"
    await node.close()
    for path, file in zip(paths, files, strict=True):
        path.write_bytes(file.bytes)
    subprocess.run(["qemu-img", "check", "-q", "image"], check=True, cwd=directory)
    return CUTS_PER_HISTORY


def test_power_cuts_with_a_data_file(tmp_path):
    states = 0
    for seed in range(FIRST_SEED, FIRST_SEED + NB_HISTORIES):
        states += asyncio.run(explore(seed, tmp_path))
    print(f"{states} pairs of disks after a power cut, seeds from {FIRST_SEED}")


def test_what_a_smaller_disk_had_is_gone(tmp_path):
    """With a raw data file a larger disk would show it."""
    subprocess.run(
        ["qemu-img", "create", "-qf", "qcow2", "-o", "data_file=data,data_file_raw=on",
         "image", "1M"],
        check=True, cwd=tmp_path,
    )  # fmt: skip
    contents = [(tmp_path / name).read_bytes() for name in ("image", "data")]

    async def run():
        node, files = await open_node(*contents, random.Random(FIRST_SEED))
        await node.pwrite(0, b"x" * (1 << 20))
        await node.resize(1 << 19)
        events = files[1].history.events
        cut = max(i for i, event in enumerate(events) if event.kind == "truncate")
        assert any(event.nb_durable > cut for event in events)
        await node.close()

    asyncio.run(run())


def test_links_that_come_before_data_are_caught(tmp_path, monkeypatch):
    open_sound = Qcow2Driver.open.__func__

    async def open_broken(cls, *args, **options):
        driver = await open_sound(cls, *args, **options)
        driver.writeback.flush_files = driver.storage.flush
        return driver

    monkeypatch.setattr(Qcow2Driver, "open", classmethod(open_broken))
    with pytest.raises(AssertionError):
        for seed in range(FIRST_SEED, FIRST_SEED + 100):
            asyncio.run(explore(seed, tmp_path))

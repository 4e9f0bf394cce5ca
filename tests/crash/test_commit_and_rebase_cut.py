"""Power cuts while an image is committed to its backing image, or rebased.

What a guest reads through the chain is at every moment what it read before:
each disk that a cut can leave of both files is opened as the header says then.
"""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest

from nbdqcow.block.driver import FormatDriver
from nbdqcow.block.node import Node
from nbdqcow.formats.qcow1 import create as qcow1_create
from nbdqcow.formats.qcow1.driver import Qcow1Driver
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.formats.raw import RawDriver
from nbdqcow.jobs import commit as commit_job
from nbdqcow.jobs.control import JobControl
from nbdqcow.jobs.rebase import rebase
from nbdqcow.storage.memory import MemoryStorage
from tests.crash.histories import created
from tests.crash.recording import RecordingStorage
from tests.crash.states import Figures, cut_after
from tests.crash.test_data_file_cut import Timeline
from tests.crash.verdicts import check_by_us, is_sound
from tests.qcow1_image import check as check_qcow1

KiB = 1 << 10
SIZE = 40 * KiB
FORMATS: dict[str, type[FormatDriver]] = {
    "raw": RawDriver,
    "qcow": Qcow1Driver,
    "qcow2": Qcow2Driver,
}
STATES = 3
STATES_AT_LENGTH = int(os.environ.get("NBDQCOW_STATES", "600")) // 30


@dataclass(slots=True)
class Image:
    """An image in memory; ``data`` is its file."""

    format: str
    data: bytes

    async def open(
        self, storage: RecordingStorage | MemoryStorage, backing: Node | None = None
    ) -> Node:
        read_only = storage.read_only
        driver = await FORMATS[self.format].open(
            storage, read_only=read_only, options={}
        )
        return Node(driver, filename=self.format, backing=backing)


async def make(format_: str, size: int, rnd: random.Random, **options: object) -> Image:
    """Return an image with some data, some zeroes and some holes."""
    if format_ == "raw":
        return Image(format_, rnd.randbytes(size))
    storage = MemoryStorage(b"")
    if format_ == "qcow":
        await qcow1_create.create(storage, qcow1_create.CreateOptions(size=size))
    else:
        storage = MemoryStorage(created(size=size, **options))
    image = Image(format_, b"")
    below = None
    if options.get("backing_file"):
        below = await Image("raw", b"").open(MemoryStorage(bytes(size), read_only=True))
    node = await image.open(storage, below)
    for _ in range(6):
        offset = rnd.randrange(size // 512) * 512
        length = min(size - offset, rnd.choice((512, 1024, 3072)))
        if rnd.random() < 0.3:
            await node.write_zeroes(offset, length)
        else:
            await node.pwrite(offset, rnd.randbytes(length))
    await node.close()
    image.data = bytes(storage.data)
    return image


def check(image: Image, data: bytes, where: str) -> None:
    if image.format == "qcow2":
        result, text = check_by_us(data)
        assert is_sound(result), f"{where}:\n{text}"
    elif image.format == "qcow":
        check_qcow1(data)


@dataclass(slots=True)
class Cuts:
    """Two files that are written to, and what a cut may leave of them."""

    images: list[Image]
    files: list[RecordingStorage]
    timeline: Timeline

    @classmethod
    def record(cls, images: list[Image], rnd: random.Random) -> "Cuts":
        files = [RecordingStorage(image.data, rnd) for image in images]
        timeline = Timeline()
        for number, file in enumerate(files):
            timeline.record(file.history, number)
        return cls(images, files, timeline)

    async def look(
        self,
        content: Callable[[list[bytes]], Awaitable[bytes]],
        expected: bytes,
        limit: int,
        rnd: random.Random,
        figures: Figures,
    ) -> None:
        """See that every disk after every cut has the content expected."""
        seen = set()
        for at in range(len(self.timeline) + 1):
            nb = [self.timeline[:at].count(n) for n in range(len(self.files))]
            cuts = [
                cut_after(f.history, n) for f, n in zip(self.files, nb, strict=True)
            ]
            figures.nb_cuts += 1
            left = [list(cut.states(limit, rnd)) for cut in cuts]
            figures.nb_whole_cuts += all(cut.nb_states <= limit for cut in cuts)
            for number in range(max(map(len, left))):
                disks = [states[number % len(states)] for states in left]
                key = hash(tuple(disks))
                if key in seen:
                    continue
                seen.add(key)
                where = f"cut {at}, disk {number}"
                for image, disk in zip(self.images, disks, strict=True):
                    check(image, disk, where)
                found = await content(disks)
                # Not in the assertion: pytest would compare them line by line.
                same = found == expected
                assert same, f"{where}: {differences(found, expected)}"
                figures.nb_states += 1


def differences(found: bytes, expected: bytes) -> str:
    wrong = [
        f"{i * 512:#x}"
        for i in range(len(expected) // 512)
        if found[i * 512 : i * 512 + 512] != expected[i * 512 : i * 512 + 512]
    ]
    return f"{len(found)} bytes, wrong sectors at {', '.join(wrong)}"


async def read_all(node: Node) -> bytes:
    try:
        return bytes(await node.pread(0, node.size))
    finally:
        await node.close()


async def commit_and_cut(format_: str, seed: int, limit: int, figures: Figures) -> None:
    rnd = random.Random(f"{seed}/{format_}")
    base_size = SIZE if format_ == "qcow" else rnd.choice((SIZE, SIZE, SIZE // 2))
    base = await make(format_, base_size, rnd, cluster_size=rnd.choice((512, 4096)))
    top = await make(
        "qcow2", SIZE, rnd, cluster_size=rnd.choice((512, 4096)), backing_file="base"
    )

    async def content(disks: list[bytes]) -> bytes:
        below = await base.open(MemoryStorage(disks[1], read_only=True))
        return await read_all(
            await top.open(MemoryStorage(disks[0], read_only=True), below)
        )

    before = await content([top.data, base.data])
    cuts = Cuts.record([top, base], rnd)
    below = await base.open(cuts.files[1])
    node = await top.open(cuts.files[0], below)
    await commit_job.commit(node, below, JobControl())
    await node.driver.make_empty()
    await node.close()
    await cuts.look(content, before, limit, rnd, figures)
    assert bytes(cuts.files[1].bytes) != base.data
    after = await read_all(
        await base.open(MemoryStorage(bytes(cuts.files[1].bytes), read_only=True))
    )
    assert after == before


async def rebase_and_cut(kind: str, seed: int, limit: int, figures: Figures) -> None:
    """Rebase an image on "new", on nothing, or say only that it is (unsafe)."""
    rnd = random.Random(f"{seed}/{kind}")
    backings = {
        "old": rnd.randbytes(SIZE),
        "new": rnd.randbytes(SIZE - rnd.choice((0, 8 * KiB))),
    }
    if kind == "unsafe":
        # A name for the same content: so nothing must be copied.
        backings["new"] = backings["old"]
    # Some of it is the same in both, or there would be nothing to save.
    backings["new"] = backings["old"][: 10 * KiB] + backings["new"][10 * KiB :]
    top = await make(
        "qcow2", SIZE, rnd, cluster_size=rnd.choice((512, 4096)), backing_file="old"
    )

    async def below(name: str | None) -> Node | None:
        if name is None:
            return None
        return await Image("raw", b"").open(
            MemoryStorage(backings[name], read_only=True)
        )

    async def content(disks: list[bytes]) -> bytes:
        node = await top.open(MemoryStorage(disks[0], read_only=True))
        node.backing = await below(node.driver.backing_filename)
        return await read_all(node)

    before = await content([top.data])
    cuts = Cuts.record([top], rnd)
    node = await top.open(cuts.files[0], await below("old"))
    name = None if kind == "none" else "new"
    if kind != "unsafe":
        await rebase(node, await below(name), JobControl())
    await node.change_backing_file(name, None if name is None else "raw")
    assert node.driver.backing_filename == name
    await node.close()
    await cuts.look(content, before, limit, rnd, figures)


@pytest.mark.parametrize("format_", FORMATS)
def test_power_cuts_during_a_commit(format_, seed, figures):
    found = Figures()
    for number in range(5):
        asyncio.run(commit_and_cut(format_, seed + number, STATES, found))
    figures(f"power cuts, commit to {format_}: {found}, seeds from {seed}")


@pytest.mark.parametrize("kind", ["new", "none", "unsafe"])
def test_power_cuts_during_a_rebase(kind, seed, figures):
    found = Figures()
    for number in range(5):
        asyncio.run(rebase_and_cut(kind, seed + number, STATES, found))
    figures(f"power cuts, rebase {kind}: {found}, seeds from {seed}")


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_power_cuts_during_commits_and_rebases_at_length(seed, figures):
    found = Figures()
    for number in range(8):
        for format_ in FORMATS:
            run = commit_and_cut(format_, seed + number, STATES_AT_LENGTH, found)
            asyncio.run(run)
        for kind in ("new", "none", "unsafe"):
            run = rebase_and_cut(kind, seed + number, STATES_AT_LENGTH, found)
            asyncio.run(run)
    figures(f"power cuts at length, commit and rebase: {found}, seeds from {seed}")


# -- mutants -----------------------------------------------------------------------


async def _no_flush(self):
    pass


def empties_before_the_base_is_durable(monkeypatch):
    for driver in (RawDriver, Qcow2Driver):
        monkeypatch.setattr(driver, "flush", _no_flush)


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
def test_a_broken_commit_is_caught(format_, monkeypatch, seed):
    """A mutant: the top is emptied before the base is durable."""
    empties_before_the_base_is_durable(monkeypatch)
    with pytest.raises(AssertionError):
        for number in range(20):
            run = commit_and_cut(format_, seed + number, STATES, Figures())
            asyncio.run(run)


def test_a_broken_rebase_is_caught(monkeypatch, seed):
    """A mutant: the header names the new backing file before the data that is
    another there is durable."""
    monkeypatch.setattr(Node, "flush", _no_flush)
    with pytest.raises(AssertionError):
        for number in range(20):
            run = rebase_and_cut("new", seed + number, STATES, Figures())
            asyncio.run(run)

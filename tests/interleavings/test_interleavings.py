"""Requests that meet at every await, in an order drawn from a seed.

Several clients work on one node, on a loop that permutes what is ready. Every
read must be explained by some order of the requests, byte by byte; nobody may
wait for ever; in the end the image has neither corruption nor leak. Some
requests are cancelled: they may have happened or not, and nothing else.
"""

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from nbdqcow.block.inflight import Epochs, InFlightRanges
from nbdqcow.block.node import Node
from nbdqcow.errors import NotSupported
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.types import COMPRESSED, DATA, UNALLOCATED
from tests.crash.histories import (
    BACKING,
    HISTORIES,
    SECTOR,
    History,
    KiB,
    created,
    filled,
)
from tests.crash.verdicts import check_by_us, is_sound
from tests.differential.model import DiskModel
from tests.differential.operations import Generator, Kind, Operation, Weights
from tests.interleavings.permuting import InlinePool, PermutedStorage, PermutingLoop

NB_RUNS = int(os.environ.get("NBDQCOW_INTERLEAVINGS", "160"))
NB_LONG_RUNS = int(os.environ.get("NBDQCOW_LONG_INTERLEAVINGS", "12000"))
NB_CLIENTS = 5
WEIGHTS = Weights(read=30, write=40, zero=8, trim=20, flush=16, cache=2)

# So small that what is freed is soon used again.
TINY = History("tiny", lambda: created(size=4096), [])
# So few tables in memory that they come and go all the time.
SMALL_CACHES = {"l2_cache_size": 1, "refcount_cache_size": 1}
SUBCLUSTERS = {"size": 96 * KiB, "cluster_size": 16 * KiB, "extended_l2": True}
IMAGES = [
    *HISTORIES[:1],
    *(h for h in HISTORIES if h.name in ("copy-on-write", "compressed", "discard")),
    History("small-clusters", lambda: filled(40, refcount_order=6), []),
    History("version-2", lambda: filled(20, version=2), []),
    *[TINY] * 4,
    History("large-clusters", lambda: created(cluster_size=4096), []),
    History("subclusters", lambda: created(**SUBCLUSTERS), [], options=SMALL_CACHES),
    History(
        "subclusters over a base",
        lambda: created(**SUBCLUSTERS, refcount_bits=8),
        [],
        backing=BACKING[: 70 * KiB],
        options={"lazy_refcounts": True, "pass_discard_other": True, **SMALL_CACHES},
    ),
    History(
        "kept-clusters",
        lambda: created(size=20 * KiB, refcount_bits=64),
        [],
        options={"discard_no_unref": True, **SMALL_CACHES},
    ),
    History(
        "lazy-refcounts",
        lambda: created(size=40 * KiB, refcount_bits=8),
        [],
        backing=BACKING[: 33 * KiB],
        options={"lazy_refcounts": True, "explicit_zeroes": True, **SMALL_CACHES},
    ),
]


@pytest.fixture(autouse=True)
def no_threads(monkeypatch):
    monkeypatch.setattr("nbdqcow.formats.qcow2.compress.Pool", InlinePool)


@dataclass(slots=True)
class Figures:
    nb_runs: int = 0
    nb_requests: int = 0
    nb_cancelled: int = 0
    nb_choices: int = 0

    def __str__(self) -> str:
        return (
            f"{self.nb_runs} runs, {self.nb_requests} requests, "
            f"{self.nb_cancelled} cancelled, {self.nb_choices} orders drawn"
        )


class Clients:
    """Those who work on one node, and the model that they share."""

    def __init__(self, node: Node, model: DiskModel, rnd: random.Random) -> None:
        self.node, self.model, self.rnd = node, model, rnd
        self.nb_requests = 0
        self.nb_cancelled = 0
        self.cancels = rnd.random() < 0.5
        self.snapshots: dict[str, bytes] = {}

    async def client(self, nb_requests: int) -> None:
        generator = Generator(
            self.rnd,
            self.model.size,
            self.node.driver.cluster_size,
            WEIGHTS,
            maximum_length=8 * self.node.driver.cluster_size,
        )
        for _ in range(nb_requests):
            await self.one(generator.next())

    async def one(self, operation: Operation) -> None:
        """Do one request; some are cancelled in the middle."""
        self.nb_requests += 1
        if not self.cancels or self.rnd.random() < 0.7:
            await self.request(operation)
            return
        task = asyncio.ensure_future(self.request(operation))
        for _ in range(self.rnd.randrange(30)):
            await asyncio.sleep(0)
        if task.cancel():
            self.nb_cancelled += 1
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()

    async def request(self, operation: Operation) -> None:
        model, offset, length = self.model, operation.offset, operation.length
        if operation.kind is Kind.READ:
            submitted_at = model.tick()
            data = await self.read(offset, length)
            model.check_read(offset, data, submitted_at)
            return
        change = None
        if operation.kind in (Kind.WRITE, Kind.ZERO, Kind.TRIM):
            data = operation.data if operation.kind is Kind.WRITE else None
            change = model.begin(
                offset, length, data, optional=operation.kind is Kind.TRIM
            )
        # One that is cancelled stays open in the model: it may have happened.
        await self.change(operation)
        if change is not None:
            model.end(change)

    async def change(self, operation: Operation) -> None:
        node, offset, length = self.node, operation.offset, operation.length
        match operation.kind:
            case Kind.WRITE:
                inline = self.rnd.random() < 0.5
                if not (inline and node.try_pwrite(offset, operation.data)):
                    await node.pwrite(offset, operation.data)
            case Kind.ZERO:
                await node.write_zeroes(offset, length, may_unmap=operation.may_unmap)
            case Kind.TRIM:
                await node.discard(offset, length)
            case Kind.FLUSH:
                await node.flush()
            case Kind.CACHE:
                await node.prefetch(offset, length)

    async def read(self, offset: int, length: int) -> bytes:
        found = None
        if self.rnd.random() < 0.5:
            found = self.node.try_pread_views(offset, length)
        if found is None:
            return bytes(await self.node.pread(offset, length))
        views, token = found
        try:
            # A socket that is slow to take them.
            for _ in range(self.rnd.choice((0, 3, 20, 100))):
                await asyncio.sleep(0)
            return b"".join(views)
        finally:
            self.node.release(token)

    async def snapshot_keeper(self) -> None:
        """Take and delete snapshots meanwhile."""
        for number in range(self.rnd.randrange(1, 4)):
            for _ in range(self.rnd.randrange(60)):
                await asyncio.sleep(0)
            await self.node.driver.snapshot_create(f"s{number}")
            if self.rnd.random() < 0.6:
                await self.node.driver.snapshot_delete(f"s{number}")

    async def resizer(self) -> None:
        """Let the disk grow and shrink behind what the others use of it."""
        for _ in range(self.rnd.randrange(1, 5)):
            for _ in range(self.rnd.randrange(60)):
                await asyncio.sleep(0)
            size = self.model.size + SECTOR * self.rnd.choice((0, 1, 7, 40, 300))
            ways = ("off", "metadata", "falloc") if size > self.node.size else ("off",)
            with contextlib.suppress(NotSupported):
                # Some growth of version 2 is impossible.
                await self.node.resize(size, preallocation=self.rnd.choice(ways))

    def check_bitmap(self, before: bytes, after: bytes) -> None:
        """See that a bitmap of the first moment knows what has changed."""
        bits = self.node.driver.dirty_bitmaps["all"].bits
        for sector in range(len(before) // SECTOR):
            part = slice(sector * SECTOR, (sector + 1) * SECTOR)
            if before[part] != after[part]:
                assert bits[sector >> 3] >> (sector & 7) & 1, f"sector {sector:#x}"


def interleave(
    seed: int,
    figures: Figures,
    images: Sequence[History] = IMAGES,
    *,
    resizes: bool = True,
) -> None:
    """Do one run on one of the images. ``resizes``: some disks change their size;
    what does that puts things right when it is dropped, which takes a loop."""
    rnd = random.Random(seed)
    image = rnd.choice(images)
    loop = PermutingLoop(seed)
    try:
        storage = PermutedStorage(image.image(), rnd)
        node = loop.run_until_complete(image.open(storage))
        content = loop.run_until_complete(node.pread(0, node.size))
        model = DiskModel(np.frombuffer(content, np.uint8).copy())
        clients = Clients(node, model, rnd)
        tracked = node.driver.header.version >= 3 and rnd.random() < 0.3
        if tracked:
            node.driver.bitmap_add("all", granularity=SECTOR)
        tasks = [clients.client(rnd.randrange(4, 14)) for _ in range(NB_CLIENTS)]
        if rnd.random() < 0.25:
            tasks.append(clients.snapshot_keeper())
        elif resizes and rnd.random() < 0.3:
            tasks.append(clients.resizer())
        loop.run_until_complete(run_all(tasks))
        submitted_at = model.tick()
        before, content = (
            content,
            bytes(loop.run_until_complete(node.pread(0, node.size))),
        )
        model.check_read(0, content[: model.size], submitted_at)
        assert not any(content[model.size :]), "what is new is not zero"
        if tracked:
            clients.check_bitmap(bytes(before), content)
        loop.run_until_complete(node.close())
        result, text = check_by_us(storage.content)
        assert is_sound(result, leaks=False), text
        node = loop.run_until_complete(image.open(storage))
        again = bytes(loop.run_until_complete(node.pread(0, node.size)))
        assert again == content, "closing the image changed its content"
        loop.run_until_complete(node.close())
    except Exception as error:
        raise AssertionError(f"{image}, seed {seed}: {error!r}") from error
    finally:
        end_loop(loop)
    figures.nb_runs += 1
    figures.nb_requests += clients.nb_requests
    figures.nb_cancelled += clients.nb_cancelled
    figures.nb_choices += loop.nb_choices


async def run_all(tasks: list) -> None:
    await asyncio.gather(*tasks)


def end_loop(loop: PermutingLoop) -> None:
    """Drop what a failure left behind."""
    for task in asyncio.all_tasks(loop):
        task._log_destroy_pending = False
        # An operation that is dropped in the middle wants to put things right,
        # which takes a loop.
        with contextlib.suppress(RuntimeError):
            task._coro.close() if not task.done() else None
    loop.close()


def test_interleavings(seed, figures):
    found = Figures()
    for number in range(NB_RUNS):
        interleave(seed + number, found)
    figures(f"interleavings: {found}, seeds from {seed}")


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_interleavings(seed, figures):
    found = Figures()
    for number in range(NB_LONG_RUNS):
        interleave(seed + number, found)
    figures(f"interleavings at length: {found}, seeds from {seed}")


def test_a_read_ends_at_any_moment_of_a_snapshot():
    """Clusters that were freed under a read are given back once, whenever the
    read ends: by the snapshot's new counts or after it."""

    async def run(turns: int) -> bool:
        storage = PermutedStorage(filled(40, refcount_order=6), random.Random(1))
        node = await HISTORIES[0].open(storage)
        token = node.driver.epochs.enter()
        for cluster in range(0, 40, 3):
            await node.discard(cluster * SECTOR, SECTOR)
        await node.flush()
        task = asyncio.ensure_future(node.driver.snapshot_create("one"))
        for _ in range(turns):
            await asyncio.sleep(0)
        in_time = not task.done()
        node.release(token)
        await task
        await node.close()
        result, text = check_by_us(storage.content)
        assert is_sound(result, leaks=False), text
        return in_time

    turns = 0
    while asyncio.run(run(turns)):
        turns += 1
    assert turns > 50


# -- mutants -----------------------------------------------------------------------


def reuses_at_once(monkeypatch):
    """Freed clusters are not kept from their next user while they are read."""

    async def quiet(self) -> None:
        pass

    monkeypatch.setattr(Epochs, "quiet", quiet)


def overlooks_overlaps(monkeypatch):
    """Writers to one cluster do not wait for one another."""
    monkeypatch.setattr(InFlightRanges, "first_overlap", lambda self, a, b: None)


def wakes_nobody(monkeypatch):
    """Who waits for a range is not told when it is free."""
    monkeypatch.setattr(
        InFlightRanges, "remove", lambda self, r: self._ranges.remove(r)
    )


def reads_by_an_old_map(monkeypatch):
    """A read maps its range, takes a nap, and is not in flight meanwhile."""

    async def pread_pieces(self, offset: int, length: int):
        runs = []
        while length:
            run = await self.driver.map(offset, length)
            runs.append((offset, *run))
            offset, length = offset + run[2], length - run[2]
        for guest_offset, kind, host_offset, covered in runs:
            for _ in range(100):
                await asyncio.sleep(0)
            if kind == DATA:
                yield await self.driver.data.pread(host_offset, covered)
            elif kind == COMPRESSED:
                cluster = await self.driver.read_compressed(host_offset)
                start = guest_offset & (self.driver.cluster_size - 1)
                yield cluster[start : start + covered]
            elif kind == UNALLOCATED and self.backing is not None:
                inside = max(0, min(covered, self.backing.size - guest_offset))
                yield await self.backing.pread(guest_offset, inside)
                yield bytes(covered - inside)
            else:
                yield bytes(covered)

    monkeypatch.setattr(Node, "pread_pieces", pread_pieces)


def forgets_cancelled_writes(monkeypatch):
    """A write that is cancelled does not give its plan back."""
    monkeypatch.setattr(Qcow2Driver, "abort_write", lambda self, plan: None)


@pytest.mark.parametrize(
    "mutate",
    [
        reuses_at_once,
        overlooks_overlaps,
        wakes_nobody,
        reads_by_an_old_map,
        forgets_cancelled_writes,
    ],
)
def test_a_broken_driver_is_caught(mutate, monkeypatch, seed, caplog):
    caplog.set_level(logging.CRITICAL)
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        for number in range(2000):
            interleave(seed + number, Figures(), [TINY], resizes=False)

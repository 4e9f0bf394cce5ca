"""Clients, and operations on the image, on storage that fails now and then.

Whatever has failed may have happened or not. In the end the image is sound, holds
what it said, and what is read after opening it anew is the same. If a header could
not be written, the file is sound all the same: either header is valid.
"""

import asyncio
import contextlib
import errno
import logging
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from nbdqcow.errors import NotSupported
from nbdqcow.formats.qcow2 import header as h
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.formats.qcow2.writeback import _Picture
from tests.crash.histories import SECTOR
from tests.crash.verdicts import check_by_us, is_sound
from tests.differential.model import DiskModel
from tests.differential.operations import Operation
from tests.interleavings.permuting import InlinePool, PermutedStorage, PermutingLoop
from tests.interleavings.test_interleavings import IMAGES, Clients, end_loop, run_all

NB_RUNS = int(os.environ.get("NBDQCOW_FAULTS_BETWEEN", "60"))
NB_LONG_RUNS = int(os.environ.get("NBDQCOW_LONG_FAULTS_BETWEEN", "4000"))


class FailingStorage(PermutedStorage):
    """A permuted file whose requests fail with a probability, done in part.

    Attributes:
        probability: of each request.
        nb_faults: how many have failed.
    """

    def __init__(self, data: bytes, rnd: random.Random) -> None:
        super().__init__(data, rnd)
        self.probability = 0.0
        self.nb_faults = 0

    def _fails(self) -> bool:
        fails = self._rnd.random() < self.probability
        self.nb_faults += fails
        return fails

    def _fail(self) -> None:
        raise OSError(self._rnd.choice((errno.EIO, errno.ENOSPC)), "injected")

    def try_pread(self, offset, length):
        if self._fails():
            self._fail()
        return super().try_pread(offset, length)

    def try_pwrite(self, offset, data):
        if self._fails():
            self._fail()
        return super().try_pwrite(offset, data)

    async def _carry_out(self, pieces: Sequence[Callable[[], object]]) -> None:
        if self._fails():
            nb_done = self._rnd.randrange(len(pieces) + 1)
            await super()._carry_out(pieces[:nb_done])
            self._fail()
        await super()._carry_out(pieces)


class PatientClients(Clients):
    """Those who go on after an error."""

    async def request(self, operation: Operation) -> None:
        # As with one that is cancelled, it may have happened.
        with contextlib.suppress(OSError):
            await super().request(operation)

    async def operator(self) -> None:
        """Do some operations on the image, and do not wait for some of them."""
        for _ in range(self.rnd.randrange(2, 9)):
            await self.wait()
            task = asyncio.ensure_future(self.rnd.choice(self.operations)(self))
            if self.cancels and self.rnd.random() < 0.3:
                await self.wait()
                task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                with contextlib.suppress(OSError, NotSupported):
                    task.result()

    async def wait(self) -> None:
        for _ in range(self.rnd.randrange(60)):
            await asyncio.sleep(0)

    async def look_at_all(self) -> None:
        """Ask for all of a disk that may become smaller meanwhile."""
        node = self.node
        for _ in range(self.rnd.randrange(4)):
            await self.wait()
            looks = (node.pread, node.block_status, node.prefetch)
            with contextlib.suppress(OSError):
                await self.rnd.choice(looks)(0, node.size)

    async def settled(self) -> None:
        """Wait for what goes on although nobody waits for it."""
        async with self.node._reopening:
            await self.node.driver.tasks.settle()

    async def snapshot_create(self) -> None:
        await self.node.driver.snapshot_create(f"s{self.rnd.randrange(4)}")

    async def snapshot_delete(self) -> None:
        await self.node.driver.snapshot_delete(f"s{self.rnd.randrange(4)}")

    async def resize(self) -> None:
        size = self.model.size + SECTOR * self.rnd.choice((0, 1, 7, 40, 300))
        ways = ("off", "metadata", "falloc") if size > self.node.size else ("off",)
        await self.node.resize(size, preallocation=self.rnd.choice(ways))

    async def change_width(self) -> None:
        await self._amend(refcount_bits=self.rnd.choice((8, 16, 32, 64)))

    async def change_lazy_refcounts(self) -> None:
        await self._amend(lazy_refcounts=self.rnd.random() < 0.5)

    async def change_version(self) -> None:
        settings = self.node.driver.settings
        if not (settings.keep_discarded or settings.lazy_refcounts):
            await self._amend(compat=self.rnd.choice(("0.10", "1.1")))

    async def reopen(self) -> None:
        await self.node.reopen(read_only=True)
        while not self.node.driver.failed:
            with contextlib.suppress(OSError):
                await self.node.reopen(read_only=False)
                return

    async def _amend(self, **options: bool | int) -> None:
        await self.node.amend(options, lambda done, total: None)

    async def write_header(self) -> None:
        driver = self.node.driver
        names = driver.backing_filename, driver.backing_format
        await self.node.change_backing_file(*names)

    async def bitmap_add(self) -> None:
        granularity = self.rnd.choice((SECTOR, 8 * SECTOR))
        name = f"b{self.rnd.randrange(3)}"
        self.node.driver.bitmap_add(name, granularity=granularity)

    async def bitmap_remove(self) -> None:
        await self.node.driver.bitmap_remove(f"b{self.rnd.randrange(3)}")

    async def bitmap_merge(self) -> None:
        names = self.rnd.choices(("all", "b0", "b1", "b2"), k=2)
        await self.node.driver.bitmap_merge(*names)

    async def bitmap_change(self) -> None:
        driver, name = self.node.driver, f"b{self.rnd.randrange(3)}"
        if self.rnd.random() < 0.5:
            driver.bitmap_clear(name)
        else:
            driver.bitmap_enable(name, self.rnd.random() < 0.5)

    operations = (
        *(snapshot_create, snapshot_delete, resize, resize, change_width),
        *(change_lazy_refcounts, change_version, write_header, reopen),
        *(bitmap_add, bitmap_remove, bitmap_merge, bitmap_change),
    )


@dataclass(slots=True)
class Figures:
    nb_runs: int = 0
    nb_faults: int = 0
    nb_for_good: int = 0

    def __str__(self) -> str:
        return (
            f"{self.nb_runs} runs, {self.nb_faults} faults,"
            f" {self.nb_for_good} failed for good"
        )


def check_bitmap(bits: bytes, before: bytes, after: bytes) -> None:
    """See that the bits of all sectors that differ are set."""
    for sector in range(len(before) // SECTOR):
        part = slice(sector * SECTOR, (sector + 1) * SECTOR)
        if before[part] != after[part]:
            assert bits[sector >> 3] >> (sector & 7) & 1, f"sector {sector} not marked"


def interleave(seed: int, figures: Figures) -> None:
    """Do one run on one of the images."""
    rnd = random.Random(seed)
    image = rnd.choice(IMAGES)
    loop = PermutingLoop(seed)
    run = loop.run_until_complete
    try:
        storage = FailingStorage(image.image(), rnd)
        node = run(image.open(storage))
        driver = node.driver
        content = before = run(node.pread(0, node.size))
        if has_bitmap := driver.header.version >= 3 and rnd.random() < 0.5:
            driver.bitmap_add("all", granularity=SECTOR)
        model = DiskModel(np.frombuffer(content, np.uint8).copy())
        clients = PatientClients(node, model, rnd)
        storage.probability = rnd.choice((0, 0.003, 0.01, 0.03))
        has_faults = storage.probability > 0
        tasks = [clients.client(rnd.randrange(4, 14)) for _ in range(4)]
        tasks += [clients.operator() for _ in range(rnd.randrange(1, 4))]
        tasks.append(clients.look_at_all())
        run(run_all(tasks))
        run(clients.settled())
        storage.probability = 0
        assert not driver.header.corrupt
        if not driver.failed:
            submitted_at = model.tick()
            content = bytes(run(node.pread(0, node.size)))
            model.check_read(0, content[: model.size], submitted_at)
            assert not any(content[model.size :]), "what is new is not zero"
        run(node.close())
        figures.nb_runs += 1
        figures.nb_faults += storage.nb_faults
        figures.nb_for_good += driver.failed
        data = storage.content
        if driver.failed and data[h.INCOMPATIBLE_FEATURES_OFFSET + 7] & 1:
            # Refcounts that were postponed are repaired when it is opened.
            return
        result, text = check_by_us(data)
        assert is_sound(result, leaks=has_faults), text
        node = run(image.open(PermutedStorage(data, rnd)))
        if not driver.failed:
            again = bytes(run(node.pread(0, node.size)))
            assert again == content, "closing the image changed its content"
            assert not any(info.inconsistent for info in node.driver.bitmap_list())
            if has_bitmap and (bitmap := node.dirty_bitmaps.get("all")) is not None:
                check_bitmap(bitmap.bits, before, content)
        run(node.close())
    except Exception as error:
        raise AssertionError(f"{image}, seed {seed}: {error!r}") from error
    finally:
        end_loop(loop)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr("nbdqcow.formats.qcow2.compress.Pool", InlinePool)


def test_faults_between_requests(seed, figures):
    found = Figures()
    for number in range(NB_RUNS):
        interleave(seed + number, found)
    figures(f"faults and interleavings: {found}, seeds from {seed}")


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_faults_between_requests(seed, figures):
    found = Figures()
    for number in range(NB_LONG_RUNS):
        interleave(seed + number, found)
    figures(f"faults and interleavings at length: {found}, seeds from {seed}")


# -- mutants -----------------------------------------------------------------------


def forgets_failed_commits(monkeypatch):
    """What a failed commit did not bring to disk is not dirty any more."""
    monkeypatch.setattr(_Picture, "put_back", lambda self, image: None)


def links_failed_writes(monkeypatch):
    """A write that failed is linked like one that did not."""
    monkeypatch.setattr(Qcow2Driver, "abort_write", Qcow2Driver.end_write)


def goes_on_in_doubt(monkeypatch):
    """Nobody minds that the header could not be written."""
    monkeypatch.setattr(Qcow2Driver, "fail", lambda self: None)


# A failure leaves operations behind that had not begun.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize(
    "mutate", [forgets_failed_commits, links_failed_writes, goes_on_in_doubt]
)
def test_a_broken_driver_is_caught(mutate, monkeypatch, seed):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        for number in range(2000):
            interleave(seed + number, Figures())

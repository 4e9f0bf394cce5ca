"""Each operation on an image, with each of its storage calls failing in turn.

The error reaches whoever asked, with the number that the storage gave. What was
answered and flushed stays; the image has leaks at the most, at that moment as
at the end; and when the fault is gone the same step succeeds. Only a failure to
write the roots of a new generation of tables is for good: then writes and
flushes fail until the image is opened anew.
"""

import asyncio
import contextlib
import errno
import logging
import os
import random

import pytest

from nbdqcow.block.node import Node
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.formats.qcow2.writeback import _Picture
from nbdqcow.storage.memory import MemoryStorage
from tests.crash.histories import (
    HISTORIES,
    LOOKED_AT,
    SECTOR,
    Disk,
    History,
    Step,
    base_content,
)
from tests.crash.verdicts import check_by_us, is_sound
from tests.faults.faulty import DISCARD, READ, FaultyStorage, Rule

ERRORS = (errno.EIO, errno.ENOSPC, errno.EAGAIN)
EFFECTS = ("none", "torn", "all", "short")
NB_LONG_ROUNDS = int(os.environ.get("NBDQCOW_FAULT_ROUNDS", "30"))
NB_RANDOM = int(os.environ.get("NBDQCOW_RANDOM_FAULT_RUNS", "28"))


class Trial:
    """One run of a history on faulty storage.

    Attributes:
        error: the number that a failure must have, 0 for any.
        patient: there may be many failures, and each step is tried until it
            succeeds.
    """

    def __init__(self, history: History, seed: int) -> None:
        self.history = history
        image = history.image()
        self.memory = MemoryStorage(image)
        self.storage = FaultyStorage(self.memory, seed)
        self.disk = Disk(base_content(history), int.from_bytes(image[24:32], "big"))
        self.error = 0
        self.patient = False
        self.nb_failures = 0

    async def run(self) -> None:
        """Open the image, do all steps, each again if it fails, close it."""
        while True:
            try:
                node = await self.history.open(self.storage)
            except OSError as error:
                self.see(error)
            else:
                break
        for step in self.history.steps:
            changes = step.changes(self.disk)
            self.disk.begin(changes)
            if not await self.do(node, step):
                await self.give_up(node)
                return
            self.disk.succeed(changes, optional=step.optional)
            step.after(self.disk)
            if step.flushes:
                self.disk.flushed()
        try:
            await node.close()
        except OSError as error:
            self.see(error)
        else:
            self.disk.flushed()
        await self.look("at the end")

    async def do(self, node: Node, step: Step) -> bool:
        """Do a step until it succeeds; False if the image takes no writes any
        more."""
        while True:
            try:
                await step.run(node)
            except OSError as error:
                self.see(error)
                if node.driver.failed:
                    return False
                await self.look(f"after the failed {step.name}")
            else:
                return True

    async def give_up(self, node: Node) -> None:
        """The image can't know which roots are on disk. It must say so."""
        self.storage.rules.clear()
        with pytest.raises(OSError):
            await node.flush()
        with pytest.raises(OSError):
            await node.pwrite(0, bytes(SECTOR))
        await node.close()
        await self.look("at the end of a failed image")

    def see(self, error: OSError) -> None:
        """A fault has come to light."""
        self.nb_failures += 1
        if not self.patient:
            assert self.nb_failures == 1, f"a second failure: {error}"
            assert error.errno == self.error, f"{error}, not {os.strerror(self.error)}"
        else:
            assert error.errno in ERRORS, str(error)

    async def look(self, when: str) -> None:
        """See what a reader finds who opens the file as it is now."""
        data = bytes(self.memory.data)
        result, text = check_by_us(data)
        assert is_sound(result), f"{when}:\n{text}"
        node = await self.history.open(MemoryStorage(data))
        base = base_content(self.history)
        found = bytes(await node.pread(0, min(node.size, LOOKED_AT)))
        for sector in range(len(found) // SECTOR):
            got = found[sector * SECTOR : (sector + 1) * SECTOR]
            may = self.disk.later.get(sector, frozenset((base(sector),)))
            assert got in may, f"{when}: sector {sector:#x} holds {got[:16].hex()}..."
        await node.close()


async def count_calls(history: History) -> list[tuple[str, int, int, bool]]:
    """Return the storage calls of a run without faults."""
    trial = Trial(history, 0)
    await trial.run()
    assert not trial.nb_failures
    return trial.storage.log


async def fail_each_call(history: History, seed: int, stride: int) -> int:
    """Run the history once for each ``stride``-th of its calls, which fails;
    return how many there were."""
    rnd = random.Random(f"{seed}/{history}")
    log = await count_calls(history)
    nb_trials = 0
    for number in range(rnd.randrange(stride), len(log), stride):
        trial = Trial(history, seed)
        rule = Rule(error=rnd.choice(ERRORS), skip=number, effect=rnd.choice(EFFECTS))
        what = f"call {number} of {history}, {log[number]}: {rule}, seed {seed}"
        trial.error = rule.error
        trial.storage.rules = [rule]
        try:
            await trial.run()
        except Exception as error:
            raise AssertionError(f"{what}\n{error!r}") from error
        # A discard is a hint, and a read may be for work that can wait.
        may_pass = log[number][0] in (READ, DISCARD) or history.background
        # A snapshot is deleted in another way where there is no room.
        may_pass |= rule.error == errno.ENOSPC and any(
            step.name.startswith("snapshot delete") for step in history.steps
        )
        assert trial.nb_failures or may_pass, what
        nb_trials += 1
    return nb_trials


@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_each_storage_call_fails_once(history, seed, figures, caplog):
    caplog.set_level(logging.CRITICAL)
    stride = 4 if history.costly else 1
    nb_trials = asyncio.run(fail_each_call(history, seed, stride))
    figures(f"faults, {history}: {nb_trials} calls failed, seed {seed}")


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_each_storage_call_fails_in_many_ways(history, seed, figures, caplog):
    caplog.set_level(logging.CRITICAL)
    nb_trials = 0
    for number in range(NB_LONG_ROUNDS):
        nb_trials += asyncio.run(fail_each_call(history, seed + number, 1))
    figures(f"faults at length, {history}: {nb_trials} calls failed, seed {seed}")


def test_faults_at_random(seed, figures, caplog):
    """Many faults in one run, of reads and writes and with delays: whatever
    fails is tried until it succeeds, and nothing is lost."""
    caplog.set_level(logging.CRITICAL)
    nb_faults = 0
    for number in range(NB_RANDOM):
        history = HISTORIES[number % len(HISTORIES)]
        if not history.costly:
            nb_faults += asyncio.run(fail_at_random(history, seed + number))
    figures(f"faults at random: {nb_faults} in {NB_RANDOM} runs, seeds from {seed}")


async def fail_at_random(history: History, seed: int) -> int:
    trial = Trial(history, seed)
    rnd = random.Random(seed)
    trial.storage.rules = [
        Rule(0, count=-1, probability=0.3, turns=rnd.randrange(4)),
        *(
            Rule(error, count=-1, probability=0.04, effect=rnd.choice(EFFECTS))
            for error in ERRORS
        ),
    ]
    trial.patient = True
    try:
        await trial.run()
    except Exception as error:
        raise AssertionError(f"{history}, seed {seed}: {error!r}") from error
    return trial.storage.nb_faults


# -- mutants -----------------------------------------------------------------------


def forgets_failed_commits(driver, monkeypatch):
    """What a failed commit did not bring to disk is not dirty any more."""
    monkeypatch.setattr(_Picture, "put_back", lambda self, image: None)


def links_failed_writes(driver, monkeypatch):
    """A write that failed is linked like one that did not."""
    driver.abort_write = driver.end_write


def swallows_errors(driver, monkeypatch):
    """A failed flush of the file is no failure."""
    flush_files = driver.writeback.flush_files

    async def flush() -> None:
        with contextlib.suppress(OSError):
            await flush_files()

    driver.writeback.flush_files = flush


@pytest.mark.parametrize(
    ("mutate", "name"),
    [
        (forgets_failed_commits, "allocate"),
        (links_failed_writes, "copy-on-write"),
        (swallows_errors, "overwrite"),
    ],
)
def test_a_broken_driver_is_caught(mutate, name, monkeypatch, seed, caplog):
    caplog.set_level(logging.CRITICAL)
    (history,) = (h for h in HISTORIES if h.name == name)
    open_sound = Qcow2Driver.open.__func__

    async def open_broken(cls, storage, **options):
        driver = await open_sound(cls, storage, **options)
        if isinstance(storage, FaultyStorage):
            mutate(driver, monkeypatch)
        return driver

    monkeypatch.setattr(Qcow2Driver, "open", classmethod(open_broken))
    with pytest.raises(AssertionError):
        for number in range(5):
            asyncio.run(fail_each_call(history, seed + number, 1))

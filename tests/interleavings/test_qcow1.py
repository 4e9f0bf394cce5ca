"""Requests that meet at every await, on qcow images of version 1.

As `test_interleavings`, with clusters that are compressed meanwhile, a disk
that is full now and then, and requests that are cancelled. In the end nothing
is named twice, and what failed has left no space taken behind the rest.
"""

import errno
import os
import random
from dataclasses import dataclass

import numpy as np
import pytest

from nbdqcow.block.inflight import InFlightRanges
from nbdqcow.block.node import Node
from nbdqcow.formats.qcow1.driver import Qcow1Driver
from nbdqcow.formats.raw import RawDriver
from nbdqcow.storage.memory import MemoryStorage
from tests.differential.model import DiskModel
from tests.differential.operations import Kind, Operation
from tests.interleavings.permuting import InlinePool, PermutedStorage, PermutingLoop
from tests.interleavings.test_interleavings import (
    NB_CLIENTS,
    Clients,
    end_loop,
    run_all,
)
from tests.qcow1_image import Image, Packed, Plain, check

NB_RUNS = int(os.environ.get("NBDQCOW_INTERLEAVINGS", "160")) // 4
NB_LONG_RUNS = int(os.environ.get("NBDQCOW_LONG_INTERLEAVINGS", "12000"))


@pytest.fixture(autouse=True)
def no_threads(monkeypatch):
    monkeypatch.setattr("nbdqcow.formats.qcow1.compress.Pool", InlinePool)


class FullStorage(PermutedStorage):
    """Some writes fail half-way while ``failing``."""

    failing = 0.0

    async def pwritev(self, offset, buffers, *, fua=False):
        if self._rnd.random() < self.failing:
            data = b"".join(bytes(b) for b in buffers)
            if len(data) > 1:
                await super().pwritev(offset, [data[: len(data) // 2]])
            raise OSError(errno.ENOSPC, "full")
        await super().pwritev(offset, buffers, fua=fua)


class Qcow1Clients(Clients):
    """Clients that compress whole clusters, and live with a full disk."""

    async def request(self, operation: Operation) -> None:
        try:
            await super().request(operation)
        except OSError as error:
            # The change stays open in the model: some of it may be there.
            if error.errno != errno.ENOSPC:
                raise

    async def change(self, operation: Operation) -> None:
        driver, length = self.node.driver, operation.length
        if (
            operation.kind is Kind.WRITE
            and operation.offset % driver.cluster_size == 0
            and length == driver.cluster_size
            and self.rnd.random() < 0.7
        ):
            await driver.write_compressed(operation.offset, operation.data)
        else:
            await super().change(operation)


@dataclass(slots=True)
class Figures:
    nb_runs: int = 0
    nb_requests: int = 0
    nb_cancelled: int = 0
    nb_orders: int = 0


async def open_node(storage: PermutedStorage, below: bytes | None, cache: int) -> Node:
    options = {"l2_cache_size": cache}
    driver = await Qcow1Driver.open(storage, read_only=False, options=options)
    backing = None
    if below is not None:
        raw = MemoryStorage(below, read_only=True)
        backing = Node(
            await RawDriver.open(raw, read_only=True, options={}), filename="below"
        )
    return Node(driver, filename="permuted", backing=backing)


def interleave(seed: int, figures: Figures) -> None:
    rnd = random.Random(seed)
    bits = rnd.choice((9, 9, 10, 12))
    nb_clusters = rnd.randrange(2, 30)
    below = rnd.randbytes(nb_clusters << bits - 1) if rnd.random() < 0.5 else None
    image = Image(
        nb_clusters << bits,
        bits,
        6,
        {
            index: Packed(rnd.randbytes(9) * 9)
            if rnd.random() < 0.5
            else Plain(rnd.randbytes(1 << bits))
            for index in rnd.sample(range(nb_clusters), nb_clusters // 3)
        },
        backing=b"" if below is None else b"below",
    )
    loop = PermutingLoop(seed)
    try:
        storage = FullStorage(image.build(), rnd)
        cache = rnd.choice((0, 1))
        node = loop.run_until_complete(open_node(storage, below, cache))
        model = DiskModel(np.frombuffer(image.content(below or b""), np.uint8).copy())
        clients = Qcow1Clients(node, model, rnd)
        storage.failing = rnd.choice((0, 0, 0.05, 0.3))
        tasks = [clients.client(rnd.randrange(4, 14)) for _ in range(NB_CLIENTS)]
        loop.run_until_complete(run_all(tasks))
        storage.failing = 0
        submitted_at = model.tick()
        content = bytes(loop.run_until_complete(node.pread(0, node.size)))
        model.check_read(0, content, submitted_at)
        end = node.driver.file_end
        loop.run_until_complete(node.close())
        check(storage.content)
        assert storage.length <= end.offset, "a failed write has left its space"
        node = loop.run_until_complete(open_node(storage, below, cache))
        again = bytes(loop.run_until_complete(node.pread(0, node.size)))
        assert again == content, "closing the image changed its content"
        loop.run_until_complete(node.close())
    except Exception as error:
        raise AssertionError(f"seed {seed}: {error!r}") from error
    finally:
        end_loop(loop)
    figures.nb_runs += 1
    figures.nb_requests += clients.nb_requests
    figures.nb_cancelled += clients.nb_cancelled
    figures.nb_orders += loop.nb_choices


def test_interleavings(seed, figures):
    found = Figures()
    for number in range(NB_RUNS):
        interleave(seed + number, found)
    figures(f"interleavings on qcow: {found}, seeds from {seed}")


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_interleavings(seed, figures):
    found = Figures()
    for number in range(NB_LONG_RUNS):
        interleave(seed + number, found)
    figures(f"interleavings on qcow at length: {found}, seeds from {seed}")


def overlooks_overlaps(monkeypatch):
    """Writers to one cluster do not wait for one another."""
    monkeypatch.setattr(InFlightRanges, "first_overlap", lambda self, a, b: None)
    monkeypatch.setattr(InFlightRanges, "find", lambda self, a, b: None)


def keeps_what_failed(monkeypatch):
    """A write that failed is linked all the same."""
    monkeypatch.setattr(Qcow1Driver, "abort_write", Qcow1Driver.end_write)


def forgets_failed_writes(monkeypatch):
    """A write that failed does not give its plan back."""
    monkeypatch.setattr(Qcow1Driver, "abort_write", lambda self, plan: None)


@pytest.mark.parametrize(
    "mutate", [overlooks_overlaps, keeps_what_failed, forgets_failed_writes]
)
def test_a_broken_driver_is_caught(mutate, monkeypatch, seed):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        for number in range(1000):
            interleave(seed + number, Figures())

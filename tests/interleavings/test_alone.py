"""An operation on snapshots begins when no write is on its way: what a snapshot
has must not change afterwards."""

import asyncio

import pytest

from nbdqcow.block.inflight import Writers
from nbdqcow.block.node import Node
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.storage.memory import MemoryStorage
from tests.crash.histories import filled

NEW = b"n" * 512


class GatedStorage(MemoryStorage):
    """Guest data is written when the gate is open."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.gate = asyncio.Event()
        self.nb_waiting = 0

    def try_pwrite(self, offset, data):
        if bytes(data) == NEW and not self.gate.is_set():
            return False
        return super().try_pwrite(offset, data)

    async def pwritev(self, offset, buffers, *, fua=False):
        if NEW in b"".join(bytes(b) for b in buffers):
            self.nb_waiting += 1
            await self.gate.wait()
        await super().pwritev(offset, buffers, fua=fua)


async def snapshot_beside_a_write(offset: int) -> None:
    """Take a snapshot while a write at ``offset`` is on its way."""
    storage = GatedStorage(filled(6))
    driver = await Qcow2Driver.open(storage, read_only=False, options={})
    node = Node(driver, filename="disk")
    writing = asyncio.ensure_future(node.pwrite(offset, NEW))
    while not storage.nb_waiting:
        await asyncio.sleep(0)
    taking = asyncio.ensure_future(driver.snapshot_create("one"))
    try:
        for _ in range(200):
            await asyncio.sleep(0)
        assert not taking.done(), "a snapshot was taken beside a write"
        assert not driver.header.nb_snapshots
    finally:
        storage.gate.set()
        await asyncio.gather(writing, taking, return_exceptions=True)
        await node.close()
    shown = await Qcow2Driver.open(
        MemoryStorage(bytes(storage.data), read_only=True),
        read_only=True,
        options={"snapshot": "one"},
    )
    # It had ended before the snapshot was taken.
    assert await Node(shown, filename="one").pread(offset, 512) == NEW


# The first is in place, the second allocates.
OFFSETS = (0x200, 0x4000)


@pytest.mark.asyncio
@pytest.mark.parametrize("offset", OFFSETS)
async def test_a_snapshot_waits_for_writes_on_their_way(offset):
    await snapshot_beside_a_write(offset)


# -- mutants -----------------------------------------------------------------------


async def waits_for_nobody(self):
    """Who is alone waits for nobody."""


async def overlooks_writes_in_place(self):
    """Who is alone waits for writes that allocate only."""
    while (busy := self.allocating.first_overlap(0, 1 << 64)) is not None:
        await busy.wait()


async def overlooks_allocations(self):
    """Who is alone waits for writes in place only."""
    if self._nb_in_place:
        self._in_place_done = asyncio.get_running_loop().create_future()
        await self._in_place_done


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("mutant", "offset"),
    [
        (waits_for_nobody, OFFSETS[0]),
        (waits_for_nobody, OFFSETS[1]),
        (overlooks_writes_in_place, OFFSETS[0]),
        (overlooks_allocations, OFFSETS[1]),
    ],
)
async def test_one_who_is_not_alone_is_caught(mutant, offset, monkeypatch):
    monkeypatch.setattr(Writers, "quiet", mutant)
    with pytest.raises(AssertionError):
        await snapshot_beside_a_write(offset)

"""A storage driver in memory that records what reaches the disk, and a replayer.

The replayer builds the disk as it could be after a power cut: all that was
written before the last completed flush began is there; of what came later any
subset, torn at 512-byte sectors, in any order.
"""

import asyncio
import random
from dataclasses import dataclass, field

from nbdqcow.block.storage import StorageDriver
from nbdqcow.types import Buffer, Buffers

SECTOR = 512


@dataclass(slots=True)
class Event:
    """One ``write`` (``data`` at ``offset``), ``truncate`` to ``length``, or
    ``flush``.

    ``nb_durable``: for a flush, the number of events before its start that
    had completed: those that it makes durable.
    """

    kind: str
    offset: int = 0
    data: bytes = b""
    length: int = 0
    nb_durable: int = 0


@dataclass(slots=True)
class History:
    """What reached the disk after ``base``, in order of completion."""

    base: bytes
    events: list[Event] = field(default_factory=list)

    def disk_at(self, cut: int, rnd: random.Random) -> bytes:
        """Return a disk that a power cut after ``cut`` events could leave."""
        nb_durable = max((e.nb_durable for e in self.events[:cut]), default=0)
        disk = bytearray(self.base)
        loose = []
        for index, event in enumerate(self.events[:cut]):
            if event.kind == "write" and index < nb_durable:
                _apply(disk, event.offset, event.data)
            elif event.kind == "write":
                loose.append(event)
            elif event.kind == "truncate":
                # A file system keeps the order of changes to a file's length:
                # what is cut off is zero from then on.
                del disk[event.length :]
                disk.extend(bytes(event.length - len(disk)))
                loose = [
                    Event("write", e.offset, e.data[: event.length - e.offset])
                    for e in loose
                    if e.offset < event.length
                ]
        pieces = []
        style = rnd.random()
        for event in loose:
            if style < 0.5 and rnd.random() < 0.5:
                continue
            pieces += [
                (event.offset + start, event.data[start : start + SECTOR])
                for start in range(0, len(event.data), SECTOR)
                if style > 0.8 or rnd.random() < 0.7
            ]
        if style < 0.7:
            rnd.shuffle(pieces)
        for offset, data in pieces:
            _apply(disk, offset, data)
        return bytes(disk)


def _apply(disk: bytearray, offset: int, data: bytes) -> None:
    if len(disk) < offset + len(data):
        disk.extend(bytes(offset + len(data) - len(disk)))
    disk[offset : offset + len(data)] = data


class RecordingStorage(StorageDriver):
    """Bytes in memory; every completed write and flush goes to ``history``.

    Each request takes a few turns of the loop, chosen by ``rnd``, so that
    requests overlap and finish in any order.
    """

    name = "recording"

    def __init__(self, data: bytes, rnd: random.Random) -> None:
        self.filename = "recording"
        self.read_only = False
        self.zero_beyond_end = True
        self.length = len(data)
        self.bytes = bytearray(data)
        self.history = History(data)
        self._rnd = rnd

    def _record(self, offset: int, data: bytes) -> None:
        _apply(self.bytes, offset, data)
        self.length = len(self.bytes)
        self.history.events.append(Event("write", offset, data))

    async def _pause(self) -> None:
        for _ in range(self._rnd.randrange(4)):
            await asyncio.sleep(0)

    def _read(self, offset: int, length: int) -> bytes:
        return bytes(self.bytes[offset : offset + length]).ljust(length, b"\0")

    def try_pread(self, offset: int, length: int) -> bytes | None:
        return self._read(offset, length) if self._rnd.random() < 0.5 else None

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        if self._rnd.random() < 0.5:
            return False
        self._record(offset, bytes(data))
        return True

    async def pread(self, offset: int, length: int) -> bytes:
        await self._pause()
        data = self._read(offset, length)
        await self._pause()
        return data

    async def pwritev(
        self, offset: int, buffers: Buffers, *, fua: bool = False
    ) -> None:
        await self._pause()
        self._record(offset, b"".join(bytes(b) for b in buffers))
        await self._pause()

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool = False
    ) -> None:
        await self.pwritev(offset, [bytes(length)])

    async def discard(self, offset: int, length: int) -> None:
        # A hole that is punched reads as zeroes, and is no more durable than
        # a write.
        await self.pwritev(offset, [bytes(length)])

    async def flush(self) -> None:
        nb_durable = len(self.history.events)
        await self._pause()
        self.history.events.append(Event("flush", nb_durable=nb_durable))
        await self._pause()

    async def truncate(self, length: int) -> None:
        await self._pause()
        del self.bytes[length:]
        self.bytes.extend(bytes(length - len(self.bytes)))
        self.length = length
        self.history.events.append(Event("truncate", length=length))
        await self._pause()

    async def close(self) -> None:
        pass

"""A storage driver that fails, delays, shortens and tears what it is asked.

It lives with the tests: a program that serves people's disks should not even
contain a driver that breaks them.
"""

import asyncio
import errno
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass

from nbdqcow.block.storage import StorageDriver
from nbdqcow.types import Buffer, Buffers

SECTOR = 512

READ, WRITE, ZERO, DISCARD, FLUSH, TRUNCATE = (
    *("read", "write", "zero", "discard", "flush", "truncate"),
)
KINDS = (READ, WRITE, ZERO, DISCARD, FLUSH, TRUNCATE)


@dataclass(slots=True)
class Rule:
    """What goes wrong, and when.

    Attributes:
        error: the errno to fail with, 0 to go on (with a delay perhaps).
        kinds: of operations it is for.
        first, end: it is for operations that touch these bytes of the file.
        skip: so many operations that match pass before the first one that
            goes wrong.
        count: so many go wrong, -1 for all.
        probability: that one of them does.
        turns: of the loop that it takes before anything else happens.
        effect: how much of a write happens all the same: ``none``, ``all``,
            ``short`` (sectors of its first half), ``torn`` (any sectors).
    """

    error: int = errno.EIO
    kinds: Sequence[str] = KINDS
    first: int = 0
    end: int = 1 << 63
    skip: int = 0
    count: int = 1
    probability: float = 1.0
    turns: int = 0
    effect: str = "none"

    def matches(self, kind: str, offset: int, length: int) -> bool:
        return kind in self.kinds and offset < self.end and self.first < offset + length


class FaultyStorage(StorageDriver):
    """Hands everything on to ``inner``, but for what the rules are against.

    Attributes:
        rules: the first one that matches an operation is followed.
        log: the operations so far: kind, offset, length, whether inline.
        nb_faults: how many have failed.
    """

    name = "faulty"

    def __init__(self, inner: StorageDriver, seed: int = 0) -> None:
        self.inner = inner
        self.filename = inner.filename
        self.read_only = inner.read_only
        self.zero_beyond_end = inner.zero_beyond_end
        self.rules: list[Rule] = []
        self.log: list[tuple[str, int, int, bool]] = []
        self.nb_faults = 0
        self._rnd = random.Random(seed)

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.inner.length

    def _consult(
        self, kind: str, offset: int, length: int, inline: bool
    ) -> Rule | None:
        """Return the rule to follow for an operation, if any."""
        self.log.append((kind, offset, length, inline))
        for rule in self.rules:
            if not rule.matches(kind, offset, length):
                continue
            if rule.skip:
                rule.skip -= 1
            elif rule.count and self._rnd.random() < rule.probability:
                rule.count -= 1
                self.nb_faults += bool(rule.error)
                return rule
        return None

    def _fail(self, rule: Rule) -> None:
        if rule.error:
            raise OSError(rule.error, f"injected: {os.strerror(rule.error)}")

    def _spoil(self, rule: Rule, offset: int, data: bytes) -> None:
        """Do of a failing write what its rule says."""
        if rule.effect == "none":
            return
        starts = [0, *range(SECTOR - offset % SECTOR, len(data), SECTOR)]
        for start, end in zip(starts, [*starts[1:], len(data)], strict=True):
            if (
                rule.effect == "all"
                or (rule.effect == "short" and end <= len(data) // 2)
                or (rule.effect == "torn" and self._rnd.random() < 0.5)
            ):
                assert self.inner.try_pwrite(offset + start, data[start:end])

    # -- inline ----------------------------------------------------------

    def try_pread(self, offset: int, length: int) -> Buffer | None:
        rule = self._consult(READ, offset, length, True)
        if rule is not None:
            if rule.turns:
                return None
            self._fail(rule)
        return self.inner.try_pread(offset, length)

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        rule = self._consult(WRITE, offset, len(data), True)
        if rule is not None:
            if rule.turns:
                return False
            self._spoil(rule, offset, bytes(data))
            self._fail(rule)
        return self.inner.try_pwrite(offset, data)

    # -- coroutines ------------------------------------------------------

    async def _meet(self, kind: str, offset: int, length: int) -> Rule | None:
        """Follow a rule that is only about time; return one that fails."""
        rule = self._consult(kind, offset, length, False)
        if rule is None:
            return None
        for _ in range(rule.turns):
            await asyncio.sleep(0)
        return rule if rule.error else None

    async def pread(self, offset: int, length: int) -> Buffer:
        rule = await self._meet(READ, offset, length)
        if rule is not None:
            self._fail(rule)
        return await self.inner.pread(offset, length)

    async def pwritev(
        self, offset: int, buffers: Buffers, *, fua: bool = False
    ) -> None:
        data = b"".join(bytes(b) for b in buffers)
        rule = await self._meet(WRITE, offset, len(data))
        if rule is not None:
            self._spoil(rule, offset, data)
            self._fail(rule)
        await self.inner.pwritev(offset, [data], fua=fua)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool = False
    ) -> None:
        rule = await self._meet(ZERO, offset, length)
        if rule is not None:
            self._spoil(rule, offset, bytes(length))
            self._fail(rule)
        await self.inner.write_zeroes(
            offset, length, may_unmap=may_unmap, no_fallback=no_fallback
        )

    async def discard(self, offset: int, length: int) -> None:
        rule = await self._meet(DISCARD, offset, length)
        if rule is not None:
            self._spoil(rule, offset, bytes(length))
            self._fail(rule)
        await self.inner.discard(offset, length)

    async def flush(self) -> None:
        rule = await self._meet(FLUSH, 0, 1 << 63)
        if rule is not None:
            self._fail(rule)
        await self.inner.flush()

    async def truncate(self, length: int) -> None:
        rule = await self._meet(TRUNCATE, min(length, self.length), 1)
        if rule is not None:
            self._fail(rule)
        await self.inner.truncate(length)

    async def reopen(self, *, read_only: bool) -> None:
        await self.inner.reopen(read_only=read_only)
        self.read_only = read_only

    async def close(self) -> None:
        await self.inner.close()

"""`blkdebug`: a file whose requests fail by rules, in pieces as small and as
aligned as one likes.

It is loaded when the one who opens an image names it, and not before.
"""

import asyncio
import os
from collections.abc import Iterable, Mapping
from typing import ClassVar, Final

from nbdqcow.block.storage import StorageDriver
from nbdqcow.errors import ImageError, NotSupported
from nbdqcow.filters.rules import (
    DISCARD,
    FLUSH,
    INJECT_ERROR,
    READ,
    SET_STATE,
    STATUS,
    WRITE,
    ZERO,
    Rules,
    parse_config,
    rules_of_pairs,
)
from nbdqcow.types import Buffer, Buffers
from nbdqcow.units import MiB, parse_size, size_expected

_LIMITS: Final = (
    *("align", "max-transfer", "opt-write-zero", "max-write-zero"),
    *("opt-discard", "max-discard"),
)
_LARGEST: Final = {"align": 64 * MiB}
_LARGEST_OF_OTHERS: Final = (1 << 31) - 1


class BlkdebugStorage(StorageDriver):
    """Hands requests on to ``inner``, but for those that the rules fail."""

    name: ClassVar[str] = "blkdebug"

    def __init__(
        self,
        inner: StorageDriver,
        *,
        pairs: Mapping[str, str],
        filename: str,
        config: bytes = b"",
    ) -> None:
        """``pairs`` are options as QEMU names them, such as
        ``inject-error.0.event``; ``config``: what is in the configuration
        file. Raises `ImageError`."""
        self.inner: StorageDriver = inner
        self.filename = filename
        self.read_only = inner.read_only
        self.zero_beyond_end = inner.zero_beyond_end
        self.fixed_as = inner.fixed_as
        given = dict(pairs)
        self._limits = {name: _take_limit(given, name) for name in _LIMITS}
        self._align = self._limits["align"] or 1
        self._check_limits()
        for key in given:
            kind, dot, _ = key.partition(".")
            if not dot or kind not in (INJECT_ERROR, SET_STATE):
                raise ImageError(
                    f"Block protocol 'blkdebug' doesn't support the option '{key}'"
                )
        self._rules = Rules([*parse_config(config), *rules_of_pairs(given)])
        self._rmw_lock = asyncio.Lock()
        self.announce("none")

    def _check_limits(self) -> None:
        limits, align = self._limits, self._align
        if align & (align - 1):
            raise ImageError(f"Cannot meet constraints with align {align}")
        units = {
            "max-write-zero": limits["opt-write-zero"],
            "max-discard": limits["opt-discard"],
        }
        for name, value in limits.items():
            if value % align or value % (units.get(name) or 1):
                raise ImageError(f"Cannot meet constraints with {name} {value}")

    @property
    def length(self) -> int:  # type: ignore[override]
        """Bytes in the file below."""
        return self.inner.length

    def announce(self, event: str) -> None:
        """Let the rules act that wait for ``event``."""
        self._rules.announce(event)

    async def _check(self, kind: str, offset: int = 0, length: int = 0) -> None:
        """Fail a request if a rule says so, not before others had their turn."""
        if error := self._rules.error_for(kind, offset, length):
            await asyncio.sleep(0)
            raise OSError(error, os.strerror(error))

    def _pieces(self, offset: int, end: int, limit: str) -> Iterable[tuple[int, int]]:
        """Yield offsets and lengths of a range in pieces of so many bytes."""
        step = self._limits[limit] or max(end - offset, 1)
        for start in range(offset, end, step):
            yield start, min(step, end - start)

    # -- reading ---------------------------------------------------------

    def try_pread(self, offset: int, length: int) -> Buffer | None:
        """Never: the rules wait for what drivers tell of on the slow way."""
        return None

    async def pread(self, offset: int, length: int) -> Buffer:
        """Read whole units of ``align`` and return what was asked for."""
        first = offset - offset % self._align
        end = offset + length + -(offset + length) % self._align
        pieces: list[Buffer] = []
        for start, count in self._pieces(first, end, "max-transfer"):
            await self._check(READ, start, count)
            pieces.append(await self.inner.pread(start, count))
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return memoryview(data)[offset - first : offset - first + length]

    async def block_status(self, offset: int, length: int) -> tuple[bool, int]:
        """Ask the file below, in front of what fails and behind it."""
        failing = self._rules.first_failing(STATUS, offset, length)
        if failing is not None and failing > offset:
            length = failing - offset
        else:
            await self._check(STATUS, offset, length)
        return await self.inner.block_status(offset, length)

    # -- writing ---------------------------------------------------------

    async def pwritev(
        self, offset: int, buffers: Buffers, *, fua: bool = False
    ) -> None:
        """Write whole units of ``align``, reading what is beside the data."""
        data = b"".join(buffers) if len(buffers) != 1 else buffers[0]
        if self._align == 1:
            await self._write(offset, memoryview(data), fua)
            return
        async with self._rmw_lock:
            offset, data = await self._widen(offset, data)
            await self._write(offset, memoryview(data), fua)

    async def _widen(self, offset: int, data: Buffer) -> tuple[int, Buffer]:
        align, end = self._align, offset + len(data)
        head, tail = offset % align, end % align
        before: Buffer = b""
        behind: Buffer = b""
        if head:
            self.announce("pwritev_rmw_head")
            before = memoryview(await self.pread(offset - head, align))[:head]
            self.announce("pwritev_rmw_after_head")
        if tail:
            # The file keeps its length where that is not a multiple.
            self.announce("pwritev_rmw_tail")
            stop = max(end, min(end - tail + align, self.length))
            unit = await self.pread(end - tail, align)
            behind = memoryview(unit)[tail : tail + stop - end]
            self.announce("pwritev_rmw_after_tail")
        if not (before or behind):
            return offset, data
        return offset - head, b"".join((before, data, behind))

    async def _write(self, offset: int, view: memoryview, fua: bool) -> None:
        self.announce("pwritev")
        end = offset + len(view)
        for start, count in self._pieces(offset, end, "max-transfer"):
            await self._check(WRITE, start, count)
            piece = view[start - offset : start - offset + count]
            await self.inner.pwritev(start, [piece], fua=fua)
        self.announce("pwritev_done")

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool = False
    ) -> None:
        """Zero the preferred units of a range, and write zeroes beside them."""
        unit = self._limits["opt-write-zero"] or self._align
        end = offset + length
        first, last = -(-offset // unit) * unit, end // unit * unit
        if unit == 1 or first > last:
            first, last = (offset, end) if unit == 1 else (end, end)
        beside = [(offset, first), (last, end)]
        if no_fallback and any(start < stop for start, stop in beside):
            raise NotSupported("the range does not cover whole units")
        for begin, stop in beside:
            for start in range(begin, stop, MiB):
                await self.pwritev(start, [bytes(min(MiB, stop - start))])
        if first < last:
            self.announce("pwritev_zero")
        for start, count in self._pieces(first, last, "max-write-zero"):
            await self._check(ZERO, start, count)
            await self.inner.write_zeroes(
                start, count, may_unmap=may_unmap, no_fallback=no_fallback
            )
        if first < last:
            self.announce("pwritev_done")

    async def discard(self, offset: int, length: int) -> None:
        """Discard the preferred units of a range."""
        unit = self._limits["opt-discard"] or self._align
        first, last = -(-offset // unit) * unit, (offset + length) // unit * unit
        for start, count in self._pieces(first, last, "max-discard"):
            await self._check(DISCARD, start, count)
            await self.inner.discard(start, count)

    async def flush(self) -> None:
        """Flush the file below."""
        await self._check(FLUSH)
        await self.inner.flush()

    # -- the rest --------------------------------------------------------

    async def truncate(self, length: int) -> None:
        """Set the length of the file below: no rule is about that."""
        await self.inner.truncate(length)

    async def grow(self, length: int) -> None:
        """As the file below: growing is no event, nor is cutting."""
        await self.inner.grow(length)

    async def allocated_length(self) -> int | None:
        """Return None, as QEMU's driver does not know it."""
        return None

    async def reopen(self, *, read_only: bool) -> None:
        """Let the file below be changed, or no longer."""
        await self.inner.reopen(read_only=read_only)
        self.read_only = read_only

    async def close(self) -> None:
        """Close the file below."""
        await self.inner.close()


def _take_limit(pairs: dict[str, str], name: str) -> int:
    text = pairs.pop(name, None)
    if text is None:
        return 0
    try:
        value = parse_size(text, limit=1 << 64)
    except ValueError:
        raise ImageError(size_expected(name)) from None
    if value > _LARGEST.get(name, _LARGEST_OF_OTHERS):
        raise ImageError(f"Cannot meet constraints with {name} {value}")
    return value

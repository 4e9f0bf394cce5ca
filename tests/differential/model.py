"""What a disk may hold, byte by byte, while overlapping requests are in flight.

Time is a counter that goes up with each submission and each reply. A write
takes effect at one moment between its submission and its reply, as far as a
single byte is concerned; so a value may be read as long as no other write of
that byte began after the value's write was answered and was itself answered
before the read began. Writes that were in flight together may land in either
order. A trimmed byte holds its old value or zero, whichever; which of the two
is settled by the first read, and must not change afterwards.
"""

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]
Mask: TypeAlias = npt.NDArray[np.bool_]

NEVER = 1 << 62


@dataclass(slots=True, eq=False)
class Change:
    """One write, zeroing or trim that the model can't fold into its base yet.

    Attributes:
        values: the bytes written, or None for zeroes.
        optional: the change may or may not happen, byte by byte (trim).
        fua: durable as soon as it is answered.
        done_at: time of the reply, NEVER while in flight.
        durable: survives a crash; only of interest after one.
    """

    offset: int
    length: int
    values: Bytes | None
    optional: bool
    fua: bool
    submitted_at: int
    done_at: int = NEVER
    durable: bool = False

    @property
    def end(self) -> int:
        return self.offset + self.length

    def overlaps(self, offset: int, end: int) -> bool:
        return self.offset < end and offset < self.end

    def slice(self, offset: int, end: int) -> Bytes | int:
        """Return the values for a range inside the change."""
        if self.values is None:
            return 0
        return self.values[offset - self.offset : end - self.offset]


class Mismatch(AssertionError):
    """The server returned a byte that no order of the requests explains."""

    def __init__(self, offset: int, got: int, expected: int, nb_wrong: int) -> None:
        super().__init__(
            f"byte {offset:#x} reads {got:#04x}, expected {expected:#04x} or what"
            f" is in flight; {nb_wrong} bytes wrong in this read"
        )
        self.offset = offset


@dataclass(slots=True)
class DiskModel:
    """The possible contents of one disk.

    Attributes:
        base: the content before all ``changes``; uint8[size].
        maybe_zero: bytes of ``base`` that may read as zero instead; bool[size].
        changes: not yet folded, in order of submission.
        flushed_at: time of submission of the last flush that was answered.
    """

    base: Bytes
    maybe_zero: Mask = field(init=False)
    changes: list[Change] = field(default_factory=list)
    flushed_at: int = 0
    _clock: int = 0
    _crashed: bool = False

    def __post_init__(self) -> None:
        self.maybe_zero = np.zeros(len(self.base), dtype=np.bool_)

    @property
    def size(self) -> int:
        return len(self.base)

    def tick(self) -> int:
        """Return the time of a new event."""
        self._clock += 1
        return self._clock

    def begin(
        self,
        offset: int,
        length: int,
        values: bytes | None,
        *,
        optional: bool = False,
        fua: bool = False,
    ) -> Change:
        """Note a change that is about to be sent."""
        array = None if values is None else np.frombuffer(values, dtype=np.uint8)
        change = Change(offset, length, array, optional, fua, self.tick())
        self.changes.append(change)
        return change

    def end(self, change: Change) -> None:
        """Note that a change was answered with success."""
        change.done_at = self.tick()

    def crash(self) -> None:
        """The server was killed: what is not durable may or may not be there.

        Only a model that was never folded past ``flushed_at`` can tell.
        """
        for change in self.changes:
            answered = change.done_at != NEVER
            change.durable = answered and (
                change.fua or change.done_at < self.flushed_at
            )
        self._crashed = True

    def nb_overlapping_in_flight(self, offset: int, length: int) -> int:
        """Count the unanswered changes that touch the range."""
        return sum(
            change.done_at == NEVER and change.overlaps(offset, offset + length)
            for change in self.changes
        )

    # -- reading ---------------------------------------------------------

    def check_read(self, offset: int, data: bytes, submitted_at: int) -> None:
        """Raise `Mismatch` unless ``data`` is a possible answer to a read.

        A read of bytes that no change is concerned with settles those which
        an earlier trim had left open.
        """
        got = np.frombuffer(data, dtype=np.uint8)
        end = offset + len(data)
        base = self.base[offset:end]
        maybe_zero = self.maybe_zero[offset:end]
        overlapping = [c for c in self.changes if c.overlaps(offset, end)]
        if not overlapping and not maybe_zero.any() and np.array_equal(got, base):
            return
        possible = (got == base) | (maybe_zero & (got == 0))
        for change in overlapping:
            if self._overwrites(change, submitted_at):
                start, stop = self._clip(change, offset, end)
                possible[start:stop] = False
        for change in overlapping:
            start, stop = self._clip(change, offset, end)
            values = change.slice(offset + start, offset + stop)
            match = got[start:stop] == values
            for later in overlapping:
                if later.submitted_at > change.done_at and self._overwrites(
                    later, submitted_at
                ):
                    cut, until = self._clip(later, offset + start, offset + stop)
                    match[cut:until] = False
            possible[start:stop] |= match
        if not possible.all():
            wrong = np.flatnonzero(~possible)
            first = int(wrong[0])
            raise Mismatch(
                offset + first, int(got[first]), int(base[first]), len(wrong)
            )
        if not overlapping:
            base[:] = got
            maybe_zero[:] = False

    def _overwrites(self, change: Change, read_at: int) -> bool:
        """Say whether a read begun then can't see what was there before."""
        return (
            change.done_at < read_at
            and not change.optional
            and (change.durable or not self._crashed)
        )

    @staticmethod
    def _clip(change: Change, offset: int, end: int) -> tuple[int, int]:
        """Return the part of a change in a range, relative to the range.

        Both ends are inside the range even if there is no such part.
        """
        length = end - offset
        start = min(max(change.offset - offset, 0), length)
        return start, max(start, min(change.end - offset, length))

    # -- settling --------------------------------------------------------

    def fold(self, oldest_in_flight: int) -> None:
        """Move finished changes into the base where their order is certain.

        ``oldest_in_flight`` is the submission time of the oldest request of
        any kind still unanswered.
        """
        kept: list[Change] = []
        for change in self.changes:
            certain = change.done_at < oldest_in_flight and not any(
                other.overlaps(change.offset, change.end)
                and other.submitted_at < change.done_at
                and change.submitted_at < other.done_at
                for other in self.changes
                if other is not change
            )
            # An older one that stays behind must not be applied after this.
            if certain and not any(
                older.overlaps(change.offset, change.end) for older in kept
            ):
                self._apply(change)
            else:
                kept.append(change)
        self.changes = kept

    def _apply(self, change: Change) -> None:
        where = slice(change.offset, change.end)
        if change.optional:
            self.maybe_zero[where] |= self.base[where] != 0
        else:
            self.base[where] = change.slice(change.offset, change.end)
            self.maybe_zero[where] = False

    def open_ranges(self) -> list[tuple[int, int]]:
        """Return the ``(offset, end)`` ranges whose content is not certain."""
        open_bytes = self.maybe_zero.copy()
        for change in self.changes:
            open_bytes[change.offset : change.end] = True
        edges = np.flatnonzero(np.diff(open_bytes.astype(np.int8), prepend=0, append=0))
        return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]

    def settle(self, contents: list[tuple[int, bytes]]) -> None:
        """With nothing in flight, take what was read (and checked) as certain.

        ``contents`` are ``(offset, data)`` that cover `open_ranges`.
        """
        self.changes.clear()
        self._crashed = False
        for offset, data in contents:
            where = slice(offset, offset + len(data))
            self.base[where] = np.frombuffer(data, dtype=np.uint8)
            self.maybe_zero[where] = False

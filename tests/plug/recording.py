"""What the recorder wrote down, and the files that a power cut could leave of it.

At a cut, what a completed fdatasync covers is there: all calls that had ended
before it began. Of the others each sector of 512 bytes has, on its own, any of the
contents that it has had since, and the file any of its lengths.
"""

import os
import random
import re
import struct
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path

SECTOR = 512
NEVER = 1 << 62

# See recorder.c.
_RECORD = struct.Struct("=IIQQQQqQ")
DSYNC, MAPPED = 1, 2

_REPLY = re.compile(rb"\x67\x44\x66\x98(.{4})(.{8})", re.DOTALL)
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16


@dataclass(slots=True)
class Call:
    """A system call; places are in the one order of all records.

    Attributes:
        kind: W(rite), T(runcate), A(llocate) or F(lush).
        flags: of a write `DSYNC` or `MAPPED`, of an allocation fallocate's mode.
        durable_at: from which place on it is there for certain.
    """

    kind: str
    begun: int
    offset: int
    length: int
    flags: int
    data: bytes
    ended: int = NEVER
    result: int = 0
    durable_at: int = NEVER


@dataclass(slots=True)
class Recording:
    """What one or more programs did.

    Attributes:
        files: the calls of each file, by inode.
        replies: place and error of each NBD reply, by cookie.
        renames: place, old and new name.
        ends: how long the log was after each record.
    """

    files: dict[int, list[Call]] = field(default_factory=dict)
    replies: dict[int, tuple[int, int]] = field(default_factory=dict)
    renames: list[tuple[int, str, str]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    @property
    def nb_records(self) -> int:
        return len(self.ends)

    def calls_of(self, path: Path) -> list[Call]:
        return self.files.get(path.stat().st_ino, [])

    @property
    def lost_at(self) -> int:
        """How long the log was when the kernel first told of lost data."""
        place = min(
            (
                call.ended
                for calls in self.files.values()
                for call in calls
                if call.result < 0
                and (call.kind == "F" or (call.kind == "W" and call.flags == DSYNC))
            ),
            default=NEVER,
        )
        return self.ends[place] if place < NEVER else NEVER


@dataclass(slots=True)
class Kill:
    """When a program was killed, by the log's length, and the files by inode."""

    log_length: int
    files: dict[int, bytes]


def note_kill(log: Path, directory: Path) -> Kill:
    """Note what a killed program has left, and end the log after its last whole
    record: what the program was writing down it had not done."""
    data = log.read_bytes()
    position = end = 0
    while end <= len(data):
        position = end
        if position + _RECORD.size > len(data):
            break
        end = position + _RECORD.size + _RECORD.unpack_from(data, position)[-1]
    os.truncate(log, position)
    files = {path.stat().st_ino: path.read_bytes() for path in directory.iterdir()}
    return Kill(position, files)


def read_recording(log: Path, kill: Kill | None = None) -> Recording:
    data = log.read_bytes() if log.exists() else b""
    recording = Recording()
    by_number: dict[int, Call] = {}
    position = 0
    while position < len(data):
        code, flags, number, file, offset, length, result, nb_data = (
            _RECORD.unpack_from(data, position)
        )
        position += _RECORD.size + nb_data
        payload = data[position - nb_data : position]
        kind, place = chr(code), recording.nb_records
        if kind == "X":
            for error, cookie in _REPLY.findall(payload):
                told = place, int.from_bytes(error, "big")
                recording.replies.setdefault(int.from_bytes(cookie, "big"), told)
        elif kind == "N":
            old, new, _ = payload.split(b"\0")
            recording.renames.append((place, os.fsdecode(old), os.fsdecode(new)))
        elif kind == "E":
            by_number[number].ended, by_number[number].result = place, result
        else:
            call = Call(kind, place, offset, length, flags, payload)
            by_number[number] = call
            recording.files.setdefault(file, []).append(call)
        recording.ends.append(position)
    for file, calls in recording.files.items():
        if kill is not None:
            place = bisect_right(recording.ends, kill.log_length)
            for call in calls:
                if call.ended == NEVER and call.begun < place and call.kind != "F":
                    _take_as_found(call, kill.files[file], place)
        _settle(calls)
    return recording


def _take_as_found(call: Call, content: bytes, place: int) -> None:
    """Make of a call in which its program was killed what it has done."""
    call.ended = place
    if call.kind == "T":
        call.length = len(content)
        return
    length = len(call.data) if call.kind == "W" else call.length
    call.kind, call.flags = "W", 0
    call.data = content[call.offset : call.offset + length]
    call.result = len(call.data)


def _settle(calls: list[Call]) -> None:
    """Find out how much was written, and when it is durable."""
    flushes = [c for c in calls if c.kind == "F" and c.ended < NEVER]
    for call in calls:
        if call.kind == "W" and call.ended < NEVER:
            call.data = call.data[: max(0, call.result)]
            if call.flags == DSYNC and call.result >= 0:
                call.durable_at = call.ended
        # What one flush could not write may be gone from page cache, and the
        # next one knows nothing of it.
        lost = [f.begun for f in flushes if f.result and f.begun > call.ended]
        until = min(lost, default=NEVER)
        ended = [f.ended for f in flushes if call.ended < f.begun < until]
        call.durable_at = min([call.durable_at, *ended])


@dataclass(slots=True)
class _Content:
    """What a sector holds after a call; ``is_cut``: the file ended before it."""

    call: Call
    value: bytes
    is_cut: bool


class FileHistory:
    """All contents that each sector of a file has had.

    Attributes:
        last: the file after all calls.
    """

    def __init__(self, base: bytes, calls: list[Call]) -> None:
        self._base = base
        self._contents: dict[int, list[_Content]] = {}
        self._lengths: list[tuple[Call, int]] = []
        disk = bytearray(base)
        for call in calls:
            if call.data or (call.kind in "TA" and call.result >= 0):
                self._apply(disk, call)
        self.last = bytes(disk)

    def _apply(self, disk: bytearray, call: Call) -> None:
        before = len(disk)
        start, end = call.offset, call.offset + call.length
        is_cut, content = False, b""
        if call.kind == "W":
            content, end = call.data, start + len(call.data)
        elif call.kind == "T":
            start, end = sorted((before, call.length))
            is_cut = call.length < before
            del disk[call.length :]
        else:
            if call.flags & _KEEP_SIZE:
                end = min(end, before)
            if call.flags & (_PUNCH_HOLE | _ZERO_RANGE):
                content = bytes(max(0, end - start))
        if not is_cut and len(disk) < end:
            disk.extend(bytes(end - len(disk)))
        if content:
            disk[start:end] = content
        if len(disk) != before:
            self._lengths.append((call, len(disk)))
        if content or is_cut:
            for sector in range(start // SECTOR, -(-end // SECTOR)):
                value = bytes(disk[sector * SECTOR : (sector + 1) * SECTOR])
                self._contents.setdefault(sector, []).append(
                    _Content(call, value.ljust(SECTOR, b"\0"), is_cut)
                )

    def file_at(self, cut: int, style: str, rnd: random.Random) -> bytes:
        """Return the file as a power cut after so many records could leave it.

        ``style``: ``old`` (nothing that need not be there), ``new`` or ``mixed``.
        """
        lengths = [(-1, len(self._base))]
        for call, value in self._lengths:
            if call.begun >= cut:
                break
            if call.durable_at < cut:
                lengths.clear()
            lengths.append((call.begun, value))
        # Changes of the length come one after the other.
        resized_at, length = _choose(lengths, style, rnd, 0.5)
        disk = bytearray(self._base[:length])
        disk.extend(bytes(length - len(disk)))
        share = rnd.choice((0.1, 0.5, 0.9))
        for sector, contents in self._contents.items():
            start = sector * SECTOR
            if start >= length:
                continue
            values = [bytes(disk[start : start + SECTOR])]
            for content in contents:
                begun = content.call.begun
                if begun >= cut or (content.is_cut and begun > resized_at):
                    break
                if content.is_cut or content.call.durable_at < cut:
                    values.clear()
                values.append(content.value)
            value = _choose(values, style, rnd, share)[: length - start]
            disk[start : start + len(value)] = value
        return bytes(disk)


def _choose(values, style, rnd, share):
    """Return the first or last of some, or any of them in that share of cases."""
    if style == "new":
        return values[-1]
    if style == "old" or rnd.random() >= share:
        return values[0]
    return rnd.choice(values)

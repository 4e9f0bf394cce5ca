"""All disks that a power cut can leave, enumerated where they can be.

Of what was written since the last completed flush each sector has, on its own,
any of the contents that it had since: any subset of the writes, torn at
sectors, in any order, comes down to that.
"""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from tests.crash.recording import SECTOR, Event, History


@dataclass(slots=True)
class Cut:
    """The disks after a power cut after some events.

    Attributes:
        durable: what is there for certain.
        choices: by sector, what else it may hold; its durable content first.
    """

    durable: bytes
    choices: dict[int, list[bytes]]

    @property
    def nb_states(self) -> int:
        return math.prod(len(values) for values in self.choices.values())

    def states(self, limit: int, rnd: random.Random) -> Iterator[bytes]:
        """Yield all disks, or if there are more than ``limit`` so many of them:
        all old, all new, the others at random."""
        sectors = sorted(self.choices)
        if self.nb_states <= limit:
            for chosen in itertools.product(*(self.choices[s] for s in sectors)):
                yield self._build(dict(zip(sectors, chosen, strict=True)))
            return
        yield self._build({})
        yield self._build({s: self.choices[s][-1] for s in sectors})
        for _ in range(limit - 2):
            kept = rnd.choice((0.1, 0.5, 0.9))
            yield self._build(
                {
                    s: rnd.choice(self.choices[s][1:])
                    for s in sectors
                    if rnd.random() < kept
                }
            )

    def _build(self, chosen: dict[int, bytes]) -> bytes:
        disk = bytearray(self.durable)
        for sector, value in chosen.items():
            start = sector * SECTOR
            if len(disk) < start + SECTOR and value.strip(b"\0"):
                disk.extend(bytes(start + SECTOR - len(disk)))
            if start < len(disk):
                disk[start : start + SECTOR] = value
        return bytes(disk)


def cut_after(history: History, nb_events: int) -> Cut:
    """Return the disks that a cut after so many events can leave."""
    events = history.events[:nb_events]
    nb_durable = max((e.nb_durable for e in events), default=0)
    disk = bytearray(history.base)
    for event in events[:nb_durable]:
        apply(disk, event)
    choices: dict[int, list[bytes]] = {}
    latest = bytearray(disk)
    for event in events[nb_durable:]:
        if event.kind == "flush":
            continue
        before = len(latest)
        apply(latest, event)
        if event.kind == "write":
            first, end = event.offset, event.offset + len(event.data)
        else:
            first, end = sorted((before, event.length))
        for sector in range(first // SECTOR, -(-end // SECTOR)):
            values = choices.setdefault(sector, [sector_of(disk, sector)])
            value = sector_of(latest, sector)
            if value not in values:
                values.append(value)
    return Cut(bytes(disk), {s: v for s, v in choices.items() if len(v) > 1})


def sector_of(disk: bytearray, sector: int) -> bytes:
    return bytes(disk[sector * SECTOR : (sector + 1) * SECTOR]).ljust(SECTOR, b"\0")


def apply(disk: bytearray, event: Event) -> None:
    """Do one event to a disk."""
    if event.kind == "write":
        end = event.offset + len(event.data)
        if len(disk) < end:
            disk.extend(bytes(end - len(disk)))
        disk[event.offset : end] = event.data
    elif event.kind == "truncate":
        del disk[event.length :]
        disk.extend(bytes(event.length - len(disk)))


@dataclass(slots=True)
class Figures:
    """What an exploration has done."""

    nb_cuts: int = 0
    nb_whole_cuts: int = 0
    nb_states: int = 0
    nb_qemu: int = 0

    def __str__(self) -> str:
        return (
            f"{self.nb_states} disks of {self.nb_cuts} cuts "
            f"({self.nb_whole_cuts} of them exhaustively), "
            f"{self.nb_qemu} looked at by qemu-img, too"
        )


def distinct_disks(
    history: History, limit: int, rnd: random.Random, figures: Figures
) -> Iterator[tuple[str, bytes]]:
    """Yield each disk that any cut of a history can leave, and what to call it.

    At most ``limit`` of each cut, and the same disk only once.
    """
    seen = set()
    for nb_events in range(len(history.events) + 1):
        cut = cut_after(history, nb_events)
        figures.nb_cuts += 1
        figures.nb_whole_cuts += cut.nb_states <= limit
        for number, disk in enumerate(cut.states(limit, rnd)):
            if disk in seen:
                continue
            seen.add(disk)
            figures.nb_states += 1
            yield f"cut {nb_events}, disk {number}", disk

"""What clients wrote to each sector of a disk, and what a power cut may leave there."""

from collections.abc import Sequence
from dataclasses import dataclass

from tests.crash.recording import SECTOR, RecordingStorage


@dataclass(slots=True)
class Change:
    """One change of one sector, with the clock and the disk's event numbers
    at its start, and the clock at its answer (0: never answered)."""

    value: bytes
    start_time: int
    start_event: int
    end_time: int = 0


class SectorHistory:
    """The changes of all sectors, and the flushes, of one recorded disk.

    ``flushes``: for each one, the clock at its start and the disk's event number
    at its answer.
    """

    def __init__(self, storage: RecordingStorage) -> None:
        self.storage = storage
        self.sectors: dict[int, list[Change]] = {}
        self.flushes: list[tuple[int, int]] = []
        self._clock = 0

    def tick(self) -> int:
        self._clock += 1
        return self._clock

    @property
    def event(self) -> int:
        return len(self.storage.history.events)

    def begin(self, first: int, data: bytes) -> list[Change]:
        """Note that ``data`` is on its way to the sectors from ``first`` on."""
        started, event = self.tick(), self.event
        changes = [
            Change(data[at : at + SECTOR], started, event)
            for at in range(0, len(data), SECTOR)
        ]
        for sector, change in enumerate(changes, first):
            self.sectors.setdefault(sector, []).append(change)
        return changes

    def end(self, changes: Sequence[Change]) -> None:
        """Note that the changes have been answered."""
        ended = self.tick()
        for change in changes:
            change.end_time = ended

    def may_hold(self, sector: int, cut: int, before: bytes) -> set[bytes]:
        """Return what a sector that held ``before`` at first, and was changed, may
        hold on a disk that was cut after the event ``cut``."""
        flushed = max((t for t, event in self.flushes if event <= cut), default=0)
        durable = before
        later = set()
        for change in self.sectors[sector]:
            if change.end_time and change.end_time < flushed:
                durable = change.value
                later = set()
            elif change.start_event <= cut:
                later.add(change.value)
        return later | {durable}

"""A file for the blocking tools that records what reaches the disk."""

from tests.builder import BytesFile
from tests.crash.recording import Event, History


class RecordedFile(BytesFile):
    """Bytes in memory; every write and flush goes to ``history``.

    A file system keeps the order of what is done to a file's length, so that
    what was cut off is gone whatever comes later: such a change is durable at
    once, and no write has been on its way before it.
    """

    def __init__(self, data: bytes, *, is_device: bool = False) -> None:
        super().__init__(data)
        self.is_device = is_device
        self.history = History(data)

    def pwrite(self, offset: int, data: bytes) -> None:
        super().pwrite(offset, data)
        self.history.events.append(Event("write", offset, bytes(data)))

    def truncate(self, length: int) -> None:
        if not self.is_device:
            super().truncate(length)
            self.history.events.append(Event("truncate", length=length))
            self.flush()

    def flush(self) -> None:
        events = self.history.events
        events.append(Event("flush", nb_durable=len(events)))

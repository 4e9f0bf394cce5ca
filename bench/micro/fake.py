"""A transport that takes everything at once and keeps nothing."""

import asyncio
from collections.abc import Iterable
from typing import Any

from nbdqcow.types import Buffer


class FakeTransport(asyncio.Transport):
    """A socket to a client that is always ready.

    Attributes:
        nb_bytes: bytes written so far; set it to 0 to begin anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nb_bytes = 0

    def set_write_buffer_limits(
        self, high: int | None = None, low: int | None = None
    ) -> None:
        """Take any limit: there is no buffer."""

    def get_write_buffer_size(self) -> int:
        """Return 0: all has left."""
        return 0

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        """Count the bytes."""
        self.nb_bytes += sum(map(len, list_of_data))

    def write(self, data: Buffer) -> None:
        """Count the bytes."""
        self.nb_bytes += len(data)

    def pause_reading(self) -> None:
        """Nothing arrives by itself."""

    def resume_reading(self) -> None:
        """Nothing arrives by itself."""

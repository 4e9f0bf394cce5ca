"""Looking for the next request a little longer before the process sleeps.

A client that asks for one thing after the other lets the server sleep between
two requests, and being woken takes longer than serving one. So while requests
follow one another closely the event loop looks for the next one without
waiting, for a few microseconds: QEMU's I/O threads do the same. Every turn of
the loop serves whoever else has something, as ever.
"""

import asyncio
import os
import time
from typing import Final

DEFAULT_POLL_TIME: Final = 32
"""Microseconds: that of QEMU's I/O threads."""


class Poller:
    """Keeps one event loop awake, for all connections on it."""

    __slots__ = ("_call_soon", "_last", "_polling", "_time", "_until")

    def __init__(self, loop: asyncio.AbstractEventLoop, poll_time: int) -> None:
        """Poll for ``poll_time`` microseconds; not at all where there is but one
        processor, which the client needs to ask anything."""
        self._call_soon = loop.call_soon
        self._time = poll_time / 1e6 if len(os.sched_getaffinity(0)) > 1 else 0.0
        self._last = 0.0
        self._until = 0.0
        self._polling = False

    def served(self) -> None:
        """Requests have been answered: poll, if the ones before were close."""
        now = time.perf_counter()
        if now - self._last < 2 * self._time:
            self._until = now + self._time
            if not self._polling:
                self._polling = True
                self._call_soon(self._poll)
        self._last = now

    def _poll(self) -> None:
        if time.perf_counter() < self._until:
            self._call_soon(self._poll)
        else:
            self._polling = False

"""Tells whoever runs the server that an image fails its clients' requests."""

import logging
from typing import Final

logger = logging.getLogger(__name__)

_INTERVAL: Final = 60.0
"""Seconds in which an error of an image is told once: a disk that is full fails
thousands of requests in a second."""


class FailureLog:
    """What one image failed with lately.

    Clients hear of every error, but the guest's log is not where the owner of a
    full disk looks.
    """

    __slots__ = ("_filename", "_told")

    def __init__(self, filename: str) -> None:
        self._filename = filename
        # By errno: when it was told last, and how often it came since. Error
        # numbers are few, so this is bounded.
        self._told: dict[int, tuple[float, int]] = {}

    def note(self, what: str, exc: OSError | MemoryError, now: float) -> None:
        """``what`` has failed; ``now`` is the loop's time, in seconds."""
        number = exc.errno or 0 if isinstance(exc, OSError) else 0
        told, nb_more = self._told.get(number, (now - _INTERVAL, 0))
        if now - told < _INTERVAL:
            self._told[number] = told, nb_more + 1
            return
        self._told[number] = now, 0
        text = exc.strerror or str(exc) if isinstance(exc, OSError) else "out of memory"
        more = f" (and {nb_more} times since it was last told)" if nb_more else ""
        logger.warning("'%s': %s failed: %s%s", self._filename, what, text, more)

"""How much memory images may take to keep what they have decompressed."""

import contextlib
import os
from functools import cache
from typing import Final
from weakref import WeakSet

from nbdqcow.units import MiB

_PART: Final = 64
_LEAST: Final = 32 * MiB
_MOST: Final = 256 * MiB
_LEAST_SHARE: Final = 4 * MiB

_LIMITS: Final = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)
"""What a container may have, in either version of control groups."""


def usable_memory() -> int:
    """Return the bytes of memory of this machine, or of this container."""
    amounts = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in _LIMITS:
        # "max" is none.
        with contextlib.suppress(OSError, ValueError), open(path) as file:
            amounts.append(int(file.read()))
    return min(amounts)


@cache
def default_budget() -> int:
    """Return the bytes that all images share: a 64th of the memory, 32 MiB at
    least and 256 MiB at most."""
    return min(max(_LEAST, usable_memory() // _PART), _MOST)


class MemoryShare:
    """What one image may take: as much as each of the others that `join`."""

    _sharers: Final[WeakSet["MemoryShare"]] = WeakSet()

    def __init__(self, own: int | None = None) -> None:
        """``own`` is an amount of its own, which it does not share."""
        self._own = own

    def join(self) -> None:
        """Take part, from now on until `leave`."""
        if self._own is None:
            self._sharers.add(self)

    def leave(self) -> None:
        """Leave the memory to the others."""
        self._sharers.discard(self)

    @property
    def nb_bytes(self) -> int:
        """The bytes that it may take now."""
        if self._own is not None:
            return self._own
        return max(_LEAST_SHARE, default_budget() // max(1, len(self._sharers)))

"""Shapes that travel between the rooms of the block layer."""

from collections.abc import Sequence
from typing import Final, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Contiguous bytes; a memoryview is always one-dimensional, format ``B``."""

Buffers: TypeAlias = Sequence[Buffer]

# What a run of guest bytes is. Plain ints: the inline path compares them for
# every request, and an enum member costs several times as much there.
DATA: Final = 0
"""Stored as is, at the run's host offset."""
ZERO: Final = 1
"""Reads as zeroes; nothing is stored for it."""
ZERO_ALLOCATED: Final = 2
"""Reads as zeroes; clusters are kept for it at the run's host offset."""
UNALLOCATED: Final = 3
"""Not in this image: read the backing image, or zeroes without one."""
COMPRESSED: Final = 4
"""One compressed cluster (or part of it); the host offset field holds the
format's own descriptor, which only the driver can read."""

Run: TypeAlias = tuple[int, int, int]
"""``(kind, host_offset, length)``: ``length`` bytes, at least 1, from the
guest offset asked for, are all of one kind; DATA and ZERO_ALLOCATED runs are
contiguous in the file. ``host_offset`` is 0 where it has no meaning."""

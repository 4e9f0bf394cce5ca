"""The kinds of many clusters at once, by numpy.

Source: qcow2.txt, "Cluster mapping".
"""

import asyncio
from typing import TYPE_CHECKING, Final

from nbdqcow.block.status import Kinds
from nbdqcow.formats.qcow2.entries import OFFSET_MASK, OFLAG_COMPRESSED, OFLAG_ZERO
from nbdqcow.types import COMPRESSED, DATA, UNALLOCATED, ZERO, ZERO_ALLOCATED

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nbdqcow.formats.qcow2.driver import Qcow2Driver

_SLICES_PER_TURN: Final = 64
"""Slices looked at (some 20 us each) before others get a turn on the loop."""


async def extents(image: "Qcow2Driver", offset: int, length: int, limit: int) -> Kinds:
    """See `FormatDriver.extents`."""
    import numpy as np

    tables = image.tables
    end = offset + length
    pieces: list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]] = []
    nb_extents = nb_slices = 0
    position = offset
    while position < end and nb_extents <= limit:
        empty_end = tables.empty_until(position, end)
        if empty_end > position:
            lengths = np.array([empty_end - position], np.uint64)
            pieces.append((lengths, np.array([UNALLOCATED], np.uint8)))
            position = empty_end
        else:
            key = position >> tables.slice_shift
            words = (await tables.load(key)).words
            piece_end = min(end, (key + 1) << tables.slice_shift)
            first = (position >> image.cluster_bits) & (tables.slice_entries - 1)
            last = first + -(-(piece_end - position) // image.cluster_size)
            kinds = cluster_kinds(
                np.frombuffer(words, np.uint64)[first:last], image.header.version
            )
            starts = np.flatnonzero(np.diff(kinds, prepend=255))
            ends = np.append(starts[1:], len(kinds)).astype(np.uint64)
            bounds = ends * np.uint64(image.cluster_size)
            bounds += np.uint64(position - position % image.cluster_size)
            bounds[-1] = piece_end
            lengths = np.diff(bounds, prepend=np.uint64(position))
            pieces.append((lengths, kinds[starts]))
            position = piece_end
            nb_slices += 1
            if nb_slices % _SLICES_PER_TURN == 0:
                await asyncio.sleep(0)
        nb_extents += len(pieces[-1][0])
    lengths = np.concatenate([piece[0] for piece in pieces])
    kinds = np.concatenate([piece[1] for piece in pieces])
    starts = np.flatnonzero(np.diff(kinds, prepend=255))
    return Kinds(np.add.reduceat(lengths, starts)[:limit], kinds[starts][:limit])


def cluster_kinds(
    words: "npt.NDArray[np.uint64]", version: int
) -> "npt.NDArray[np.uint8]":
    """Return the run kind of each standard L2 entry."""
    import numpy as np

    placed = (words & np.uint64(OFFSET_MASK)) != 0
    kinds = np.where(placed, DATA, UNALLOCATED)
    if version >= 3:
        zero = (words & np.uint64(OFLAG_ZERO)) != 0
        kinds = np.where(zero, np.where(placed, ZERO_ALLOCATED, ZERO), kinds)
    compressed = (words & np.uint64(OFLAG_COMPRESSED)) != 0
    return np.where(compressed, COMPRESSED, kinds).astype(np.uint8)

"""The kinds of many clusters at once, by numpy.

Source: qcow2.txt, "Cluster mapping".
"""

import asyncio
from typing import TYPE_CHECKING, Final

from nbdqcow.block.status import Kinds
from nbdqcow.errors import CorruptImage
from nbdqcow.formats.qcow2.entries import (
    ALL_ALLOCATED,
    ALL_ZERO,
    NB_SUBCLUSTERS,
    OFFSET_MASK,
    OFLAG_COMPRESSED,
    OFLAG_ZERO,
)
from nbdqcow.types import COMPRESSED, DATA, UNALLOCATED, ZERO, ZERO_ALLOCATED

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nbdqcow.formats.qcow2.driver import Qcow2Driver

MAX_SLICES: Final = 64
"""Slices looked at (some 10 us each) before others get a turn on the loop."""
_NB_AT_A_TIME: Final = 1 << 16
"""L1 entries looked at (some 300 us) before others get a turn."""


async def extents(image: "Qcow2Driver", offset: int, length: int, limit: int) -> Kinds:
    """See `FormatDriver.extents`."""
    import numpy as np

    end = offset + length
    pieces: list[Kinds] = []
    nb_extents = 0
    nb_slices = 1
    position = offset
    while position < end and nb_extents <= limit:
        empty_end = _empty_until(image, position, end)
        if empty_end > position:
            piece = Kinds(
                np.array([empty_end - position], np.uint64),
                np.array([UNALLOCATED], np.uint8),
            )
            position = empty_end
            if position < end:
                await asyncio.sleep(0)
        else:
            words, piece_end = await load_entries(image, position, end, nb_slices)
            kinds, unit = kinds_of(image, words)
            # Of the first cluster, and the last, only a part may be meant.
            first = (position & (image.cluster_size - 1)) // unit
            end_index = first + -(-(piece_end - position + position % unit) // unit)
            piece = _runs(kinds[first:end_index], position, piece_end, unit)
            position = piece_end
            # Who wants few extents gets them soon; a long way goes in strides.
            nb_slices = min(2 * nb_slices, MAX_SLICES)
            if nb_slices == MAX_SLICES:
                await asyncio.sleep(0)
        # What goes on where the last piece ended will be one extent with it.
        goes_on = pieces and pieces[-1].kinds[-1] == piece.kinds[0]
        nb_extents += len(piece.lengths) - bool(goes_on)
        pieces.append(piece)
    lengths = np.concatenate([piece.lengths for piece in pieces])
    kinds = np.concatenate([piece.kinds for piece in pieces])
    starts = np.flatnonzero(np.concatenate(([True], kinds[1:] != kinds[:-1])))
    if len(starts) < len(kinds):
        lengths, kinds = np.add.reduceat(lengths, starts), kinds[starts]
    return Kinds(lengths[:limit], kinds[:limit])


def _empty_until(image: "Qcow2Driver", position: int, end: int) -> int:
    """As `Tables.empty_until`, for a way that may be long."""
    import numpy as np

    tables = image.tables
    first, last = position >> tables.l1_shift, (end - 1) >> tables.l1_shift
    if first >= len(tables.l1):
        # The disk has become smaller.
        return end
    if tables.l1[first] & OFFSET_MASK:
        return position
    last = min(last, first + _NB_AT_A_TIME - 1)
    entries = np.frombuffer(tables.l1, np.uint64)[first : last + 1]
    mapped = (entries & np.uint64(OFFSET_MASK)) != 0
    nb_empty = int(mapped.argmax()) or len(mapped)
    return min(end, (first + nb_empty) << tables.l1_shift)


async def load_entries(
    image: "Qcow2Driver", position: int, end: int, nb_slices: int
) -> tuple["npt.NDArray[np.uint64]", int]:
    """Return the words of L2 entries from that of ``position`` on, and where in
    the guest the last of them ends: of at most ``nb_slices`` slices, and no
    further than one L2 table. There is a table at ``position``."""
    import numpy as np

    tables = image.tables
    first_key = position >> tables.slice_shift
    end = min(end, ((position >> tables.l1_shift) + 1) << tables.l1_shift)
    last_key = min(first_key + nb_slices - 1, (end - 1) >> tables.slice_shift)
    slices = []
    for key in range(first_key, last_key + 1):
        found = tables.try_load(key) or await tables.load(key)
        slices.append(np.frombuffer(found.words, np.uint64))
    end = min(end, (last_key + 1) << tables.slice_shift)
    first = (position >> image.cluster_bits) & (tables.slice_entries - 1)
    nb_clusters = -(-end // image.cluster_size) - (position >> image.cluster_bits)
    nb_words = tables.entry_words
    words = np.concatenate(slices)
    return words[first * nb_words : (first + nb_clusters) * nb_words], end


def kinds_of(
    image: "Qcow2Driver", words: "npt.NDArray[np.uint64]"
) -> tuple["npt.NDArray[np.uint8]", int]:
    """Return run kinds from the cluster of the first entry on, and the bytes
    that each of them is about."""
    if not image.header.extended_l2:
        return cluster_kinds(words, image.header.version), image.cluster_size
    entries, bitmaps = words[::2], words[1::2]
    kinds = uniform_kinds(entries, bitmaps)
    if kinds is not None:
        return kinds, image.cluster_size
    return subcluster_kinds(entries, bitmaps), image.subcluster_size


def _runs(kinds: "npt.NDArray[np.uint8]", start: int, end: int, unit: int) -> Kinds:
    """Return the extents from ``start`` to ``end``; ``kinds`` are of ``unit``
    bytes each, the first one of those with ``start``."""
    import numpy as np

    starts = np.flatnonzero(np.concatenate(([True], kinds[1:] != kinds[:-1])))
    bounds = np.empty(len(starts) + 1, np.uint64)
    bounds[:-1] = starts
    bounds *= np.uint64(unit)
    bounds += np.uint64(start - start % unit)
    bounds[0], bounds[-1] = start, end
    return Kinds(bounds[1:] - bounds[:-1], kinds[starts])


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


def uniform_kinds(
    entries: "npt.NDArray[np.uint64]", bitmaps: "npt.NDArray[np.uint64]"
) -> "npt.NDArray[np.uint8] | None":
    """Return the run kind of each cluster with an extended L2 entry; None if
    the subclusters of some cluster differ.

    Raises `CorruptImage` for an entry that can't be right.
    """
    import numpy as np

    placed = (entries & np.uint64(OFFSET_MASK)) != 0
    compressed = (entries & np.uint64(OFLAG_COMPRESSED)) != 0
    allocated = bitmaps & np.uint64(ALL_ALLOCATED)
    zero = bitmaps >> np.uint64(NB_SUBCLUSTERS)
    unsound = ((allocated & zero) != 0) | ((allocated != 0) & ~placed)
    if (unsound & ~compressed).any():
        index = int(np.flatnonzero(unsound & ~compressed)[0])
        raise CorruptImage(
            f"Invalid subcluster bitmap {int(bitmaps[index]):#x} (L2 entry"
            f" {int(entries[index]):#x})"
        )
    all_zero = bitmaps == np.uint64(ALL_ZERO)
    all_data = bitmaps == np.uint64(ALL_ALLOCATED)
    if not (all_zero | all_data | compressed | (bitmaps == 0)).all():
        return None
    kinds = np.where(all_data, DATA, UNALLOCATED)
    kinds = np.where(all_zero, np.where(placed, ZERO_ALLOCATED, ZERO), kinds)
    return np.where(compressed, COMPRESSED, kinds).astype(np.uint8)


def subcluster_kinds(
    entries: "npt.NDArray[np.uint64]", bitmaps: "npt.NDArray[np.uint64]"
) -> "npt.NDArray[np.uint8]":
    """Return the run kind of each subcluster; the entries are sound."""
    import numpy as np

    placed = ((entries & np.uint64(OFFSET_MASK)) != 0)[:, None]
    compressed = ((entries & np.uint64(OFLAG_COMPRESSED)) != 0)[:, None]
    octets = bitmaps.astype("<u8").view(np.uint8).reshape(-1, 8)
    bits = np.unpackbits(octets, axis=1, bitorder="little").astype(np.bool_)
    allocated, zero = bits[:, :NB_SUBCLUSTERS], bits[:, NB_SUBCLUSTERS:]
    kinds = np.where(allocated, np.uint8(DATA), np.uint8(UNALLOCATED))
    zero_kinds = np.where(placed, np.uint8(ZERO_ALLOCATED), np.uint8(ZERO))
    kinds = np.where(zero, zero_kinds, kinds)
    return np.where(compressed, np.uint8(COMPRESSED), kinds).reshape(-1)

"""The kinds of many clusters at once, by numpy."""

import asyncio
from typing import TYPE_CHECKING, Final

from nbdqcow.block.status import Kinds
from nbdqcow.errors import CorruptImage
from nbdqcow.formats.qcow1.header import COMPRESSED as FLAG_COMPRESSED
from nbdqcow.types import COMPRESSED, DATA, UNALLOCATED

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nbdqcow.formats.qcow1.driver import Qcow1Driver

_SLICES_IN_A_TURN: Final = 64
"""Slices looked at (some 10 us each) before others get a turn on the loop."""


_NB_AT_A_TIME: Final = 1 << 16
"""L1 entries looked at (some 300 us) before others get a turn."""


async def extents(image: "Qcow1Driver", offset: int, length: int, limit: int) -> Kinds:
    """See `FormatDriver.extents`.

    Raises `CorruptImage` for a table that can't be right, if that is the first
    thing to look at; else what comes before it is the answer.
    """
    import numpy as np

    tables, end = image.tables, offset + length
    lengths: list[npt.NDArray[np.uint64]] = []
    kinds: list[npt.NDArray[np.uint8]] = []
    nb_extents = nb_slices = 0
    position = offset
    while position < end and nb_extents <= limit:
        try:
            piece_end = _empty_until(image, position, end)
            if piece_end > position:
                starts = np.zeros(1, np.int64)
                found = np.array([UNALLOCATED], np.uint8)
                if piece_end < end:
                    await asyncio.sleep(0)
            else:
                key = position >> tables.slice_shift
                loaded = tables.try_load(key) or await tables.load(key)
                piece_end = min(end, (key + 1) << tables.slice_shift)
                first = (position >> image.cluster_bits) & (tables.slice_entries - 1)
                last = ((piece_end - 1) >> image.cluster_bits) & (
                    tables.slice_entries - 1
                )
                words = np.frombuffer(loaded.words, np.uint64)[first : last + 1]
                starts, found = _runs(_kinds(words))
                nb_slices += 1
        except CorruptImage:
            if not lengths:
                raise
            break
        bounds = np.empty(len(starts) + 1, np.uint64)
        bounds[:-1] = starts
        bounds *= np.uint64(image.cluster_size)
        bounds += np.uint64(position - position % image.cluster_size)
        bounds[0], bounds[-1] = position, piece_end
        lengths.append(bounds[1:] - bounds[:-1])
        # What goes on where the last piece ended will be one extent with it.
        nb_extents += len(found) - bool(kinds and kinds[-1][-1] == found[0])
        kinds.append(found)
        position = piece_end
        if nb_slices and nb_slices % _SLICES_IN_A_TURN == 0:
            await asyncio.sleep(0)
    all_kinds, all_lengths = np.concatenate(kinds), np.concatenate(lengths)
    starts, joined = _runs(all_kinds)
    return Kinds(np.add.reduceat(all_lengths, starts)[:limit], joined[:limit])


def _empty_until(image: "Qcow1Driver", position: int, end: int) -> int:
    """As `Tables.empty_until`, for a way that may be long."""
    import numpy as np

    tables = image.tables
    first = position >> tables.l1_shift
    last = min((end - 1) >> tables.l1_shift, first + _NB_AT_A_TIME)
    if tables.l1[first]:
        return position
    mapped = np.frombuffer(tables.l1, np.uint64)[first : last + 1] != 0
    nb_empty = int(mapped.argmax())
    nb_empty = nb_empty or len(mapped)
    return min(end, (first + nb_empty) << tables.l1_shift)


def _kinds(words: "npt.NDArray[np.uint64]") -> "npt.NDArray[np.uint8]":
    import numpy as np

    compressed = words >= np.uint64(FLAG_COMPRESSED)
    kinds = np.where(compressed, COMPRESSED, DATA)
    return np.where(words == 0, UNALLOCATED, kinds).astype(np.uint8)


def _runs(
    kinds: "npt.NDArray[np.uint8]",
) -> tuple["npt.NDArray[np.int64]", "npt.NDArray[np.uint8]"]:
    """Return where runs of equal kinds start, and the kind of each."""
    import numpy as np

    starts = np.flatnonzero(np.concatenate(([True], kinds[1:] != kinds[:-1])))
    return starts, kinds[starts]

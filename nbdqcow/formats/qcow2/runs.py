"""Where many clusters are at once, by numpy.

Source: qcow2.txt, "Cluster mapping".
"""

import asyncio
from typing import TYPE_CHECKING

from nbdqcow.formats.qcow2.entries import NB_SUBCLUSTERS, OFFSET_MASK
from nbdqcow.formats.qcow2.extents import MAX_SLICES, kinds_of, load_entries
from nbdqcow.types import COMPRESSED, UNALLOCATED, Run

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.driver import Qcow2Driver


async def runs(image: "Qcow2Driver", offset: int, length: int) -> list[Run]:
    """See `FormatDriver.runs`: those of some megabytes of L2 tables at a time.

    The tables' entries are sound (`Mapping` says where they are not), so a
    cluster with an unaligned offset is left to `Mapping` as well.
    """
    import numpy as np

    tables = image.tables
    empty_end = tables.empty_until(offset, offset + length)
    if empty_end > offset:
        return [(UNALLOCATED, 0, empty_end - offset)]
    words, end = await load_entries(image, offset, offset + length, MAX_SLICES)
    await asyncio.sleep(0)
    kinds, unit = kinds_of(image, words)
    entries = words[::2] if image.header.extended_l2 else words
    hosts = entries & np.uint64(OFFSET_MASK)
    if (hosts & np.uint64(image.cluster_size - 1)).any() or (kinds == COMPRESSED).any():
        return await _one_by_one(image, offset, end)
    if unit < image.cluster_size:
        inside = np.arange(NB_SUBCLUSTERS, dtype=np.uint64) * np.uint64(unit)
        hosts = (hosts[:, None] + inside).reshape(-1)
    placed = np.repeat(
        (entries & np.uint64(OFFSET_MASK)) != 0, len(kinds) // len(entries)
    )
    hosts = np.where(placed, hosts, np.uint64(0))
    steps = np.where(placed, np.uint64(unit), np.uint64(0))
    first = (offset & (image.cluster_size - 1)) // unit
    last = first + -(-(end - offset + offset % unit) // unit)
    kinds, hosts, steps = kinds[first:last], hosts[first:last], steps[first:last]
    differs = (kinds[1:] != kinds[:-1]) | (hosts[1:] != hosts[:-1] + steps[:-1])
    starts = np.flatnonzero(np.concatenate(([True], differs)))
    bounds = np.append(starts, len(kinds)).astype(np.int64) * unit + (
        offset - offset % unit
    )
    bounds[0], bounds[-1] = offset, end
    found_hosts = hosts[starts]
    if placed[first]:
        found_hosts[0] += np.uint64(offset % unit)
    return list(
        zip(
            kinds[starts].tolist(),
            found_hosts.tolist(),
            np.diff(bounds).tolist(),
            strict=True,
        )
    )


async def _one_by_one(image: "Qcow2Driver", offset: int, end: int) -> list[Run]:
    found = []
    while offset < end:
        run = await image.map(offset, end - offset)
        found.append(run)
        offset += run[2]
    return found

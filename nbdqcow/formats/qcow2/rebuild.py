"""New refcount structures, made from nothing but what the tables refer to."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from nbdqcow.block.steps import Flush, Steps, Write
from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow2 import header as h
from nbdqcow.formats.qcow2.entries import MAX_REFTABLE_BYTES
from nbdqcow.formats.qcow2.header import Header
from nbdqcow.formats.qcow2.refcount_codec import pack_refcounts

if TYPE_CHECKING:
    import numpy.typing as npt


_CHUNK: Final = 1 << 20
"""Counts looked at at a time: most of a sparse file's were never touched, and
take no memory until they are copied."""


def rebuild_refcounts(
    header: Header,
    counts: "npt.NDArray[np.uint32]",
    first: int,
    free: "npt.NDArray[np.int64] | None" = None,
) -> Steps[int]:
    """Write a refcount table and blocks for ``counts``.

    ``counts`` has the references to each cluster, without those to refcount
    structures. The new structures go behind all that is in use, the old ones
    included, that is from cluster ``first`` on; into a file that can't grow,
    to some of the clusters ``free``, ascending, which nothing uses. The old
    structures stay in place until the header names the new ones, in one write;
    their clusters are free then. Changes ``header``; returns the offset of the
    new structures' end. Raises `ImageError`; and `OSError`, with ``header``
    unchanged if that happened before the old structures were given up.
    """
    limit = (1 << header.refcount_bits) - 1
    if int(counts.max()) > limit:
        raise ImageError(
            f"A cluster has more references than fit a refcount of "
            f"{header.refcount_bits} bits"
        )
    per_block = header.cluster_size * 8 // header.refcount_bits
    blocks = _used_blocks(counts[:first], per_block)
    layout = _lay_out(header, blocks, first, per_block, free)
    new = layout.clusters()
    table = np.zeros(layout.table_clusters * header.cluster_size // 8, ">u8")
    for index, cluster in sorted(layout.blocks.items()):
        start = index * per_block
        values = np.zeros(per_block, np.uint64)
        part = counts[start : min(start + per_block, first)]
        values[: len(part)] = part
        low, high = np.searchsorted(new, (start, start + per_block))
        values[new[low:high] - start] = 1
        offset = cluster << header.cluster_bits
        yield Write(offset, pack_refcounts(values, header.refcount_order))
        table[index] = offset
    yield Write(layout.table << header.cluster_bits, table.tobytes())
    yield Flush()
    header.refcount_table_offset = layout.table << header.cluster_bits
    header.refcount_table_clusters = layout.table_clusters
    # The width of a refcount is in the same sector.
    start = h.REFTABLE_FIELDS_OFFSET
    end = start + 12 if header.version < 3 else h.REFCOUNT_ORDER_OFFSET + 4
    yield Write(start, header.pack_fields()[start:end])
    yield Flush()
    return (int(new[-1]) + 1) << header.cluster_bits


def _used_blocks(counts: "npt.NDArray[np.uint32]", per_block: int) -> set[int]:
    """Return the indices of the blocks that have a count other than 0."""
    blocks: set[int] = set()
    step = max(_CHUNK // per_block, 1) * per_block
    for start in range(0, len(counts), step):
        used = np.flatnonzero(counts[start : start + step])
        blocks.update(((used + start) // per_block).tolist())
    return blocks


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where new structures go, by cluster.

    Attributes:
        table: the refcount table's first cluster.
        blocks: of each refcount block, by its index in the table.
    """

    table: int
    table_clusters: int
    blocks: dict[int, int]

    def clusters(self) -> "npt.NDArray[np.int64]":
        """Return all of these, ascending."""
        table = range(self.table, self.table + self.table_clusters)
        return np.sort(np.array([*table, *self.blocks.values()], np.int64))


def _lay_out(
    header: Header,
    blocks: set[int],
    first: int,
    per_block: int,
    free: "npt.NDArray[np.int64] | None",
) -> _Layout:
    """Find places for ``blocks``, and for those that the new structures need
    for themselves."""
    table_clusters = 1
    while True:
        if table_clusters * header.cluster_size > MAX_REFTABLE_BYTES:
            raise ImageError("The file is too long for a refcount table")
        if free is None:
            table = first + len(blocks)
            places = list(range(first, table))
        else:
            table, places = choose_clusters(free, table_clusters, len(blocks))
        clusters = (*range(table, table + table_clusters), *places)
        needed = blocks | {cluster // per_block for cluster in clusters}
        wanted = -(-(max(needed) + 1) * 8 // header.cluster_size)
        if needed == blocks and wanted <= table_clusters:
            return _Layout(
                table,
                table_clusters,
                dict(zip(sorted(blocks), places, strict=True)),
            )
        blocks = needed
        table_clusters = max(wanted, table_clusters)


def choose_clusters(
    free: "npt.NDArray[np.int64]", table_clusters: int, nb_blocks: int
) -> tuple[int, list[int]]:
    """Choose adjacent clusters for the table, and others for the blocks.

    ``free``: the indices of free clusters, int64, ascending. Returns the index of the
    table's first cluster, and those of the blocks. Raises `ImageError` if there is no
    room.
    """
    runs: npt.NDArray[np.int64] = np.zeros(0, np.int64)
    if len(free) >= table_clusters + nb_blocks:
        spans = free[table_clusters - 1 :] - free[: len(free) - table_clusters + 1]
        runs = np.flatnonzero(spans == table_clusters - 1)
    if not len(runs):
        raise ImageError("There is no room for new refcount structures")
    start = int(runs[0])
    others = np.concatenate((free[:start], free[start + table_clusters :]))
    return int(free[start]), others[:nb_blocks].tolist()

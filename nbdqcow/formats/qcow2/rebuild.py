"""New refcount structures, made from nothing but what the tables refer to."""

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
    header: Header, counts: "npt.NDArray[np.uint32]", first: int
) -> Steps[None]:
    """Write a refcount table and blocks for ``counts`` from cluster ``first`` on.

    ``counts`` has the references to each cluster, without those to refcount
    structures; ``first`` lies behind all that is in use, the old structures
    included. The old structures stay in place until the header names the new
    ones, in one write; their clusters are free then. Changes ``header``. Raises
    `ImageError`.
    """
    limit = (1 << header.refcount_bits) - 1
    if int(counts.max()) > limit:
        raise ImageError(
            f"A cluster has more references than fit a refcount of "
            f"{header.refcount_bits} bits"
        )
    per_block = header.cluster_size * 8 // header.refcount_bits
    blocks = _used_blocks(counts[:first], per_block)
    table_clusters, end = _lay_out(header, blocks, first, per_block)
    table = np.zeros(table_clusters * header.cluster_size // 8, ">u8")
    offset = (first + table_clusters) << header.cluster_bits
    for index in sorted(blocks):
        start = index * per_block
        values = np.zeros(per_block, np.uint64)
        part = counts[start : min(start + per_block, first)]
        values[: len(part)] = part
        # The new structures themselves.
        values[max(0, first - start) : max(0, end - start)] = 1
        yield Write(offset, pack_refcounts(values, header.refcount_order))
        table[index] = offset
        offset += header.cluster_size
    header.refcount_table_offset = first << header.cluster_bits
    header.refcount_table_clusters = table_clusters
    yield Write(header.refcount_table_offset, table.tobytes())
    yield Flush()
    # The width of a refcount is in the same sector.
    start = h.REFTABLE_FIELDS_OFFSET
    end = start + 12 if header.version < 3 else h.REFCOUNT_ORDER_OFFSET + 4
    yield Write(start, header.pack_fields()[start:end])
    yield Flush()


def _used_blocks(counts: "npt.NDArray[np.uint32]", per_block: int) -> set[int]:
    """Return the indices of the blocks that have a count other than 0."""
    blocks: set[int] = set()
    step = max(_CHUNK // per_block, 1) * per_block
    for start in range(0, len(counts), step):
        used = np.flatnonzero(counts[start : start + step])
        blocks.update(((used + start) // per_block).tolist())
    return blocks


def _lay_out(
    header: Header, blocks: set[int], first: int, per_block: int
) -> tuple[int, int]:
    """Add the blocks that the new structures need for themselves.

    They begin at cluster ``first``. Returns the clusters of the table and the
    first cluster behind all.
    """
    table_clusters = 1
    while True:
        end = first + table_clusters + len(blocks)
        for cluster in range(first // per_block, (end - 1) // per_block + 1):
            blocks.add(cluster)
        wanted = -(-(max(blocks) + 1) * 8 // header.cluster_size)
        if wanted == table_clusters and end == first + table_clusters + len(blocks):
            break
        table_clusters = max(wanted, table_clusters)
    if table_clusters * header.cluster_size > MAX_REFTABLE_BYTES:
        raise ImageError("The file is too long for a refcount table")
    return table_clusters, end

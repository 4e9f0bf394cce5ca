"""New refcount structures, made from nothing but what the tables refer to."""

from typing import TYPE_CHECKING

import numpy as np

from nbdqcow.block.steps import Flush, Steps, Write
from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow2 import header as h
from nbdqcow.formats.qcow2.entries import MAX_REFTABLE_BYTES
from nbdqcow.formats.qcow2.header import Header
from nbdqcow.formats.qcow2.refcount_codec import pack_refcounts

if TYPE_CHECKING:
    import numpy.typing as npt


def rebuild_refcounts(
    header: Header, counts: "npt.NDArray[np.uint32]", first: int
) -> Steps["npt.NDArray[np.uint32]"]:
    """Write a refcount table and blocks for ``counts`` from cluster ``first`` on.

    ``counts`` has the references to each cluster, without those to refcount
    structures; ``first`` lies behind all that is in use, the old structures
    included. The old structures stay in place until the header names the new
    ones, in one write; their clusters are free then. Changes ``header`` and
    returns the counts with the new structures in them. Raises `ImageError`.
    """
    limit = (1 << header.refcount_bits) - 1
    if int(counts.max()) > limit:
        raise ImageError(
            f"A cluster has more references than fit a refcount of "
            f"{header.refcount_bits} bits"
        )
    per_block = header.cluster_size * 8 // header.refcount_bits
    counts = counts[:first]
    used = np.add.reduceat(counts != 0, np.arange(0, first, per_block), dtype=np.int64)
    blocks = {int(index) for index in np.flatnonzero(used)}
    table_clusters, end = _lay_out(header, blocks, first, per_block)
    whole = np.zeros(end, np.uint32)
    whole[:first] = counts
    whole[first:] = 1
    table = np.zeros(table_clusters * header.cluster_size // 8, ">u8")
    offset = (first + table_clusters) << header.cluster_bits
    for index in sorted(blocks):
        values = np.zeros(per_block, np.uint64)
        part = whole[index * per_block : (index + 1) * per_block]
        values[: len(part)] = part
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
    return whole


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

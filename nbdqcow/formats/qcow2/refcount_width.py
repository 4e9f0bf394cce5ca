"""Refcounts of another width: all of them are written anew, and the header
names them and their width in one write.

Source: qcow2.txt, "Host cluster management".
"""

import asyncio
import errno
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from nbdqcow.block.steps import run_steps
from nbdqcow.block.tools import Progress
from nbdqcow.errors import BlockError, CorruptImage, ImageError
from nbdqcow.formats.qcow2.entries import REFTABLE_OFFSET_MASK
from nbdqcow.formats.qcow2.rebuild import rebuild_refcounts
from nbdqcow.formats.qcow2.refcount_codec import unpack_refcounts
from nbdqcow.formats.words import load_be64

if TYPE_CHECKING:
    import numpy.typing as npt

    from nbdqcow.formats.qcow2.driver import Qcow2Driver

_MAX_CLUSTERS: Final = 1 << 28
"""Of a file whose refcounts are read at once: 16 TiB with clusters of 64 KiB."""


async def change_refcount_width(
    image: "Qcow2Driver", order: int, progress: Progress
) -> None:
    """Give all refcounts ``1 << order`` bits. The image is `alone`.

    Raises `BlockError` if one does not fit, `CorruptImage` for a block that can't
    be.
    """
    header, bits = image.header, image.cluster_bits
    nb_clusters = max(
        await image.refcounts.nb_clusters(), -(-image.storage.length >> bits)
    )
    if nb_clusters > _MAX_CLUSTERS:
        raise BlockError(errno.EFBIG, "the file has too many clusters")
    counts = await _read_counts(image, nb_clusters, progress)
    limit = (1 << (1 << order)) - 1
    if limit < 1 << 32 and (counts > limit).any():
        index = int(np.flatnonzero(counts > limit)[0])
        raise BlockError(
            errno.EINVAL,
            f"Cannot decrease refcount entry width to {1 << order} bits: Cluster at"
            f" offset {index << bits:#x} has a refcount of {int(counts[index])}",
        )
    old = _structures(image)
    if max(old) >= nb_clusters:
        raise CorruptImage(
            f"refcount block at {max(old) << bits:#x} is past the file's end"
        )
    counts[list(old)] = 0
    new_header = replace(header, refcount_order=order)
    try:
        await run_steps(
            rebuild_refcounts(new_header, counts, nb_clusters), image.storage
        )
        offset = new_header.refcount_table_offset
        length = new_header.refcount_table_clusters << bits
        table = load_be64(await image.storage.pread(offset, length))
    except ImageError as error:
        raise BlockError(errno.EFBIG, str(error)) from None
    except BaseException:
        if new_header.refcount_table_offset != header.refcount_table_offset:
            # Which refcounts are valid nobody knows now, or what they are.
            image.fail()
        raise
    finally:
        # Also where some of the new ones are, and nothing names them.
        image.note_used(image.storage.length)
    header.refcount_order = order
    header.refcount_table_offset = new_header.refcount_table_offset
    header.refcount_table_clusters = new_header.refcount_table_clusters
    image.refcounts.reload(table)
    image.metadata.difference_update(old)
    image.metadata.update(_structures(image))
    progress(nb_clusters, nb_clusters)


async def _read_counts(
    image: "Qcow2Driver", nb_clusters: int, progress: Progress
) -> "npt.NDArray[np.uint32]":
    counts = np.zeros(nb_clusters, np.uint32)
    refcounts = image.refcounts
    nb_entries = refcounts.block_entries
    for index, entry in enumerate(refcounts.table):
        if not entry or index * nb_entries >= nb_clusters:
            continue
        data = await image.storage.pread(
            entry & REFTABLE_OFFSET_MASK, image.cluster_size
        )
        part = counts[index * nb_entries : (index + 1) * nb_entries]
        values = unpack_refcounts(data, refcounts.order)[: len(part)]
        if int(values.max(initial=0)) >> 32:
            raise BlockError(errno.EFBIG, "a refcount has more than 32 bits")
        part[:] = values
        progress(index * nb_entries, nb_clusters)
        await asyncio.sleep(0)
    return counts


def _structures(image: "Qcow2Driver") -> set[int]:
    """Return the clusters of the refcount table and its blocks."""
    header, bits = image.header, image.cluster_bits
    first = header.refcount_table_offset >> bits
    clusters = {entry >> bits for entry in image.refcounts.table if entry}
    clusters.update(range(first, first + header.refcount_table_clusters))
    return clusters

"""Deletion of a snapshot where there is no room for a new generation.

When the disk is full, snapshots are what one deletes. Nothing of this needs room,
but for the table of the snapshots that stay unless the last of them goes, and each
step leaves leaked clusters at worst:

1. The header names a table without the snapshot. What it had is leaked now.
2. Clusters that the active tables don't name lose its reference, as after a
   guest's discard. Those that nobody else has go back to the file system.
3. The rest is shared with the active tables, where the COPIED flags must change
   in the same moment as the counts. There may be room for that generation now.
   If not, these clusters stay leaked: a repair finds them.
"""

import errno
import logging
from array import array
from typing import TYPE_CHECKING, Final

import numpy as np

from nbdqcow.formats.qcow2.entries import OFFSET_MASK, OFLAG_COMPRESSED
from nbdqcow.formats.qcow2.generation import Entries, Generation, alone, clusters_of
from nbdqcow.formats.qcow2.header import SNAPSHOT_FIELDS_OFFSET
from nbdqcow.formats.qcow2.new_counts import runs
from nbdqcow.formats.qcow2.writeback import Freed

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.driver import Qcow2Driver
    from nbdqcow.formats.qcow2.snapshot_table import Snapshot

NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a write is refused with where others may be possible."""

log = logging.getLogger(__name__)


class Release:
    """One snapshot whose references go away step by step.

    Call `read` and `forget` under `alone`, `finish` without it.
    """

    def __init__(
        self, image: "Qcow2Driver", snapshot: "Snapshot", l1: "array[int]"
    ) -> None:
        """``l1`` is the snapshot's L1 table."""
        self._image = image
        self._snapshot = snapshot
        self._l1 = l1
        self._own = Freed(image.settings.discard_snapshot)
        # Of L2 tables with entries that the active tables have, too: by L1 index,
        # which ones, in packed bits; and where the tables are.
        self._shared: dict[int, bytes] = {}
        self._shared_l1 = array("Q", bytes(len(l1) * 8))

    async def read(self) -> None:
        """Find out what is shared with the active tables. Nothing is changed."""
        image, active_l1 = self._image, self._image.tables.l1
        generation = Generation(image)
        async for indices, tables in generation.read_tables(self._l1):
            for index, table in zip(indices, tables, strict=True):
                entries = generation.entries(table)
                offset = self._l1[index] & OFFSET_MASK
                active = active_l1[index] & OFFSET_MASK if index < len(active_l1) else 0
                if active == offset:
                    shared = np.ones(len(entries), np.bool_)
                elif active:
                    others = generation.entries(await generation.read_table(active))
                    shared = _same_cluster(entries, others)
                else:
                    shared = np.zeros(len(entries), np.bool_)
                self._free(generation.referenced(entries[~shared]))
                if shared.any():
                    self._shared[index] = np.packbits(shared).tobytes()
                    self._shared_l1[index] = self._l1[index]
                else:
                    self._own.add(offset >> image.cluster_bits, 1, False)
        self._free_range(self._snapshot.l1_table_offset, len(self._l1) * 8)

    def _free(self, clusters: Entries) -> None:
        """Each cluster loses as many references as it is listed for."""
        once, times = np.unique(clusters, return_counts=True)
        while len(once):
            for first, nb_clusters in runs(once):
                self._own.add(first, nb_clusters, False)
            times -= 1
            once, times = once[times > 0], times[times > 0]

    def _free_range(self, offset: int, length: int) -> None:
        if length:
            clusters = clusters_of(offset, length, self._image.cluster_bits)
            self._own.add(*clusters, False)

    async def forget(
        self, table: bytes | None, nb_snapshots: int, old_table_length: int
    ) -> None:
        """Delete the snapshot; what it had is leaked until `finish` has run.

        ``table``: that of the other snapshots; None if the old one does.
        Raises `OSError`: there is no room for the table, say.
        """
        image, header = self._image, self._image.header
        generation = Generation(image)
        if table is not None:
            try:
                await generation.take_snapshot_table(len(table))
                await generation.write_snapshot_table(table, nb_snapshots)
                if table:
                    await image.writeback.commit_alone()
            except BaseException:
                await generation.abandon()
                raise
        offset = generation.snapshots_offset
        fields = nb_snapshots.to_bytes(4, "big") + offset.to_bytes(8, "big")
        try:
            image.storage.announce("l1_update")
            await image.storage.pwritev(SNAPSHOT_FIELDS_OFFSET, [fields])
            await image.storage.flush()
        except BaseException as error:
            # There may be no room for what is overwritten, either: file systems that
            # copy on write. Else whether there is the snapshot nobody knows now.
            if table or getattr(error, "errno", None) not in NO_ROOM:
                image.fail()
            raise
        if table is not None:
            self._free_range(header.snapshots_offset, old_table_length)
        header.nb_snapshots, header.snapshots_offset = nb_snapshots, offset

    async def finish(self) -> None:
        """Free what the snapshot had. It is deleted already: what fails is logged."""
        image = self._image
        try:
            # What can't be given back is tried again with a later commit.
            await image.writeback.drop(self._own)
            if self._shared:
                await self._drop_shared()
        except OSError as error:
            log.warning(
                "%s: snapshot '%s' is deleted, but not all that it had could be "
                "freed (%s): 'check -r all' does, with more room",
                image.storage.filename,
                self._snapshot.info.name,
                error.strerror,
            )

    async def _drop_shared(self) -> None:
        image = self._image
        async with alone(image):
            old_l1 = image.tables.l1
            generation = Generation(image)
            try:
                await generation.reserve(
                    nb_l2_tables=len(self._shared),
                    nb_l1_entries=len(old_l1),
                    snapshots_length=None,
                )
                await generation.drop(self._shared_l1, self._shared)
                await generation.set_flags(self._shared)
            except BaseException:
                await generation.abandon()
                raise
            generation.replaces(image.header.l1_table_offset, len(old_l1) * 8)
            await generation.switch()


def _same_cluster(
    entries: Entries, others: Entries
) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """Return where both have the same host cluster, whole and not compressed."""
    mask = np.uint64(OFFSET_MASK)
    compressed = (entries | others) & np.uint64(OFLAG_COMPRESSED)
    offsets = entries & mask
    same: np.ndarray[tuple[int], np.dtype[np.bool_]] = (
        (offsets == others & mask) & (offsets != 0) & (compressed == 0)
    )
    return same

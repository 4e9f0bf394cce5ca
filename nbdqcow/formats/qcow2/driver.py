"""The qcow2 driver: one open image, its parts and its life."""

import asyncio
import errno
import logging
from array import array
from collections.abc import AsyncIterator, Sequence
from collections.abc import Mapping as Options
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self

from nbdqcow.block.driver import WritePlan
from nbdqcow.block.inflight import Epochs, Writers
from nbdqcow.block.status import Kinds
from nbdqcow.block.storage import BlockingSource, StorageDriver
from nbdqcow.errors import BlockError, CorruptImage, NotSupported
from nbdqcow.formats.qcow2 import (
    compressed_write,
    discard,
    encryption,
    extents,
    opening,
    overlap,
    write,
    write_extended,
)
from nbdqcow.formats.qcow2 import data_file as qcow2_data_file
from nbdqcow.formats.qcow2 import header as qcow2_header
from nbdqcow.formats.qcow2.bitmap import Bitmaps
from nbdqcow.formats.qcow2.compress import CompressedClusters
from nbdqcow.formats.qcow2.header import Header
from nbdqcow.formats.qcow2.mapping import Mapping
from nbdqcow.formats.qcow2.mapping_extended import ExtendedMapping
from nbdqcow.formats.qcow2.memory_bitmap import Bitmap
from nbdqcow.formats.qcow2.operations import Operations
from nbdqcow.formats.qcow2.refcount import Refcounts
from nbdqcow.formats.qcow2.settings import Settings
from nbdqcow.formats.qcow2.tables import Tables
from nbdqcow.formats.qcow2.write_inline import ExtendedInlineWriter, InlineWriter
from nbdqcow.formats.qcow2.writeback import Freed, Writeback
from nbdqcow.formats.tasks import ImageTasks
from nbdqcow.types import Buffer, Run
from nbdqcow.units import MiB, round_up

if TYPE_CHECKING:
    from nbdqcow.crypto.secrets import Secret

log = logging.getLogger(__name__)

_MANY_CLUSTERS: Final = 1 << 14
"""From so many on it pays to load numpy, which takes 50 ms."""
_MARKED_BITS: Final = 1 << 25
"""Of a bitmap that are set before others get a turn at the event loop."""
_MAX_FREED_BYTES: Final = 256 * MiB
"""Freed space that may wait for a write-back before one is started for it."""


class Qcow2Driver(Operations):
    """One open qcow2 image.

    Attributes:
        tables, refcounts, mapping, writeback: the parts, see their modules.
        secret: the passphrase that the image was opened with.
        writers: the guest's writes; in_flight: its ranges of allocations that
            are not linked yet.
        header_lock: held while marks in the header change, or all of it is written;
            taken last of all locks.
        freed: clusters that lost a reference since the last write-back.
        metadata: indices of host clusters that hold metadata.
        reads_zero_from: nothing at or after this host offset was ever
            written, so it reads as zeroes.
        file_end: where the file is to end at least when the image is closed.
        settings: the options that it was opened with.
        discard_freed: a guest's discard gives space back to the file system.
        lazy_refcounts: refcounts reach the disk when the image is closed; until
            then it is marked as dirty.
        snapshot_metadata: what clusters of snapshots' tables were when the image
            was opened, in the words of the option ``overlap-check``.
        tasks: operations and background work that run.
        operating: held by an operation while it runs.
        shows_old_disk: the header in memory describes a snapshot's disk.
        trim_wanted: once no freed cluster waits, the file's end is cut off.
    """

    name = "qcow2"
    subcluster_size = 0
    shows_snapshots = True

    def __init__(
        self,
        storage: StorageDriver,
        header: Header,
        l1: "array[int]",
        *,
        read_only: bool,
        settings: Settings,
        data: StorageDriver | None = None,
        data_file: StorageDriver | None = None,
    ) -> None:
        """``data`` is where guest data is read and written, if not in
        ``storage`` or ``data_file`` as they stand."""
        self.storage = storage
        self.data_file = data_file
        self.data = data or data_file or storage
        self.header = header
        self.read_only = read_only
        self.size = header.size
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.subcluster_size = header.subcluster_size
        self.backing_filename = header.backing_filename
        self.backing_format = header.backing_format
        self.settings = settings
        self.discard_freed = settings.discard_request
        self.lazy_refcounts = settings.lazy_refcounts
        self.lock = asyncio.Lock()
        self.keys_lock = asyncio.Lock()
        self.header_lock = asyncio.Lock()
        self.secret: Secret | bytes | None = None
        self.epochs = Epochs()
        self.writers = Writers(self.epochs)
        self.in_flight = self.writers.allocating
        self.freed = Freed(settings.discard_other)
        self.metadata: set[int] = set()
        self.snapshot_metadata: dict[int, str] = {}
        self.tables = Tables(
            storage, l1, header.l1_table_offset, header.cluster_bits,
            settings.l2_cache_bytes, header.l2_entry_size // 8,
        )  # fmt: skip
        self.refcounts = Refcounts(
            storage,
            header,
            array("Q"),
            self.metadata,
            settings.refcount_cache_bytes,
        )
        self.refcounts.note_used = self.note_used
        self.refcounts.put_off = self._free_later
        self.compressed = CompressedClusters(self, settings.compressed_cache_bytes)
        self.writeback = Writeback(self)
        end = round_up(storage.length, self.cluster_size)
        # A data file may hold anything where nothing is mapped.
        known = self.data is storage and storage.zero_beyond_end
        self.reads_zero_from = end if known else 1 << 63
        self.file_end = 0
        self.bitmaps = Bitmaps(self)
        self._tracked: Sequence[Bitmap] = ()
        self.rebind()
        self.tasks = ImageTasks(storage.filename)
        self.operating = asyncio.Lock()
        self.trim_wanted = False
        self.failed = False
        self.shows_old_disk = False
        self._prepared = False

    def rebind(self) -> None:
        """Choose the methods that fit the image's version and features."""
        header = self.header
        self.mapping = Mapping(
            self.tables,
            self.metadata,
            True,
            self.check_not_metadata,
            version2=header.version < 3,
        )
        self.try_plan = write.try_plan
        inline_writer = InlineWriter
        if header.extended_l2:
            self.mapping = ExtendedMapping(
                self.tables, self.metadata, self.check_not_metadata
            )
            self.try_plan = write_extended.try_plan
            inline_writer = ExtendedInlineWriter
        if not (header.has_data_file or header.crypt_method == qcow2_header.CRYPT_AES):
            # Not ``self``'s: that may be another one's already.
            begin_any = partial(type(self).try_begin_write, self)
            self.try_begin_write = inline_writer(self, begin_any).try_begin_write  # type: ignore[method-assign]
        self.try_map = self.mapping.try_map  # type: ignore[method-assign]
        # Whatever took its place when this was done before.
        self.map = partial(type(self).map, self)  # type: ignore[method-assign]
        self.try_map_write = self.mapping.try_map_write  # type: ignore[method-assign]
        if header.has_data_file:
            qcow2_data_file.attach(self)
        elif header.crypt_method == qcow2_header.CRYPT_AES:
            encryption.number_by_guest_offset(self)
        self._try_map_untracked_write = self.try_map_write
        self.track(self._tracked)

    # -- opening ---------------------------------------------------------

    @classmethod
    async def open(
        cls, storage: StorageDriver, *, read_only: bool, options: Options[str, Any]
    ) -> Self:
        """Open the image in ``storage``.

        Options, besides those that `Settings` knows: ``snapshot``, the ID or name of an
        internal snapshot to show instead of the disk (``(id, name)``, either
        of them None, for one that must match both), read-only; ``secret``, the
        passphrase of an encrypted image (`nbdqcow.crypto.secrets.Secret` or
        bytes); ``open_data_file``, a coroutine function that opens the external
        data file, given its name in the image, or None. Raises `ImageError`.
        """
        return await opening.open_driver(cls, storage, read_only, options)

    async def prepare_for_writing(self) -> None:
        """Load what only writers need, unless it was. Raises `ImageError`."""
        if not self._prepared:
            await opening.prepare_for_writing(self)
            self._prepared = True

    async def drop_unused(self, interval: int) -> None:
        """Give up cached tables that nobody used for ``interval`` seconds."""
        while True:
            await asyncio.sleep(interval)
            self.tables.turn()
            self.refcounts.turn()

    # -- reading ---------------------------------------------------------

    def try_map(self, offset: int, length: int) -> Run | None:
        """See `FormatDriver.try_map`; `Mapping.try_map` takes its place."""
        return self.mapping.try_map(offset, length)

    async def map(self, offset: int, length: int) -> Run:
        """See `FormatDriver.map`."""
        try:
            return await self.mapping.map(offset, length)
        except CorruptImage as error:
            await self.mark_corrupt(str(error))
            raise

    async def read_compressed(self, descriptor: int) -> Buffer:
        """See `FormatDriver.read_compressed`."""
        return await self.compressed.read(descriptor, 0, self.cluster_size)

    def try_read_compressed(
        self, descriptor: int, start: int, length: int
    ) -> Buffer | None:
        """See `FormatDriver.try_read_compressed`."""
        return self.compressed.try_read(descriptor, start, length)

    async def read_compressed_part(
        self, descriptor: int, start: int, length: int
    ) -> Buffer:
        """See `FormatDriver.read_compressed_part`."""
        return await self.compressed.read(descriptor, start, length)

    async def runs(self, offset: int, length: int) -> list[Run]:
        """See `FormatDriver.runs`."""
        if length >> self.cluster_bits < _MANY_CLUSTERS:
            return await super().runs(offset, length)
        from nbdqcow.formats.qcow2.runs import runs

        return await runs(self, offset, length)

    def read_compressed_parts(
        self, places: Sequence[tuple[int, int, int]]
    ) -> AsyncIterator[Buffer]:
        """See `FormatDriver.read_compressed_parts`."""
        return self.compressed.read_all(places)

    def compressed_source(self, descriptor: int) -> BlockingSource | None:
        """See `FormatDriver.compressed_source`."""
        return self.compressed.source(descriptor)

    async def extents(self, offset: int, length: int, limit: int) -> Kinds:
        """See `FormatDriver.extents`."""
        try:
            return await extents.extents(self, offset, length, limit)
        except CorruptImage as error:
            await self.mark_corrupt(str(error))
            raise

    # -- writing ---------------------------------------------------------

    def try_begin_write(self, offset: int, length: int) -> WritePlan | None:
        """See `FormatDriver.try_begin_write`; `InlineWriter.try_begin_write`
        takes its place in most images."""
        if self.read_only:
            return None
        try:
            plan = write.try_begin_write(self, offset, length)
        except CorruptImage:
            # The coroutine finds the same, and marks the image.
            return None
        if plan is not None and self.data_file is not None:
            try:
                qcow2_data_file.place_plan(plan)
            except CorruptImage:
                write.cancel_write(self, plan)
                return None
        return None if plan is None else encryption.tag_plan(self.header, plan)

    def try_begin_long_write(self, offset: int, length: int) -> WritePlan | None:
        """See `FormatDriver.try_begin_long_write`: an `InlineWriter`'s plan is
        registered nowhere."""
        return type(self).try_begin_write(self, offset, length)

    async def begin_write(self, offset: int, length: int) -> WritePlan:
        """See `FormatDriver.begin_write`."""
        self.check_writable()
        try:
            plan = await write.begin_write(self, offset, length)
            if self.data_file is not None:
                try:
                    qcow2_data_file.place_plan(plan)
                    qcow2_data_file.check_inside(self, plan)
                except BlockError:
                    write.abort_write(self, plan)
                    raise
        except CorruptImage as error:
            await self.mark_corrupt(str(error))
            raise
        return encryption.tag_plan(self.header, plan)

    def end_write(self, plan: WritePlan) -> None:
        """See `FormatDriver.end_write`."""
        write.end_write(self, plan)
        self.mark_written(plan.guest_offset, plan.length)

    def cancel_write(self, plan: WritePlan) -> None:
        """See `FormatDriver.cancel_write`."""
        write.cancel_write(self, plan)

    def abort_write(self, plan: WritePlan) -> None:
        """See `FormatDriver.abort_write`."""
        write.abort_write(self, plan)
        # A write in place may have come half the way.
        self.mark_written(plan.guest_offset, plan.length)

    @property
    def compressed_at_once(self) -> int:
        """See `FormatDriver.compressed_at_once`."""
        return compressed_write.nb_at_once(self.cluster_size)

    async def write_compressed(
        self, offset: int, data: Buffer, *, store_zeroes: bool = False
    ) -> None:
        """See `FormatDriver.write_compressed`."""
        self.check_writable()
        try:
            await compressed_write.write_compressed(
                self, offset, data, store_zeroes=store_zeroes
            )
        except CorruptImage as error:
            await self.mark_corrupt(str(error))
            raise
        self.mark_written(offset, len(data))

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool
    ) -> None:
        """See `FormatDriver.write_zeroes`."""
        self.check_writable()
        try:
            if self.data_file is not None:
                await qcow2_data_file.write_zeroes(
                    self, offset, length, may_unmap=may_unmap, no_fallback=no_fallback
                )
            else:
                await discard.write_zeroes(self, offset, length, may_unmap=may_unmap)
        except CorruptImage as error:
            await self.mark_corrupt(str(error))
            raise

    async def claim_zero(self, offset: int, backing_zero: bool) -> bool:
        """See `FormatDriver.claim_zero`."""
        self.check_writable()
        try:
            return await discard.claim_zero(self, offset, backing_zero)
        except CorruptImage as error:
            await self.mark_corrupt(str(error))
            raise

    async def discard(self, offset: int, length: int) -> None:
        """See `FormatDriver.discard`."""
        self.check_writable()
        try:
            if self.data_file is not None:
                await qcow2_data_file.discard(self, offset, length)
            else:
                await discard.discard(self, offset, length)
        except CorruptImage as error:
            await self.mark_corrupt(str(error))
            raise

    async def note_request(self, offset: int, length: int) -> None:
        """See `FormatDriver.note_request`."""
        if not self._tracked:
            return
        step = _MARKED_BITS << min(b.granularity_bits for b in self._tracked)
        if length <= step:
            self.mark_written(offset, length)
        else:
            await self.tasks.run_to_end(self._mark_in_turns(offset, length, step))

    async def _mark_in_turns(self, offset: int, length: int, step: int) -> None:
        for start in range(0, length, step):
            self.mark_written(offset + start, min(step, length - start))
            await asyncio.sleep(0)

    def mark_written(self, offset: int, length: int) -> None:
        """Mark a range, at least a byte, in all bitmaps that are enabled. Whoever
        changes what the disk holds does so in the same turn of the loop, or while
        those wait who bring bitmaps to disk."""
        for bitmap in self._tracked:
            bitmap.mark(offset, length)

    async def reopen(self, *, read_only: bool) -> None:
        """See `FormatDriver.reopen`."""
        from nbdqcow.formats.qcow2 import reopen

        await (reopen.stop_writing if read_only else reopen.start_writing)(self)

    def set_read_only(self, read_only: bool) -> None:
        """Let no write begin from now on, or let them begin again."""
        self.read_only = read_only
        self.mapping.freeze(read_only)
        if not read_only:
            self.bitmaps.track_enabled()

    def check_writable(self) -> None:
        """Refuse changes to an image that takes none. Raises `BlockError`."""
        if self.read_only:
            raise BlockError(
                errno.EIO if self.header.corrupt else errno.EROFS,
                "the image is marked corrupt" if self.header.corrupt
                else "the image is read-only",
            )  # fmt: skip

    async def mark_corrupt(self, text: str) -> None:
        """Metadata can't be right: stop writing before more is lost.

        Source: qcow2.txt, "Corrupt bit".
        """
        if self.header.corrupt or self.read_only:
            return
        shown = (
            f"qcow2: Marking image as corrupt: {text}; further corruption events will"
            " be suppressed"
        )
        log.error("%s: %s", self.storage.filename, shown, extra={"shown": shown})
        self.read_only = True
        self.mapping.freeze(True)
        if self.header.version >= 3:
            await self._set_incompatible(qcow2_header.INCOMPAT_CORRUPT, True)
            await self.storage.flush()

    def check_not_metadata(self, cluster_index: int) -> None:
        """Refuse to write guest data to a cluster of metadata."""
        if cluster_index in self.metadata:
            overlap.check(self, cluster_index)

    async def mark_dirty(self) -> None:
        """Refcounts on disk may be wrong from now on. The caller flushes.

        Source: qcow2.txt, "Dirty bit".
        """
        if not self.header.dirty:
            await self._set_incompatible(qcow2_header.INCOMPAT_DIRTY, True)

    async def mark_clean(self) -> None:
        """All refcounts on disk are right, and durable."""
        if self.header.dirty:
            await self._set_incompatible(qcow2_header.INCOMPAT_DIRTY, False)
            await self.storage.flush()

    async def _set_incompatible(self, bit: int, value: bool) -> None:
        async with self.header_lock:
            features = self.header.incompatible_features
            features = features | bit if value else features & ~bit
            await self.storage.pwritev(
                qcow2_header.INCOMPATIBLE_FEATURES_OFFSET, [features.to_bytes(8, "big")]
            )
            self.header.incompatible_features = features

    def fail(self) -> None:
        """A write of the image's roots failed: no more writes, no flushes."""
        log.error("%s: its header could not be written", self.storage.filename)
        self.read_only = self.failed = True
        self.mapping.freeze(True)

    def set_size(self, size: int) -> None:
        """The header on disk has another size of the disk, or the same."""
        if size != self.size:
            # Whatever fails from here on: a bitmap of another size can't be stored.
            self.bitmaps.resize(size)
        self.size = self.header.size = size
        self.when_rebound()

    def note_used(self, host_end: int, *, whole: bool = True) -> None:
        """Clusters below ``host_end`` may hold bytes from now on. Unless ``whole``,
        the last one has a table, of whose cluster nobody reads the rest."""
        self.reads_zero_from = max(self.reads_zero_from, host_end)
        if whole:
            self.file_end = max(self.file_end, host_end)

    # -- dirty bitmaps ---------------------------------------------------

    def track(self, enabled: "Sequence[Bitmap]") -> None:
        """Mark every write from now on in these bitmaps, and in no others."""
        self._tracked = enabled
        if enabled:
            self.try_map_write = self._try_map_tracked_write  # type: ignore[method-assign]
        else:
            self.try_map_write = self._try_map_untracked_write  # type: ignore[method-assign]
        self.when_rebound()

    def _try_map_tracked_write(self, offset: int, length: int) -> int:
        """As `try_map_write`. The write follows in the same turn of the loop,
        so nobody can see the mark before it."""
        host_offset = self._try_map_untracked_write(offset, length)
        if host_offset >= 0:
            for bitmap in self._tracked:
                bitmap.mark(offset, length)
        return host_offset

    # -- durability ------------------------------------------------------

    @property
    def metadata_dirty(self) -> bool:
        """Whether a flush has more to do than to flush guest data."""
        refcounts = self.refcounts
        return bool(self.tables.is_dirty or refcounts.dirty or refcounts.fresh)

    def take_freed(self) -> Freed:
        """Return what was freed so far; the image starts a new list."""
        freed, self.freed = self.freed, Freed(self.settings.discard_other)
        return freed

    def _free_later(self, cluster_index: int, nb_clusters: int) -> None:
        self.freed.add(cluster_index, nb_clusters, False)

    def start_writeback_if_due(self) -> None:
        """Begin a write-back if much freed space waits for one."""
        if self.freed.nb_clusters > max(64, _MAX_FREED_BYTES >> self.cluster_bits):
            self.writeback.start()

    def trim_when_freed(self) -> None:
        """Cut off the file's end once all that was freed is free."""
        self.trim_wanted = True
        self.writeback.start()

    async def flush(self) -> None:
        """See `FormatDriver.flush`."""
        if self.header.corrupt:
            raise BlockError(errno.EIO, "the image is marked corrupt")
        if self.failed:
            raise BlockError(errno.EIO, "the image's header could not be written")
        await self.writeback.flush()

    async def close(self) -> None:
        """See `FormatDriver.close`."""
        self.tasks.cancel_until_close()
        try:
            if not self.read_only:
                await self.tasks.settle()
                try:
                    await self.bitmaps.store()
                finally:
                    await self.writeback.finish()
                    await self._complete_file()
            await self.tasks.settle()
        finally:
            await self.compressed.close()

    async def _complete_file(self) -> None:
        """Let the file have all of its last cluster: zeroes at the end of what was
        written were left out, and other programs read whole clusters, or sectors."""
        if (
            self.data is self.storage
            and self.storage.zero_beyond_end
            and self.storage.length < self.file_end
        ):
            # A part of a file keeps its length.
            with suppress(NotSupported):
                await self.storage.truncate(self.file_end)

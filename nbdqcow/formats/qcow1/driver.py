"""The driver of qcow images, version 1: one open image, its parts and its life."""

import asyncio
import contextlib
import errno
from collections.abc import Mapping as Options
from dataclasses import replace
from typing import Any, Final, Self

from nbdqcow.block.driver import FormatDriver, WritePlan
from nbdqcow.block.inflight import Epochs, Writers
from nbdqcow.block.status import Kinds
from nbdqcow.block.steps import run_steps
from nbdqcow.block.storage import StorageDriver
from nbdqcow.crypto.secrets import check_method
from nbdqcow.errors import BlockError, CorruptImage, NotSupported
from nbdqcow.formats.qcow1 import encryption, extents, write
from nbdqcow.formats.qcow1 import header as qcow1_header
from nbdqcow.formats.qcow1.compress import CompressedClusters
from nbdqcow.formats.qcow1.header import Header, compressed_entry, read_header
from nbdqcow.formats.qcow1.l1_table import L1Words, load_l1
from nbdqcow.formats.qcow1.mapping import Mapping
from nbdqcow.formats.qcow1.tables import Tables
from nbdqcow.formats.qcow1.writeback import Writeback
from nbdqcow.formats.tasks import ImageTasks
from nbdqcow.types import UNALLOCATED, Buffer, Run
from nbdqcow.units import SECTOR_SIZE, MiB, round_up

DEFAULT_L2_CACHE: Final = 32 * MiB
"""Bytes of L2 slices kept by default: enough for 16 GiB of disk in an image
that QEMU made."""


class Qcow1Driver(FormatDriver):
    """One open image.

    Attributes:
        tables, mapping, writeback, compressed: the parts, see their modules.
        writers: the guest's writes; in_flight: its ranges of allocations that
            are not linked yet.
        file_end: where the next cluster goes.
    """

    name = "qcow"
    version: Final = 1

    def __init__(
        self,
        storage: StorageDriver,
        header: Header,
        l1: L1Words,
        *,
        read_only: bool,
        l2_cache_size: int,
        compressed_cache_size: int | None,
        data: StorageDriver | None = None,
    ) -> None:
        """``data`` is where guest data is read and written, if not in
        ``storage`` as it stands."""
        self.storage = storage
        self.data = data or storage
        self.header = header
        self.read_only = read_only
        self.size = header.disk_size
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.backing_filename = header.backing_filename
        self.lock = asyncio.Lock()
        self.epochs = Epochs()
        self.writers = Writers(self.epochs)
        self.in_flight = self.writers.allocating
        self.file_end = write.FileEnd(storage.length)
        self.tables = Tables(
            storage,
            header,
            l1,
            file_end=round_up(storage.length, header.cluster_size),
            cache_bytes=l2_cache_size,
        )
        self.mapping = Mapping(self.tables)
        self.mapping.freeze(read_only)
        self.compressed = CompressedClusters(self, compressed_cache_size)
        self.writeback = Writeback(self)
        self.try_map = self.mapping.try_map  # type: ignore[method-assign]
        self.map = self.mapping.map  # type: ignore[method-assign]
        self.try_map_write = self.mapping.try_map_write  # type: ignore[method-assign]
        if header.crypt_method == qcow1_header.CRYPT_AES:
            encryption.number_by_guest_offset(self)
        self.tasks = ImageTasks(storage.filename)
        # The end of the latest compressed write: clusters that are compressed
        # at the same time are stored in the order in which they came.
        self._last_stored: asyncio.Future[None] | None = None

    # -- opening ---------------------------------------------------------

    @classmethod
    async def open(
        cls, storage: StorageDriver, *, read_only: bool, options: Options[str, Any]
    ) -> Self:
        """Open the image in ``storage``.

        Options: ``l2_cache_size`` and ``compressed_cache_size`` in bytes;
        ``secret``, the passphrase of an encrypted image
        (`nbdqcow.crypto.secrets.Secret` or bytes). Raises `ImageError`.
        """
        header = await run_steps(read_header(storage.length), storage)
        header.check_l1(storage.length)
        data = None
        is_encrypted = header.crypt_method == qcow1_header.CRYPT_AES
        method = "aes" if is_encrypted else None
        check_method(method, options.get("encrypt_format"))
        if is_encrypted:
            data = encryption.open_data(storage, options.get("secret"))
        l1 = await load_l1(storage, header)
        return cls(
            storage,
            header,
            l1,
            read_only=read_only,
            l2_cache_size=options.get("l2_cache_size") or DEFAULT_L2_CACHE,
            compressed_cache_size=options.get("compressed_cache_size"),
            data=data,
        )

    # -- reading ---------------------------------------------------------

    def try_map(self, offset: int, length: int) -> Run | None:
        """See `FormatDriver.try_map`; `Mapping.try_map` takes its place."""
        return self.mapping.try_map(offset, length)

    async def map(self, offset: int, length: int) -> Run:
        """See `FormatDriver.map`; `Mapping.map` takes its place."""
        return await self.mapping.map(offset, length)

    async def read_compressed(self, descriptor: int) -> Buffer:
        """See `FormatDriver.read_compressed`."""
        return await self.compressed.read(descriptor)

    def try_read_compressed(
        self, descriptor: int, start: int, length: int
    ) -> Buffer | None:
        """See `FormatDriver.try_read_compressed`."""
        return self.compressed.try_read(descriptor, start, length)

    async def extents(self, offset: int, length: int, limit: int) -> Kinds:
        """See `FormatDriver.extents`."""
        return await extents.extents(self, offset, length, limit)

    # -- writing ---------------------------------------------------------

    def try_begin_write(self, offset: int, length: int) -> WritePlan | None:
        """See `FormatDriver.try_begin_write`."""
        if self.read_only:
            return None
        try:
            return write.try_begin_write(self, offset, length)
        except CorruptImage:
            # The coroutine finds the same, and can say so.
            return None

    async def begin_write(self, offset: int, length: int) -> WritePlan:
        """See `FormatDriver.begin_write`."""
        return await write.begin_write(self, offset, length)

    def end_write(self, plan: WritePlan) -> None:
        """See `FormatDriver.end_write`."""
        if isinstance(plan.private, int):
            self.writers.leave_in_place(plan.private)
        else:
            write.link(self, plan.private)

    def cancel_write(self, plan: WritePlan) -> None:
        """See `FormatDriver.cancel_write`."""
        if isinstance(plan.private, int):
            self.writers.leave_in_place(plan.private)
        else:
            write.roll_back(self, plan.private)

    def abort_write(self, plan: WritePlan) -> None:
        """See `FormatDriver.abort_write`: the file ends as it did before, if
        nothing else was allocated meanwhile."""
        if isinstance(plan.private, int):
            self.writers.leave_in_place(plan.private)
        else:
            self._roll_back(plan.private)

    def _roll_back(self, allocation: write.Allocation) -> None:
        if write.roll_back(self, allocation):
            # A coroutine that is thrown away with its loop leaves it to `close`.
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop()
                self.tasks.spawn(self._trim())

    async def _trim(self) -> None:
        """Cut off what a failed write has left behind the used part."""
        async with self.writeback.running, self.lock:
            write.drop_unused_tables(self)
            # Unused space is no harm where a file can't be cut.
            await self.storage.cut_off(self.file_end.offset)

    async def write_compressed(
        self, offset: int, data: Buffer, *, store_zeroes: bool = False
    ) -> None:
        """Store one whole cluster, or the image's last partial one, compressed;
        plain if that is no shorter.

        Raises `NotSupported` for an encrypted image, whose compressed clusters
        would be there for everyone to read.
        """
        self.check_writable()
        if self.header.crypt_method != qcow1_header.CRYPT_NONE:
            raise NotSupported("Compression and encryption not supported together")
        length = len(data)
        if offset % self.cluster_size or (
            length != self.cluster_size
            and (length > self.cluster_size or offset + length != self.size)
        ):
            raise BlockError(errno.EINVAL, "not one whole cluster")
        cluster = bytes(data).ljust(self.cluster_size, b"\0")
        earlier, stored = self._last_stored, asyncio.get_running_loop().create_future()
        self._last_stored = stored
        try:
            packed = await self.compressed.pack(cluster)
            if earlier is not None and not earlier.done():
                await asyncio.wait((earlier,))
            if packed is None or not await self._store_packed(offset, packed):
                await self._store_plain(offset, cluster, length)
        finally:
            stored.set_result(None)

    async def _store_packed(self, offset: int, packed: bytes) -> bool:
        """Write and link a compressed cluster; False if its place is too far
        behind for a descriptor."""
        allocation, host_offset = await write.place_compressed(
            self, offset, len(packed)
        )
        if host_offset >> (63 - self.cluster_bits):
            self._roll_back(allocation)
            return False
        allocation.entry = compressed_entry(host_offset, len(packed), self.cluster_bits)
        try:
            self.storage.announce("write_compressed")
            await self.storage.pwritev(host_offset, [packed])
        except BaseException:
            self._roll_back(allocation)
            raise
        write.link(self, allocation)
        return True

    async def _store_plain(self, offset: int, cluster: bytes, length: int) -> None:
        plan = await self.begin_write(offset, length)
        try:
            piece = memoryview(cluster)[: plan.length + plan.tail]
            await self.data.pwritev(plan.host_offset, [piece])
        except BaseException:
            self.abort_write(plan)
            raise
        self.end_write(plan)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool
    ) -> None:
        """Do nothing where nothing is stored and there is no backing file.

        Raises `NotSupported` for all else: the format has no zero clusters.
        """
        self.check_writable()
        if not await self._reads_zero(offset, length):
            raise NotSupported("no zero clusters in this format")

    async def claim_zero(self, offset: int, backing_zero: bool) -> bool:
        """See `FormatDriver.claim_zero`."""
        self.check_writable()
        length = min(self.cluster_size, self.size - offset)
        return await self._reads_zero(offset, length)

    async def _reads_zero(self, offset: int, length: int) -> bool:
        if self.is_covering:
            return False
        end = offset + length
        while True:
            async with self.lock:
                busy = self.in_flight.first_overlap(offset, end)
                if busy is None:
                    while offset < end:
                        kind, _, covered = await self.mapping.map(offset, end - offset)
                        if kind != UNALLOCATED:
                            return False
                        offset += covered
                    return True
            await busy.wait()

    async def make_empty(self) -> None:
        """Give all clusters up: everything is as it is in the backing file, or
        zero, and the file as short as it was when it was new."""
        self.check_writable()
        await self.tasks.run_to_end(self._make_empty())

    async def _make_empty(self) -> None:
        async with self.writeback.running, self.lock:
            await self.writers.quiet()
            header = self.header
            old_end = round_up(self.file_end.offset, self.cluster_size)
            metadata_end = max(end for _, end in header.ranges)
            try:
                await self._zero_l1()
                await self.storage.flush()
            except BaseException:
                # Some of it may be gone from the disk: bring it back.
                self.tables.mark_l1_dirty()
                raise
            self.tables.clear(old_end)
            self.compressed.clear()
            self.file_end.reset(old_end)
            # Reads that have begun may still be on their way.
            await self.epochs.quiet()
            await self.storage.truncate(metadata_end)
            self.file_end.reset(metadata_end)
            self.tables.clear(round_up(metadata_end, self.cluster_size))

    async def _zero_l1(self) -> None:
        header = self.header
        for start in range(0, header.l1_bytes, MiB):
            zeroes = bytes(min(MiB, header.l1_bytes - start))
            self.storage.announce("l1_update")
            await self.storage.pwritev(header.l1_table_offset + start, [zeroes])

    async def change_backing_file(
        self, filename: str | None, format_name: str | None
    ) -> None:
        """See `FormatDriver.change_backing_file`. The image has no place for
        the format: it is guessed when the backing file is opened.

        What was named before is named after a power cut, or the new name. It
        goes into the header's sector if there is room, else to the end.
        """
        self.check_writable()
        name = (filename or "").encode("utf-8", "surrogateescape")
        if len(name) > qcow1_header.MAX_BACKING_NAME_BYTES:
            raise BlockError(errno.EINVAL, "Backing file name too long")
        if b"\0" in name:
            raise BlockError(errno.EINVAL, "A file name can't have a NUL byte")
        await self.tasks.run_to_end(self._change_name(filename, name))

    async def _change_name(self, filename: str | None, name: bytes) -> None:
        async with self.lock:
            changed = replace(
                self.header,
                backing_file_offset=0,
                backing_file_size=len(name),
                backing_filename=filename or None,
            )
            if name:
                changed.backing_file_offset = await self._place_name(name)
            head = changed.pack()
            if changed.backing_file_offset == len(head):
                head += name
            await self.storage.pwritev(0, [head])
            await self.storage.flush()
            self.header = changed
            self.backing_filename = changed.backing_filename

    async def _place_name(self, name: bytes) -> int:
        """Return where a backing file's name goes: behind the header, where it
        is still to be written, or to a new place, where it is durable."""
        in_sector = qcow1_header.HEADER_LENGTH + len(name)
        if in_sector <= min(SECTOR_SIZE, self.header.l1_table_offset):
            return qcow1_header.HEADER_LENGTH
        offset, old_end = self.file_end.take(len(name), SECTOR_SIZE)
        try:
            await self.storage.pwritev(offset, [name])
            await self.storage.flush()
        except BaseException:
            self.file_end.give_back(old_end, offset + len(name))
            raise
        self.tables.protect(offset, offset + len(name))
        return offset

    async def reopen(self, *, read_only: bool) -> None:
        """See `FormatDriver.reopen`."""
        if not read_only:
            self.read_only = False
            self.mapping.freeze(False)
            return
        async with self.lock:
            self.read_only = True
            self.mapping.freeze(True)
            await self.writers.quiet()
        await self.tasks.settle()
        try:
            await self.writeback.flush()
        except BaseException:
            self.read_only = False
            self.mapping.freeze(False)
            raise

    def check_writable(self) -> None:
        """Raise `BlockError` if the image is read-only."""
        if self.read_only:
            raise BlockError(errno.EROFS, "the image is read-only")

    # -- durability ------------------------------------------------------

    async def flush(self) -> None:
        """See `FormatDriver.flush`."""
        await self.writeback.flush()

    async def close(self) -> None:
        """See `FormatDriver.close`."""
        try:
            await self.tasks.settle()
            if not self.read_only:
                await self._trim()
                await self.writeback.flush()
        finally:
            await self.compressed.close()

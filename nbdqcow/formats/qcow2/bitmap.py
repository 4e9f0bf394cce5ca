"""Persistent dirty bitmaps: which parts of a disk were written.

While an image is open for writing, its bitmaps live in memory and are marked
"in use" on disk: after a power cut they are known to be out of date. Closing
the image writes them to new clusters and switches to a new directory.

Source: qcow2.txt, "Bitmaps", "Bitmaps extension".
"""

import asyncio
import contextlib
import errno
from array import array
from collections.abc import AsyncIterator, Callable
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeAlias

from nbdqcow.block.steps import run_steps
from nbdqcow.errors import BlockError, ImageError, NotSupported, explained
from nbdqcow.formats.qcow2 import header as qcow2_header
from nbdqcow.formats.qcow2.bitmap_directory import (
    FLAG_AUTO,
    FLAG_IN_USE,
    MAX_NAME_BYTES,
    BitmapEntry,
    pack_bitmap_directory,
    read_bitmap_directory,
)
from nbdqcow.formats.qcow2.entries import OFFSET_MASK
from nbdqcow.formats.qcow2.header_update import update_header
from nbdqcow.formats.qcow2.memory_bitmap import Bitmap, BitmapInfo
from nbdqcow.formats.words import dump_be64, load_be64
from nbdqcow.units import MiB, round_up

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.driver import Qcow2Driver

_MAX_TOTAL_BYTES: Final = 1024 * MiB
"""Of all bitmaps of an image; what is zero in them takes no memory."""
_MAX_LOADED_BYTES: Final = 256 * MiB
"""Of all bitmaps of an image that is opened, as far as they aren't zero."""
_MAX_TABLE_BYTES: Final = 64 * MiB
_ALL_ONES: Final = 1
"""A table entry for a cluster of ones that has no cluster."""
_TURN_BYTES: Final = 4 * MiB
"""Of a bitmap that is read or stored, before others get a turn at the event loop."""

_TURN_WORDS: Final = 4096
"""Of a bitmap's table that are looked at, before the same."""

_Clusters: TypeAlias = list[tuple[int, int]]
"""Ranges of host clusters: the first one, and how many there are."""


class Bitmaps:
    """All bitmaps of one image, and their place in the file."""

    def __init__(self, image: "Qcow2Driver") -> None:
        self._image = image
        self._all: dict[str, Bitmap] = {}
        self._lock = asyncio.Lock()
        self._refused = False

    # -- opening ---------------------------------------------------------

    async def load(self) -> None:
        """Read all bitmaps; in an image open for writing they are in use on
        disk when this returns. Raises `ImageError`."""
        image = self._image
        entries = await run_steps(read_bitmap_directory(image.header), image.storage)
        budget, loaded = _MAX_TOTAL_BYTES, 0
        for entry in entries:
            budget -= image.size >> (entry.granularity_bits + 3)
            if budget < 0:
                raise ImageError("the bitmaps of the image take too much memory")
            bitmap = Bitmap(entry.name, image.size, entry.granularity_bits)
            if entry.name in self._all:
                raise ImageError(f"Bitmap '{entry.name}' is there twice")
            bitmap.entry = entry
            bitmap.enabled = bool(entry.flags & FLAG_AUTO)
            bitmap.inconsistent = bool(entry.flags & FLAG_IN_USE)
            if not bitmap.inconsistent:
                loaded += await self._load_bits(bitmap, _MAX_LOADED_BYTES - loaded)
            self._all[entry.name] = bitmap
        if not image.read_only:
            await self.begin_use(up_to_date=True)
        self._changed()

    async def begin_use(self, *, up_to_date: bool) -> None:
        """Let all bitmaps that are stored be in use on disk, durably.

        ``up_to_date``: nothing has been written since they were stored; if this
        fails they stay so, as far as the file can still be written.
        """
        entries = [b.entry for b in self._all.values() if b.entry is not None]
        extension = self._image.header.bitmaps
        if not entries or extension is None:
            return
        if self._image.metadata_dirty:
            # Clusters of these may be new.
            await self._image.writeback.flush(accurate=True)
        await self._note_metadata(entries)
        in_use = [e._replace(flags=e.flags | FLAG_IN_USE) for e in entries]
        data = pack_bitmap_directory(in_use)
        if len(data) != extension.directory_length:
            # Storing them ended half the way: there is no directory of these.
            await self._switch(in_use, [], [])
            return
        try:
            await self._write_directory(extension.directory_offset, data)
        except BaseException:
            if up_to_date:
                # Or the next one to open the image would not trust them.
                with contextlib.suppress(OSError):
                    before = pack_bitmap_directory(entries)
                    await self._write_directory(extension.directory_offset, before)
            raise

    async def _write_directory(self, offset: int, directory: bytes) -> None:
        await self._image.storage.pwritev(offset, [directory])
        await self._image.storage.flush()

    async def _load_bits(self, bitmap: Bitmap, limit: int) -> int:
        """Read a bitmap's bits; return how many bytes of them were not zero, at
        most ``limit``. Raises `ImageError`."""
        image, size = self._image, self._image.cluster_size
        assert bitmap.entry is not None
        table = await self._read_table(bitmap.entry)
        length = min(len(bitmap.bits), size * (len(table) - table.count(0)))
        if length > limit:
            raise ImageError("the bitmaps of the image take too much memory")
        for index, word in enumerate(table):
            start = index * size
            end = min(start + size, len(bitmap.bits))
            if not start % _TURN_BYTES:
                await asyncio.sleep(0)
            if word & OFFSET_MASK:
                data = await image.storage.pread(word & OFFSET_MASK, end - start)
                bitmap.bits[start:end] = data
            elif word & _ALL_ONES:
                bitmap.bits[start:end] = b"\xff" * (end - start)
        bitmap.mask_end()
        return length

    async def _read_table(self, entry: BitmapEntry) -> "array[int]":
        length = entry.table_entries * 8
        file_end = round_up(self._image.storage.length, self._image.cluster_size)
        if length > _MAX_TABLE_BYTES or entry.table_offset + length > file_end:
            raise ImageError(f"Bitmap '{entry.name}' has an invalid table")
        data = await self._image.storage.pread(entry.table_offset, length)
        table = load_be64(data)
        for start in range(0, len(table), _TURN_WORDS):
            for word in table[start : start + _TURN_WORDS]:
                offset = word & OFFSET_MASK
                if offset & (self._image.cluster_size - 1) or (
                    word & ~OFFSET_MASK & ~_ALL_ONES or (offset and word & _ALL_ONES)
                ):
                    raise ImageError(f"Bitmap '{entry.name}' has an invalid table")
            await asyncio.sleep(0)
        return table

    async def _note_metadata(self, entries: list[BitmapEntry]) -> None:
        for entry in entries:
            for first, count in await self._clusters_of(entry):
                self._image.metadata.update(range(first, first + count))
        first, count = self._directory_clusters()
        self._image.metadata.update(range(first, first + count))

    async def _clusters_of(self, entry: BitmapEntry) -> list[tuple[int, int]]:
        """Return the ranges of clusters that one bitmap takes."""
        bits, size = self._image.cluster_bits, self._image.cluster_size
        first = entry.table_offset >> bits
        ranges = [(first, -(-entry.table_entries * 8 // size))]
        table = await self._read_table(entry)
        for start in range(0, len(table), _TURN_WORDS):
            for word in table[start : start + _TURN_WORDS]:
                if not (index := (word & OFFSET_MASK) >> bits):
                    continue
                first, nb_clusters = ranges[-1]
                if index == first + nb_clusters:
                    ranges[-1] = first, nb_clusters + 1
                else:
                    ranges.append((index, 1))
            await asyncio.sleep(0)
        return ranges

    def _directory_clusters(self) -> tuple[int, int]:
        extension = self._image.header.bitmaps
        if extension is None or not self._image.header.bitmaps_consistent:
            return 0, 0
        size = self._image.cluster_size
        first = extension.directory_offset // size
        return first, -(-extension.directory_length // size)

    # -- what there is ---------------------------------------------------

    @property
    def infos(self) -> list[BitmapInfo]:
        """All bitmaps, in the directory's order."""
        return [bitmap.info for bitmap in self._all.values()]

    def _changed(self) -> None:
        """Tell the driver what can be read and what is to be kept up to date."""
        usable = {n: b for n, b in self._all.items() if not b.inconsistent}
        self._image.dirty_bitmaps = MappingProxyType(usable)
        self.track_enabled()

    def track_enabled(self) -> None:
        """Let writes be marked in the bitmaps that are enabled."""
        enabled = [b for b in self._all.values() if b.enabled and not b.inconsistent]
        self._image.track([] if self._image.read_only else enabled)

    def _find(self, name: str, *, usable: bool = True) -> Bitmap:
        bitmap = self._all.get(name)
        if bitmap is None:
            raise BlockError(errno.ENOENT, f"there is no bitmap '{name}'")
        if usable and bitmap.inconsistent:
            raise BlockError(
                errno.EINVAL, f"bitmap '{name}' is inconsistent and can't be used"
            )
        if usable and bitmap.busy:
            raise BlockError(errno.EBUSY, f"bitmap '{name}' is in use")
        return bitmap

    # -- changing --------------------------------------------------------

    def add(self, name: str, granularity: int | None, *, enabled: bool) -> None:
        """See `Qcow2Driver.bitmap_add`."""
        image = self._image
        if image.header.version < 3 or self._refused:
            raise NotSupported("version 2 images have no bitmaps")
        if name in self._all:
            raise BlockError(errno.EEXIST, f"there is a bitmap '{name}' already")
        if not 1 <= len(name.encode("utf-8", "surrogateescape")) <= MAX_NAME_BYTES:
            raise BlockError(
                errno.EINVAL, f"a bitmap's name has 1 to {MAX_NAME_BYTES} bytes"
            )
        if len(self._all) >= qcow2_header.MAX_BITMAPS:
            raise BlockError(errno.EFBIG, "the image has too many bitmaps")
        if granularity is None:
            granularity = min(max(image.cluster_size, 4096), 65536)
        bits = granularity.bit_length() - 1
        if granularity != 1 << bits or not 9 <= bits <= 31:
            raise BlockError(
                errno.EINVAL, "a granularity is a power of 2 from 512 bytes to 2 GiB"
            )
        total = sum(len(b.bits) for b in self._all.values())
        if total + (image.size >> (bits + 3)) > _MAX_TOTAL_BYTES:
            raise BlockError(errno.EFBIG, "the bitmaps would take too much memory")
        bitmap = Bitmap(name, image.size, bits)
        bitmap.enabled = enabled
        self._all[name] = bitmap
        self._changed()

    async def remove(self, name: str) -> None:
        """See `Qcow2Driver.bitmap_remove`."""
        async with self._lock:
            entry = self._find(name, usable=False).entry
            if entry is not None:
                old = await self._clusters_of(entry)
                stored = [b.entry for b in self._all.values() if b.entry is not None]
                in_use = [
                    e._replace(flags=e.flags | FLAG_IN_USE)
                    for e in stored
                    if e is not entry
                ]
                # Until it is gone from the disk it is there, and is kept up to date.
                await self._switch(in_use, [], old)
            del self._all[name]
            self._changed()

    @contextlib.asynccontextmanager
    async def going(self) -> AsyncIterator[Callable[[], None]]:
        """Let no bitmap be added meanwhile. Yields what to call once the header
        names none any more: it forgets all of them and frees their clusters."""
        self._refused = True
        try:
            clusters = [self._directory_clusters()]
            for bitmap in self._all.values():
                if bitmap.entry is not None:
                    clusters += await self._clusters_of(bitmap.entry)
            yield partial(self._forget, clusters)
        finally:
            self._refused = False

    def _forget(self, clusters: _Clusters) -> None:
        self._all.clear()
        self._changed()
        self._give_back(clusters)

    def enable(self, name: str, enabled: bool) -> None:
        """See `Qcow2Driver.bitmap_enable`."""
        self._find(name).enabled = enabled
        self._changed()

    def clear(self, name: str) -> None:
        """See `Qcow2Driver.bitmap_clear`."""
        self._find(name).clear()

    async def merge(self, name: str, source: "str | Bitmap") -> None:
        """See `Qcow2Driver.bitmap_merge` and `Qcow2Driver.bitmap_merge_from`."""
        bitmap = self._find(name)
        other = self._find(source) if isinstance(source, str) else source
        if other.size != bitmap.size:
            raise BlockError(errno.EINVAL, "the disks of the bitmaps differ in size")
        bitmap.busy = other.busy = True
        try:
            await bitmap.merge(other)
        finally:
            bitmap.busy = other.busy = False

    # -- resizing --------------------------------------------------------

    def check_resize(self, size: int) -> None:
        """Refuse a size of the disk that the bitmaps can't have.

        Raises `BlockError`.
        """
        for bitmap in self._all.values():
            if bitmap.inconsistent:
                raise BlockError(
                    errno.EINVAL,
                    f"Bitmap '{bitmap.name}' is inconsistent and cannot be used",
                )
        if sum(size >> (b.granularity_bits + 3) for b in self._all.values()) > (
            _MAX_TOTAL_BYTES
        ):
            raise BlockError(errno.EFBIG, "the bitmaps would take too much memory")

    def resize(self, size: int) -> None:
        """The disk has another size: `check_resize` let it pass."""
        for bitmap in self._all.values():
            bitmap.resize(size)

    # -- storing ---------------------------------------------------------

    async def store(self) -> None:
        """Write all bitmaps: on disk they are not in use any more. Nobody
        writes to the image while this runs, nor afterwards."""
        if not self._all:
            return
        async with self._lock:
            bitmaps = list(self._all.values())
            entries: list[BitmapEntry] = []
            new: _Clusters = []
            old: _Clusters = []
            try:
                for bitmap in bitmaps:
                    entry = bitmap.entry
                    if not bitmap.inconsistent:
                        if entry is not None:
                            old += await self._clusters_of(entry)
                        with explained(
                            f"Failed to write bitmap '{bitmap.name}' to file"
                        ):
                            entry = await self._store_one(bitmap, new)
                    assert entry is not None
                    entries.append(entry)
            except BaseException:
                self._give_back(new)
                raise
            await self._switch(entries, new, old)
            for bitmap, entry in zip(bitmaps, entries, strict=True):
                bitmap.entry = entry

    async def _store_one(self, bitmap: Bitmap, new: _Clusters) -> BitmapEntry:
        """Write one bitmap, but for its entry in the directory, to clusters that
        are added to ``new``."""
        size = self._image.cluster_size
        table = []
        for start in range(0, len(bitmap.bits), size):
            if not start % _TURN_BYTES:
                await asyncio.sleep(0)
            piece = bytes(bitmap.bits[start : start + size])
            if piece == bytes(len(piece)):
                table.append(0)
            elif piece == b"\xff" * len(piece):
                table.append(_ALL_ONES)
            else:
                table.append(await self._write_new(piece.ljust(size, b"\0"), new))
        words = load_be64(b"")
        words.extend(table)
        offset = await self._write_new(dump_be64(words), new)
        flags = FLAG_AUTO if bitmap.enabled else 0
        return BitmapEntry(
            bitmap.name, offset, len(table), flags, bitmap.granularity_bits
        )

    async def _write_new(self, data: bytes, new: _Clusters) -> int:
        """Write data to clusters in a row, which are added to ``new``; return their
        host offset."""
        image, size = self._image, self._image.cluster_size
        nb_clusters = -(-len(data) // size)
        async with image.lock:
            first = await image.refcounts.allocate_contiguous(nb_clusters)
        new.append((first, nb_clusters))
        image.metadata.update(range(first, first + nb_clusters))
        image.note_used((first + nb_clusters) * size, whole=False)
        await image.storage.pwritev(first * size, [data])
        return first * size

    async def _switch(
        self, entries: list[BitmapEntry], new: _Clusters, old: _Clusters
    ) -> None:
        """Let a new directory take the place of the old one, durably, and
        give the clusters ``old`` back; if that fails, those that are ``new``.
        """
        image = self._image
        extension = None

        def change(header: qcow2_header.Header) -> None:
            header.set_extension(qcow2_header.EXT_BITMAPS, extension)
            header.autoclear_features &= ~qcow2_header.AUTOCLEAR_BITMAPS
            if extension is not None:
                header.autoclear_features |= qcow2_header.AUTOCLEAR_BITMAPS

        try:
            if entries:
                directory = pack_bitmap_directory(entries)
                offset = await self._write_new(directory, new)
                extension = qcow2_header.BitmapsExtension(
                    len(entries), len(directory), offset
                ).pack()
            await image.writeback.flush(accurate=True)
            async with image.lock:
                old_directory = self._directory_clusters()
                await update_header(image, change)
        except BaseException:
            if not image.failed:
                self._give_back(new)
            raise
        self._give_back([*old, old_directory])

    def _give_back(self, clusters: _Clusters) -> None:
        """No header names these clusters any more, or none ever did."""
        image = self._image
        for first, nb_clusters in clusters:
            image.metadata.difference_update(range(first, first + nb_clusters))
            image.freed.add(first, nb_clusters, False)

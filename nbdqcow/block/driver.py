"""The contract of format drivers: a driver maps, the block layer moves bytes.

A driver owns the metadata of one image and the lock that guards it. The block
layer (`nbdqcow.block.node`) asks it where guest bytes are, and reads and
writes them through ``data``, the storage driver that holds guest data.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from nbdqcow.block.inflight import Epochs
from nbdqcow.block.status import DirtyBitmap, Kinds
from nbdqcow.block.storage import BlockingSource, StorageDriver
from nbdqcow.block.tools import OptionValue, Progress, Secrets
from nbdqcow.errors import ImageError, NotSupported
from nbdqcow.types import Buffer, Run


@dataclass(slots=True, eq=False)
class WritePlan:
    """Where one piece of a guest write goes, and what goes with it.

    Attributes:
        guest_offset: first byte of the piece.
        length: bytes of the piece; a shorter piece than asked for means
            "write this one, then ask again for the rest".
        host_offset: where ``guest_offset`` goes in ``driver.data``.
        head: bytes of old content to copy before the piece, and
        tail: behind it: copy-on-write, so that the clusters become whole.
            Both are 0 for a write in place.
        reads_zero: the new host range is known to read as zeroes, so zeroes
            in head and tail need not be written.
        private: the driver's own record.
    """

    guest_offset: int
    length: int
    host_offset: int
    head: int = 0
    tail: int = 0
    reads_zero: bool = False
    private: Any = None


class FormatDriver(ABC):
    """One open image of one format.

    Attributes:
        shows_snapshots: whether the option ``snapshot`` has a meaning.
        storage: the image file; data: the file with the guest's bytes (the
            same unless the image has an external data file).
        data_file: the external data file, if the image has one.
        size: the virtual size in bytes.
        cluster_size: the unit of allocation in bytes (1 for raw).
        subcluster_size: the unit in which writes are completed with old
            content, and zeroed by metadata; a cluster in most formats.
        backing_filename, backing_format: as the image names them, or None.
        gets_backing: the image is going to name a backing file, so zeroes are
            stored also where nothing is and there is none yet.
        has_backing: a backing image is open, whether this one still names it or
            not; set by the node.
        backing_size: of the backing image that is open, 0 for none; set by
            the node.
        lock: guards the metadata. Held to map, allocate and link; never
            across guest data I/O.
        dirty_bitmaps: those that can be read, by name; none in most formats.
        when_rebound: the node's; called when a ``try_*`` method was replaced
            or ``size`` has changed.
        write_plain: the node's; writes guest data as any other, for a cluster
            that gets no shorter when it is compressed.
        prepare_growing: the node's, see `nbdqcow.block.resizing`; called with the
            new size of the disk before it grows, while nothing else can make the
            image another disk.
        epochs: the requests in flight on guest data, so that a freed cluster
            is not handed out again under one of them.
    """

    name: ClassVar[str]
    shows_snapshots: ClassVar[bool] = False
    storage: StorageDriver
    data: StorageDriver
    data_file: StorageDriver | None = None
    size: int
    cluster_size: int
    read_only: bool
    backing_filename: str | None = None
    gets_backing: bool = False
    has_backing: bool = False
    backing_format: str | None = None
    backing_size: int = 0
    dirty_bitmaps: Mapping[str, DirtyBitmap] = MappingProxyType({})
    when_rebound: Callable[[], None] = staticmethod(lambda: None)
    write_plain: Callable[[int, memoryview], Awaitable[None]]
    prepare_growing: Callable[[int], Awaitable[None]]
    lock: asyncio.Lock
    epochs: Epochs

    @property
    def is_covering(self) -> bool:
        """Whether something else shows, or is to show, where nothing is stored:
        zeroes are stored then."""
        named = self.backing_filename is not None
        return named or self.gets_backing or self.has_backing

    @property
    def subcluster_size(self) -> int:
        """See above; a driver with subclusters has an attribute instead."""
        return self.cluster_size

    # -- reading ---------------------------------------------------------

    @abstractmethod
    def try_map(self, offset: int, length: int) -> Run | None:
        """Say what the bytes at ``offset`` are, from cached tables only."""

    @abstractmethod
    async def map(self, offset: int, length: int) -> Run:
        """Say what the bytes at ``offset`` are, reading tables as needed."""

    async def read_compressed(self, descriptor: int) -> Buffer:
        """Return the whole cluster that a COMPRESSED run's descriptor names."""
        raise AssertionError("this format has no compressed clusters")

    def try_read_compressed(
        self, descriptor: int, start: int, length: int
    ) -> Buffer | None:
        """Return ``length`` bytes from ``start`` on of a compressed cluster, if
        they need no waiting."""
        return None

    async def read_compressed_part(
        self, descriptor: int, start: int, length: int
    ) -> Buffer:
        """Return ``length`` bytes from ``start`` on of a compressed cluster."""
        cluster = await self.read_compressed(descriptor)
        return memoryview(cluster)[start : start + length]

    async def runs(self, offset: int, length: int) -> list[Run]:
        """Return what `map` says of consecutive stretches from ``offset`` on,
        as many as are found without much waiting, at least one.

        For images that nobody writes to. Neighbours may be alike.
        """
        return [await self.map(offset, length)]

    async def read_compressed_parts(
        self, places: Sequence[tuple[int, int, int]]
    ) -> AsyncIterator[Buffer]:
        """Yield what `read_compressed_part` returns for each of some places:
        descriptor, start and length."""
        for place in places:
            yield await self.read_compressed_part(*place)

    def compressed_source(self, descriptor: int) -> BlockingSource | None:
        """Return what reads and decompresses a cluster in a worker thread,
        keeping nothing of it; None if threads can't."""
        return None

    async def extents(self, offset: int, length: int, limit: int) -> Kinds:
        """Return at most ``limit`` extents of this image from ``offset`` on.

        They may cover less than ``length``, never more, and at least a byte.
        """
        import numpy as np

        lengths: list[int] = []
        kinds: list[int] = []
        end = offset + length
        while offset < end:
            kind, _, covered = await self.map(offset, end - offset)
            if kinds and kinds[-1] == kind:
                lengths[-1] += covered
            elif len(kinds) == limit:
                break
            else:
                lengths.append(covered)
                kinds.append(kind)
            offset += covered
        return Kinds(np.array(lengths, np.uint64), np.array(kinds, np.uint8))

    # -- writing ---------------------------------------------------------

    def try_map_write(self, offset: int, length: int) -> int:
        """Return the host offset if all of the range can be overwritten in
        place and nothing but its data changes, from cached tables only; else
        -1. No allocation in flight overlaps the range."""
        return -1

    def try_begin_write(self, offset: int, length: int) -> WritePlan | None:
        """Do as `begin_write` does if that needs no waiting and one plan
        covers all of ``length``; else change nothing and return None.

        It is for a caller that gives the plan to `end_write` or `cancel_write`
        in the same turn of the loop.
        """
        return None

    def try_begin_long_write(self, offset: int, length: int) -> WritePlan | None:
        """Do as `try_begin_write` does, but for a plan that is kept, as those of
        `begin_write` are, until a later turn."""
        return self.try_begin_write(offset, length)

    def cancel_write(self, plan: WritePlan) -> None:
        """Undo `try_begin_write`: nothing is in flight for the plan."""
        raise AssertionError("this format never plans without waiting")

    @abstractmethod
    async def begin_write(self, offset: int, length: int) -> WritePlan:
        """Find or allocate room for a guest write. Takes ``lock`` itself.

        Waits for overlapping allocations. Every plan must be given back to
        `end_write` or `abort_write`, whatever happens.
        """

    @abstractmethod
    def end_write(self, plan: WritePlan) -> None:
        """The data, head and tail are in the file: link the new clusters."""

    @abstractmethod
    def abort_write(self, plan: WritePlan) -> None:
        """The data could not be written: the old mapping stays."""

    @property
    def compressed_at_once(self) -> int:
        """So many clusters `write_compressed` compresses in one thread."""
        return 1

    async def write_compressed(
        self, offset: int, data: Buffer, *, store_zeroes: bool = False
    ) -> None:
        """Write whole clusters, of which the image's last may be a part of one,
        compressed; plain if one gets no shorter. A cluster of zeroes becomes a zero
        cluster unless it is to be stored, too. `compressed_at_once` tells how many
        clusters it takes.

        Calls may overlap: compressing takes all processors, and what is
        compressed is stored in the order of the calls. Raises `NotSupported`
        if the image can't have compressed clusters.
        """
        raise NotSupported("no compressed clusters in this format")

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool
    ) -> None:
        """Make whole subclusters read as zeroes by metadata alone.

        The range is cluster-aligned (the end of the image counts as such), or
        lies within one cluster and is aligned to subclusters.
        Raises `NotSupported` if the format can't: the block layer then writes
        zeroes, unless the caller wanted no fallback.
        """
        raise NotSupported("no zero clusters in this format")

    async def claim_zero(self, offset: int, backing_zero: bool) -> bool:
        """Make the subcluster at ``offset`` read as zeroes if, by its map
        entry, it holds no data of its own; False if it does.

        ``backing_zero``: what the backing image has there, outside of the
        range that is being zeroed, reads as zeroes.
        """
        return False

    async def discard(self, offset: int, length: int) -> None:
        """Free whole clusters. A hint; never exposes a backing file's data."""

    async def note_request(self, offset: int, length: int) -> None:
        """Mark a range, at least a byte, as written in the dirty bitmaps: it was
        to be zeroed or discarded, whatever came of that."""

    # -- encryption ------------------------------------------------------

    async def amend_keys(
        self,
        values: Mapping[str, OptionValue],
        secrets: Secrets,
        *,
        force: bool = False,
    ) -> None:
        """Add or erase passphrases as ``encrypt.*`` options of ``amend`` say.

        Raises `ImageError` before anything is written, and `OSError`.
        """
        raise ImageError("This image format has no passphrases")

    # -- the disk as a whole ---------------------------------------------

    def room(self) -> int:
        """Return where the disk ends for who uses it as a file, and would have it
        grow; see `StorageDriver.room`."""
        return self.size

    async def resize(self, size: int, *, preallocation: str = "off") -> None:
        """Set the virtual size; the file's end that is not needed goes.

        What is new reads as zeroes from the next cluster on, even if the
        backing image has data there; what the last cluster holds beyond the
        old size is the caller's business.
        ``preallocation`` is one of `nbdqcow.block.tools.PREALLOCATIONS`. Raises
        `BlockError`.
        """
        raise NotSupported("Image format driver does not support resize")

    async def make_empty(self) -> None:
        """Let every cluster be unallocated: the backing image shows.

        Raises `BlockError`.
        """
        raise NotSupported("this format has no empty images")

    async def change_backing_file(
        self, filename: str | None, format_name: str | None
    ) -> None:
        """Name another backing file in the image, or none. What is open stays
        open; nothing is copied.

        Raises `BlockError`.
        """
        raise NotSupported("this format can't change the backing file")

    async def reopen(self, *, read_only: bool) -> None:
        """Allow changes to the image, or no longer, while it is in use.

        To stop them it waits for writers and writes all metadata back; the
        storage changes after that, or before changes are allowed. Raises
        `NotSupported`, `BlockError` or `OSError`; the image stays as it was.
        """
        raise NotSupported("this format can't be opened otherwise while in use")

    async def amend(
        self, options: Mapping[str, OptionValue], progress: Progress
    ) -> None:
        """Change the image to what ``-o`` options of qemu-img's amend say,
        but for ``encrypt.*``, which `amend_keys` takes. Of several changes some
        may be done when one fails.

        Raises `BlockError`.
        """
        raise NotSupported(
            f"Format driver '{self.name}' does not support option amendment"
        )

    async def close_files(self) -> None:
        """Close what the image is made of. The block layer calls it last."""
        files = [self.data, self.data_file, self.storage]
        for index, file in enumerate(files):
            if file is not None and file not in files[:index]:
                await file.close()

    # -- durability ------------------------------------------------------

    @abstractmethod
    async def flush(self) -> None:
        """Make every write answered before this call durable."""

    @abstractmethod
    async def close(self) -> None:
        """Write back all metadata and release it. The block layer closes the
        storage afterwards."""

"""Compressed clusters: reading them, and keeping what was decompressed lately.

Source: qcow2.txt, "Compressed Clusters Descriptor".
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Final, TypeAlias

from nbdqcow.block.storage import StorageDriver
from nbdqcow.errors import BlockError
from nbdqcow.formats.memory_share import MemoryShare
from nbdqcow.formats.qcow2.entries import compressed_range
from nbdqcow.pool import Pool
from nbdqcow.types import Buffer
from nbdqcow.units import KiB

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.codec import Compress, Decompress
    from nbdqcow.formats.qcow2.driver import Qcow2Driver

_INLINE_BYTES: Final = 512 * KiB
"""What is decompressed in one turn of the event loop: about a millisecond."""
_MAX_INLINE: Final = 128 * KiB
"""A larger cluster always goes to a thread."""
_GROUP_BYTES: Final = 256 * KiB
"""Clusters of one read, decompressed, that go to a thread together."""

_MANY: Final = 4
"""Clusters in a row from which on a reader is taken for one of all the image."""

Place: TypeAlias = tuple[int, int, int]
"""Descriptor, first byte in its cluster, and length in bytes."""
_Load: TypeAlias = "asyncio.Task[list[Buffer | BlockError]]"


class CompressedClusters:
    """Reads compressed clusters of one image, with a cache of plain bytes.

    The key is the descriptor.

    `forget` must be called when the space under a descriptor is freed, `drop`
    when it is used for a new cluster, or old bytes would be served for it.

    Attributes:
        placing: held by the one who finds a place for a compressed cluster
            and writes it there.
    """

    def __init__(self, image: "Qcow2Driver", cache_bytes: int | None = None) -> None:
        """``cache_bytes`` is what may be kept, by default a `MemoryShare`."""
        size = image.cluster_size
        self._image = image
        self._share = MemoryShare(cache_bytes)
        # From the one that was used the longest time ago to the last one.
        self._cache: dict[int, Buffer] = {}
        self._nb_bytes = 0
        self._loading: dict[int, asyncio.Future[None]] = {}
        self._pool: Pool | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        # What there is of the loop's turn, if it has decompressed anything yet.
        self._turn: asyncio.Handle | None = None
        self._inline_bytes = _INLINE_BYTES if size <= _MAX_INLINE else 0
        self._inline_left = self._inline_bytes
        self._group = max(1, _GROUP_BYTES // size)
        self.placing = asyncio.Lock()

    @property
    def _codec(self) -> "tuple[Compress, Decompress]":
        # Not above: most images have no compressed clusters.
        from nbdqcow.formats.qcow2.codec import codec

        return codec(self._image.header.compression_type)

    @cached_property
    def compress(self) -> "Compress":
        """What compresses a cluster's bytes; it blocks."""
        return self._codec[0]

    @cached_property
    def _decompress(self) -> "Decompress":
        return self._codec[1]

    def choose_codec(self) -> None:
        """Compress as the header says now."""
        self.__dict__.pop("compress", None)
        self.__dict__.pop("_decompress", None)

    @property
    def threads(self) -> Pool:
        """The worker threads; images without compressed clusters take none."""
        if self._pool is None:
            self._pool = Pool()
            self._share.join()
            self._loop = asyncio.get_running_loop()
        return self._pool

    # -- reading -----------------------------------------------------------

    def try_read(self, descriptor: int, start: int, length: int) -> Buffer | None:
        """Return ``length`` bytes from ``start`` on of a descriptor's cluster,
        if they were decompressed lately."""
        if descriptor in self._cache or self._try_load(descriptor):
            return self._cached(descriptor, start, length)
        return None

    def _cached(self, descriptor: int, start: int, length: int) -> Buffer | None:
        """Do as `try_read` does, of what is kept."""
        plain = self._cache.pop(descriptor, None)
        if plain is None:
            return None
        self._cache[descriptor] = plain
        return memoryview(plain)[start : start + length]

    async def read(self, descriptor: int, start: int, length: int) -> Buffer:
        """Return ``length`` bytes from ``start`` on of a descriptor's cluster.

        Raises `BlockError` (EIO) if it can't be decompressed.
        """
        found = self.try_read(descriptor, start, length)
        while found is None:
            running = self._loading.get(descriptor)
            if running is None:
                (plain,) = await self._load((descriptor,), (descriptor,))
                if isinstance(plain, BlockError):
                    raise plain
                return memoryview(plain)[start : start + length]
            # Others wait for it, too: it must outlive this task.
            await asyncio.shield(running)
            # If it is not there now, nobody but us will find out why.
            found = self._cached(descriptor, start, length)
        return found

    async def read_all(self, places: Sequence[Place]) -> AsyncIterator[Buffer]:
        """Do as `read` does for one place after the other, all of them at
        once: in groups, so that they share the hop to a thread and back."""
        cached: dict[int, Buffer] = {}
        missing = []
        for place in places:
            descriptor = place[0]
            plain = self._cache.get(descriptor)
            if plain is not None:
                cached[descriptor] = plain
            elif descriptor not in self._loading:
                missing.append(place)
        groups = _batched(missing, self._group)
        loads = [asyncio.create_task(self._load_group(group)) for group in groups[1:]]
        try:
            if loads:
                # They are on their way to the threads, the first one is for us.
                await asyncio.sleep(0)
            if groups:
                inline = self._take_inline(len(groups[0]))
                first = self._load_group(groups[0], inline=inline)
                loads.insert(0, asyncio.create_task(first))
            sources = dict(_sources(loads, groups))
            for descriptor, start, length in places:
                plain = cached.get(descriptor)
                if plain is None and descriptor in sources:
                    load, index = sources[descriptor]
                    loaded = (await load)[index]
                    if isinstance(loaded, BlockError):
                        raise loaded
                    plain = loaded
                if plain is None:
                    yield await self.read(descriptor, start, length)
                else:
                    yield memoryview(plain)[start : start + length]
        finally:
            for load in loads:
                load.cancel()
            # They read what may be freed as soon as the request has ended.
            await asyncio.gather(*loads, return_exceptions=True)

    def source(self, descriptor: int) -> "ClusterSource | None":
        """See `FormatDriver.compressed_source`."""
        storage = self._image.storage
        if not storage.reads_in_threads:
            return None
        size = self._image.cluster_size
        return ClusterSource(
            storage, *compressed_range(descriptor, self._image.cluster_bits),
            self._decompress, size,
        )  # fmt: skip

    async def _load_group(
        self, places: Sequence[Place], *, inline: bool = False
    ) -> list[Buffer | BlockError]:
        """Load the clusters of some places.

        One that is wanted as a whole is not kept if there are many: who reads
        on and on would drive out everything else, and his memory stays in the
        processor's cache.
        """
        size = self._image.cluster_size
        many = len(places) >= _MANY
        kept = [one for one, _, length in places if not many or length < size]
        return await self._load([one for one, _, _ in places], kept, inline=inline)

    async def _load(
        self, descriptors: Sequence[int], kept: Sequence[int], *, inline: bool = False
    ) -> list[Buffer | BlockError]:
        """Return clusters, or what is wrong with them, and keep some of them.

        ``inline``: decompress them right here, and not in a thread.
        """
        loading = self._loading
        ticket = asyncio.get_running_loop().create_future()
        for descriptor in descriptors:
            loading[descriptor] = ticket
        try:
            streams = [await self._read_stream(one) for one in descriptors]
            if inline:
                clusters = self._decompress_all_blocking(streams)
            else:
                work = self._decompress_all_blocking
                clusters = await self.threads.run(work, streams)
            for descriptor, plain in zip(descriptors, clusters, strict=True):
                # Without the ticket, the space has changed hands meanwhile.
                if (
                    descriptor in kept
                    and loading.get(descriptor) is ticket
                    and not isinstance(plain, BlockError)
                ):
                    self._keep(descriptor, plain)
        finally:
            for descriptor in descriptors:
                if loading.get(descriptor) is ticket:
                    del loading[descriptor]
            ticket.set_result(None)
        return clusters

    async def _read_stream(self, descriptor: int) -> Buffer:
        storage = self._image.storage
        offset, length = compressed_range(descriptor, self._image.cluster_bits)
        data = storage.try_pread(offset, length)
        if data is None:
            storage.announce("read_compressed")
            data = await storage.pread(offset, length)
        return data

    def _decompress_all_blocking(
        self, streams: Sequence[Buffer]
    ) -> list[Buffer | BlockError]:
        clusters: list[Buffer | BlockError] = []
        for stream in streams:
            try:
                clusters.append(self._decompress(stream, self._image.cluster_size))
            except BlockError as error:
                clusters.append(error)
        return clusters

    def _try_load(self, descriptor: int) -> bool:
        """Decompress a cluster right here, and keep it; False if a thread should
        do that. One that is free begins at once: by the time that a coroutine
        came to it, the loop might have done its own share."""
        image = self._image
        if descriptor in self._loading or self._loop is None:
            return False
        inline = self._take_inline(1)
        if not inline and self.threads.is_saturated():
            return False
        offset, length = compressed_range(descriptor, image.cluster_bits)
        data = image.storage.try_pread(offset, length)
        if data is None:
            return False
        if not inline:
            self._start_load(descriptor, data)
            return False
        try:
            plain = self._decompress(data, image.cluster_size)
        except BlockError:
            # The coroutine finds the same, and raises it.
            return False
        self._keep(descriptor, plain)
        return True

    def _start_load(self, descriptor: int, stream: Buffer) -> None:
        """Have a thread decompress a cluster, to be kept; `read` waits for that."""
        assert self._loop is not None
        ticket = self._loop.create_future()
        self.threads.start(
            partial(self._end_load, descriptor, ticket),
            self._decompress_all_blocking,
            (stream,),
        )
        # Now that it will be kept: there may be no thread to be had.
        self._loading[descriptor] = ticket

    def _end_load(
        self,
        descriptor: int,
        ticket: "asyncio.Future[None]",
        clusters: Sequence[Buffer | BlockError] | None,
    ) -> None:
        # Without the ticket, the space has changed hands meanwhile.
        if self._loading.get(descriptor) is ticket:
            del self._loading[descriptor]
            # Of what is not kept `read` finds out by itself what is wrong.
            if clusters is not None and not isinstance(clusters[0], BlockError):
                self._keep(descriptor, clusters[0])
        ticket.set_result(None)

    def _take_inline(self, nb_clusters: int) -> bool:
        """Whether the loop should decompress so many clusters by itself.

        It does with the first ones of a turn, and while the threads have enough
        to do: a hop to a thread costs as much as half a cluster. But others
        want a turn, too.
        """
        if self._loop is None:
            return False
        if self._turn is None:
            self._turn = self._loop.call_soon(self._next_turn)
        elif not self.threads.is_saturated():
            return False
        if self._inline_left <= 0:
            return False
        self._inline_left -= nb_clusters * self._image.cluster_size
        return True

    def _next_turn(self) -> None:
        self._turn = None
        self._inline_left = self._inline_bytes

    def _keep(self, descriptor: int, plain: Buffer) -> None:
        cache = self._cache
        self._nb_bytes += len(plain) - len(cache.pop(descriptor, b""))
        cache[descriptor] = plain
        while self._nb_bytes > self._share.nb_bytes and len(cache) > 1:
            self._nb_bytes -= len(cache.pop(next(iter(cache))))

    def drop(self, descriptor: int) -> None:
        """What was read from a descriptor's space is no longer there."""
        self._loading.pop(descriptor, None)
        self._nb_bytes -= len(self._cache.pop(descriptor, b""))

    def forget(self, descriptor: int) -> None:
        """A descriptor has lost a user: its space may go to others now."""
        self.drop(descriptor)
        offset, length = compressed_range(descriptor, self._image.cluster_bits)
        self._image.refcounts.stop_packing(offset, length)

    async def close(self) -> None:
        """Let go of the worker threads, and of the memory."""
        self._share.leave()
        self._cache.clear()
        self._nb_bytes = 0
        if self._pool is not None:
            await self._pool.close()
            self._pool = None


class ClusterSource:
    """One compressed cluster, to be read in a worker thread."""

    __slots__ = ("_decompress", "_length", "_offset", "_size", "_storage")

    def __init__(
        self,
        storage: StorageDriver,
        offset: int,
        length: int,
        decompress: "Decompress",
        size: int,
    ) -> None:
        """Its stream is ``length`` bytes at ``offset``, and it has ``size``."""
        self._storage = storage
        self._offset = offset
        self._length = length
        self._decompress = decompress
        self._size = size

    def pread_into_blocking(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset`` on. Raises `BlockError` (EIO)."""
        stream = bytearray(self._length)
        self._storage.pread_into_blocking(self._offset, memoryview(stream))
        plain = memoryview(self._decompress(stream, self._size))
        view[:] = plain[offset : offset + len(view)]


def _batched(places: Sequence[Place], length: int) -> list[Sequence[Place]]:
    return [places[start : start + length] for start in range(0, len(places), length)]


def _sources(
    loads: Sequence[_Load], groups: Sequence[Sequence[Place]]
) -> Iterator[tuple[int, tuple[_Load, int]]]:
    """Yield each descriptor of the groups, which load has it, and where there."""
    for load, group in zip(loads, groups, strict=True):
        for index, (descriptor, _, _) in enumerate(group):
            yield descriptor, (load, index)

"""Guest data that is encrypted, as a storage driver over the one that has it.

Formats give it to the block layer as their ``data``: bytes are plain above it
and encrypted below. It is for whole clusters and what overwrites parts of
them; metadata does not go through it.
"""

import time
from typing import Final

from nbdqcow.block.driver import FormatDriver
from nbdqcow.block.inflight import InFlightRanges
from nbdqcow.block.storage import StorageDriver
from nbdqcow.crypto.sectors import DecryptBatch, SectorCipher
from nbdqcow.errors import NotSupported
from nbdqcow.pool import Pool
from nbdqcow.types import DATA, Buffer, Buffers, Run
from nbdqcow.units import SECTOR_SIZE, KiB, MiB, round_up

_MAX_INLINE: Final = 64 * KiB
"""Bytes that are worked on at once, in about 50 us; more goes to a thread,
and to no more than one for each request: it is quicker so."""

_PIECE: Final = MiB
"""Bytes of a write that are encrypted at a time."""

_DECLINED_PAUSE: Final = 0.02
"""Seconds for which inline writes are not tried once the storage below has
declined one: what was encrypted for it is lost."""

_OFFSET_BITS: Final = 64
_OFFSET_MASK: Final = (1 << _OFFSET_BITS) - 1


def tag_offset(host_offset: int, guest_offset: int) -> int:
    """Return ``host_offset`` so that an `EncryptedStorage` numbers the sectors
    by the guest's offsets.

    The guest's distance stands in the bits above the offset, so adding bytes
    to the result still gives what belongs to those bytes.
    """
    distance = (guest_offset - host_offset) & _OFFSET_MASK
    return host_offset | distance << _OFFSET_BITS


def number_by_guest_offset(image: FormatDriver) -> None:
    """Make an image's maps give what legacy encryption needs to know: the vector
    of a sector is its number on the virtual disk. Plans of writes are the
    driver's to tag."""
    map_plain, try_map_plain = image.map, image.try_map
    try_map_write_plain = image.try_map_write

    def tag(offset: int, run: Run) -> Run:
        kind, host_offset, length = run
        if kind == DATA:
            host_offset = tag_offset(host_offset, offset)
        return kind, host_offset, length

    def try_map(offset: int, length: int) -> Run | None:
        run = try_map_plain(offset, length)
        return run if run is None else tag(offset, run)

    async def map_(offset: int, length: int) -> Run:
        return tag(offset, await map_plain(offset, length))

    def try_map_write(offset: int, length: int) -> int:
        host_offset = try_map_write_plain(offset, length)
        return host_offset if host_offset < 0 else tag_offset(host_offset, offset)

    image.try_map = try_map  # type: ignore[method-assign]
    image.map = map_  # type: ignore[method-assign]
    image.try_map_write = try_map_write  # type: ignore[method-assign]


class EncryptedStorage(StorageDriver):
    """Sectors of another storage driver, decrypted.

    Sectors are numbered by their place in the file, or, where a caller has
    used `tag_offset`, in the guest's disk. The driver below is not closed.

    A sector that is half old and half new below would decrypt to neither, and
    a write of a few bytes writes others anew. So reads and writes of one
    sector keep out of each other's way here, as writes do among themselves.
    """

    name = "encrypted"
    defers_reads = True

    def __init__(self, storage: StorageDriver, cipher: SectorCipher) -> None:
        self._storage = storage
        self._cipher = cipher
        self.filename = storage.filename
        self.read_only = storage.read_only
        # What was never written does not read as zeroes, once decrypted.
        self.zero_beyond_end = False
        self._pool: Pool | None = None
        self._reads = InFlightRanges()
        self._writes = InFlightRanges()
        self._inline_resume_at = 0.0
        self._batch = DecryptBatch(cipher)

    @property
    def length(self) -> int:  # type: ignore[override]
        """Bytes in the file below."""
        return self._storage.length

    # -- reading -----------------------------------------------------------

    def try_pread(self, offset: int, length: int) -> Buffer | None:
        """See `StorageDriver.try_pread`."""
        if length > _MAX_INLINE:
            return None
        head = offset % SECTOR_SIZE
        found = self._try_sectors(offset - head, round_up(head + length, SECTOR_SIZE))
        if found is None:
            return None
        return self._cipher.decrypt_blocking(*found)[head : head + length]

    def try_pread_later(self, offset: int, length: int) -> Buffer | None:
        """See `StorageDriver.try_pread_later`."""
        head = offset % SECTOR_SIZE
        whole = round_up(head + length, SECTOR_SIZE)
        if whole > _MAX_INLINE:
            return None
        found = self._try_sectors(offset - head, whole)
        if found is None:
            return None
        plain = self._batch.add(*found)
        return plain if whole == length else plain[head : head + length]

    def _try_sectors(self, offset: int, length: int) -> tuple[int, Buffer] | None:
        """Return the number of the first of some whole sectors, and their bytes as
        they are below, if neither a write nor the storage is in the way."""
        host_offset, sector = _locate(offset)
        if self._writes and self._writes.find(host_offset, host_offset + length):
            return None
        data = self._storage.try_pread(host_offset, length)
        return None if data is None else (sector, data)

    def finish_reads(self) -> None:
        """See `StorageDriver.finish_reads`."""
        self._batch.finish()

    async def pread(self, offset: int, length: int) -> Buffer:
        """See `StorageDriver.pread`."""
        head = offset % SECTOR_SIZE
        whole = round_up(head + length, SECTOR_SIZE)
        start, _ = _locate(offset - head)
        end = start + whole
        while (busy := self._writes.find(start, end)) is not None:
            await busy.wait()
        in_flight = self._reads.add(start, end)
        try:
            plain = await self._read_sectors(offset - head, whole)
        finally:
            self._reads.remove(in_flight)
        return plain[head : head + length]

    async def _read_sectors(self, offset: int, length: int) -> memoryview:
        host_offset, sector = _locate(offset)
        data: Buffer | None = self._storage.try_pread(host_offset, length)
        if data is None:
            data = await self._storage.pread(host_offset, length)
        if length <= _MAX_INLINE:
            return self._cipher.decrypt_blocking(sector, data)
        return await self._threads().run(self._cipher.decrypt_blocking, sector, data)

    async def prefetch(self, offset: int, length: int) -> None:
        """See `StorageDriver.prefetch`."""
        await self._storage.prefetch(_locate(offset)[0], length)

    # -- writing -----------------------------------------------------------

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        """See `StorageDriver.try_pwrite`."""
        length = len(data)
        if length > _MAX_INLINE or (offset | length) % SECTOR_SIZE:
            return False
        host_offset, sector = _locate(offset)
        for busy in (self._writes, self._reads):
            if busy and busy.find(host_offset, host_offset + length):
                return False
        if time.perf_counter() < self._inline_resume_at:
            return False
        encrypted = self._cipher.encrypt_blocking(sector, data)
        if self._storage.try_pwrite(host_offset, encrypted):
            return True
        self._inline_resume_at = time.perf_counter() + _DECLINED_PAUSE
        return False

    async def pwritev(
        self, offset: int, buffers: Buffers, *, fua: bool = False
    ) -> None:
        """See `StorageDriver.pwritev`.

        Writes that share a sector go one after the other, or one that has to
        read a sector, change and write it would undo another.
        """
        data = buffers[0] if len(buffers) == 1 else b"".join(buffers)
        head = offset % SECTOR_SIZE
        start, _ = _locate(offset - head)
        end = start + round_up(head + len(data), SECTOR_SIZE)
        while (busy := self._writes.find(start, end)) is not None:
            await busy.wait()
        in_flight = self._writes.add(start, end)
        try:
            # Reads that come from now on wait for this write.
            while (busy := self._reads.find(start, end)) is not None:
                await busy.wait()
            if (offset | len(data)) % SECTOR_SIZE:
                data = await self._complete_sectors(offset, data)
            await self._write_sectors(offset - head, memoryview(data), fua)
        finally:
            self._writes.remove(in_flight)

    async def _complete_sectors(self, offset: int, data: Buffer) -> bytes:
        """Return whole sectors: ``data`` and what stands beside it."""
        head = offset % SECTOR_SIZE
        tail = -(head + len(data)) % SECTOR_SIZE
        before: Buffer = b""
        after: Buffer = b""
        if head:
            before = (await self._read_sectors(offset - head, SECTOR_SIZE))[:head]
        if tail:
            last = offset + len(data) + tail - SECTOR_SIZE
            after = (await self._read_sectors(last, SECTOR_SIZE))[SECTOR_SIZE - tail :]
        return b"".join((before, data, after))

    async def _write_sectors(self, offset: int, view: memoryview, fua: bool) -> None:
        for start in range(0, len(view), _PIECE):
            piece = view[start : start + _PIECE]
            host_offset, sector = _locate(offset + start)
            encrypt = self._cipher.encrypt_blocking
            if len(piece) <= _MAX_INLINE:
                encrypted = encrypt(sector, piece)
            else:
                encrypted = await self._threads().run(encrypt, sector, piece)
            await self._storage.pwritev(host_offset, [encrypted], fua=fua)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, no_fallback: bool = False
    ) -> None:
        """See `StorageDriver.write_zeroes`: they are encrypted as any bytes."""
        if no_fallback:
            raise NotSupported("zeroes of an encrypted image must be written out")
        for start in range(0, length, _PIECE):
            await self.pwritev(offset + start, [bytes(min(_PIECE, length - start))])

    async def discard(self, offset: int, length: int) -> None:
        """See `StorageDriver.discard`: nothing is done. A hole decrypts to noise,
        and after a power cut the image may still say that data is there."""

    async def flush(self) -> None:
        """See `StorageDriver.flush`."""
        await self._storage.flush()

    async def truncate(self, length: int) -> None:
        """See `StorageDriver.truncate`; what is new does not read as zeroes."""
        await self._storage.truncate(length)

    def _threads(self) -> Pool:
        if self._pool is None:
            self._pool = Pool()
        return self._pool

    async def reopen(self, *, read_only: bool) -> None:
        """See `StorageDriver.reopen`; the storage below is reopened by itself."""
        self.read_only = read_only

    async def close(self) -> None:
        """Let go of the threads. The file stays open."""
        if self._pool is not None:
            await self._pool.close()


def _locate(offset: int) -> tuple[int, int]:
    """Return offset in the file, and sector number, of an aligned offset."""
    host_offset = offset & _OFFSET_MASK
    numbered = (host_offset + (offset >> _OFFSET_BITS)) & _OFFSET_MASK
    return host_offset, numbered // SECTOR_SIZE

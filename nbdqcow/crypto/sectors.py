"""What the ciphers of disks share: sectors in, sectors out, in any thread.

AES goes through a megabyte nearly as fast as memory does, but not a sector at
a time: each has a vector of its own, and setting up a cipher for it costs 3 us.
So the ciphers here do the part that depends on the vectors for many sectors at
once, and have AES itself in ECB mode for the rest.
"""

from abc import ABC, abstractmethod
from typing import Final

import numpy as np

from nbdqcow.crypto.iv import MAX_SECTORS, Sectors, Words, fill_numbers
from nbdqcow.types import Buffer
from nbdqcow.units import SECTOR_SIZE

BLOCK_LENGTH: Final = 16
SECTOR_BLOCKS: Final = SECTOR_SIZE // BLOCK_LENGTH
SECTOR_WORDS: Final = SECTOR_SIZE // 8
CHUNK_SECTORS: Final = MAX_SECTORS
"""Sectors taken at once: their bytes and scratch arrays stay in cache."""

CHUNK_LENGTH: Final = CHUNK_SECTORS * SECTOR_SIZE

UPDATE_SLACK: Final = BLOCK_LENGTH - 1
"""Bytes that ``update_into`` wants room for behind its output."""


class SectorWorker(ABC):
    """The state that one thread needs to work with one cipher and key."""

    @abstractmethod
    def encrypt(self, sectors: Sectors, source: Words, target: Words) -> None:
        """Encrypt at most `CHUNK_SECTORS` sectors.

        ``source`` and ``target`` are contiguous, dtype ``<u8``, and do not
        overlap.
        """

    @abstractmethod
    def decrypt(self, sectors: Sectors, source: Words, target: Words) -> None:
        """Decrypt likewise."""


class SectorCipher(ABC):
    """A cipher with a key, for sectors of `SECTOR_SIZE` bytes.

    Any number of threads may use it at once; the work is done outside of the
    interpreter's lock for the most part.
    """

    def __init__(self) -> None:
        self._idle_workers: list[SectorWorker] = []

    @abstractmethod
    def make_worker(self) -> SectorWorker:
        """Return new state for one more thread."""

    def encrypt_blocking(self, sector: int, data: Buffer) -> memoryview:
        """Return ``data``, whole sectors from number ``sector`` on, encrypted."""
        return self._work(sector, data, encrypt=True)

    def decrypt_blocking(self, sector: int, data: Buffer) -> memoryview:
        """Return ``data``, whole sectors from number ``sector`` on, decrypted."""
        return self._work(sector, data, encrypt=False)

    def _work(self, sector: int, data: Buffer, *, encrypt: bool) -> memoryview:
        length = len(data)
        if length % SECTOR_SIZE:
            raise ValueError(f"{length} bytes are not whole sectors")
        source = np.frombuffer(data, "<u8")
        target = np.empty(length // 8, "<u8")
        try:
            worker = self._idle_workers.pop()
        except IndexError:
            worker = self.make_worker()
        work = worker.encrypt if encrypt else worker.decrypt
        if length <= CHUNK_LENGTH:
            work(sector, source, target)
        else:
            for start in range(0, len(source), CHUNK_LENGTH // 8):
                stop = start + CHUNK_LENGTH // 8
                work(sector, source[start:stop], target[start:stop])
                sector += CHUNK_SECTORS
        # After a failure the worker is not used again.
        self._idle_workers.append(worker)
        return target.view("u1").data


class DecryptBatch:
    """Reads of an event loop's turn, decrypted all at once at its end.

    Setting up for a few sectors takes longer than the work on them.
    """

    def __init__(self, cipher: SectorCipher) -> None:
        self._worker = cipher.make_worker()
        self._source: Words = np.empty(CHUNK_LENGTH, "u1")
        self._numbers: Words = np.empty(CHUNK_SECTORS, "<u8")
        self._target: Words = np.empty(0, "u1")
        self._nb_sectors = 0

    def add(self, sector: int, data: Buffer) -> memoryview:
        """Take ``data``, at most `CHUNK_LENGTH` bytes of whole sectors from
        number ``sector`` on; return where it will be plain after `finish`."""
        start = self._nb_sectors * SECTOR_SIZE
        stop = start + len(data)
        if stop > CHUNK_LENGTH:
            self.finish()
            start, stop = 0, len(data)
        if not start:
            self._target = np.empty(CHUNK_LENGTH, "u1")
        first, end = start // SECTOR_SIZE, stop // SECTOR_SIZE
        self._source.data[start:stop] = data
        fill_numbers(sector, self._numbers[first:end])
        self._nb_sectors = end
        return self._target.data[start:stop]

    def finish(self) -> None:
        """Fill in all that `add` has promised."""
        nb_sectors, self._nb_sectors = self._nb_sectors, 0
        if nb_sectors:
            self._worker.decrypt(
                self._numbers[:nb_sectors],
                self._source[: nb_sectors * SECTOR_SIZE].view("<u8"),
                self._target[: nb_sectors * SECTOR_SIZE].view("<u8"),
            )

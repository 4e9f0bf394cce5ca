"""AES-XTS for many sectors at once.

Source: IEEE Std 1619-2007, 5.3 and 5.4. The key is two AES keys: data, then
tweak. A sector of 512 bytes needs no ciphertext stealing.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from nbdqcow.crypto.iv import IvGenerator, Words
from nbdqcow.crypto.sectors import (
    BLOCK_LENGTH,
    CHUNK_SECTORS,
    SECTOR_BLOCKS,
    SECTOR_WORDS,
    UPDATE_SLACK,
    SectorCipher,
    SectorWorker,
)
from nbdqcow.types import Buffer
from nbdqcow.units import SECTOR_SIZE

KEY_LENGTHS: Final = (32, 48, 64)
"""Bytes of the two AES keys together."""

_POWERS: Final = np.arange(SECTOR_BLOCKS, dtype="<u8")
_REST: Final = np.uint64(64) - _POWERS
_1, _2, _7 = (np.uint64(shift) for shift in (1, 2, 7))


class XtsCipher(SectorCipher):
    """AES-XTS; a sector's vector is its tweak before encryption."""

    def __init__(self, key: bytes, make_ivs: Callable[[], IvGenerator]) -> None:
        """``key`` has one of `KEY_LENGTHS`."""
        super().__init__()
        if len(key) not in KEY_LENGTHS:
            raise ValueError(f"an AES-XTS key can't have {len(key)} bytes")
        self._key = key
        self._make_ivs = make_ivs

    def make_worker(self) -> SectorWorker:
        """See `SectorCipher.make_worker`."""
        return _XtsWorker(self._key, self._make_ivs())


class _XtsWorker(SectorWorker):
    def __init__(self, key: bytes, ivs: IvGenerator) -> None:
        half = len(key) // 2
        data_key, tweak_key = key[:half], key[half:]
        cipher = Cipher(algorithms.AES(data_key), modes.ECB())
        self._encrypt_blocks = cipher.encryptor().update_into
        self._decrypt_blocks = cipher.decryptor().update_into
        tweak_cipher = Cipher(algorithms.AES(tweak_key), modes.ECB())
        self._encrypt_tweaks = tweak_cipher.encryptor().update_into
        self._ivs = ivs
        self._memory = _Memory(CHUNK_SECTORS)
        # Slicing costs as much as the work on a slice of 4 KiB.
        self._slices: dict[int, _Memory] = {}

    def encrypt(self, sector: int, source: Words, target: Words) -> None:
        """See `SectorWorker.encrypt`."""
        self._crypt(sector, source, target, self._encrypt_blocks)

    def decrypt(self, sector: int, source: Words, target: Words) -> None:
        """See `SectorWorker.decrypt`."""
        self._crypt(sector, source, target, self._decrypt_blocks)

    def _crypt(
        self,
        sector: int,
        source: Words,
        target: Words,
        update_into: Callable[[Buffer, Buffer], int],
    ) -> None:
        nb_sectors = len(source) // SECTOR_WORDS
        memory = self._slices.get(nb_sectors)
        if memory is None:
            memory = self._slices[nb_sectors] = _Memory(nb_sectors, self._memory)
        self._ivs(sector, memory.vectors)
        self._encrypt_tweaks(memory.vector_bytes, memory.first_room)
        memory.expand_tweaks()
        np.bitwise_xor(source, memory.mask, out=memory.before)
        update_into(memory.before_bytes, memory.after_room)
        np.bitwise_xor(memory.after, memory.mask, out=target)


class _Memory:
    """Scratch arrays for a number of sectors, in all the shapes they are used.

    Attributes:
        vectors, vector_bytes: of each sector, before encryption.
        first, first_room: the tweaks of each sector's first block; and with
            the room that encrypting to there needs.
        tweaks, mask: of all blocks, shape (n, SECTOR_BLOCKS, 2), and flat.
        before, after: of AES; ``before_bytes`` and ``after_room`` for it.
    """

    def __init__(self, nb_sectors: int, whole: "_Memory | None" = None) -> None:
        """Without ``whole`` take memory, else share that of ``whole``."""
        length = nb_sectors * SECTOR_SIZE
        vectors_length = nb_sectors * BLOCK_LENGTH
        if whole is None:
            self.vectors: Words = np.zeros((nb_sectors, 2), "<u8")
            self._first_bytes: Words = np.empty(vectors_length + UPDATE_SLACK, "u1")
            self.tweaks = np.empty((nb_sectors, SECTOR_BLOCKS, 2), "<u8")
            self._planes = np.empty((3, nb_sectors, SECTOR_BLOCKS), "<u8")
            self.before = np.empty(nb_sectors * SECTOR_WORDS, "<u8")
            self._after_bytes: Words = np.empty(length + UPDATE_SLACK, "u1")
        else:
            self.vectors = whole.vectors[:nb_sectors]
            self._first_bytes = whole._first_bytes[: vectors_length + UPDATE_SLACK]
            self.tweaks = whole.tweaks[:nb_sectors]
            self._planes = whole._planes[:, :nb_sectors]
            self.before = whole.before[: nb_sectors * SECTOR_WORDS]
            self._after_bytes = whole._after_bytes[: length + UPDATE_SLACK]
        first, after = self._first_bytes, self._after_bytes
        self.vector_bytes: Buffer = self.vectors.view("u1").reshape(-1).data
        self.first_room: Buffer = first.data
        self.first = first[:vectors_length].view("<u8").reshape(-1, 2)
        self.mask = self.tweaks.reshape(-1)
        self.before_bytes: Buffer = self.before.view("u1").data
        self.after_room: Buffer = after.data
        self.after = after[:length].view("<u8")
        self._first_low, self._first_high = self.first[:, :1], self.first[:, 1:]
        self._low, self._high = self.tweaks[:, :, 0], self.tweaks[:, :, 1]
        self._plane, self._carry, self._shifted = self._planes

    def expand_tweaks(self) -> None:
        """Make the tweaks of all blocks from those of the first ones.

        That of block j is the first one's times x^j, in GF(2^128) modulo
        x^128 + x^7 + x^2 + x + 1. j stays below 32, so what is shifted out at
        the top comes back in at the bottom without being shifted out again:
        no block has to wait for the one before it. (A shift by 64 gives 0 in
        numpy.)
        """
        low, high = self._first_low, self._first_high
        plane, carry, shifted = self._plane, self._carry, self._shifted
        np.left_shift(high, _POWERS, out=plane)
        np.right_shift(low, _REST, out=shifted)
        np.bitwise_or(plane, shifted, out=self._high)
        np.left_shift(low, _POWERS, out=plane)
        np.right_shift(high, _REST, out=carry)
        np.bitwise_xor(plane, carry, out=plane)
        np.left_shift(carry, _1, out=shifted)
        np.bitwise_xor(plane, shifted, out=plane)
        np.left_shift(carry, _2, out=shifted)
        np.bitwise_xor(plane, shifted, out=plane)
        np.left_shift(carry, _7, out=shifted)
        np.bitwise_xor(plane, shifted, out=self._low)

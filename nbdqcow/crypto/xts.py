"""AES-XTS for many sectors at once.

Source: IEEE Std 1619-2007, 5.3 and 5.4. The key is two AES keys: data, then
tweak. A sector of 512 bytes needs no ciphertext stealing.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from nbdqcow.crypto.iv import IvGenerator, Sectors, Words
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
_7: Final = np.uint64(7)


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

    def encrypt(self, sectors: Sectors, source: Words, target: Words) -> None:
        """See `SectorWorker.encrypt`."""
        self._crypt(sectors, source, target, self._encrypt_blocks)

    def decrypt(self, sectors: Sectors, source: Words, target: Words) -> None:
        """See `SectorWorker.decrypt`."""
        self._crypt(sectors, source, target, self._decrypt_blocks)

    def _crypt(
        self,
        sectors: Sectors,
        source: Words,
        target: Words,
        update_into: Callable[[Buffer, Buffer], int],
    ) -> None:
        nb_sectors = len(source) // SECTOR_WORDS
        memory = self._slices.get(nb_sectors)
        if memory is None:
            memory = self._slices[nb_sectors] = _Memory(nb_sectors, self._memory)
        self._ivs(sectors, memory.vectors)
        self._encrypt_tweaks(memory.vector_bytes, memory.first_room)
        memory.expand_tweaks()
        np.bitwise_xor(source, memory.mask, out=memory.before)
        update_into(memory.before_bytes, memory.after_room)
        np.bitwise_xor(memory.after, memory.mask, out=target)


class _Memory:
    """Scratch arrays for a number of sectors, in all the shapes they are used.

    Attributes:
        vectors, vector_bytes: of each sector, before encryption.
        first_room: where the tweaks of the sectors' first blocks go, with the
            room that encrypting to there needs.
        mask: the tweaks of all blocks.
        before, after: of AES; ``before_bytes`` and ``after_room`` for it.
    """

    def __init__(self, nb_sectors: int, whole: "_Memory | None" = None) -> None:
        """Without ``whole`` take memory, else share that of ``whole``."""
        length = nb_sectors * SECTOR_SIZE
        nb_blocks = nb_sectors * SECTOR_BLOCKS
        vectors_length = nb_sectors * BLOCK_LENGTH
        if whole is None:
            self.vectors: Words = np.zeros((nb_sectors, 2), "<u8")
            self._first_bytes: Words = np.empty(vectors_length + UPDATE_SLACK, "u1")
            self.mask: Words = np.empty(nb_blocks * 2, "<u8")
            self._flat: Words = np.empty((4, nb_blocks * 2), "<u8")
            self.before: Words = np.empty(nb_sectors * SECTOR_WORDS, "<u8")
            self._after_bytes: Words = np.empty(length + UPDATE_SLACK, "u1")
            self._powers: Words = np.tile(_POWERS, 2 * nb_sectors)
            self._rests: Words = np.tile(_REST, 2 * nb_sectors)
        else:
            self.vectors = whole.vectors[:nb_sectors]
            self._first_bytes = whole._first_bytes[: vectors_length + UPDATE_SLACK]
            self.mask = whole.mask[: nb_blocks * 2]
            self._flat = whole._flat[:, : nb_blocks * 2]
            self.before = whole.before[: nb_sectors * SECTOR_WORDS]
            self._after_bytes = whole._after_bytes[: length + UPDATE_SLACK]
            self._powers = whole._powers[: nb_blocks * 2]
            self._rests = whole._rests[: nb_blocks * 2]
        first, after = self._first_bytes, self._after_bytes
        self.vector_bytes: Buffer = self.vectors.view("u1").reshape(-1).data
        self.first_room: Buffer = first.data
        self.before_bytes: Buffer = self.before.view("u1").data
        self.after_room: Buffer = after.data
        self.after = after[:length].view("<u8")
        self._take_first = first[:vectors_length].view("<u8").take
        # For each block the high word of its sector's first tweak; behind
        # them the low words.
        low = np.repeat(np.arange(nb_sectors) * 2, SECTOR_BLOCKS)
        self._places = np.concatenate((low + 1, low))
        self._words, self._up, self._down, work = self._flat
        self._high_up, self._low_up = self._up[:nb_blocks], self._up[nb_blocks:]
        self._carry, self._low_down = self._down[:nb_blocks], self._down[nb_blocks:]
        self._low, self._shifted = work[:nb_blocks], work[nb_blocks:]
        self._mask_low, self._mask_high = self.mask[::2], self.mask[1::2]

    def expand_tweaks(self) -> None:
        """Make the tweaks of all blocks from those of the first ones.

        That of block j is the first one's times x^j, in GF(2^128) modulo
        x^128 + x^7 + x^2 + x + 1. j stays below 32, so what is shifted out at
        the top comes back in at the bottom without being shifted out again:
        no block has to wait for the one before it. (A shift by 64 gives 0 in
        numpy.) For a few sectors the calls cost more than the work, so there
        are few of them, on flat arrays.
        """
        low, shifted, carry = self._low, self._shifted, self._carry
        self._take_first(self._places, None, self._words, "clip")
        np.left_shift(self._words, self._powers, self._up)
        np.right_shift(self._words, self._rests, self._down)
        np.bitwise_or(self._high_up, self._low_down, self._mask_high)
        np.bitwise_xor(self._low_up, carry, low)
        np.add(carry, carry, shifted)
        np.bitwise_xor(low, shifted, low)
        np.add(shifted, shifted, shifted)
        np.bitwise_xor(low, shifted, low)
        np.left_shift(carry, _7, shifted)
        np.bitwise_xor(low, shifted, self._mask_low)

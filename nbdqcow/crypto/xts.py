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
    CHUNK_LENGTH,
    CHUNK_SECTORS,
    SECTOR_BLOCKS,
    UPDATE_SLACK,
    SectorCipher,
    SectorWorker,
)
from nbdqcow.types import Buffer
from nbdqcow.units import SECTOR_SIZE

KEY_LENGTHS: Final = (32, 48, 64)
"""Bytes of the two AES keys together."""

_FEW_SECTORS: Final = 2
"""Sectors up to which one cipher object for each is quicker."""

_POWERS: Final = np.arange(SECTOR_BLOCKS, dtype="<u8")
_REST: Final = np.uint64(64) - _POWERS
_1, _2, _7 = (np.uint64(shift) for shift in (1, 2, 7))


def expand_tweaks(first: Words, tweaks: Words) -> None:
    """Fill in the tweaks of all blocks of some sectors.

    ``first`` are those of block 0, shape (n, 2); ``tweaks``, shape
    (n, SECTOR_BLOCKS, 2), gets block 0's times x^j for each block j, in
    GF(2^128) modulo x^128 + x^7 + x^2 + x + 1.

    j stays below 32, so what is shifted out at the top comes back in at the
    bottom without being shifted out again: no block has to wait for the one
    before it. (A shift by 64 gives 0 in numpy.)
    """
    low, high = first[:, :1], first[:, 1:]
    carry = high >> _REST
    np.left_shift(low, _POWERS, out=tweaks[:, :, 0])
    tweaks[:, :, 0] ^= carry ^ (carry << _1) ^ (carry << _2) ^ (carry << _7)
    np.bitwise_or(high << _POWERS, low >> _REST, out=tweaks[:, :, 1])


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
        self._encrypt_tweaks = tweak_cipher.encryptor().update
        self._ivs = ivs
        # What `cryptography` lacks as XTS are 192-bit keys and equal halves.
        self._whole = (
            algorithms.AES(key) if half != 24 and data_key != tweak_key else None
        )
        self._tweaks = np.empty((CHUNK_SECTORS, SECTOR_BLOCKS, 2), "<u8")
        self._before = np.empty(CHUNK_LENGTH, "u1")
        self._after = np.empty(CHUNK_LENGTH + UPDATE_SLACK, "u1")

    def encrypt(self, sector: int, source: Words, target: Words) -> None:
        """See `SectorWorker.encrypt`."""
        if self._whole is not None and len(source) <= _FEW_SECTORS * SECTOR_SIZE:
            self._crypt_few(sector, source, target, encrypt=True)
        else:
            self._crypt(sector, source, target, self._encrypt_blocks)

    def decrypt(self, sector: int, source: Words, target: Words) -> None:
        """See `SectorWorker.decrypt`."""
        if self._whole is not None and len(source) <= _FEW_SECTORS * SECTOR_SIZE:
            self._crypt_few(sector, source, target, encrypt=False)
        else:
            self._crypt(sector, source, target, self._decrypt_blocks)

    def _crypt(
        self,
        sector: int,
        source: Words,
        target: Words,
        update_into: Callable[[Buffer, Buffer], int],
    ) -> None:
        length = len(source)
        nb_sectors = length // SECTOR_SIZE
        ivs = self._ivs(sector, nb_sectors)
        first = np.frombuffer(
            self._encrypt_tweaks(ivs.view("u1").reshape(-1).data), "<u8"
        )
        tweaks = self._tweaks[:nb_sectors]
        expand_tweaks(first.reshape(-1, 2), tweaks)
        mask = tweaks.reshape(-1)
        before = self._before[:length]
        np.bitwise_xor(source.view("<u8"), mask, out=before.view("<u8"))
        update_into(before.data, self._after[: length + UPDATE_SLACK].data)
        np.bitwise_xor(self._after[:length].view("<u8"), mask, out=target.view("<u8"))

    def _crypt_few(
        self, sector: int, source: Words, target: Words, *, encrypt: bool
    ) -> None:
        assert self._whole is not None
        ivs = self._ivs(sector, len(source) // SECTOR_SIZE)
        for index, iv in enumerate(ivs):
            cipher = Cipher(self._whole, modes.XTS(iv.tobytes()))
            context = cipher.encryptor() if encrypt else cipher.decryptor()
            start = index * SECTOR_SIZE
            stop = start + SECTOR_SIZE
            done = context.update(source[start:stop].data)
            target[start:stop] = np.frombuffer(done, "u1")

"""AES-CBC and AES-ECB for many sectors at once.

Decryption of CBC is ECB and an XOR with the block before, so all blocks of all
sectors go at once. Encryption needs the block before first: block j of all
sectors goes at once, then block j + 1.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from nbdqcow.crypto.iv import IvGenerator, Sectors, Words
from nbdqcow.crypto.sectors import (
    CHUNK_LENGTH,
    CHUNK_SECTORS,
    SECTOR_BLOCKS,
    SECTOR_WORDS,
    UPDATE_SLACK,
    SectorCipher,
    SectorWorker,
)
from nbdqcow.types import Buffer

_FEW_SECTORS: Final = 18
"""Sectors up to which encrypting them one by one is quicker."""


class EcbCipher(SectorCipher):
    """AES-ECB: equal blocks of a disk look equal. Only to open what is there."""

    def __init__(self, key: bytes) -> None:
        """``key`` has 16, 24 or 32 bytes."""
        super().__init__()
        self._cipher = Cipher(algorithms.AES(key), modes.ECB())

    def make_worker(self) -> SectorWorker:
        """See `SectorCipher.make_worker`."""
        return _EcbWorker(self._cipher)


class _EcbWorker(SectorWorker):
    def __init__(self, cipher: "Cipher[modes.ECB]") -> None:
        self._encrypt_blocks = cipher.encryptor().update_into
        self._decrypt_blocks = cipher.decryptor().update_into
        self._after = np.empty(CHUNK_LENGTH + UPDATE_SLACK, "u1")

    def encrypt(self, sectors: Sectors, source: Words, target: Words) -> None:
        """See `SectorWorker.encrypt`."""
        target[:] = self._update(self._encrypt_blocks, source)

    def decrypt(self, sectors: Sectors, source: Words, target: Words) -> None:
        """See `SectorWorker.decrypt`."""
        target[:] = self._update(self._decrypt_blocks, source)

    def _update(
        self, update_into: Callable[[Buffer, Buffer], int], source: Words
    ) -> Words:
        """Return the result in the scratch array, valid until the next call."""
        length = len(source) * 8
        after = self._after[: length + UPDATE_SLACK]
        update_into(source.view("u1").data, after.data)
        return after[:length].view("<u8")


class CbcCipher(SectorCipher):
    """AES-CBC, each sector a chain of its own."""

    def __init__(self, key: bytes, make_ivs: Callable[[], IvGenerator]) -> None:
        """``key`` has 16, 24 or 32 bytes."""
        super().__init__()
        self._algorithm = algorithms.AES(key)
        self._make_ivs = make_ivs

    def make_worker(self) -> SectorWorker:
        """See `SectorCipher.make_worker`."""
        return _CbcWorker(self._algorithm, self._make_ivs())


class _CbcWorker(_EcbWorker):
    def __init__(self, algorithm: algorithms.AES, ivs: IvGenerator) -> None:
        super().__init__(Cipher(algorithm, modes.ECB()))
        self._algorithm = algorithm
        self._ivs = ivs
        self._mixed = np.empty((CHUNK_SECTORS, 2), "<u8")
        self._vectors = np.zeros((CHUNK_SECTORS, 2), "<u8")

    def decrypt(self, sectors: Sectors, source: Words, target: Words) -> None:
        """See `SectorWorker.decrypt`."""
        blocks = _blocks(self._update(self._decrypt_blocks, source))
        plain = _blocks(target)
        vectors = self._vectors[: len(plain)]
        self._ivs(sectors, vectors)
        np.bitwise_xor(blocks[:, 0], vectors, out=plain[:, 0])
        np.bitwise_xor(blocks[:, 1:], _blocks(source)[:, :-1], out=plain[:, 1:])

    def encrypt(self, sectors: Sectors, source: Words, target: Words) -> None:
        """See `SectorWorker.encrypt`."""
        nb_sectors = len(source) // SECTOR_WORDS
        vectors = self._vectors[:nb_sectors]
        self._ivs(sectors, vectors)
        if nb_sectors <= _FEW_SECTORS:
            self._encrypt_few(vectors, source, target)
            return
        plain, encrypted = _blocks(source), _blocks(target)
        mixed = self._mixed[:nb_sectors]
        mixed_words = mixed.reshape(-1)
        before = vectors
        for index in range(SECTOR_BLOCKS):
            np.bitwise_xor(plain[:, index], before, out=mixed)
            done = self._update(self._encrypt_blocks, mixed_words)
            before = done.reshape(-1, 2)
            encrypted[:, index] = before

    def _encrypt_few(self, vectors: Words, source: Words, target: Words) -> None:
        for index, vector in enumerate(vectors):
            context = Cipher(self._algorithm, modes.CBC(vector.tobytes())).encryptor()
            words = slice(index * SECTOR_WORDS, (index + 1) * SECTOR_WORDS)
            done = context.update(source[words].tobytes())
            target[words] = np.frombuffer(done, "<u8")


def _blocks(words: Words) -> Words:
    """View words as sectors of blocks of two words."""
    return words.reshape(-1, SECTOR_BLOCKS, 2)

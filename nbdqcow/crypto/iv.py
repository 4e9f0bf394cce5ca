"""What tells the sectors of a disk apart: initialisation vectors.

The names are those of dm-crypt and QEMU: ``plain64`` is the sector number,
little-endian, ``plain`` its low 32 bits, ``essiv:HASH`` the number encrypted
with the hash of the disk's key.
"""

import hashlib
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from nbdqcow.errors import UnsupportedFeature

Words: TypeAlias = npt.NDArray[Any]
"""Little-endian unsigned 64-bit words, two for each block of a cipher."""

Sectors: TypeAlias = int | Words
"""Consecutive sectors by the number of the first, or the number of each."""

IvGenerator: TypeAlias = Callable[[Sectors, Words], None]
"""``generator(sectors, vectors)`` fills in the vectors of sectors, one in each
row of two words. The rows hold zeroes, or what the same generator left there.
One generator serves one thread."""

MAX_SECTORS: Final = 128
"""Rows that a generator fills in at a time."""

_COUNT: Final = np.arange(MAX_SECTORS, dtype="<u8")
_WORD_MASK: Final = 0xFFFF_FFFF_FFFF_FFFF


def fill_numbers(sector: int, numbers: Words) -> None:
    """Fill in consecutive numbers from ``sector`` on, modulo 2^64."""
    np.add(_COUNT[: len(numbers)], np.uint64(sector & _WORD_MASK), out=numbers)


def plain64(sectors: Sectors, vectors: Words) -> None:
    """Fill in the sector numbers, modulo 2^64."""
    if isinstance(sectors, int):
        fill_numbers(sectors, vectors[:, 0])
    else:
        vectors[:, 0] = sectors


def plain(sectors: Sectors, vectors: Words) -> None:
    """Fill in the sector numbers, modulo 2^32."""
    plain64(sectors, vectors)
    vectors[:, 0] &= np.uint64(0xFFFF_FFFF)


def essiv(hash_name: str, key: bytes) -> IvGenerator:
    """Return a generator of ``essiv:HASH`` for the key of a disk. The hash is
    one whose length is an AES key's."""
    salt = hashlib.new(hash_name, key).digest()
    encryptor = Cipher(algorithms.AES(salt), modes.ECB()).encryptor()

    def generate(sectors: Sectors, vectors: Words) -> None:
        numbers = np.zeros_like(vectors)
        plain64(sectors, numbers)
        encrypted = encryptor.update(numbers.view("u1").reshape(-1).data)
        vectors[:] = np.frombuffer(encrypted, "<u8").reshape(-1, 2)

    return generate


def iv_generator(name: str, hash_name: str, key: bytes) -> IvGenerator:
    """Return a generator by name; ``hash_name`` is for ``essiv`` alone.

    Raises `UnsupportedFeature` for a name that is not known.
    """
    if name == "plain64":
        return plain64
    if name == "plain":
        return plain
    if name == "essiv":
        return essiv(hash_name, key)
    raise UnsupportedFeature(f"IV generator '{name}' is not supported")

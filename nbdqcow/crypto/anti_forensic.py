"""Splitting a key so that losing any part of it loses all of it.

Source: "LUKS On-Disk Format Specification" 1.2.3, section 2.4.
"""

import hashlib
import os


def split(key: bytes, nb_stripes: int, hash_name: str) -> bytes:
    """Return ``nb_stripes`` stripes of the key's length, all but the last one
    random."""
    length = len(key)
    stripes = os.urandom(length * (nb_stripes - 1))
    mixed = _mix(stripes, length, hash_name)
    return stripes + _xor(mixed, key)


def merge(stripes: bytes, nb_stripes: int, hash_name: str) -> bytes:
    """Return the key that was split."""
    length = len(stripes) // nb_stripes
    mixed = _mix(stripes[:-length], length, hash_name)
    return _xor(mixed, stripes[-length:])


def _mix(stripes: bytes, length: int, hash_name: str) -> bytes:
    mixed = bytes(length)
    for start in range(0, len(stripes), length):
        mixed = _diffuse(_xor(mixed, stripes[start : start + length]), hash_name)
    return mixed


def _diffuse(data: bytes, hash_name: str) -> bytes:
    """Return a hash of each piece of ``data`` with its number, as long as it."""
    digest_length = hashlib.new(hash_name).digest_size
    pieces = []
    for index, start in enumerate(range(0, len(data), digest_length)):
        piece = data[start : start + digest_length]
        digest = hashlib.new(hash_name, index.to_bytes(4, "big") + piece).digest()
        pieces.append(digest[: len(piece)])
    return b"".join(pieces)


def _xor(a: bytes, b: bytes) -> bytes:
    number = int.from_bytes(a, "big") ^ int.from_bytes(b, "big")
    return number.to_bytes(len(a), "big")

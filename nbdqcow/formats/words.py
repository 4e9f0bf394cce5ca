"""Tables of big-endian 64-bit words, as both versions of qcow have them."""

from array import array
from sys import byteorder
from typing import Final

from nbdqcow.types import Buffer

_SWAP: Final = byteorder == "little"


def load_be64(data: Buffer) -> "array[int]":
    """Return the big-endian 64-bit words of ``data`` as a native array."""
    words = array("Q")
    words.frombytes(data)
    if _SWAP:
        words.byteswap()
    return words


def dump_be64(words: "array[int]") -> bytes:
    """Return ``words`` as big-endian bytes."""
    if _SWAP:
        words = words[:]
        words.byteswap()
    return words.tobytes()

"""Refcount blocks as bytes: entries of 1 to 64 bits, one at a time or all.

``*_counts`` are for a server, which may do without numpy, and ``*_refcounts``
for those who go through whole images.

Source: qcow2.txt, "Host cluster management". Entries of a byte and more are
big-endian; of smaller ones the first takes the least significant bits.
"""

from array import array
from sys import byteorder
from typing import TYPE_CHECKING, Final

from nbdqcow.types import Buffer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_TYPECODES: Final = {3: "B", 4: "H", 5: "I", 6: "Q"}


def zero_counts(order: int, nb_entries: int) -> "array[int]":
    """Return the counts of a new block, as `unpack_counts` does."""
    return array(_TYPECODES.get(order, "B"), [0]) * nb_entries


def unpack_counts(data: Buffer, order: int) -> "array[int]":
    """Return the counts of a refcount block, one array item each.

    Counts narrower than a byte lie in it from the least significant bit up.
    """
    if order >= 3:
        counts = array(_TYPECODES[order])
        counts.frombytes(data)
        if byteorder == "little":
            counts.byteswap()
        return counts
    bits = 1 << order
    mask = (1 << bits) - 1
    per_byte = 8 // bits
    packed = bytes(data)
    counts_bytes = bytearray(len(packed) * per_byte)
    # A block has up to 16 Mi counts: no step of Python's for each.
    for place in range(per_byte):
        part = bytes(byte >> (place * bits) & mask for byte in range(256))
        counts_bytes[place::per_byte] = packed.translate(part)
    return array("B", counts_bytes)


def pack_counts(counts: "array[int]", order: int) -> bytes:
    """Return ``counts`` as a refcount block has them on disk."""
    if order >= 3:
        if byteorder == "little":
            counts = counts[:]
            counts.byteswap()
        return counts.tobytes()
    bits = 1 << order
    per_byte = 8 // bits
    counts_bytes, packed = counts.tobytes(), 0
    for place in range(per_byte):
        shifted = bytes(count << (place * bits) & 0xFF for count in range(256))
        part = counts_bytes[place::per_byte].translate(shifted)
        packed |= int.from_bytes(part, "little")
    return packed.to_bytes(len(counts) // per_byte, "little")


def set_refcount(
    block: bytearray | memoryview, index: int, order: int, value: int
) -> None:
    """Set entry ``index``. Raises `OverflowError` if ``value`` does not fit."""
    bits = 1 << order
    if value >> bits:
        raise OverflowError(f"refcount {value} does not fit {bits} bits")
    if order >= 3:
        width = bits >> 3
        block[index * width : (index + 1) * width] = value.to_bytes(width, "big")
        return
    per_byte_bits = 3 - order
    shift = (index & ((1 << per_byte_bits) - 1)) << order
    byte_index = index >> per_byte_bits
    mask = (1 << bits) - 1
    block[byte_index] = (block[byte_index] & ~(mask << shift)) | (value << shift)


def filled_block(cluster_size: int, order: int, nb_used: int) -> bytes:
    """Return a block in which the first ``nb_used`` entries are 1."""
    block = bytearray(cluster_size)
    if order >= 3:
        width = 1 << (order - 3)
        block[: nb_used * width] = (1).to_bytes(width, "big") * nb_used
        return bytes(block)
    per_byte = 8 >> order
    full = sum(1 << (position << order) for position in range(per_byte))
    nb_bytes = nb_used // per_byte
    block[:nb_bytes] = bytes([full]) * nb_bytes
    for index in range(nb_bytes * per_byte, nb_used):
        set_refcount(block, index, order, 1)
    return bytes(block)


def unpack_refcounts(block: Buffer, order: int) -> "npt.NDArray[np.uint64]":
    """Return all entries of one block or several as a new array."""
    import numpy as np

    if order >= 3:
        raw = np.frombuffer(block, dtype=f">u{1 << (order - 3)}")
        return raw.astype(np.uint64)
    bits = 1 << order
    raw = np.frombuffer(block, dtype=np.uint8)
    values = np.empty((len(raw), 8 // bits), dtype=np.uint64)
    for position in range(8 // bits):
        values[:, position] = (raw >> (position * bits)) & ((1 << bits) - 1)
    return values.reshape(-1)


def pack_refcounts(values: "npt.NDArray[np.uint64]", order: int) -> bytes:
    """Return whole blocks' bytes; ``values`` fill them. Inverse of
    `unpack_refcounts`; every value must fit its entry."""
    import numpy as np

    if order >= 3:
        return values.astype(f">u{1 << (order - 3)}").tobytes()
    bits = 1 << order
    columns = values.astype(np.uint8).reshape(-1, 8 // bits)
    raw = np.zeros(len(columns), dtype=np.uint8)
    for position in range(8 // bits):
        raw |= columns[:, position] << (position * bits)
    return raw.tobytes()

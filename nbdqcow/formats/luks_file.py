"""A LUKS header in a file: reading it and opening it, as steps."""

from nbdqcow.block.steps import Read, Steps
from nbdqcow.crypto.luks import HEADER_LENGTH, LuksHeader
from nbdqcow.errors import ImageError
from nbdqcow.types import Buffer


def read_luks(offset: int, length: int) -> Steps[tuple[LuksHeader, Buffer]]:
    """Return a LUKS header of ``length`` bytes at ``offset``, parsed, and its
    bytes up to the end of the last key slot. Raises `ImageError`."""
    if length < HEADER_LENGTH:
        raise ImageError("LUKS header is too short")
    header = LuksHeader.parse((yield Read(offset, HEADER_LENGTH)))
    if header.area_length > length:
        raise ImageError("LUKS key slots lie outside of the encryption header")
    area = yield Read(offset, header.area_length)
    return header, area


def unlock_blocking(
    offset: int, length: int, passphrase: bytes
) -> Steps[tuple[LuksHeader, bytes]]:
    """Return a header and the volume key that the passphrase opens.

    Raises `ImageError`, `WrongPassphrase` among them.
    """
    header, area = yield from read_luks(offset, length)
    key, _ = header.unlock_blocking(area, passphrase)
    return header, key

"""The encryption header of an image: where it is, and making a new one.

Source: qcow2.txt, "Header" (crypt_method), "Full disk encryption header
pointer".
"""

import struct
from collections.abc import Mapping
from typing import Final, NamedTuple

from nbdqcow.block.tools import OptionValue, Secrets
from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow2 import header as h
from nbdqcow.formats.qcow2.header import Header
from nbdqcow.units import MiB

_PREFIX: Final = "encrypt."
_METHODS: Final = {"aes": h.CRYPT_AES, "luks": h.CRYPT_LUKS}
_POINTER_LENGTH: Final = 16

_MAX_HEADER_LENGTH: Final = 64 * MiB
"""Bytes that an encryption header may take; 2 MiB is usual."""

_MAX_OFFSET: Final = (1 << 62) - 1


def luks_range(header: Header) -> tuple[int, int] | None:
    """Return offset and length of the LUKS header in the file, or None.

    Raises `ImageError` if the image should have one and does not say where.
    """
    if header.crypt_method != h.CRYPT_LUKS:
        return None
    pointer = header.extension(h.EXT_CRYPTO)
    if pointer is None:
        raise ImageError("Missing CRYPTO header for crypt method 2")
    if len(pointer) != _POINTER_LENGTH:
        raise ImageError(
            f"CRYPTO header extension size {len(pointer)}, but expected size"
            f" {_POINTER_LENGTH}"
        )
    offset = int.from_bytes(pointer[:8], "big")
    length = int.from_bytes(pointer[8:], "big")
    if offset % header.cluster_size:
        raise ImageError(
            f"Encryption header offset '{offset}' is not a multiple of cluster size"
            f" '{header.cluster_size}'"
        )
    if offset > _MAX_OFFSET:
        raise ImageError(f"Encryption header offset '{offset}' is invalid")
    if length > _MAX_HEADER_LENGTH:
        raise ImageError(f"Encryption header of {length} bytes is too long")
    return offset, length


class NewEncryption(NamedTuple):
    """How a new image is encrypted.

    Attributes:
        crypt_method: the header's field.
        luks_area: the LUKS header with its key slots; empty without.
    """

    crypt_method: int
    luks_area: bytes = b""

    def describe_in(self, header: Header, luks_offset: int) -> None:
        """Note in an image's header what it is and where in the file."""
        header.crypt_method = self.crypt_method
        if self.luks_area:
            pointer = struct.pack(">QQ", luks_offset, len(self.luks_area))
            header.extensions.insert(0, h.Extension(h.EXT_CRYPTO, pointer))


def new_encryption(
    values: Mapping[str, OptionValue], secrets: Secrets
) -> NewEncryption | None:
    """Return what ``encrypt.*`` options ask for; None without.

    Takes seconds for LUKS. Raises `ImageError`.
    """
    format_ = values.get(f"{_PREFIX}format")
    if values.get("encryption"):
        if format_ is not None:
            raise ImageError(
                "'encrypt.format' and its alias 'encryption' can't be used at the "
                "same time"
            )
        format_ = "aes"
    given = [name for name in values if name.startswith(_PREFIX)]
    if format_ is None:
        if given:
            raise ImageError(f"Parameter '{_PREFIX}format' is missing")
        return None
    if format_ not in _METHODS:
        raise ImageError(f"Parameter 'format' does not accept value '{format_}'")
    method = _METHODS[str(format_)]
    key_secret = values.get(f"{_PREFIX}key-secret")

    def passphrase() -> bytes:
        if key_secret is None:
            raise ImageError(f"Parameter '{_PREFIX}key-secret' is required for cipher")
        return secrets(str(key_secret))

    if method == h.CRYPT_AES:
        for name in given:
            if name not in (f"{_PREFIX}format", f"{_PREFIX}key-secret"):
                raise ImageError(f"Parameter '{name}' is unexpected")
        passphrase()
        return NewEncryption(method)
    from nbdqcow.formats.luks_options import create_area_blocking

    _, area = create_area_blocking(values, _PREFIX, passphrase)
    return NewEncryption(method, area)

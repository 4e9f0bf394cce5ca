"""Ciphers by name: what an encrypted disk says it uses.

The names are dm-crypt's: a cipher, and its mode with an IV generator, such as
``aes`` and ``xts-plain64`` or ``cbc-essiv:sha256``.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from nbdqcow.errors import ImageError, UnsupportedFeature

if TYPE_CHECKING:
    # Who only looks at a header need not load numpy.
    from nbdqcow.crypto.iv import IvGenerator
    from nbdqcow.crypto.sectors import SectorCipher

_AES_KEY_LENGTHS: Final = (16, 24, 32)
_KEY_LENGTHS: Final = {
    "xts": tuple(2 * length for length in _AES_KEY_LENGTHS),
    "cbc": _AES_KEY_LENGTHS,
    "ecb": _AES_KEY_LENGTHS,
}
_IV_GENERATORS: Final = ("plain", "plain64", "essiv")


@dataclass(frozen=True, slots=True)
class CipherSpec:
    """How sectors are encrypted, but for the key.

    Attributes:
        cipher: ``aes``.
        mode: ``xts``, ``cbc`` or ``ecb``.
        ivgen: ``plain64``, ``plain`` or ``essiv``; of no effect for ``ecb``.
        ivgen_hash: the hash of ``essiv``, else "".
        key_length: bytes, both halves of an ``xts`` key together.
    """

    cipher: str = "aes"
    mode: str = "xts"
    ivgen: str = "plain64"
    ivgen_hash: str = ""
    key_length: int = 64

    @classmethod
    def parse(cls, cipher: str, mode: str, key_length: int) -> Self:
        """Read the two names of a LUKS header.

        Raises `ImageError` for a mode that is no name with an IV generator,
        `UnsupportedFeature` for what `check` refuses.
        """
        mode_name, dash, ivgen = mode.partition("-")
        if not dash:
            raise ImageError(f"Unexpected cipher mode string format '{mode}'")
        ivgen, _, ivgen_hash = ivgen.partition(":")
        spec = cls(cipher, mode_name, ivgen, ivgen_hash, key_length)
        spec.check()
        return spec

    @property
    def mode_text(self) -> str:
        """Mode and IV generator as a LUKS header has them."""
        text = f"{self.mode}-{self.ivgen}"
        return f"{text}:{self.ivgen_hash}" if self.ivgen_hash else text

    @property
    def bits(self) -> int:
        """Bits of the AES key by which QEMU names the cipher."""
        return self.key_length * 8 // (2 if self.mode == "xts" else 1)

    def check(self) -> None:
        """Raise `UnsupportedFeature` or `ImageError` if `make` could not
        make the cipher."""
        if self.cipher != "aes":
            raise UnsupportedFeature(f"Cipher '{self.cipher}' is not supported")
        lengths = _KEY_LENGTHS.get(self.mode)
        if lengths is None:
            raise UnsupportedFeature(f"Cipher mode '{self.mode}' is not supported")
        if self.key_length not in lengths:
            raise ImageError(
                f"Cipher aes-{self.mode} can't have a key of {self.key_length} bytes"
            )
        if self.ivgen not in _IV_GENERATORS:
            raise UnsupportedFeature(f"IV generator '{self.ivgen}' is not supported")
        if self.ivgen == "essiv":
            self._check_essiv()

    def _check_essiv(self) -> None:
        name = self.ivgen_hash
        if not name:
            raise ImageError("IV generator essiv needs a hash")
        try:
            length = hashlib.new(name).digest_size
        except ValueError:
            raise UnsupportedFeature(f"Hash '{name}' is not supported") from None
        if length not in _AES_KEY_LENGTHS:
            raise UnsupportedFeature(f"No AES cipher with key size {length} available")

    def make(self, key: bytes) -> "SectorCipher":
        """Return the cipher with a key of ``key_length`` bytes. Raises `ValueError`
        for one of another length."""
        from nbdqcow.crypto.cbc import CbcCipher, EcbCipher
        from nbdqcow.crypto.iv import iv_generator
        from nbdqcow.crypto.xts import XtsCipher

        if len(key) != self.key_length:
            raise ValueError(f"the key has {len(key)} bytes, not {self.key_length}")

        def make_ivs() -> "IvGenerator":
            return iv_generator(self.ivgen, self.ivgen_hash, key)

        if self.mode == "xts":
            return XtsCipher(key, make_ivs)
        if self.mode == "cbc":
            return CbcCipher(key, make_ivs)
        return EcbCipher(key)


LEGACY_AES: Final = CipherSpec(mode="cbc", key_length=16)
"""The cipher of qcow images, and of qcow2 images without LUKS."""


def legacy_key(passphrase: bytes) -> bytes:
    """Return the key of a legacy image: the passphrase's first 16 bytes, with
    NULs behind a shorter one."""
    return passphrase[:16].ljust(16, b"\0")

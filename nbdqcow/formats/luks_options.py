"""The options that say how a LUKS header is to be made, and what it says.

They are the ``luks`` format's, and a qcow2 image's behind ``encrypt.``.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from nbdqcow.block.tools import OptionValue
from nbdqcow.crypto.cipher import CipherSpec
from nbdqcow.crypto.luks import (
    DEFAULT_ITERATION_MS,
    KeySlot,
    LuksHeader,
    create_blocking,
)
from nbdqcow.errors import ImageError, UnsupportedFeature
from nbdqcow.units import SECTOR_SIZE

_AES_BITS: Final = {"aes-128": 128, "aes-192": 192, "aes-256": 256}
_CIPHERS: Final = (
    *_AES_BITS,
    *("des", "3des", "cast5-128"),
    *(f"{name}-{bits}" for name in ("serpent", "twofish") for bits in (128, 192, 256)),
)
_MODES: Final = ("ecb", "cbc", "xts", "ctr")
_IV_GENERATORS: Final = ("plain", "plain64", "essiv")
_HASHES: Final = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")
"""What QEMU knows by name, whether or not it is built with it."""


def create_area_blocking(
    values: Mapping[str, OptionValue], prefix: str, passphrase: Callable[[], bytes]
) -> tuple[LuksHeader, bytes]:
    """Make a LUKS header as options want it; return it and all its bytes.

    ``prefix`` is what stands before the options' names. ``passphrase`` is
    called once they are known to be sound. Takes seconds, as it is meant to.
    Raises `ImageError`.
    """
    spec, hash_name = parse_cipher(values, prefix)
    iteration_ms = parse_iteration_ms(values, prefix)
    header, _, area = create_blocking(
        passphrase(), spec=spec, hash_name=hash_name, iteration_ms=iteration_ms
    )
    return header, area


def parse_iteration_ms(values: Mapping[str, OptionValue], prefix: str = "") -> int:
    """Return the time to spend on a passphrase, in ms. Raises `ImageError`."""
    iteration_ms = int(values.get(f"{prefix}iter-time", DEFAULT_ITERATION_MS))
    if iteration_ms < 0:
        raise ImageError("PBKDF iterations too large to scale: iter-time is negative")
    return iteration_ms


def parse_cipher(
    values: Mapping[str, OptionValue], prefix: str
) -> tuple[CipherSpec, str]:
    """Return the cipher, and the hash of the key slots. Raises `ImageError`."""

    def choose(name: str, choices: tuple[str, ...], default: str) -> str:
        value = str(values.get(f"{prefix}{name}", default))
        if value not in choices:
            raise ImageError(f"Parameter '{name}' does not accept value '{value}'")
        return value

    cipher = choose("cipher-alg", _CIPHERS, "aes-256")
    mode = choose("cipher-mode", _MODES, "xts")
    ivgen = choose("ivgen-alg", _IV_GENERATORS, "plain64")
    ivgen_hash = choose("ivgen-hash-alg", ("", *_HASHES), "")
    hash_name = choose("hash-alg", _HASHES, "sha256")
    if cipher not in _AES_BITS:
        raise UnsupportedFeature(f"Algorithm '{cipher}' not supported")
    if ivgen == "essiv":
        ivgen_hash = ivgen_hash or "sha256"
    key_length = _AES_BITS[cipher] // 8 * (2 if mode == "xts" else 1)
    spec = CipherSpec("aes", mode, ivgen, ivgen_hash, key_length)
    spec.check()
    return spec, hash_name


def describe(header: LuksHeader, more: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``info`` shows of a header, by QEMU's names and order, which
    has ``more`` in the middle."""
    spec = header.spec
    described: dict[str, Any] = {
        "ivgen-alg": spec.ivgen,
        "hash-alg": header.hash_name,
        "cipher-alg": f"{spec.cipher}-{spec.bits}",
        "uuid": header.uuid,
    }
    # Another generator may have one in its header, too: it takes no part.
    if spec.ivgen == "essiv":
        described["ivgen-hash-alg"] = spec.ivgen_hash
    described |= more
    described["cipher-mode"] = spec.mode
    described["slots"] = [_describe_slot(slot) for slot in header.slots]
    described["payload-offset"] = header.payload_sector * SECTOR_SIZE
    described["master-key-iters"] = header.digest_iterations
    return described


def _describe_slot(slot: KeySlot) -> dict[str, Any]:
    key_offset = slot.material_sector * SECTOR_SIZE
    if not slot.active:
        return {"active": False, "key-offset": key_offset}
    return {
        "active": True,
        "iters": slot.iterations,
        "key-offset": key_offset,
        "stripes": slot.nb_stripes,
    }

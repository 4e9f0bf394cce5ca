"""LUKS version 1: the header of an encrypted disk, and its keys.

A disk's sectors are encrypted with a volume key. Each of eight slots can hold
that key for one passphrase: split into 4000 stripes, so that overwriting a
part of them destroys it, and encrypted with a key that PBKDF2 makes of the
passphrase.

Source: "LUKS On-Disk Format Specification" 1.2.3; the section is named where
it matters. All integers are big-endian.
"""

import hashlib
import hmac
import itertools
import os
import struct
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from nbdqcow.crypto import anti_forensic
from nbdqcow.crypto.cipher import CipherSpec
from nbdqcow.errors import ImageError, UnsupportedFeature
from nbdqcow.types import Buffer
from nbdqcow.units import SECTOR_SIZE, MiB, round_up

if TYPE_CHECKING:
    from nbdqcow.crypto.sectors import SectorCipher

MAGIC: Final = b"LUKS\xba\xbe"
HEADER_LENGTH: Final = 592
NB_SLOTS: Final = 8
NB_STRIPES: Final = 4000
MIN_ITERATIONS: Final = 1000
MAX_ITERATIONS: Final = 1 << 27
"""Of all slots in use together: an image may not keep us busy for hours."""

MAX_AREA_LENGTH: Final = 16 * MiB
"""Bytes of header and key slots; what is in use is about 2 MiB."""

HASHES: Final = ("sha1", "sha224", "sha256", "sha384", "sha512", "md5", "ripemd160")

_HEADER: Final = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT: Final = struct.Struct(">II32sII")
_ACTIVE: Final = 0x00AC71F3
_INACTIVE: Final = 0x0000DEAD
_DIGEST_LENGTH: Final = 20
_SALT_LENGTH: Final = 32
_SLOT_ALIGNMENT: Final = 4096
_CALIBRATION_SECONDS: Final = 0.05
DEFAULT_ITERATION_MS: Final = 2000

Edit = tuple[int, bytes]
"""Bytes to write, and where, relative to the start of the header."""


class WrongPassphrase(ImageError):
    """No key slot opens with the passphrase."""

    def __init__(
        self, text: str = "Invalid password, cannot unlock any keyslot"
    ) -> None:
        super().__init__(text)


@dataclass(slots=True)
class KeySlot:
    """One key slot: "key slot" of the specification's table 2.

    Attributes:
        active: whether it holds a key.
        iterations: of PBKDF2 for the slot.
        salt: of PBKDF2, 32 bytes.
        material_sector: where the key material begins, in sectors from the
            start of the header.
        nb_stripes: of the key material.
    """

    material_sector: int
    active: bool = False
    iterations: int = 0
    salt: bytes = bytes(_SALT_LENGTH)
    nb_stripes: int = NB_STRIPES


@dataclass(slots=True)
class LuksHeader:
    """The header: "phdr" of the specification's table 1.

    Attributes:
        spec: the cipher of the sectors and of the key material.
        hash_name: of PBKDF2 and of the stripes.
        payload_sector: where the disk's sectors begin, in a raw image.
        digest, digest_salt, digest_iterations: by which the volume key is
            recognised.
        uuid: as text.
        slots: all eight.
    """

    spec: CipherSpec
    hash_name: str
    payload_sector: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    slots: list[KeySlot] = field(default_factory=list)

    # -- reading -----------------------------------------------------------

    @classmethod
    def parse(cls, data: Buffer) -> Self:
        """Parse and check the first `HEADER_LENGTH` bytes of a header.

        Raises `ImageError`, and `UnsupportedFeature` for a version, cipher or
        hash that this project lacks.
        """
        if len(data) < HEADER_LENGTH:
            raise ImageError("LUKS header is too short")
        fields = _HEADER.unpack_from(data)
        magic, version, cipher, mode, hash_name, payload, key_length = fields[:7]
        if magic != MAGIC:
            raise ImageError("Volume is not in LUKS format")
        if version != 1:
            raise UnsupportedFeature(f"LUKS version {version} is not supported")
        header = cls(
            spec=CipherSpec.parse(
                _text(cipher, "cipher name"), _text(mode, "cipher mode"), key_length
            ),
            hash_name=_text(hash_name, "hash name"),
            payload_sector=payload,
            digest=fields[7],
            digest_salt=fields[8],
            digest_iterations=fields[9],
            uuid=_text(fields[10], "UUID"),
        )
        for index in range(NB_SLOTS):
            offset = _HEADER.size + index * _SLOT.size
            state, iterations, salt, sector, stripes = _SLOT.unpack_from(data, offset)
            if state not in (_ACTIVE, _INACTIVE):
                raise ImageError(f"LUKS key slot {index} has an invalid state")
            header.slots.append(
                KeySlot(sector, state == _ACTIVE, iterations, salt, stripes)
            )
        header._check()
        return header

    def _check(self) -> None:
        """Refuse what can't be right, before time or memory goes into it."""
        check_hash(self.hash_name)
        if not self.digest_iterations:
            raise ImageError("LUKS key digest has no iterations")
        iterations = self.digest_iterations
        used = [(0, -(-HEADER_LENGTH // SECTOR_SIZE), "header")]
        for index, slot in enumerate(self.slots):
            name = f"key slot {index}"
            if slot.nb_stripes != NB_STRIPES:
                raise ImageError(
                    f"LUKS {name} has {slot.nb_stripes} stripes, not {NB_STRIPES}"
                )
            if slot.active:
                if not slot.iterations:
                    raise ImageError(f"LUKS {name} has no iterations")
                iterations += slot.iterations
            end = slot.material_sector + self._material_sectors
            if end > self.payload_sector:
                raise ImageError(f"LUKS {name} overlaps the payload")
            if end * SECTOR_SIZE > MAX_AREA_LENGTH:
                raise ImageError(f"LUKS {name} is too far from the header")
            used.append((slot.material_sector, end, name))
        used.sort()
        for (_, end, name), (start, _, other) in itertools.pairwise(used):
            if start < end:
                raise ImageError(f"LUKS {other} overlaps the {name}")
        if iterations > MAX_ITERATIONS:
            raise ImageError(
                f"LUKS key slots want {iterations} iterations, more than the limit"
                f" of {MAX_ITERATIONS}"
            )

    @property
    def _material_length(self) -> int:
        return self.spec.key_length * NB_STRIPES

    @property
    def _material_sectors(self) -> int:
        return -(-self._material_length // SECTOR_SIZE)

    @property
    def area_length(self) -> int:
        """Bytes from the start of the header to the end of the last slot."""
        last = max(slot.material_sector for slot in self.slots)
        return (last + self._material_sectors) * SECTOR_SIZE

    def pack(self) -> bytes:
        """Return the `HEADER_LENGTH` bytes of the header."""
        packed = _HEADER.pack(
            MAGIC,
            1,
            self.spec.cipher.encode(),
            self.spec.mode_text.encode(),
            self.hash_name.encode(),
            self.payload_sector,
            self.spec.key_length,
            self.digest,
            self.digest_salt,
            self.digest_iterations,
            self.uuid.encode(),
        )
        for slot in self.slots:
            packed += _SLOT.pack(
                _ACTIVE if slot.active else _INACTIVE,
                slot.iterations,
                slot.salt,
                slot.material_sector,
                slot.nb_stripes,
            )
        return packed

    # -- keys --------------------------------------------------------------

    def unlock_blocking(self, area: Buffer, passphrase: bytes) -> tuple[bytes, int]:
        """Return the volume key, and the slot that the passphrase opens.

        ``area`` holds the first `area_length` bytes from the start of the
        header. Raises `WrongPassphrase`. May take seconds, as it is meant to.
        """
        for index, slot in enumerate(self.slots):
            if slot.active:
                key = self._open_slot(slot, area, passphrase)
                if self.is_volume_key_blocking(key):
                    return key, index
        raise WrongPassphrase

    def opens_blocking(self, slot: int, area: Buffer, passphrase: bytes) -> bool:
        """Whether a slot is in use and the passphrase opens it."""
        chosen = self._slot(slot)
        return chosen.active and self.is_volume_key_blocking(
            self._open_slot(chosen, area, passphrase)
        )

    def _open_slot(self, slot: KeySlot, area: Buffer, passphrase: bytes) -> bytes:
        """Return the slot's key, or noise if the passphrase is another's."""
        start = slot.material_sector * SECTOR_SIZE
        length = self._material_sectors * SECTOR_SIZE
        material = memoryview(area)[start : start + length]
        if len(material) != length:
            raise ImageError("LUKS key slots are cut off")
        cipher = self._slot_cipher(slot, passphrase)
        split = cipher.decrypt_blocking(0, material)[: self._material_length]
        return anti_forensic.merge(bytes(split), NB_STRIPES, self.hash_name)

    def _slot_cipher(self, slot: KeySlot, passphrase: bytes) -> "SectorCipher":
        key = hashlib.pbkdf2_hmac(
            self.hash_name, passphrase, slot.salt, slot.iterations, self.spec.key_length
        )
        return self.spec.make(key)

    def is_volume_key_blocking(self, key: bytes) -> bool:
        """Whether ``key`` is the disk's, by its digest."""
        return hmac.compare_digest(self._key_digest(key), self.digest)

    def _key_digest(self, key: bytes) -> bytes:
        return hashlib.pbkdf2_hmac(
            self.hash_name, key, self.digest_salt, self.digest_iterations,
            _DIGEST_LENGTH,
        )  # fmt: skip

    def add_key_blocking(
        self,
        volume_key: bytes,
        passphrase: bytes,
        slot: int,
        iteration_ms: int = DEFAULT_ITERATION_MS,
    ) -> list[Edit]:
        """Let ``passphrase`` open the disk too, by a slot that is free; return
        what to write.

        Each edit must be durable before the next is written. Raises
        `ImageError` if the volume key is another disk's.
        """
        if not self.is_volume_key_blocking(volume_key):
            raise ImageError("The volume key is not that of this disk")
        chosen = self._slot(slot)
        if chosen.active:
            raise ImageError(f"LUKS key slot {slot} is in use")
        in_use = sum(found.iterations for found in self.slots if found.active)
        chosen.iterations = min(
            count_iterations_blocking(
                self.hash_name, self.spec.key_length, iteration_ms
            ),
            max(MIN_ITERATIONS, MAX_ITERATIONS - self.digest_iterations - in_use),
        )
        chosen.salt = os.urandom(_SALT_LENGTH)
        split = anti_forensic.split(volume_key, NB_STRIPES, self.hash_name)
        padded = split.ljust(self._material_sectors * SECTOR_SIZE, b"\0")
        encrypted = self._slot_cipher(chosen, passphrase).encrypt_blocking(0, padded)
        material = bytes(encrypted[: len(split)])
        chosen.active = True
        return [(chosen.material_sector * SECTOR_SIZE, material), (0, self.pack())]

    def free_slot(self) -> int | None:
        """Return the first slot that is not in use, or None."""
        for index, slot in enumerate(self.slots):
            if not slot.active:
                return index
        return None

    def erase_key(self, slot: int) -> list[Edit]:
        """Close a key slot for good; return what to write, in order.

        Without a slot in use the disk can never be opened again. A slot that
        is not in use is overwritten once more.
        """
        chosen = self._slot(slot)
        chosen.active = False
        chosen.iterations = 0
        chosen.salt = bytes(_SALT_LENGTH)
        noise = os.urandom(self._material_length)
        return [(0, self.pack()), (chosen.material_sector * SECTOR_SIZE, noise)]

    def _slot(self, index: int) -> KeySlot:
        if not 0 <= index < NB_SLOTS:
            raise ImageError(f"There is no LUKS key slot {index}")
        return self.slots[index]


def new_area_length(key_length: int) -> int:
    """Return the bytes before the disk's sectors in what `create_blocking`
    makes, for a volume key of ``key_length`` bytes."""
    slot_length = round_up(key_length * NB_STRIPES, _SLOT_ALIGNMENT)
    return _SLOT_ALIGNMENT + NB_SLOTS * slot_length


def create_blocking(
    passphrase: bytes,
    *,
    spec: CipherSpec | None = None,
    hash_name: str = "sha256",
    iteration_ms: int = DEFAULT_ITERATION_MS,
) -> tuple[LuksHeader, bytes, bytes]:
    """Make a header with a new volume key, and the passphrase in slot 0.

    ``spec`` is AES-256 in XTS mode by default. ``iteration_ms`` is how long
    trying a passphrase shall take. Returns the header, the volume key, and the
    bytes up to where the disk's sectors begin. Raises `UnsupportedFeature` or
    `ImageError` for a cipher or hash that can't be had.
    """
    import uuid

    spec = spec or CipherSpec()
    spec.check()
    check_hash(hash_name)
    volume_key = os.urandom(spec.key_length)
    first_sector = _SLOT_ALIGNMENT // SECTOR_SIZE
    payload_sector = new_area_length(spec.key_length) // SECTOR_SIZE
    slot_sectors = (payload_sector - first_sector) // NB_SLOTS
    header = LuksHeader(
        spec=spec,
        hash_name=hash_name,
        payload_sector=payload_sector,
        digest=b"",
        digest_salt=os.urandom(_SALT_LENGTH),
        # An eighth of the time, as QEMU and cryptsetup have it.
        digest_iterations=count_iterations_blocking(
            hash_name, _DIGEST_LENGTH, iteration_ms // 8
        ),
        uuid=str(uuid.uuid4()),
        slots=[KeySlot(first_sector + i * slot_sectors) for i in range(NB_SLOTS)],
    )
    header.digest = header._key_digest(volume_key)
    area = bytearray(header.payload_sector * SECTOR_SIZE)
    for offset, data in header.add_key_blocking(
        volume_key, passphrase, 0, iteration_ms
    ):
        area[offset : offset + len(data)] = data
    return header, volume_key, bytes(area)


def count_iterations_blocking(
    hash_name: str, key_length: int, milliseconds: int
) -> int:
    """Return how many iterations of PBKDF2 take about ``milliseconds`` here.

    Never below `MIN_ITERATIONS`, nor above an eighth of `MAX_ITERATIONS`.
    """
    iterations = MIN_ITERATIONS
    while True:
        start = time.thread_time()
        hashlib.pbkdf2_hmac(hash_name, b"password", b"salt", iterations, key_length)
        seconds = time.thread_time() - start
        if seconds >= _CALIBRATION_SECONDS:
            break
        iterations *= 2
    wanted = int(iterations * milliseconds / 1000 / seconds)
    return max(MIN_ITERATIONS, min(wanted, MAX_ITERATIONS // NB_SLOTS))


def check_hash(name: str) -> None:
    """Raise `UnsupportedFeature` for a hash that can't be had here."""
    if name in HASHES:
        try:
            hashlib.new(name)
        except ValueError:
            # OpenSSL is built or configured without it.
            pass
        else:
            return
    raise UnsupportedFeature(f"Hash '{name}' is not supported")


def _text(data: bytes, what: str) -> str:
    text, nul, _ = data.partition(b"\0")
    if not nul:
        raise ImageError(f"LUKS {what} is not terminated")
    try:
        return text.decode("ascii")
    except UnicodeDecodeError:
        raise ImageError(f"LUKS {what} is not ASCII text") from None

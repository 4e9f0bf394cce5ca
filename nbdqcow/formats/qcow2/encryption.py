"""Encrypted images: the passphrase, the key, and how sectors are numbered.

Source: qcow2.txt, "Header" (crypt_method), "Data encryption".
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from nbdqcow.block.steps import run_steps
from nbdqcow.block.storage import StorageDriver
from nbdqcow.block.tools import OptionValue, Secrets
from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow2 import header as qcow2_header
from nbdqcow.formats.qcow2.encryption_header import luks_range
from nbdqcow.formats.qcow2.header import Header
from nbdqcow.pool import Pool
from nbdqcow.types import DATA, Run

if TYPE_CHECKING:
    from nbdqcow.block.driver import WritePlan
    from nbdqcow.crypto.secrets import Secret
    from nbdqcow.crypto.sectors import SectorCipher
    from nbdqcow.formats.encrypted import EncryptedStorage
    from nbdqcow.formats.qcow2.driver import Qcow2Driver


async def open_data(
    storage: StorageDriver,
    header: Header,
    secret: "Secret | bytes | None",
    data_file: StorageDriver | None = None,
) -> "EncryptedStorage | None":
    """Return what reads and writes an image's data plain; None if it is.

    ``secret`` is the passphrase. Raises `ImageError` if it is missing or
    wrong, or the encryption header can't be right.
    """
    if header.crypt_method == qcow2_header.CRYPT_NONE:
        return None
    # 50 ms of imports that other images need not pay.
    from nbdqcow.crypto.cipher import LEGACY_AES, legacy_key
    from nbdqcow.formats.encrypted import EncryptedStorage

    if secret is None:
        raise ImageError("the image is encrypted: a passphrase is required")
    passphrase = secret if isinstance(secret, bytes) else secret.reveal()
    place = luks_range(header)
    if place is None:
        cipher = LEGACY_AES.make(legacy_key(passphrase))
    else:
        cipher = await _unlock(storage, *place, passphrase)
    return EncryptedStorage(data_file or storage, cipher)


async def _unlock(
    storage: StorageDriver, offset: int, length: int, passphrase: bytes
) -> "SectorCipher":
    from nbdqcow.formats.luks_file import read_luks

    if offset + length > storage.length:
        raise ImageError("qcow2: the encryption header lies beyond the end of the file")
    luks, area = await run_steps(read_luks(offset, length), storage)
    pool = Pool()
    try:
        key, _ = await pool.run(luks.unlock_blocking, area, passphrase)
    finally:
        await pool.close()
    return luks.spec.make(key)


async def amend_keys(
    image: "Qcow2Driver",
    values: Mapping[str, OptionValue],
    secrets: Secrets,
    passphrase: bytes,
    *,
    force: bool,
) -> None:
    """See `FormatDriver.amend_keys`."""
    if image.header.crypt_method == qcow2_header.CRYPT_NONE:
        raise ImageError("Can't amend encryption options - encryption not present")
    place = luks_range(image.header)
    if place is None:
        raise ImageError("Only LUKS encryption options can be amended")
    from nbdqcow.formats.luks_keys import KeyChange, change_keys

    change = KeyChange.parse(values, "encrypt.", secrets, force=force)
    async with image.keys_lock:
        await change_keys(image.storage, *place, passphrase, change)


def number_by_guest_offset(image: "Qcow2Driver") -> None:
    """Make an image's maps give what legacy encryption needs to know.

    Source: qcow2.txt, "Data encryption": the vector of a sector is its number
    on the virtual disk.
    """
    # Not imported for every image: it brings numpy.
    from nbdqcow.formats.encrypted import tag_offset

    mapping = image.mapping

    def tag(offset: int, run: Run) -> Run:
        kind, host_offset, length = run
        if kind == DATA:
            host_offset = tag_offset(host_offset, offset)
        return kind, host_offset, length

    def try_map(offset: int, length: int) -> Run | None:
        run = mapping.try_map(offset, length)
        return run if run is None else tag(offset, run)

    async def map_(offset: int, length: int) -> Run:
        return tag(offset, await mapping.map(offset, length))

    def try_map_write(offset: int, length: int) -> int:
        host_offset = mapping.try_map_write(offset, length)
        return host_offset if host_offset < 0 else tag_offset(host_offset, offset)

    image.try_map = try_map  # type: ignore[method-assign]
    image.map = map_  # type: ignore[method-assign]
    image.try_map_write = try_map_write  # type: ignore[method-assign]


def tag_plan(header: Header, plan: "WritePlan") -> "WritePlan":
    """Let a plan's host offset say what legacy encryption needs to know."""
    if header.crypt_method == qcow2_header.CRYPT_AES and not header.has_data_file:
        from nbdqcow.formats.encrypted import tag_offset

        plan.host_offset = tag_offset(plan.host_offset, plan.guest_offset)
    return plan

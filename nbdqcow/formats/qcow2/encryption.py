"""Encrypted images: the passphrase, the key, and how sectors are numbered.

Source: qcow2.txt, "Header" (crypt_method), "Data encryption".
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from nbdqcow.block.storage import StorageDriver
from nbdqcow.block.tools import OptionValue, Secrets
from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow2 import header as qcow2_header
from nbdqcow.formats.qcow2.encryption_header import luks_range
from nbdqcow.formats.qcow2.header import Header

if TYPE_CHECKING:
    from nbdqcow.block.driver import WritePlan
    from nbdqcow.crypto.secrets import Secret
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
    from nbdqcow.crypto.secrets import PassphraseRequired, reveal
    from nbdqcow.formats.encrypted import EncryptedStorage

    if secret is None:
        raise PassphraseRequired("the image is encrypted: a passphrase is required")
    passphrase = reveal(secret)
    place = luks_range(header)
    if place is None:
        cipher = LEGACY_AES.make(legacy_key(passphrase))
    else:
        from nbdqcow.formats.luks_keys import open_luks

        offset, length = place
        if offset + length > storage.length:
            raise ImageError(
                "qcow2: the encryption header lies beyond the end of the file"
            )
        _, cipher = await open_luks(storage, offset, length, passphrase)
    return EncryptedStorage(data_file or storage, cipher)


async def amend_keys(
    image: "Qcow2Driver",
    values: Mapping[str, OptionValue],
    secrets: Secrets,
    *,
    force: bool,
) -> None:
    """See `FormatDriver.amend_keys`."""
    if image.header.crypt_method == qcow2_header.CRYPT_NONE:
        raise ImageError("Can't amend encryption options - encryption not present")
    place = luks_range(image.header)
    if place is None:
        raise ImageError("Only LUKS encryption options can be amended")
    from nbdqcow.crypto.secrets import reveal
    from nbdqcow.formats.luks_keys import KeyChange, change_keys

    change = KeyChange.parse(values, "encrypt.", secrets, force=force)
    assert image.secret is not None
    passphrase = reveal(image.secret)
    async with image.keys_lock:
        await change_keys(image.storage, *place, passphrase, change)


def number_by_guest_offset(image: "Qcow2Driver") -> None:
    """Make an image's maps give what legacy encryption needs to know.

    Source: qcow2.txt, "Data encryption": the vector of a sector is its number
    on the virtual disk.
    """
    # Not imported for every image: it brings numpy.
    from nbdqcow.formats import encrypted

    encrypted.number_by_guest_offset(image)


def tagged(header: Header, host_offset: int, guest_offset: int) -> int:
    """Let a host offset say what legacy encryption needs to know."""
    if header.crypt_method != qcow2_header.CRYPT_AES or header.has_data_file:
        return host_offset
    from nbdqcow.formats.encrypted import tag_offset

    return tag_offset(host_offset, guest_offset)


def tag_plan(header: Header, plan: "WritePlan") -> "WritePlan":
    """Do as `tagged` does with a plan's host offset."""
    if header.crypt_method == qcow2_header.CRYPT_AES:
        plan.host_offset = tagged(header, plan.host_offset, plan.guest_offset)
    return plan

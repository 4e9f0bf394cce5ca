"""Encrypted images: AES-128-CBC, sectors numbered by the guest's disk."""

from typing import TYPE_CHECKING

from nbdqcow.block.storage import StorageDriver
from nbdqcow.crypto.secrets import PassphraseRequired

if TYPE_CHECKING:
    from nbdqcow.block.driver import WritePlan
    from nbdqcow.crypto.secrets import Secret
    from nbdqcow.formats.encrypted import EncryptedStorage
    from nbdqcow.formats.qcow1.driver import Qcow1Driver


def open_data(
    storage: StorageDriver, secret: "Secret | bytes | None"
) -> "EncryptedStorage":
    """Return what reads and writes an encrypted image's data plain.

    Nothing tells a wrong passphrase from the right one. Raises `ImageError`
    without one.
    """
    # 50 ms of imports that other images need not pay.
    from nbdqcow.crypto.cipher import LEGACY_AES, legacy_key
    from nbdqcow.crypto.secrets import reveal
    from nbdqcow.formats.encrypted import EncryptedStorage

    if secret is None:
        raise PassphraseRequired("the image is encrypted: a passphrase is required")
    return EncryptedStorage(storage, LEGACY_AES.make(legacy_key(reveal(secret))))


def number_by_guest_offset(image: "Qcow1Driver") -> None:
    """Make an image's maps and plans give what the cipher needs to know: the
    vector of a sector is its number on the virtual disk."""
    # Not imported for every image: it brings numpy.
    from nbdqcow.formats import encrypted

    encrypted.number_by_guest_offset(image)
    plain_begin, plain_try_begin = image.begin_write, image.try_begin_write

    def tag_plan(plan: "WritePlan") -> "WritePlan":
        plan.host_offset = encrypted.tag_offset(plan.host_offset, plan.guest_offset)
        return plan

    async def begin_write(offset: int, length: int) -> "WritePlan":
        return tag_plan(await plain_begin(offset, length))

    def try_begin_write(offset: int, length: int) -> "WritePlan | None":
        plan = plain_try_begin(offset, length)
        return plan if plan is None else tag_plan(plan)

    image.begin_write = begin_write  # type: ignore[method-assign]
    image.try_begin_write = try_begin_write  # type: ignore[method-assign]

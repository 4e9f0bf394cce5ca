"""Changing who can open an encrypted disk: its key slots, in place.

Every step is durable before the next begins, so that at any moment the slots
that shall stay open the disk: a new slot's material is there before the
header names it, and the header lets go of an old one before it is
overwritten.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from nbdqcow.block.steps import run_steps
from nbdqcow.block.storage import StorageDriver
from nbdqcow.block.tools import OptionValue, Secrets
from nbdqcow.crypto.luks import DEFAULT_ITERATION_MS, NB_SLOTS, Edit, LuksHeader
from nbdqcow.errors import ImageError
from nbdqcow.formats.luks_file import read_luks
from nbdqcow.formats.luks_options import parse_iteration_ms
from nbdqcow.pool import Pool
from nbdqcow.types import Buffer

if TYPE_CHECKING:
    from nbdqcow.crypto.sectors import SectorCipher

_UNSIGNED_MASK: Final = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class KeyChange:
    """What is to become of key slots.

    Attributes:
        new: the passphrase to add; None to erase.
        old: erase the slots that this passphrase opens.
        slot: the one to use or to erase, or None.
        force: overwrite a slot in use, erase the last one.
    """

    new: bytes | None = None
    old: bytes | None = None
    slot: int | None = None
    iteration_ms: int = DEFAULT_ITERATION_MS
    force: bool = False

    @classmethod
    def parse(
        cls,
        values: Mapping[str, OptionValue],
        prefix: str,
        secrets: Secrets,
        *,
        force: bool = False,
    ) -> Self:
        """Read the options of `key_options`. Raises `ImageError`."""
        given = {name.removeprefix(prefix): value for name, value in values.items()}
        state = given.get("state")
        if state is None:
            raise ImageError("Parameter 'state' is missing")
        if state not in ("active", "inactive"):
            raise ImageError(f"Parameter 'state' does not accept value '{state}'")
        if state == "active":
            if "new-secret" not in given:
                raise ImageError("'new-secret' is required to activate a keyslot")
            forbidden, why = ["old-secret"], "activating keyslots"
        else:
            forbidden, why = ["new-secret", "iter-time"], "erasing keyslots"
        for name in forbidden:
            if name in given:
                raise ImageError(f"'{name}' must not be given when {why}")
        slot = given.get("keyslot")
        if slot is not None and not 0 <= int(slot) < NB_SLOTS:
            raise ImageError(
                f"Invalid keyslot {int(slot) & _UNSIGNED_MASK} specified, must be "
                f"between 0 and {NB_SLOTS - 1}"
            )
        if state == "inactive" and slot is None and "old-secret" not in given:
            raise ImageError(
                "To erase keyslot(s), either explicit keyslot index or the password "
                "currently contained in them must be given"
            )
        iteration_ms = parse_iteration_ms(given)
        new, old = given.get("new-secret"), given.get("old-secret")
        return cls(
            new=None if new is None else secrets(str(new)),
            old=None if old is None else secrets(str(old)),
            slot=None if slot is None else int(slot),
            iteration_ms=iteration_ms,
            force=force,
        )


async def open_luks(
    storage: StorageDriver, offset: int, length: int, passphrase: bytes
) -> tuple[LuksHeader, "SectorCipher"]:
    """Return the LUKS header of ``length`` bytes at ``offset`` of a file, and
    the cipher that its passphrase gives. Raises `ImageError`."""
    header, area = await run_steps(read_luks(offset, length), storage)
    pool = Pool()
    try:
        key, _ = await pool.run(header.unlock_blocking, area, passphrase)
    finally:
        await pool.close()
    return header, header.spec.make(key)


async def change_keys(
    storage: StorageDriver,
    offset: int,
    length: int,
    passphrase: bytes,
    change: KeyChange,
) -> None:
    """Change the key slots of the LUKS header at ``offset`` in a file.

    ``passphrase`` opens the disk; it is needed to add one. One change of a
    file goes on at a time. Raises `ImageError` before anything is written, and
    `OSError`.
    """
    header, area = await run_steps(read_luks(offset, length), storage)

    async def write(edits: list[Edit]) -> None:
        for start, data in edits:
            await storage.pwritev(offset + start, [data])
            await storage.flush()

    pool = Pool()
    try:
        new = change.new
        if new is None:
            slots = await pool.run(_slots_to_erase_blocking, header, area, change)
            for slot in slots:
                await write(header.erase_key(slot))
            return
        slot = _slot_to_use(header, change)
        key, _ = await pool.run(header.unlock_blocking, area, passphrase)

        async def add(slot: int) -> None:
            add_key = header.add_key_blocking
            await write(await pool.run(add_key, key, new, slot, change.iteration_ms))

        if not header.slots[slot].active:
            await add(slot)
            return
        # The slot may be the last one: the new passphrase opens the disk by
        # another one meanwhile.
        spare = header.free_slot()
        if spare is not None:
            await add(spare)
        await write(header.erase_key(slot))
        await add(slot)
        if spare is not None:
            await write(header.erase_key(spare))
    finally:
        await pool.close()


def _slot_to_use(header: LuksHeader, change: KeyChange) -> int:
    slot = change.slot
    if slot is None:
        slot = header.free_slot()
        if slot is None:
            raise ImageError("Can't add a keyslot - all keyslots are in use")
    elif header.slots[slot].active and not change.force:
        raise ImageError(
            f"Refusing to overwrite active keyslot {slot} - please erase it first"
        )
    return slot


def _slots_to_erase_blocking(
    header: LuksHeader, area: Buffer, change: KeyChange
) -> list[int]:
    active = [index for index, slot in enumerate(header.slots) if slot.active]
    slot = change.slot
    if slot is not None:
        if change.old is not None and not header.opens_blocking(slot, area, change.old):
            raise ImageError(
                f"Given keyslot {slot} doesn't contain the given old password for "
                "erase operation"
            )
        if not change.force:
            if slot not in active:
                raise ImageError(f"Given keyslot {slot} is already erased (inactive) ")
            if active == [slot]:
                raise ImageError(
                    f"Attempt to erase the only active keyslot {slot} which will "
                    "erase all the data in the image irreversibly - refusing operation"
                )
        return [slot]
    assert change.old is not None
    found = [i for i in active if header.opens_blocking(i, area, change.old)]
    if not found:
        raise ImageError("No keyslots match given (old) password for erase operation")
    if found == active and not change.force:
        raise ImageError(
            "All the active keyslots match the (old) password that was given and "
            "erasing them will erase all the data in the image irreversibly - "
            "refusing operation"
        )
    return found

"""The luks driver: a LUKS container, as cryptsetup and QEMU make it, as a disk.

The header and the key slots come first in the file, then the disk's sectors,
each in its place.
"""

import asyncio
import errno
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from nbdqcow.block.driver import FormatDriver, WritePlan
from nbdqcow.block.inflight import Epochs
from nbdqcow.block.storage import StorageDriver
from nbdqcow.block.tools import OptionValue, Secrets
from nbdqcow.crypto.secrets import PassphraseRequired, reveal
from nbdqcow.errors import BlockError, ImageError, NotSupported
from nbdqcow.types import DATA, Run
from nbdqcow.units import SECTOR_SIZE, round_up

if TYPE_CHECKING:
    # It brings numpy, and this module is loaded to probe formats.
    from nbdqcow.formats.encrypted import EncryptedStorage


class LuksDriver(FormatDriver):
    """An open container; all of it is data.

    Options: ``secret``, the passphrase (`nbdqcow.crypto.secrets.Secret` or
    bytes).
    """

    name = "luks"
    cluster_size = 1

    def __init__(
        self,
        storage: StorageDriver,
        data: "EncryptedStorage",
        payload_offset: int,
        start: int,
        passphrase: bytes,
        *,
        read_only: bool,
    ) -> None:
        """``start`` is what the first sector's offset in ``data`` is: sectors
        are numbered from there."""
        self.storage = storage
        self.data = data
        self.size = round_up(storage.length - payload_offset, SECTOR_SIZE)
        self.read_only = read_only
        self.lock = asyncio.Lock()
        self.epochs = Epochs()
        self._passphrase = passphrase
        self._payload_offset = payload_offset
        self._start = start

    @classmethod
    async def open(
        cls, storage: StorageDriver, *, read_only: bool, options: Mapping[str, Any]
    ) -> Self:
        """Open the container in ``storage``. Raises `ImageError`."""
        secret = options.get("secret")
        if secret is None:
            raise PassphraseRequired("the disk is encrypted: a passphrase is required")
        from nbdqcow.formats.encrypted import EncryptedStorage, tag_offset
        from nbdqcow.formats.luks_keys import open_luks

        passphrase = reveal(secret)
        header, cipher = await open_luks(storage, 0, storage.length, passphrase)
        payload_offset = header.payload_sector * SECTOR_SIZE
        if payload_offset > storage.length:
            raise ImageError("LUKS payload lies beyond the end of the file")
        data = EncryptedStorage(storage, cipher)
        start = tag_offset(payload_offset, 0)
        return cls(
            storage, data, payload_offset, start, passphrase, read_only=read_only
        )

    def try_map(self, offset: int, length: int) -> Run | None:
        """All of it is data."""
        return DATA, self._start + offset, length

    async def map(self, offset: int, length: int) -> Run:
        """All of it is data."""
        return DATA, self._start + offset, length

    def try_map_write(self, offset: int, length: int) -> int:
        """Every write is in place."""
        return self._start + offset

    async def begin_write(self, offset: int, length: int) -> WritePlan:
        """Every write is in place."""
        if offset + length > self.size:
            raise BlockError(errno.ENOSPC, "the disk has become smaller")
        plan = WritePlan(offset, length, self._start + offset)
        plan.private = self.epochs.enter()
        return plan

    def end_write(self, plan: WritePlan) -> None:
        """There is nothing to link."""
        self.epochs.leave(plan.private)

    def abort_write(self, plan: WritePlan) -> None:
        """There is nothing to give back."""
        self.epochs.leave(plan.private)

    async def resize(self, size: int, *, preallocation: str = "off") -> None:
        """See `FormatDriver.resize`. Zeroes must be written: what a file is
        extended by does not decrypt to them."""
        if size % SECTOR_SIZE:
            raise BlockError(
                errno.EINVAL, f"The size is no multiple of {SECTOR_SIZE} bytes"
            )
        if size != self.size and (what := self.storage.fixed_as) is not None:
            raise NotSupported(f"Cannot resize {what}")
        old, self.size = self.size, min(self.size, size)
        old_length = self.storage.length
        self.when_rebound()
        try:
            # Nobody begins any more to read or write what goes.
            await self.epochs.quiet()
            async with self.lock:
                await self.storage.truncate(self._payload_offset + size)
                if size > old:
                    await self.data.write_zeroes(
                        self._start + old, size - old, may_unmap=False
                    )
            self.size = size
        except BaseException:
            # What is new would be the disk's for whoever opens it next, and noise.
            await self.storage.cut_off(old_length)
            # Whoever is cancelled may find the file shorter already.
            self.size = min(old, self.storage.length - self._payload_offset)
            raise
        finally:
            self.when_rebound()

    async def amend_keys(
        self,
        values: Mapping[str, OptionValue],
        secrets: Secrets,
        *,
        force: bool = False,
    ) -> None:
        """See `FormatDriver.amend_keys`."""
        if self.read_only:
            raise BlockError(errno.EROFS, "the image is read-only")
        from nbdqcow.formats.luks_keys import KeyChange, change_keys

        change = KeyChange.parse(values, "", secrets, force=force)
        async with self.lock:
            await change_keys(
                self.storage, 0, self._payload_offset, self._passphrase, change
            )

    async def flush(self) -> None:
        """Make the file's data durable."""
        await self.storage.flush()

    async def close(self) -> None:
        """There is nothing to write back but what a flush has to."""
        if not self.read_only:
            await self.storage.flush()

"""Operations on an open image other than reading and writing the disk.

Each runs to its end even if its caller is cancelled, and is safe while the
image is served. What only they need is imported by them: it brings numpy.
"""

from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from nbdqcow.block.driver import FormatDriver
from nbdqcow.block.tools import OptionValue, Progress, Secrets, SnapshotInfo
from nbdqcow.errors import BlockError, CorruptImage, NotSupported
from nbdqcow.formats.qcow2 import encryption
from nbdqcow.formats.qcow2.memory_bitmap import Bitmap, BitmapInfo

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.driver import Qcow2Driver

T = TypeVar("T")


class Operations(FormatDriver):
    """The part of `Qcow2Driver` that carries out operations."""

    @property
    def _image(self) -> "Qcow2Driver":
        return cast("Qcow2Driver", self)

    async def _operate(self, operation: Coroutine[Any, Any, T]) -> T:
        """Run an operation to its end, even if the caller is cancelled."""
        try:
            self._image.check_writable()
        except BlockError:
            operation.close()
            raise
        return await self._image.tasks.run_to_end(self._after_others(operation))

    async def _after_others(self, operation: Coroutine[Any, Any, T]) -> T:
        """Run an operation once no other one is in the middle of its steps."""
        async with self._image.operating:
            try:
                self._image.check_writable()
            except BlockError:
                operation.close()
                raise
            try:
                return await operation
            except CorruptImage as error:
                # Here, for the caller may have been cancelled.
                await self._image.mark_corrupt(str(error))
                raise

    # -- the disk --------------------------------------------------------

    async def resize(self, size: int, *, preallocation: str = "off") -> None:
        """See `FormatDriver.resize`."""
        from nbdqcow.formats.qcow2 import resize

        await self._operate(resize.resize(self._image, size, preallocation))

    async def make_empty(self) -> None:
        """See `FormatDriver.make_empty`."""
        from nbdqcow.formats.qcow2 import resize

        await self._operate(resize.make_empty(self._image))

    async def change_backing_file(
        self, filename: str | None, format_name: str | None
    ) -> None:
        """See `FormatDriver.change_backing_file`."""
        from nbdqcow.formats.qcow2 import amend

        await self._operate(
            amend.change_backing_file(self._image, filename, format_name)
        )

    async def amend(
        self, options: Mapping[str, OptionValue], progress: Progress
    ) -> None:
        """See `FormatDriver.amend`."""
        from nbdqcow.formats.qcow2 import amend

        await self._operate(amend.amend(self._image, options, progress))

    # -- snapshots -------------------------------------------------------

    def _refuse_for_data_file(self) -> None:
        if self.data_file is not None:
            raise NotSupported("snapshots can't be used with an external data file")

    async def snapshot_list(self) -> list[SnapshotInfo]:
        """Return the internal snapshots in the table's order."""
        from nbdqcow.formats.qcow2 import snapshot

        async with self.lock:
            snapshots, _ = await snapshot.read(self._image)
        return [one.info for one in snapshots]

    async def snapshot_create(
        self,
        name: str,
        *,
        vm_state_length: int = 0,
        vm_clock_nanoseconds: int = 0,
        icount: int | None = None,
        date_nanoseconds: int | None = None,
    ) -> SnapshotInfo:
        """Keep the disk's content as it is now; ``date_nanoseconds`` since the
        epoch, None for now. Several snapshots may have one name.

        Raises `BlockError`.
        """
        from nbdqcow.formats.qcow2 import snapshot

        self._refuse_for_data_file()
        return await self._operate(
            snapshot.create(
                self._image,
                name,
                vm_state_length=vm_state_length,
                vm_clock_nanoseconds=vm_clock_nanoseconds,
                icount=icount,
                date_nanoseconds=date_nanoseconds,
            )
        )

    async def snapshot_apply(self, id_or_name: str) -> None:
        """Make the disk what it was in a snapshot, which stays; ``size`` may
        change with it. An ID comes before all names.

        Raises `BlockError`, ENOENT if there is no such snapshot.
        """
        from nbdqcow.formats.qcow2 import snapshot

        self._refuse_for_data_file()
        await self._operate(snapshot.apply(self._image, id_or_name))

    async def snapshot_delete(self, id_or_name: str) -> None:
        """Remove a snapshot, and free what only it had. An ID comes before
        all names.

        Raises `BlockError`, ENOENT if there is no such snapshot.
        """
        from nbdqcow.formats.qcow2 import snapshot

        self._refuse_for_data_file()
        await self._operate(snapshot.delete(self._image, id_or_name))

    # -- encryption ------------------------------------------------------

    async def amend_keys(
        self,
        values: Mapping[str, OptionValue],
        secrets: Secrets,
        *,
        force: bool = False,
    ) -> None:
        """See `FormatDriver.amend_keys`."""
        image = self._image
        await self._operate(encryption.amend_keys(image, values, secrets, force=force))

    # -- dirty bitmaps ---------------------------------------------------

    def bitmap_list(self) -> list[BitmapInfo]:
        """Return all persistent bitmaps."""
        return self._image.bitmaps.infos

    def bitmap_add(
        self, name: str, *, granularity: int | None = None, enabled: bool = True
    ) -> None:
        """Add an empty bitmap; on disk it will be when the image is closed.

        ``granularity`` is bytes of the disk for a bit, a power of 2 from 512
        on; by default the cluster size, if that is 4 to 64 KiB. A bitmap that
        is not enabled takes no notice of writes. Raises `BlockError`.
        """
        self._image.check_writable()
        self._image.bitmaps.add(name, granularity, enabled=enabled)

    async def bitmap_remove(self, name: str) -> None:
        """Remove a bitmap, an inconsistent one also. Raises `BlockError`."""
        await self._operate(self._image.bitmaps.remove(name))

    def bitmap_enable(self, name: str, enabled: bool = True) -> None:
        """Let writes be marked in a bitmap, or no longer. Raises `BlockError`."""
        self._image.check_writable()
        self._image.bitmaps.enable(name, enabled)

    def bitmap_clear(self, name: str) -> None:
        """Forget the writes of a bitmap. Raises `BlockError`."""
        self._image.check_writable()
        self._image.bitmaps.clear(name)

    async def bitmap_merge(self, name: str, source: str) -> None:
        """Add the writes of the bitmap ``source`` to another one.

        Their granularities may differ. Neither can be cleared, enabled or disabled
        meanwhile. Raises `BlockError`.
        """
        await self._operate(self._image.bitmaps.merge(name, source))

    async def bitmap_merge_from(self, name: str, source: Bitmap) -> None:
        """Do as `bitmap_merge` does with a bitmap of another image, whose disk has
        the same size."""
        await self._operate(self._image.bitmaps.merge(name, source))

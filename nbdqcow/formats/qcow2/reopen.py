"""An image that takes no changes any more, or changes again, while it is in use.

Read-only, the file is as after closing it: all metadata on disk, no mark of
postponed refcounts, bitmaps stored. To write again, they are in use again.
"""

import errno
from contextlib import suppress
from typing import TYPE_CHECKING

from nbdqcow.block.storage import StorageDriver
from nbdqcow.errors import BlockError, CorruptImage, ImageError

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.driver import Qcow2Driver


async def stop_writing(image: "Qcow2Driver") -> None:
    """Let the writes that have begun end, and bring everything to disk.

    Raises `BlockError`, `ImageError` or `OSError`; the image can be written
    then as before.
    """
    if image.read_only:
        # It was found to be damaged: nothing more goes to disk.
        return
    async with image.operating, image.lock:
        image.set_read_only(True)
        try:
            await image.writers.quiet()
        except BaseException:
            image.set_read_only(False)
            raise
    try:
        await image.tasks.settle()
        await image.bitmaps.store()
        await image.writeback.finish()
        await _reopen_others(image, read_only=True)
    except BaseException as error:
        if image.failed:
            # On disk the bitmaps may be stored already, by the new header.
            raise
        try:
            await _reopen_others(image, read_only=False)
            await image.bitmaps.begin_use(up_to_date=False)
        except BaseException:
            # On disk the bitmaps may seem to be up to date.
            image.fail()
            raise
        image.set_read_only(False)
        if isinstance(error, CorruptImage):
            await image.mark_corrupt(str(error))
        raise


async def start_writing(image: "Qcow2Driver") -> None:
    """Allow writes; the storage has been opened for them.

    Raises `BlockError`, `ImageError` or `OSError`; nothing has changed then.
    """
    if image.shows_old_disk:
        raise ImageError("A snapshot can only be opened read-only")
    if image.failed:
        raise BlockError(errno.EIO, "the image's header could not be written")
    image.header.check_supported(read_only=False)
    if image.header.dirty:
        raise ImageError(
            "The image was not closed, and its refcounts must be repaired: open it"
            " for writing anew"
        )
    try:
        await _reopen_others(image, read_only=False)
        await image.prepare_for_writing()
        await image.bitmaps.begin_use(up_to_date=True)
    except BaseException:
        # What went wrong first is what is told. A data file that stays open for
        # writing is not written to.
        with suppress(OSError, ImageError):
            await _reopen_others(image, read_only=True)
        raise
    image.set_read_only(False)


async def _reopen_others(image: "Qcow2Driver", *, read_only: bool) -> None:
    """Do the same with the files beside the image's own."""
    others: list[StorageDriver] = []
    for file in (image.data_file, image.data):
        if file is not None and file is not image.storage and file not in others:
            others.append(file)
    for file in others:
        await file.reopen(read_only=read_only)

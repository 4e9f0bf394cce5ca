"""External data files: guest data in a file of its own, beside the metadata.

Guest data is at the guest's offset in the data file, so its clusters have no
reference counts. One of them is at offset 0, which in an L2 entry means "none"
everywhere else. In memory, therefore, an entry that names a cluster of a data
file carries `IN_DATA_FILE` in its offset; no image is that large.

A raw data file holds at any moment what the disk holds, so zeroes are always
written to it.

Source: qcow2.txt, "Header" (external data file bit, raw external data bit),
"Cluster mapping".
"""

import contextlib
import errno
from array import array
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from nbdqcow.errors import (
    BlockError,
    CorruptImage,
    NotSupported,
    UnsupportedFeature,
)
from nbdqcow.formats.qcow2 import discard as qcow2_discard
from nbdqcow.formats.qcow2.entries import (
    IN_DATA_FILE,
    OFFSET_MASK,
    OFLAG_COMPRESSED,
    OFLAG_COPIED,
)
from nbdqcow.formats.qcow2.header import (
    AUTOCLEAR_RAW_DATA_FILE,
    CRYPT_NONE,
    Header,
)
from nbdqcow.formats.words import dump_be64, load_be64
from nbdqcow.types import COMPRESSED, DATA, ZERO_ALLOCATED, Buffer, Run

if TYPE_CHECKING:
    from nbdqcow.block.driver import WritePlan
    from nbdqcow.formats.qcow2.driver import Qcow2Driver


def is_raw(header: Header) -> bool:
    """Whether the data file can be read without the metadata."""
    return bool(header.autoclear_features & AUTOCLEAR_RAW_DATA_FILE)


def keeps_what_is_behind(image: "Qcow2Driver") -> bool:
    """Whether a larger disk shows what the data file has behind the disk's end: not
    where that would be noise."""
    return is_raw(image.header) and image.header.crypt_method == CRYPT_NONE


def attach(image: "Qcow2Driver") -> None:
    """Let an image's tables and maps be those of one with a data file. Raises
    `UnsupportedFeature` for a disk that is too large."""
    if image.size > IN_DATA_FILE:
        raise UnsupportedFeature("the disk is too large for an external data file")
    mapping, tables = image.mapping, image.tables
    step = tables.entry_words

    def load_entries(data: Buffer) -> "array[int]":
        words = load_be64(data)
        for index in range(0, len(words), step):
            entry = words[index]
            if entry & (OFFSET_MASK | OFLAG_COPIED) and not entry & OFLAG_COMPRESSED:
                words[index] = entry | IN_DATA_FILE
        return words

    def dump_entries(words: "array[int]") -> bytes:
        words = words[:]
        for index in range(0, len(words), step):
            if not words[index] & OFLAG_COMPRESSED:
                words[index] &= ~IN_DATA_FILE
        return dump_be64(words)

    def try_map(offset: int, length: int) -> Run | None:
        try:
            run = mapping.try_map(offset, length)
            return run and _in_data_file(offset, run)
        except CorruptImage:
            # The coroutine finds the same, and marks the image.
            return None

    async def map_(offset: int, length: int) -> Run:
        try:
            return _in_data_file(offset, await mapping.map(offset, length))
        except CorruptImage as error:
            await image.mark_corrupt(str(error))
            raise

    def try_map_write(offset: int, length: int) -> int:
        try:
            host_offset = mapping.try_map_write(offset, length)
        except CorruptImage:
            return -1
        return offset if host_offset == offset | IN_DATA_FILE else -1

    tables.load_entries, tables.dump_entries = load_entries, dump_entries
    image.try_map = try_map  # type: ignore[method-assign]
    image.map = map_  # type: ignore[method-assign]
    image.try_map_write = try_map_write  # type: ignore[method-assign]


def _in_data_file(offset: int, run: Run) -> Run:
    """Return a run with its place in the data file, which is its own offset.

    Raises `CorruptImage` if the tables say something else.
    """
    kind, host_offset, length = run
    if kind in (DATA, ZERO_ALLOCATED) or host_offset & IN_DATA_FILE:
        if host_offset != offset | IN_DATA_FILE:
            raise _wrong_place(offset, host_offset)
        return kind, offset, length
    if kind == COMPRESSED:
        raise CorruptImage(
            "Compressed cluster entry found in image with external data file"
            f" (guest offset {offset:#x})"
        )
    return run


def _wrong_place(offset: int, host_offset: int) -> CorruptImage:
    return CorruptImage(
        f"External data file host cluster offset {host_offset & ~IN_DATA_FILE:#x}"
        f" does not match guest cluster offset: {offset:#x}"
    )


# -- writing -----------------------------------------------------------------


def place_plan(plan: "WritePlan") -> None:
    """Let a plan say where in the data file it goes. Raises `CorruptImage`."""
    if plan.host_offset != plan.guest_offset | IN_DATA_FILE:
        raise _wrong_place(plan.guest_offset, plan.host_offset)
    plan.host_offset = plan.guest_offset


def check_inside(image: "Qcow2Driver", plan: "WritePlan") -> None:
    """Refuse a write past the end of a disk that has become smaller, in a cluster
    that it still has: in a raw data file that would be there when it grows. Raises
    `BlockError`."""
    end = plan.guest_offset + plan.length
    if end > image.size and keeps_what_is_behind(image):
        raise BlockError(errno.ENOSPC, "the disk has become smaller")


async def write_zeroes(
    image: "Qcow2Driver",
    offset: int,
    length: int,
    *,
    may_unmap: bool,
    no_fallback: bool,
) -> None:
    """See `FormatDriver.write_zeroes`."""
    if is_raw(image.header):
        if image.is_covering:
            raise NotSupported("unallocated clusters would show the backing file")
        # What is not mapped reads as zeroes without it.
        async with _changing(image, offset, length):
            await image.data.write_zeroes(
                offset, length, may_unmap=may_unmap, no_fallback=no_fallback
            )
        return
    if may_unmap:
        await _discard_data(image, offset, length)
    await qcow2_discard.write_zeroes(image, offset, length, may_unmap=may_unmap)


async def discard(image: "Qcow2Driver", offset: int, length: int) -> None:
    """See `FormatDriver.discard`."""
    if is_raw(image.header):
        with contextlib.suppress(NotSupported):
            await write_zeroes(image, offset, length, may_unmap=True, no_fallback=True)
        return
    await _discard_data(image, offset, length)
    await qcow2_discard.discard(image, offset, length)


async def _discard_data(image: "Qcow2Driver", offset: int, length: int) -> None:
    """Give the space of a range back, before the tables say that it is zero:
    then no other write to it can have been answered meanwhile."""
    if image.discard_freed:
        async with _changing(image, offset, length):
            with contextlib.suppress(OSError):
                await image.data.discard(offset, length)


@contextlib.asynccontextmanager
async def _changing(
    image: "Qcow2Driver", offset: int, length: int
) -> AsyncIterator[None]:
    """Be a write that has begun, for those who wait for such ones; bitmaps know of
    it when it ends."""
    image.check_writable()
    epoch = image.writers.enter_in_place()
    try:
        yield
    finally:
        try:
            await image.note_request(offset, length)
        finally:
            image.writers.leave_in_place(epoch)

"""Changing the header of an open image as a whole.

A sector is written as a whole or not at all, the header's cluster is not. What
changes behind the first sector changes while that one, in an interim form,
needs nothing there: a power cut leaves the old header or the new one.

Source: qcow2.txt, "Header", "Header extensions".
"""

import errno
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Final

from nbdqcow.errors import BlockError, ImageError
from nbdqcow.formats.qcow2 import header as h
from nbdqcow.formats.qcow2.header import Header
from nbdqcow.units import SECTOR_SIZE, round_up

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.driver import Qcow2Driver

_BACKING_OFFSET: Final = 8
"""Where ``backing_file_offset`` (u64) lies."""


async def update_header(image: "Qcow2Driver", change: Callable[[Header], None]) -> None:
    """Change the header on disk and, once that is durable, in memory.

    The image's lock is held. Raises `BlockError` if it does not fit.
    """
    # A commit that marks the image as dirty has no other lock.
    async with image.header_lock:
        await _update_header(image, change)


async def _update_header(
    image: "Qcow2Driver", change: Callable[[Header], None]
) -> None:
    header, storage = image.header, image.storage
    new = replace(header, extensions=list(header.extensions))
    change(new)
    try:
        packed = new.pack()
    except ImageError as error:
        raise BlockError(errno.ENOSPC, str(error)) from None
    try:
        for offset, data in _writes(header, packed):
            await storage.pwritev(offset, [data])
            await storage.flush()
    except BaseException:
        # Which header is valid nobody knows now.
        image.fail()
        raise
    for one in fields(new):
        setattr(header, one.name, getattr(new, one.name))


def _writes(old: Header, packed: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield what leads from an old header to a new one: each durable before
    the next."""
    first, rest = packed[:SECTOR_SIZE], packed[SECTOR_SIZE:]
    if rest:
        yield from _interim_writes(old, len(packed))
        yield SECTOR_SIZE, rest
    # What is left of a longer one is no part of the header.
    yield 0, first.ljust(SECTOR_SIZE, b"\0")


def _interim_writes(old: Header, new_length: int) -> Iterator[tuple[int, bytes]]:
    """Yield what makes the first sector all of the old header, without names
    of features; the backing file's name is copied out of the way.

    Nothing if it does not fit: then some sector is torn at worst.
    """
    interim = replace(
        old,
        extensions=[e for e in old.extensions if e.type != h.EXT_FEATURE_NAMES],
        backing_filename=None,
    )
    name = (old.backing_filename or "").encode("utf-8", "surrogateescape")
    place = round_up(max(new_length, old.backing_file_offset + len(name)), 8)
    packed = interim.pack()
    if len(packed) > SECTOR_SIZE or place + len(name) > old.cluster_size:
        return
    if name:
        yield place, name
        pointer = place.to_bytes(8, "big") + len(name).to_bytes(4, "big")
        end = _BACKING_OFFSET + len(pointer)
        packed = packed[:_BACKING_OFFSET] + pointer + packed[end:]
    yield 0, packed.ljust(SECTOR_SIZE, b"\0")

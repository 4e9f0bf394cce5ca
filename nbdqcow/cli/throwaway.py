"""Writes that nobody keeps: ``nbdqcow-nbd --snapshot``."""

import asyncio
import os
import tempfile
from typing import TYPE_CHECKING, Final

from nbdqcow.block.registry import (
    blocking_file,
    format_driver,
    format_tool,
    storage_driver,
)
from nbdqcow.errors import ImageError
from nbdqcow.units import SECTOR_SIZE, round_up

if TYPE_CHECKING:
    from nbdqcow.block.node import Node

_FORMAT: Final = "qcow2"
_DIRECTORY: Final = "/var/tmp"
"""Not /tmp, which may be memory: a guest can write as much as its disk holds."""


async def open_throwaway(base: "Node", detect_zeroes: str = "off") -> "Node":
    """Return a writable image over ``base``, in a file without a name that is
    gone once it is closed. Closing it closes ``base`` as well.

    The file is in the directory that TMPDIR names, or in /var/tmp. Raises
    `ImageError` if there can be none; ``base`` is left open then.
    """
    from nbdqcow.block.node import Node

    directory = os.environ.get("TMPDIR") or _DIRECTORY
    try:
        path = await asyncio.to_thread(_make_blocking, directory, base.size)
    except OSError as error:
        raise ImageError(
            f"Could not create a temporary overlay in '{directory}': {error.strerror}"
        ) from None
    try:
        storage = await storage_driver("file").open(path, cache="unsafe")
    finally:
        os.unlink(path)
    try:
        driver = await format_driver(_FORMAT).open(
            storage, read_only=False, options={"discard": True}
        )
    except BaseException:
        await storage.close()
        raise
    return Node(
        driver,
        filename=base.filename,
        backing=base,
        unsafe=True,
        detect_zeroes=detect_zeroes,
    )


def _make_blocking(directory: str, size: int) -> str:
    """Make an empty image for a disk of ``size`` bytes; return its path."""
    tool = format_tool(_FORMAT)
    plan = tool.prepare({"size": round_up(size, SECTOR_SIZE)})
    fd, path = tempfile.mkstemp(prefix="nbdqcow-", suffix=".qcow2", dir=directory)
    os.close(fd)
    try:
        file = blocking_file().create(path)
        try:
            tool.create(file, plan)
        finally:
            file.close()
    except BaseException:
        os.unlink(path)
        raise
    return path

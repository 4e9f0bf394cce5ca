"""Giving an image's file another name while it is in use."""

import errno
import os
from pathlib import Path
from typing import NamedTuple

from nbdqcow.block.directories import sync_directory_blocking
from nbdqcow.block.node import Node
from nbdqcow.block.open import backing_path
from nbdqcow.block.registry import is_remote, split_protocol
from nbdqcow.errors import BlockError, ImageError
from nbdqcow.pool import Pool


async def rename_image(node: Node, new_filename: str) -> None:
    """Rename the file of ``node``, which goes on serving, to ``new_filename``.

    The backing link is kept: a relative name in the image is changed if the
    file moves to another directory, in an order in which the link holds at
    every moment. Images that name this one as their backing file are not
    looked for. Nothing that exists is overwritten.

    Raises `BlockError` (EEXIST, EXDEV, ...; EROFS if the link would have to be
    changed in a read-only image), `NotSupported` if the format can't change
    it, `ImageError` for an image that is no local file.
    """
    old_filename = node.filename
    if is_remote(old_filename) or is_remote(new_filename):
        raise ImageError("only a local file can be renamed")
    old_path, new_path = (split_protocol(n)[1] for n in (old_filename, new_filename))
    link = _moved_link(node.driver.backing_filename, old_path, new_path)
    backing_format = node.driver.backing_format
    if link is not None:
        # This one is right from both directories.
        await node.change_backing_file(link.absolute, backing_format)
    pool = Pool()
    try:
        await pool.run(_rename_blocking, old_path, new_path)
    except OSError as error:
        if link is not None:
            await node.change_backing_file(link.old_name, backing_format)
        raise BlockError(
            error.errno or errno.EIO,
            f"Could not rename '{old_filename}' to '{new_filename}': {error.strerror}",
        ) from error
    finally:
        await pool.close()
    node.filename = new_filename
    node.driver.storage.filename = new_path
    if link is not None:
        await node.change_backing_file(link.new_name, backing_format)


class _Link(NamedTuple):
    """The names of a backing file: as the image has it, for its new directory,
    and from everywhere."""

    old_name: str
    new_name: str
    absolute: str


def _moved_link(
    backing_filename: str | None, old_path: str, new_path: str
) -> _Link | None:
    """Return the names if the image's own would mean another file from the new
    directory."""
    if backing_filename is None or is_remote(backing_filename):
        return None
    path = backing_path(old_path, backing_filename)
    old_directory, new_directory = (
        os.path.realpath(os.path.dirname(p)) for p in (old_path, new_path)
    )
    if os.path.isabs(path) and path == backing_path(new_path, backing_filename):
        return None
    if old_directory == new_directory:
        return None
    # What the last name is a link to may change, and the image follows it.
    directory = os.path.realpath(os.path.dirname(path))
    absolute = os.path.join(directory, os.path.basename(path))
    return _Link(backing_filename, os.path.relpath(absolute, new_directory), absolute)


def _rename_blocking(old_path: str, new_path: str) -> None:
    """Rename a file unless the new name is taken, durably."""
    try:
        os.link(old_path, new_path, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        # A file system without hard links.
        if os.path.lexists(new_path):
            raise FileExistsError(
                errno.EEXIST, os.strerror(errno.EEXIST), new_path
            ) from None
        os.rename(old_path, new_path)
    else:
        try:
            os.unlink(old_path)
        except OSError:
            # It has both names, and is to have the one that it had.
            os.unlink(new_path)
            raise
    for path in {Path(old_path).absolute().parent, Path(new_path).absolute().parent}:
        sync_directory_blocking(path)

"""How files are opened: the words of the options, and what is not a disk."""

import contextlib
import errno
import mmap
import os
import stat
from typing import Final, NamedTuple

from nbdqcow.block.storage import HEAD_LENGTH, FileRole, RoleOf
from nbdqcow.errors import ImageError, UsageError


class CacheMode(NamedTuple):
    """What a ``cache`` option means, in qemu's words and with its meaning.

    Attributes:
        direct: past the page cache (O_DIRECT).
        write_through: every write is durable when it returns.
        no_flush: flushes and FUA are ignored; a power cut may take anything.
    """

    direct: bool
    write_through: bool
    no_flush: bool


CACHE_MODES: Final = {
    "writeback": CacheMode(False, False, False),
    "writethrough": CacheMode(False, True, False),
    "none": CacheMode(True, False, False),
    "directsync": CacheMode(True, True, False),
    "unsafe": CacheMode(False, False, True),
}
NULL_DEVICE: Final = os.makedev(1, 3)
"""Linux's /dev/null, an empty disk: programs look with it whether there is an image
tool at all. Other character devices may do something when they are opened."""


def parse_cache_mode(name: str) -> CacheMode:
    """Return what a ``cache`` option says; raises `UsageError`."""
    try:
        return CACHE_MODES[name]
    except KeyError:
        raise UsageError(
            f"invalid cache mode '{name}' (it is one of {', '.join(CACHE_MODES)})"
        ) from None


def parse_discard_mode(name: str) -> bool:
    """Return whether a ``discard`` option wants space to be freed; raises
    `UsageError`."""
    if name not in ("unmap", "on", "ignore", "off"):
        raise UsageError(f"invalid discard mode '{name}' (it is unmap or ignore)")
    return name in ("unmap", "on")


def find_role(fd: int, role: FileRole | RoleOf) -> FileRole:
    """Return the role of an open file, for which its beginning may be needed."""
    if isinstance(role, FileRole):
        return role
    # Its own pages: O_DIRECT wants whole blocks of memory.
    with mmap.mmap(-1, HEAD_LENGTH) as head:
        try:
            length = os.preadv(fd, (head,), 0)
        except OSError:
            # Whoever reads it next says so.
            return FileRole.IMAGE
        return role(head[:length])


def open_blocking(filename: str, flags: int) -> int:
    """Return a descriptor of a regular file, a block device or `NULL_DEVICE`.

    A pipe is refused without waiting for its other end, and a tape without
    winding it. Raises `ImageError` for these, `OSError` for the rest.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(filename)
            _check_kind(filename, status, flags)
            if stat.S_ISCHR(status.st_mode):
                # Nothing written there is kept, so that must fail.
                flags &= ~os.O_ACCMODE
        # Should the name become a pipe's just now, it doesn't wait either. A
        # disk's file does not know the flag.
        fd = os.open(filename, flags | os.O_NONBLOCK | os.O_NOCTTY, 0o644)
        try:
            _check_kind(filename, os.fstat(fd), flags)
        except ImageError:
            os.close(fd)
            raise
    except ValueError as error:
        # A null byte, which Python refuses.
        raise ImageError(f"Could not open {filename!r}: {error}") from None
    except OSError as error:
        if error.errno == errno.EINVAL and flags & os.O_DIRECT:
            raise ImageError(
                f"Could not open '{filename}': filesystem does not support O_DIRECT"
            ) from error
        raise
    return fd


def _check_kind(filename: str, status: os.stat_result, flags: int) -> None:
    reason = 0
    if stat.S_ISDIR(status.st_mode):
        if flags & os.O_ACCMODE != os.O_RDONLY:
            reason = errno.EISDIR
        elif not os.access(filename, os.R_OK, effective_ids=True):
            reason = errno.EACCES
    elif stat.S_ISSOCK(status.st_mode):
        reason = errno.ENXIO
    if reason:
        # As open(2) has it.
        raise OSError(reason, os.strerror(reason))
    if not (
        stat.S_ISREG(status.st_mode)
        or stat.S_ISBLK(status.st_mode)
        or (stat.S_ISCHR(status.st_mode) and status.st_rdev == NULL_DEVICE)
    ):
        raise ImageError(
            f"Could not open '{filename}': 'file' driver requires '{filename}' to be a"
            " regular file"
        )

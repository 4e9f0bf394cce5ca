"""Opening a file that is open with other rights, under the same number."""

import contextlib
import fcntl
import os

from nbdqcow.errors import ImageError
from nbdqcow.storage import locks


def reopen_blocking(
    fd: int,
    filename: str,
    locking: locks.Locking | None,
    read_only: bool,
) -> None:
    """Give ``fd`` or take from it the right to write.

    ``locking``: how it is locked, None for not at all. At no moment is the file
    without locks. Raises `ImageError` (`ImageInUse`), and all is as it was then.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_DIRECT | os.O_NONBLOCK)
    flags |= os.O_RDONLY if read_only else os.O_RDWR
    wanted = None if locking is None else locking.permissions(read_only=read_only)
    try:
        # By its number: the file may have been renamed.
        other = os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(f"Could not open '{filename}': {error.strerror}") from error
    try:
        if wanted is not None:
            if not read_only:
                # On the old descriptor, whose own locks are no conflict.
                locks.lock_blocking(fd, filename, wanted)
            locks.hold_blocking(other, filename, wanted)
        _replace_blocking(fd, other, wanted is not None)
    except BaseException:
        if locking is not None:
            locks.release_blocking(fd, locking.permissions(read_only=not read_only))
        raise
    finally:
        os.close(other)


def _replace_blocking(fd: int, other: int, locked: bool) -> None:
    """Let ``fd`` be the file that ``other`` has open; what it was has no locks
    any more, even if a read in another thread keeps it open for a while."""
    old = os.dup(fd)
    try:
        os.dup2(other, fd, inheritable=False)
        if locked:
            # The file has been replaced: its last locks end with that read.
            with contextlib.suppress(OSError):
                locks.release_blocking(old, locks.NOTHING)
    finally:
        os.close(old)

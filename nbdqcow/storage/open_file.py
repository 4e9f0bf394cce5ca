"""Opening local files without blocking the loop."""

import os
from typing import TYPE_CHECKING

from nbdqcow.block.storage import FileRole, RoleOf
from nbdqcow.errors import ImageError
from nbdqcow.pool import Pool
from nbdqcow.storage import locks
from nbdqcow.storage.opening import (
    find_role,
    open_blocking,
    parse_cache_mode,
    parse_discard_mode,
)

if TYPE_CHECKING:
    from nbdqcow.storage.file import FileStorage


async def open_file(
    kind: "type[FileStorage]",
    filename: str,
    flags: int,
    role: FileRole | RoleOf,
    locking: locks.Locking | None,
    read_only: bool,
    cache: str,
    discard: str,
) -> "FileStorage":
    """Open a file in a thread, and lock it unless ``locking`` is None; its role
    there is not known yet. For `FileStorage.open`, which says what the arguments
    are. Raises `ImageError`."""
    mode = parse_cache_mode(cache)
    unmap = parse_discard_mode(discard)
    if mode.direct:
        # Not above: it builds on the module that asks.
        from nbdqcow.storage.direct import DirectFileStorage

        kind = DirectFileStorage
        flags |= os.O_DIRECT
    pool = Pool()
    fds: list[int] = []
    opened: list[FileStorage] = []

    def open_in_thread() -> None:
        fd = open_blocking(filename, flags)
        fds.append(fd)
        held = locking
        if held is not None:
            held = held._replace(role=find_role(fd, role))
            permissions = held.permissions(read_only=read_only)
            locks.lock_blocking(fd, filename, permissions)
        storage = kind(
            fd, filename, read_only=read_only, cache=mode, unmap=unmap, pool=pool
        )
        storage.locking = held
        opened.append(storage)

    try:
        await pool.run(open_in_thread)
    except BaseException as error:
        # The thread may have finished for a task that was cancelled meanwhile.
        if opened:
            await opened[0].close()
        else:
            for fd in fds:
                os.close(fd)
            await pool.close()
        if isinstance(error, OSError):
            raise ImageError(
                f"Could not open '{filename}': {error.strerror}"
            ) from error
        raise
    return opened[0]

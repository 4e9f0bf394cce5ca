"""Image locks on the same bytes of the file as QEMU's.

A program says what it does with an image by holding read locks on single
bytes of it: on byte 100 + n for a permission that it has, on byte 200 + n for
one that it does not grant to others. It takes its own locks first and then
looks whether anybody holds one that conflicts, so of two programs that start
at once at most one goes on. The bytes are QEMU's (``block/file-posix.c``,
``raw_check_lock_bytes``); the file's length has nothing to do with them.

These are "open file description" locks: they end when the file descriptor is
closed, whatever else the process opens and closes.
"""

import contextlib
import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

from nbdqcow.block.storage import FileRole
from nbdqcow.errors import HELD_BY, ImageError, ImageInUse

CONSISTENT_READ: Final = 0x1
WRITE: Final = 0x2
WRITE_UNCHANGED: Final = 0x4
RESIZE: Final = 0x8

_NAMES: Final = {
    CONSISTENT_READ: "consistent read",
    WRITE: "write",
    WRITE_UNCHANGED: "write unchanged",
    RESIZE: "resize",
}
_HELD_BYTE: Final = 100
_UNSHARED_BYTE: Final = 200
_SEARCH_SECONDS: Final = 1.0

# <linux/fcntl.h>; the fcntl module does not have them before Python 3.13.
_F_OFD_GETLK: Final = 36
_F_OFD_SETLK: Final = 37
# struct flock of 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid.
_FLOCK: Final = struct.Struct("@hhqqi0q")


class Permissions(NamedTuple):
    """What a user of an image does (``held``) and does not let others do
    (``unshared``), as bits. What QEMU takes for the same kind of opening is
    seen in ``/proc/PID/fdinfo`` of a running qemu-nbd."""

    held: int
    unshared: int


READ_WRITE: Final = Permissions(CONSISTENT_READ | WRITE | RESIZE, WRITE | RESIZE)
NOTHING: Final = Permissions(0, 0)


_UNSHARED: Final = {
    FileRole.IMAGE: WRITE | RESIZE,
    FileRole.DATA: RESIZE,
    FileRole.PLAIN: 0,
    FileRole.SOURCE: WRITE | RESIZE,
    FileRole.KEYS: CONSISTENT_READ | WRITE,
}


def choose(
    role: FileRole,
    *,
    read_only: bool,
    shared: bool = False,
    resizes: bool = False,
    reads_data: bool = True,
) -> Permissions:
    """Return what a file is opened with, as QEMU has it.

    Args:
        role: what the file is. To keep other writers off a data file is left to the
            lock of its image.
        read_only: nothing is written to it.
        shared: others may do anything meanwhile (``-U``).
        resizes: its length is to be changed, though it is no image.
        reads_data: False if nothing is wanted but what its metadata say.
    """
    held = CONSISTENT_READ if reads_data else 0
    if not read_only:
        held |= WRITE
        if resizes or role in (FileRole.IMAGE, FileRole.DATA):
            held |= RESIZE
    return Permissions(held, 0 if shared else _UNSHARED[role])


class Locking(NamedTuple):
    """How a file that is open is locked; see `choose`."""

    role: FileRole
    shared: bool
    resizes: bool

    def permissions(self, *, read_only: bool) -> Permissions:
        """Return what the file is locked with."""
        return choose(
            self.role, read_only=read_only, shared=self.shared, resizes=self.resizes
        )


def lock_blocking(fd: int, filename: str, permissions: Permissions) -> None:
    """Take the locks on ``fd`` until it is closed.

    Raises `ImageInUse` in QEMU's words if another program's locks conflict,
    `ImageError` if the file can't be locked at all. The caller then closes
    ``fd``, which gives back whatever was locked.
    """
    hold_blocking(fd, filename, permissions)
    for bit, name in _NAMES.items():
        if permissions.held & bit:
            _check_byte(fd, filename, _byte(_UNSHARED_BYTE, bit), f'"{name}"')
        if permissions.unshared & bit:
            _check_byte(fd, filename, _byte(_HELD_BYTE, bit), f'shared "{name}"')


def hold_blocking(fd: int, filename: str, permissions: Permissions) -> None:
    """Take the locks without a look at those of others: for a descriptor that
    is to take the place of one that has them."""
    for bit in _NAMES:
        if permissions.held & bit:
            _lock_byte(fd, filename, _byte(_HELD_BYTE, bit))
        if permissions.unshared & bit:
            _lock_byte(fd, filename, _byte(_UNSHARED_BYTE, bit))


def release_blocking(fd: int, kept: Permissions) -> None:
    """Give all locks of ``fd`` back but the ``kept`` ones."""
    for bit in _NAMES:
        for base, bits in (
            (_HELD_BYTE, kept.held),
            (_UNSHARED_BYTE, kept.unshared),
        ):
            if not bits & bit:
                unlock = _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, _byte(base, bit), 1, 0)
                fcntl.fcntl(fd, _F_OFD_SETLK, unlock)


def _byte(base: int, bit: int) -> int:
    return base + bit.bit_length() - 1


def _lock_byte(fd: int, filename: str, byte: int) -> None:
    lock = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
    try:
        fcntl.fcntl(fd, _F_OFD_SETLK, lock)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            # Somebody holds an exclusive lock: not QEMU, but in use all the same.
            raise ImageInUse(
                f"Failed to lock byte {byte}\n{_hint(fd, filename, byte)}"
            ) from None
        raise ImageError(
            f"Cannot lock '{filename}': {error.strerror}"
            " (it can be opened with locking off)"
        ) from error


def _check_byte(fd: int, filename: str, byte: int, what: str) -> None:
    # Asking for an exclusive lock finds shared ones as well.
    lock = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, _F_OFD_GETLK, lock)
    if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
        raise ImageInUse(f"Failed to get {what} lock\n{_hint(fd, filename, byte)}")


def _hint(fd: int, filename: str, byte: int) -> str:
    hint = f"Is another process using the image [{filename}]?"
    holders: list[str] = []
    # Without /proc nobody is named.
    with contextlib.suppress(OSError):
        holders.extend(_find_holders(fd, byte))
    if holders:
        hint += f"{HELD_BY}{', '.join(holders)}."
    return hint


def _find_holders(fd: int, byte: int) -> Iterator[str]:
    """Yield ``command (pid N)`` for each process seen to have ``byte`` locked.

    The kernel does not say who holds such a lock, but each descriptor's
    ``fdinfo`` lists its own. Processes of other users stay hidden, and a
    crowded machine is not searched for long: an error should come at once.
    """
    deadline = time.monotonic() + _SEARCH_SECONDS
    # Only descriptors of this file's name are looked at closely: listing the
    # locks of one is slow if the file has many.
    name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
    own = (str(os.getpid()), str(fd))
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            for number in os.listdir(f"/proc/{pid}/fd"):
                if time.monotonic() > deadline:
                    return
                link = os.readlink(f"/proc/{pid}/fd/{number}")
                if (
                    os.path.basename(link) == name
                    and (pid, number) != own
                    and _descriptor_holds(pid, number, fd, byte)
                ):
                    yield f"{_command_of(pid)} (pid {pid})"
                    break
        except OSError:
            # It ended meanwhile, or it is not ours to look at.
            continue


def _descriptor_holds(pid: str, number: str, fd: int, byte: int) -> bool:
    """Whether a process's descriptor is the same file with ``byte`` locked."""
    if not os.path.samestat(os.stat(f"/proc/{pid}/fd/{number}"), os.fstat(fd)):
        return False
    with open(f"/proc/{pid}/fdinfo/{number}") as file:
        locks = [line.split() for line in file if line.startswith("lock:")]
    # lock: 1: OFDLCK ADVISORY READ -1 fe:00:2171649 100 101
    return any(
        int(fields[-2]) <= byte and (fields[-1] == "EOF" or byte <= int(fields[-1]))
        for fields in locks
    )


def _command_of(pid: str) -> str:
    if pid == str(os.getpid()):
        # One image under two names, say, not another program to look for.
        return "this process"
    with open(f"/proc/{pid}/comm", errors="replace") as file:
        name = file.read().rstrip("\n")
    return "".join(c if c.isprintable() else "?" for c in name)

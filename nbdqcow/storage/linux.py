"""System calls of Linux that Python's ``os`` does not have, or not whole."""

import ctypes
import errno
import os
from typing import Final

from nbdqcow.errors import NotSupported
from nbdqcow.types import Buffers

FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
FALLOC_FL_ZERO_RANGE: Final = 0x10

EXT4_MAGIC: Final = 0xEF53
TMPFS_MAGIC: Final = 0x01021994
OVERLAYFS_MAGIC: Final = 0x794C7630

# <linux/fs.h>: forget a range of a block device; u64 start, u64 length.
BLKDISCARD: Final = 0x1277

# IOV_MAX of Linux.
_MAX_BUFFERS: Final = 1024

PAGE_SIZE: Final = os.sysconf("SC_PAGE_SIZE")

_libc = ctypes.CDLL(None, use_errno=True)

_fallocate = _libc.fallocate64
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate.restype = ctypes.c_int

_fstatfs = _libc.fstatfs64
_fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)
_fstatfs.restype = ctypes.c_int

mincore = _libc.mincore
"""``mincore(address, length, vector_address)``: see mincore(2)."""
mincore.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p)
mincore.restype = ctypes.c_int


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Do what the system call does; raises `OSError`."""
    if _fallocate(fd, mode, offset, length) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def filesystem_type(fd: int) -> int:
    """Return the magic number of the file system that ``fd`` is on. Raises
    `OSError`."""
    # struct statfs is 120 bytes on 64-bit Linux and begins with f_type.
    statfs = (ctypes.c_long * 32)()
    if _fstatfs(fd, statfs) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return int(statfs[0])


def pread_all(fd: int, offset: int, length: int) -> bytes:
    """Return exactly ``length`` bytes, zeroes where the file has ended."""
    data = os.pread(fd, length, offset)
    if len(data) == length:
        return data
    pieces = [data]
    nb_read = len(data)
    while data and nb_read < length:
        data = os.pread(fd, length - nb_read, offset + nb_read)
        pieces.append(data)
        nb_read += len(data)
    return b"".join(pieces).ljust(length, b"\0")


def pread_into(fd: int, offset: int, view: memoryview) -> None:
    """Fill ``view``, with zeroes where the file has ended."""
    nb_read = os.preadv(fd, (view,), offset)
    while nb_read < len(view):
        count = os.preadv(fd, (view[nb_read:],), offset + nb_read)
        if not count:
            view[nb_read:] = bytes(len(view) - nb_read)
            return
        nb_read += count


def pwrite_all(fd: int, offset: int, buffers: Buffers, flags: int = 0) -> None:
    """Write all of ``buffers``, however many they are, in as many calls as it
    takes. Raises `OSError`."""
    pending = [memoryview(buffer) for buffer in buffers if len(buffer)]
    index = 0
    while index < len(pending):
        nb_written = os.pwritev(
            fd, pending[index : index + _MAX_BUFFERS], offset, flags
        )
        if not nb_written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        offset += nb_written
        while index < len(pending) and nb_written >= len(pending[index]):
            nb_written -= len(pending[index])
            index += 1
        if nb_written:
            pending[index] = pending[index][nb_written:]


_NO_COPY: Final = (
    errno.EXDEV,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.EBADF,
    errno.EPERM,
    errno.ETXTBSY,
)


def copy_file_range(
    source_fd: int, source_offset: int, fd: int, offset: int, length: int
) -> None:
    """Copy all of ``length`` bytes between files inside the kernel.

    Raises `NotSupported` if these two can't be copied so, or the source ends
    before.
    """
    while length:
        try:
            done = os.copy_file_range(source_fd, fd, length, source_offset, offset)
        except OSError as error:
            if error.errno in _NO_COPY:
                raise NotSupported("the kernel can't copy these files") from None
            raise
        if not done:
            raise NotSupported("the source ends here")
        source_offset, offset, length = (
            source_offset + done, offset + done, length - done,
        )  # fmt: skip


class _PyBuffer(ctypes.Structure):
    """CPython's ``Py_buffer``."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def address_of(buffer: object) -> int:
    """Return where the bytes of a buffer (such as an ``mmap``) are.

    Valid as long as the object neither moves nor goes. `ctypes` itself gives
    the address of writable buffers only.
    """
    view = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(buffer), ctypes.byref(view), 0)
    address = view.buf
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))
    return int(address)

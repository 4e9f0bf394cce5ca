"""A block device of the Linux kernel's NBD client, ``/dev/nbdN``.

The kernel takes a socket that is past the handshake, and from then on sends
its requests on it. The calls are those of ``<linux/nbd.h>``: the device goes
when the process that attached it ends, however it ends, which a device that
was set up by netlink does not.
"""

import asyncio
import contextlib
import ctypes
import errno
import logging
import os
import select
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Final

from nbdqcow.errors import ProtocolError, UsageError
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.client import ClientHandshake, RemoteExport
from nbdqcow.server.server import Server
from nbdqcow.units import SECTOR_SIZE

logger = logging.getLogger(__name__)

# <linux/nbd.h>, and of <linux/fs.h> the last.
_SET_SOCK: Final = 0xAB00
_SET_BLKSIZE: Final = 0xAB01
_DO_IT: Final = 0xAB03
_CLEAR_SOCK: Final = 0xAB04
_SET_SIZE_BLOCKS: Final = 0xAB07
_DISCONNECT: Final = 0xAB08
_SET_FLAGS: Final = 0xAB0A
_BLKROSET: Final = 0x125D

_TIMEOUT: Final = 30.0
"""Seconds for our own server's part of the handshake."""
_ATTACH_TIMEOUT: Final = 5.0
"""Seconds that the kernel has to make the device usable."""
_WRITE_BACK_TIMEOUT: Final = 60.0
"""Seconds for what the kernel's cache still has when a device is detached."""
_LOOK_AGAIN: Final = 0.01

_libc = ctypes.CDLL(None, use_errno=True)
# fcntl.ioctl takes an argument of 32 bits: too few for a device's size.
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)
_libc.ioctl.restype = ctypes.c_int


def _ioctl(fd: int, request: int, argument: int = 0) -> None:
    if _libc.ioctl(fd, request, argument) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


class KernelDevice:
    """One attached device.

    Attributes:
        path: its name.
        nb_left_out: bytes at the end of the export that it does not show: its
            size is in whole sectors.
    """

    def __init__(self, path: str) -> None:
        """Open the device. Raises `UsageError`."""
        self.path = path
        self.nb_left_out = 0
        self._nb_sectors = 0
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            hint = ""
            if isinstance(error, FileNotFoundError):
                hint = " (is the kernel's module loaded? modprobe nbd)"
            raise UsageError(f"Failed to open {path}: {error.strerror}{hint}") from None

    def attach_blocking(self, sock: socket.socket, export_name: str) -> None:
        """Set the device up on ``sock``, a client's end of a connection to a
        server whose greeting has not been read. Raises `UsageError`."""
        sock.settimeout(_TIMEOUT)
        try:
            export = _negotiate(sock, export_name)
        except (OSError, ProtocolError) as error:
            raise UsageError(f"Failed to attach {self.path}: {error}") from None
        # The kernel's client waits for its replies.
        sock.settimeout(None)
        self._set_up(sock, export)

    def _set_up(self, sock: socket.socket, export: RemoteExport) -> None:
        self._nb_sectors, self.nb_left_out = divmod(export.size, SECTOR_SIZE)
        read_only = ctypes.c_int(bool(export.flags & nbd.FLAG_READ_ONLY))
        step = "socket"
        try:
            _ioctl(self._fd, _SET_SOCK, sock.fileno())
            step = "block size"
            # A partition table counts in them: those of most disks.
            _ioctl(self._fd, _SET_BLKSIZE, SECTOR_SIZE)
            step = "size"
            _ioctl(self._fd, _SET_SIZE_BLOCKS, self._nb_sectors)
            step = "flags"
            _ioctl(self._fd, _SET_FLAGS, export.flags)
            step = "read-only attribute"
            _ioctl(self._fd, _BLKROSET, ctypes.addressof(read_only))
        except OSError as error:
            if step != "socket":
                _ioctl(self._fd, _CLEAR_SOCK)
            raise UsageError(
                f"Failed to set NBD {step} of {self.path}: {error.strerror}"
            ) from None

    def run_blocking(self) -> None:
        """Let the kernel do its requests until the device is detached, or its
        connection is lost. Raises `OSError`."""
        # A signal would end it: the program's own way of ending comes first.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            _ioctl(self._fd, _DO_IT)
        finally:
            _ioctl(self._fd, _CLEAR_SOCK)

    def wait_usable_blocking(self) -> None:
        """Return once the device has its size and its partitions, while another
        thread is in `run_blocking`."""
        deadline = time.monotonic() + _ATTACH_TIMEOUT
        while not self._has_its_size() and time.monotonic() < deadline:
            time.sleep(_LOOK_AGAIN)
        # Whoever opens the device first makes the kernel read its partitions.
        os.close(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))

    def _has_its_size(self) -> bool:
        """Whether sysfs says that the device is attached, and how long it is; that
        comes a little later, and only then the kernel will read the partitions."""
        if _is_idle(self.path):
            return False
        try:
            size = _state_of(self.path).joinpath("size").read_text()
        except OSError:
            # There is no sysfs.
            return True
        return int(size) == self._nb_sectors

    def detach_blocking(self) -> None:
        """Write back what the kernel's cache has for the device, then detach it:
        `run_blocking` returns. Raises `OSError`."""
        _detach(self._fd, self.path)

    def close(self) -> None:
        """Close the device, which does not detach it."""
        os.close(self._fd)


def disconnect_blocking(path: str) -> None:
    """Detach a device, whoever attached it; nothing if nobody has.

    Raises `UsageError` if there is no such device, and `OSError`.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"Cannot open {path}: {error.strerror}") from None
    try:
        _detach(fd, path)
    finally:
        os.close(fd)


def _state_of(path: str) -> Path:
    return Path("/sys/block", os.path.basename(path))


def _is_idle(path: str) -> bool:
    """Whether sysfs says that a device is attached to nothing."""
    state = _state_of(path)
    return state.exists() and not (state / "pid").exists()


def _detach(fd: int, path: str) -> None:
    """Write back, and detach in any case. Raises `OSError`."""
    if _is_idle(path):
        return
    failures: list[OSError] = []

    def write_back() -> None:
        try:
            os.fsync(fd)
        except OSError as error:
            failures.append(error)

    # A server that is gone or hangs must not keep the device attached.
    thread = threading.Thread(target=write_back, daemon=True)
    thread.start()
    thread.join(_WRITE_BACK_TIMEOUT)
    if thread.is_alive():
        failures.append(OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))
    try:
        _ioctl(fd, _DISCONNECT)
        _ioctl(fd, _CLEAR_SOCK)
    except OSError as error:
        # EINVAL: it is attached to nothing, or no longer.
        if error.errno != errno.EINVAL:
            raise
    if failures:
        reason = failures[0]
        raise OSError(
            reason.errno, f"written data may be lost ({reason.strerror})"
        ) from reason


class Attachment:
    """A device that a server of this process serves.

    The server stops when the device is detached, by whomever; and before it
    stops for another reason, it detaches the device.
    """

    def __init__(self, server: Server, path: str) -> None:
        """Open the device ``path``. Raises `UsageError`."""
        self.device = KernelDevice(path)
        self._server = server
        self._thread: threading.Thread | None = None
        self._running = False
        # The kernel has it as well; here it tells whether the server has left.
        self._client_end: socket.socket | None = None

    async def attach(self, export_name: str) -> None:
        """Attach the device to an export; it can be used then. Raises `UsageError`."""
        loop = asyncio.get_running_loop()
        self._client_end, server_end = socket.socketpair()
        await self._server.serve_socket(server_end)
        await asyncio.to_thread(
            self.device.attach_blocking, self._client_end, export_name
        )
        self._running = True
        self._thread = threading.Thread(
            target=self._run_blocking, args=(loop,), name="nbdqcow-device", daemon=True
        )
        self._thread.start()
        self._server.before_stopping = self._detach
        try:
            await asyncio.to_thread(self.device.wait_usable_blocking)
        except OSError as error:
            raise UsageError(
                f"Failed to open {self.device.path}: {error.strerror}"
            ) from None

    def _run_blocking(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self.device.run_blocking()
        except OSError as error:
            logger.warning("%s: %s", self.device.path, error.strerror)
        self._running = False
        with contextlib.suppress(RuntimeError):
            # The loop may have been closed by one who would not wait.
            loop.call_soon_threadsafe(self._server.stop)

    async def _detach(self) -> None:
        # One who detached it is the reason why the server stops, and may have
        # attached it anew.
        if self._running and not self._is_hung_up():
            await asyncio.to_thread(self.device.detach_blocking)

    def _is_hung_up(self) -> bool:
        assert self._client_end is not None
        poll = select.poll()
        poll.register(self._client_end, 0)
        return bool(poll.poll(0))

    async def close(self) -> None:
        """Wait until the kernel has let go of the device; its connection to the
        server is closed."""
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        if self._client_end is not None:
            self._client_end.close()
        self.device.close()


def _negotiate(sock: socket.socket, export_name: str) -> RemoteExport:
    """Take a connection into the transmission phase, with simple replies."""
    client = ClientHandshake()
    client.exchange(sock.sendall, sock.recv)
    client.go(export_name)
    client.exchange(sock.sendall, sock.recv)
    result = client.result
    assert result is not None
    if result.error or result.export is None:
        raise ProtocolError(result.refusal)
    return result.export

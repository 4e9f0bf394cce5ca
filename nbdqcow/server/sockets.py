"""Sockets to listen on: how they are bound, and how clients are accepted."""

import asyncio
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

logger = logging.getLogger(__name__)

_BACKLOG: Final = 128
_ACCEPTS_PER_TURN: Final = 64
_RETRY_DELAY: Final = 1.0
"""Seconds that nobody is accepted after we ran out of descriptors or memory."""
_SOCKET_LABEL: Final = "/proc/thread-self/attr/sockcreate"
_EXHAUSTED: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))


@dataclass(frozen=True, slots=True)
class SocketFile:
    """A unix socket in the file system that we made, and remove at the end.

    Attributes:
        path: where it is.
        device, inode: what it is, as somebody may put another one there.
    """

    path: str
    device: int
    inode: int

    def remove(self) -> None:
        """Remove it if it is still ours."""
        with suppress(OSError):
            status = os.stat(self.path)
            if (status.st_dev, status.st_ino) == (self.device, self.inode):
                os.unlink(self.path)


class Listener:
    """Accepts the clients of one listening socket.

    asyncio's own servers know TCP and unix sockets only (uvloop's look at the
    address family) and, from Python 3.13, remove unix sockets that were made
    by somebody else.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_accepted: Callable[[socket.socket], None],
        file: SocketFile | None = None,
    ) -> None:
        """Take over ``sock``, which is bound or listens; listen.

        ``on_accepted`` is given each client's socket. ``file`` is removed at
        the end. Raises `OSError`, and then the socket is still the caller's.
        """
        sock.setblocking(False)
        sock.listen(_BACKLOG)
        self.sock = sock
        self._on_accepted = on_accepted
        self._file = file
        self._loop = asyncio.get_running_loop()
        self._retry: asyncio.TimerHandle | None = None
        self._exhausted = False
        self._loop.add_reader(sock.fileno(), self._accept)

    def close(self) -> None:
        """Accept nobody any more."""
        if self._retry is not None:
            self._retry.cancel()
        self._loop.remove_reader(self.sock.fileno())
        self.sock.close()
        if self._file is not None:
            self._file.remove()

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                sock, _address = self.sock.accept()
            except (BlockingIOError, InterruptedError):
                # Nobody is left waiting.
                self._exhausted = False
                return
            except OSError as exc:
                if exc.errno in _EXHAUSTED:
                    self._pause(exc)
                    return
                # accept(2): errors of the connection itself come up here.
                continue
            sock.setblocking(False)
            self._on_accepted(sock)

    def _pause(self, exc: OSError) -> None:
        """The socket stays readable: do not try again all the time."""
        if not self._exhausted:
            # Not each second of a day.
            logger.warning("no client can be accepted: %s", exc.strerror)
        self._exhausted = True
        self._loop.remove_reader(self.sock.fileno())
        self._retry = self._loop.call_later(_RETRY_DELAY, self._resume)

    def _resume(self) -> None:
        self._loop.add_reader(self.sock.fileno(), self._accept)


async def bind_tcp(host: str | None, port: int) -> list[socket.socket]:
    """Return sockets bound to all addresses of ``host`` (None: of this machine).

    An IPv6 socket takes no IPv4 clients: those have a socket of their own.
    Raises `OSError`.
    """
    found = await asyncio.get_running_loop().getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    sockets: list[socket.socket] = []
    try:
        # The same address may be found twice.
        for family, kind, protocol, _, address in dict.fromkeys(found):
            try:
                sock = socket.socket(family, kind, protocol)
            except OSError as exc:
                if exc.errno == errno.EAFNOSUPPORT and len(found) > 1:
                    # A kernel without IPv6.
                    continue
                raise
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


class SocketLabelError(OSError):
    """The kernel did not take the SELinux label of a socket."""


@contextmanager
def _labelling_sockets(label: str | None) -> Iterator[None]:
    """Have sockets that this thread makes labelled. Raises `SocketLabelError`."""
    if label is None:
        yield
        return
    _write_label(os.fsencode(label) + b"\0")
    try:
        yield
    finally:
        # The thread is a pool's: what it makes later is none of this label's.
        _write_label(b"")


def _write_label(label: bytes) -> None:
    try:
        fd = os.open(_SOCKET_LABEL, os.O_WRONLY)
        try:
            os.write(fd, label)
        finally:
            os.close(fd)
    except OSError as exc:
        raise SocketLabelError(exc.errno, exc.strerror) from exc


def listen_unix_blocking(
    path: str,
    *,
    mode: int | None = None,
    owner: tuple[int, int] | None = None,
    label: str | None = None,
) -> tuple[socket.socket, SocketFile | None]:
    """Return a socket that listens on ``path``, in the place of a stale one.

    A path that begins with NUL is an abstract one and has no file. ``mode``
    and ``owner`` (user and group; -1 leaves one alone) are the file's; nobody
    can connect before they are set. ``label`` is what SELinux decides by who may
    connect to the socket. Raises `OSError`.

    Scripts wait for the file and then connect, so it listens as soon as may be
    after the file is there.
    """
    with _labelling_sockets(label):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.startswith("\0"):
            sock.bind(path)
            return sock, None
        try:
            sock.bind(path)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE or not _is_stale(path):
                raise
            os.unlink(path)
            sock.bind(path)
        if owner is None and mode is None:
            sock.listen(_BACKLOG)
        status = os.stat(path)
        file = SocketFile(path, status.st_dev, status.st_ino)
        try:
            if owner is not None:
                os.chown(path, *owner)
            if mode is not None:
                os.chmod(path, mode)
            sock.listen(_BACKLOG)
        except BaseException:
            file.remove()
            raise
    except BaseException:
        sock.close()
        raise
    return sock, file


def _is_stale(path: str) -> bool:
    """Tell whether ``path`` is a socket that nobody listens on."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def bind_vsock(cid: int, port: int) -> socket.socket:
    """Return a socket bound to a port of a virtual machine's own network.

    ``cid`` is this machine's, or `socket.VMADDR_CID_ANY`. Raises `OSError`.
    """
    sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        sock.bind((cid, port))
    except BaseException:
        sock.close()
        raise
    return sock


def inherited_socket(fd: int) -> tuple[socket.socket, bool]:
    """Take over a descriptor that is a stream socket.

    Returns it, and whether it listens (else it is a client's connection).
    Raises `OSError` if it is not open, or is something else.
    """
    sock = socket.socket(fileno=fd)
    try:
        if sock.type != socket.SOCK_STREAM:
            raise OSError(errno.ESOCKTNOSUPPORT, os.strerror(errno.ESOCKTNOSUPPORT))
        listens = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        sock.set_inheritable(False)
        sock.setblocking(False)
    except BaseException:
        sock.detach()
        raise
    return sock, listens


def tune(sock: socket.socket, *, send_buffer: int) -> None:
    """Set what a connection of ours has; a kind of socket may lack some."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        # asyncio does not set it on sockets whose listener came from
        # elsewhere; without it a reply in two pieces waits 40 ms.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A client whose machine is gone would keep its place for ever.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_COUNT)
    else:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)


_KEEPALIVE_IDLE: Final = 60
_KEEPALIVE_INTERVAL: Final = 10
_KEEPALIVE_COUNT: Final = 6
"""Seconds of silence, seconds between probes, probes: 2 minutes in all."""


def as_stream(sock: socket.socket) -> socket.socket:
    """Return ``sock`` in the form that every event loop takes.

    uvloop refuses families that it does not know, such as vsock, though it
    does nothing with a connected unix socket that would not do for those.
    """
    if sock.family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
        return sock
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=sock.detach())


def peer_name(transport: asyncio.BaseTransport) -> str:
    """Return what the log calls a client."""
    address = transport.get_extra_info("peername")
    if isinstance(address, tuple):
        return f"client {address[0]}:{address[1]}"
    return "client on a unix socket"

"""A client on standard input and output."""

import os
import socket
import stat
import threading
from contextlib import suppress
from typing import Final

_CHUNK: Final = 256 << 10


def take_stdio() -> socket.socket:
    """Return standard input and output as one connected socket.

    Afterwards nothing that this process prints can get between the replies:
    standard output is standard error, and standard input is empty. Raises
    `OSError` if either is closed.
    """
    first, second = os.dup(0), os.dup(1)
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
    os.dup2(2, 1)
    if stat.S_ISSOCK(os.fstat(first).st_mode) and os.path.sameopenfile(first, second):
        os.close(second)
        return socket.socket(fileno=first)
    ours, theirs = socket.socketpair()
    for work in (_receive, _send):
        fd = first if work is _receive else second
        threading.Thread(target=work, args=(fd, theirs), daemon=True).start()
    return ours


def _receive(fd: int, sock: socket.socket) -> None:
    """Pass on what the client sends, until it closes."""
    with suppress(OSError):
        while data := os.read(fd, _CHUNK):
            sock.sendall(data)
    with suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
    os.close(fd)


def _send(fd: int, sock: socket.socket) -> None:
    """Pass on our replies, until we close."""
    with suppress(OSError):
        while data := memoryview(sock.recv(_CHUNK)):
            while data:
                data = data[os.write(fd, data) :]
    # The client is gone, or we are done: let each side see that.
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    os.close(fd)

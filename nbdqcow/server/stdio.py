"""A client on standard input and output."""

import os
import socket
import stat
import threading
from contextlib import suppress
from typing import Final

_CHUNK: Final = 256 << 10
_FINISH_TIMEOUT: Final = 10.0
"""Seconds that a client has to take its last replies."""


class Stdio:
    """Standard input and output as one connected socket.

    Nothing that this process prints afterwards can get between the replies:
    standard output is standard error, and standard input is empty.

    Attributes:
        socket: the connection, for the server.
    """

    def __init__(self) -> None:
        """Take both over. Raises `OSError` if either is closed."""
        first, second = os.dup(0), os.dup(1)
        with open(os.devnull, "rb") as null:
            os.dup2(null.fileno(), 0)
        os.dup2(2, 1)
        self._sender: threading.Thread | None = None
        if stat.S_ISSOCK(os.fstat(first).st_mode) and os.path.sameopenfile(
            first, second
        ):
            os.close(second)
            self.socket = socket.socket(fileno=first)
            return
        # Pipes, or files: threads may wait for those, and the loop may not.
        self.socket, theirs = socket.socketpair()
        receiver = threading.Thread(target=_receive, args=(first, theirs), daemon=True)
        self._sender = threading.Thread(
            target=_send, args=(second, theirs), daemon=True
        )
        receiver.start()
        self._sender.start()

    def finish(self) -> None:
        """Let the last replies leave, once the socket is closed."""
        if self._sender is not None:
            self._sender.join(_FINISH_TIMEOUT)


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

"""Reads that leave by sendfile(2): page cache to a unix socket, uncopied.

A reply that was sent so still refers to the live pages of the file until the
client has taken it out of the socket. So its epoch token is kept until then:
SIOCOUTQ says how much of what we have sent the client has not read yet. Only
for unix sockets: pages that left on a TCP socket are out of our sight.
"""

import asyncio
import fcntl
import os
import socket
from array import array
from collections import deque
from typing import Final

from nbdqcow.server.export import ExportedNode

_SIOCOUTQ: Final = 0x5411
_LOOK_AGAIN: Final = 0.02
"""Seconds until tokens are looked after when the client asks nothing more."""


class BrokenReplyError(Exception):
    """A reply has begun and can't go on: nothing else may follow it."""


class FileSender:
    """Sends guest data of one node to one unix socket.

    Only while nothing is queued in the transport of that socket, or the
    replies would mix.
    """

    def __init__(self, sock: socket.socket, node: ExportedNode) -> None:
        # The transport's socket lets nobody else send on it; a duplicate does.
        self._sock = socket.socket(fileno=os.dup(sock.fileno()))
        self._sock.setblocking(False)
        self._node = node
        self._unread = array("i", [0])
        self._nb_sent = 0
        self._tokens: deque[tuple[int, int]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def try_send(self, header: bytes, offset: int, length: int) -> int:
        """Send ``header`` and the data at a guest offset.

        Returns how many bytes of both have left, less than all if the socket
        is full now; -1 if nothing has and the data can't leave like this.
        Raises `BrokenReplyError`.
        """
        host_offset = self._node.try_locate(offset, length)
        if host_offset < 0:
            return -1
        try:
            nb_sent = self._sock.send(header, socket.MSG_MORE)
        except BlockingIOError:
            return 0
        if nb_sent == len(header):
            try:
                nb_data, token = self._node.sendfile(
                    self._sock.fileno(), host_offset, length
                )
            except OSError as exc:
                raise BrokenReplyError(exc.strerror) from exc
            nb_sent += nb_data
            self._nb_sent += nb_sent
            self._tokens.append((self._nb_sent, token))
        else:
            self._nb_sent += nb_sent
        return nb_sent

    def release_read(self) -> None:
        """Release the tokens of what the client has read."""
        tokens = self._tokens
        if not tokens:
            return
        fcntl.ioctl(self._sock, _SIOCOUTQ, self._unread)
        nb_read = self._nb_sent - self._unread[0]
        while tokens and tokens[0][0] <= nb_read:
            self._node.release(tokens.popleft()[1])
        if tokens and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_LOOK_AGAIN, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self.release_read()

    def close(self) -> None:
        """The connection is lost; nobody reads what is left in the socket."""
        if self._timer is not None:
            self._timer.cancel()
        self._sock.close()
        while self._tokens:
            self._node.release(self._tokens.popleft()[1])

"""What is served: a node under a name, and which requests it takes."""

from typing import Final, Protocol

from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.handshake import ExportInfo
from nbdqcow.types import Buffer, Buffers


class ExportedNode(Protocol):
    """What the server needs of an open image (`nbdqcow.block.node.Node`).

    Offsets and lengths are bytes inside ``[0, size]``; errors are `OSError`s.
    """

    @property
    def size(self) -> int:
        """Bytes of the image."""

    @property
    def read_only(self) -> bool:
        """Whether no request may change the image."""

    def try_pread(self, offset: int, length: int) -> Buffer | None:
        """Return bytes if they need no waiting."""

    def try_pread_views(self, offset: int, length: int) -> tuple[Buffers, int] | None:
        """Return bytes without copying them, and a token for `release`."""

    def release(self, token: int) -> None:
        """The views have left the process."""

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        """Overwrite in place if that needs no waiting."""

    async def pread(self, offset: int, length: int) -> Buffer:
        """Return exactly ``length`` bytes."""

    async def pwrite(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Write; durable on return if ``fua``."""

    async def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        may_unmap: bool = True,
        no_fallback: bool = False,
        fua: bool = False,
    ) -> None:
        """Make a range read as zeroes."""

    async def discard(self, offset: int, length: int) -> None:
        """Free a range: a hint."""

    async def flush(self) -> None:
        """Make every write completed before this call durable."""

    async def prefetch(self, offset: int, length: int) -> None:
        """Bring a range near: a hint."""


_READ_FLAGS: Final = (
    nbd.FLAG_HAS_FLAGS | nbd.FLAG_SEND_FLUSH | nbd.FLAG_SEND_FUA | nbd.FLAG_SEND_CACHE
)
_WRITE_FLAGS: Final = (
    nbd.FLAG_SEND_TRIM | nbd.FLAG_SEND_WRITE_ZEROES | nbd.FLAG_SEND_FAST_ZERO
)

_COMMAND_FLAGS: Final = {
    # proto.md "Command flags": FUA is valid for all commands.
    nbd.CMD_READ: nbd.CMD_FLAG_FUA,
    nbd.CMD_WRITE: nbd.CMD_FLAG_FUA,
    nbd.CMD_FLUSH: nbd.CMD_FLAG_FUA,
    nbd.CMD_TRIM: nbd.CMD_FLAG_FUA,
    nbd.CMD_CACHE: nbd.CMD_FLAG_FUA,
    nbd.CMD_WRITE_ZEROES: (
        nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO
    ),
}
"""The commands we know, with the flags that each may carry."""

_CHANGING: Final = frozenset((nbd.CMD_WRITE, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES))
_NO_SPACE_BEYOND_END: Final = frozenset((nbd.CMD_WRITE, nbd.CMD_WRITE_ZEROES))
_WITH_DATA: Final = frozenset((nbd.CMD_READ, nbd.CMD_WRITE))


class Export:
    """A node that clients may choose by name.

    Attributes:
        name: what they ask for; "" is the default export.
        node: where requests go.
        size: bytes.
        read_only: whether requests that change data are refused.
        info: what the handshake tells.
    """

    def __init__(
        self,
        name: str,
        node: ExportedNode,
        *,
        read_only: bool = False,
        description: str = "",
        multi_conn: bool = True,
    ) -> None:
        """``multi_conn`` promises that a flush on one connection covers the
        writes of all: the node is shared, so it holds unless one is told
        otherwise. Raises `ValueError` for a name that can't be sent."""
        self.name = name
        self.node = node
        self.size = node.size
        self.read_only = read_only or node.read_only
        flags = _READ_FLAGS
        flags |= nbd.FLAG_READ_ONLY if self.read_only else _WRITE_FLAGS
        if multi_conn:
            flags |= nbd.FLAG_CAN_MULTI_CONN
        self.info = ExportInfo(name, self.size, flags, description)

    @property
    def maximum_payload(self) -> int:
        """Bytes of data that a write may have: none where it fails anyway."""
        return 0 if self.read_only else self.info.maximum_payload

    def check(self, command: int, flags: int, offset: int, length: int) -> int:
        """Return the NBD error of a request that must not be tried, or 0.

        proto.md "Error values", "Request types" and "Size constraints". For
        too long a READ or WRITE EINVAL: EOVERFLOW is for structured replies
        and for commands without data.
        """
        known_flags = _COMMAND_FLAGS.get(command)
        if known_flags is None or flags & ~known_flags:
            return nbd.EINVAL
        if command == nbd.CMD_FLUSH:
            return nbd.EINVAL if offset or length else 0
        if self.read_only and command in _CHANGING:
            return nbd.EPERM
        if command in _WITH_DATA and length > self.info.maximum_payload:
            return nbd.EINVAL
        if offset + length > self.size:
            return nbd.ENOSPC if command in _NO_SPACE_BEYOND_END else nbd.EINVAL
        return 0

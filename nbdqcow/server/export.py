"""What is served: a node under a name, and which requests it takes."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Final, Protocol

from nbdqcow.block.status import DirtyBitmap, Extents
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.handshake import ExportInfo, Terms
from nbdqcow.nbd.replies import ReplyStyle
from nbdqcow.nbd.requests import Request, context_ids
from nbdqcow.server.failures import FailureLog
from nbdqcow.types import Buffer, Buffers


class ExportedNode(Protocol):
    """What the server needs of an open image (`nbdqcow.block.node.Node`).

    Offsets and lengths are bytes inside ``[0, size]``; errors are `OSError`s.
    """

    @property
    def filename(self) -> str:
        """What messages call the image."""

    @property
    def size(self) -> int:
        """Bytes of the image."""

    @property
    def read_only(self) -> bool:
        """Whether no request may change the image."""

    def try_pread(self, offset: int, length: int) -> Buffer | None:
        """Return bytes if they need no waiting."""

    def try_pread_into(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` if that needs no waiting and is a single read. If not,
        anything may be in it."""

    @property
    def defers_reads(self) -> bool:
        """Whether `try_pread_later` is worth its while."""

    def try_pread_later(self, offset: int, length: int) -> Buffer | None:
        """Do as `try_pread` does; the bytes are right after `finish_reads`."""

    def finish_reads(self) -> None:
        """Make the bytes right that `try_pread_later` has returned."""

    def try_pread_views(self, offset: int, length: int) -> tuple[Buffers, int] | None:
        """Return bytes without copying them, and a token for `release`."""

    def try_locate(self, offset: int, length: int) -> int:
        """Return where `sendfile` finds a range, -1 if it can't be sent so."""

    def sendfile(
        self, socket_fd: int, host_offset: int, length: int
    ) -> tuple[int, int]:
        """Send bytes to a socket, uncopied; return how many, and a token for
        `release` once the peer has read them."""

    def release(self, token: int) -> None:
        """The views have left the process."""

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        """Overwrite in place if that needs no waiting."""

    async def pread(self, offset: int, length: int) -> Buffer:
        """Return exactly ``length`` bytes."""

    def pread_pieces(self, offset: int, length: int) -> AsyncIterator[Buffer]:
        """Yield exactly ``length`` bytes in order, up to a failure."""

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

    async def block_status(self, offset: int, length: int, limit: int) -> Extents:
        """Return at most ``limit`` extents."""

    @property
    def dirty_bitmaps(self) -> Mapping[str, DirtyBitmap]:
        """Dirty bitmaps by name."""

    def find_bitmap(self, name: str) -> DirtyBitmap | None:
        """The dirty bitmap of that name, which may be a backing image's."""


_READ_FLAGS: Final = (
    nbd.FLAG_HAS_FLAGS | nbd.FLAG_SEND_FLUSH | nbd.FLAG_SEND_FUA | nbd.FLAG_SEND_CACHE
)
_WRITE_FLAGS: Final = (
    nbd.FLAG_SEND_TRIM | nbd.FLAG_SEND_WRITE_ZEROES | nbd.FLAG_SEND_FAST_ZERO
)

_COMMAND_FLAGS: Final = {
    # proto.md "Command flags": FUA is valid for all commands.
    nbd.CMD_READ: nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_DF,
    nbd.CMD_WRITE: nbd.CMD_FLAG_FUA,
    nbd.CMD_FLUSH: nbd.CMD_FLAG_FUA,
    nbd.CMD_TRIM: nbd.CMD_FLAG_FUA,
    nbd.CMD_CACHE: nbd.CMD_FLAG_FUA,
    nbd.CMD_WRITE_ZEROES: (
        nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO
    ),
    nbd.CMD_BLOCK_STATUS: (
        nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_REQ_ONE | nbd.CMD_FLAG_PAYLOAD_LEN
    ),
}
"""The commands we know, with the flags that each may carry."""

_CHANGING: Final = frozenset((nbd.CMD_WRITE, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES))
_NO_SPACE_BEYOND_END: Final = frozenset((nbd.CMD_WRITE, nbd.CMD_WRITE_ZEROES))
_WITH_DATA: Final = frozenset((nbd.CMD_READ, nbd.CMD_WRITE))

ALLOCATION: Final = "base:allocation"
ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"
"""Metadata contexts; the last one is followed by the bitmap's name."""

Refusal = tuple[int, str]
"""An NBD error, and what to say to people."""


def all_meta_contexts(node: ExportedNode) -> list[str]:
    """Return the names of all metadata contexts that ``node`` can tell of."""
    bitmaps = [DIRTY_BITMAP + name for name in node.dirty_bitmaps]
    return [ALLOCATION, ALLOCATION_DEPTH, *bitmaps]


class Export:
    """A node that clients may choose by name.

    Attributes:
        name: what they ask for; "" is the default export.
        node: where requests go.
        size: bytes.
        read_only: whether requests that change data are refused.
        info: what the handshake tells.
        may_use: says whether the client with this certificate (DER; None if
            it has shown none) may use the export.
        nb_clients: how many have chosen it.
        failures: of requests, for the log.
    """

    def __init__(
        self,
        name: str,
        node: ExportedNode,
        *,
        read_only: bool = False,
        description: str = "",
        multi_conn: bool = True,
        meta_contexts: Sequence[str] | None = None,
        minimum_block_size: int = nbd.DEFAULT_MINIMUM_BLOCK_SIZE,
        maximum_payload: int = nbd.DEFAULT_MAXIMUM_PAYLOAD,
        tls_only: bool = False,
        may_use: Callable[[bytes | None], bool] = lambda certificate: True,
    ) -> None:
        """``multi_conn`` promises that a flush on one connection covers the
        writes of all: the node is shared, so it holds unless one is told
        otherwise. ``meta_contexts`` are those offered: None for all.
        ``minimum_block_size`` is what clients are told; smaller requests are
        served all the same; larger ones than ``maximum_payload`` are not. Raises
        `ValueError` for a name that can't be sent."""
        self.name = name
        self.node = node
        self.nb_clients = 0
        self.failures = FailureLog(node.filename)
        self.size = node.size
        self.read_only = read_only or node.read_only
        flags = _READ_FLAGS
        flags |= nbd.FLAG_READ_ONLY if self.read_only else _WRITE_FLAGS
        if multi_conn:
            flags |= nbd.FLAG_CAN_MULTI_CONN
        if meta_contexts is None:
            meta_contexts = all_meta_contexts(node)
        self.info = ExportInfo(
            name,
            self.size,
            flags,
            description,
            minimum_block_size=minimum_block_size,
            # Never below: proto.md "Block size constraints".
            preferred_block_size=max(
                minimum_block_size, nbd.DEFAULT_PREFERRED_BLOCK_SIZE
            ),
            maximum_payload=maximum_payload,
            meta_contexts=tuple(meta_contexts),
            tls_only=tls_only,
        )
        self.may_use = may_use

    @property
    def maximum_payload(self) -> int:
        """Bytes of data that a write may have: none where it fails anyway."""
        return 0 if self.read_only else self.info.maximum_payload

    def check(self, request: Request, terms: Terms) -> Refusal | None:
        """Say why a request must not be tried; None if it may.

        proto.md "Error values", "Request types" and "Size constraints".
        """
        command, flags, _, offset, length, _ = request
        name = nbd.COMMAND_NAMES.get(command)
        known_flags = _COMMAND_FLAGS.get(command)
        if name is None or known_flags is None:
            return nbd.EINVAL, f"unknown command {command}"
        if terms.style is ReplyStyle.SIMPLE:
            known_flags &= ~nbd.CMD_FLAG_DF
        if terms.style is not ReplyStyle.EXTENDED:
            known_flags &= ~nbd.CMD_FLAG_PAYLOAD_LEN
        if flags & ~known_flags:
            return nbd.EINVAL, f"{name} with flags {flags & ~known_flags:#x}"
        if command == nbd.CMD_FLUSH:
            if offset or length:
                return nbd.EINVAL, "FLUSH of a range"
            return None
        if self.read_only and command in _CHANGING:
            return nbd.EPERM, "the export is read-only"
        if command in _WITH_DATA and length > self.info.maximum_payload:
            simple = terms.style is ReplyStyle.SIMPLE
            # The error of a read that needs several chunks.
            error = nbd.EINVAL if simple or command != nbd.CMD_READ else nbd.EOVERFLOW
            return error, (
                f"{name} of {length} bytes; {self.info.maximum_payload} are allowed"
            )
        if offset + length > self.size:
            error = nbd.ENOSPC if command in _NO_SPACE_BEYOND_END else nbd.EINVAL
            return error, (
                f"{name} of {length} bytes at {offset} is past the end of the export"
                f" ({self.size} bytes)"
            )
        if command == nbd.CMD_BLOCK_STATUS:
            return self._check_status(request, terms)
        return None

    def _check_status(self, request: Request, terms: Terms) -> Refusal | None:
        nb_contexts = len(terms.meta_contexts)
        if not nb_contexts:
            return nbd.EINVAL, "BLOCK_STATUS without a metadata context"
        if request.flags & nbd.CMD_FLAG_PAYLOAD_LEN:
            ids = context_ids(request.payload or b"")
            if not 0 < len(ids) == len(set(ids)) or max(ids) >= nb_contexts:
                return nbd.EINVAL, "BLOCK_STATUS with a payload that can't be right"
        if not request.length:
            return nbd.EINVAL, "BLOCK_STATUS of no bytes"
        return None

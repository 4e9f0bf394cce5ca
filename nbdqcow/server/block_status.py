"""BLOCK_STATUS: the extents of each metadata context that a client selected."""

import asyncio
import errno
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from nbdqcow.block.status import STATE_HOLE, STATE_ZERO, Extents
from nbdqcow.errors import BlockError
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.requests import Request
from nbdqcow.server.export import ALLOCATION, DIRTY_BITMAP, ExportedNode

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nbdqcow.nbd.replies import StatusRow

MAX_EXTENTS: Final = 1 << 17
"""Extents in one reply, of all its contexts together."""
_FIRST_LIMIT: Final = 16
"""Extents looked at first where one is wanted."""
_numpy_loaded: Final = threading.Event()


async def block_status(
    node: ExportedNode, request: Request, contexts: Sequence[tuple[int, str]]
) -> "list[StatusRow]":
    """Return a row for each of ``contexts`` (ID and name); see
    `nbdqcow.nbd.replies.Replies.block_status`. Raises `BlockError`."""
    if not _numpy_loaded.is_set():
        await asyncio.to_thread(_load_numpy_blocking)
    offset, length = request.offset, request.length
    one = bool(request.flags & nbd.CMD_FLAG_REQ_ONE)
    limit = max(1, MAX_EXTENTS // len(contexts))
    extents: Extents | None = None
    rows: list[StatusRow] = []
    for context_id, name in contexts:
        if name.startswith(DIRTY_BITMAP):
            bitmap = node.find_bitmap(name.removeprefix(DIRTY_BITMAP))
            if bitmap is None:
                raise BlockError(errno.EIO, f"there is no {name} any more")
            lengths, dirty = await bitmap.extents(offset, length, 1 if one else limit)
            rows.append((context_id, lengths, dirty))
            continue
        if extents is None:
            extents = await (
                _first_extents(node, offset, length)
                if one
                else node.block_status(offset, length, limit)
            )
        lengths, values = _coalesce(
            extents.lengths,
            extents.states & (STATE_HOLE | STATE_ZERO)
            if name == ALLOCATION
            else extents.depths,
        )
        if one:
            lengths, values = lengths[:1], values[:1]
        rows.append((context_id, lengths, values))
    return rows


def _load_numpy_blocking() -> None:
    """Import numpy, which takes 0.2 s or, from a disk that is busy, seconds: the
    clients of other exports don't wait for it."""
    import numpy  # noqa: F401

    _numpy_loaded.set()


async def _first_extents(node: ExportedNode, offset: int, length: int) -> Extents:
    """Return extents of which the first one of every context is complete.

    An extent of one context may be many of the node's, which differ in what
    another context shows.
    """
    limit = _FIRST_LIMIT
    while True:
        extents = await node.block_status(offset, length, limit)
        if (
            limit >= MAX_EXTENTS
            or int(extents.lengths.sum()) == length
            or (
                _varies(extents.states & (STATE_HOLE | STATE_ZERO))
                and _varies(extents.depths)
            )
        ):
            return extents
        limit *= 16


def _varies(values: "npt.NDArray[np.integer]") -> bool:
    return bool((values != values[0]).any())


def _coalesce(
    lengths: "npt.NDArray[np.uint64]", values: "npt.NDArray[np.integer]"
) -> "tuple[npt.NDArray[np.uint64], npt.NDArray[np.integer]]":
    """Join neighbours that have the same value."""
    import numpy as np

    starts = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
    if len(starts) == len(values):
        return lengths, values
    return np.add.reduceat(lengths, starts), values[starts]

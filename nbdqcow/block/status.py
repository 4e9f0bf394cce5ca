"""Block status: what a range of an image is, merged through its backing chain.

The result is in numpy arrays, because a fragmented image has millions of
extents; numpy is imported when somebody first asks.
"""

from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from nbdqcow.types import COMPRESSED, DATA, UNALLOCATED

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nbdqcow.block.node import Node

STATE_HOLE: Final = 1
STATE_ZERO: Final = 2
"""Bits of a state, with the values of NBD's ``base:allocation``."""
STATE_PAST_END: Final = 4
"""The image that the extent's depth names ends before it: its zeroes are no
part of any image, but nothing below shows through either."""

DEFAULT_LIMIT: Final = 1 << 17


class DirtyBitmap(Protocol):
    """A record of what was written since some moment."""

    async def extents(
        self, offset: int, length: int, limit: int
    ) -> tuple["npt.NDArray[np.uint64]", "npt.NDArray[np.bool_]"]:
        """Return at most ``limit`` extents from ``offset`` on: the bytes of
        each, and whether it is dirty. Neighbours differ; together they may
        cover less than ``length`` (at least a byte) and never more.

        Raises `BlockError` past the end of the disk."""


class Kinds(NamedTuple):
    """Extents of one image, without its backing.

    Attributes:
        lengths: bytes of each extent, dtype ``u8``.
        kinds: run kinds (`nbdqcow.types`), dtype ``u1``; neighbours differ.
    """

    lengths: "npt.NDArray[np.uint64]"
    kinds: "npt.NDArray[np.uint8]"


class Extents(NamedTuple):
    """Extents of an image with its backing chain.

    Attributes:
        lengths: bytes of each extent, dtype ``u8``.
        states: ``STATE_*`` bits, dtype ``u1``.
        depths: which image of the chain has it, 1 for the top one, 0 for
            none; dtype ``u4``. Neighbours differ in state or depth.
    """

    lengths: "npt.NDArray[np.uint64]"
    states: "npt.NDArray[np.uint8]"
    depths: "npt.NDArray[np.uint32]"


async def block_status(
    node: "Node", offset: int, length: int, limit: int = DEFAULT_LIMIT
) -> Extents:
    """Return at most ``limit`` extents from ``offset`` on.

    Together they may cover less than ``length`` (at least a byte) and never
    more; there are none of no bytes.
    """
    if not length:
        return _no_extents()
    import numpy as np

    own = await node.driver.extents(offset, length, limit)
    nothing = own.kinds == UNALLOCATED
    has_data = (own.kinds == DATA) | (own.kinds == COMPRESSED)
    states = np.where(has_data, 0, STATE_HOLE | STATE_ZERO).astype(np.uint8)
    depths = np.where(nothing, 0, 1).astype(np.uint32)
    merged = Extents(own.lengths, states, depths)
    if node.backing is not None and nothing.any():
        below = await _below(node.backing, offset, int(own.lengths.sum()), limit)
        merged = _overlay(merged, nothing, below)
    return _coalesce(merged, limit)


def _no_extents() -> Extents:
    import numpy as np

    return Extents(
        np.empty(0, np.uint64), np.empty(0, np.uint8), np.empty(0, np.uint32)
    )


async def _below(backing: "Node", offset: int, length: int, limit: int) -> Extents:
    """Return the status of a backing node, with zeroes behind its end."""
    import numpy as np

    inside = max(0, min(length, backing.size - offset))
    if inside:
        below = await block_status(backing, offset, inside, limit)
    else:
        below = _no_extents()
    if inside < length and int(below.lengths.sum()) == inside:
        below = Extents(
            np.append(below.lengths, np.uint64(length - inside)),
            np.append(below.states, np.uint8(STATE_HOLE | STATE_ZERO | STATE_PAST_END)),
            np.append(below.depths, np.uint32(1)),
        )
    return below


def _overlay(
    top: Extents, transparent: "npt.NDArray[np.bool_]", below: Extents
) -> Extents:
    """Let ``below`` show through where ``top`` has nothing."""
    import numpy as np

    top_ends, below_ends = np.cumsum(top.lengths), np.cumsum(below.lengths)
    covered = min(top_ends[-1], below_ends[-1])
    ends = np.union1d(top_ends, below_ends)
    ends = ends[ends <= covered]
    above = np.searchsorted(top_ends, ends)
    under = np.searchsorted(below_ends, ends)
    through = transparent[above]
    deeper = below.depths[under]
    return Extents(
        np.diff(ends, prepend=np.uint64(0)),
        np.where(through, below.states[under], top.states[above]),
        np.where(through, deeper + (deeper > 0), top.depths[above]).astype(np.uint32),
    )


def _coalesce(extents: Extents, limit: int) -> Extents:
    """Join neighbours that are alike, and keep the first ``limit``."""
    import numpy as np

    states, depths = extents.states, extents.depths
    differs = (states[1:] != states[:-1]) | (depths[1:] != depths[:-1])
    starts = np.flatnonzero(np.concatenate(([True], differs)))
    return Extents(
        np.add.reduceat(extents.lengths, starts)[:limit],
        states[starts][:limit],
        depths[starts][:limit],
    )

"""The map of a disk: what is where, and in which image of the chain."""

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from nbdqcow.block.node import Node
from nbdqcow.jobs.status import Entry, entry_of

_TURN: Final = 1 << 12
"""Entries that others on the loop wait for."""


async def map_entries(
    node: Node, start: int, end: int
) -> AsyncIterator[tuple[int, Entry]]:
    """Yield what is in ``[start, end)``, in order: each entry's offset, and the
    entry. What continues the entry before, in the file also, is joined to it."""
    position = start
    current: Entry | None = None
    nb_found = 0
    while position < end:
        entry = await entry_of(node, position, end - position)
        assert entry is not None
        if current is None:
            current = entry
        elif _continues(current, entry):
            current = current._replace(length=current.length + entry.length)
        else:
            yield position - current.length, current
            current = entry
        position += entry.length
        nb_found += 1
        if nb_found % _TURN == 0:
            await asyncio.sleep(0)
    if current is not None:
        yield position - current.length, current


def _continues(first: Entry, second: Entry) -> bool:
    if first[1:5] != second[1:5] or first.node is not second.node:
        return False
    if first.host_offset < 0:
        return second.host_offset < 0
    return first.host_offset + first.length == second.host_offset

"""What a stretch of a disk is, through its backing chain, without numpy."""

from typing import Final
from weakref import WeakKeyDictionary

from nbdqcow.block.driver import FormatDriver
from nbdqcow.block.node import Node
from nbdqcow.types import COMPRESSED, DATA, UNALLOCATED, ZERO, Run

_has_holes: Final[WeakKeyDictionary[FormatDriver, bool]] = WeakKeyDictionary()


async def has_holes(driver: FormatDriver) -> bool:
    """Whether so much of an image file is holes that its map alone says little:
    its metadata was preallocated, say.

    QEMU asks the file system about such images, and the same numbers make it
    one: clusters by the file's length are a tenth, and two, more than there is
    space taken for.
    """
    if driver.cluster_size == 1:
        return False
    known = _has_holes.get(driver)
    if known is None:
        allocated = await driver.data.allocated_length()
        known = False
        if allocated is not None:
            nb_clusters = -(-driver.data.length // driver.cluster_size)
            nb_real = allocated // driver.cluster_size
            known = nb_clusters >= max(nb_real * 10 // 9, nb_real + 2)
        _has_holes[driver] = known
    return known


async def precise_map(driver: FormatDriver, offset: int, length: int) -> Run:
    """Do as `FormatDriver.map` does, but call data that is a hole of the file
    ZERO, at its host offset."""
    kind, host_offset, covered = await driver.map(offset, length)
    if kind == DATA and await has_holes(driver):
        allocated, run = await driver.data.block_status(host_offset, covered)
        return (DATA if allocated else ZERO), host_offset, run
    return kind, host_offset, covered


async def status_of(
    node: Node, offset: int, length: int, *, whole_chain: bool = True
) -> tuple[int, int]:
    """Return what the bytes at ``offset`` are, and for how many of ``length``
    that holds: DATA, which must be read, or ZERO.

    Without ``whole_chain`` what the image itself does not have is UNALLOCATED.
    """
    kind, _, covered = await precise_map(node.driver, offset, length)
    if kind in (DATA, COMPRESSED):
        return DATA, covered
    if kind != UNALLOCATED:
        return ZERO, covered
    if not whole_chain:
        return UNALLOCATED, covered
    backing = node.backing
    if backing is None or offset >= backing.size:
        return ZERO, covered
    return await status_of(backing, offset, min(covered, backing.size - offset))


async def stretch_of(
    node: Node, offset: int, length: int, *, whole_chain: bool = True
) -> tuple[int, int]:
    """Do as `status_of` does, with neighbours that are alike joined."""
    kind, covered = await status_of(node, offset, length, whole_chain=whole_chain)
    while covered < length:
        next_kind, more = await status_of(
            node, offset + covered, length - covered, whole_chain=whole_chain
        )
        if next_kind != kind:
            break
        covered += more
    return kind, covered

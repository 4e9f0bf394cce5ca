"""What a stretch of a disk is, through its backing chain, and where threads can
read it; without numpy."""

from collections.abc import Iterator
from typing import Final, NamedTuple
from weakref import WeakKeyDictionary

from nbdqcow.block.driver import FormatDriver
from nbdqcow.block.node import Node
from nbdqcow.block.storage import BlockingSource, StorageDriver
from nbdqcow.types import COMPRESSED, DATA, UNALLOCATED, ZERO
from nbdqcow.units import SECTOR_SIZE, round_up

_has_holes: Final[WeakKeyDictionary[FormatDriver, bool]] = WeakKeyDictionary()


class Entry(NamedTuple):
    """What a stretch of a disk is, as QEMU's ``map`` tells it.

    Attributes:
        length: its bytes.
        depth: the image of the chain that says so, 0 for the top one.
        is_data: that image has a place for it.
        is_zero: it reads as zeroes. A hole in the file is data and zero.
        present: that image has an entry for it.
        host_offset: where in the image's file it is; -1 if that means nothing.
        node: that image.
    """

    length: int
    depth: int
    is_data: bool
    is_zero: bool
    present: bool
    host_offset: int
    node: Node


async def entry_of(
    node: Node, offset: int, length: int, *, max_depth: int = 1 << 30
) -> Entry | None:
    """Return what the bytes at ``offset`` are, for at most ``length`` of them.

    None if only an image deeper than ``max_depth`` can tell.
    """
    size, depth = node.size, 0
    if offset >= size:
        # The rest of the last sector.
        return Entry(length, 0, False, True, True, _end_offset(node, offset), node)
    length = min(length, size - offset)
    while True:
        driver = node.driver
        kind, host_offset, covered = await driver.map(offset, length)
        if kind == DATA:
            if not has_offsets(driver):
                return Entry(covered, depth, True, False, True, -1, node)
            is_zero = False
            if await has_holes(driver):
                allocated, covered = await driver.data.block_status(
                    host_offset, covered
                )
                is_zero = not allocated
            return Entry(covered, depth, True, is_zero, True, host_offset, node)
        if kind == COMPRESSED:
            return Entry(covered, depth, True, False, True, -1, node)
        if kind != UNALLOCATED:
            if driver.cluster_size > 1 and kind == ZERO:
                host_offset = -1
            return Entry(covered, depth, False, True, True, host_offset, node)
        backing = node.backing
        if backing is None or offset >= backing.size:
            return Entry(covered, depth, False, True, False, -1, node)
        if depth == max_depth:
            return None
        node, depth = backing, depth + 1
        length = min(covered, backing.size - offset)


def _end_offset(node: Node, offset: int) -> int:
    return offset if node.driver.cluster_size == 1 else -1


def has_offsets(driver: FormatDriver) -> bool:
    """Whether the bytes at a host offset are the disk's own: not if they are
    encrypted."""
    return driver.data.name != "encrypted"


def place_in(
    entry: Entry, entry_end: int, start: int, end: int
) -> tuple[StorageDriver, int] | None:
    """Return where in which file the bytes ``[start, end)`` are, if a thread can
    read them there as they are. ``entry``, which ends at ``entry_end``, covers
    them."""
    storage = entry.node.driver.data
    offset = entry.host_offset + start - (entry_end - entry.length)
    if entry.host_offset < 0 or not storage.reads_in_threads:
        return None
    if entry_end < end or offset + end - start > storage.length:
        return None
    return storage, offset


class Place(NamedTuple):
    """Bytes of a disk, and where threads can read them."""

    source: BlockingSource
    offset: int
    length: int


class _Zeroes:
    """What is nowhere."""

    def pread_into_blocking(self, offset: int, view: memoryview) -> None:
        view[:] = bytes(len(view))


ZEROES: Final = _Zeroes()
"""The source of bytes that are zeroes by the map."""


def try_places(
    node: Node, offset: int, length: int, *, longest_unit: int
) -> list[Place] | None:
    """Return where the bytes of a disk are, which nobody changes meanwhile.

    None if threads can't read all of them, or a table must be read first to
    know. Compressed clusters may be ``longest_unit`` long.
    """
    if not node.read_only or offset + length > node.size:
        return None
    places: list[Place] = []
    end = offset + length
    while offset < end:
        run = node.driver.try_map(offset, end - offset)
        if run is None:
            return None
        kind, host_offset, covered = run
        if kind == DATA:
            storage = node.driver.data
            if not storage.reads_in_threads or host_offset + covered > storage.length:
                return None
            places.append(Place(storage, host_offset, covered))
        elif kind == UNALLOCATED and (
            node.backing is not None and offset < node.backing.size
        ):
            covered = min(covered, node.backing.size - offset)
            below = try_places(node.backing, offset, covered, longest_unit=longest_unit)
            if below is None:
                return None
            places += below
        elif kind != COMPRESSED:
            places.append(Place(ZEROES, 0, covered))
        elif node.driver.cluster_size <= longest_unit:
            source = node.driver.compressed_source(host_offset)
            if source is None:
                return None
            start = offset & (node.driver.cluster_size - 1)
            places.append(Place(source, start, covered))
        else:
            return None
        offset += covered
    return places


def chain_of(node: Node) -> Iterator[Node]:
    """Yield an image and those below it."""
    below: Node | None = node
    while below is not None:
        yield below
        below = below.backing


def disk_size(node: Node) -> int:
    """Return the bytes of a disk in whole sectors, as QEMU counts."""
    return round_up(node.size, SECTOR_SIZE)


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
        allocated = await driver.storage.allocated_length()
        known = False
        if allocated is not None:
            nb_clusters = -(-driver.storage.length // driver.cluster_size)
            nb_real = allocated // driver.cluster_size
            known = nb_clusters >= max(nb_real * 10 // 9, nb_real + 2)
        _has_holes[driver] = known
    return known


class LookAhead:
    """What is behind the stretch that `stretch_of` told of last: it had to look,
    to know where that one ends. Of a disk that nobody changes."""

    __slots__ = ("kind", "length", "offset")

    def __init__(self) -> None:
        self.offset = -1
        self.kind = ZERO
        self.length = 0


async def stretch_of(
    node: Node,
    offset: int,
    length: int,
    *,
    whole_chain: bool = True,
    enough_data: int = 1 << 63,
    joins: bool = True,
    ahead: LookAhead | None = None,
) -> tuple[int, int]:
    """Return what the bytes at ``offset`` are, DATA, which must be read, or
    ZERO, and for how many of ``length`` that holds.

    Without ``whole_chain`` what the image itself does not have is UNALLOCATED.
    Nobody looks further once there are ``enough_data`` bytes of DATA. Without
    ``joins`` only the first answer counts. ``ahead`` is what the calls for one
    disk share, all of them with or without ``whole_chain``.
    """
    found, covered = ZERO, 0
    while covered < length:
        position, rest = offset + covered, length - covered
        if ahead is not None and ahead.offset == position:
            kind, more = ahead.kind, min(ahead.length, rest)
        else:
            kind, more = await _look(node, position, rest, whole_chain)
        if covered and kind != found:
            if ahead is not None and ahead.offset != position:
                ahead.offset, ahead.kind, ahead.length = position, kind, more
            break
        found, covered = kind, covered + more
        if not joins or (kind == DATA and covered >= enough_data):
            break
    return found, covered


async def _look(
    node: Node, offset: int, length: int, whole_chain: bool
) -> tuple[int, int]:
    """Return what `stretch_of` does, for bytes of one entry."""
    entry = await entry_of(
        node, offset, length, max_depth=1 << 30 if whole_chain else 0
    )
    if entry is not None:
        return ZERO if entry.is_zero else DATA, entry.length
    # How far that goes only the image itself can tell.
    _, _, covered = await node.driver.map(offset, length)
    backing = node.backing
    if backing is not None:
        covered = min(covered, backing.size - offset)
    return UNALLOCATED, covered

"""Cutting disks into the pieces that `nbdqcow.jobs.convert` copies."""

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final, NamedTuple

from nbdqcow.block.node import Node
from nbdqcow.jobs.control import JobControl
from nbdqcow.jobs.errors import CopyError, reason_of
from nbdqcow.jobs.status import LookAhead, chain_of, disk_size, stretch_of
from nbdqcow.jobs.transfer import CHUNK
from nbdqcow.types import DATA, UNALLOCATED, ZERO
from nbdqcow.units import SECTOR_SIZE, GiB, KiB, MiB, round_down, round_up

_PIECE: Final = 2 * MiB
_LONG_PIECE: Final = 16 * MiB
"""Bytes of a piece that threads move from file to file, holes and all."""
_MAX_JOINED: Final = 8 * MiB
"""Bytes of pieces that threads move into clusters at once, past the holes between."""
_NB_PIECES: Final = 256
"""Pieces that make for smooth progress."""
_SHORT_HOLE: Final = 64 * KiB
_MIN_LOOK: Final = 16 * KiB
"""Units from which on looking for zeroes before reading is cheap."""
_EMPTY_PIECE: Final = 1 * GiB
"""Bytes that can be zeroed in one go: more would keep others from the image."""


class ConvertOptions(NamedTuple):
    """How disks are copied.

    Attributes:
        sparse: bytes of zeroes in a row that are worth a hole, a multiple of
            512; 0 writes every zero out.
        compressed: write compressed clusters.
        target_is_zero: the target reads as zeroes all over, and has no backing
            file: what is zero need not be written.
        target_has_backing: what the sources' own images do not have comes from
            the target's backing file. That holds for ``backing_size`` bytes,
            the target's backing file being as long.
        whole_chain: read through the sources' backing files.
        nb_in_flight: pieces worked on at the same time.
        in_order: write them in order.
        copy_range: let the kernel copy data that needs no look.
        salvage: zeroes take the place of what can't be read.
        count_data: progress is told of what must be read; the maps are gone
            through once more for that.
    """

    sparse: int = 4 * KiB
    compressed: bool = False
    target_is_zero: bool = False
    target_has_backing: bool = False
    backing_size: int = 0
    nb_in_flight: int = 8
    in_order: bool = True
    copy_range: bool = False
    salvage: bool = False
    count_data: bool = False


class Piece(NamedTuple):
    """Bytes of one kind (`nbdqcow.types`), by their place in the target."""

    kind: int
    offset: int
    length: int


class SourceDisk(NamedTuple):
    """A source, and the place in the target of its whole sectors."""

    node: Node
    start: int
    end: int
    ahead: LookAhead


class Cutter:
    """Cuts disks, one behind the other, into pieces of one kind each.

    Attributes:
        disks: the sources, each with its place in the target.
        unit: bytes, all of them zeroes, that are worth a hole.
        moves: whether threads may move pieces from file to file.
        looks_first: whether looking for zeroes before reading is cheap.
        most_read: bytes of the longest piece that is read as a whole.
    """

    def __init__(
        self,
        sources: Sequence[Node],
        target: Node,
        options: ConvertOptions,
        control: JobControl,
        on_salvaged: Callable[[str, int, str], None],
    ) -> None:
        self.disks: list[SourceDisk] = []
        end = 0
        for source in sources:
            start, end = end, end + disk_size(source)
            self.disks.append(SourceDisk(source, start, end, LookAhead()))
        self._options = options
        self._control = control
        self._on_salvaged = on_salvaged
        cluster_size = target.driver.cluster_size
        # Within a cluster holes save nothing; clusters below a backing file
        # must not be copied for the sake of zeroes beside data.
        self.unit = max(options.sparse, SECTOR_SIZE)
        if options.compressed:
            self.unit = cluster_size
        elif options.target_is_zero and cluster_size > self.unit:
            self.unit = getattr(target.driver, "subcluster_size", cluster_size)
        self._piece = self.most_read = max(_PIECE, cluster_size)
        # Up to where the rest of a piece may be a hole.
        self._short_hole = _SHORT_HOLE
        # Salvaging goes sector by sector, compressing wants the whole.
        self.moves = (
            target.writes_in_threads
            and not (options.salvage or options.compressed)
            and (not options.sparse or CHUNK % self.unit == 0)
        )
        images = [image for source in sources for image in chain_of(source)]
        # A rate wants short pieces.
        moves_much = (
            self.moves
            and options.target_is_zero
            and options.sparse > 0
            and not control.rate
        )
        self.looks_first = self.unit >= _MIN_LOOK
        self._joins = moves_much and cluster_size > 1
        if (
            moves_much
            and cluster_size == 1
            and all(image.driver.data.reads_in_threads for image in images)
        ):
            # Threads pass by what is a hole: the longer, the less is left to say.
            self._piece = min(max(_PIECE, end // _NB_PIECES), _LONG_PIECE)
            self._piece = round_down(self._piece, _PIECE)
            if all(image.driver.cluster_size > 1 for image in images):
                # In a raw image they would have to read it.
                self._short_hole = self._piece

    def disk_of(self, piece: Piece) -> SourceDisk:
        """Return the source in which a piece begins."""
        return next(disk for disk in self.disks if piece.offset < disk.end)

    def is_there(self, piece: Piece) -> bool:
        """Whether nothing has to be done for a piece."""
        options = self._options
        return piece.kind == UNALLOCATED or (
            piece.kind == ZERO and options.target_is_zero and options.sparse > 0
        )

    async def joined_pieces(self) -> AsyncIterator[list[Piece]]:
        """Yield the pieces that have to be copied, those together that are copied in
        one go."""
        control = self._control
        joined: list[Piece] = []
        nb_bytes = 0
        async for piece in self.pieces():
            is_there = self.is_there(piece)
            moves = not is_there and piece.kind != ZERO
            await control.checkpoint(piece.length if moves else 0)
            if is_there:
                if not self._options.count_data:
                    control.advance(piece.length)
                continue
            joins = self._joins and piece.kind == DATA
            if joined and not (joins and nb_bytes + piece.length <= _MAX_JOINED):
                yield joined
                joined, nb_bytes = [], 0
            joined.append(piece)
            nb_bytes += piece.length
            if not joins:
                yield joined
                joined, nb_bytes = [], 0
        if joined:
            yield joined

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield all pieces, in order."""
        position = 0
        for disk in self.disks:
            while position < disk.end:
                kind, length = await self._stretch(disk, position)
                yield Piece(kind, position, length)
                # A piece to be compressed may reach into the next disk.
                position += length

    async def _stretch(self, disk: SourceDisk, position: int) -> tuple[int, int]:
        """Return the kind and length of the piece that begins at ``position``."""
        source, offset = disk.node, position - disk.start
        length, inside = disk.end - position, source.size - offset
        kind, covered = ZERO, length
        boundary = round_down(position, self._piece) + self._piece - position
        if inside > 0:
            kind, covered = await self._look(
                disk, offset, min(inside, _EMPTY_PIECE), boundary
            )
        if self._options.compressed:
            return self._whole_clusters(kind, position, covered, boundary)
        if kind == ZERO:
            return self._zero_kind(position, covered)
        if kind == UNALLOCATED:
            return kind, covered
        # Up to the next boundary all is read at once, short holes with it.
        boundary = min(boundary, inside)
        while covered < boundary:
            kind, more = await self._look(
                disk, offset + covered, boundary - covered, boundary
            )
            if kind == UNALLOCATED or (kind == ZERO and more > self._short_hole):
                break
            covered += more
        return DATA, min(covered, boundary)

    async def _look(
        self, disk: SourceDisk, offset: int, length: int, enough_data: int
    ) -> tuple[int, int]:
        """Return what `stretch_of` does; a sector without a map is data."""
        chain = not self._options.target_has_backing
        joins = True
        while True:
            try:
                return await stretch_of(
                    disk.node,
                    offset,
                    length,
                    whole_chain=chain,
                    enough_data=enough_data,
                    joins=joins,
                    ahead=disk.ahead,
                )
            except OSError as error:
                if joins:
                    # Up to where it is: what is before that is sound.
                    joins = False
                    continue
                position, reason = disk.start + offset, reason_of(error)
                if not self._options.salvage:
                    action = "reading block status"
                    raise CopyError(action, position, reason) from error
                self._on_salvaged("block status at offset", position, reason)
                return DATA, min(SECTOR_SIZE, length)

    def _whole_clusters(
        self, kind: int, position: int, covered: int, boundary: int
    ) -> tuple[int, int]:
        """Return a piece of the target's clusters that are all of one kind, or
        are read because they are not."""
        options = self._options
        rest, unit = self.disks[-1].end - position, self.unit
        if kind == ZERO and options.target_has_backing:
            kind, covered = self._zero_kind(position, covered)
        if kind == UNALLOCATED or (kind == ZERO and options.sparse):
            if covered >= rest:
                return kind, rest
            if whole := round_down(position + covered, unit) - position:
                return kind, whole
        return DATA, min(round_up(position + covered, unit) - position, boundary, rest)

    def _zero_kind(self, position: int, length: int) -> tuple[int, int]:
        """Return a piece of zeroes: behind the end of the target's backing
        file they are there already."""
        options = self._options
        if options.target_has_backing:
            if position >= options.backing_size:
                return UNALLOCATED, length
            length = min(length, options.backing_size - position)
        if not options.sparse:
            return ZERO, min(length, _PIECE - position % _PIECE)
        return ZERO, length

"""Copying disks into another image: `convert` and `dd`.

The source is cut into pieces of one kind each. Several are read, searched for
zeroes and written at the same time; unless told otherwise they are written in
order, so that an image that grows is laid out as a reader will want it.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from nbdqcow.block.node import Node
from nbdqcow.block.write_requests import Work
from nbdqcow.errors import BlockError, NbdQcowError, NotSupported
from nbdqcow.jobs.control import Flight, JobControl
from nbdqcow.jobs.status import (
    LookAhead,
    Place,
    chain_of,
    disk_size,
    stretch_of,
    try_places,
)
from nbdqcow.jobs.transfer import CHUNK, ReadError, Transfer
from nbdqcow.jobs.zeroes import data_runs
from nbdqcow.types import DATA, UNALLOCATED, ZERO, Buffer
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


@dataclass(frozen=True, slots=True)
class ConvertOptions:
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


class CopyError(NbdQcowError):
    """A piece could not be copied; ``action`` is ``reading``, ``reading block
    status`` or ``writing``, ``reason`` what was said of it."""

    def __init__(self, action: str, offset: int, reason: str) -> None:
        # QEMU's words.
        unit = "offset" if action == "reading block status" else "byte"
        super().__init__(f"error while {action} at {unit} {offset}: {reason}")
        self.action = action
        self.reason = reason
        self.offset = offset


@dataclass(frozen=True, slots=True)
class _Piece:
    kind: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class _Disk:
    """A source, and the place in the target of its whole sectors."""

    node: Node
    start: int
    end: int
    ahead: LookAhead = field(default_factory=LookAhead)


async def convert(
    sources: Sequence[Node],
    target: Node,
    options: ConvertOptions,
    control: JobControl,
    on_salvaged: Callable[[str, int, str], None] = lambda what, offset, reason: None,
) -> None:
    """Copy disks, one behind the other, to the beginning of ``target``.

    ``on_salvaged(what, offset, reason)`` hears of each sector that could not be
    read, and of which the map could not: ``what`` is words for that. Raises
    `CopyError` and `nbdqcow.jobs.control.JobCancelled`; the target is then half
    written.
    """
    await _Conversion(sources, target, options, control, on_salvaged).run()


class _Conversion:
    def __init__(
        self,
        sources: Sequence[Node],
        target: Node,
        options: ConvertOptions,
        control: JobControl,
        on_salvaged: Callable[[str, int, str], None],
    ) -> None:
        self._disks: list[_Disk] = []
        end = 0
        for source in sources:
            start, end = end, end + disk_size(source)
            self._disks.append(_Disk(source, start, end))
        self._target = target
        self._options = options
        self._control = control
        self._on_salvaged = on_salvaged
        self._skip_zeroes = options.target_is_zero
        self._copy_range = options.copy_range
        cluster_size = target.driver.cluster_size
        # Within a cluster holes save nothing; clusters below a backing file
        # must not be copied for the sake of zeroes beside data.
        self._unit = max(options.sparse, SECTOR_SIZE)
        if options.compressed:
            self._unit = cluster_size
        elif options.target_is_zero and cluster_size > self._unit:
            self._unit = getattr(target.driver, "subcluster_size", cluster_size)
        self._piece = self._most_read = max(_PIECE, cluster_size)
        # Up to where the rest of a piece may be a hole.
        self._short_hole = _SHORT_HOLE
        # Salvaging goes sector by sector, compressing wants the whole.
        self._moves = (
            target.writes_in_threads
            and not (options.salvage or options.compressed)
            and (not options.sparse or CHUNK % self._unit == 0)
        )
        images = [image for source in sources for image in chain_of(source)]
        # A rate wants short pieces.
        moves_much = (
            self._moves
            and self._skip_zeroes
            and options.sparse > 0
            and not control.rate
        )
        self._joins = moves_much and cluster_size > 1 and self._unit >= _MIN_LOOK
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

    async def run(self) -> None:
        options, control = self._options, self._control
        total = self._disks[-1].end
        if options.count_data:
            total = 0
            async for piece in self._pieces():
                total += 0 if self._is_there(piece) else piece.length
        control.expect(total)
        turn: asyncio.Future[None] | None = None
        async with Flight(options.nb_in_flight) as flight:
            async for pieces in self._joined_pieces():
                begun = asyncio.get_running_loop().create_future()
                await flight.add(
                    self._copy(pieces, turn if options.in_order else None, begun)
                )
                turn = begun
                if options.salvage:
                    # What is lost is told in its order.
                    await flight.drain()
                # Said when begun, as QEMU does: pieces end in any order.
                control.advance(sum(piece.length for piece in pieces))
            await flight.drain()

    def _is_there(self, piece: _Piece) -> bool:
        """Whether nothing has to be done for a piece."""
        return piece.kind == UNALLOCATED or (
            piece.kind == ZERO and self._skip_zeroes and self._options.sparse > 0
        )

    # -- cutting ---------------------------------------------------------

    async def _joined_pieces(self) -> AsyncIterator[list[_Piece]]:
        """Yield the pieces that have to be copied, those together that are copied in
        one go."""
        control = self._control
        joined: list[_Piece] = []
        nb_bytes = 0
        async for piece in self._pieces():
            await control.checkpoint()
            if self._is_there(piece):
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

    async def _pieces(self) -> AsyncIterator[_Piece]:
        position = 0
        for disk in self._disks:
            while position < disk.end:
                kind, length = await self._stretch(disk, position)
                yield _Piece(kind, position, length)
                # A piece to be compressed may reach into the next disk.
                position += length

    async def _stretch(self, disk: _Disk, position: int) -> tuple[int, int]:
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
        self, disk: _Disk, offset: int, length: int, enough_data: int
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
                position, reason = disk.start + offset, reason_of(error)
                if not self._options.salvage:
                    action = "reading block status"
                    raise CopyError(action, position, reason) from error
                if not joins:
                    self._on_salvaged("block status at offset", position, reason)
                    return DATA, min(SECTOR_SIZE, length)
                joins = False

    def _whole_clusters(
        self, kind: int, position: int, covered: int, boundary: int
    ) -> tuple[int, int]:
        """Return a piece of the target's clusters that are all of one kind, or
        are read because they are not."""
        rest, unit = self._disks[-1].end - position, self._unit
        if kind != DATA and self._options.sparse:
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

    # -- copying ---------------------------------------------------------

    async def _copy(
        self,
        pieces: list[_Piece],
        turn: "asyncio.Future[None] | None",
        begun: "asyncio.Future[None]",
    ) -> None:
        """Copy pieces; their writing begins after ``turn``, and then ``begun``
        is set."""
        try:
            joined = self._try_join(pieces)
            if joined is not None:
                await _begin(turn, begun)
                # Where it does not go well, each piece will tell of itself.
                with suppress(ReadError, OSError):
                    await self._target.pwrite_runs_by(*joined)
                    return
            for piece in pieces:
                await self._copy_piece(piece, turn, begun)
        finally:
            # Nobody waits for ever for a piece that failed.
            if not begun.done():
                begun.cancel()

    async def _copy_piece(
        self,
        piece: _Piece,
        turn: "asyncio.Future[None] | None",
        begun: "asyncio.Future[None]",
    ) -> None:
        try:
            data: Buffer | None = None
            move = None
            if piece.kind == DATA and not self._copy_range:
                move = self._try_plan_move(piece)
                if piece.length > self._most_read:
                    move = partial(self._move_long, move, piece)
                elif move is None:
                    data = await self._read(piece)
            await _begin(turn, begun)
            if move is not None:
                await move()
            else:
                await self._write(piece, data)
        except ReadError as error:
            # Where that was, reading as a whole tells.
            await self._read(piece)
            reason = reason_of(error.reason)
            raise CopyError("reading", piece.offset, reason) from error
        except OSError as error:
            raise CopyError("writing", piece.offset, reason_of(error)) from error

    def _try_join(
        self, pieces: list[_Piece]
    ) -> tuple[list[tuple[int, int]], Work] | None:
        """Return what `Node.pwrite_runs_by` is to do for all the pieces at once.

        None if they go one by one.
        """
        if len(pieces) == 1 or self._copy_range:
            return None
        runs: list[tuple[int, int]] = []
        places: list[Place] = []
        for piece in pieces:
            transfer = self._try_transfer(piece)
            if transfer is None or piece.offset % self._unit:
                return None
            found = transfer.try_find_runs(self._unit)
            if found is None:
                return None
            position = 0
            for has_data, length in found:
                if has_data:
                    runs.append((piece.offset + position, length))
                    places += transfer.stretches(position, length)
                position += length
        return runs, partial(Transfer(places).write_blocking, 0)

    def _try_transfer(self, piece: _Piece) -> Transfer | None:
        """Return a piece's bytes; None if threads can't move them."""
        disk = next(disk for disk in self._disks if piece.offset < disk.end)
        if not self._moves or piece.offset + piece.length > disk.end:
            return None
        places = try_places(
            disk.node, piece.offset - disk.start, piece.length, longest_unit=CHUNK
        )
        return None if places is None else Transfer(places)

    def _try_plan_move(self, piece: _Piece) -> Callable[[], Awaitable[None]] | None:
        """Return what moves a piece from file to file, where threads can.

        None if the piece must be read as a whole.
        """
        transfer = self._try_transfer(piece)
        if transfer is None:
            return None
        start, length = piece.offset, piece.length
        if not self._options.sparse:
            return partial(self._move, transfer, start, [(True, length)])
        if start % self._unit:
            return None
        if self._target.driver.cluster_size == 1:
            return partial(self._move_sparse, transfer, start, length)
        if self._unit < _MIN_LOOK:
            return None
        runs = transfer.try_find_runs(self._unit)
        return None if runs is None else partial(self._move, transfer, start, runs)

    async def _move_long(
        self, move: Callable[[], Awaitable[None]] | None, piece: _Piece
    ) -> None:
        """Move a piece that is too long to be read as a whole. Where that does not
        go well, reading and writing its parts will find out what is wrong."""
        if move is not None:
            with suppress(ReadError, OSError):
                await move()
                return
        end = piece.offset + piece.length
        for start in range(piece.offset, end, self._most_read):
            part = _Piece(DATA, start, min(self._most_read, end - start))
            data = await self._read(part)
            try:
                await self._write(part, data)
            except OSError as error:
                raise CopyError("writing", start, reason_of(error)) from error

    async def _move(
        self, transfer: Transfer, offset: int, runs: Sequence[tuple[bool, int]]
    ) -> None:
        """Write the runs that hold data, and zero the others."""
        target = self._target
        plain = transfer.is_plain_copy(target.driver.data)
        position = 0
        for has_data, length in runs:
            start = offset + position
            if not has_data:
                await self._write_zeroes(start, length)
            elif not (
                plain and await self._copy_plain(transfer, position, start, length)
            ):
                work = partial(transfer.write_blocking, position)
                await target.pwrite_by(start, length, work)
            position += length

    async def _copy_plain(
        self, transfer: Transfer, skipped: int, offset: int, length: int
    ) -> bool:
        """Have the kernel copy data; whether that went well. Where it did not,
        reading and writing will find out what is wrong with which file."""
        try:
            await self._target.copy_by(offset, length, partial(transfer.find, skipped))
        except OSError:
            return False
        return True

    async def _move_sparse(self, transfer: Transfer, offset: int, length: int) -> None:
        """Write data, and zero the rest, in an image where all has its place."""
        work = partial(transfer.write_data_blocking, self._unit)
        await self._target.pwrite_by(offset, length, work)
        for start, count in transfer.zeroes:
            await self._write_zeroes(offset + start, count)

    async def _read(self, piece: _Piece) -> Buffer:
        parts: list[Buffer] = []
        start, end = piece.offset, piece.offset + piece.length
        for disk in self._disks:
            if disk.start <= start < min(end, disk.end):
                length = min(end, disk.end) - start
                parts.append(await self._read_disk(disk, start, length))
                start += length
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _read_disk(self, disk: _Disk, position: int, length: int) -> Buffer:
        """Read sectors of one disk, of which the last may be a part only."""
        offset = position - disk.start
        inside = min(length, max(0, disk.node.size - offset))
        pieces: list[Buffer] = []
        place = position
        try:
            async for piece in disk.node.pread_pieces(offset, inside):
                pieces.append(piece)
                place += len(piece)
        except OSError as error:
            if not self._options.salvage:
                raise CopyError("reading", place, reason_of(error)) from error
            pieces = [await self._salvage(disk, position, inside)]
        if inside < length:
            pieces.append(bytes(length - inside))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _salvage(self, disk: _Disk, position: int, length: int) -> bytes:
        pieces: list[Buffer] = []
        for start in range(position, position + length, SECTOR_SIZE):
            count = min(SECTOR_SIZE, position + length - start)
            try:
                pieces.append(await disk.node.pread(start - disk.start, count))
            except OSError as error:
                self._on_salvaged("offset", start, reason_of(error))
                pieces.append(bytes(count))
        return b"".join(pieces)

    async def _write(self, piece: _Piece, data: Buffer | None) -> None:
        target, options = self._target, self._options
        if piece.kind == ZERO:
            if options.sparse:
                await self._write_zeroes(piece.offset, piece.length)
            else:
                await target.pwrite(piece.offset, bytes(piece.length))
        elif data is None:
            await self._offload(piece)
        elif options.compressed:
            await self._write_compressed(piece.offset, data)
        elif not options.sparse:
            await target.pwrite(piece.offset, data)
        else:
            await self._write_sparse(piece.offset, data)

    async def _write_sparse(self, offset: int, data: Buffer) -> None:
        if isinstance(data, memoryview):
            data = data.tobytes()
        unit = self._unit
        ahead = -offset % unit
        runs = []
        if ahead:
            # The first unit began in another piece.
            runs = data_runs(data[:ahead], SECTOR_SIZE)
            data_rest = data[ahead:]
        else:
            data_rest = data
        if data_rest:
            runs += data_runs(data_rest, unit)
        if runs == [(True, len(data))]:
            await self._target.pwrite(offset, data)
            return
        view = memoryview(data)
        position = 0
        for has_data, length in runs:
            if has_data:
                await self._target.pwrite(
                    offset + position, view[position : position + length]
                )
            elif not self._skip_zeroes:
                await self._write_zeroes(offset + position, length)
            position += length

    async def _write_zeroes(self, offset: int, length: int) -> None:
        if not self._skip_zeroes:
            await self._target.write_zeroes(offset, length, may_unmap=True)

    async def _write_compressed(self, offset: int, data: Buffer) -> None:
        target, unit = self._target, self._unit
        if isinstance(data, memoryview):
            data = data.tobytes()
        position = 0
        for has_data, length in data_runs(data, unit):
            chunk = memoryview(data)[position : position + length]
            if has_data or not self._options.sparse:
                await target.pwrite_compressed(
                    offset + position, chunk, store_zeroes=not self._options.sparse
                )
            elif not self._skip_zeroes:
                await self._write_zeroes(offset + position, length)
            position += length

    async def _offload(self, piece: _Piece) -> None:
        disk = next(disk for disk in self._disks if piece.offset < disk.end)
        if self._copy_range:
            try:
                await self._target.copy_range(
                    piece.offset, disk.node, piece.offset - disk.start, piece.length
                )
                return
            except NotSupported:
                # Nor will the next pieces be.
                self._copy_range = False
        await self._write(piece, await self._read(piece))


async def _begin(
    turn: "asyncio.Future[None] | None", begun: "asyncio.Future[None]"
) -> None:
    """Wait for one's turn to write, and let others wait for theirs."""
    if turn is not None:
        await turn
    if not begun.done():
        # Whoever waits for this runs once this task waits for something: by then
        # it has its clusters.
        begun.set_result(None)


def reason_of(error: OSError) -> str:
    """Return what an error says, without its number."""
    return str(error) if isinstance(error, BlockError) else error.strerror or str(error)

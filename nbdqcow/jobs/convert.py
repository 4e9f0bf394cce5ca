"""Copying disks into another image: `convert`.

The source is cut into pieces of one kind each. Several are read, searched for
zeroes and written at the same time; unless told otherwise they are written in
order, so that an image that grows is laid out as a reader will want it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

from nbdqcow.block.node import Node
from nbdqcow.block.write_requests import Work
from nbdqcow.errors import NotSupported
from nbdqcow.jobs.control import Flight, JobControl
from nbdqcow.jobs.errors import CopyError, reason_of
from nbdqcow.jobs.pieces import ConvertOptions, Cutter, Piece, SourceDisk
from nbdqcow.jobs.status import Place, try_places
from nbdqcow.jobs.transfer import CHUNK, ReadError, Transfer, ZeroesFound
from nbdqcow.jobs.zeroes import data_runs
from nbdqcow.types import DATA, ZERO, Buffer
from nbdqcow.units import SECTOR_SIZE, MiB

_FULL_ENOUGH: Final = 256 * MiB
"""Data without a unit of zeroes after which none is expected."""


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
    cutter = Cutter(sources, target, options, control, on_salvaged)
    await _Conversion(cutter, target, options, control, on_salvaged).run()


class _Conversion:
    """One run of `convert`."""

    def __init__(
        self,
        cutter: Cutter,
        target: Node,
        options: ConvertOptions,
        control: JobControl,
        on_salvaged: Callable[[str, int, str], None],
    ) -> None:
        self._cutter = cutter
        self._target = target
        self._options = options
        self._control = control
        self._on_salvaged = on_salvaged
        self._copy_range = options.copy_range
        self._nb_full = 0
        """Bytes of data since the last zeroes in what the maps call data."""

    async def run(self) -> None:
        options, control = self._options, self._control
        total = self._cutter.disks[-1].end
        if options.count_data:
            total = 0
            async for piece in self._cutter.pieces():
                total += 0 if self._cutter.is_there(piece) else piece.length
        control.expect(total)
        turn: asyncio.Future[None] | None = None
        async with Flight(options.nb_in_flight) as flight:
            async for pieces in self._cutter.joined_pieces():
                begun = asyncio.get_running_loop().create_future()
                await flight.add(
                    self._copy(pieces, turn if options.in_order else None, begun)
                )
                turn = begun
                if options.salvage:
                    # What is lost is told in its order.
                    await flight.drain()
                # Said when begun, as QEMU does: pieces end in any order.
                for piece in pieces:
                    control.advance(piece.length)
            await flight.drain()

    # -- copying ---------------------------------------------------------

    async def _copy(
        self,
        pieces: list[Piece],
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
                try:
                    await self._target.pwrite_runs_by(*joined)
                except ZeroesFound:
                    self._nb_full = 0
                except (ReadError, OSError):
                    pass
                else:
                    return
            for piece in pieces:
                await self._copy_piece(piece, turn, begun)
        finally:
            # Nobody waits for ever for a piece that failed.
            if not begun.done():
                begun.cancel()

    async def _copy_piece(
        self,
        piece: Piece,
        turn: "asyncio.Future[None] | None",
        begun: "asyncio.Future[None]",
    ) -> None:
        try:
            data: Buffer | None = None
            move = None
            if piece.kind == DATA and not self._copy_range:
                move = self._try_plan_move(piece)
                if piece.length > self._cutter.most_read:
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
        self, pieces: list[Piece]
    ) -> tuple[list[tuple[int, int]], Work] | None:
        """Return what `Node.pwrite_runs_by` is to do for all the pieces at once.

        None if they go one by one.
        """
        if len(pieces) == 1 or self._copy_range:
            return None
        unit = self._cutter.unit
        # Looking costs a system call for each unit; threads see it for less, but
        # when there are clusters for it already.
        looks = self._nb_full < _FULL_ENOUGH
        if looks and not self._cutter.looks_first:
            # Reading costs less.
            return None
        runs: list[tuple[int, int]] = []
        places: list[Place] = []
        for piece in pieces:
            transfer = self._try_transfer(piece)
            if transfer is None or piece.offset % unit or not transfer.is_cut_at(unit):
                return None
            whole = [(True, piece.length)]
            found = transfer.try_find_runs(unit) if looks else whole
            if found is None:
                return None
            position = 0
            for has_data, length in found:
                if has_data:
                    runs.append((piece.offset + position, length))
                    places += transfer.stretches(position, length)
                position += length
        nb_bytes = sum(piece.length for piece in pieces)
        if nb_bytes > sum(length for _, length in runs):
            self._nb_full = 0
        else:
            self._nb_full += nb_bytes
        if looks:
            return runs, partial(Transfer(places).write_blocking, 0)
        return runs, partial(Transfer(places).write_full_blocking, unit)

    def _try_transfer(self, piece: Piece) -> Transfer | None:
        """Return a piece's bytes; None if threads can't move them."""
        disk = self._cutter.disk_of(piece)
        if not self._cutter.moves or piece.offset + piece.length > disk.end:
            return None
        places = try_places(
            disk.node, piece.offset - disk.start, piece.length, longest_unit=CHUNK
        )
        return None if places is None else Transfer(places)

    def _try_plan_move(self, piece: Piece) -> Callable[[], Awaitable[None]] | None:
        """Return what moves a piece from file to file, where threads can.

        None if the piece must be read as a whole.
        """
        transfer = self._try_transfer(piece)
        if transfer is None:
            return None
        start, length = piece.offset, piece.length
        if not self._options.sparse:
            return partial(self._move, transfer, start, [(True, length)])
        if start % self._cutter.unit:
            return None
        if self._target.driver.cluster_size == 1:
            return partial(self._move_sparse, transfer, start, length)
        if not self._cutter.looks_first:
            return None
        runs = transfer.try_find_runs(self._cutter.unit)
        return None if runs is None else partial(self._move, transfer, start, runs)

    async def _move_long(
        self, move: Callable[[], Awaitable[None]] | None, piece: Piece
    ) -> None:
        """Move a piece that is too long to be read as a whole. Where that does not
        go well, reading and writing its parts will find out what is wrong."""
        if move is not None:
            with suppress(ReadError, OSError):
                await move()
                return
        end = piece.offset + piece.length
        for start in range(piece.offset, end, self._cutter.most_read):
            part = Piece(DATA, start, min(self._cutter.most_read, end - start))
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
        work = partial(transfer.write_data_blocking, self._cutter.unit)
        await self._target.pwrite_by(offset, length, work)
        for start, count in transfer.zeroes:
            await self._write_zeroes(offset + start, count)

    async def _read(self, piece: Piece) -> Buffer:
        parts: list[Buffer] = []
        start, end = piece.offset, piece.offset + piece.length
        for disk in self._cutter.disks:
            if disk.start <= start < min(end, disk.end):
                length = min(end, disk.end) - start
                parts.append(await self._read_disk(disk, start, length))
                start += length
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _read_disk(self, disk: SourceDisk, position: int, length: int) -> Buffer:
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

    async def _salvage(self, disk: SourceDisk, position: int, length: int) -> bytes:
        pieces: list[Buffer] = []
        for start in range(position, position + length, SECTOR_SIZE):
            count = min(SECTOR_SIZE, position + length - start)
            try:
                pieces.append(await disk.node.pread(start - disk.start, count))
            except OSError as error:
                self._on_salvaged("offset", start, reason_of(error))
                pieces.append(bytes(count))
        return b"".join(pieces)

    async def _write(self, piece: Piece, data: Buffer | None) -> None:
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
        unit = self._cutter.unit
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
            self._nb_full += len(data)
            await self._target.pwrite(offset, data)
            return
        self._nb_full = 0
        view = memoryview(data)
        position = 0
        for has_data, length in runs:
            if has_data:
                await self._target.pwrite(
                    offset + position, view[position : position + length]
                )
            elif not self._options.target_is_zero:
                await self._write_zeroes(offset + position, length)
            position += length

    async def _write_zeroes(self, offset: int, length: int) -> None:
        if not self._options.target_is_zero:
            await self._target.write_zeroes(offset, length, may_unmap=True)

    async def _write_compressed(self, offset: int, data: Buffer) -> None:
        target, unit = self._target, self._cutter.unit
        if isinstance(data, memoryview):
            data = data.tobytes()
        position = 0
        for has_data, length in data_runs(data, unit):
            chunk = memoryview(data)[position : position + length]
            if has_data or not self._options.sparse:
                await target.pwrite_compressed(
                    offset + position, chunk, store_zeroes=not self._options.sparse
                )
            elif not self._options.target_is_zero:
                await self._write_zeroes(offset + position, length)
            position += length

    async def _offload(self, piece: Piece) -> None:
        disk = self._cutter.disk_of(piece)
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

"""A client of several connections, and what it may find after a power cut."""

import random
import select
import struct
from dataclasses import dataclass
from pathlib import Path

from tests.nbd_client import (
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLUSH,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    NbdClient,
)
from tests.plug.recording import NEVER, SECTOR, Recording

# A cookie that no other bytes in the log look like.
_FIRST_COOKIE = 0x5EED_BEAD_0000_0000


@dataclass(slots=True)
class Request:
    """One request.

    Attributes:
        log_length: when it was sent.
        covers: of a flush, the requests that had been answered before.
        error: what the reply says.
    """

    cookie: int
    command: int
    offset: int
    length: int
    flags: int
    data: bytes
    log_length: int
    covers: frozenset[int]
    error: int | None = None

    @property
    def sectors(self) -> range:
        end = self.offset + self.length
        return range(self.offset // SECTOR, -(-end // SECTOR))


class Client:
    """Sends random requests; those that are in flight share no sector.

    ``commands``: letters to draw from: w(rite), z(eroes), t(rim), f(lush).
    ``before``: requests to a server that is no more; those that follow, and these,
    are for whole sectors.
    """

    def __init__(
        self,
        socket: Path,
        log: Path,
        rnd: random.Random,
        commands: str,
        max_length: int,
        before: list[Request] | None = None,
    ) -> None:
        self._whole_sectors = before is not None
        nb_connections, self._depth = rnd.choice((1, 2, 3)), rnd.choice((1, 4, 16))
        self._connections = [NbdClient(socket) for _ in range(nb_connections)]
        self._size = self._connections[0].size
        self._log = log
        self._rnd = rnd
        self._commands = commands
        self._max_length = max_length
        self.requests = [] if before is None else before
        self._in_flight: dict[int, Request] = {}
        self._answered: set[int] = set()

    def run(self, nb_requests: int, *, wait: bool = True) -> None:
        """Send requests until they are so many, and ``wait`` for all replies."""
        while len(self.requests) < nb_requests or (wait and self._in_flight):
            for connection in self._connections:
                while (
                    connection.nb_in_flight < self._depth
                    and len(self.requests) < nb_requests
                ):
                    self._send(connection)
            self._receive()

    def disconnect(self) -> None:
        for connection in self._connections:
            connection.disconnect()

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def _send(self, connection: NbdClient) -> None:
        rnd = self._rnd
        command = {
            "w": CMD_WRITE,
            "z": CMD_WRITE_ZEROES,
            "t": CMD_TRIM,
            "f": CMD_FLUSH,
        }[rnd.choice(self._commands)]
        offset = length = flags = 0
        data, covers = b"", frozenset[int]()
        cookie = _FIRST_COOKIE + len(self.requests)
        if command == CMD_FLUSH:
            covers = frozenset(self._answered)
        else:
            offset, length = self._choose_range(whole_sectors=command == CMD_TRIM)
            flags = CMD_FLAG_FUA if rnd.random() < 0.08 else 0
        if command == CMD_WRITE_ZEROES and rnd.random() < 0.4:
            flags |= CMD_FLAG_NO_HOLE
        if command == CMD_WRITE:
            data = _make_data(cookie, offset, length, rnd)
        request = Request(
            cookie, command, offset, length, flags, data,
            self._log.stat().st_size, covers,
        )  # fmt: skip
        self.requests.append(request)
        self._in_flight[cookie] = request
        connection._next_cookie = cookie
        connection.submit(command, offset, length, data, flags)

    def _choose_range(self, *, whole_sectors: bool) -> tuple[int, int]:
        rnd = self._rnd
        while True:
            length = rnd.choice((512, 4096, 4096, rnd.randrange(1, self._max_length)))
            offset = rnd.randrange(self._size)
            if whole_sectors or self._whole_sectors or rnd.random() < 0.9:
                offset = offset // SECTOR * SECTOR
                length = -(-length // SECTOR) * SECTOR
            length = min(length, self._size - offset)
            first, end = offset // SECTOR, -(-(offset + length) // SECTOR)
            if not any(
                r.sectors.start < end and first < r.sectors.stop
                for r in self._in_flight.values()
            ):
                return offset, length

    def _receive(self) -> None:
        busy = [c for c in self._connections if c.nb_in_flight]
        ready = [c for c in busy if c.reply_waiting()]
        if busy and not ready:
            ready, _, _ = select.select(busy, [], [], 60)
            assert ready, "no reply within 60 s"
        for connection in ready:
            reply = connection.receive()
            self._in_flight.pop(reply.cookie).error = reply.error
            if not reply.error:
                self._answered.add(reply.cookie)


def _make_data(cookie: int, offset: int, length: int, rnd: random.Random) -> bytes:
    """Return bytes that say whose they are; every other time compressible."""
    rest = rnd.randbytes(SECTOR - 16) if rnd.random() < 0.5 else bytes(SECTOR - 16)
    first = offset // SECTOR
    data = b"".join(
        struct.pack("<QQ", cookie, sector) + rest
        for sector in range(first, -(-(offset + length) // SECTOR))
    )
    return data[offset - first * SECTOR :][:length]


@dataclass(slots=True)
class _Change:
    """``values``: what a sector may hold once the request is carried out."""

    begun: int
    durable_at: int
    values: tuple[bytes, ...]


class Model:
    """What each sector of a disk may hold at a place of the recording."""

    def __init__(
        self,
        base: bytes,
        backing: bytes,
        requests: list[Request],
        recording: Recording,
        *,
        write_through: bool = False,
        nb_killed: int = 0,
    ) -> None:
        """``base`` is the disk's content before, ``backing`` that of its backing
        image. ``write_through``: what is answered is durable. ``nb_killed``: of the
        requests, so many were sent to a server that was killed then."""
        self._base, self._backing = base, backing
        durable_at = {r.cookie: NEVER for r in requests}
        for request in requests:
            at, error = recording.replies.get(request.cookie, (NEVER, 0))
            covered = set() if error else set(request.covers)
            if not error and (write_through or request.flags & CMD_FLAG_FUA):
                covered.add(request.cookie)
            for cookie in covered:
                durable_at[cookie] = min(durable_at[cookie], at)
        self._changes: dict[int, list[_Change]] = {}
        begun = 0
        for number, request in enumerate(requests):
            if number == nb_killed:
                self._forget_what_came_last()
            while (
                begun < recording.nb_records
                and recording.ends[begun] <= request.log_length
            ):
                begun += 1
            if request.command != CMD_FLUSH:
                for sector in request.sectors:
                    changes = self._changes.setdefault(sector, [])
                    before = (self._old(sector),)
                    if changes:
                        before = changes[-1].values
                    values = self._values_after(request, sector, before)
                    changes.append(_Change(begun, durable_at[request.cookie], values))

    def _forget_what_came_last(self) -> None:
        """Let the next change of each sector find whatever may be there after a kill:
        what was not flushed may have been in memory only."""
        for sector, changes in self._changes.items():
            values = [self._old(sector)]
            for change in changes:
                if change.durable_at < NEVER:
                    values.clear()
                values += change.values
            found = tuple(dict.fromkeys(values))
            changes.append(_Change(changes[-1].begun, NEVER, found))

    def _old(self, sector: int) -> bytes:
        return self._base[sector * SECTOR : (sector + 1) * SECTOR]

    def _values_after(
        self, request: Request, sector: int, before: tuple[bytes, ...]
    ) -> tuple[bytes, ...]:
        start = sector * SECTOR
        first = max(0, request.offset - start)
        end = min(SECTOR, request.offset + request.length - start)
        values = []
        if request.command == CMD_TRIM:
            below = self._backing[start : start + SECTOR].ljust(SECTOR, b"\0")
            values = [*before, bytes(SECTOR), below]
        else:
            new = bytes(end - first)
            if request.command == CMD_WRITE:
                new = request.data[start + first - request.offset :][: end - first]
            values = [old[:first] + new + old[end:] for old in before]
        if request.error:
            # It may have been carried out or not.
            values += before
        return tuple(dict.fromkeys(values))

    def problems(self, disk: bytes, cut: int) -> list[str]:
        """Return what is wrong with a disk after a cut, a line for each sector."""
        found = []
        for sector in range(len(self._base) // SECTOR):
            value = disk[sector * SECTOR : (sector + 1) * SECTOR]
            allowed = [self._old(sector)]
            for change in self._changes.get(sector, ()):
                if change.begun > cut:
                    break
                if change.durable_at < cut:
                    allowed.clear()
                allowed += change.values
            if value not in allowed:
                shown = ", ".join(sorted({a[:16].hex() for a in allowed}))
                found.append(f"sector {sector} is {value[:16].hex()}, not {shown}")
        return found

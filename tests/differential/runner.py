"""Runs random operations against a target and its model, several in flight."""

import contextlib
import copy
import random
import select
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tests import nbd_client
from tests.differential.model import NEVER, Change, DiskModel, Mismatch
from tests.differential.operations import Generator, Kind, Operation
from tests.nbd_client import NbdClient

ENOTSUP = 95
ESHUTDOWN = 108
ESHUTDOWN = 108

# A settled disk is cheap to check; past so many open changes, settle.
_MAXIMUM_OPEN_CHANGES = 60
_READ_LENGTH = 1 << 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended: ``error`` is an errno or 0."""

    token: int
    error: int
    data: bytes


class Target(Protocol):
    """Something that runs operations, in whatever order it likes."""

    def submit(self, operation: Operation) -> int:
        """Start an operation; return a token for it."""

    def wait(self) -> list[Outcome]:
        """Wait until at least one of the operations has ended."""


_COMMANDS = {
    Kind.READ: nbd_client.CMD_READ,
    Kind.WRITE: nbd_client.CMD_WRITE,
    Kind.ZERO: nbd_client.CMD_WRITE_ZEROES,
    Kind.TRIM: nbd_client.CMD_TRIM,
    Kind.FLUSH: nbd_client.CMD_FLUSH,
    Kind.CACHE: nbd_client.CMD_CACHE,
}


class NbdTarget:
    """Spreads operations over several connections to one export."""

    def __init__(self, clients: Sequence[NbdClient], source: random.Random) -> None:
        self._clients = clients
        self._source = source
        self._next_token = 0
        self._tokens: dict[tuple[int, int], int] = {}

    def submit(self, operation: Operation) -> int:
        index = self._source.randrange(len(self._clients))
        flags = 0
        if operation.fua:
            flags |= nbd_client.CMD_FLAG_FUA
        if not operation.may_unmap:
            flags |= nbd_client.CMD_FLAG_NO_HOLE
        if operation.fast_only:
            flags |= nbd_client.CMD_FLAG_FAST_ZERO
        cookie = self._clients[index].submit(
            _COMMANDS[operation.kind],
            operation.offset,
            operation.length,
            operation.data,
            flags,
        )
        self._next_token += 1
        self._tokens[index, cookie] = self._next_token
        return self._next_token

    def wait(self) -> list[Outcome]:
        busy = [i for i, client in enumerate(self._clients) if client.nb_in_flight]
        ready = [i for i in busy if self._clients[i].reply_waiting()]
        if not ready:
            sockets = {self._clients[i].fileno(): i for i in busy}
            readable, _, _ = select.select(list(sockets), [], [], 60)
            ready = [sockets[fd] for fd in readable]
        if not ready:
            raise TimeoutError(f"no reply, {len(self._tokens)} requests in flight")
        outcomes = []
        for index in ready:
            reply = self._clients[index].receive()
            token = self._tokens.pop((index, reply.cookie))
            outcomes.append(Outcome(token, reply.error, reply.data))
        return outcomes

    def rest(self) -> list[Outcome]:
        """Return all that still arrives before the server closes."""
        outcomes = []
        for index, client in enumerate(self._clients):
            with contextlib.suppress(ConnectionError):
                while client.nb_in_flight:
                    reply = client.receive()
                    token = self._tokens.pop((index, reply.cookie))
                    outcomes.append(Outcome(token, reply.error, reply.data))
        return outcomes


@dataclass(slots=True)
class Record:
    """One operation of a test, for the story told after a mismatch."""

    number: int
    operation: Operation
    submitted_at: int
    change: Change | None
    done_at: int = NEVER

    def __str__(self) -> str:
        done = "in flight" if self.done_at == NEVER else f"{self.done_at}"
        return f"#{self.number} t={self.submitted_at}..{done} {self.operation}"


@dataclass(slots=True)
class Runner:
    """Keeps up to ``depth`` operations in flight and checks every answer.

    Attributes:
        overlap: how often a change may overlap another that is in flight.
        stops: the server is going to stop, and refuses what comes then.
        crash_safe: keep what `DiskModel.crash` needs, at some cost.
        history: all operations on the image so far, of earlier runs too.
    """

    target: Target
    model: DiskModel
    generator: Generator
    source: random.Random
    depth: int = 8
    overlap: float = 0.3
    crash_safe: bool = False
    stops: bool = False
    history: list[Record] = field(default_factory=list)
    _in_flight: dict[int, Record] = field(default_factory=dict)

    def run(self, nb_operations: int) -> None:
        """Run so many operations and wait for all of them."""
        self.start(nb_operations)
        self.drain()

    def start(self, nb_operations: int) -> None:
        """Run so many operations; up to ``depth`` of them stay in flight."""
        for _ in range(nb_operations):
            # A varying depth: bursts as well as single requests.
            while len(self._in_flight) >= self.source.randint(1, self.depth):
                self._reap()
            self._submit(self._draw())
            if len(self.model.changes) > _MAXIMUM_OPEN_CHANGES:
                if self.crash_safe:
                    self.flush()
                self.settle()

    def drain(self) -> None:
        """Wait for everything in flight."""
        while self._in_flight:
            self._reap()

    def collect_rest(self) -> None:
        """After the server went away: take in the replies that it still sent.

        What it refused because it was about to end may or may not be done,
        like what it never answered.
        """
        assert isinstance(self.target, NbdTarget)
        for outcome in self.target.rest():
            record = self._in_flight.pop(outcome.token, None)
            if record is not None and outcome.error != ESHUTDOWN:
                self._finish(record, outcome)
        self._in_flight.clear()

    def settle(self) -> None:
        """Wait for everything, and read what could not be known.

        With ``crash_safe`` only after `flush`: the model forgets what else the
        disk may hold.
        """
        self.drain()
        contents = [
            (offset, self._read(offset, min(_READ_LENGTH, end - offset)))
            for start, end in self.model.open_ranges()
            for offset in range(start, end, _READ_LENGTH)
        ]
        self.model.settle(contents)

    def verify_all(self) -> None:
        """Read the whole disk."""
        self.settle()
        for offset in range(0, self.model.size, _READ_LENGTH):
            self._read(offset, min(_READ_LENGTH, self.model.size - offset))

    def check_left(self, content: bytes) -> None:
        """Compare what a kill at this moment would leave; needs ``crash_safe``."""
        record = Record(
            len(self.history),
            Operation(Kind.READ, 0, len(content)),
            self.model.tick(),
            None,
        )
        after = copy.deepcopy(self.model)
        after.crash()
        try:
            after.check_read(0, content, record.submitted_at)
        except Mismatch as mismatch:
            raise AssertionError(self._story(record, mismatch)) from mismatch

    def flush(self) -> None:
        """Wait for everything, then flush it."""
        self.drain()
        self._submit(Operation(Kind.FLUSH))
        self.drain()

    def _draw(self) -> Operation:
        while True:
            operation = self.generator.next()
            if operation.kind not in (Kind.WRITE, Kind.ZERO, Kind.TRIM):
                return operation
            if not self.model.nb_overlapping_in_flight(
                operation.offset, operation.length
            ):
                return operation
            if self.source.random() < self.overlap:
                return operation

    def _submit(self, operation: Operation) -> None:
        change = None
        if operation.kind in (Kind.WRITE, Kind.ZERO, Kind.TRIM):
            change = self.model.begin(
                operation.offset,
                operation.length,
                operation.data if operation.kind is Kind.WRITE else None,
                optional=operation.kind is Kind.TRIM,
                fua=operation.fua,
            )
        submitted_at = change.submitted_at if change else self.model.tick()
        record = Record(len(self.history), operation, submitted_at, change)
        self.history.append(record)
        self._in_flight[self.target.submit(operation)] = record

    def _reap(self) -> None:
        for outcome in self.target.wait():
            record = self._in_flight[outcome.token]
            self._finish(record, outcome)
            del self._in_flight[outcome.token]
        oldest = min((r.submitted_at for r in self._in_flight.values()), default=NEVER)
        if self.crash_safe:
            oldest = min(oldest, self.model.flushed_at)
        self.model.fold(oldest)

    def _finish(self, record: Record, outcome: Outcome) -> None:
        operation = record.operation
        if outcome.error == ENOTSUP and operation.fast_only:
            # Some of the range may have been zeroed before the server saw
            # that the rest can't be done fast.
            assert record.change is not None
            record.change.optional = True
        elif outcome.error == ESHUTDOWN and self.stops:
            if record.change is None:
                record.done_at = self.model.tick()
                return
            record.change.optional = True
        elif outcome.error:
            raise AssertionError(f"{record} failed with error {outcome.error}")
        if record.change is not None:
            self.model.end(record.change)
            record.done_at = record.change.done_at
            return
        record.done_at = self.model.tick()
        if operation.kind is Kind.FLUSH:
            self.model.flushed_at = max(self.model.flushed_at, record.submitted_at)
        if operation.kind is Kind.READ:
            self._check(record, outcome.data)

    def _check(self, record: Record, data: bytes) -> None:
        operation = record.operation
        assert len(data) == operation.length
        try:
            self.model.check_read(operation.offset, data, record.submitted_at)
        except Mismatch as mismatch:
            raise AssertionError(self._story(record, mismatch)) from mismatch

    def _read(self, offset: int, length: int) -> bytes:
        """Read with nothing else in flight; checked."""
        record = Record(
            len(self.history),
            Operation(Kind.READ, offset, length),
            self.model.tick(),
            None,
        )
        self.history.append(record)
        self.target.submit(record.operation)
        (outcome,) = self.target.wait()
        if outcome.error == ESHUTDOWN and self.stops:
            raise ConnectionAbortedError("the server is about to end")
        assert not outcome.error, f"{record} failed with error {outcome.error}"
        record.done_at = self.model.tick()
        self._check(record, outcome.data)
        return outcome.data

    def _story(self, record: Record, mismatch: Mismatch) -> str:
        """Tell which operations touched the byte that is wrong."""
        at = mismatch.offset
        touched = [
            str(r)
            for r in self.history
            if r.operation.offset <= at < r.operation.offset + r.operation.length
        ]
        lines = [f"{record}: {mismatch}", "operations on that byte, oldest first:"]
        return "\n  ".join([*lines, *touched[-20:]])

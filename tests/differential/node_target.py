"""Runs operations straight on an open node: no wire, one event loop."""

import asyncio
import random

from nbdqcow.block.node import Node
from nbdqcow.types import Buffer
from tests.differential.operations import Kind, Operation
from tests.differential.runner import Outcome


class NodeTarget:
    """Drives a node as the server does: inline where it can, else by a task.

    Between operations the loop makes a few turns, so that inline requests
    meet tasks in every state. Views are held for a while, as by a socket that
    is slow to take them, and looked at only then.
    """

    def __init__(
        self, node: Node, loop: asyncio.AbstractEventLoop, source: random.Random
    ) -> None:
        self._node = node
        self._loop = loop
        self._source = source
        self._next_token = 0
        self._done: list[Outcome] = []
        self._tasks: set[asyncio.Task[Outcome]] = set()

    def submit(self, operation: Operation) -> int:
        self._next_token += 1
        token = self._next_token
        data = self._loop.run_until_complete(self._try_inline(operation))
        if data is not None:
            self._done.append(Outcome(token, 0, bytes(data)))
        else:
            task = self._loop.create_task(self._run(token, operation))
            self._tasks.add(task)
        for _ in range(self._source.randrange(4)):
            self._loop.run_until_complete(asyncio.sleep(0))
        return token

    def wait(self) -> list[Outcome]:
        if not self._done:
            finished, _ = self._loop.run_until_complete(
                asyncio.wait(
                    self._tasks, timeout=60, return_when=asyncio.FIRST_COMPLETED
                )
            )
            assert finished, f"{len(self._tasks)} operations hang"
            self._tasks -= finished
            self._done = [task.result() for task in finished]
        outcomes, self._done = self._done, []
        return outcomes

    async def _try_inline(self, operation: Operation) -> Buffer | None:
        """Serve an operation at once; None if that can't be done. What never
        waits is for the loop all the same."""
        if self._source.random() < 0.2:
            return None
        if operation.kind is Kind.READ:
            return self._node.try_pread(operation.offset, operation.length)
        if (
            operation.kind is Kind.WRITE
            and not operation.fua
            and self._node.try_pwrite(operation.offset, operation.data)
        ):
            return b""
        return None

    async def _run(self, token: int, operation: Operation) -> Outcome:
        node, offset, length = self._node, operation.offset, operation.length
        data: Buffer = b""
        try:
            match operation.kind:
                case Kind.READ:
                    data = await self._read(offset, length)
                case Kind.WRITE:
                    await node.pwrite(offset, operation.data, fua=operation.fua)
                case Kind.ZERO:
                    await node.write_zeroes(
                        offset,
                        length,
                        may_unmap=operation.may_unmap,
                        no_fallback=operation.fast_only,
                        fua=operation.fua,
                    )
                case Kind.TRIM:
                    await node.discard(offset, length)
                case Kind.FLUSH:
                    await node.flush()
                case Kind.CACHE:
                    await node.prefetch(offset, length)
        except OSError as error:
            return Outcome(token, error.errno or -1, b"")
        return Outcome(token, 0, bytes(data))

    async def _read(self, offset: int, length: int) -> Buffer:
        found = self._node.try_pread_views(offset, length)
        if found is None:
            return await self._node.pread(offset, length)
        views, token = found
        for _ in range(self._source.randrange(6)):
            await asyncio.sleep(0)
        data = b"".join(views)
        self._node.release(token)
        return data

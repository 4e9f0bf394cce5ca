"""A node without a file, and a client that checks nothing, for the server."""

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from nbdqcow.block.status import DirtyBitmap, Extents
from nbdqcow.buffers import zero_views
from nbdqcow.errors import BlockError, NotSupported
from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd
from nbdqcow.server.options import ServerOptions
from nbdqcow.server.server import Server
from nbdqcow.types import Buffer, Buffers
from tests import chunks
from tests.chunks import Chunk, Reply


async def settle(condition: Callable[[], bool]) -> None:
    """Wait until ``condition()`` holds."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


class FakeNode:
    """An image in memory. What it does besides can be switched.

    Attributes:
        inline: whether ``try_*`` work.
        gate: requests in coroutines wait for it.
        delays: seconds that reads at these offsets take.
        failure: raised by every request.
        log: what was asked, in order: a name and arguments each.
        tokens: views given out and not released.
        status: bytes, state and depth of each extent of the image; by default
            it is one extent of data.
        not_staged: lengths of reads that `try_pread_into` begins and gives up.
        broken_from: pieces of reads from this offset on fail.
    """

    def __init__(self, size: int = 1 << 20, *, read_only: bool = False) -> None:
        self.data = bytearray(bytes(range(251)) * (size // 251 + 1))[:size]
        self.read_only = read_only
        self.inline = True
        self.gate = asyncio.Event()
        self.gate.set()
        self.delays: dict[int, float] = {}
        self.failure: BaseException | None = None
        self.log: list[tuple[object, ...]] = []
        self.tokens: set[int] = set()
        self.nb_tokens = 0
        self.nb_waiting = 0
        self.max_waiting = 0
        self.dirty_bitmaps: dict[str, DirtyBitmap] = {}
        self.find_bitmap = self.dirty_bitmaps.get
        self.status: list[tuple[int, int, int]] = []
        self.not_staged: frozenset[int] = frozenset()
        self.broken_from: int | None = None

    filename = "disk.img"

    @property
    def size(self) -> int:
        return len(self.data)

    def _note(self, *what: object) -> None:
        self.log.append(what)
        if self.failure is not None:
            raise self.failure

    async def _wait(self, *what: object) -> None:
        self.nb_waiting += 1
        self.max_waiting = max(self.max_waiting, self.nb_waiting)
        try:
            await self.gate.wait()
            self._note(*what)
        finally:
            self.nb_waiting -= 1

    def try_pread(self, offset: int, length: int) -> Buffer | None:
        if not self.inline:
            return None
        self._note("try_pread", offset, length)
        return bytes(self.data[offset : offset + length])

    def try_pread_into(self, offset: int, view: memoryview) -> bool:
        if not self.inline:
            return False
        self._note("try_pread_into", offset, len(view))
        view[:] = self.data[offset : offset + len(view)]
        return len(view) not in self.not_staged

    # Nothing is deferred here, so these are never called.
    defers_reads = False

    def try_pread_later(self, offset: int, length: int) -> Buffer | None:
        raise AssertionError

    def finish_reads(self) -> None:
        raise AssertionError

    def try_pread_views(self, offset: int, length: int) -> tuple[Buffers, int] | None:
        if not self.inline:
            return None
        self._note("try_pread_views", offset, length)
        self.nb_tokens += 1
        self.tokens.add(self.nb_tokens)
        middle = offset + length // 2
        view = memoryview(self.data)
        return [view[offset:middle], view[middle : offset + length]], self.nb_tokens

    def try_locate(self, offset: int, length: int) -> int:
        return -1

    def release(self, token: int) -> None:
        self.tokens.remove(token)

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        if not self.inline:
            return False
        self._note("try_pwrite", offset, len(data))
        self.data[offset : offset + len(data)] = data
        return True

    async def pread(self, offset: int, length: int) -> Buffer:
        await asyncio.sleep(self.delays.get(offset, 0))
        await self._wait("pread", offset, length)
        return bytes(self.data[offset : offset + length])

    async def pread_pieces(self, offset: int, length: int) -> AsyncIterator[Buffer]:
        """Yield what is zero by the status as such."""
        await asyncio.sleep(self.delays.get(offset, 0))
        await self._wait("pread", offset, length)
        position, end = 0, offset + length
        for extent_length, state, _ in self.extents():
            start, stop = max(position, offset), min(position + extent_length, end)
            position += extent_length
            if start >= stop:
                continue
            if self.broken_from is not None and start >= self.broken_from:
                raise EIO_ERROR
            if state:
                for view in zero_views(stop - start):
                    yield view
            else:
                yield bytes(self.data[start:stop])

    def extents(self) -> list[tuple[int, int, int]]:
        return self.status or [(self.size, 0, 1)]

    async def block_status(self, offset: int, length: int, limit: int) -> Extents:
        await self._wait("block_status", offset, length, limit)
        found = []
        position, end = 0, offset + length
        for extent_length, state, depth in self.extents():
            start, stop = max(position, offset), min(position + extent_length, end)
            position += extent_length
            if start < stop:
                found.append((stop - start, state, depth))
        columns = list(zip(*found[:limit], strict=True))
        return Extents(
            np.array(columns[0], np.uint64),
            np.array(columns[1], np.uint8),
            np.array(columns[2], np.uint32),
        )

    async def pwrite(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        await self._wait("pwrite", offset, len(data), fua)
        self.data[offset : offset + len(data)] = data

    async def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        may_unmap: bool = True,
        no_fallback: bool = False,
        fua: bool = False,
    ) -> None:
        await self._wait("write_zeroes", offset, length, may_unmap, no_fallback, fua)
        if no_fallback and length % 512:
            raise NotSupported("not whole sectors")
        self.data[offset : offset + length] = bytes(length)

    async def discard(self, offset: int, length: int) -> None:
        await self._wait("discard", offset, length)

    async def flush(self) -> None:
        await self._wait("flush")

    async def prefetch(self, offset: int, length: int) -> None:
        await self._wait("prefetch", offset, length)


EIO_ERROR = BlockError(errno.EIO, "the disk is broken")


class Refused(Exception):
    """The server refused an option; ``reply`` is how."""

    def __init__(self, reply: int, text: str) -> None:
        super().__init__(text)
        self.reply = reply


class Client:
    """A client on a unix socket. Replies are read one by one, by hand."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.size = 0
        self.flags = 0
        self.nb_cookies = 0
        self.extended = False

    async def greet(self) -> None:
        greeting = await self.reader.readexactly(codec.GREETING.size)
        assert codec.GREETING.unpack(greeting)[:2] == (
            nbd.INIT_PASSWD,
            nbd.IHAVEOPT_MAGIC,
        )
        self.writer.write(codec.CLIENT_FLAGS.pack(3))

    async def ask(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; return type and data of its replies."""
        self.writer.write(codec.option_request(option, data))
        replies: list[tuple[int, bytes]] = []
        while True:
            head = await self.reader.readexactly(codec.OPTION_REPLY.size)
            _, answered, reply, length = codec.OPTION_REPLY.unpack(head)
            assert answered == option
            replies.append((reply, await self.reader.readexactly(length)))
            if reply == nbd.REP_ACK or reply & nbd.REP_FLAG_ERROR:
                return replies

    async def negotiate(self, *contexts: str, extended: bool, name: str = "") -> None:
        """Ask for chunks, in extended headers or not, and for ``contexts``."""
        option = nbd.OPT_EXTENDED_HEADERS if extended else nbd.OPT_STRUCTURED_REPLY
        assert await self.ask(option) == [(nbd.REP_ACK, b"")]
        self.extended = extended
        if contexts:
            data = codec.meta_context_request(name, contexts)
            replies = await self.ask(nbd.OPT_SET_META_CONTEXT, data)
            assert [int.from_bytes(data[:4], "big") for _, data in replies[:-1]] == [
                *range(len(contexts))
            ]

    async def chunk(self) -> Chunk:
        """Return the next chunk of any reply."""
        magic = int.from_bytes(await self.reader.readexactly(4), "big")
        head = await self.reader.readexactly(chunks.head_length(magic))
        chunk, length = chunks.parse_head(magic, head)
        if self.extended:
            assert magic == chunks.EXTENDED
        chunk.payload = await self.reader.readexactly(length)
        return chunk

    async def replies(self, nb_requests: int) -> dict[int, Reply]:
        """Return the replies of requests, in the order of their ends."""
        pending: dict[int, list[Chunk]] = {}
        replies: dict[int, Reply] = {}
        while len(replies) < nb_requests:
            chunk = await self.chunk()
            pending.setdefault(chunk.cookie, []).append(chunk)
            if chunk.done:
                assert chunk.cookie not in replies
                replies[chunk.cookie] = chunks.join_chunks(pending[chunk.cookie])
        return replies

    async def ask_chunks(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        payload: bytes = b"",
    ) -> Reply:
        """Send one request; return its reply."""
        self.writer.write(self.request(command, offset, length, flags) + payload)
        return (await self.replies(1))[self.nb_cookies]

    async def go(self, name: str, trailing: bytes = b"") -> None:
        """Choose an export; ``trailing`` goes along in the same packet."""
        self.writer.write(
            codec.option_request(nbd.OPT_GO, codec.info_request(name)) + trailing
        )
        while True:
            head = await self.reader.readexactly(codec.OPTION_REPLY.size)
            _, option, reply, length = codec.OPTION_REPLY.unpack(head)
            data = await self.reader.readexactly(length)
            assert option == nbd.OPT_GO
            if reply & nbd.REP_FLAG_ERROR:
                raise Refused(reply, data.decode())
            if reply == nbd.REP_ACK:
                return
            assert reply == nbd.REP_INFO, data
            if data[:2] == bytes(2):
                _, self.size, self.flags = codec.INFO_EXPORT.unpack(data)

    def request(
        self, command: int, offset: int = 0, length: int = 0, flags: int = 0
    ) -> bytes:
        """Return a request's header with the next cookie (1, 2, ...)."""
        self.nb_cookies += 1
        build = codec.extended_request if self.extended else codec.request
        return build(command, self.nb_cookies, offset, length, flags)

    async def reply(self, length: int = 0) -> tuple[int, int, bytes]:
        """Return the next reply's cookie, error, and data if it has no error."""
        head = await self.reader.readexactly(codec.SIMPLE_REPLY.size)
        magic, error, cookie = codec.SIMPLE_REPLY.unpack(head)
        assert magic == nbd.SIMPLE_REPLY_MAGIC
        data = b"" if error else await self.reader.readexactly(length)
        return cookie, error, data

    async def call(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        payload: bytes = b"",
    ) -> int:
        """Send one request without data in its reply; return its error."""
        self.writer.write(self.request(command, offset, length, flags) + payload)
        cookie, error, _ = await self.reply()
        assert cookie == self.nb_cookies
        return error

    async def read(self, offset: int, length: int, flags: int = 0) -> bytes | int:
        """Return the data of a read, or its error."""
        self.writer.write(self.request(nbd.CMD_READ, offset, length, flags))
        cookie, error, data = await self.reply(length)
        assert cookie == self.nb_cookies
        return error or data

    async def write(self, offset: int, data: bytes, flags: int = 0) -> int:
        """Write and return the error."""
        return await self.call(nbd.CMD_WRITE, offset, len(data), flags, data)

    async def disconnect(self) -> None:
        """Send DISC and wait for the server to close."""
        self.writer.write(self.request(nbd.CMD_DISC))
        assert await self.reader.read() == b""
        self.close()

    def close(self) -> None:
        self.writer.close()


class Served:
    """A server with its task; clients connect by `connect`."""

    def __init__(self, server: Server, path: Path) -> None:
        self.server = server
        self.path = path
        self.running: asyncio.Task[None] | None = None
        self.clients: list[Client] = []

    async def connect_raw(self) -> Client:
        reader, writer = await asyncio.open_unix_connection(
            str(self.path), limit=1 << 20
        )
        client = Client(reader, writer)
        self.clients.append(client)
        return client

    async def connect_chunked(
        self, *contexts: str, extended: bool, name: str = ""
    ) -> Client:
        """Return a client that gets its replies as chunks."""
        client = await self.connect_raw()
        await client.greet()
        await client.negotiate(*contexts, extended=extended, name=name)
        await client.go(name)
        return client

    async def connect(self, name: str = "", trailing: bytes = b"") -> Client:
        client = await self.connect_raw()
        await client.greet()
        await client.go(name, trailing)
        return client

    async def stop(self) -> None:
        self.server.stop()
        assert self.running is not None
        await asyncio.wait_for(asyncio.shield(self.running), 30)


@asynccontextmanager
async def serving(
    path: Path, *nodes: FakeNode, options: ServerOptions | None = None
) -> AsyncIterator[Served]:
    """Serve nodes: the first as the default export, others as "1", "2", ..."""
    server = Server(options)
    for index, node in enumerate(nodes):
        server.add_export(str(index or ""), node)
    socket_path = path / "socket"
    await server.listen_unix(str(socket_path))
    served = Served(server, socket_path)
    served.running = asyncio.create_task(server.run_until_stopped())
    try:
        yield served
    finally:
        for node in nodes:
            if isinstance(node, FakeNode):
                node.gate.set()
                node.failure = None
        for client in served.clients:
            client.writer.transport.abort()
        await served.stop()
        # Let transports that are being closed go.
        await asyncio.sleep(0.01)
        for node in nodes:
            assert not isinstance(node, FakeNode) or not node.tokens

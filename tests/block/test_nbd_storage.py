"""The nbd driver when its server or the way to it breaks."""

import asyncio
import errno
import gc
import random
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from nbdqcow.errors import ImageError, NotSupported
from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.client import RemoteExport
from nbdqcow.server.options import ServerOptions
from nbdqcow.storage.nbd import client as nbd_client
from nbdqcow.storage.nbd import connection as nbd_connection
from nbdqcow.storage.nbd.driver import NbdStorage
from tests.block.server.support import EIO_ERROR, FakeNode, serving, settle

MiB = 1 << 20
pytestmark = pytest.mark.asyncio


class VolatileNode(FakeNode):
    """An image whose unflushed writes are gone after `crash`."""

    def __init__(self, size=MiB):
        super().__init__(size)
        self.inline = False
        self.durable = bytes(self.data)

    async def flush(self):
        await super().flush()
        self.durable = bytes(self.data)

    async def pwrite(self, offset, data, *, fua=False):
        await super().pwrite(offset, data, fua=fua)
        if fua:
            durable = bytearray(self.durable)
            durable[offset : offset + len(data)] = data
            self.durable = bytes(durable)

    def crash(self):
        """Lose what no flush has covered, now. The server still has to end."""
        self.data[:] = self.durable


def uri(path):
    return f"nbd+unix:///?socket={path}/socket"


@asynccontextmanager
async def storage_on(path, **options):
    storage = await NbdStorage.open(uri(path), **options)
    try:
        yield storage
    finally:
        await storage.close()


@pytest.mark.parametrize(
    ("size", "block_sizes", "message"),
    [
        (MiB, (1 << 17, 1 << 17, 1 << 25), "a minimum block size of 131072"),
        (MiB, (1 << 26, 1 << 26, 1 << 31), "a minimum block size of 67108864"),
        (MiB, (0, 4096, 1 << 25), "a minimum block size of 0"),
        (MiB, (3, 4096, 1 << 25), "a minimum block size of 3"),
        (MiB, (4096, 4096, 512), "a minimum block size of 4096"),
        ((1 << 64) - 1, None, "the export is too large"),
        (1 << 63, None, "the export is too large"),
    ],
)
async def test_exports_that_can_not_be(size, block_sizes, message):
    """Whole blocks of them are none, or offsets in them no offsets of a file."""
    export = RemoteExport(size, nbd.FLAG_HAS_FLAGS, block_sizes=block_sizes)
    client = SimpleNamespace(export=export, context="base:allocation")
    with pytest.raises(ImageError, match=message):
        NbdStorage(client, "name", read_only=True)


async def test_unflushed_writes_survive_the_server(tmp_path):
    node = VolatileNode()
    async with serving(tmp_path, node):
        storage = await NbdStorage.open(uri(tmp_path))
        await storage.pwritev(0, [b"a" * 4096])
        await storage.flush()
        await storage.pwritev(100, [b"b" * 100])
        await storage.pwritev(150, [b"c" * 100])
        await storage.write_zeroes(50, 60, may_unmap=True)
        expected = bytes(node.data)
        assert bytes(node.durable) != expected
        node.crash()
    async with serving(tmp_path, node):
        await storage.flush()
        assert node.durable == expected
        assert [what[0] for what in node.log].count("pwrite") == 5
        await storage.close()


async def test_flushed_writes_are_not_sent_again(tmp_path):
    node = VolatileNode()
    async with serving(tmp_path, node):
        storage = await NbdStorage.open(uri(tmp_path))
        await storage.pwritev(0, [b"a" * 4096])
        await storage.flush()
    async with serving(tmp_path, node):
        # Somebody else may write now.
        node.data[:4096] = b"z" * 4096
        assert await storage.pread(0, 4096) == b"z" * 4096
        await storage.close()


async def test_requests_in_flight_are_asked_again(tmp_path):
    node = VolatileNode()
    async with serving(tmp_path, node) as served:
        storage = await NbdStorage.open(uri(tmp_path))
        node.gate.clear()
        reads = [asyncio.create_task(storage.pread(i * 512, 512)) for i in range(20)]
        write = asyncio.create_task(storage.pwritev(MiB - 5, [b"hello"]))
        flush = asyncio.create_task(storage.flush())
        await settle(lambda: node.nb_waiting == 22)
        for connection in tuple(served.server._connections):
            connection.abort()
        node.gate.set()
        for i, read in enumerate(reads):
            assert await read == node.data[i * 512 : i * 512 + 512]
        await write
        await flush
        await storage.flush()
        assert node.durable.endswith(b"hello")
        await storage.close()


async def test_order_of_overlapping_writes(tmp_path, seed):
    rng = random.Random(seed)
    node = VolatileNode(64 << 10)
    async with serving(tmp_path, node):
        storage = await NbdStorage.open(uri(tmp_path))
        for _ in range(300):
            offset = rng.randrange(len(node.data) - 1)
            length = rng.randrange(1, min(len(node.data) - offset, 9000) + 1)
            data = rng.randbytes(length)
            await storage.pwritev(offset, [data], fua=rng.random() < 0.1)
            if rng.random() < 0.02:
                await storage.flush()
        await storage.pwritev(0, [b"the last one"])
        expected = bytes(node.data)
        node.crash()
        assert bytes(node.data) != expected
    for offset in range(0, len(node.data), 512):
        node.delays[offset] = rng.random() / 100
    async with serving(tmp_path, node):
        await storage.flush()
        assert node.durable == expected
        await storage.close()


async def test_refused_again_is_lost_for_good(tmp_path):
    node = VolatileNode()
    async with serving(tmp_path, node):
        storage = await NbdStorage.open(uri(tmp_path))
        await storage.pwritev(0, [b"x" * 512])
        node.crash()
    node.failure = EIO_ERROR
    async with serving(tmp_path, node):
        with pytest.raises(OSError, match="sent again"):
            await storage.flush()
        node.failure = None
        assert await storage.pread(0, 1) == b"\0"
        # The server's next success says nothing of the lost write.
        for _ in range(2):
            with pytest.raises(OSError, match="sent again"):
                await storage.flush()
        with pytest.raises(OSError, match="sent again"):
            await storage.pwritev(0, [b"y"], fua=True)
        await storage.pwritev(0, [b"y"])
        await storage.close()


async def test_fast_zeroes_need_not_be_fast_again(tmp_path):
    """The server kept a later write to their place, and would have to write."""
    node = VolatileNode()
    write_zeroes = node.write_zeroes

    async def write_zeroes_slowly(offset, length, *, no_fallback=False, **how):
        if no_fallback:
            raise NotSupported("there is data")
        await write_zeroes(offset, length, **how)

    async with serving(tmp_path, node):
        storage = await NbdStorage.open(uri(tmp_path))
        await storage.write_zeroes(512, 512, may_unmap=True, no_fallback=True)
        await storage.pwritev(600, [b"x" * 8])
        node.crash()
        node.data[600:608] = b"x" * 8
        node.write_zeroes = write_zeroes_slowly
    async with serving(tmp_path, node):
        await storage.flush()
        assert node.durable[512:1024] == bytes(88) + b"x" * 8 + bytes(416)
        await storage.close()


async def test_failed_flush_stays_failed(tmp_path):
    node = VolatileNode()
    async with serving(tmp_path, node), storage_on(tmp_path) as storage:
        await storage.pwritev(0, [b"x"])
        node.failure = EIO_ERROR
        with pytest.raises(OSError, match="failed a FLUSH"):
            await storage.flush()
        node.failure = None
        with pytest.raises(OSError, match="failed a FLUSH"):
            await storage.flush()


async def test_the_failure_of_a_cancelled_flush_stays(tmp_path, caplog):
    """The server has told of the loss, and may succeed from then on."""
    node = VolatileNode()
    async with serving(tmp_path, node), storage_on(tmp_path) as storage:
        await storage.pwritev(0, [b"x"])
        node.gate.clear()
        task = asyncio.create_task(storage.flush())
        await settle(lambda: node.nb_waiting == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        node.failure = EIO_ERROR
        node.gate.set()
        await settle(lambda: not node.nb_waiting)
        node.failure = None
        assert await storage.pread(1, 1) == b"\1"
        with pytest.raises(OSError, match="failed a FLUSH"):
            await storage.flush()
        assert not storage._client._requests
    gc.collect()
    # The loss has its line; asyncio has none for the flush that nobody waits for.
    names = [r.name for r in caplog.records if "server" not in r.name]
    assert names == ["nbdqcow.storage.nbd.client"]


async def test_kept_writes_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(nbd_client, "MAX_UNFLUSHED", 64 << 10)
    node = VolatileNode()
    async with serving(tmp_path, node), storage_on(tmp_path) as storage:
        longest = 0
        for i in range(100):
            await storage.pwritev(i * 4096, [bytes([i]) * 4096])
            longest = max(longest, storage._client._log_length)
        assert longest <= (64 << 10) + 8192
        assert ("flush",) in node.log
        await asyncio.gather(
            *(storage.pwritev(i * 4096, [bytes([i + 1]) * 4096]) for i in range(100))
        )
        await storage.flush()
        assert storage._client._log_length == 0
        assert node.data[99 * 4096] == 100


async def test_server_that_does_not_come_back(tmp_path):
    async with serving(tmp_path, FakeNode()):
        storage = await NbdStorage.open(uri(tmp_path), reconnect_delay=0.2)
    started = asyncio.get_running_loop().time()
    with pytest.raises(OSError, match="no connection to") as raised:
        await storage.pread(0, 1)
    assert raised.value.errno == errno.EIO
    assert asyncio.get_running_loop().time() - started < 10
    # Now at once.
    with pytest.raises(OSError, match="no connection to"):
        await asyncio.wait_for(storage.pread(0, 1), 0.1)
    # And when it does come back after all:
    async with serving(tmp_path, FakeNode()):
        await settle(lambda: storage._client._gone is None)
        assert await storage.pread(0, 2) == b"\0\1"
        await storage.close()


async def test_the_uri_says_how_long_to_wait(tmp_path):
    place = uri(tmp_path)
    with pytest.raises(ImageError, match="Failed to connect"):
        await NbdStorage.open(f"{place}&x-open-timeout=0")
    opening = asyncio.create_task(NbdStorage.open(f"{place}&x-open-timeout=30"))
    await asyncio.sleep(0.2)
    async with serving(tmp_path, FakeNode()):
        storage = await opening
        assert await storage.pread(0, 2) == b"\0\1"
        await storage.close()
        storage = await NbdStorage.open(f"{place}&x-reconnect-delay=0")
    with pytest.raises(OSError, match="no connection to"):
        await asyncio.wait_for(storage.pread(0, 1), 10)
    await storage.close()
    for name in ("x-open-timeout", "x-reconnect-delay"):
        with pytest.raises(ImageError, match=f"{name} is a number of seconds"):
            await NbdStorage.open(f"{place}&{name}=long")


async def test_another_export_came_back(tmp_path):
    async with serving(tmp_path, FakeNode(MiB)):
        storage = await NbdStorage.open(uri(tmp_path), reconnect_delay=2)
    async with serving(tmp_path, FakeNode(2 * MiB)):
        with pytest.raises(OSError, match="another export"):
            await storage.pread(0, 1)
        await storage.close()


async def test_request_timeout(tmp_path):
    node = VolatileNode()
    async with (
        serving(tmp_path, node),
        storage_on(tmp_path, request_timeout=0.3) as storage,
    ):
        node.delays[512] = 2
        slow = asyncio.create_task(storage.pread(512, 1))
        assert await storage.pread(0, 1) == b"\0"
        with pytest.raises(OSError, match="does not answer") as raised:
            await slow
        assert raised.value.errno == errno.ETIMEDOUT
        assert await storage.pread(0, 1) == b"\0"


async def test_request_that_breaks_every_connection(tmp_path):
    node = VolatileNode()
    async with serving(tmp_path, node) as served, storage_on(tmp_path) as storage:

        async def pread_pieces(offset, length):
            if offset == 666:
                for connection in tuple(served.server._connections):
                    connection.abort()
            yield bytes(length)

        node.pread_pieces = pread_pieces
        poison = asyncio.create_task(storage.pread(666, 1))
        with pytest.raises(OSError, match="lost 5 connections"):
            await poison
        assert await storage.pread(0, 1) == b"\0"


async def test_cancelled_request(tmp_path):
    node = VolatileNode()
    async with serving(tmp_path, node), storage_on(tmp_path) as storage:
        node.gate.clear()
        task = asyncio.create_task(storage.pread(0, MiB))
        await settle(lambda: node.nb_waiting == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        node.gate.set()
        assert await storage.pread(1, 1) == b"\1"
        assert not storage._client._requests


async def begun_and_cancelled(node, coroutine):
    """Begin a request that the server keeps back, and cancel it."""
    node.gate.clear()
    task = asyncio.create_task(coroutine)
    await settle(lambda: node.nb_waiting == 1)
    for _ in range(3):
        task.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
    return task


@pytest.mark.parametrize("way", ["pwritev", "write_zeroes", "discard"])
async def test_a_cancelled_change_has_ended(tmp_path, way):
    """Or what is written to its place afterwards might be overwritten by it."""
    node = VolatileNode()
    async with serving(tmp_path, node), storage_on(tmp_path) as storage:
        changes = {
            "pwritev": lambda: storage.pwritev(0, [b"x" * 512]),
            "write_zeroes": lambda: storage.write_zeroes(0, 512, may_unmap=True),
            "discard": lambda: storage.discard(0, 512),
        }
        task = await begun_and_cancelled(node, changes[way]())
        assert not task.done()
        node.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not node.nb_waiting
        assert not storage._client._requests
        assert storage._client._nb_written == (way != "discard")


async def test_a_cancelled_write_does_not_come_after_others(tmp_path):
    """The server takes its time with it, not with the next one to its place."""
    node = VolatileNode()
    late = asyncio.Event()
    pwrite = node.pwrite

    async def pwrite_later(offset, data, *, fua=False):
        kept = bytes(data)
        if kept == b"x" * 512:
            await late.wait()
        await pwrite(offset, kept, fua=fua)

    node.pwrite = pwrite_later
    async with serving(tmp_path, node), storage_on(tmp_path) as storage:
        first = asyncio.create_task(storage.pwritev(0, [b"x" * 512]))
        assert await storage.pread(0, 1) == b"\0"
        first.cancel()

        async def then():
            await asyncio.wait((first,))
            await storage.pwritev(0, [b"y" * 512])

        second = asyncio.create_task(then())
        for _ in range(20):
            assert await storage.pread(1024, 1) == node.data[1024:1025]
        late.set()
        await second
        await settle(lambda: ("pwrite", 0, 512, False) in node.log)
        await storage.flush()
        assert node.data[:512] == b"y" * 512


async def test_a_cancelled_write_ends_with_its_connection(tmp_path):
    node = VolatileNode()
    async with serving(tmp_path, node) as served, storage_on(tmp_path) as storage:
        task = await begun_and_cancelled(node, storage.pwritev(0, [b"x" * 512]))
        for connection in tuple(served.server._connections):
            connection.abort()
        with pytest.raises(asyncio.CancelledError):
            await task
        node.gate.set()
        await settle(lambda: not node.nb_waiting)
        # It is not among those that are asked again.
        before = len(node.log)
        assert await storage.pread(1024, 1) == node.data[1024:1025]
        assert not [what for what in node.log[before:] if what[0] == "pwrite"]


async def test_a_cancelled_write_does_not_wait_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(nbd_client, "_CANCEL_DELAY", 0.05)
    node = VolatileNode()
    async with serving(tmp_path, node), storage_on(tmp_path) as storage:
        task = await begun_and_cancelled(node, storage.pwritev(0, [b"x" * 512]))
        with pytest.raises(asyncio.CancelledError):
            await task
        node.gate.set()
        assert await storage.pread(1024, 1) == node.data[1024:1025]


async def test_close_takes_the_answers_nobody_waits_for(tmp_path, monkeypatch):
    """nbdkit 1.32 falls over a client that leaves while it owes an answer."""
    monkeypatch.setattr(nbd_connection, "_ANSWER_SECONDS", 60.0)
    node = VolatileNode()
    async with serving(tmp_path, node):
        storage = await NbdStorage.open(uri(tmp_path))
        node.gate.clear()
        read = asyncio.create_task(storage.pread(0, MiB))
        await settle(lambda: node.nb_waiting == 1)
        read.cancel()
        closing = asyncio.create_task(storage.close())
        await asyncio.wait((closing,), timeout=0.1)
        assert not closing.done()
        node.gate.set()
        async with asyncio.timeout(10):
            await closing


async def test_close_fails_what_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(nbd_connection, "_ANSWER_SECONDS", 0.1)
    node = VolatileNode()
    async with serving(tmp_path, node):
        storage = await NbdStorage.open(uri(tmp_path))
        node.gate.clear()
        read = asyncio.create_task(storage.pread(0, 1))
        await settle(lambda: node.nb_waiting == 1)
        await storage.close()
        await storage.close()
        with pytest.raises(OSError, match="closed"):
            await read
        with pytest.raises(OSError, match="closed"):
            await storage.pread(0, 1)


async def test_errors_of_the_server(tmp_path):
    node = VolatileNode()
    async with serving(tmp_path, node), storage_on(tmp_path) as storage:
        node.failure = EIO_ERROR
        with pytest.raises(OSError, match="failed a READ") as raised:
            await storage.pread(0, 1)
        assert raised.value.errno == errno.EIO
        node.failure = None
        with pytest.raises(OSError) as raised:
            await storage.write_zeroes(0, 1, may_unmap=True, no_fallback=True)
        assert raised.value.errno == errno.ENOTSUP


async def test_full_server(tmp_path):
    options = ServerOptions(max_connections=1)
    async with serving(tmp_path, FakeNode(), options=options) as served:
        await served.connect()
        with pytest.raises(ImageError, match="has 1 clients already"):
            await NbdStorage.open(uri(tmp_path))


@asynccontextmanager
async def server_that_says(path, greeting, *pieces):
    """Greet each client, then answer its messages with ``pieces``."""
    gone = []

    async def serve(reader, writer):
        writer.write(greeting)
        for piece in pieces:
            await reader.read(65536)
            writer.write(piece)
        gone.append(await reader.read())
        writer.transport.abort()

    server = await asyncio.start_unix_server(serve, str(path / "socket"))
    try:
        yield
        await settle(lambda: gone)
    finally:
        server.close()
        await server.wait_closed()


GREETING = codec.greeting(nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES)


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([b"SSH-2.0-OpenSSH_9.2 and so on"], "this is not an NBD server"),
        ([GREETING, b"x" * 100], "bad option reply magic"),
        ([GREETING, codec.option_reply(nbd.OPT_LIST, nbd.REP_ACK)], "a reply to LIST"),
        ([GREETING], "does not answer"),
        ([b""], "does not answer"),
    ],
)
async def test_broken_servers(tmp_path, pieces, reason):
    async with server_that_says(tmp_path, *pieces):
        with pytest.raises(ImageError, match=reason):
            await NbdStorage.open(uri(tmp_path), connect_timeout=0.5)

"""A server over a disk that fails: what clients are told, and what goes on."""

import asyncio
import errno

import pytest

from nbdqcow.block.node import Node
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.server.server import Server
from nbdqcow.storage.memory import MemoryStorage
from tests import nbd_client
from tests.crash.histories import created, pattern
from tests.crash.verdicts import check_by_us, is_sound
from tests.faults.faulty import FLUSH, READ, WRITE, FaultyStorage, Rule
from tests.nbd_client import NbdClient

KiB = 1 << 10
ERRORS = {
    errno.EIO: nbd_client.EIO,
    errno.ENOSPC: nbd_client.ENOSPC,
    # The protocol has no "try again".
    errno.EAGAIN: nbd_client.EIO,
}


def converse(path: str, storage: FaultyStorage) -> int:
    """Be two clients; return how many requests failed."""
    nb_failed = 0
    with NbdClient(path) as one, NbdClient(path) as other:
        requests = [
            (nbd_client.CMD_WRITE, WRITE),
            (nbd_client.CMD_READ, READ),
            (nbd_client.CMD_FLUSH, FLUSH),
            (nbd_client.CMD_WRITE_ZEROES, None),
            (nbd_client.CMD_TRIM, None),
        ]
        for number, (given, wanted) in enumerate(ERRORS.items()):
            offset = number * 16 * KiB
            for command, kind in requests:
                data = pattern((given, offset), 8 * KiB)
                length = 0 if command == nbd_client.CMD_FLUSH else len(data)
                payload = data if command == nbd_client.CMD_WRITE else b""
                where = 0 if command == nbd_client.CMD_FLUSH else offset
                arguments = (command, where, length, payload)
                if kind is not None:
                    storage.rules = [Rule(given, kinds=[kind], count=-1)]
                    assert one.request(*arguments).error == wanted
                    nb_failed += 1
                storage.rules = []
                reply = one.request(*arguments)
                assert not reply.error
                if command == nbd_client.CMD_READ:
                    assert reply.data == data
                other.flush()
    return nb_failed


@pytest.mark.asyncio
async def test_errors_reach_the_client_and_a_retry_succeeds(tmp_path, figures):
    memory = MemoryStorage(created(size=1 << 20, cluster_size=4096))
    storage = FaultyStorage(memory)
    # A small cache, so that reads do not find all tables there.
    driver = await Qcow2Driver.open(storage, read_only=False, options={})
    node = Node(driver, filename="disk")
    server = Server()
    server.add_export("", node)
    path = str(tmp_path / "s")
    await server.listen_unix(path)
    running = asyncio.ensure_future(server.run_until_stopped())
    nb_failed = await asyncio.to_thread(converse, path, storage)
    server.stop()
    await running
    await node.close()
    result, text = check_by_us(bytes(memory.data))
    assert is_sound(result, leaks=False), text
    figures(f"faults on the wire: {nb_failed} requests failed as they should")

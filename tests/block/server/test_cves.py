"""What brought down other NBD servers, one test for each published CVE."""

import asyncio
import contextlib
import struct

import pytest

from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd
from nbdqcow.server.options import ServerOptions
from tests.block.server.support import FakeNode, serving

pytestmark = pytest.mark.asyncio

GO = codec.option_request(nbd.OPT_GO, codec.info_request(""))


async def assert_serving(served):
    client = await served.connect()
    assert isinstance(await client.read(0, 512), bytes)
    client.close()


async def test_cve_2017_7539_clients_that_leave_while_they_haggle(tmp_path):
    whole = codec.CLIENT_FLAGS.pack(3) + codec.option_request(nbd.OPT_LIST) + GO
    async with serving(tmp_path, FakeNode()) as served:
        for length in range(len(whole) + 1):
            client = await served.connect_raw()
            client.writer.write(whole[:length])
            if length % 2:
                # A reset rather than an end of file, with replies unread.
                client.writer.transport.abort()
            client.close()
        await assert_serving(served)


async def test_cve_2017_9524_requests_of_a_client_that_failed_to_negotiate(tmp_path):
    requests = b"".join(codec.request(nbd.CMD_READ, i, 0, 4096) for i in range(50))
    async with serving(tmp_path, FakeNode()) as served:
        for start in (
            b"",
            codec.CLIENT_FLAGS.pack(0x80),
            codec.CLIENT_FLAGS.pack(3),
            codec.CLIENT_FLAGS.pack(3)
            + codec.option_request(nbd.OPT_EXPORT_NAME, b"unknown"),
        ):
            client = await served.connect_raw()
            client.writer.write(start + requests)
            # The greeting, and nothing that a request was answered with.
            assert len(await client.reader.read()) == codec.GREETING.size
        await assert_serving(served)


@pytest.mark.parametrize("option", [1, 6, 7, 9, 10])
async def test_cve_2017_15118_long_export_names(tmp_path, option):
    async with serving(tmp_path, FakeNode()) as served:
        for length in (256, 257, 4096, 4097, 65_000):
            client = await served.connect_raw()
            await client.greet()
            await client.ask(nbd.OPT_STRUCTURED_REPLY)
            name = b"x" * length
            if option == nbd.OPT_EXPORT_NAME:
                client.writer.write(codec.option_request(option, name))
                # Closed, with a reset if not all of the name was looked at.
                with contextlib.suppress(ConnectionResetError):
                    assert await client.reader.read() == b""
                continue
            for claimed in (length, length + 1, 0xFFFFFFFF):
                data = struct.pack(">I", claimed) + name + bytes(4)
                ((reply, text),) = await client.ask(option, data)
                assert reply & nbd.REP_FLAG_ERROR
                assert len(text) < 4096
            await client.ask(nbd.OPT_LIST)
        await assert_serving(served)


@pytest.mark.parametrize("option", [*range(1, 12), 999, 0xFFFFFFFF])
async def test_cve_2017_15119_options_of_4_gib(tmp_path, option):
    async with serving(tmp_path, FakeNode()) as served:
        client = await served.connect_raw()
        await client.greet()
        client.writer.write(
            codec.OPTION.pack(nbd.IHAVEOPT_MAGIC, option, 0xFFFFFFFF) + bytes(100)
        )
        # Answered from the header: nobody waits for 4 GiB to arrive.
        answer = await asyncio.wait_for(client.reader.read(), 30)
        assert len(answer) < 200
        await assert_serving(served)


async def test_cve_2024_7409_clients_that_stay_when_the_server_goes(tmp_path):
    options = ServerOptions(max_connections=20, close_timeout=0.2)
    async with serving(tmp_path, FakeNode(), options=options) as served:
        for i in range(20):
            client = await served.connect_raw()
            if i % 4 >= 1:
                client.writer.write(codec.CLIENT_FLAGS.pack(3))
            if i % 4 >= 2:
                client.writer.write(GO)
            if i % 4 >= 3:
                client.writer.write(codec.request(nbd.CMD_READ, 1, 0, 4096)[:20])
        await asyncio.sleep(0.05)
        served.server.stop()
        await asyncio.wait_for(asyncio.shield(served.running), 20)


async def test_cve_2024_7409_clients_that_never_negotiate(tmp_path):
    options = ServerOptions(max_connections=5, handshake_timeout=0.2)
    async with serving(tmp_path, FakeNode(), options=options) as served:
        silent = [await served.connect_raw() for _ in range(5)]
        refused = await served.connect_raw()
        # It is told why it is refused if it asks, and not much later.
        assert len(await refused.reader.read()) == codec.GREETING.size
        for client in silent:
            await client.reader.read()
        await asyncio.sleep(0.05)
        await assert_serving(served)

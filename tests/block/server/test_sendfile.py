"""Replies that refer to live pages, and when their clusters are free again."""

import asyncio
import errno
import os
import struct
import subprocess

import pytest

from nbdqcow import open_image
from nbdqcow.nbd import constants as nbd
from tests.block.server.support import serving

pytestmark = pytest.mark.asyncio

KiB = 1024
REQUEST = struct.Struct(">IHHQQI")


def read_request(cookie, offset, length):
    return REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.CMD_READ, cookie, offset, length)


async def read_replies(reader, nb_replies, length):
    replies = {}
    for _ in range(nb_replies):
        magic, error, cookie = struct.unpack(">IIQ", await reader.readexactly(16))
        assert (magic, error) == (nbd.SIMPLE_REPLY_MAGIC, 0)
        replies[cookie] = await reader.readexactly(length)
    return replies


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.qcow2"
    subprocess.run(["qemu-img", "create", "-qf", "qcow2", path, "32M"], check=True)
    return path


async def fill(node, nb_clusters):
    for i in range(nb_clusters):
        await node.pwrite(i * 64 * KiB, bytes([i + 1]) * 64 * KiB)
    await node.flush()


async def test_many_reads_at_once(tmp_path, image):
    async with open_image(image) as node:
        await fill(node, 64)
        async with serving(tmp_path, node) as served:
            client = await served.connect()
            for i in range(256):
                offset = i % 64 * 64 * KiB
                client.writer.write(read_request(i, offset, 64 * KiB))
                client.writer.write(read_request(i + 1000, offset, 64 * KiB))
            replies = await read_replies(client.reader, 512, 64 * KiB)
            for i in range(256):
                assert replies[i] == replies[i + 1000] == bytes([i % 64 + 1]) * 64 * KiB
            await client.disconnect()
        assert not node.driver.epochs.busy


async def test_an_unread_reply_keeps_its_cluster(tmp_path, image):
    async with open_image(image) as node:
        await fill(node, 2)
        async with serving(tmp_path, node) as served:
            client = await served.connect()
            client.writer.transport.pause_reading()
            client.writer.write(read_request(1, 0, 64 * KiB))
            while not node.driver.epochs.busy:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.1)
            assert node.driver.epochs.busy
            await node.discard(0, 64 * KiB)
            await node.flush()
            # Whoever allocates now must not get the pages of that reply.
            for i in range(8, 40):
                await node.pwrite(i * 64 * KiB, b"\xee" * 64 * KiB)
            client.writer.transport.resume_reading()
            replies = await read_replies(client.reader, 1, 64 * KiB)
            assert replies[1] == b"\x01" * 64 * KiB
            while node.driver.epochs.busy:
                await asyncio.sleep(0.01)
            await node.driver.tasks.settle()
            await client.disconnect()


async def test_a_client_that_goes_leaves_nothing(tmp_path, image):
    async with open_image(image) as node:
        await fill(node, 2)
        async with serving(tmp_path, node) as served:
            client = await served.connect()
            client.writer.transport.pause_reading()
            for i in range(100):
                client.writer.write(read_request(i, 0, 64 * KiB))
            await asyncio.sleep(0.1)
            assert node.driver.epochs.busy
            client.close()
            while node.driver.epochs.busy:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("nb_sent", [None, 0, 4096])
async def test_a_read_that_fails_half_sent_ends_the_connection(
    tmp_path, image, monkeypatch, caplog, nb_sent
):
    """Its header has left: an error reply would be taken for the data."""

    def sendfile(socket_fd, host_offset, length):
        if nb_sent is None:
            raise OSError(errno.EIO, "Input/output error")
        os.write(socket_fd, b"\x01" * nb_sent)
        return nb_sent, node.driver.epochs.enter()

    async with open_image(image) as node:
        await fill(node, 2)
        async with serving(tmp_path, node) as served:
            client, other = await served.connect(), await served.connect()
            monkeypatch.setattr(node, "sendfile", sendfile)
            if nb_sent is not None:
                # Evicted meanwhile.
                monkeypatch.setattr(node, "try_pread_views", lambda *_: None)
            client.writer.write(read_request(1, 0, 64 * KiB))
            client.writer.write(read_request(2, 64 * KiB, 512))
            received = await client.reader.read()
            head = struct.pack(">IIQ", nbd.SIMPLE_REPLY_MAGIC, 0, 1)
            assert received == head + b"\x01" * (nb_sent or 0)
            client.close()
            monkeypatch.undo()
            other.writer.write(read_request(3, 64 * KiB, 64 * KiB))
            assert (await read_replies(other.reader, 1, 64 * KiB))[
                3
            ] == b"\x02" * 64 * KiB
            await other.disconnect()
        assert "closed amid a read" in caplog.text
        assert not node.driver.epochs.busy

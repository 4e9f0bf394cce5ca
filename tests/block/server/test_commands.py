"""Every command, with every way that it can be refused."""

import logging

import pytest

from nbdqcow.nbd import constants as nbd
from tests.block.server.support import EIO_ERROR, FakeNode, serving

MiB = 1 << 20
pytestmark = pytest.mark.asyncio


async def test_flags_and_size(tmp_path):
    async with serving(tmp_path, FakeNode(), FakeNode(77, read_only=True)) as served:
        client = await served.connect()
        assert client.size == MiB
        common = (
            nbd.FLAG_HAS_FLAGS
            | nbd.FLAG_SEND_FLUSH
            | nbd.FLAG_SEND_FUA
            | nbd.FLAG_SEND_CACHE
            | nbd.FLAG_CAN_MULTI_CONN
        )
        assert client.flags == (
            common
            | nbd.FLAG_SEND_TRIM
            | nbd.FLAG_SEND_WRITE_ZEROES
            | nbd.FLAG_SEND_FAST_ZERO
        )
        client = await served.connect("1")
        assert client.size == 77
        assert client.flags == common | nbd.FLAG_READ_ONLY


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("length", [1, 4096, 65536, 65537, 200000])
async def test_read_and_write(tmp_path, inline, length):
    node = FakeNode()
    node.inline = inline
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        before = bytes(node.data)
        assert await client.read(13, length) == before[13 : 13 + length]
        data = b"x" * length
        assert await client.write(7, data) == 0
        assert node.data == before[:7] + data + before[7 + length :]
        assert await client.read(MiB - length, length) == node.data[MiB - length :]
        assert await client.write(MiB - length, data) == 0
        assert node.data[MiB - length :] == data
        await client.disconnect()
    names = {entry[0] for entry in node.log}
    if inline:
        assert names <= {"try_pread", "try_pread_views", "try_pwrite", "flush"}
    else:
        assert names == {"pread", "pwrite", "flush"}


async def test_largest_payloads(tmp_path):
    node = FakeNode(40 * MiB)
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        for inline in (True, False):
            node.inline = inline
            assert await client.read(5, 32 * MiB) == node.data[5 : 5 + 32 * MiB]
            data = bytes([inline]) * (32 * MiB)
            assert await client.write(3, data) == 0
            assert node.data[3 : 3 + 32 * MiB] == data


async def test_flush_trim_cache_and_zeroes(tmp_path):
    node = FakeNode()
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        fua, no_hole = nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE
        fast = nbd.CMD_FLAG_FAST_ZERO
        for call in (
            (nbd.CMD_FLUSH,),
            (nbd.CMD_FLUSH, 0, 0, fua),
            (nbd.CMD_TRIM, 1, 2),
            (nbd.CMD_TRIM, 1, 2, fua),
            (nbd.CMD_CACHE, 3, 4),
            (nbd.CMD_WRITE_ZEROES, 512, 512),
            (nbd.CMD_WRITE_ZEROES, 512, 512, no_hole),
            (nbd.CMD_WRITE_ZEROES, 512, 512, fast | fua),
        ):
            assert await client.call(*call) == 0
        assert node.log == [
            ("flush",),
            ("flush",),
            ("discard", 1, 2),
            ("discard", 1, 2),
            ("flush",),
            ("prefetch", 3, 4),
            ("write_zeroes", 512, 512, True, False, False),
            ("write_zeroes", 512, 512, False, False, False),
            ("write_zeroes", 512, 512, True, True, True),
        ]
        assert await client.call(nbd.CMD_WRITE_ZEROES, 1, 1, fast) == nbd.ENOTSUP


async def test_enotsup_is_for_fast_zeroes_only(tmp_path):
    from nbdqcow.errors import NotSupported

    node = FakeNode()
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        node.failure = NotSupported("no")
        assert await client.call(nbd.CMD_WRITE_ZEROES, 0, 512) == nbd.EIO
        assert await client.call(nbd.CMD_TRIM, 0, 512) == nbd.EIO


async def test_fua_goes_to_the_node(tmp_path):
    node = FakeNode()
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        assert await client.write(0, b"x" * 512, nbd.CMD_FLAG_FUA) == 0
        assert await client.write(0, b"x" * 100000, nbd.CMD_FLAG_FUA) == 0
        assert node.log == [("pwrite", 0, 512, True), ("pwrite", 0, 100000, True)]
        # Valid on all commands, without a meaning on these.
        assert await client.read(0, 512, nbd.CMD_FLAG_FUA) == node.data[:512]
        assert await client.call(nbd.CMD_CACHE, 0, 512, nbd.CMD_FLAG_FUA) == 0


@pytest.mark.parametrize(
    ("command", "flags", "offset", "length", "error"),
    [
        (nbd.CMD_READ, 0, MiB, 1, nbd.EINVAL),
        (nbd.CMD_READ, 0, MiB - 1, 2, nbd.EINVAL),
        (nbd.CMD_READ, 0, 2**64 - 1, 2**32 - 1, nbd.EINVAL),
        (nbd.CMD_READ, 0, 0, 32 * MiB + 1, nbd.EINVAL),
        (nbd.CMD_READ, nbd.CMD_FLAG_DF, 0, 512, nbd.EINVAL),
        (nbd.CMD_READ, 1 << 15, 0, 512, nbd.EINVAL),
        (nbd.CMD_TRIM, 0, MiB, 1, nbd.EINVAL),
        (nbd.CMD_TRIM, nbd.CMD_FLAG_NO_HOLE, 0, 1, nbd.EINVAL),
        (nbd.CMD_CACHE, 0, MiB - 512, 513, nbd.EINVAL),
        (nbd.CMD_CACHE, 1 << 5, 0, 512, nbd.EINVAL),
        (nbd.CMD_WRITE_ZEROES, 0, MiB, 1, nbd.ENOSPC),
        (nbd.CMD_WRITE_ZEROES, 0, 0, 2**32 - 1, nbd.ENOSPC),
        (nbd.CMD_WRITE_ZEROES, nbd.CMD_FLAG_DF, 0, 512, nbd.EINVAL),
        (nbd.CMD_FLUSH, 0, 1, 0, nbd.EINVAL),
        (nbd.CMD_FLUSH, 0, 0, 1, nbd.EINVAL),
        (nbd.CMD_BLOCK_STATUS, 0, 0, 512, nbd.EINVAL),
        (nbd.CMD_RESIZE, 0, 0, 512, nbd.EINVAL),
        (9, 0, 0, 512, nbd.EINVAL),
        (0xFFFF, 0xFFFF, 0, 0, nbd.EINVAL),
    ],
)
async def test_bad_requests_stay_in_sync(
    tmp_path, command, flags, offset, length, error
):
    node = FakeNode()
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        assert await client.call(command, offset, length, flags) == error
        assert node.log == []
        assert await client.read(9, 9) == node.data[9:18]


@pytest.mark.parametrize(
    ("offset", "length", "flags", "error"),
    [
        (MiB, 1, 0, nbd.ENOSPC),
        (MiB - 4096, 4097, 0, nbd.ENOSPC),
        (MiB - 4096, 200000, 0, nbd.ENOSPC),
        (2**64 - 1, 512, 0, nbd.ENOSPC),
        (0, 512, nbd.CMD_FLAG_NO_HOLE, nbd.EINVAL),
        (0, 32 * MiB + 1, 0, nbd.EINVAL),
        (0, 50 * MiB, nbd.CMD_FLAG_FUA, nbd.EINVAL),
    ],
)
async def test_bad_writes_stay_in_sync(tmp_path, offset, length, flags, error):
    node = FakeNode()
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        before = bytes(node.data)
        assert await client.write(offset, bytes(length), flags) == error
        assert node.data == before
        assert node.log == []
        assert await client.read(9, 9) == node.data[9:18]
        assert await client.write(9, b"nine") == 0


async def test_changes_to_a_read_only_export(tmp_path):
    node = FakeNode(read_only=True)
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        for length in (512, 100000, 40 * MiB):
            assert await client.write(0, bytes(length)) == nbd.EPERM
        assert await client.write(MiB, bytes(512)) == nbd.EPERM
        assert await client.call(nbd.CMD_TRIM, 0, 512) == nbd.EPERM
        assert await client.call(nbd.CMD_WRITE_ZEROES, 0, 512) == nbd.EPERM
        assert node.log == []
        assert await client.call(nbd.CMD_FLUSH) == 0
        assert await client.read(9, 9) == node.data[9:18]


async def test_requests_of_no_length(tmp_path):
    node = FakeNode()
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        assert await client.read(0, 0) == b""
        assert await client.read(MiB, 0) == b""
        assert await client.read(MiB + 1, 0) == nbd.EINVAL
        assert await client.write(MiB, b"") == 0
        assert await client.write(MiB + 1, b"") == nbd.ENOSPC
        for command in (nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES, nbd.CMD_CACHE):
            assert await client.call(command, MiB, 0) == 0
        assert node.log == []


@pytest.mark.parametrize("inline", [True, False])
async def test_failing_requests(tmp_path, inline):
    node = FakeNode()
    node.inline = inline
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        node.failure = EIO_ERROR
        for length in (512, 100000):
            assert await client.read(0, length) == nbd.EIO
            assert await client.write(0, bytes(length)) == nbd.EIO
        assert await client.call(nbd.CMD_FLUSH) == nbd.EIO
        node.failure = OSError(28, "full")
        assert await client.write(0, bytes(512)) == nbd.ENOSPC
        node.failure = MemoryError()
        assert await client.write(0, bytes(512)) == nbd.ENOMEM
        node.failure = None
        assert await client.read(9, 9) == node.data[9:18]
        assert not node.tokens


@pytest.mark.parametrize("inline", [True, False])
async def test_failures_are_told_once(tmp_path, inline, caplog):
    node = FakeNode()
    node.inline = inline
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        node.failure = OSError(28, "the disk is full")
        for _ in range(3):
            assert await client.write(512, bytes(512)) == nbd.ENOSPC
        (line,) = caplog.messages
        assert line.startswith("'disk.img': ")
        assert line.endswith(" at 512 failed: the disk is full")
        # Another error of the same image is another matter.
        node.failure = EIO_ERROR
        assert await client.call(nbd.CMD_FLUSH) == nbd.EIO
        assert caplog.messages[1:] == ["'disk.img': FLUSH failed: the disk is broken"]


async def test_zeroes_that_are_not_fast_are_no_failure(tmp_path, caplog):
    async with serving(tmp_path, FakeNode()) as served:
        client = await served.connect()
        fast = nbd.CMD_FLAG_FAST_ZERO
        assert await client.call(nbd.CMD_WRITE_ZEROES, 0, 9, fast) == nbd.ENOTSUP
        assert not caplog.messages


@pytest.mark.parametrize("inline", [True, False])
async def test_a_bug_is_logged_and_answered(tmp_path, inline, caplog):
    node = FakeNode()
    node.inline = inline
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        node.failure = ZeroDivisionError("a bug")
        for length in (512, 100000):
            caplog.clear()
            assert await client.read(0, length) == nbd.EIO
            assert await client.write(0, bytes(length)) == nbd.EIO
            assert [r.levelno for r in caplog.records] == [logging.ERROR] * 2
            assert "ZeroDivisionError: a bug" in caplog.text
        node.failure = None
        assert await client.read(9, 9) == node.data[9:18]


async def test_a_short_read_is_an_error(tmp_path):
    node = FakeNode()
    node.inline = False
    async with serving(tmp_path, node) as served:
        client = await served.connect()
        del node.data[MiB // 2 :]
        assert await client.read(MiB // 2 - 1, 2) == nbd.EIO

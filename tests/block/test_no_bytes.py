"""Disks without a byte, in every format, and requests of no bytes."""

import errno
import struct

import pytest

from nbdqcow import open_image
from nbdqcow.errors import BlockError
from tests.builder import ImageBuilder


def qcow1_of(size):
    head = struct.pack(">4sIQIIQBBxxIQ", b"QFI\xfb", 1, 0, 0, 0, size, 12, 9, 0, 48)
    return head + bytes(4096)


IMAGES = {
    "raw": b"",
    "qcow2": ImageBuilder(0).build(),
    # The smallest that the format may have: not one whole sector.
    "qcow": qcow1_of(2),
}


@pytest.mark.parametrize("format_", IMAGES)
@pytest.mark.asyncio
async def test_requests_of_no_bytes(tmp_path, format_):
    path = tmp_path / "image"
    path.write_bytes(IMAGES[format_])
    async with open_image(path, format=format_) as node:
        assert node.size == 0
        extents = await node.block_status(0, 0)
        for column in (extents.lengths, extents.states, extents.depths):
            assert len(column) == 0
        assert bytes(await node.pread(0, 0)) == b""
        await node.pwrite(0, b"")
        await node.write_zeroes(0, 0)
        await node.discard(0, 0)
        await node.flush()
        with pytest.raises(BlockError) as error:
            await node.pwrite(0, b"x")
        assert error.value.errno == errno.ENOSPC


@pytest.mark.parametrize("format_", IMAGES)
@pytest.mark.asyncio
async def test_the_status_of_no_bytes_of_a_disk_with_some(tmp_path, format_):
    images = {
        "raw": bytes(65536),
        "qcow2": ImageBuilder(65536).build(),
        "qcow": qcow1_of(65536),
    }
    path = tmp_path / "image"
    path.write_bytes(images[format_])
    async with open_image(path, format=format_) as node:
        for offset in (0, 512, node.size):
            extents = await node.block_status(offset, 0)
            assert len(extents.lengths) == 0

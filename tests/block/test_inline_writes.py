"""Writes that allocate and end in the turn of the loop in which they begin."""

import asyncio
import os
import random

import pytest

from nbdqcow import open_image
from nbdqcow.errors import BlockError
from tests.block.qemu import qemu_img

CLUSTER = 65536
SIZE = 12 * CLUSTER + 5120
"""The last cluster is only partly the guest's."""


@pytest.mark.parametrize("extended", ["on", "off"])
@pytest.mark.parametrize("backing_length", [3 * CLUSTER, 7 * CLUSTER + 1536, SIZE])
def test_what_stands_around_a_write_comes_from_the_backing_image(
    tmp_path, extended, backing_length
):
    seed = int(os.environ.get("NBDQCOW_SEED", random.randrange(1 << 32)))
    print(f"NBDQCOW_SEED={seed}")
    rnd = random.Random(seed)
    base, path, model = tmp_path / "base", tmp_path / "a", tmp_path / "model"
    content = bytearray(rnd.randbytes(backing_length).ljust(SIZE, b"\0"))
    base.write_bytes(content[:backing_length])
    options = ("-o", f"extended_l2={extended}", "-F", "raw", "-b", base)
    qemu_img("create", "-q", "-f", "qcow2", *options, path, SIZE)

    async def run():
        async with open_image(path) as node:
            # Tables are made, and pages brought into memory, by coroutines.
            await node.pwrite(SIZE - 512, bytes(512))
            content[SIZE - 512 :] = bytes(512)
            await node.backing.pread(0, backing_length)
            # However slow the machine is.
            node.driver.data._pause_inline = lambda: None
            nb_inline = 0
            for _ in range(40):
                offset = rnd.randrange(0, SIZE - 512, 512)
                length = min(rnd.choice((512, 4096, 40960)), SIZE - offset)
                data = rnd.randbytes(length)
                if node.try_pwrite(offset, data):
                    nb_inline += 1
                else:
                    await node.pwrite(offset, data)
                content[offset : offset + length] = data
            assert bytes(await node.pread(0, SIZE)) == content
            return nb_inline

    assert asyncio.run(run()) > 0
    model.write_bytes(content)
    qemu_img("check", path)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", path, model)


@pytest.mark.parametrize("extended", ["on", "off"])
def test_a_free_cluster_that_holds_metadata_is_not_taken(tmp_path, extended):
    path = tmp_path / "a"
    qemu_img("create", "-qf", "qcow2", "-o", f"extended_l2={extended}", path, SIZE)
    qemu_img("bench", "-f", "qcow2", "-c", 1, "-w", path)
    image = bytearray(path.read_bytes())
    table_offset = int.from_bytes(image[48:56])
    block_offset = int.from_bytes(image[table_offset : table_offset + 8])
    count_offset = block_offset + 2 * (table_offset // CLUSTER)
    assert image[count_offset : count_offset + 2] == b"\0\1"
    image[count_offset + 1] = 0
    path.write_bytes(image)

    async def run():
        async with open_image(path) as node:
            await node.pread(0, 512)
            # Brings the refcount block into memory.
            assert await node.driver.refcounts.count(0) == 1
            for _ in range(2):
                assert node.driver.try_begin_write(CLUSTER, 4096) is None
            assert not node.driver.header.corrupt
            with pytest.raises(BlockError, match="corrupt"):
                await node.pwrite(CLUSTER, bytes(4096))
            assert node.driver.header.corrupt

    asyncio.run(run())

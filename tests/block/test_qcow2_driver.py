"""The qcow2 driver on real files: what QEMU says of them afterwards."""

import asyncio
import json
import random
import subprocess

import pytest

from nbdqcow import open_image
from nbdqcow.errors import BlockError, ImageError, NotSupported
from nbdqcow.types import DATA
from tests.block.qemu import check, create, qemu_img
from tests.builder import l2_table_offset

MiB = 1 << 20


def patch(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("refcount_bits", [1, 2, 8, 16, 64])
def test_refcount_structures_grow(tmp_path, refcount_bits):
    path = create(
        tmp_path / "a", 24 * MiB, cluster_size=512, refcount_bits=refcount_bits
    )

    async def run():
        async with open_image(path) as node:
            before = node.driver.header.refcount_table_clusters
            for offset in range(0, node.size, MiB):
                await asyncio.gather(
                    *(node.pwrite(offset + i * 65536, b"%04d" % i * 16384)
                      for i in range(16))
                )  # fmt: skip
                await node.discard(offset // 2, 70_000)
            return before, node.driver.header.refcount_table_clusters

    before, after = asyncio.run(run())
    if refcount_bits > 2:
        assert after > before
    check(path)


def test_read_into_the_callers_memory(tmp_path):
    path = create(tmp_path / "a")

    async def run():
        async with open_image(path) as node:
            await node.pwrite(0, b"ab" * 65536)
            await node.pwrite(3 * 65536, b"cd" * 65536)
            room = memoryview(bytearray(65536))
            for offset in (0, 1, 3 * 65536):
                assert node.try_pread_into(offset, room)
                assert room == await node.pread(offset, 65536)
            # Across the edge of what is stored, zeroes alone, and too much.
            for offset in (2 * 65536 - 10, 2 * 65536, 5 * 65536):
                assert not node.try_pread_into(offset, room)
            assert not node.try_pread_into(0, memoryview(bytearray(MiB)))

    asyncio.run(run())


def test_discarded_clusters_are_reused_after_a_flush(tmp_path):
    path = create(tmp_path / "a")

    async def run():
        async with open_image(path) as node:
            await node.pwrite(0, b"x" * MiB)
            await node.discard(0, MiB)
            # Not yet: the disk may still name them.
            await node.pwrite(MiB, b"y" * MiB)
            length = node.driver.storage.length
            await node.flush()
            await node.driver.tasks.settle()
            await node.pwrite(2 * MiB, b"z" * MiB)
            assert node.driver.storage.length == length
            assert bytes(await node.pread(0, 2 * MiB)) == bytes(MiB) + b"y" * MiB

    asyncio.run(run())
    check(path)
    assert path.stat().st_blocks * 512 < 3 * MiB


def test_a_read_in_flight_keeps_its_cluster(tmp_path):
    path = create(tmp_path / "a")

    async def run():
        async with open_image(path) as node:
            await node.pwrite(0, b"old" * 21845 + b"!")
            views, token = node.try_pread_views(0, 65536)
            await node.discard(0, 65536)
            await node.flush()
            for i in range(1, 32):
                await node.pwrite(i * 65536, b"new" * 20000)
                await node.flush()
            assert b"".join(bytes(v) for v in views)[:3] == b"old"
            node.release(token)
            await node.driver.tasks.settle()

    asyncio.run(run())
    check(path)


def test_preallocated_zero_clusters_are_used(tmp_path):
    path = create(tmp_path / "a")
    subprocess.run(
        ["qemu-io", "-c", "write -P 7 0 1M", "-c", "write -z 0 1M", path],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip

    async def run():
        async with open_image(path) as node:
            length = node.driver.storage.length
            await node.pwrite(1000, b"abc")
            assert node.driver.storage.length == length
            expected = bytes(1000) + b"abc" + bytes(65536 - 1003)
            assert bytes(await node.pread(0, 65536)) == expected

    asyncio.run(run())
    check(path)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("may_unmap", [True, False])
def test_write_zeroes(tmp_path, compat, may_unmap):
    path = create(tmp_path / "a", compat=compat)
    model = bytearray(4 * MiB)

    async def run():
        async with open_image(path) as node:
            rnd = random.Random(1)
            for _ in range(60):
                offset = rnd.randrange(node.size)
                length = min(node.size - offset, rnd.randrange(1, 300_000))
                if rnd.random() < 0.5:
                    data = rnd.randbytes(length)
                    await node.pwrite(offset, data)
                else:
                    data = bytes(length)
                    await node.write_zeroes(offset, length, may_unmap=may_unmap)
                model[offset : offset + length] = data
            assert bytes(await node.pread(0, node.size)) == model

    asyncio.run(run())
    check(path)


def test_zeroes_take_no_room_where_nothing_is_stored(tmp_path):
    """A version 2 image has no zero clusters: zeroes that must not free any are
    written out, but only over data."""
    path = create(tmp_path / "a", compat="0.10")

    async def run():
        async with open_image(path) as node:
            await node.pwrite(MiB, b"x" * 65536)
            await node.flush()
            length = node.driver.storage.length
            await node.write_zeroes(0, node.size, may_unmap=False)
            assert await node.reads_zero(0, MiB)
            assert bytes(await node.pread(0, node.size)) == bytes(node.size)
            assert (await node.driver.map(MiB, 65536))[0] == DATA
            assert node.driver.storage.length == length

    asyncio.run(run())
    check(path)


@pytest.mark.parametrize("whole", [True, False])
def test_a_zero_cluster_in_version_2_is_not_guessed_at(tmp_path, whole):
    """It is neither read as data nor completed with it, and can be written over."""
    path = create(tmp_path / "a", compat="0.10")

    async def prepare():
        async with open_image(path) as node:
            await node.pwrite(0, b"x" * MiB)

    async def run():
        async with open_image(path) as node:
            assert bytes(await node.pread(0, 65536)) == b"x" * 65536
            if whole:
                await node.pwrite(65536, b"y" * 65536)
                expected = b"x" * 65536 + b"y" * 65536 + b"x" * 65536
                assert bytes(await node.pread(0, 3 * 65536)) == expected
                return
            with pytest.raises(BlockError, match="pre-v3"):
                await node.pwrite(65536 + 512, b"y" * 512)
            with pytest.raises(BlockError, match="pre-v3"):
                await node.pread(0, MiB)

    asyncio.run(prepare())
    patch(path, l2_table_offset(path.read_bytes()) + 15, b"\1")
    asyncio.run(run())
    check(path)


def test_fast_zero_or_nothing(tmp_path):
    base, path = tmp_path / "base", tmp_path / "a"
    base.write_bytes(b"b" * MiB)
    qemu_img("create", "-qf", "qcow2", "-b", base, "-F", "raw", path)

    async def run():
        async with open_image(path) as node:
            await node.write_zeroes(0, 65536, no_fallback=True)
            with pytest.raises(NotSupported):
                await node.write_zeroes(65536, 1000, no_fallback=True)
            # All but this part of the cluster is zero already.
            await node.write_zeroes(100, 1000, no_fallback=True)
            data = bytes(await node.pread(0, 2 * 65536))
            assert data == bytes(65536) + b"b" * 65536

    asyncio.run(run())
    check(path)


def test_compressed_clusters_are_read_and_overwritten(tmp_path):
    raw, path = tmp_path / "raw", tmp_path / "a"
    data = bytearray(b"".join(b"%07d " % i for i in range(MiB // 8)))
    raw.write_bytes(data)
    qemu_img("convert", "-cf", "raw", "-O", "qcow2", raw, path)

    async def run():
        async with open_image(path) as node:
            assert bytes(await node.pread(0, node.size)) == data
            for offset in range(100, MiB, 150_000):
                await node.pwrite(offset, b"changed")
                data[offset : offset + 7] = b"changed"
            await node.discard(MiB // 2, 65536)
            data[MiB // 2 : MiB // 2 + 65536] = bytes(65536)
            assert bytes(await node.pread(0, node.size)) == data

    asyncio.run(run())
    check(path)


def test_internal_snapshots_keep_their_data(tmp_path):
    path = create(tmp_path / "a")
    subprocess.run(
        ["qemu-io", "-c", "write -P 1 0 2M", path],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    qemu_img("snapshot", "-c", "before", path)

    async def run():
        async with open_image(path) as node:
            await node.pwrite(1000, b"after" * 1000)
            await node.discard(MiB, 65536)
            await node.write_zeroes(MiB + 65536, 65536)

    asyncio.run(run())
    check(path)
    qemu_img("snapshot", "-a", "before", path)
    done = subprocess.run(
        ["qemu-io", "-c", "read -P 1 0 2M", path], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert "failed" not in done.stdout
    check(path)


def test_data_never_goes_over_metadata(tmp_path):
    path = create(tmp_path / "a")
    subprocess.run(
        ["qemu-io", "-c", "write 0 64k", path], check=True, stdout=subprocess.DEVNULL
    )
    image = path.read_bytes()
    l1_offset = int.from_bytes(image[40:48])
    l2_offset = int.from_bytes(image[l1_offset : l1_offset + 8]) & ~(1 << 63)
    patch(path, l2_offset, (l1_offset | 1 << 63).to_bytes(8))

    async def run():
        async with open_image(path) as node:
            assert not node.try_pwrite(0, b"boom")
            with pytest.raises(BlockError, match="metadata") as caught:
                await node.pwrite(0, b"boom")
            assert caught.value.errno == 5
            with pytest.raises(BlockError, match="corrupt"):
                await node.pwrite(65536, b"x")
            with pytest.raises(BlockError, match="corrupt"):
                await node.flush()
            await node.pread(65536, 10)

    asyncio.run(run())
    assert path.read_bytes()[l1_offset : l1_offset + 512] == image[l1_offset:][:512]
    assert json.loads(qemu_img("info", "--output=json", path))["format-specific"][
        "data"
    ]["corrupt"]
    with pytest.raises(ImageError, match="corrupt"):
        asyncio.run(_open(path))


def test_a_free_looking_metadata_cluster_is_not_allocated(tmp_path):
    path = create(tmp_path / "a")
    table = int.from_bytes(path.read_bytes()[48:56])
    block = int.from_bytes(path.read_bytes()[table : table + 8])
    patch(path, block, bytes(16))

    async def run():
        async with open_image(path) as node:
            with pytest.raises(BlockError, match="metadata"):
                await node.pwrite(0, b"boom")

    before = path.read_bytes()[65536:]
    asyncio.run(run())
    assert path.read_bytes()[65536:] == before


async def _open(path):
    async with open_image(path):
        pass


def test_a_write_that_fails_leaves_the_old_content(tmp_path):
    path = create(tmp_path / "a")

    async def run():
        async with open_image(path) as node:
            await node.pwrite(0, b"old" * 30000)
            await node.flush()
            storage = node.driver.storage
            sound = storage.pwritev

            async def failing(offset, buffers, *, fua=False):
                raise OSError(28, "No space left on device")

            storage.pwritev = failing
            with pytest.raises(OSError, match="No space"):
                await node.pwrite(MiB, b"new" * 30000)
            storage.pwritev = sound
            assert bytes(await node.pread(MiB, 3)) == bytes(3)
            await node.pwrite(MiB, b"new" * 30000)
            await node.flush()
            assert bytes(await node.pread(MiB, 3)) == b"new"

    asyncio.run(run())
    check(path)


def test_a_flush_that_fails_can_be_repeated(tmp_path):
    path = create(tmp_path / "a")

    async def run():
        async with open_image(path) as node:
            await node.pwrite(0, b"data" * 20000)
            await node.discard(0, 65536)
            storage = node.driver.storage
            sound, count = storage.pwritev, 0

            for fail_at in range(6):
                count = 0

                async def failing(offset, buffers, *, fua=False, fail_at=fail_at):
                    nonlocal count
                    count += 1
                    if count > fail_at:
                        raise OSError(5, "Input/output error")
                    await sound(offset, buffers, fua=fua)

                storage.pwritev = failing
                if fail_at < 2:
                    with pytest.raises(OSError, match="Input/output"):
                        await node.flush()
                storage.pwritev = sound
            await node.flush()
            assert bytes(await node.pread(65536, 4)) == b"data"

    asyncio.run(run())
    check(path)


def test_what_is_freed_while_a_flush_runs_stays_until_the_next(tmp_path):
    """The disk still names it: a write elsewhere must not get the cluster."""
    path, copy = create(tmp_path / "a"), tmp_path / "after-kill"

    async def run():
        async with open_image(path) as node:
            await node.pwrite(0, b"A" * 65536)
            await node.flush()
            gate, storage = asyncio.Event(), node.driver.storage
            sound = storage.flush

            async def slow():
                await gate.wait()
                await sound()

            storage.flush = slow
            flushing = asyncio.create_task(node.flush())
            await asyncio.sleep(0.01)
            await node.discard(0, 65536)
            gate.set()
            await flushing
            await node.driver.tasks.settle()
            storage.flush = sound
            await node.pwrite(5 * 65536, b"B" * 65536)
            copy.write_bytes(path.read_bytes())

    async def look():
        async with open_image(copy, format="qcow2", read_only=True) as node:
            assert bytes(await node.pread(0, 65536)) == b"A" * 65536

    asyncio.run(run())
    asyncio.run(look())


def test_a_paused_inline_write_takes_nothing(tmp_path):
    path = create(tmp_path / "a")

    async def run():
        async with open_image(path) as node:
            await node.pwrite(0, b"x")
            node._storage_try_pwrite = lambda offset, data: False
            node.driver.data.try_pwritev = lambda offset, buffers: False
            for i in range(1, 20):
                assert not node.try_pwrite(i * 65536, b"y" * 4096)
            assert not node.driver.freed.ranges
            length = node.driver.storage.length
            await node.pwrite(65536, b"z" * 65536)
            assert node.driver.storage.length <= length + 2 * 65536

    asyncio.run(run())
    check(path)

"""Clusters that are compressed and placed together, and what parts them."""

import asyncio
import random

import pytest

from nbdqcow import open_image
from nbdqcow.errors import BlockError
from tests.block.qemu import check, create

CLUSTER = 65536
KINDS = ("text", "noise", "zeroes")


def cluster(rnd, kind="text"):
    if kind == "zeroes":
        return bytes(CLUSTER)
    if kind == "noise":
        return rnd.randbytes(CLUSTER)
    return bytes(rnd.choices(b"abcdefgh \n", k=1024)) * (CLUSTER // 1024)


def record_writes(storage, patch):
    """Return where, and how much, is written from now on."""
    writes = []
    original = storage.try_pwritev

    def try_pwritev(offset, buffers):
        writes.append((offset, sum(map(len, buffers))))
        return original(offset, buffers)

    patch.setattr(storage, "try_pwritev", try_pwritev)
    return writes


def test_streams_go_out_in_one_write(tmp_path, seed, monkeypatch):
    path = create(tmp_path / "a", 4 * CLUSTER)
    rnd = random.Random(seed)
    data = b"".join(cluster(rnd) for _ in range(4))

    async def run():
        async with open_image(path) as node:
            writes = record_writes(node.driver.storage, monkeypatch)
            await node.pwrite_compressed(0, data)
            assert len(writes) == 1
            assert bytes(await node.pread(0, len(data))) == data

    asyncio.run(run())
    check(path)


def test_of_all_kinds(tmp_path, seed):
    path = create(tmp_path / "a", 64 * CLUSTER)
    rnd = random.Random(seed)
    data = b"".join(cluster(rnd, rnd.choice(KINDS)) for _ in range(64))

    async def run():
        async with open_image(path) as node:
            await node.pwrite_compressed(0, data)
            # Once more over what is there now, streams over plain clusters and back.
            await node.pwrite_compressed(0, data[::-1])
            assert bytes(await node.pread(0, len(data))) == data[::-1]

    asyncio.run(run())
    assert check(path)["compressed-clusters"]


def test_a_cluster_that_somebody_writes_to_is_waited_for(tmp_path, seed):
    path = create(tmp_path / "a", 4 * CLUSTER)
    rnd = random.Random(seed)
    data = b"".join(cluster(rnd) for _ in range(4))

    async def run():
        async with open_image(path) as node:
            driver = node.driver
            busy = driver.in_flight.add(2 * CLUSTER, 3 * CLUSTER)
            writing = asyncio.create_task(node.pwrite_compressed(0, data))
            async with asyncio.timeout(20):
                while await node.reads_zero(CLUSTER, CLUSTER):
                    await asyncio.sleep(0.01)
            assert not writing.done()
            assert await node.reads_zero(2 * CLUSTER, 2 * CLUSTER)
            driver.in_flight.remove(busy)
            await writing
            assert bytes(await node.pread(0, len(data))) == data

    asyncio.run(run())
    check(path)


def at_call(number, refcounts, patch, act):
    """From the call with this number on, ``act`` takes the place of
    `Refcounts.allocate_bytes`."""
    allocate, nb_calls = refcounts.allocate_bytes, 0

    async def allocate_bytes(length):
        nonlocal nb_calls
        nb_calls += 1
        return await (act if nb_calls >= number else allocate)(length)

    patch.setattr(refcounts, "allocate_bytes", allocate_bytes)


@pytest.mark.parametrize("nb_first", [0, 1, 3])
def test_room_for_some_only(tmp_path, seed, monkeypatch, nb_first):
    """Those that have a place are written; the error is told."""
    path = create(tmp_path / "a", 4 * CLUSTER)
    rnd = random.Random(seed)
    data = b"".join(cluster(rnd) for _ in range(4))

    async def fail(length):
        raise BlockError(28, "No space left on device")

    async def run():
        async with open_image(path) as node:
            with monkeypatch.context() as patch:
                at_call(nb_first + 1, node.driver.refcounts, patch, fail)
                with pytest.raises(OSError, match="No space"):
                    await node.pwrite_compressed(0, data)
            first = nb_first * CLUSTER
            assert bytes(await node.pread(0, len(data))) == (
                data[:first] + bytes(len(data) - first)
            )
            await node.pwrite_compressed(0, data)
            assert bytes(await node.pread(0, len(data))) == data

    asyncio.run(run())
    check(path)


@pytest.mark.parametrize("where", ["places", "write"])
def test_a_cancelled_call_holds_nothing(tmp_path, seed, monkeypatch, where):
    path = create(tmp_path / "a", 4 * CLUSTER)
    rnd = random.Random(seed)
    data = b"".join(cluster(rnd) for _ in range(4))

    async def run():
        async with open_image(path) as node:
            driver, reached = node.driver, asyncio.Event()

            async def hang(*_):
                reached.set()
                await asyncio.Event().wait()

            with monkeypatch.context() as patch:
                if where == "places":
                    at_call(3, driver.refcounts, patch, hang)
                else:
                    patch.setattr(driver.storage, "try_pwritev", lambda *_: False)
                    patch.setattr(driver.storage, "pwritev", hang)
                writing = asyncio.create_task(node.pwrite_compressed(0, data))
                await reached.wait()
                writing.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await writing
            assert driver.in_flight.find(0, len(data)) is None
            assert await node.reads_zero(0, len(data))
            await node.flush()
            await node.pwrite_compressed(0, data)
            assert bytes(await node.pread(0, len(data))) == data

    asyncio.run(run())
    check(path)


def test_a_disk_that_has_grown_meanwhile(tmp_path, seed, monkeypatch):
    """What was the disk's last part of a cluster is no whole one any more."""
    size = 3 * CLUSTER + 4096
    path = create(tmp_path / "a", size)
    rnd = random.Random(seed)
    data = b"".join(cluster(rnd) for _ in range(4))

    async def run():
        async with open_image(path) as node:
            clusters = node.driver.compressed
            async with clusters.placing:
                writing = asyncio.create_task(node.pwrite_compressed(0, data[:size]))
                await asyncio.sleep(0.2)
                await node.resize(4 * CLUSTER)
                await node.pwrite(size, b"behind")
            await writing
            expected = bytearray(data[:size].ljust(4 * CLUSTER, b"\0"))
            expected[size : size + 6] = b"behind"
            assert bytes(await node.pread(0, 4 * CLUSTER)) == expected

    asyncio.run(run())
    check(path)

"""Resizing images in use: what a model says, and what QEMU makes of the same."""

import asyncio
import json
import os
import random
import struct
import subprocess
import threading

import pytest

from nbdqcow import open_image
from nbdqcow.errors import BlockError
from nbdqcow.formats.qcow2.header import Header
from nbdqcow.server.server import Server
from nbdqcow.storage.holes import Holes
from tests.block.qemu import check, create
from tests.block.qemu import run_qemu_img as qemu_img

KiB, MiB = 1 << 10, 1 << 20
SEED = int(os.environ.get("NBDQCOW_SEED", random.randrange(1 << 32)))


def info(path):
    return json.loads(qemu_img("info", "--output=json", path).stdout)


def content(path):
    raw = path.with_suffix(".raw")
    qemu_img("convert", "-O", "raw", path, raw)
    return raw.read_bytes()


def resize(path, size, **options):
    async def run():
        async with open_image(path) as node:
            await node.resize(size, **options)
            assert node.size == size

    asyncio.run(run())


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
@pytest.mark.parametrize("version", ["0.10", "1.1"])
def test_grow_and_shrink_are_what_qemu_makes(tmp_path, cluster_size, version):
    options = {"cluster_size": cluster_size, "compat": version}
    ours = create(tmp_path / "ours", 2 * MiB, **options)
    theirs = create(tmp_path / "theirs", 2 * MiB, **options)
    for path in (ours, theirs):
        write = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 2M", path]
        subprocess.run(write, check=True, stdout=subprocess.DEVNULL)
    for size in (5 * MiB, 40 * MiB, 700 * KiB + 512, MiB, 512, 3 * MiB):
        resize(ours, size)
        qemu_img("resize", "--shrink", theirs, size)
        assert check(ours)["total-clusters"] == check(theirs)["total-clusters"]
        assert info(ours)["virtual-size"] == size
        assert ours.stat().st_size < theirs.stat().st_size + 2 * cluster_size
        if size not in (MiB, 3 * MiB):
            assert qemu_img("compare", ours, theirs).returncode == 0
    # QEMU shows again what the last cluster had; it is zero here.
    assert content(ours) == b"\7" * 512 + bytes(3 * MiB - 512)


def test_what_was_cut_off_does_not_come_back(tmp_path):
    path = create(tmp_path / "a", MiB)

    async def run():
        async with open_image(path) as node:
            await node.pwrite(0, b"x" * MiB)
            await node.resize(100 * KiB)
            await node.resize(MiB)
            assert bytes(await node.pread(0, MiB)) == b"x" * 100 * KiB + bytes(
                924 * KiB
            )

    asyncio.run(run())
    assert content(path) == b"x" * 100 * KiB + bytes(924 * KiB)
    assert check(path)["allocated-clusters"] == 2


@pytest.mark.parametrize("extended_l2", ["off", "on"])
@pytest.mark.parametrize("size", [10 * MiB, 10 * MiB - 30 * KiB])
@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
def test_a_longer_backing_image_does_not_show(
    tmp_path, preallocation, size, extended_l2
):
    base = tmp_path / "base"
    base.write_bytes(b"b" * 20 * MiB)
    path = create(tmp_path / "a", size, backing=base, extended_l2=extended_l2)
    resize(path, 30 * MiB, preallocation=preallocation)
    assert content(path) == b"b" * size + bytes(30 * MiB - size)
    check(path)


def test_version_2_does_not_hide_a_longer_backing_image(tmp_path):
    base = tmp_path / "base"
    base.write_bytes(b"b" * 2 * MiB)
    path = create(tmp_path / "a", MiB, backing=base, compat="0.10")
    with pytest.raises(BlockError) as caught:
        resize(path, 3 * MiB)
    theirs = qemu_img("resize", path, 3 * MiB, check=False)
    assert f"qemu-img: {caught.value}\n" == theirs.stderr
    resize(path, 3 * MiB, preallocation="full")
    assert content(path) == b"b" * MiB + bytes(2 * MiB)
    check(path)


def test_little_is_written_rather_than_set_aside(tmp_path):
    """What is set aside may need more room when a part of it is written."""
    path = create(tmp_path / "image", 2 * MiB)
    resize(path, 2 * MiB + 64 * KiB, preallocation="falloc")
    place = json.loads(qemu_img("map", "--output=json", path).stdout)[-1]["offset"]
    with path.open("rb") as file:
        assert os.lseek(file.fileno(), place, os.SEEK_DATA) == place
        assert os.lseek(file.fileno(), place, os.SEEK_HOLE) >= place + 64 * KiB


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
def test_preallocation_takes_what_qemu_takes(tmp_path, preallocation):
    paths = create(tmp_path / "ours", 5 * MiB), create(tmp_path / "theirs", 5 * MiB)
    resize(paths[0], 40 * MiB, preallocation=preallocation)
    qemu_img("resize", f"--preallocation={preallocation}", paths[1], 40 * MiB)
    assert check(paths[0]) == check(paths[1]) | {"filename": str(paths[0])}
    ours, theirs = (os.stat(path) for path in paths)
    assert ours.st_size == theirs.st_size
    assert abs(ours.st_blocks - theirs.st_blocks) <= 1024
    assert content(paths[0]) == bytes(40 * MiB)


def test_freed_clusters_are_not_preallocated_with_their_old_data(tmp_path):
    path = create(tmp_path / "a", 4 * MiB)

    async def run():
        async with open_image(path, discard="unmap") as node:
            await node.pwrite(0, b"x" * 4 * MiB)
            node.driver.discard_freed = False
            await node.discard(0, 4 * MiB)
            await node.flush()
            await node.resize(8 * MiB, preallocation="metadata")

    asyncio.run(run())
    assert content(path) == bytes(8 * MiB)
    check(path)


def test_refusals_are_those_of_qemu(tmp_path):
    path = create(tmp_path / "a", MiB, compat="0.10")
    qemu_img("snapshot", "-c", "s", path)
    small = create(tmp_path / "small", MiB, cluster_size=512)
    cases = [
        (path, 2 * MiB, "off"),
        (small, 1 << 40, "off"),
        (small, 512 * KiB, "full"),
        (tmp_path / "raw", 3 * MiB, "metadata"),
    ]
    (tmp_path / "raw").write_bytes(bytes(MiB))
    for path, size, preallocation in cases:
        format_ = "raw" if path.name == "raw" else "qcow2"
        theirs = qemu_img(
            "resize", "-f", format_, "--shrink", f"--preallocation={preallocation}",
            path, size, check=False,
        )  # fmt: skip
        with pytest.raises(BlockError) as caught:
            resize(path, size, preallocation=preallocation)
        assert f"qemu-img: {caught.value}\n" == theirs.stderr
        assert theirs.returncode == 1
    with pytest.raises(BlockError, match="multiple of 512"):
        resize(small, MiB + 1)
    with pytest.raises(BlockError, match="Unsupported preallocation mode 'some'"):
        resize(small, 2 * MiB, preallocation="some")


def test_snapshots_keep_what_they_have(tmp_path):
    path = create(tmp_path / "a", 4 * MiB)

    async def run():
        async with open_image(path) as node:
            await node.pwrite(0, b"1" * 4 * MiB)
            await node.driver.snapshot_create("s")
            await node.resize(MiB + 512)
            await node.pwrite(MiB - 512, b"2" * 1024)
            await node.driver.snapshot_create("t")
            await node.resize(64 * MiB)
            await node.pwrite(60 * MiB, b"3" * MiB)
            await node.driver.snapshot_apply("s")
            assert node.size == 4 * MiB
            assert bytes(await node.pread(0, 4 * MiB)) == b"1" * 4 * MiB
            await node.driver.snapshot_apply("t")
            assert node.size == MiB + 512
            with pytest.raises(BlockError, match="goes past"):
                await node.pread(MiB, 1024)
            await node.driver.snapshot_delete("s")
            await node.driver.snapshot_delete("t")

    asyncio.run(run())
    assert check(path)["allocated-clusters"] == 17
    assert content(path) == b"1" * (MiB - 512) + b"2" * 1024


def test_bitmaps_are_resized(tmp_path):
    path = create(tmp_path / "a", 4 * MiB)
    qemu_img("bitmap", "--add", "-g", "64k", path, "b")

    async def run():
        async with open_image(path) as node:
            await node.pwrite(3 * MiB, b"1" * MiB)
            await node.resize(3 * MiB + 100 * KiB)
            await node.resize(1 << 40)
            bitmap = node.dirty_bitmaps["b"]
            lengths, dirty = await bitmap.extents(0, 1 << 40, 10)
            assert dirty.tolist() == [False, True, False]
            assert lengths.tolist()[:2] == [3 * MiB, 128 * KiB]
            await node.pwrite((1 << 40) - 10, b"end")

    asyncio.run(run())
    check(path)
    bitmaps = info(path)["format-specific"]["data"]["bitmaps"]
    assert bitmaps == [{"flags": ["auto"], "name": "b", "granularity": 64 * KiB}]
    # QEMU loads it: it would say so if the table did not fit.
    qemu_img("resize", "--shrink", path, 2 * MiB)
    check(path)


def test_an_unusable_bitmap_refuses(tmp_path):
    path = create(tmp_path / "a", 4 * MiB)
    qemu_img("bitmap", "--add", path, "b")

    async def run():
        node = await open_image(path)
        data = path.read_bytes()
        await node.close()
        path.write_bytes(data)

    asyncio.run(run())
    with pytest.raises(BlockError) as caught:
        resize(path, 8 * MiB)
    theirs = qemu_img("resize", path, 8 * MiB, check=False)
    assert theirs.stderr.splitlines()[0] == f"qemu-img: {caught.value}"


def test_make_empty(tmp_path):
    base = tmp_path / "base"
    base.write_bytes(b"b" * 2 * MiB)
    path = create(tmp_path / "a", 2 * MiB, backing=base)

    async def run():
        async with open_image(path) as node:
            await node.pwrite(0, b"x" * MiB)
            await node.driver.make_empty()
            assert bytes(await node.pread(0, 2 * MiB)) == b"b" * 2 * MiB

    asyncio.run(run())
    assert check(path)["image-end-offset"] <= 5 * 65536
    assert path.stat().st_size <= 5 * 65536
    assert content(path) == b"b" * 2 * MiB


class Model:
    """A disk of bytes, and clients that each have a stretch of it."""

    def __init__(self, node, rnd):
        self.node, self.rnd = node, rnd
        self.bytes = bytearray(node.size)
        self.locks = [asyncio.Lock() for _ in range(8)]
        self.stop = False
        self.nb_failed = 0

    async def client(self, number, stretch):
        rnd = self.rnd
        while not self.stop:
            await asyncio.sleep(0)
            offset = number * stretch + rnd.randrange(stretch)
            length = min(
                rnd.choice((512, 5000, 70_000)), (number + 1) * stretch - offset
            )
            async with self.locks[number]:
                await self.request(offset, length)

    async def request(self, offset, length):
        node, rnd = self.node, self.rnd
        data = rnd.randbytes(length)
        kind = rnd.choice(("write", "write", "read", "zero"))
        fits = offset + length <= node.size
        try:
            if kind == "write":
                if not node.try_pwrite(offset, data):
                    await node.pwrite(offset, data)
            elif kind == "zero":
                data = bytes(length)
                await node.write_zeroes(offset, length, may_unmap=rnd.random() < 0.5)
            else:
                got = node.try_pread(offset, length)
                got = got if got is not None else await node.pread(offset, length)
                if fits and offset + length <= node.size:
                    assert bytes(got) == self.bytes[offset : offset + length]
                return
        except BlockError:
            self.nb_failed += 1
            return
        if offset + length <= len(self.bytes):
            self.bytes[offset : offset + length] = data

    async def resize(self, size):
        """Nobody writes to what goes while it goes; some try to."""
        first = min(size, len(self.bytes)) * 8 // self.full
        for lock in self.locks[first:]:
            await lock.acquire()
        del self.bytes[size:]
        await self.node.resize(size)
        self.bytes.extend(bytes(size - len(self.bytes)))
        for lock in self.locks[first:]:
            lock.release()


@pytest.mark.parametrize(
    ("cluster_size", "extended_l2"),
    [(512, "off"), (4096, "off"), (65536, "off"), (65536, "on")],
)
@pytest.mark.asyncio
async def test_resizing_under_load(tmp_path, cluster_size, extended_l2):
    rnd = random.Random(SEED)
    print(f"NBDQCOW_SEED={SEED}")
    full = 4 * MiB
    base = tmp_path / "base"
    base.write_bytes(rnd.randbytes(3 * MiB))
    path = create(
        tmp_path / "a", full, backing=base,
        cluster_size=cluster_size, extended_l2=extended_l2,
    )  # fmt: skip
    async with open_image(path) as node:
        model = Model(node, rnd)
        model.full = full
        model.bytes[: 3 * MiB] = base.read_bytes()
        clients = [
            asyncio.create_task(model.client(number, full // 8)) for number in range(8)
        ]
        for _ in range(12):
            for _ in range(rnd.randrange(40)):
                await asyncio.sleep(0.001)
            await model.resize(rnd.randrange(full // 512) * 512)
        await model.resize(full)
        model.stop = True
        await asyncio.gather(*clients)
        assert bytes(await node.pread(0, full)) == model.bytes
        assert model.nb_failed
    check(path)
    assert content(path) == model.bytes


def test_raw(tmp_path):
    path = tmp_path / "raw"
    path.write_bytes(b"r" * 10_000)

    async def run():
        async with open_image(path, format="raw") as node:
            await node.resize(20_000)
            await node.pwrite(15_000, b"s" * 5000)
            await node.resize(16_000)
            with pytest.raises(BlockError, match="goes past"):
                await node.pwrite(15_999, b"ss")
            assert not node.try_pwrite(15_999, b"ss")
            assert node.try_pread(15_999, 2) is None
            await node.resize(MiB, preallocation="full")
            await node.resize(2 * MiB, preallocation="falloc")

    asyncio.run(run())
    data = path.read_bytes()
    assert data == b"r" * 10_000 + bytes(5000) + b"s" * 1000 + bytes(2 * MiB - 16_000)
    assert os.stat(path).st_blocks * 512 >= 2 * MiB - 16_000


@pytest.mark.asyncio
async def test_a_client_keeps_the_size_that_it_was_told(tmp_path):
    path = create(tmp_path / "a", 4 * MiB)
    async with open_image(path) as node:
        server = Server()
        server.add_export("", node)
        await server.listen_unix(str(tmp_path / "s"))
        running = asyncio.create_task(server.run_until_stopped())
        uri = f"nbd+unix:///?socket={tmp_path / 's'}"
        async with open_image(uri, format="raw") as client:
            await client.pwrite(0, b"x" * 4 * MiB)
            await node.resize(MiB)
            assert client.size == 4 * MiB
            assert bytes(await client.pread(0, MiB)) == b"x" * MiB
            with pytest.raises(OSError):
                await client.pread(2 * MiB, 512)
            with pytest.raises(OSError):
                await client.pwrite(MiB - 1, b"yy")
            with pytest.raises(OSError):
                await client.write_zeroes(3 * MiB, 65536)
            await node.resize(8 * MiB)
            assert bytes(await client.pread(2 * MiB, 512)) == bytes(512)
            await client.pwrite(3 * MiB, b"again")
        server.stop()
        await running
    check(path)
    assert content(path)[3 * MiB : 3 * MiB + 5] == b"again"


def refcount_blocks(path):
    """Return the refcount blocks of an image in a file, and of each whether it
    has a count."""
    data = path.read_bytes()
    header = Header.parse(data[:65536])
    size, start = header.cluster_size, header.refcount_table_offset
    words = struct.iter_unpack(
        ">Q", data[start : start + header.refcount_table_clusters * size]
    )
    return {word: any(data[word : word + size]) for (word,) in words if word}


@pytest.mark.parametrize(
    ("cluster_size", "refcount_bits", "size"),
    [(512, 64, 3 * MiB), (512, 1, 3 * MiB), (4096, 16, 40 * MiB)],
)
def test_refcount_blocks_go_with_what_they_counted(
    tmp_path, cluster_size, refcount_bits, size
):
    path = create(
        tmp_path / "a", size, cluster_size=cluster_size, refcount_bits=refcount_bits
    )
    write = ["qemu-io", "-f", "qcow2", "-c", f"write -P 7 0 {size}", path]
    subprocess.run(write, check=True, stdout=subprocess.DEVNULL)
    nb_before = len(refcount_blocks(path))
    resize(path, MiB // 8)
    blocks = refcount_blocks(path)
    assert all(blocks.values())
    assert len(blocks) <= nb_before / 2
    assert qemu_img("check", path).returncode == 0
    assert content(path) == b"\7" * (MiB // 8)

    async def use():
        async with open_image(path) as node:
            await node.resize(size)
            await node.pwrite(0, b"\1" * size)
            await node.resize(MiB)
            await node.resize(2 * MiB)
            # While the blocks go, others write.
            await asyncio.gather(
                node.resize(MiB),
                *(node.pwrite(i * 4096, b"\2" * 4096) for i in range(256)),
            )
            await node.resize(size)
            await node.pwrite(size - MiB, b"\3" * MiB)

    asyncio.run(use())
    assert qemu_img("check", path).returncode == 0
    assert content(path) == b"\2" * MiB + bytes(size - 2 * MiB) + b"\3" * MiB


def test_refcount_blocks_that_cannot_be_are_left_to_a_repair(tmp_path):
    path = create(tmp_path / "a", MiB, cluster_size=4096)
    with path.open("r+b") as file:
        header = Header.parse(file.read(4096))
        table = header.refcount_table_offset
        data = path.stat().st_size
        wrong = (
            0x200,
            0x1000000000,
            0xFFFFFF00000000,
            header.l1_table_offset,
            table,
            data,
            data,
        )
        file.seek(table + 8)
        file.write(struct.pack(f">{len(wrong)}Q", *wrong))
        # A cluster that is a block twice, with a count of one.
        file.seek(2 * 4096 + data // 4096 * 2)
        file.write(b"\0\1")
        file.seek(data)
        file.write(bytes(4096))
    resize(path, MiB // 2)
    assert set(wrong) < set(refcount_blocks(path))


def test_growing_does_not_cut_off_what_is_written_meanwhile(tmp_path, monkeypatch):
    """Room is made for preallocated clusters while a write that was answered
    has put its cluster behind them."""
    path = create(tmp_path / "disk", MiB)
    entered, leave = threading.Event(), threading.Event()

    def slowly(function):
        def run(*arguments):
            entered.set()
            assert leave.wait(60)
            return function(*arguments)

        return run

    async def run():
        async with open_image(path) as node:
            monkeypatch.setattr(os, "ftruncate", slowly(os.ftruncate))
            monkeypatch.setattr(Holes, "grow_blocking", slowly(Holes.grow_blocking))
            growing = asyncio.create_task(
                node.resize(2 * MiB, preallocation="metadata")
            )
            while not entered.is_set():
                await asyncio.sleep(0)
            await node.pwrite(0, b"\5" * 65536)
            leave.set()
            await growing
            assert await node.pread(0, 65536) == b"\5" * 65536

    asyncio.run(run())
    assert content(path) == b"\5" * 65536 + bytes(2 * MiB - 65536)
    assert not check(path).keys() & {"leaks", "corruptions"}


def test_a_table_that_is_preallocated_in_stays_in_memory(tmp_path):
    """While clusters are looked for, others read so much that all tables leave
    the cache, and read this one anew."""
    path = create(tmp_path / "disk", MiB)

    async def run():
        async with open_image(path) as node:
            await node.pwrite(0, b"\5" * 65536)
            await node.flush()
            refcounts, tables = node.driver.refcounts, node.driver.tables
            take = refcounts.allocate_contiguous

            async def take_beside_others(*arguments):
                tables.turn()
                tables.turn()
                await node.pread(0, 512)
                return await take(*arguments)

            refcounts.allocate_contiguous = take_beside_others
            await node.resize(2 * MiB, preallocation="metadata")
            await node.pwrite(MiB // 2, b"\6" * 65536)

    asyncio.run(run())
    assert not check(path).keys() & {"leaks", "corruptions"}


@pytest.mark.parametrize("more", ["", ",extended_l2=on"])
@pytest.mark.parametrize("request_name", ["discard", "write_zeroes", "compressed"])
def test_a_request_up_to_the_old_end_leaves_what_is_behind(
    tmp_path, request_name, more
):
    """The disk grows, and somebody writes to what is new, while a request that
    reached up to the old end, within a cluster, waits."""
    old_size = 5 * 65536 + 3 * 512
    path = tmp_path / "disk"
    qemu_img("create", "-qf", "qcow2", "-o", f"cluster_size=64k{more}", path, old_size)

    async def run():
        async with open_image(path) as node:
            await node.pwrite(0, b"\5" * old_size)
            driver = node.driver
            flush, limit = driver.writeback.flush, driver.tables.dirty_limit

            async def grow_first(**options):
                driver.writeback.flush, driver.tables.dirty_limit = flush, limit
                await node.resize(6 * 65536)
                await node.pwrite(old_size, b"\7" * 512)

            driver.tables.dirty_limit, driver.writeback.flush = -1, grow_first
            start = 5 * 65536
            if request_name == "compressed":
                await node.pwrite_compressed(start, b"\6" * 1536)
                expected = b"\6" * 1536
            elif request_name == "write_zeroes":
                await node.write_zeroes(start, 1536)
                expected = bytes(1536)
            else:
                await node.discard(start, 1536)
                expected = None
            data = await node.pread(start, 2560)
            assert driver.writeback.flush is flush
            assert data[1536:] == b"\7" * 512 + bytes(512)
            assert expected in (None, data[:1536])

    asyncio.run(run())
    assert not check(path).keys() & {"leaks", "corruptions"}


def test_a_bitmap_finer_than_the_last_cluster(tmp_path):
    """The disk ends within a cluster, whose rest is zeroed when it grows; a
    write waits while it becomes smaller."""
    path = create(tmp_path / "disk", 65536 + 512)

    async def run():
        async with open_image(path) as node:
            driver = node.driver
            driver.bitmap_add("b", granularity=512)
            await node.pwrite(65536, b"\5" * 512)
            await node.resize(4 * 65536)
            assert await node.pread(65536, 1024) == b"\5" * 512 + bytes(512)
            await driver.lock.acquire()
            shrinking = asyncio.create_task(node.resize(65536 + 512))
            writes = [
                asyncio.create_task(node.pwrite(3 * 65536, b"\6" * 65536)),
                asyncio.create_task(node.write_zeroes(65536, 3 * 65536)),
            ]
            for _ in range(10):
                await asyncio.sleep(0)
            driver.lock.release()
            await shrinking
            found = await asyncio.gather(*writes, return_exceptions=True)
            assert {type(one) for one in found} <= {type(None), BlockError}
            bitmap = driver.dirty_bitmaps["b"]
            assert not bitmap.bits[-1] >> bitmap.nb_bits % 8

    asyncio.run(run())
    assert not check(path).keys() & {"leaks", "corruptions"}

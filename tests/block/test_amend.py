"""Amending an image: what it becomes, as QEMU says, and what QEMU refuses."""

import asyncio
import contextlib
import errno
import json
import random
import subprocess
import threading

import pytest

from nbdqcow import open_image
from nbdqcow.block.node import Node
from nbdqcow.errors import BlockError, NotSupported
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.storage.memory import MemoryStorage
from tests.block.qemu import check, create
from tests.block.qemu import run_qemu_img as qemu_img
from tests.crash.histories import filled
from tests.crash.verdicts import check_by_us, is_sound
from tests.faults.faulty import FaultyStorage, Rule

KiB, MiB = 1 << 10, 1 << 20


def qemu_io(path, *commands):
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(
        ["qemu-io", "-f", "qcow2", *words, path], check=True, stdout=subprocess.DEVNULL
    )


def specific(path):
    info = json.loads(qemu_img("info", "--output=json", path).stdout)
    return info["format-specific"]["data"] | {"size": info["virtual-size"]}


def content(path, *options):
    raw = path.with_suffix(".raw")
    qemu_img("convert", *options, "-O", "raw", path, raw)
    return raw.read_bytes()


def amend(path, **options):
    seen = []

    async def run():
        async with open_image(path) as node:
            await node.amend(options, lambda done, total: seen.append((done, total)))

    asyncio.run(run())
    assert all(0 <= done <= total for done, total in seen)
    return seen


def text_of(options):
    words = {True: "on", False: "off"}
    return ",".join(
        f"{name}={words.get(value, value) if isinstance(value, bool) else value}"
        for name, value in options.items()
    )


GOOD = [
    ({}, {"compat": "0.10"}),
    ({"compat": "0.10"}, {"compat": "1.1"}),
    ({"compat": "0.10"}, {"compat": "v3", "lazy_refcounts": True}),
    ({"lazy_refcounts": "on"}, {"lazy_refcounts": False}),
    ({"lazy_refcounts": "on"}, {"compat": "v2"}),
    ({}, {"refcount_bits": 64}),
    ({"refcount_bits": 64}, {"refcount_bits": 1}),
    ({"refcount_bits": 8}, {"compat": "0.10", "refcount_bits": 16}),
    ({}, {"size": 9 * MiB, "refcount_bits": 8}),
    ({}, {"size": MiB + 512}),
    ({"cluster_size": 512, "refcount_bits": 2}, {"refcount_bits": 32}),
    ({}, {"data_file_raw": False}),
    ({"compat": "0.10"}, {"refcount_bits": 16, "compat": "0.10"}),
    ({"compression_type": "zstd"}, {"compat": "0.10"}),
]


@pytest.mark.parametrize(("made", "options"), GOOD)
def test_what_it_becomes(tmp_path, made, options):
    ours = create(tmp_path / "ours", **made)
    qemu_io(ours, "write -P 1 1M 200k", "write -P 2 3M 1M")
    theirs = tmp_path / "theirs"
    theirs.write_bytes(ours.read_bytes())
    before = content(ours)
    amend(ours, **options)
    qemu_img("amend", "-o", text_of(options), theirs)
    assert specific(ours) == specific(theirs)
    assert check(ours)["allocated-clusters"] == check(theirs)["allocated-clusters"]
    size = options.get("size", 4 * MiB)
    assert content(ours) == before[:size].ljust(size, b"\0")


BAD = [
    ({}, {"compat": "2"}),
    ({}, {"refcount_bits": 3}),
    ({}, {"refcount_bits": 128}),
    ({}, {"refcount_bits": 0}),
    ({}, {"data_file": "x"}),
    ({}, {"data_file_raw": True}),
    ({}, {"size": 1000}),
    ({"compat": "0.10"}, {"refcount_bits": 8}),
    ({"compat": "0.10"}, {"lazy_refcounts": True}),
    ({}, {"lazy_refcounts": True, "compat": "0.10"}),
    ({}, {"refcount_bits": 8, "compat": "0.10"}),
    ({"refcount_bits": 8}, {"compat": "0.10"}),
    ({"extended_l2": "on"}, {"compat": "0.10"}),
    ({}, {"backing_file": "x"}),
    ({}, {"nonsense": "x"}),
]


@pytest.mark.parametrize(("made", "options"), BAD)
def test_what_is_refused(tmp_path, made, options):
    path = create(tmp_path / "a", **made)
    theirs = qemu_img("amend", "-o", text_of(options), path, check=False)
    before = path.read_bytes()
    with pytest.raises(BlockError) as caught:
        amend(path, **options)
    assert theirs.stderr.splitlines()[0] == f"qemu-img: {caught.value}"
    assert path.read_bytes() == before


def test_counts_that_do_not_fit(tmp_path):
    path = create(tmp_path / "a")
    qemu_io(path, "write 0 64k")
    for name in "abcde":
        qemu_img("snapshot", "-c", name, path)
    with pytest.raises(BlockError) as caught:
        amend(path, refcount_bits=2)
    theirs = qemu_img("amend", "-o", "refcount_bits=2", path, check=False)
    assert theirs.stderr == f"qemu-img: {caught.value}\n"
    amend(path, refcount_bits=4)
    check(path)
    assert content(path, "-l", "c") == content(path)


def test_a_refcount_block_that_can_not_be(tmp_path):
    path = create(tmp_path / "a")
    with path.open("r+b") as file:
        file.seek(65536 + 5 * 8)
        file.write((1 << 50).to_bytes(8, "big"))
    with pytest.raises(BlockError, match="past the file's end"):
        amend(path, refcount_bits=8)
    assert specific(path)["refcount-bits"] == 16


def test_snapshots_and_downgrade(tmp_path):
    path = create(tmp_path / "a")
    qemu_img("snapshot", "-c", "s", path)
    qemu_img("resize", path, 8 * MiB)
    qemu_img("bitmap", "--add", path, "b")
    with pytest.raises(BlockError) as caught:
        amend(path, compat="0.10")
    assert [bitmap["name"] for bitmap in specific(path)["bitmaps"]] == ["b"]
    theirs = qemu_img("amend", "-o", "compat=0.10", path, check=False)
    assert theirs.stderr == f"qemu-img: {caught.value}\n"


def test_a_downgrade_to_the_size_of_the_snapshots(tmp_path):
    path = create(tmp_path / "a")
    qemu_io(path, "write -P 3 0 1M")
    qemu_img("snapshot", "-c", "s", path)
    qemu_img("resize", path, 8 * MiB)
    amend(path, compat="0.10", size=4 * MiB)
    check(path)
    assert specific(path)["compat"] == "0.10"
    assert specific(path)["size"] == 4 * MiB
    assert content(path) == b"\3" * MiB + bytes(3 * MiB)


@pytest.mark.parametrize("where", ["disk", "snapshot"])
def test_zstd_clusters_prevent_a_downgrade(tmp_path, where):
    path = create(tmp_path / "a", compression_type="zstd")
    qemu_io(path, "write -c -P 3 1M 64k")
    theirs = qemu_img("amend", "-o", "compat=0.10", path, check=False)
    qemu_img("bitmap", "--add", path, "b")
    if where == "snapshot":
        # QEMU does not look for them there, and they can't be read any more.
        qemu_img("snapshot", "-c", "s", path)
        qemu_io(path, "write -P 4 1M 64k")
    before = content(path), specific(path)
    with pytest.raises(BlockError) as caught:
        amend(path, compat="0.10")
    assert theirs.stderr == f"qemu-img: {caught.value}\n"
    assert (content(path), specific(path)) == before
    check(path)


async def until(condition):
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError


def test_what_was_compressed_before_a_downgrade_is_compressed_anew(tmp_path):
    path = create(tmp_path / "a", compression_type="zstd")
    noise, plain = random.Random(1).randbytes(64 * KiB), b"\5" * (64 * KiB)
    go_on = threading.Event()

    async def run():
        async with open_image(path) as node:
            clusters = node.driver.compressed
            compress, compressed = clusters.compress, []

            def slowly(data):
                packed = compress(data)
                compressed.append(bytes(data))
                if data == noise:
                    go_on.wait(30)
                return packed

            clusters.compress = slowly
            waiting = lambda: len(clusters.placing._waiters or ())  # noqa: E731
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(node.pwrite_compressed(0, noise))
                await until(lambda: compressed)
                amending = node.amend({"compat": "0.10"}, lambda *_: None)
                tasks.create_task(amending)
                await until(lambda: waiting() == 1)
                tasks.create_task(node.pwrite_compressed(64 * KiB, plain))
                await until(lambda: waiting() == 2 and len(compressed) == 2)
                go_on.set()
            assert await node.pread(0, 128 * KiB) == noise + plain

    asyncio.run(run())
    assert check(path)["compressed-clusters"] == 1
    assert specific(path)["compat"] == "0.10"
    assert content(path)[: 128 * KiB] == noise + plain


def test_an_old_snapshot_table_is_completed(tmp_path):
    path = create(tmp_path / "a", compat="0.10")
    qemu_io(path, "write -P 3 0 1M")
    qemu_img("snapshot", "-c", "s", path)
    qemu_img("snapshot", "-c", "t", path)
    cut_extra_data(path)
    qemu_io(path, "write -P 4 0 1M")
    amend(path, compat="1.1")
    check(path)
    assert specific(path)["compat"] == "1.1"
    assert content(path, "-l", "t") == b"\3" * MiB + bytes(3 * MiB)
    qemu_img("snapshot", "-a", "s", path)
    assert content(path) == b"\3" * MiB + bytes(3 * MiB)
    check(path)


def cut_extra_data(path):
    """Make the snapshot table one of before QEMU 1.1."""
    data = bytearray(path.read_bytes())
    offset = int.from_bytes(data[64:72], "big")
    entries, end = [], offset
    for _ in range(2):
        extra = int.from_bytes(data[end + 36 : end + 40], "big")
        names = sum(
            int.from_bytes(data[end + n : end + n + 2], "big") for n in (12, 14)
        )
        fixed = bytes(data[end : end + 36]) + bytes(4)
        start = end + 40 + extra
        entries.append(fixed + data[start : start + names])
        end = -(-(start + names) // 8) * 8
    table = b"".join(entry.ljust(-(-len(entry) // 8) * 8, b"\0") for entry in entries)
    data[offset:end] = table.ljust(end - offset, b"\0")
    path.write_bytes(data)


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_zero_clusters_become_plain(tmp_path, cluster_size, backed, seed):
    rnd = random.Random(seed)
    base = tmp_path / "base"
    base.write_bytes(rnd.randbytes(MiB))
    path = create(
        tmp_path / "a", MiB, backing=base if backed else None, cluster_size=cluster_size
    )
    contents = {}
    for name in ("s", "t", None):
        commands = []
        for _ in range(12):
            kind = rnd.choice(("write -P 7", "write -z", "write -zu", "discard"))
            offset = rnd.randrange(15) * 65536
            commands.append(f"{kind} {offset} {rnd.choice((512, 65536, 131072))}")
        qemu_io(path, *[c for c in commands if not c.startswith("discard")])
        if name:
            qemu_img("snapshot", "-c", name, path)
            contents[name] = content(path, "-l", name)
    now = content(path)
    seen = amend(path, compat="0.10")
    assert seen[-1][0] == seen[-1][1] > 0
    check(path)
    assert specific(path)["compat"] == "0.10"
    assert content(path) == now
    for name, expected in contents.items():
        assert content(path, "-l", name) == expected
    amend(path, compat="1.1")
    check(path)
    assert content(path) == now


def test_bitmaps_do_not_outlive_a_downgrade(tmp_path):
    path = create(tmp_path / "a")
    qemu_img("bitmap", "--add", path, "b")
    amend(path, compat="0.10")
    assert "bitmaps" not in specific(path)
    check(path)


def test_change_of_the_backing_file(tmp_path):
    for name in ("base", "other"):
        (tmp_path / name).write_bytes(name[:1].encode() * MiB)
    path = create(tmp_path / "a", MiB, backing="base")

    async def change(filename, format_name):
        async with open_image(path) as node:
            await node.driver.change_backing_file(filename, format_name)
            await node.pwrite(0, b"x")

    asyncio.run(change("other", "raw"))
    info = json.loads(qemu_img("info", "--output=json", path).stdout)
    assert info["backing-filename"] == "other"
    assert info["backing-filename-format"] == "raw"
    assert content(path)[65536:] == b"o" * (MiB - 65536)
    asyncio.run(change(None, None))
    info = json.loads(qemu_img("info", "--output=json", path).stdout)
    assert "backing-filename" not in info
    assert "backing-filename-format" not in info
    assert content(path)[65536:] == bytes(MiB - 65536)
    with pytest.raises(BlockError, match="name too long"):
        asyncio.run(change("a", "b" * 16))
    with pytest.raises(BlockError, match="name too long"):
        asyncio.run(change("a" * 1024, None))


@pytest.mark.asyncio
async def test_amending_under_load(tmp_path, seed):
    rnd = random.Random(seed)
    base = tmp_path / "base"
    base.write_bytes(rnd.randbytes(2 * MiB))
    path = create(tmp_path / "a", 2 * MiB, backing=base)
    expected = bytearray(base.read_bytes())
    steps = [
        {"refcount_bits": 64, "lazy_refcounts": True},
        {"refcount_bits": 16, "compat": "0.10"},
        {"compat": "1.1", "lazy_refcounts": True},
        {"refcount_bits": 1, "lazy_refcounts": False},
    ]
    stop = False

    async def client(number):
        mine = random.Random(seed + number)
        while not stop:
            await asyncio.sleep(0)
            offset = number * 512 * KiB + mine.randrange(400) * KiB
            length = mine.choice((512, 5000, 65536))
            data = mine.randbytes(length) if mine.random() < 0.7 else bytes(length)
            if data.strip(b"\0") or mine.random() < 0.5:
                if not node.try_pwrite(offset, data):
                    await node.pwrite(offset, data)
            else:
                await node.write_zeroes(offset, length, may_unmap=mine.random() < 0.5)
            expected[offset : offset + length] = data
            if mine.random() < 0.1:
                await node.flush()

    async with open_image(path) as node:
        clients = [asyncio.create_task(client(number)) for number in range(4)]
        for options in steps * 2:
            for _ in range(5):
                await asyncio.sleep(0.001)
            await node.amend(options, lambda done, total: None)
        stop = True
        await asyncio.gather(*clients)
    check(path)
    assert content(path) == expected


@pytest.mark.asyncio
async def test_operations_at_the_same_time(tmp_path, seed):
    """They wait for each other; what is not possible any more is refused."""
    rnd = random.Random(seed)
    path = create(tmp_path / "a", MiB, lazy_refcounts="on")
    nb_done = 0

    async def attempt(operation):
        nonlocal nb_done
        try:
            await operation
            nb_done += 1
        except BlockError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTSUP, errno.EINVAL):
                raise

    async def client():
        while nb_done + 1 < len(work):
            await asyncio.sleep(0)
            size = min(node.size, MiB // 2)
            offset = rnd.randrange(0, size // 2, 512)
            with contextlib.suppress(BlockError):
                await node.pwrite(offset, rnd.randbytes(size // 4))

    async with open_image(path) as node:
        driver = node.driver
        work = []
        for _ in range(8):
            work += [
                node.resize(rnd.randrange(MiB // 512, 8 * MiB // 512) * 512),
                driver.snapshot_create("s"),
                driver.snapshot_apply("s"),
                driver.snapshot_delete("s"),
                node.amend({"refcount_bits": rnd.choice((16, 64))}, lambda *_: None),
                node.amend({"lazy_refcounts": rnd.random() < 0.5}, lambda *_: None),
            ]
        rnd.shuffle(work)
        writer = asyncio.create_task(client())
        await asyncio.gather(*map(attempt, work))
        writer.cancel()
        await asyncio.gather(writer, return_exceptions=True)
        await node.flush()
        expected = bytes(await node.pread(0, node.size))
    check(path)
    assert content(path) == expected
    assert nb_done > 10


@pytest.mark.parametrize("what", ["table", "zero cluster", "metadata"])
def test_a_downgrade_writes_to_no_place_that_can_not_be(tmp_path, what):
    path = create(tmp_path / "a")
    qemu_io(path, "write -P 5 0 64k", "write -P 6 64k 64k")
    image = bytearray(path.read_bytes())
    l1_offset = int.from_bytes(image[40:48], "big")
    l2_offset = int.from_bytes(image[l1_offset : l1_offset + 8], "big") & ~(1 << 63)
    second = int.from_bytes(image[l2_offset + 8 :][:8], "big") & ~(1 << 63)
    place, entry = {
        "table": (l1_offset, l2_offset + 0x2A00),
        "zero cluster": (l2_offset, second | 0x2A01),
        "metadata": (l2_offset, l1_offset | 1),
    }[what]
    image[place : place + 8] = (entry | 1 << 63).to_bytes(8, "big")
    path.write_bytes(image)
    with pytest.raises(BlockError) as caught:
        amend(path, compat="0.10")
    assert caught.value.errno == errno.EIO
    assert specific(path)["corrupt"]
    assert path.read_bytes()[512 : len(image)] == image[512:]


def test_refcounts_of_another_width_while_clusters_wait_to_be_given_back(tmp_path):
    """What a deleted snapshot had is given back once no read is left, by then
    with other refcount blocks."""
    path = create(tmp_path / "a", MiB, cluster_size=512)

    async def run():
        async with open_image(path) as node:
            await node.pwrite(0, b"x" * 200 * KiB)
            await node.driver.snapshot_create("one")
            await node.pwrite(150 * KiB, b"y" * 25 * KiB)
            reading = node.driver.epochs.enter()
            await node.driver.snapshot_delete("one")
            await node.amend({"refcount_bits": 64}, lambda done, total: None)
            node.driver.epochs.leave(reading)

    asyncio.run(run())
    check(path)
    disk = b"x" * 150 * KiB + b"y" * 25 * KiB + b"x" * 25 * KiB
    assert content(path) == disk + bytes(824 * KiB)


def test_a_downgrade_while_tables_wait_to_be_given_back(tmp_path):
    """A table that two snapshots had, and then the disk no longer, is counted once
    more than it has users while a read is in flight."""
    path = create(tmp_path / "a", 64 * KiB, cluster_size=512)

    async def run():
        async with open_image(path) as node:
            await node.pwrite(0, b"x" * 4 * KiB)
            await node.write_zeroes(KiB, KiB, may_unmap=False)
            await node.driver.snapshot_create("one")
            await node.driver.snapshot_create("two")
            reading = node.driver.epochs.enter()
            await node.pwrite(6 * KiB, b"y" * KiB)
            await node.flush()
            await node.amend({"compat": "0.10"}, lambda done, total: None)
            node.driver.epochs.leave(reading)

    asyncio.run(run())
    assert "leaks" not in check(path)
    start = b"x" * KiB + bytes(KiB) + b"x" * 2 * KiB
    assert content(path) == start + bytes(2 * KiB) + b"y" * KiB + bytes(57 * KiB)
    assert content(path, "-l", "two") == start + bytes(60 * KiB)


def test_no_bitmap_is_added_while_an_image_is_downgraded():
    """Version 2 has no place for it."""

    async def run():
        memory = MemoryStorage(filled(6))
        storage = FaultyStorage(memory)
        driver = await Qcow2Driver.open(storage, read_only=False, options={})
        node = Node(driver, filename="disk")
        driver.bitmap_add("old")
        # Each request takes turns of the loop.
        storage.rules = [Rule(0, count=-1, turns=2)]
        options = {"compat": "0.10"}
        task = asyncio.create_task(node.amend(options, lambda done, total: None))
        names = {"old"}
        while not task.done():
            await asyncio.sleep(0)
            with contextlib.suppress(NotSupported, BlockError):
                driver.bitmap_add(f"b{len(names)}")
                names.add(f"b{len(names)}")
        await task
        assert driver.bitmap_list() == []
        await node.close()
        result, text = check_by_us(bytes(memory.data))
        assert is_sound(result, leaks=False), text

    asyncio.run(run())


@pytest.mark.parametrize("may_unmap", [True, False])
def test_zeroes_that_meet_a_downgrade(tmp_path, may_unmap):
    """Version 2 has no zero flag: an entry with it shows what was there before."""
    below = create(tmp_path / "below", 64 * KiB)
    qemu_io(below, "write -P 98 0 64k")
    path = tmp_path / "a"
    qemu_img("create", "-f", "qcow2", "-b", below, "-F", "qcow2", path)

    async def run():
        async with open_image(path) as node:
            await node.pwrite(0, b"x" * 64 * KiB)
            # What is found while the image is busy has to wait.
            await node.driver.lock.acquire()
            zeroed = asyncio.create_task(
                node.write_zeroes(0, 64 * KiB, may_unmap=may_unmap)
            )
            discarded = asyncio.create_task(node.discard(0, 64 * KiB))
            await asyncio.sleep(0)
            node.driver.header.version = 2
            node.driver.rebind()
            node.driver.lock.release()
            await zeroed
            await discarded
            assert await node.pread(0, 64 * KiB) == bytes(64 * KiB)
            node.driver.header.version = 3
            node.driver.rebind()

    asyncio.run(run())
    check(path)
    assert content(path) == bytes(64 * KiB)

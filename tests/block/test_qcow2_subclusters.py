"""Images with subclusters: what QEMU makes of ours, and we of QEMU's."""

import asyncio
import contextlib
import os
import random
import shutil
import struct

import pytest

from nbdqcow import open_image
from nbdqcow.block.node import Node
from nbdqcow.block.tools import REPAIR_ALL, REPAIR_NONE
from nbdqcow.errors import BlockError, CorruptImage, NotSupported
from nbdqcow.formats.qcow2.create import CreateOptions, create
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.formats.qcow2.tool import Qcow2Tool
from nbdqcow.storage.memory import MemoryStorage
from nbdqcow.types import DATA, UNALLOCATED, ZERO, ZERO_ALLOCATED
from tests.block.qemu import check, qemu_img
from tests.block.qemu import create as qemu_create
from tests.block.test_qcow2_driver import patch
from tests.block.test_status import our_map, qemu_io, qemu_map
from tests.builder import BytesFile, l2_table_offset

KiB, MiB = 1 << 10, 1 << 20
SEED = int(os.environ.get("NBDQCOW_SEED", random.randrange(1 << 32)))
CORRUPT = 1 << 1
GEOMETRIES = [(16 * KiB, 512), (64 * KiB, 2 * KiB), (2 * MiB, 64 * KiB)]


def create_extended(path, size, cluster_size=64 * KiB, base=None, **options):
    text = ",".join(f"{k}={v}" for k, v in options.items())
    text = f"extended_l2=on,cluster_size={cluster_size}{',' + text if text else ''}"
    backing = ["-b", base, "-F", "qcow2"] if base else []
    qemu_img("create", "-qf", "qcow2", "-o", text, *backing, path, size)
    return path


async def memory_node(**options):
    """Return a node on a new image in memory, 64 KiB in a cluster."""
    storage = MemoryStorage()
    await create(storage, CreateOptions(size=MiB, extended_l2=True, **options))
    driver = await Qcow2Driver.open(storage, read_only=False, options={})
    return Node(driver, filename="memory")


def entry(node, guest_offset):
    """Return the L2 entry of a guest offset: its two words."""
    tables = node.driver.tables
    words = tables.young[guest_offset >> tables.slice_shift].words
    index = (guest_offset >> node.driver.cluster_bits) % tables.slice_entries
    return words[2 * index], words[2 * index + 1]


def random_commands(rnd, size, unit, nb):
    """Draw requests, half of them aligned to subclusters."""
    commands = []
    for _ in range(nb):
        length = rnd.choice((512, unit, 3 * unit, 40 * unit))
        length = min(size, rnd.randrange(1, 3) * length)
        offset = rnd.randrange(0, size - length + 1, 512)
        if rnd.random() < 0.5:
            offset -= offset % unit
            length = min(size - offset, -(-length // unit) * unit)
        commands.append((rnd.choice("wwwwzu"), offset, length))
    return commands


@pytest.mark.parametrize(("cluster_size", "unit"), GEOMETRIES)
@pytest.mark.parametrize("limit", [7, 1 << 17])
def test_a_chain_as_qemu_sees_it(tmp_path, cluster_size, unit, limit):
    rnd = random.Random(SEED)
    print(f"NBDQCOW_SEED={SEED}")
    base = None
    for level, nb_clusters in enumerate((12, 8, 14)):
        path, size = tmp_path / f"{level}.qcow2", nb_clusters * cluster_size + 512
        create_extended(path, size, cluster_size, base)
        verbs = {"w": "write", "z": "write -z", "u": "write -zu"}
        commands = random_commands(rnd, size, unit, 30)
        qemu_io(
            path, *(f"{verbs[v]} {offset} {length}" for v, offset, length in commands)
        )
        base = path
    assert asyncio.run(our_map(path, limit)) == qemu_map(path)


@pytest.mark.parametrize(("cluster_size", "unit"), GEOMETRIES)
@pytest.mark.parametrize("with_backing", [False, True])
def test_the_same_writes_give_the_same_map(tmp_path, cluster_size, unit, with_backing):
    rnd = random.Random(SEED)
    print(f"NBDQCOW_SEED={SEED}")
    size = 6 * cluster_size
    base = None
    if with_backing:
        base = create_extended(tmp_path / "base", size, cluster_size)
        qemu_io(base, f"write -P 7 0 {size // 2}")
    ours = create_extended(tmp_path / "ours", size, cluster_size, base)
    theirs = tmp_path / "theirs"
    shutil.copy(ours, theirs)
    commands = [c for c in random_commands(rnd, size, unit, 60) if c[0] == "w"]
    qemu_io(theirs, *(f"write -P {i} {o} {n}" for i, (_, o, n) in enumerate(commands)))

    async def run():
        async with open_image(ours) as node:
            for i, (_, offset, length) in enumerate(commands):
                data = bytes([i]) * length
                if i % 2 or not node.try_pwrite(offset, data):
                    await node.pwrite(offset, data)

    asyncio.run(run())
    check(ours)
    assert qemu_map(ours) == qemu_map(theirs)
    qemu_img("compare", "-q", ours, theirs)


@pytest.mark.asyncio
async def test_only_partial_subclusters_are_completed():
    node = await memory_node()
    plan = await node.driver.begin_write(5000, 100)
    assert (plan.head, plan.tail, plan.reads_zero) == (5000 - 4096, 6144 - 5100, True)
    node.driver.abort_write(plan)
    await node.pwrite(4096, b"x" * 2048)
    assert entry(node, 0)[1] == 1 << 2
    # The first subcluster is there, the last one is not: one tail, no head.
    plan = await node.driver.begin_write(5000, 2000)
    assert (plan.head, plan.tail, plan.reads_zero) == (0, 8192 - 7000, False)
    node.driver.abort_write(plan)
    assert entry(node, 0)[1] == 1 << 2
    assert node.try_pwrite(5000, b"y" * 2000)
    assert entry(node, 0)[1] == 0b1100
    expected = b"x" * 904 + b"y" * 2000 + bytes(1192)
    assert bytes(await node.pread(4096, 4096)) == expected
    assert await node.driver.map(4096, 60000) == (
        DATA, (entry(node, 0)[0] & 0xFFFF_FFFF) + 4096, 4096,
    )  # fmt: skip
    # The cluster has a place for its other subclusters, the rest has none.
    place = (entry(node, 0)[0] & 0xFFFF_FFFF) + 8192
    assert await node.driver.map(8192, MiB - 8192) == (UNALLOCATED, place, 57344)
    assert await node.driver.map(65536, MiB - 65536) == (UNALLOCATED, 0, MiB - 65536)
    await node.close()


@pytest.mark.asyncio
async def test_writers_in_one_cluster_at_the_same_time():
    """The first waits for nobody, the second for the first one's cluster, and
    then two may fill subclusters of it beside each other."""
    node = await memory_node()
    driver = node.driver
    first = await driver.begin_write(0, 2048)
    second = asyncio.create_task(driver.begin_write(4096, 2048))
    await asyncio.sleep(0)
    assert not second.done()
    assert driver.try_begin_write(4096, 2048) is None
    await driver.data.pwritev(first.host_offset, [b"1" * 2048])
    driver.end_write(first)
    plan = await second
    assert plan.host_offset == first.host_offset + 4096
    third = await driver.begin_write(8192, 4096)
    assert third.host_offset == first.host_offset + 8192
    same = asyncio.create_task(driver.begin_write(8192 + 512, 512))
    zero = asyncio.create_task(node.write_zeroes(2048, 2048))
    await asyncio.sleep(0)
    assert not same.done()
    assert not zero.done()
    await driver.data.pwritev(third.host_offset, [b"3" * 4096])
    driver.end_write(third)
    assert entry(node, 0)[1] == 0b110001
    driver.end_write(await same)
    await driver.data.pwritev(plan.host_offset, [b"2" * 2048])
    driver.end_write(plan)
    await zero
    assert entry(node, 0)[1] & 0xFFFFFFFF == 0b110101
    expected = b"1" * 2048 + bytes(2048) + b"2" * 2048 + bytes(2048) + b"3" * 4096
    assert bytes(await node.pread(0, 12288)) == expected
    await node.close()


@pytest.mark.asyncio
async def test_a_shared_cluster_is_copied_from_what_is_stored_in_it():
    node = await memory_node()
    for index in (3, 9):
        await node.pwrite(index * 2048, bytes([index]) * 2048)
    await node.driver.snapshot_create("s")
    # More than the subclusters that it touches: not without waiting.
    assert node.driver.try_begin_write(6 * 2048, 2048) is None
    await node.pwrite(6 * 2048 + 10, b"abc")
    assert entry(node, 0)[1] == 0b11_1111_1000
    for index in (3, 9):
        data = await node.pread(index * 2048, 2048)
        assert bytes(data) == bytes([index]) * 2048
    assert bytes(await node.pread(6 * 2048, 14)) == bytes(10) + b"abc\0"
    await node.driver.snapshot_apply("s")
    assert bytes(await node.pread(6 * 2048, 14)) == bytes(14)
    await node.close()
    found = []
    result = Qcow2Tool().check(
        BytesFile(node.driver.storage.data), REPAIR_NONE, found.append
    )
    assert (result.corruptions, result.leaks) == (0, 0), found


@pytest.mark.asyncio
async def test_zeroing_subclusters():
    node = await memory_node(backing_file="base", backing_format="raw")
    driver = node.driver
    await node.pwrite(0, b"x" * 65536)
    host = entry(node, 0)[0]
    await node.write_zeroes(2048, 4096, may_unmap=True, no_fallback=True)
    assert entry(node, 0) == (host, 0b110 << 32 | 0xFFFF_FFF9)
    run = await driver.map(2048, 65536)
    assert run == (ZERO_ALLOCATED, (host & 0xFFFF_FFFF) + 2048, 4096)
    # Nothing of it is stored any more: its cluster goes.
    await node.write_zeroes(6144, 65536 - 6144, may_unmap=True)
    await node.write_zeroes(0, 2048, may_unmap=True)
    assert entry(node, 0) == (0, 0xFFFF_FFFF << 32)
    assert await driver.map(0, 65536) == (ZERO, 0, 65536)
    await node.pwrite(65536, b"y" * 65536)
    host = entry(node, 65536)[0]
    await node.write_zeroes(65536, 65536, may_unmap=False)
    assert entry(node, 65536) == (host, 0xFFFF_FFFF << 32)
    # Unallocated, and the backing file (there is none here) is all zero.
    await node.write_zeroes(131072 + 100, 50, may_unmap=False)
    assert entry(node, 131072) == (0, 1 << 32)
    await node.pwrite(196608, b"z" * 2048)
    await node.discard(196608, 65536)
    assert entry(node, 196608) == (0, 0xFFFF_FFFF << 32)
    await node.close()


@pytest.mark.asyncio
async def test_the_end_of_the_image_is_in_the_middle_of_a_subcluster():
    storage = MemoryStorage()
    size = 65536 + 20 * 2048 + 512
    await create(storage, CreateOptions(size=size, extended_l2=True))
    driver = await Qcow2Driver.open(storage, read_only=False, options={})
    node = Node(driver, filename="memory")
    await node.pwrite(size - 100, b"e" * 100)
    assert entry(node, 65536)[1] == 1 << 20
    await node.write_zeroes(size - 512, 512, may_unmap=True)
    assert entry(node, 65536)[1] & 0xFFFF_FFFF == 0
    assert bytes(await node.pread(size - 512, 512)) == bytes(512)
    await node.close()


def test_a_compressed_cluster_is_replaced_as_a_whole(tmp_path):
    raw, path = tmp_path / "raw", tmp_path / "a"
    raw.write_bytes(b"abcd" * (MiB // 4))
    qemu_img("convert", "-cf", "raw", "-O", "qcow2", "-o", "extended_l2=on", raw, path)

    async def run():
        async with open_image(path) as node:
            assert node.try_pwrite(10000, b"x") is False
            with pytest.raises(NotSupported):
                await node.write_zeroes(65536, 2048, no_fallback=True)
            await node.pwrite(10000, b"x")
            assert entry(node, 0)[1] == 0xFFFF_FFFF
            await node.write_zeroes(65536, 2048)
            assert bytes(await node.pread(65536, 4096)) == bytes(2048) + b"abcd" * 512
            await node.write_zeroes(131072, 65536)

    asyncio.run(run())
    check(path)
    expected = bytearray(raw.read_bytes())
    expected[10000:10001] = b"x"
    expected[65536 : 65536 + 2048] = bytes(2048)
    expected[131072 : 131072 + 65536] = bytes(65536)
    raw.write_bytes(expected)
    qemu_img("compare", "-q", "-f", "raw", "-F", "qcow2", raw, path)


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("with_backing", [False, True])
def test_what_we_create(tmp_path, preallocation, with_backing):
    base = qemu_create(tmp_path / "base", 4 * MiB)
    qemu_io(base, "write -P 5 1M 1M")
    options = {"backing_file": str(base), "backing_format": "qcow2"}
    path, theirs = tmp_path / "ours", tmp_path / "theirs"
    create_extended(
        theirs,
        4 * MiB,
        base=base if with_backing else None,
        preallocation=preallocation,
    )

    class File(BytesFile):
        def allocate(self, offset, length):
            self.data[offset : offset + length] = bytes(length)

    file = File()
    tool = Qcow2Tool()
    plan = tool.prepare(
        {
            "size": 4 * MiB,
            "extended_l2": True,
            "preallocation": preallocation,
            **(
                {"backing_file": str(base), "backing_fmt": "qcow2"}
                if with_backing
                else {}
            ),
        }
    )
    tool.create(file, plan)
    path.write_bytes(file.data)
    assert options
    check(path)
    assert qemu_map(path) == qemu_map(theirs)
    before = path.stat().st_size

    async def run():
        async with open_image(path) as node:
            await node.pwrite(MiB + 5000, b"x" * MiB)

    asyncio.run(run())
    check(path)
    if preallocation != "off":
        assert path.stat().st_size == before
    expected = bytearray(4 * MiB)
    if with_backing:
        expected[MiB : 2 * MiB] = b"\x05" * MiB
    expected[MiB + 5000 : 2 * MiB + 5000] = b"x" * MiB
    (tmp_path / "raw").write_bytes(expected)
    qemu_img("compare", "-q", "-f", "raw", "-F", "qcow2", tmp_path / "raw", path)


@pytest.mark.parametrize(
    "words",
    [
        (None, 1 << 32 | 1),
        (None, 1 << 63 | 0xFFFF_FFFF),
        (0, 0xFFFF_FFFF),
        (0, 1 << 31),
    ],
)
@pytest.mark.parametrize("what", ["read", "status", "write", "zero", "read-only"])
def test_a_bitmap_that_can_not_be(tmp_path, words, what):
    path = create_extended(tmp_path / "a", MiB)
    qemu_io(path, "write -P 1 0 64k", "write -P 2 64k 64k")
    data = path.read_bytes()
    offset = l2_table_offset(data)
    host = int.from_bytes(data[offset : offset + 8], "big")
    patch(path, offset, struct.pack(">QQ", host if words[0] is None else 0, words[1]))

    async def run():
        async with open_image(path, read_only=what == "read-only") as node:
            with pytest.raises(CorruptImage, match="subcluster bitmap"):
                if what in ("read", "read-only"):
                    assert node.try_pread(0, 65536) is None
                    await node.pread(0, 65536)
                elif what == "status":
                    await node.block_status(0, MiB)
                elif what == "write":
                    # Not what is sound of it, which may be written in place.
                    bad = 31 * 2048 if words[1] >> 63 else 0
                    assert not node.try_pwrite(bad, b"x")
                    await node.pwrite(bad, b"x")
                else:
                    await node.write_zeroes(0, 4096)

    asyncio.run(run())
    features = int.from_bytes(path.read_bytes()[72:80], "big")
    assert bool(features & CORRUPT) == (what != "read-only")


@pytest.mark.parametrize(
    ("bitmap", "text"), [(1 << 32 | 1, "host"), (1 << 5, "no host")]
)
def test_check_finds_a_bitmap_that_can_not_be(tmp_path, bitmap, text):
    path = create_extended(tmp_path / "a", MiB)
    qemu_io(path, "write -P 1 64k 64k")
    offset = l2_table_offset(path.read_bytes())
    at = offset + (24 if text == "host" else 8)
    patch(path, at, bitmap.to_bytes(8, "big"))
    found = []
    file = BytesFile(path.read_bytes())
    result = Qcow2Tool().check(file, REPAIR_ALL, found.append)
    assert result.corruptions == 1
    assert any("subcluster" in line for line in found), found


@pytest.mark.asyncio
async def test_runs_extents_and_single_bytes_agree():
    print(f"NBDQCOW_SEED={SEED}")
    rnd = random.Random(SEED)
    node = await memory_node()
    for verb, offset, length in random_commands(rnd, MiB, 2048, 60):
        if verb == "w":
            await node.pwrite(offset, rnd.randbytes(length))
        else:
            await node.write_zeroes(offset, length, may_unmap=verb == "u")
    driver = node.driver
    kinds = [(await driver.map(o, 512))[0] for o in range(0, MiB, 512)]
    offset = rnd.randrange(0, 65536, 512)
    extents = await driver.extents(offset, MiB - offset, 1 << 17)
    of_extents = []
    for length, kind in zip(
        extents.lengths.tolist(), extents.kinds.tolist(), strict=True
    ):
        of_extents += [kind] * (length // 512)
    assert of_extents == kinds[offset // 512 :]
    of_runs = []
    while offset < MiB:
        kind, host_offset, length = await driver.map(offset, MiB - offset)
        assert host_offset == (await driver.map(offset + length - 512, 512))[1] - (
            length - 512 if host_offset else 0
        )
        of_runs += [kind] * (length // 512)
        offset += length
    assert of_runs == of_extents
    await node.close()


@pytest.mark.parametrize("round_", range(4))
@pytest.mark.asyncio
async def test_damaged_entries_end_in_errors(round_):
    """Whatever an L2 table holds, requests end with data or a `BlockError`, and
    nothing is written over metadata."""
    print(f"NBDQCOW_SEED={SEED}")
    rnd = random.Random(SEED + round_)
    node = await memory_node()
    for offset in range(0, MiB, 65536):
        await node.pwrite(offset + 2048 * rnd.randrange(31), b"x" * 4096)
    await node.close()
    image = bytes(node.driver.storage.data)
    table = l2_table_offset(image)
    for _ in range(12):
        data = bytearray(image)
        for _ in range(rnd.randrange(1, 5)):
            index = table + 8 * rnd.randrange(32)
            word = int.from_bytes(data[index : index + 8], "big")
            word = rnd.choice(
                (
                    word ^ 1 << rnd.randrange(64),
                    rnd.randrange(16) << 16 | 1 << 63,
                    rnd.randrange(1 << 64),
                )
            )
            data[index : index + 8] = word.to_bytes(8, "big")
        # Entries may name any offset: the device is soon full.
        storage = MemoryStorage(bytes(data), max_length=64 * MiB)
        driver = await Qcow2Driver.open(storage, read_only=False, options={})
        node = Node(driver, filename="memory")
        metadata = [
            (i << 16, bytes(storage.data[i << 16 : (i + 1) << 16]))
            for i in (1, 3)  # the refcount table, the L1 table
        ]
        for _ in range(40):
            offset = rnd.randrange(0, MiB, 512)
            length = min(rnd.choice((512, 4096, 70000)), MiB - offset)
            with contextlib.suppress(BlockError):
                kind = rnd.randrange(5)
                if kind == 0:
                    await node.pread(offset, length)
                elif kind == 1:
                    if not node.try_pwrite(offset, b"y" * length):
                        await node.pwrite(offset, b"y" * length)
                elif kind == 2:
                    await node.write_zeroes(
                        offset, length, may_unmap=rnd.random() < 0.5
                    )
                elif kind == 3:
                    await node.discard(offset, length)
                else:
                    await node.block_status(offset, length)
        for offset, old in metadata:
            assert bytes(storage.data[offset : offset + len(old)]) == old
        with contextlib.suppress(BlockError):
            await node.close()
        found = []
        Qcow2Tool().check(BytesFile(bytes(storage.data)), REPAIR_ALL, found.append)

"""The qcow driver on files in memory: mapping, allocation, damage, memory."""

import asyncio
import errno
import random

import pytest

from nbdqcow.block.node import Node
from nbdqcow.block.status import STATE_HOLE, STATE_ZERO
from nbdqcow.errors import BlockError, CorruptImage, ImageError, NotSupported
from nbdqcow.formats.qcow1.create import CreateOptions, create
from nbdqcow.formats.qcow1.driver import Qcow1Driver
from nbdqcow.formats.qcow1.header import compressed_range
from nbdqcow.formats.raw import RawDriver
from nbdqcow.storage.memory import MemoryStorage
from nbdqcow.types import COMPRESSED, DATA, UNALLOCATED
from tests.builder import patched
from tests.qcow1_image import Image, Packed, Plain, check

KiB, MiB = 1 << 10, 1 << 20
KEY = b"a passphrase that is too long"


async def open_node(
    data: bytes, *, read_only: bool = False, below: bytes | None = None, **options
) -> Node:
    storage = MemoryStorage(data, read_only=read_only)
    driver = await Qcow1Driver.open(storage, read_only=read_only, options=options)
    backing = None
    if below is not None:
        raw = MemoryStorage(below, read_only=True)
        backing = Node(
            await RawDriver.open(raw, read_only=True, options={}), filename="below"
        )
    return Node(driver, filename="memory", backing=backing)


async def new_image(size: int, **options) -> bytes:
    storage = MemoryStorage()
    await create(storage, CreateOptions(size=size, **options))
    return bytes(storage.data)


def file_of(node: Node) -> bytes:
    storage = node.driver.storage
    assert isinstance(storage, MemoryStorage)
    return bytes(storage.data)


def random_image(rnd: random.Random, **options) -> Image:
    """Return an image with clusters of all kinds at random places."""
    bits, l2_bits = rnd.randrange(9, 17), rnd.randrange(6, 14)
    size = (rnd.randrange(1, 60) << bits) - 512 * rnd.randrange(0, 1 << bits - 9)
    clusters: dict[int, Plain | Packed] = {}
    for index in rnd.sample(range(-(-size >> bits)), rnd.randrange(-(-size >> bits))):
        if rnd.random() < 0.4:
            clusters[index] = Packed(rnd.randbytes(100) * 3, rnd.randrange(1, 10))
        else:
            clusters[index] = Plain(rnd.randbytes(1 << bits))
    return Image(
        size, bits, l2_bits, clusters, gap=512 * rnd.randrange(3), **options
    )  # fmt: skip


# -- reading -------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("key", [None, KEY])
async def test_built_images_are_read(seed, key):
    rnd = random.Random(seed)
    for _ in range(8):
        below = rnd.randbytes(rnd.randrange(1, 200) * 512)
        image = random_image(
            rnd, key=key, backing=b"below", name_at_end=rnd.random() < 0.5
        )
        data = image.build()
        check(data)
        node = await open_node(data, read_only=True, below=below, secret=key)
        assert bytes(await node.pread(0, node.size)) == image.content(below)
        for _ in range(20):
            offset = rnd.randrange(node.size)
            length = rnd.randrange(1, min(node.size - offset, 100_000) + 1)
            expected = image.content(below)[offset : offset + length]
            assert bytes(await node.pread(offset, length)) == expected
            inline = node.try_pread(offset, length)
            assert inline is None or bytes(inline) == expected
        await node.close()


@pytest.mark.asyncio
async def test_runs_are_coalesced_over_slices_and_tables():
    bits, l2_bits = 9, 10
    nb = 3 << l2_bits
    rnd = random.Random(1)
    clusters = {i: Plain(rnd.randbytes(512)) for i in range(100, nb - 100)}
    data = Image(nb << bits, bits, l2_bits, clusters).build()
    node = await open_node(data)
    driver = node.driver
    assert await driver.map(0, node.size) == (UNALLOCATED, 0, 100 << bits)
    # The builder stores clusters in guest order, tables behind them all.
    kind, host_offset, length = await driver.map(100 << bits, node.size - (100 << bits))
    assert (kind, length) == (DATA, nb - 200 << bits)
    assert data[host_offset : host_offset + 512] == clusters[100].data
    kind, inner, length = await driver.map(200 * 512 + 7, 9000)
    assert (kind, inner, length) == (DATA, host_offset + 100 * 512 + 7, 9000)
    await node.close()


@pytest.mark.asyncio
async def test_extents(seed):
    rnd = random.Random(seed)
    image = random_image(rnd)
    node = await open_node(image.build(), read_only=True)
    expected = []
    for index in range(-(-image.size >> image.cluster_bits)):
        content = image.clusters.get(index)
        kind = UNALLOCATED if content is None else DATA
        kind = COMPRESSED if isinstance(content, Packed) else kind
        expected += [kind] * min(
            image.cluster_size, image.size - index * image.cluster_size
        )
    for limit in (1, 2, 1000):
        offset = rnd.randrange(image.size)
        position = offset
        while position < image.size:
            found = await node.driver.extents(position, image.size - position, limit)
            assert len(found.lengths) <= limit
            for length, kind in zip(found.lengths, found.kinds, strict=True):
                end = position + int(length)
                assert set(expected[position:end]) == {int(kind)}
                position = end
    status = await node.block_status(0, image.size)
    for length, state in zip(status.lengths, status.states, strict=True):
        assert int(state) in (0, STATE_HOLE | STATE_ZERO)
        assert length
    await node.close()


@pytest.mark.asyncio
async def test_extents_of_a_huge_empty_image():
    node = await open_node(await new_image(3 << 40))
    found = await node.driver.extents(12345, node.size - 12345, 10)
    assert [int(n) for n in found.lengths] == [node.size - 12345]
    await node.pwrite((2 << 40) + 5, b"x")
    found = await node.driver.extents(0, node.size, 10)
    lengths = [int(n) for n in found.lengths]
    assert lengths == [2 << 40, 4096, node.size - (2 << 40) - 4096]
    await node.close()


@pytest.mark.asyncio
async def test_a_wrong_passphrase_is_not_noticed_but_a_missing_one_is():
    data = Image(4096, key=KEY, clusters={0: Plain(b"data" * 1024)}).build()
    with pytest.raises(ImageError, match="passphrase is required"):
        await open_node(data)
    node = await open_node(data, secret=b"wrong")
    assert bytes(await node.pread(0, 4)) != b"data"
    await node.close()


# -- writing -------------------------------------------------------------------


async def change_at_random(
    rnd: random.Random, node: Node, disk: bytearray, nb_changes: int
) -> None:
    encrypted = node.driver.header.crypt_method
    cluster = node.driver.cluster_size
    for _ in range(nb_changes):
        offset = rnd.randrange(node.size)
        length = min(
            node.size - offset, rnd.choice((1, 512, 1000, 4096, 70_000, 200_000))
        )
        kind = rnd.random()
        if kind < 0.45:
            data = rnd.randbytes(length)
            if not node.try_pwrite(offset, data):
                await node.pwrite(offset, data)
        elif kind < 0.6 and not encrypted:
            offset -= offset % cluster
            length = min(cluster, node.size - offset)
            word = rnd.randbytes(rnd.choice((8, cluster)))
            data = (word * (length // len(word) + 1))[:length]
            await node.driver.write_compressed(offset, data)
        elif kind < 0.7:
            data = bytes(length)
            await node.write_zeroes(offset, length)
        elif kind < 0.8:
            await node.flush()
            continue
        else:
            got = bytes(await node.pread(offset, length))
            assert got == disk[offset : offset + length]
            continue
        disk[offset : offset + length] = data


@pytest.mark.asyncio
@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("with_backing", [False, True])
async def test_random_changes(seed, key, with_backing):
    rnd = random.Random(seed)
    for _ in range(3):
        below = rnd.randbytes(rnd.randrange(1, 500) * 512) if with_backing else None
        image = random_image(rnd, key=key, backing=b"below" if with_backing else b"")
        data, disk = image.build(), bytearray(image.content(below or b""))
        for _ in range(2):
            node = await open_node(
                data, below=below, secret=key, l2_cache_size=rnd.choice((None, 1))
            )
            await change_at_random(rnd, node, disk, 60)
            assert bytes(await node.pread(0, node.size)) == disk
            await node.close()
            data = file_of(node)
            check(data)


@pytest.mark.asyncio
async def test_overlapping_writers_each_take_their_turn(seed):
    rnd = random.Random(seed)
    below = rnd.randbytes(MiB)
    image = Image(MiB, 16, 6, {0: Packed(b"x" * 65536)}, backing=b"below")
    node = await open_node(image.build(), below=below)
    disk = bytearray(image.content(below))

    async def write(sector: int) -> None:
        data = rnd.randbytes(512)
        disk[sector * 512 : sector * 512 + 512] = data
        await node.pwrite(sector * 512, data)

    await asyncio.gather(*(write(s) for s in rnd.sample(range(2048), 500)))
    assert bytes(await node.pread(0, MiB)) == disk
    await node.close()
    # Each cluster was allocated once.
    assert check(file_of(node)) == 16


@pytest.mark.asyncio
async def test_zeroes_on_nothing_take_no_space():
    node = await open_node(await new_image(64 * MiB))
    length = node.driver.storage.length
    await node.write_zeroes(0, 64 * MiB, no_fallback=True)
    await node.write_zeroes(1000, 5000, no_fallback=True)
    assert node.driver.storage.length == length
    await node.pwrite(4096, b"data")
    with pytest.raises(NotSupported):
        await node.write_zeroes(0, 16384, no_fallback=True)
    await node.write_zeroes(0, 16384)
    assert bytes(await node.pread(0, 16384)) == bytes(16384)
    await node.discard(0, 64 * MiB)
    await node.close()
    # The one that held data; the three beside it read as zeroes anyway.
    assert check(file_of(node)) == 1


@pytest.mark.asyncio
async def test_zeroes_hide_the_backing_file():
    data = Image(8192, 12, 9, backing=b"below").build()
    node = await open_node(data, below=b"x" * 8192)
    with pytest.raises(NotSupported):
        await node.write_zeroes(0, 4096, no_fallback=True)
    await node.write_zeroes(100, 4096)
    await node.discard(0, 8192)
    expected = b"x" * 100 + bytes(4096) + b"x" * (8192 - 4196)
    assert bytes(await node.pread(0, 8192)) == expected
    await node.close()


@pytest.mark.asyncio
async def test_zeroes_hide_a_backing_file_that_is_no_longer_named():
    data = Image(8192, 12, 9, backing=b"below").build()
    node = await open_node(data, below=b"x" * 8192)
    await node.change_backing_file(None, None)
    await node.write_zeroes(0, 4096)
    assert bytes(await node.pread(0, 8192)) == bytes(4096) + b"x" * 4096
    await node.close()


@pytest.mark.asyncio
async def test_a_compressed_write_is_refused_where_it_would_show_secrets():
    node = await open_node(await new_image(8192, encrypted=True), secret=KEY)
    with pytest.raises(NotSupported):
        await node.driver.write_compressed(0, bytes(4096))
    await node.close()


@pytest.mark.asyncio
async def test_compressed_writes_are_whole_clusters():
    node = await open_node(await new_image(4096 + 1024))
    for offset, length in ((0, 512), (512, 4096), (0, 8192), (4096, 512)):
        with pytest.raises(BlockError) as error:
            await node.driver.write_compressed(offset, bytes(length))
        assert error.value.errno == errno.EINVAL
    await node.driver.write_compressed(0, b"a" * 4096)
    await node.driver.write_compressed(4096, b"b" * 1024)
    assert bytes(await node.pread(0, node.size)) == b"a" * 4096 + b"b" * 1024
    await node.close()
    check(file_of(node))


@pytest.mark.asyncio
async def test_make_empty():
    below = b"below" * 3000
    image = Image(
        15000 // 512 * 512,
        backing=b"below",
        name_at_end=True,
        clusters={0: Packed(b"packed" * 100), 2: Plain(b"plain")},
    )
    node = await open_node(image.build(), below=below)
    assert bytes(await node.pread(0, node.size)) == image.content(below)
    await node.pwrite(5000, b"new")
    await node.driver.make_empty()
    assert bytes(await node.pread(0, node.size)) == below[: node.size]
    await node.pwrite(6000, b"again")
    await node.close()
    data = file_of(node)
    assert check(data) == 1
    node = await open_node(data, below=below)
    assert node.driver.backing_filename == "below"
    assert bytes(await node.pread(6000, 5)) == b"again"
    await node.close()
    fresh = await new_image(MiB)
    node = await open_node(fresh)
    await node.pwrite(0, b"x" * 100_000)
    await node.flush()
    await node.driver.make_empty()
    await node.close()
    # No more than the header and the L1 table's one entry is left.
    assert file_of(node) == fresh[:56]


# -- failures ------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_failed_allocation_leaves_the_file_as_it_was():
    data = await new_image(MiB)
    node = await open_node(data)
    storage = node.driver.storage
    assert isinstance(storage, MemoryStorage)
    storage.max_length = len(data) + 10_000
    for _ in range(3):
        with pytest.raises(OSError) as error:
            await node.pwrite(4096, b"x" * 12288)
        assert error.value.errno == errno.ENOSPC
        with pytest.raises(OSError):
            await node.driver.write_compressed(8192, random.Random(1).randbytes(4096))
    # The new L2 table is given up as well, so that this does not fail.
    await node.driver.tasks.settle()
    await node.flush()
    assert file_of(node) == data
    storage.max_length = MiB
    await node.pwrite(4096, b"x" * 12288)
    assert bytes(await node.pread(4096, 12288)) == b"x" * 12288
    await node.close()
    assert check(file_of(node)) == 3


@pytest.mark.asyncio
async def test_what_others_have_allocated_meanwhile_stays():
    node = await open_node(await new_image(MiB))
    driver = node.driver
    first = await driver.begin_write(0, 4096)
    second = await driver.begin_write(4096, 4096)
    third = await driver.begin_write(8192, 4096)
    await driver.data.pwritev(second.host_offset, [b"2" * 4096])
    driver.abort_write(first)
    driver.end_write(second)
    driver.abort_write(third)
    await driver.tasks.settle()
    assert driver.file_end.offset == second.host_offset + 4096
    assert bytes(await node.pread(0, 12288)) == bytes(4096) + b"2" * 4096 + bytes(4096)
    await node.close()
    assert check(file_of(node)) == 1


@pytest.mark.asyncio
async def test_entries_past_the_end_are_never_followed():
    """A file that was cut short: new clusters must not become old ones."""
    rnd = random.Random(2)
    clusters = {i: Plain(rnd.randbytes(4096)) for i in (0, 600, 601, 1, 2)}
    image = Image(4 * MiB, clusters=clusters)
    data = image.build()
    # The builder puts tables last: move the first one's last cluster away.
    entry = data.index((data.index(clusters[2].data)).to_bytes(8, "big"))
    damaged = patched(data, (entry, "Q", len(data) + 8192))
    node = await open_node(damaged)
    with pytest.raises(CorruptImage):
        await node.pread(8192, 512)
    with pytest.raises(CorruptImage):
        await node.pread(0, 12288)
    assert bytes(await node.pread(0, 8192)) == clusters[0].data + clusters[1].data
    assert node.try_pread(0, 8192) is not None
    # Nothing new in a table that is damaged, elsewhere as always.
    with pytest.raises(CorruptImage):
        await node.pwrite(8192, b"x")
    with pytest.raises(CorruptImage):
        await node.pwrite(12288, b"x")
    assert not node.try_pwrite(12288, b"x")
    await node.pwrite(4096, b"y" * 4096)
    await node.pwrite(3 * MiB, b"z" * 20000)
    await node.close()
    after = file_of(node)
    assert after[entry : entry + 8] == (len(data) + 8192).to_bytes(8, "big")
    node = await open_node(after)
    assert bytes(await node.pread(3 * MiB, 20000)) == b"z" * 20000
    assert bytes(await node.pread(4096, 4096)) == b"y" * 4096
    await node.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("entry", [1, 513, 1 << 40, (1 << 63) - 512, 0, 48, "other"])
async def test_l1_entries_that_cannot_be_right(entry):
    rnd = random.Random(3)
    clusters = {i: Plain(rnd.randbytes(4096)) for i in (0, 600)}
    data = Image(4 * MiB, clusters=clusters).build()
    if entry == "other":
        # Two tables that overlap: one is right, but which?
        entry = int.from_bytes(data[48:56], "big") + 512
    node = await open_node(patched(data, (56, "Q", entry)))
    if entry == 0:
        assert bytes(await node.pread(600 * 4096, 4096)) == bytes(4096)
    else:
        for request in (
            node.pread(600 * 4096, 4096),
            node.pwrite(600 * 4096, b"x"),
            node.block_status(600 * 4096, 4096),
        ):
            with pytest.raises(CorruptImage):
                await request
    await node.close()


@pytest.mark.asyncio
async def test_guest_data_never_goes_to_metadata():
    rnd = random.Random(4)
    clusters = {i: Plain(rnd.randbytes(512)) for i in range(8)}
    image = Image(64 * 512, 9, 6, clusters, backing=b"below", name_at_end=True)
    data = image.build()
    table = int.from_bytes(data[48:56], "big")
    name = data.index(b"below", table)
    for index, target in enumerate((0, table, name - name % 512)):
        data = patched(data, (table + 8 * index, "Q", target))
    # An entry of 0 is none.
    node = await open_node(data, below=b"b" * 64 * 512)
    for index in (1, 2):
        assert len(await node.pread(index * 512, 512)) == 512
        assert not node.try_pwrite(index * 512, b"x" * 512)
        with pytest.raises(CorruptImage):
            await node.pwrite(index * 512, b"x" * 512)
    await node.pwrite(3 * 512, b"y" * 512)
    await node.close()
    after = file_of(node)
    assert after[table : table + 24] == data[table : table + 24]
    assert b"below" in after


@pytest.mark.asyncio
async def test_damaged_compressed_clusters():
    data = Image(8192, clusters={0: Packed(b"ab" * 2048), 1: Plain(b"c")}).build()
    # The compressed one comes first, behind the L1 table of one entry.
    for field in ((56, "s", b"\xff" * 10), (56, "s", b"\x03\x00")):
        node = await open_node(patched(data, field))
        with pytest.raises(BlockError) as error:
            await node.pread(0, 512)
        assert error.value.errno == errno.EIO
        # Overwriting all of it needs nothing of what it held.
        await node.pwrite(0, b"d" * 4096)
        assert bytes(await node.pread(0, 4096)) == b"d" * 4096
        await node.close()


@pytest.mark.asyncio
async def test_read_only():
    data = Image(8192, clusters={0: Plain(b"c" * 4096)}).build()
    node = await open_node(data, read_only=True)
    assert node.driver.try_map_write(0, 512) == -1
    assert node.driver.try_begin_write(4096, 512) is None
    for change in (
        node.driver.begin_write(4096, 512),
        node.driver.write_compressed(0, bytes(4096)),
        node.driver.make_empty(),
        node.driver.write_zeroes(0, 4096, may_unmap=True, no_fallback=False),
    ):
        with pytest.raises(BlockError):
            await change
    await node.close()
    assert file_of(node) == data


# -- memory --------------------------------------------------------------------


@pytest.mark.asyncio
async def test_the_cache_is_bounded_and_keeps_what_is_used(seed):
    rnd = random.Random(seed)
    node = await open_node(await new_image(1 << 30), l2_cache_size=100_000)
    tables = node.driver.tables
    hot = tables.slice_shift
    offsets = [rnd.randrange(1 << 18) << 12 for _ in range(3000)]
    for offset in offsets:
        await node.pwrite(offset, b"%d" % offset)
        await node.pread(0, 512)
    # Slices that are dirty must stay until a write-back, which then comes.
    assert len(tables.young) + len(tables.old) <= 2 * tables._generation_limit + 8
    assert 0 >> hot in tables.young
    for offset in rnd.sample(offsets, 200):
        text = b"%d" % offset
        assert bytes(await node.pread(offset, len(text))) == text
    await node.close()
    assert check(file_of(node)) == len(set(offsets))


# -- hostile images --------------------------------------------------------------


@pytest.mark.asyncio
async def test_damage_anywhere_ends_in_an_error_or_in_bytes(seed):
    """Whatever an image says: no other exceptions, no memory for it, and what
    is written reads back or fails."""
    rnd = random.Random(seed)
    for _ in range(80):
        image = random_image(rnd, backing=b"b" if rnd.random() < 0.5 else b"")
        data = bytearray(image.build())
        for _ in range(rnd.randrange(1, 6)):
            # Half of it in the header and the L1 table.
            at = rnd.randrange(200 if rnd.random() < 0.5 else len(data))
            value = rnd.choice(
                (0, 1, 255, rnd.randrange(1 << 64), 1 << 63, len(data), 512)
            )
            raw = value.to_bytes(8, "big")[-rnd.choice((1, 4, 8)) :]
            data[at : at + len(raw)] = raw
        if rnd.random() < 0.3:
            del data[rnd.randrange(len(data)) :]
        try:
            node = await open_node(bytes(data), below=b"b" * 5000, l2_cache_size=1)
        except ImageError:
            continue
        assert node.driver.header.l1_bytes <= len(data)
        for _ in range(12):
            offset = rnd.randrange(max(1, min(node.size - 1, 1 << 20)))
            length = rnd.randrange(min(node.size - offset, 20_000) + 1)
            text = rnd.randbytes(length)
            try:
                await node.pread(offset, length)
                await node.block_status(offset, max(1, length))
                await node.pwrite(offset, text)
                await node.flush()
            except OSError as error:
                if error.errno not in (errno.EIO, errno.ENOSPC, errno.EINVAL):
                    raise
        await node.close()


@pytest.mark.asyncio
async def test_a_failing_emptying_brings_the_tables_back():
    node = await open_node(await new_image(16 * MiB))
    await node.pwrite(0, b"kept" * 1000)
    await node.flush()
    storage, calls = node.driver.storage, 0
    sound = storage.flush

    async def failing() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError(errno.EIO, "no")
        await sound()

    storage.flush = failing
    with pytest.raises(OSError):
        await node.driver.make_empty()
    assert bytes(await node.pread(0, 4000)) == b"kept" * 1000
    await node.close()
    node = await open_node(file_of(node))
    assert bytes(await node.pread(0, 4000)) == b"kept" * 1000
    await node.close()


@pytest.mark.asyncio
async def test_compressed_writes_are_stored_in_their_order():
    node = await open_node(await new_image(16 * MiB))
    await asyncio.gather(
        *(
            node.driver.write_compressed(i * 4096, b"%04d" % i * 1024)
            for i in range(200)
        )
    )
    places = []
    for i in range(200):
        kind, descriptor, _ = await node.driver.map(i * 4096, 1)
        assert kind == COMPRESSED
        places.append(compressed_range(descriptor, 12)[0])
    assert places == sorted(places)
    await node.close()
    assert check(file_of(node)) == 200

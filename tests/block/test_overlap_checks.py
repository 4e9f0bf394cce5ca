"""Guest data is not written over metadata, as far as the options want that."""

import asyncio
import json
import logging
import subprocess

import pytest

from nbdqcow import open_image
from nbdqcow.errors import BlockError, CorruptImage
from nbdqcow.formats.qcow2.header import Header
from tests.block.qemu import create, qemu_img

MiB = 1 << 20
CLUSTER = 65536
COPIED = 1 << 63


def word(data, offset):
    return int.from_bytes(data[offset : offset + 8], "big") & ((1 << 56) - 512)


@pytest.fixture
def image(tmp_path):
    """An image with metadata of every kind, and where each is."""
    path = tmp_path / "image"
    qemu_img("create", "-qf", "qcow2", path, 2 * MiB)
    write = ["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", path]
    subprocess.run(write, check=True, stdout=subprocess.DEVNULL)
    qemu_img("snapshot", "-c", "s", path)
    subprocess.run(write, check=True, stdout=subprocess.DEVNULL)
    qemu_img("bitmap", "--add", path, "b")
    data = path.read_bytes()
    header = Header.parse(data)
    inactive_l1 = word(data, header.snapshots_offset)
    places = {
        "main-header": 0,
        "active-l1": header.l1_table_offset,
        "active-l2": word(data, header.l1_table_offset),
        "refcount-table": header.refcount_table_offset,
        "refcount-block": word(data, header.refcount_table_offset),
        "snapshot-table": header.snapshots_offset,
        "inactive-l1": inactive_l1,
        "inactive-l2": word(data, inactive_l1),
        "bitmap-directory": header.bitmaps.directory_offset,
    }
    assert len(set(places.values())) == len(places)
    return path, places


def aim(path, place):
    """Let the guest's first cluster be where ``place`` is."""
    data = bytearray(path.read_bytes())
    l2 = word(data, Header.parse(bytes(data)).l1_table_offset)
    data[l2 : l2 + 8] = (place | COPIED).to_bytes(8, "big")
    path.write_bytes(data)


def name_of(path, **options):
    file = {"driver": "file", "filename": str(path)}
    return "json:" + json.dumps({"driver": "qcow2", "file": file} | options)


def write_ours(name):
    async def run():
        async with open_image(name) as node:
            await node.pwrite(0, b"x" * 512)

    asyncio.run(run())


KINDS = [
    *("active-l1", "active-l2", "refcount-table", "refcount-block", "snapshot-table"),
    *("inactive-l1", "inactive-l2", "bitmap-directory"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_found_as_qemu_finds_it(image, tmp_path, kind, caplog):
    path, places = image
    aim(path, places[kind])
    theirs = tmp_path / "theirs"
    theirs.write_bytes(path.read_bytes())
    with caplog.at_level(logging.ERROR), pytest.raises(BlockError):
        write_ours(name_of(path, **{"overlap-check": "all"}))
    done = subprocess.run(
        ["qemu-io", "-c", "write 0 512", name_of(theirs, **{"overlap-check": "all"})],
        capture_output=True, text=True,
    )  # fmt: skip
    assert "Marking image as corrupt" in done.stderr
    assert caplog.messages[0].endswith(done.stderr.splitlines()[0])
    for one in (path, theirs):
        assert Header.parse(one.read_bytes()).corrupt


TEMPLATES = {
    "none": set(),
    "constant": {"active-l1", "refcount-table", "snapshot-table", "bitmap-directory"},
    "cached": {*KINDS} - {"inactive-l2"},
    "all": {*KINDS},
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["active-l2", "snapshot-table", "inactive-l2"])
def test_templates(image, tmp_path, template, kind):
    path, places = image
    aim(path, places[kind])
    theirs = tmp_path / "theirs"
    theirs.write_bytes(path.read_bytes())
    refused = False
    try:
        write_ours(name_of(path, **{"overlap-check": template}))
    except BlockError as error:
        refused = "Preventing invalid write" in str(error)
    assert refused == (kind in TEMPLATES[template])
    name = name_of(theirs, **{"overlap-check": template})
    done = subprocess.run(
        ["qemu-io", "-c", "write 0 512", name],
        capture_output=True, text=True,
    )  # fmt: skip
    assert refused == ("Preventing invalid write" in done.stderr)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_single_class(image, wanted):
    path, places = image
    aim(path, places["active-l2"])
    template = "none" if wanted else "all"
    checks = {"template": template, "active-l2": wanted}
    if wanted:
        with pytest.raises(BlockError, match="active L2 table"):
            write_ours(name_of(path, **{"overlap-check": checks}))
    else:
        write_ours(name_of(path, **{"overlap-check": checks}))


def test_an_inline_write_that_reaches_into_metadata(image, caplog):
    """The second of two clusters in a row is one of metadata."""
    path, places = image
    others = {*places.values()}
    checked = {
        k: v for k, v in places.items() if k not in ("main-header", "inactive-l2")
    }
    place = next(v for v in checked.values() if v - CLUSTER not in others)
    data = bytearray(path.read_bytes())
    l2 = word(data, Header.parse(bytes(data)).l1_table_offset)
    for index in range(2):
        entry = place + (index - 1) * CLUSTER | COPIED
        data[l2 + 8 * index : l2 + 8 * index + 8] = entry.to_bytes(8, "big")
    path.write_bytes(data)

    async def run():
        async with open_image(path) as node:
            # Its table is in memory from here on.
            await node.pread(0, 512)
            assert not node.try_pwrite(CLUSTER - 512, b"x" * 1024)
            with pytest.raises(BlockError):
                await node.pwrite(CLUSTER - 512, b"x" * 1024)

    asyncio.run(run())
    assert Header.parse(path.read_bytes()).corrupt


def damage_entry(path, level):
    """Let an entry on the way to the guest's first cluster be unaligned."""
    data = bytearray(path.read_bytes())
    l1 = Header.parse(bytes(data)).l1_table_offset
    at = l1 if level == "l1" else word(data, l1)
    data[at : at + 8] = ((word(data, at) + 512) | COPIED).to_bytes(8, "big")
    path.write_bytes(data)


async def read_ours(path):
    async with open_image(str(path)) as node:
        assert node.try_pread(0, 512) is None
        assert not node.try_pwrite(0, b"x" * 512)
        with pytest.raises(BlockError):
            await node.pread(0, 512)


@pytest.mark.parametrize("level", ["l1", "l2"])
def test_an_unaligned_entry_that_is_read_marks_the_image(image, tmp_path, level):
    path, _ = image
    damage_entry(path, level)
    theirs = tmp_path / "theirs"
    theirs.write_bytes(path.read_bytes())
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "read 0 512", theirs], capture_output=True
    )
    assert Header.parse(theirs.read_bytes()).corrupt
    asyncio.run(read_ours(path))
    assert Header.parse(path.read_bytes()).corrupt


def test_zeroes_over_an_unaligned_entry_mark_the_image(image):
    path, _ = image
    damage_entry(path, "l2")

    async def zero():
        async with open_image(str(path)) as node:
            with pytest.raises(BlockError):
                await node.write_zeroes(512, 512)

    asyncio.run(zero())
    assert Header.parse(path.read_bytes()).corrupt


def test_damage_is_noted_although_nobody_waits_for_the_operation(tmp_path, monkeypatch):
    path = create(tmp_path / "image", MiB)

    async def find_damage(image, size, preallocation):
        await asyncio.sleep(0.01)
        raise CorruptImage("an entry that can't be")

    monkeypatch.setattr("nbdqcow.formats.qcow2.resize.resize", find_damage)

    async def run():
        async with open_image(path) as node:
            resizing = asyncio.create_task(node.resize(2 * MiB))
            await asyncio.sleep(0)
            resizing.cancel()
            await asyncio.wait([resizing])
            await node.driver.tasks.settle()
            with pytest.raises(BlockError, match="corrupt"):
                await node.pwrite(0, b"x")

    asyncio.run(run())
    assert Header.parse(path.read_bytes()).corrupt


@pytest.mark.parametrize("write", ["pwrite", "snapshot"])
def test_a_block_of_counts_that_is_missing_takes_no_header_s_place(image, write):
    """It would be where the clusters begin that it is about."""
    path, places = image
    data = bytearray(path.read_bytes())
    table = places["refcount-table"]
    data[table : table + 8] = bytes(8)
    path.write_bytes(data)

    async def run():
        async with open_image(path) as node:
            if write == "pwrite":
                await node.pwrite(MiB, b"x" * CLUSTER)
            else:
                await node.driver.snapshot_create("t")

    with pytest.raises((BlockError, CorruptImage)):
        asyncio.run(run())
    # But for the mark it is what it was.
    after = bytearray(path.read_bytes()[:CLUSTER])
    after[72:80] = data[72:80]
    assert after == data[:CLUSTER]

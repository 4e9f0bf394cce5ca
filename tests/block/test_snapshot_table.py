"""What becomes of a snapshot table that is not as new ones are."""

import asyncio
import json
import struct
import subprocess

import pytest

from nbdqcow import open_image
from nbdqcow.block.steps import run_steps
from nbdqcow.block.tools import REPAIR_ALL, REPAIR_LEAKS, REPAIR_NONE
from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow2 import header
from nbdqcow.formats.qcow2.check import check_image
from nbdqcow.formats.qcow2.header import read_header
from nbdqcow.formats.qcow2.snapshot_table import Snapshot, read_snapshots
from nbdqcow.storage.memory import MemoryStorage
from tests.builder import ImageBuilder

MIB = 1 << 20
SECRET = b"none of your business"


def entry(name, extra, l1=(0, 0)):
    id_ = name[-1:]
    fixed = struct.pack(
        ">QIHHIIQII", *l1, len(id_), len(name), 1, 2, 3, 0, len(extra)
    )  # fmt: skip
    data = fixed + extra + id_ + name
    return data + bytes(-len(data) % 8)


def known(size):
    return struct.pack(">QQQ", 0, size, 7)


def image(*entries, cluster_bits=12, version=3):
    builder = ImageBuilder(cluster_bits=cluster_bits, version=version)
    builder.add_data(0)
    builder.snapshots += entries
    return builder


async def table_of(storage) -> list[Snapshot]:
    parsed = await run_steps(read_header(), storage)
    return (await run_steps(read_snapshots(parsed), storage))[0]


async def check(storage, repair=REPAIR_NONE):
    lines: list[str] = []
    result = await run_steps(
        check_image(storage.length, repair, lines.append, can_grow=True), storage
    )
    return result, lines


def qemu_check(tmp_path, storage):
    path = tmp_path / "image"
    path.write_bytes(bytes(storage.data))
    done = subprocess.run(
        ["qemu-img", "check", "--output=json", path], check=True, capture_output=True
    )
    found = json.loads(done.stdout)
    assert not (found.keys() & {"leaks", "corruptions"}), found


@pytest.mark.parametrize("cluster_bits", [9, 12, 16])
@pytest.mark.asyncio
async def test_incomplete_entries_are_completed(tmp_path, cluster_bits):
    size = image().header.size
    many = [entry(b"%d" % n, b"") for n in range(10, 90)]
    storage = MemoryStorage(
        image(
            entry(b"sn0", b""),
            entry(b"sn1", known(size) + SECRET),
            entry(b"sn2", bytes(8)),
            *many,
            cluster_bits=cluster_bits,
        ).build()
    )
    for repair in (REPAIR_NONE, REPAIR_LEAKS):
        result, lines = await check(storage, repair)
        assert (result.corruptions, result.corruptions_fixed) == (82, 0)
        assert lines[:2] == [
            "ERROR snapshot table entry 0 is incomplete",
            "ERROR snapshot table entry 2 is incomplete",
        ]
    result, lines = await check(storage, REPAIR_ALL)
    assert (result.corruptions, result.corruptions_fixed) == (0, 82)
    assert lines[0] == "Repairing snapshot table entry 0 is incomplete"
    result, lines = await check(storage)
    assert (result.corruptions, result.leaks, lines) == (0, 0, [])
    first, second, third, *rest = await table_of(storage)
    assert (first.disk_size, first.info.icount, len(first.extra)) == (size, None, 24)
    assert second.extra == known(size) + SECRET
    assert (third.disk_size, len(third.extra), third.info.name) == (size, 24, "sn2")
    assert len(rest) == 80
    qemu_check(tmp_path, storage)


@pytest.mark.asyncio
async def test_too_much_extra_data_is_cut(tmp_path):
    size = image().header.size
    extra = known(size) + bytes(range(256)) * 16
    storage = MemoryStorage(
        image(entry(b"a1", extra), entry(b"b2", known(size))).build()
    )
    lines: list[str] = []
    with pytest.raises(ImageError, match="Check failed: File too large") as caught:
        await run_steps(
            check_image(storage.length, REPAIR_LEAKS, lines.append), storage
        )
    assert str(caught.value.__cause__).startswith(
        "ERROR failed to read the snapshot table: Too much extra metadata in snapshot "
        "table entry 0\nYou can force-remove this"
    )
    result, lines = await check(storage, REPAIR_ALL)
    assert lines == [
        f"Discarding too much extra metadata in snapshot table entry 0 ({len(extra)} "
        "> 1024)"
    ]
    assert result.corruptions_fixed == 1
    one, two = await table_of(storage)
    assert one.extra == extra[:1024]
    assert [one.info.name, two.info.name] == ["a1", "b2"]
    assert (await check(storage))[1] == []
    qemu_check(tmp_path, storage)


@pytest.mark.asyncio
async def test_too_many_snapshots_are_discarded(tmp_path, monkeypatch):
    monkeypatch.setattr(header, "MAX_SNAPSHOTS", 2)
    names = (b"a1", b"b2", b"c3", b"d4", b"e5")
    storage = MemoryStorage(image(*[entry(name, known(1)) for name in names]).build())
    lines: list[str] = []
    with pytest.raises(ImageError, match="Check failed: File too large") as caught:
        await run_steps(check_image(storage.length, 0, lines.append), storage)
    assert lines == []
    assert str(caught.value.__cause__) == (
        "ERROR snapshot table too large\n"
        "You can force-remove all 3 overhanging snapshots with qemu-img check -r all"
    )
    result, lines = await check(storage, REPAIR_ALL)
    assert lines == ["Discarding 3 overhanging snapshots"]
    assert result.corruptions_fixed == 3
    assert [one.info.name for one in await table_of(storage)] == ["a1", "b2"]
    qemu_check(tmp_path, storage)


@pytest.mark.asyncio
@pytest.mark.parametrize("offset", [1, 1 << 63, 0x9F << 56])
@pytest.mark.parametrize("repair", [REPAIR_NONE, REPAIR_ALL])
async def test_a_place_where_no_table_can_be(offset, repair):
    """Nothing opens such an image, even without snapshots."""
    data = bytearray(image().build())
    struct.pack_into(">Q", data, 64, offset)
    with pytest.raises(ImageError, match="Check failed: Invalid argument") as caught:
        await check(MemoryStorage(data), repair)
    assert str(caught.value.__cause__) == "ERROR snapshot table offset invalid"


@pytest.mark.asyncio
async def test_a_dirty_image_loses_no_snapshots_by_being_opened(tmp_path):
    builder = image(entry(b"a1", bytes(2000)))
    builder.header.incompatible_features |= 1
    data = builder.build()
    path = tmp_path / "image"
    path.write_bytes(data)
    with pytest.raises(ImageError, match="Too much extra metadata"):
        async with open_image(path):
            pass
    assert path.read_bytes() == data


@pytest.mark.parametrize("operation", ["amend", "create", "delete"])
def test_unknown_extra_data_stays(tmp_path, operation):
    builder = image(version=2)
    size = builder.header.size
    builder.snapshots += [
        entry(b"sn0", b""),
        entry(b"sn1", known(size) + SECRET),
        entry(b"sn2", bytes(8)),
    ]
    path = tmp_path / "image"
    path.write_bytes(builder.build())

    async def run():
        async with open_image(path) as node:
            if operation == "amend":
                await node.amend({"compat": "1.1"}, lambda *_: None)
            elif operation == "create":
                await node.driver.snapshot_create("new")
            else:
                await node.driver.snapshot_delete("sn0")

    asyncio.run(run())
    storage = MemoryStorage(path.read_bytes())
    found = {one.info.name: one for one in asyncio.run(table_of(storage))}
    assert found["sn1"].extra == known(size) + SECRET
    assert found["sn2"].extra == struct.pack(">QQq", 0, size, -1)
    assert len(found) == {"amend": 3, "create": 4, "delete": 2}[operation]
    qemu_check(tmp_path, storage)

"""`blkdebug` under images: who tells of what, what fails then, what is left."""

import asyncio
import json
import os
import shutil
import subprocess
import sys

import pytest

from nbdqcow import open_image
from nbdqcow.errors import ImageError
from nbdqcow.filters.blkdebug import BlkdebugStorage
from tests.block.qemu import run_qemu_img as qemu_img

KiB, MiB = 1 << 10, 1 << 20


def create(path, size=16 * MiB, format_="qcow2", **options):
    text = [f"{k}={v}" for k, v in options.items()]
    words = ["-o", ",".join(text)] if text else []
    qemu_img("create", "-qf", format_, *words, path, size)
    return path


def qemu_io(path, *commands):
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", *words, path], check=True, capture_output=True)


def rule(event, **options):
    """Return options of `blkdebug` with one rule, over the file ``disk``."""
    return {"event": event, **options}


def name_of(path, *rules, driver="qcow2", **limits):
    file = {
        "driver": "blkdebug",
        "image": {"driver": "file", "filename": str(path)},
        **limits,
    }
    if rules:
        file["inject-error"] = list(rules)
    return "json:" + json.dumps({"driver": driver, "file": file})


def check(path):
    return json.loads(qemu_img("check", "--output=json", path, check=False).stdout)


# -- events ----------------------------------------------------------------


async def write(node):
    await node.pwrite(5 * MiB + 1000, b"x" * 1000)
    await node.flush()


async def overwrite(node):
    await node.pwrite(0, b"y" * 1000)
    await node.flush()


async def read(node):
    await node.pread(0, 64 * KiB)


async def read_backing(node):
    await node.pread(2 * MiB, 64 * KiB)


async def compress(node):
    await node.pwrite_compressed(6 * MiB, bytes(range(256)) * 256)


async def read_packed(node):
    await node.pread(MiB, 64 * KiB)


async def discard(node):
    await node.discard(0, 64 * KiB)
    await node.flush()
    await node.driver.tasks.settle()


async def empty(node):
    await node.driver.make_empty()


async def grow(node):
    await node.resize(64 << 40)


async def shrink(node):
    await node.resize(4 * MiB)


async def snapshot(node):
    await node.driver.snapshot_create("one")


ALLOCATES = ["l2_load", "cluster_alloc", "refblock_load", "cow_write", "write_aio"]
COMMITS = ["flush_to_os", "flush_to_disk", "refblock_update_part", "l2_update"]
EVENTS = [
    (write, [*ALLOCATES, *COMMITS, "reftable_load", "pwritev", "pwritev_done"]),
    (write, ["cow_read", "read_backing_aio"]),
    (overwrite, ["write_aio", "flush_to_os", "flush_to_disk"]),
    (read, ["l2_load", "read_aio"]),
    (read_backing, ["l2_load", "read_backing_aio"]),
    (compress, ["cluster_alloc_bytes", "write_compressed"]),
    (read_packed, ["read_compressed"]),
    (discard, ["cluster_free", "l2_update"]),
    (empty, ["empty_image_prepare", "l1_update"]),
    (grow, ["l1_grow_alloc_table", "l1_grow_write_table", "l1_grow_activate_table"]),
    (shrink, ["l1_shrink_write_table", "l1_shrink_free_l2_clusters"]),
    (snapshot, ["l1_update", "l2_update", "reftable_update", "refblock_update_part"]),
]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    directory = tmp_path_factory.mktemp("blkdebug")
    base, path = create(directory / "base"), directory / "disk"
    qemu_io(base, "write -P 1 0 8M")
    create(path, backing_file=base, backing_fmt="qcow2")
    qemu_io(path, "write -P 2 0 64k", "write -c -P 3 1M 64k")
    return path


@pytest.fixture
def disk(template, tmp_path):
    return shutil.copy(template, tmp_path / "disk")


@pytest.mark.parametrize(("work", "events"), EVENTS)
@pytest.mark.asyncio
async def test_drivers_tell_of_events(disk, monkeypatch, work, events):
    heard = []
    announce = BlkdebugStorage.announce
    monkeypatch.setattr(
        BlkdebugStorage,
        "announce",
        lambda self, event: (heard.append(event), announce(self, event)),
    )
    async with open_image(f"blkdebug::{disk}") as node:
        await work(node)
    assert set(events) - set(heard) == set()
    assert check(disk)["check-errors"] == 0


@pytest.mark.parametrize(
    ("work", "event"),
    [(work, event) for work, events in EVENTS for event in events]
    + [(write, "refblock_alloc"), (write, "l2_alloc_write")],
)
@pytest.mark.asyncio
async def test_what_fails_at_an_event_leaves_a_sound_image(disk, work, event):
    name = name_of(disk, rule(event, errno=28, once=True))
    failure = None
    try:
        async with open_image(name) as node:
            await work(node)
    except (OSError, ImageError) as exc:
        # There may be none: a commit that failed is done again.
        failure = exc
    assert failure is None or "No space left" in str(failure)
    found = check(disk)
    assert found.get("corruptions", 0) == 0
    assert found["check-errors"] == 0


@pytest.mark.asyncio
async def test_qcow1_tells_of_events(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(
        BlkdebugStorage, "announce", lambda self, event: heard.append(event)
    )
    path = create(tmp_path / "disk", format_="qcow")
    qemu_io(path, "write -P 2 0 64k", "write -c -P 3 1M 4k")
    async with open_image(f"blkdebug::{path}") as node:
        await node.pread(0, 4096)
        await node.pread(MiB, 4096)
        await node.pwrite(2 * MiB, b"x")
        await node.pwrite(8 * MiB, b"x")
        await node.flush()
        await node.pwrite_compressed(3 * MiB, bytes(4096))
        await node.driver.make_empty()
    wanted = {
        *("l2_load", "read_aio", "read_compressed", "cluster_alloc", "write_aio"),
        *("flush_to_os", "flush_to_disk", "l2_update", "l1_update"),
        "write_compressed",
    }
    assert wanted - set(heard) == set()


# -- requests --------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_sector_fails(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(b"a" * 8192)
    name = name_of(path, rule("none", sector=3, iotype="read"), driver="raw")
    async with open_image(name) as node:
        assert bytes(await node.pread(0, 1536)) == b"a" * 1536
        with pytest.raises(OSError, match="Input/output error"):
            await node.pread(1000, 600)
        await node.pwrite(1000, b"b" * 600)
        assert bytes(await node.pread(2048, 6144)) == b"a" * 6144


@pytest.mark.asyncio
async def test_requests_are_aligned_and_cut(tmp_path, monkeypatch):
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(MiB) + b"end")
    expected = bytearray(path.read_bytes())
    limits = {"align": 4096, "max-transfer": 8192}
    async with open_image(name_of(path, driver="raw", **limits)) as node:
        storage = node.driver.storage.inner
        seen = []
        pread, pwritev = storage.pread, storage.pwritev

        async def note_pread(offset, length):
            seen.append((offset, length))
            return await pread(offset, length)

        async def note_pwritev(offset, buffers, **options):
            seen.append((offset, sum(map(len, buffers))))
            await pwritev(offset, buffers, **options)

        monkeypatch.setattr(storage, "pread", note_pread)
        monkeypatch.setattr(storage, "pwritev", note_pwritev)
        for offset, length in ((1000, 30_000), (4096, 4096), (8191, 2), (0, 1)):
            data = os.urandom(length)
            await node.pwrite(offset, data)
            expected[offset : offset + length] = data
            assert bytes(await node.pread(offset, length)) == data
        assert all(o % 4096 == 0 and n % 4096 == 0 and n <= 8192 for o, n in seen)
        await node.pwrite(MiB + 1, b"x")
        expected[MiB + 1] = ord("x")
        await node.write_zeroes(5000, 20_000)
        expected[5000:25_000] = bytes(20_000)
    assert path.read_bytes() == expected


@pytest.mark.asyncio
async def test_zeroes_and_discards_are_cut(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(b"a" * MiB)
    limits = {
        "align": 512,
        "opt-write-zero": "15k",
        "max-write-zero": "30k",
        "opt-discard": "15k",
        "max-discard": "15k",
    }
    async with open_image(name_of(path, driver="raw", **limits)) as node:
        await node.write_zeroes(1, 200_000)
        await node.discard(300_001, 300_000)
    content = path.read_bytes()
    assert content[:200_002] == b"a" + bytes(200_000) + b"a"
    assert content[300_001 - 15 * KiB : 300_001] == b"a" * 15 * KiB
    assert len(content) == MiB


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"align": 3}, "Cannot meet constraints with align 3"),
        ({"align": 1 << 40}, "Cannot meet constraints with align"),
        ({"align": 512, "max-transfer": 3}, "constraints with max-transfer 3"),
        (
            {"opt-discard": 1024, "max-discard": 512},
            "Cannot meet constraints with max-discard 512",
        ),
        ({"max-transfer": "x"}, "Parameter 'max-transfer' expects a non-negative"),
        ({"foo": 1}, "Block protocol 'blkdebug' doesn't support the option 'foo'"),
    ],
)
@pytest.mark.asyncio
async def test_wrong_limits_are_refused(tmp_path, limits, message):
    path = tmp_path / "disk"
    path.write_bytes(bytes(512))
    with pytest.raises(ImageError, match=message):
        await open_image(name_of(path, driver="raw", **limits))


# -- names -----------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_config_file(tmp_path):
    path, config = tmp_path / "disk", tmp_path / "conf"
    path.write_bytes(bytes(4096))
    config.write_text(
        '[inject-error]\nevent = "read_aio"\nerrno = "28"\niotype = "read"\n'
    )
    async with open_image(f"blkdebug:{config}:{path}", format="raw") as node:
        with pytest.raises(OSError, match="No space left"):
            await node.pread(0, 1)
    os.mkfifo(tmp_path / "fifo")
    for name, message in (("fifo", "no regular file"), ("absent", "No such file")):
        with pytest.raises(ImageError, match=message):
            await open_image(f"blkdebug:{tmp_path / name}:{path}", format="raw")


@pytest.mark.asyncio
async def test_an_image_can_name_a_filter_only_if_it_may(tmp_path):
    base, config = create(tmp_path / "base"), tmp_path / "conf"
    config.write_text("")
    top = tmp_path / "top"
    backing = f"blkdebug:{config}:{base}"
    qemu_img("create", "-qf", "qcow2", "-b", backing, "-F", "qcow2", top)
    with pytest.raises(ImageError, match="an image can't name a file with the filter"):
        await open_image(top)
    async with open_image(top, images_name_filters=True) as node:
        assert node.backing.filename == backing
    # As any file that it names, the configuration may be somewhere else.
    options = {"images_name_filters": True, "allowed_paths": [str(base)]}
    with pytest.raises(ImageError, match=f"{config}' is outside the allowed paths"):
        await open_image(top, **options)
    options["allowed_paths"] = [str(config)]
    with pytest.raises(ImageError, match=f"{base}' is outside the allowed paths"):
        await open_image(top, **options)
    options["allowed_paths"] = [str(tmp_path)]
    await (await open_image(top, **options)).close()


@pytest.mark.asyncio
async def test_a_loop_through_a_filter_is_refused(tmp_path):
    top = create(tmp_path / "top")
    image = {"driver": "qcow2", "file": {"driver": "file", "filename": str(top)}}
    name = "json:" + json.dumps({"driver": "blkdebug", "image": image})
    qemu_img("rebase", "-u", "-b", name, "-F", "raw", top)
    with pytest.raises(ImageError, match="loops"):
        await open_image(top, images_name_filters=True)


@pytest.mark.asyncio
async def test_above_a_format(tmp_path):
    path = create(tmp_path / "disk", MiB)
    qemu_io(path, "write -P 7 64k 64k")
    image = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}
    fails = rule("none", iotype="block-status", sector=130)
    name = "json:" + json.dumps(
        {"driver": "blkdebug", "image": image, "inject-error": [fails]}
    )
    async with open_image(name) as node:
        assert node.size == MiB
        await node.pwrite(MiB - 100, b"x" * 100)
        assert bytes(await node.pread(64 * KiB, 8)) == b"\7" * 8
        status = await node.block_status(0, 64 * KiB)
        assert list(status.lengths) == [64 * KiB]
        with pytest.raises(OSError, match="Input/output error"):
            await node.driver.map(130 * 512, 512)
    async with open_image(path) as node:
        assert bytes(await node.pread(MiB - 100, 100)) == b"x" * 100


@pytest.mark.asyncio
async def test_verify(tmp_path):
    path, raw = create(tmp_path / "disk", MiB), tmp_path / "raw"
    raw.write_bytes(bytes(MiB))
    async with open_image(f"blkverify:{raw}:{path}", format="raw") as node:
        await node.pwrite(1000, b"abc")
        await node.write_zeroes(1001, 1)
        assert bytes(await node.pread(999, 5)) == b"\0a\0c\0"
        await node.flush()
    with raw.open("r+b") as file:
        file.seek(4000)
        file.write(b"x")
    async with open_image(f"blkverify:{raw}:{path}", format="raw") as node:
        await node.pread(0, 4000)
        with pytest.raises(OSError, match="contents mismatch at offset 4000"):
            await node.pread(3000, 2000)


def test_a_server_serves_it(tmp_path):
    path, place = tmp_path / "disk", tmp_path / "socket"
    path.write_bytes(b"a" * 4096)
    name = name_of(path, rule("none", sector=3), driver="raw")
    command = [sys.executable, "-m", "nbdqcow", "serve", "-f", "raw"]

    async def run():
        server = await asyncio.create_subprocess_exec(
            *command, "--unix", str(place), name, stdout=asyncio.subprocess.PIPE
        )
        try:
            await server.stdout.readline()
            async with open_image(f"nbd+unix:///?socket={place}", format="raw") as node:
                assert bytes(await node.pread(0, 1536)) == b"a" * 1536
                with pytest.raises(OSError, match="Input/output error"):
                    await node.pread(0, 2048)
        finally:
            server.terminate()
            await server.communicate()

    asyncio.run(run())

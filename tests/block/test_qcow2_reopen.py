"""A qcow2 image that is made read-only and writable again while it is in use."""

import asyncio
import contextlib
import errno
import json
import os
import random
import subprocess

import pytest

from nbdqcow import open_image
from nbdqcow.block.node import Node
from nbdqcow.errors import BlockError, ImageError, ImageInUse
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.storage.file import FileStorage
from nbdqcow.storage.memory import MemoryStorage
from tests.block.qemu import qemu_img
from tests.crash.histories import created
from tests.faults.faulty import FLUSH, FaultyStorage, Rule

MIB = 1 << 20
SEED = int(os.environ.get("NBDQCOW_SEED", "0")) or random.randrange(1 << 32)


def create(path, size=8 * MIB, **options):
    text = ",".join(f"{k}={v}" for k, v in options.items())
    qemu_img("create", "-qf", "qcow2", *(["-o", text] if text else []), path, size)
    return path


def sound(path):
    """Another program finds a closed and sound image."""
    found = json.loads(qemu_img("check", "--output=json", path))
    assert not (found.keys() & {"leaks", "corruptions"}), found
    with path.open("rb") as file:
        # No mark of postponed refcounts.
        assert not file.read(80)[79] & 1


def bitmap_flags(path):
    info = json.loads(qemu_img("info", "-U", "--output=json", path))
    found = info["format-specific"]["data"].get("bitmaps", [])
    return {one["name"]: one["flags"] for one in found}


OPTIONS = [
    {},
    {"compat": "0.10", "cluster_size": 4096},
    {"lazy_refcounts": "on"},
    {"extended_l2": "on"},
    {"cluster_size": 512, "refcount_bits": 1},
    {"data_file": "DATA"},
    {"data_file": "DATA", "data_file_raw": "on"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.asyncio
async def test_under_load(tmp_path, options):
    """What was answered is there, whatever the moment; what came later failed."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    path = tmp_path / "image"
    options = {k: tmp_path / "data" if v == "DATA" else v for k, v in options.items()}
    create(path, **options)
    model = bytearray(8 * MIB)
    async with open_image(path, format="qcow2") as node:
        if "compat" not in options:
            node.driver.bitmap_add("b", granularity=65536)
        marked = set()
        for _ in range(6):
            # One place for each, so that the order does not matter.
            places = rng.sample(range(64), 40)

            async def change(place, kind, fill):
                offset, length = place * 131072 + 777, 1000 + 70_000 * (fill % 2)
                if kind == "zero":
                    await node.write_zeroes(offset, length)
                    fill = 0
                else:
                    data = bytes((fill,)) * length
                    await node.pwrite(offset, data, fua=fill % 3 == 0)
                return offset, length, fill

            kinds = rng.choices(["zero", "write", "write"], k=len(places))
            jobs = [
                asyncio.ensure_future(change(place, kind, rng.randrange(256)))
                for place, kind in zip(places, kinds, strict=True)
            ]
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            await node.reopen(read_only=True)
            results = await asyncio.gather(*jobs, return_exceptions=True)
            for place, result in zip(places, results, strict=True):
                start, end = place * 131072, (place + 1) * 131072
                if isinstance(result, BaseException):
                    assert isinstance(result, BlockError), result
                    assert result.errno in (errno.EPERM, errno.EROFS)
                    # It may have come some of the way.
                    model[start:end] = await node.pread(start, end - start)
                else:
                    offset, length, fill = result
                    model[offset : offset + length] = bytes((fill,)) * length
                    marked.add(offset >> 16)
                    marked.add((offset + length - 1) >> 16)
            assert bytes(await node.pread(0, len(model))) == bytes(model)
            for change_ in (node.pwrite(0, b"x"), node.discard(0, 65536)):
                with pytest.raises(BlockError) as error:
                    await change_
                assert error.value.errno == errno.EPERM
            sound(path)
            if "compat" not in options:
                assert bitmap_flags(path) == {"b": ["auto"]}
                bits = node.dirty_bitmaps["b"].bits
                assert all(bits[n >> 3] >> (n & 7) & 1 for n in marked)
            if not options.get("data_file"):
                async with open_image(path, read_only=True) as other:
                    assert bytes(await other.pread(0, len(model))) == bytes(model)
            before = path.read_bytes()
            await node.flush()
            assert path.read_bytes() == before
            await node.reopen(read_only=False)
            if "compat" not in options:
                assert bitmap_flags(path) == {"b": ["in-use", "auto"]}
        await node.pwrite(5, b"last")
        model[5:9] = b"last"
    sound(path)
    raw = tmp_path / "raw"
    qemu_img("convert", "-O", "raw", path, raw)
    assert raw.read_bytes() == bytes(model)


@pytest.mark.parametrize("lazy", ["off", "on"])
@pytest.mark.asyncio
async def test_opened_read_only_and_allowed_to_write_later(tmp_path, lazy):
    path = create(tmp_path / "image", lazy_refcounts=lazy)
    qemu_img("bitmap", "--add", path, "b")
    io = ["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", str(path)]
    subprocess.run(io, check=True, stdout=subprocess.DEVNULL)
    qemu_img("snapshot", "-c", "s", path)
    async with open_image(path, format="qcow2", read_only=True) as node:
        assert bitmap_flags(path) == {"b": ["auto"]}
        await node.reopen(read_only=False)
        assert bitmap_flags(path) == {"b": ["in-use", "auto"]}
        await node.pwrite(65536, b"2" * 65536)
        await node.pwrite(3 * MIB, b"3" * 65536)
        await node.driver.snapshot_create("t")
        await node.reopen(read_only=True)
        sound(path)
        with pytest.raises(BlockError):
            await node.driver.snapshot_create("u")
    sound(path)
    async with open_image(path, format="qcow2", read_only=True) as node:
        assert bytes(await node.pread(0, 1)) == b"\1"
        assert bytes(await node.pread(65536, 65536)) == b"2" * 65536
        bits = node.dirty_bitmaps["b"].bits
        assert bits[0] & 2
        assert bits[6] & 1


@pytest.mark.asyncio
@pytest.mark.parametrize("format_", ["qcow2", "qcow"])
async def test_locks_follow(tmp_path, format_):
    path = tmp_path / "image"
    qemu_img("create", "-qf", format_, path, 8 * MIB)
    async with open_image(path, format=format_) as node:
        with pytest.raises(ImageInUse):
            await FileStorage.open(str(path), read_only=True)
        await node.reopen(read_only=True)
        # Somebody else may read it now, and nobody write.
        async with open_image(path, format=format_, read_only=True):
            with pytest.raises(ImageInUse):
                await node.reopen(read_only=False)
            assert node.read_only
        with pytest.raises(ImageInUse):
            await FileStorage.open(str(path))
        await node.reopen(read_only=False)
        with pytest.raises(ImageInUse):
            await FileStorage.open(str(path), read_only=True)
        await asyncio.gather(*[node.reopen(read_only=bool(i % 2)) for i in range(9)])
        await node.pwrite(0, b"written")
    if format_ == "qcow2":
        sound(path)


@pytest.mark.asyncio
async def test_what_can_not_be_written_later(tmp_path):
    path = create(tmp_path / "image")
    qemu_img("snapshot", "-c", "s", path)
    async with open_image(
        path, format="qcow2", read_only=True, driver_options={"snapshot": "s"}
    ) as node:
        with pytest.raises(ImageError, match="can only be opened read-only"):
            await node.reopen(read_only=False)
        assert node.read_only
    for bit, text in ((1, "must be repaired"), (2, "cannot be opened read/write")):
        data = bytearray(path.read_bytes())
        data[79] = bit
        path.write_bytes(data)
        async with open_image(path, format="qcow2", read_only=True) as node:
            with pytest.raises(ImageError, match=text):
                await node.reopen(read_only=False)
            assert node.read_only


@pytest.mark.asyncio
async def test_a_disk_that_fails_leaves_all_as_it_was(tmp_path, monkeypatch):
    """Each write or flush on the way may be the one that fails."""
    for nb_calls in range(12):
        path = create(tmp_path / f"image{nb_calls}", lazy_refcounts="on")
        async with open_image(path, format="qcow2") as node:
            node.driver.bitmap_add("b")
            await node.pwrite(0, b"1" * 100_000)
            storage, left = node.driver.storage, nb_calls
            sound_write = storage.pwritev

            async def pwritev(*arguments, write=sound_write, **options):
                nonlocal left
                left -= 1
                if left == -1:
                    raise OSError(errno.EIO, "broken")
                await write(*arguments, **options)

            monkeypatch.setattr(storage, "pwritev", pwritev)
            failed = lost = False
            try:
                await node.reopen(read_only=True)
            except OSError:
                lost = node.driver.failed
                failed = not lost
                assert not node.read_only
                # Which header is valid nobody knows: the new one says that the
                # bitmaps are up to date.
                with pytest.raises(BlockError) if lost else contextlib.nullcontext():
                    await node.pwrite(MIB, b"2" * 100_000)
            monkeypatch.setattr(storage, "pwritev", sound_write)
            assert bytes(await node.pread(0, 100_000)) == b"1" * 100_000
        found = subprocess.run(
            ["qemu-img", "check", "--output=json", path], capture_output=True
        )
        assert not json.loads(found.stdout).get("corruptions")
        async with open_image(path, format="qcow2", read_only=True) as node:
            assert bytes(await node.pread(MIB, 1)) == (b"2" if failed else b"\0")
            if not lost:
                assert node.dirty_bitmaps["b"].bits[0] & 1


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.asyncio
async def test_the_way_back_may_fail_too(tmp_path, monkeypatch, read_only):
    """Then the image takes no writes, says so, and both ways can be tried again."""
    path = create(tmp_path / "image")

    async with open_image(path, format="qcow2", read_only=not read_only) as node:
        driver = node.driver

        def refuse(one, what, text):
            sound = one.reopen

            async def reopen(*, read_only):
                if read_only == what:
                    raise OSError(errno.EIO, text)
                await sound(read_only=read_only)

            monkeypatch.setattr(one, "reopen", reopen)

        refuse(driver.storage, True, "stays writable")
        refuse(driver, False, "stays read-only")
        first = "stays writable" if read_only else "stays read-only"
        with pytest.raises(OSError, match=first):
            await node.reopen(read_only=read_only)
        assert node.read_only
        assert not driver.storage.read_only
        with pytest.raises(BlockError):
            await node.pwrite(0, b"x")
        for wanted in (True, False):
            with pytest.raises(OSError, match="stays"):
                await node.reopen(read_only=wanted)
            assert node.read_only
        monkeypatch.undo()
        await node.reopen(read_only=True)
        assert driver.storage.read_only
        await node.reopen(read_only=False)
        await node.pwrite(0, b"x" * 512)
        assert bytes(await node.pread(0, 2)) == b"xx"
    sound(path)


@pytest.mark.parametrize("dirty", [False, True])
@pytest.mark.asyncio
async def test_what_is_built_upon_is_durable(tmp_path, monkeypatch, dirty):
    """Somebody who was killed may have freed what gets new data now: after a power
    cut no old table may name that."""
    path = create(tmp_path / "image", lazy_refcounts="on")
    if dirty:
        with path.open("r+b") as file:
            file.seek(79)
            file.write(b"\1")
    calls = []
    pwritev = FileStorage.pwritev

    async def count(self, *arguments, **options):
        calls.append("write")
        await pwritev(self, *arguments, **options)

    monkeypatch.setattr(FileStorage, "pwritev", count)
    monkeypatch.setattr(os, "fdatasync", lambda fd: calls.append("sync"))
    async with open_image(path) as node:
        assert calls[0] == "sync"
        await node.pwrite(0, b"x")
    assert "write" in calls
    calls.clear()
    async with open_image(path, read_only=True) as node:
        assert not calls
        await node.reopen(read_only=False)
        assert calls[0] == "sync"


@pytest.mark.parametrize("what", ["write_zeroes", "discard"])
@pytest.mark.asyncio
async def test_bitmaps_know_what_a_refused_request_has_changed(what):
    """It is made read-only, and its bitmaps are stored, while the request waits for
    the tables that it has changed to reach the disk."""
    size = 2 * MIB
    for nb_turns in range(0, 150, 10):
        memory = MemoryStorage(created(size=size))
        storage = FaultyStorage(memory)
        options = {"l2_cache_size": 1}
        driver = await Qcow2Driver.open(storage, read_only=False, options=options)
        node = Node(driver, filename="disk")
        await node.pwrite(0, b"x" * size)
        await node.flush()
        driver.bitmap_add("b", granularity=512)
        storage.rules = [Rule(0, kinds=[FLUSH], count=-1, turns=30)]
        work = asyncio.create_task(getattr(node, what)(512, size - 1024))
        for _ in range(nb_turns):
            await asyncio.sleep(0)
        await node.reopen(read_only=True)
        with contextlib.suppress(BlockError):
            await work
        await node.close()
        driver = await Qcow2Driver.open(memory, read_only=True, options={})
        node = Node(driver, filename="disk")
        found = bytes(await node.pread(0, size))
        changed = [n for n in range(size // 512) if not found[512 * n]]
        bits = node.dirty_bitmaps["b"].bits
        assert all(bits[n >> 3] >> (n & 7) & 1 for n in changed), nb_turns
        await node.close()

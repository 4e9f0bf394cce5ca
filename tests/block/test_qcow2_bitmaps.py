"""Persistent dirty bitmaps: ours for QEMU, QEMU's for us, and a model."""

import asyncio
import contextlib
import json
import os
import random
import subprocess

import numpy as np
import pytest

from nbdqcow import open_image
from nbdqcow.errors import BlockError, ImageError
from nbdqcow.formats.qcow2.memory_bitmap import Bitmap, BitmapInfo
from tests.block.qemu import check, create, qemu_img
from tests.conftest import wait_until_listening

MiB = 1 << 20
SEED = int(os.environ.get("NBDQCOW_SEED", random.randrange(1 << 32)))


def listed(path):
    info = json.loads(qemu_img("info", "--output=json", path))
    return {
        b["name"]: (b["granularity"], set(b["flags"]))
        for b in info["format-specific"]["data"].get("bitmaps", [])
    }


@contextlib.contextmanager
def qemu_nbd(path, *options):
    socket = path.with_suffix(".sock")
    process = subprocess.Popen(["qemu-nbd", *options, "-k", socket, path])
    try:
        wait_until_listening(socket, process)
        yield f"nbd+unix:///?socket={socket}"
    finally:
        process.terminate()
        process.wait()


def dirty_as_qemu_sees(path, name):
    """Return the dirty ranges of a bitmap that qemu-nbd exports."""
    with qemu_nbd(path, "-r", "-t", "-f", "qcow2", "-B", name) as uri:
        text = subprocess.run(
            ["nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", uri],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    merged = []
    for extent in json.loads(text):
        if extent["type"] & 1:
            start, end = extent["offset"], extent["offset"] + extent["length"]
            if merged and merged[-1][1] == start:
                start = merged.pop()[0]
            merged.append((start, end))
    return merged


async def dirty(node, name):
    found = []
    position = 0
    while position < node.size:
        lengths, states = await node.dirty_bitmaps[name].extents(
            position, node.size - position, 1000
        )
        assert all(states[1:] != states[:-1])
        for length, state in zip(lengths.tolist(), states.tolist(), strict=True):
            if state and found and found[-1][1] == position:
                found[-1] = (found[-1][0], position + length)
            elif state:
                found.append((position, position + length))
            position += length
    return found


def test_qemu_reads_what_we_kept(tmp_path):
    path = create(tmp_path / "a")

    async def run():
        async with open_image(path) as node:
            await node.pwrite(0, b"1" * MiB)
            node.driver.bitmap_add("b0")
            node.driver.bitmap_add("fine", granularity=512)
            node.driver.bitmap_add("off", enabled=False)
            assert node.try_pwrite(70_000, b"x" * 10)
            await node.pwrite(3 * MiB - 1, b"yy")
            await node.write_zeroes(2 * MiB, 65536)
            assert await dirty(node, "b0") == [
                (65536, 131072),
                (2 * MiB, 2 * MiB + 65536),
                (3 * MiB - 65536, 3 * MiB + 65536),
            ]

    asyncio.run(run())
    check(path)
    assert listed(path) == {
        "b0": (65536, {"auto"}),
        "fine": (512, {"auto"}),
        "off": (65536, set()),
    }
    assert dirty_as_qemu_sees(path, "fine") == [
        (69632, 70144),
        (2 * MiB, 2 * MiB + 65536),
        (3 * MiB - 512, 3 * MiB + 512),
    ]
    qemu_img("bitmap", "--merge", "fine", path, "off")
    subprocess.run(["qemu-io", "-c", "write 0 1", path], check=True, stdout=-3)

    async def again():
        async with open_image(path) as node:
            assert (await dirty(node, "fine"))[0] == (0, 512)
            assert (await dirty(node, "off"))[0] == (65536, 131072)
            assert node.try_pwrite(MiB - 1, b"z")
            await node.driver.bitmap_merge("off", "fine")
            assert (await dirty(node, "off"))[:2] == [
                (0, 131072),
                (MiB - 65536, MiB),
            ]
            node.driver.bitmap_clear("fine")
            assert await dirty(node, "fine") == []
            node.driver.bitmap_enable("fine", False)
            await node.pwrite(0, b"1")
            assert await dirty(node, "fine") == []
            await node.driver.bitmap_remove("b0")

    asyncio.run(again())
    check(path)
    assert listed(path) == {"fine": (512, set()), "off": (65536, set())}

    async def remove():
        async with open_image(path) as node:
            for name in ("fine", "off"):
                await node.driver.bitmap_remove(name)

    asyncio.run(remove())
    check(path)
    assert listed(path) == {}


def test_writes_to_subclusters_are_marked(tmp_path):
    path = create(tmp_path / "a", extended_l2="on")

    async def run():
        async with open_image(path) as node:
            node.driver.bitmap_add("b", granularity=512)
            await node.pwrite(4096, b"1" * 2048)
            assert node.try_pwrite(8192, b"2" * 1024)
            assert node.try_pwrite(4096, b"3")
            await node.write_zeroes(6144, 2048)
            await node.write_zeroes(MiB + 2048 + 512, 512)
            await node.discard(2 * MiB, 65536)
            # Not a cluster, so nothing is freed: marked all the same, as by QEMU.
            await node.discard(3 * MiB + 512, 1024)
            assert await dirty(node, "b") == [
                (4096, 9216),
                (MiB + 2560, MiB + 3072),
                (2 * MiB, 2 * MiB + 65536),
                (3 * MiB + 512, 3 * MiB + 1536),
            ]

    asyncio.run(run())
    check(path)
    assert dirty_as_qemu_sees(path, "b")[0] == (4096, 9216)


def test_in_use_until_closed(tmp_path):
    path = create(tmp_path / "a")
    qemu_img("bitmap", "--add", path, "b0")

    async def run():
        async with open_image(path) as node:
            await node.pwrite(0, b"1")
            await node.flush()
            copy = tmp_path / "copy"
            copy.write_bytes(path.read_bytes())
        return copy

    copy = asyncio.run(run())
    assert listed(path) == {"b0": (65536, {"auto"})}
    check(copy)
    assert listed(copy) == {"b0": (65536, {"auto", "in-use"})}

    async def open_copy():
        async with open_image(copy) as node:
            assert node.driver.bitmap_list() == [BitmapInfo("b0", 65536, True, True)]
            assert not node.dirty_bitmaps
            with pytest.raises(BlockError, match="inconsistent"):
                node.driver.bitmap_clear("b0")
            await node.pwrite(MiB, b"1")
        async with open_image(copy) as node:
            await node.driver.bitmap_remove("b0")

    asyncio.run(open_copy())
    check(copy)
    assert listed(copy) == {}


def test_refusals(tmp_path):
    path = create(tmp_path / "a")
    old = create(tmp_path / "b", compat="0.10")

    async def run():
        async with open_image(path) as node:
            node.driver.bitmap_add("x")
            for arguments, text in (
                (("x",), "already"),
                (("",), "1 to 1023"),
                (("y", 511), "power of 2"),
                (("y", 256), "power of 2"),
            ):
                with pytest.raises(BlockError, match=text):
                    node.driver.bitmap_add(
                        arguments[0], granularity=(*arguments, None)[1]
                    )
            with pytest.raises(BlockError, match="there is no bitmap 'z'"):
                await node.driver.bitmap_merge("x", "z")
            await node.driver.snapshot_create("s")
            with pytest.raises(BlockError, match="bitmaps"):
                await node.driver.snapshot_apply("s")
        async with open_image(old) as node:
            with pytest.raises(BlockError, match="version 2"):
                node.driver.bitmap_add("x")

    asyncio.run(run())
    check(path)


def test_marks_and_extents_agree_with_a_model():
    print(f"NBDQCOW_SEED={SEED}")
    rnd = random.Random(SEED)
    for _ in range(100):
        size = rnd.randrange(1, 3000) * 512 + rnd.randrange(512)
        bits = rnd.choice((9, 10, 12))
        bitmap = Bitmap("x", size, bits)
        model = np.zeros(size, np.bool_)
        for _ in range(rnd.randrange(8)):
            offset = rnd.randrange(size)
            length = rnd.randrange(1, size - offset + 1)
            length = min(length, rnd.choice((1, 5000, size)))
            bitmap.mark(offset, length)
            end = -(-(offset + length) >> bits << bits)
            model[offset >> bits << bits : end] = True
            model[(offset + length - 1) >> bits << bits :][: 1 << bits] = True
        start = rnd.randrange(size)
        length = rnd.randrange(1, size - start + 1)
        lengths, states = asyncio.run(bitmap.extents(start, length, 1 << 30))
        assert lengths.sum() == length
        expected = model[start : start + length]
        assert (np.repeat(states, lengths.astype(np.int64)) == expected).all()


@pytest.mark.parametrize("missing", ["backing file", "place for a data file"])
def test_an_image_that_could_not_be_opened_keeps_its_bitmaps(tmp_path, missing):
    """They are in use on disk by the time that its backing file is looked for."""
    base = create(tmp_path / "base", MiB)
    path = tmp_path / "a"
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", path)
    options = {}

    async def use():
        async with open_image(path) as node:
            if not node.driver.bitmap_list():
                node.driver.bitmap_add("kept")
            await node.pwrite(0, b"x" * 512)
            (info,) = node.driver.bitmap_list()
            assert not info.inconsistent

    async def fail():
        with pytest.raises(ImageError, match="Could not open"):
            await open_image(path, driver_options=options)

    asyncio.run(use())
    if missing == "backing file":
        base.rename(tmp_path / "other")
    else:
        options["data_file"] = str(base)
    asyncio.run(fail())
    if missing == "backing file":
        (tmp_path / "other").rename(base)
    asyncio.run(use())
    check(path)


@pytest.mark.parametrize("options", ["cluster_size=4k", "extended_l2=on"])
def test_of_a_cluster_that_becomes_zero_the_request_is_marked(tmp_path, options):
    """The rest of it was zero before."""
    below, path = tmp_path / "below", tmp_path / "a"
    qemu_img("create", "-qf", "qcow2", "-o", "cluster_size=512", below, str(MiB))
    subprocess.run(["qemu-io", "-c", "write 1k 512", below], check=True, stdout=-3)
    qemu_img("create", "-qf", "qcow2", "-o", options, "-b", below, "-F", "qcow2", path)

    async def run():
        async with open_image(path) as node:
            node.driver.bitmap_add("b", granularity=512)
            await node.write_zeroes(1024, 512)
            assert await dirty(node, "b") == [(1024, 1536)]
            assert await node.pread(0, 4096) == bytes(4096)

    asyncio.run(run())
    check(path)

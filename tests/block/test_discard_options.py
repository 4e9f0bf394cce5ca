"""What happens to the space of freed clusters, by QEMU's options."""

import asyncio
import json
import os
import random
import subprocess

import pytest

from nbdqcow import open_image
from nbdqcow.errors import ImageError
from tests.block.qemu import create, qemu_img

MiB = 1 << 20
SIZE = 8 * MiB


def run(path, work, **options):
    async def opened():
        file = {"driver": "file", "filename": str(path)}
        name = "json:" + json.dumps({"driver": "qcow2", "file": file} | options)
        async with open_image(name, discard=options.get("discard", "unmap")) as node:
            if not path.name.startswith("compressed"):
                await node.pwrite(0, b"x" * 4 * MiB)
                await node.flush()
            await work(node)

    asyncio.run(opened())
    qemu_img("check", path)
    return os.stat(path).st_blocks * 512


async def discard(node):
    await node.discard(0, 4 * MiB)


async def replace_compressed_and_shared(node):
    await node.driver.snapshot_create("s")
    await node.pwrite(0, b"y" * 4 * MiB)
    await node.driver.snapshot_delete("s")


def test_discard_request(tmp_path):
    assert run(create(tmp_path / "a", SIZE), discard) < MiB
    kept = run(create(tmp_path / "b", SIZE), discard, **{"pass-discard-request": False})
    assert kept > 4 * MiB
    ignored = run(create(tmp_path / "c", SIZE), discard, discard="ignore")
    assert ignored > 4 * MiB


def test_discard_snapshot(tmp_path):
    work = replace_compressed_and_shared
    assert run(create(tmp_path / "a", SIZE), work) < 5 * MiB
    kept = run(create(tmp_path / "b", SIZE), work, **{"pass-discard-snapshot": False})
    assert kept > 8 * MiB


def test_discard_other(tmp_path):
    """A compressed cluster that is overwritten is freed by no guest's wish."""
    source = tmp_path / "source"
    rnd = random.Random(3)
    source.write_bytes(
        b"".join(rnd.randbytes(32768) + bytes(32768) for _ in range(64))
        + bytes(4 * MiB)
    )
    lengths = []
    for passed in (False, True):
        path = tmp_path / f"compressed{passed}"
        qemu_img("convert", "-cO", "qcow2", source, path)

        async def overwrite(node):
            await node.pwrite(0, b"y" * 4 * MiB)

        lengths.append(run(path, overwrite, **{"pass-discard-other": passed}))
    assert lengths[0] > 5.5 * MiB
    assert lengths[1] < 5 * MiB


@pytest.mark.parametrize("extended_l2", ["off", "on"])
def test_discarded_clusters_that_stay(tmp_path, extended_l2):
    async def work(node):
        await node.discard(MiB, 2 * MiB)
        assert bytes(await node.pread(MiB, 2 * MiB)) == bytes(2 * MiB)
        await node.pwrite(MiB, b"z" * 100)

    path = create(tmp_path / "a", SIZE, extended_l2=extended_l2)
    run(path, work, **{"discard-no-unref": True})
    assert json.loads(qemu_img("check", "--output=json", path))[
        "allocated-clusters"
    ] == (4 * MiB // 65536)
    if extended_l2 == "off":
        assert os.stat(path).st_blocks * 512 < 3 * MiB
    raw = tmp_path / "raw"
    qemu_img("convert", "-O", "raw", path, raw)
    assert raw.read_bytes() == (
        b"x" * MiB + b"z" * 100 + bytes(2 * MiB - 100) + b"x" * MiB + bytes(4 * MiB)
    )


def test_what_snapshots_have_is_not_given_back(tmp_path):
    async def work(node):
        await node.driver.snapshot_create("s")
        await node.discard(0, 4 * MiB)
        await node.flush()
        await node.driver.snapshot_apply("s")
        assert bytes(await node.pread(0, 4 * MiB)) == b"x" * 4 * MiB

    for number, options in enumerate(({}, {"discard-no-unref": True})):
        run(create(tmp_path / f"a{number}", SIZE), work, **options)


def test_version_2_has_no_clusters_to_keep(tmp_path):
    path = create(tmp_path / "a", SIZE, compat="0.10")
    with pytest.raises(ImageError, match="only supported since qcow2 version 3"):
        run(path, discard, **{"discard-no-unref": True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"cache-size": 65536, "l2-cache-size": 131072},
            "l2-cache-size may not",
        ),
        ({"cache-size": 1, "refcount-cache-size": 2}, "refcount-cache-size may not"),
        (
            {"cache-size": 9, "l2-cache-size": 1, "refcount-cache-size": 1},
            "may not be set at the same time",
        ),
    ],
)
def test_cache_sizes_are_refused_as_by_qemu(tmp_path, options, message):
    path = create(tmp_path / "a", SIZE)
    with pytest.raises(ImageError, match=message):
        run(path, discard, **options)
    file = {"driver": "file", "filename": str(path)}
    name = "json:" + json.dumps({"driver": "qcow2", "file": file} | options)
    done = subprocess.run(["qemu-io", "-c", "read 0 1", name], capture_output=True)
    assert message in done.stderr.decode()


def test_cached_tables_are_given_up(tmp_path):
    path = create(tmp_path / "a", SIZE)

    async def work(node):
        tables = node.driver.tables
        assert tables.young
        for _ in range(600):
            await asyncio.sleep(0.05)
            if not tables.young and not tables.old:
                break
        assert not tables.young
        assert not tables.old
        assert bytes(await node.pread(0, 3)) == b"xxx"

    run(path, work, **{"cache-clean-interval": 1, "cache-size": MiB})


def test_nobody_looks_after_an_image_that_could_not_be_opened(tmp_path):
    path = create(tmp_path / "a", SIZE)
    qemu_img("bitmap", "--add", path, "b0")
    image = bytearray(path.read_bytes())
    # Behind the extension's head are the number of bitmaps, and of their directory
    # the length and the offset; there is the length of a table.
    start = image.index((0x23852875).to_bytes(4, "big")) + 24
    entry = int.from_bytes(image[start : start + 8], "big")
    image[entry + 8 : entry + 12] = b"\xff" * 4
    path.write_bytes(image)

    async def work():
        with pytest.raises(ImageError, match="Bitmap 'b0' doesn't satisfy"):
            async with open_image(path, driver_options={"cache_clean_interval": 600}):
                pass
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(work())


@pytest.mark.parametrize(
    ("what", "keeps"),
    [("discard", False), ("discard", True), ("write_zeroes", False)],
)
def test_a_large_request_gives_others_turns(tmp_path, what, keeps):
    """Though there is nothing in it to wait for. And it ends."""
    path = tmp_path / "a.qcow2"
    size = 64 << 40
    qemu_img("create", "-qf", "qcow2", path, size)
    nb_turns = 0

    async def work():
        nonlocal nb_turns
        options = {"discard_no_unref": keeps}
        async with (
            asyncio.timeout(60),
            open_image(path, discard="unmap", driver_options=options) as node,
        ):
            # Tables, in memory: slices of them cost more than what is passed over.
            await node.pwrite(0, b"x")
            await node.pwrite(size // 2, b"x")
            request = asyncio.create_task(getattr(node, what)(0, size))
            while not request.done():
                nb_turns += 1
                await asyncio.sleep(0)
            await request

    asyncio.run(work())
    # Most of it is passed over, hundreds of missing tables at a look.
    assert nb_turns > 2
    qemu_img("check", path)

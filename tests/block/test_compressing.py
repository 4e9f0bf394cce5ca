"""Images that are written to by way of ``compress``: every cluster is compressed,
and nothing is lost that was written beside something else."""

import asyncio
import json
import random
from itertools import pairwise

import pytest

from nbdqcow import open_image
from nbdqcow.errors import ImageError
from tests.block.qemu import check, create, qemu_img

pytestmark = pytest.mark.asyncio

MiB = 1 << 20


def compressing(path, format_="qcow2", **options):
    """Return the name of an image that compresses what is written to it."""
    file = {"driver": format_, "file": {"driver": "file", "filename": str(path)}}
    return f"json:{json.dumps({'driver': 'compress', 'file': file, **options})}"


def pieces_of(rnd, length, longest):
    """Yield offsets and lengths that make up ``[0, length)``, in no order."""
    cuts = [0]
    while cuts[-1] < length:
        cuts.append(min(length, cuts[-1] + rnd.randrange(1, longest)))
    pieces = [(start, stop - start) for start, stop in pairwise(cuts)]
    rnd.shuffle(pieces)
    return pieces


@pytest.mark.parametrize(
    ("format_", "options"),
    [
        ("qcow2", {}),
        ("qcow2", {"compression_type": "zstd", "cluster_size": 2 * MiB}),
        ("qcow2", {"extended_l2": "on", "cluster_size": 16384}),
        ("qcow", {}),
    ],
    ids=str,
)
async def test_writes_of_any_size_at_once(tmp_path, format_, options):
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rnd = random.Random(seed)
    path, size = tmp_path / "image", 4 * MiB + 512 * rnd.randrange(9)
    if options:
        create(path, size, **options)
    else:
        qemu_img("create", "-qf", format_, path, size)
    content = bytearray()
    while len(content) < size:
        content += rnd.randbytes(64) * rnd.randrange(1, 300)
    del content[size:]
    async with open_image(compressing(path, format_)) as node:
        assert node.try_pwrite(0, b"inline") is False

        async def write(offset, length):
            if rnd.randrange(4):
                data = content[offset : offset + length]
                await node.pwrite(offset, data, fua=rnd.randrange(9) == 0)
            else:
                content[offset : offset + length] = bytes(length)
                await node.write_zeroes(offset, length)

        for longest in (20_000, 300_000):
            writes = [write(*piece) for piece in pieces_of(rnd, size, longest)]
            await asyncio.gather(*writes)
            assert await node.pread(0, size) == content
        await node.flush()
    raw = tmp_path / "raw"
    qemu_img("convert", "-f", format_, "-O", "raw", path, raw)
    assert raw.read_bytes() == content
    if format_ == "qcow2":
        found = check(path)
        assert found.get("compressed-clusters", 0) <= found["allocated-clusters"]


async def test_all_is_compressed_also_what_was_not(tmp_path):
    path = tmp_path / "image"
    create(path, MiB)
    async with open_image(path) as node:
        await node.pwrite(0, b"plain" * 40_000)
    async with open_image(compressing(path)) as node:
        await node.pwrite(70_000, b"x" * 100)
        await node.pwrite(3 * 65536, b"part of a cluster")
        await node.pwrite(5 * 65536, bytes(65536))
        expected = bytearray(b"plain" * 40_000)
        expected[70_000:70_100] = b"x" * 100
        assert await node.pread(0, 200_000 - 3400) == expected[: 200_000 - 3400]
    found = check(path)
    # Clusters 0 and 2 are as they were, 1 and 3 are written anew; zeroes are data.
    assert (found["allocated-clusters"], found["compressed-clusters"]) == (5, 3)


async def test_zeroes_are_looked_for_if_asked_to(tmp_path):
    path = tmp_path / "image"
    create(path, MiB)
    name = compressing(path, **{"detect-zeroes": "unmap", "discard": "unmap"})
    async with open_image(name) as node:
        await node.pwrite(0, bytes(2 * 65536))
        await node.pwrite(5 * 65536, b"a" * 65536)
    found = check(path)
    assert (found["allocated-clusters"], found["compressed-clusters"]) == (1, 1)


async def test_data_of_the_backing_file_stays_beside_what_is_written(tmp_path):
    base, path = tmp_path / "base", tmp_path / "image"
    create(base, MiB)
    async with open_image(base) as node:
        await node.pwrite(0, b"b" * MiB)
    qemu_img("create", "-qf", "qcow2", "-b", base, "-F", "qcow2", path)
    async with open_image(compressing(path)) as node:
        await asyncio.gather(
            node.pwrite(100, b"x" * 10), node.pwrite(65000, b"y" * 1000)
        )
        expected = bytearray(b"b" * MiB)
        expected[100:110], expected[65000:66000] = b"x" * 10, b"y" * 1000
        assert await node.pread(0, MiB) == expected
    assert check(path)["compressed-clusters"] == 2


async def test_reopening_leaves_it_compressing(tmp_path):
    path = tmp_path / "image"
    create(path, MiB)
    async with open_image(compressing(path)) as node:
        await node.reopen(read_only=True)
        await node.reopen(read_only=False)
        assert node.try_pwrite(0, b"a" * 65536) is False
        await node.pwrite(0, b"a" * 65536)
    assert check(path)["compressed-clusters"] == 1


@pytest.mark.parametrize(
    ("size", "cluster_size", "minimum"),
    [(MiB, 65536, 65536), (4 * MiB, 2 * MiB, 65536), (MiB + 4096, 65536, 4096)],
)
async def test_clients_are_told_of_the_clusters(tmp_path, size, cluster_size, minimum):
    path = tmp_path / "image"
    create(path, size, cluster_size=cluster_size)
    async with open_image(compressing(path)) as node:
        assert node.minimum_block_size == minimum


async def test_nothing_is_moved_past_it(tmp_path):
    path = tmp_path / "image"
    create(path, MiB)
    async with open_image(compressing(path)) as node:
        assert not node.writes_in_threads
        assert not node.moves_data


@pytest.mark.parametrize("format_", ["raw", "file", "luks"])
async def test_formats_that_can_not(tmp_path, format_):
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    file = {"driver": format_, "filename": str(path)}
    if format_ != "file":
        file = {"driver": format_, "file": {"driver": "file", "filename": str(path)}}
    name = f"json:{json.dumps({'driver': 'compress', 'file': file})}"
    with pytest.raises(ImageError, match=f"underlying format: {format_}"):
        await open_image(name)

"""The jobs behind rebase and commit, on random chains of images."""

import json
import random
import subprocess

import pytest

from nbdqcow import open_image
from nbdqcow.jobs.commit import commit
from nbdqcow.jobs.control import JobCancelled, JobControl
from nbdqcow.jobs.rebase import rebase
from nbdqcow.types import DATA, UNALLOCATED, ZERO

KiB = 1 << 10
SIZES = (1024 * KiB, 1500 * KiB, 700 * KiB + 512)


def create(path, size, options, backing=None):
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options]
    if backing is not None:
        words += ["-b", backing, "-F", "qcow2"]
    subprocess.run([*words, path, str(size)], check=True, capture_output=True)
    return path


async def scribble(node, rng, nb_writes=12):
    for _ in range(nb_writes):
        offset = rng.randrange(node.size)
        length = min(rng.choice((512, 5000, 70_000)), node.size - offset)
        if rng.random() < 0.3:
            await node.write_zeroes(offset, length)
        else:
            await node.pwrite(offset, bytes([rng.randrange(1, 4)]) * length)


def make_chain(tmp_path, rng, nb_images, options="cluster_size=4096"):
    paths = []
    for index in range(nb_images):
        path = tmp_path / f"image{index}"
        backing = paths[-1] if paths else None
        paths.append(create(path, rng.choice(SIZES), options, backing))
    return paths


async def fill(paths, rng):
    for path in paths:
        async with open_image(path, format="qcow2") as node:
            await scribble(node, rng)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "options", ["cluster_size=4096", "compat=0.10", "extended_l2=on"]
)
async def test_rebase_keeps_the_disk(tmp_path, options, seed):
    rng = random.Random(seed)
    old = make_chain(tmp_path, rng, 2, options)
    new = create(tmp_path / "new", rng.choice(SIZES), "cluster_size=65536")
    await fill([*old, new], rng)
    async with open_image(old[-1], format="qcow2") as node:
        before = bytes(await node.pread(0, node.size))
        done = []
        control = JobControl(lambda n, total: done.append((n, total)))
        async with open_image(new, format="qcow2", read_only=True) as backing:
            await rebase(node, backing, control)
        assert done[-1] == (node.size, node.size)
        await node.driver.change_backing_file(str(new), "qcow2")
    async with open_image(old[-1], format="qcow2") as node:
        assert node.backing.filename == str(new)
        assert await node.pread(0, node.size) == before
        # To no backing image at all.
        await rebase(node, None, JobControl())
        await node.driver.change_backing_file(None, None)
    async with open_image(old[-1], format="qcow2") as node:
        assert node.backing is None
        assert await node.pread(0, node.size) == before
        # And back to the first one.
        async with open_image(old[0], format="qcow2", read_only=True) as backing:
            await rebase(node, backing, JobControl())
        await node.driver.change_backing_file(str(old[0]), "qcow2")
    async with open_image(old[-1], format="qcow2") as node:
        assert await node.pread(0, node.size) == before


@pytest.mark.parametrize("options", ["compat=0.10", "compat=1.1", "extended_l2=on"])
@pytest.mark.asyncio
async def test_a_backing_file_shows_until_it_is_closed(tmp_path, options):
    """The image names it no longer: zeroes must still hide it."""
    base = create(tmp_path / "base", 1 << 20, "cluster_size=65536")
    async with open_image(base, format="qcow2") as node:
        await node.pwrite(0, b"b" * node.size)
    path = create(tmp_path / "top", 1 << 20, options, base)
    async with open_image(path, format="qcow2") as node:
        await node.change_backing_file(None, None)
        await node.write_zeroes(0, 1 << 18, may_unmap=True)
        await node.write_zeroes(1 << 18, 5000, may_unmap=False)
        assert await node.pread(0, 1 << 18) == bytes(1 << 18)
        assert await node.pread(1 << 18, 5000) == bytes(5000)
        assert await node.pread((1 << 18) + 5000, 1000) == b"b" * 1000
        await node.discard(1 << 19, 1 << 18)
        seen = bytes(await node.pread(1 << 19, 1 << 18))
        assert seen == (b"b" if options == "compat=0.10" else b"\0") * (1 << 18)
    subprocess.run(["qemu-img", "check", "-q", path], check=True)


@pytest.mark.asyncio
async def test_rebase_to_an_image_of_the_chain(tmp_path, seed):
    """What only the shared images have is not copied."""
    rng = random.Random(seed)
    paths = make_chain(tmp_path, rng, 3)
    await fill(paths, rng)
    async with open_image(paths[-1], format="qcow2") as node:
        before = bytes(await node.pread(0, node.size))
        shared = node.backing.backing
        await rebase(node, shared, JobControl(), shared=shared)
        await node.driver.change_backing_file(str(paths[0]), "qcow2")
    async with open_image(paths[-1], format="qcow2") as node:
        assert node.backing.filename == str(paths[0])
        assert await node.pread(0, node.size) == before


@pytest.mark.asyncio
@pytest.mark.parametrize("nb_above", [1, 2])
async def test_commit(tmp_path, nb_above, seed):
    rng = random.Random(seed)
    paths = make_chain(tmp_path, rng, nb_above + 2)
    await fill(paths, rng)
    base_path = paths[-1 - nb_above]
    async with open_image(paths[-1], format="qcow2") as top:
        before = bytes(await top.pread(0, top.size))
        above = top
        for _ in range(nb_above - 1):
            above = above.backing
        await above.backing.close()
        above.backing = await open_image(base_path, format="qcow2")
        await commit(top, above.backing, JobControl())
        assert await top.pread(0, top.size) == before
        if nb_above == 1:
            await top.driver.make_empty()
            assert await top.pread(0, top.size) == before
    async with open_image(base_path, format="qcow2") as base:
        assert base.size >= len(before)
        assert await base.pread(0, len(before)) == before


@pytest.mark.asyncio
async def test_a_cancelled_job_leaves_the_disk_as_it_was(tmp_path, seed):
    rng = random.Random(seed)
    paths = make_chain(tmp_path, rng, 2)
    await fill(paths, rng)
    async with open_image(paths[-1], format="qcow2") as node:
        before = bytes(await node.pread(0, node.size))
        control = JobControl()
        control.cancel()
        with pytest.raises(JobCancelled):
            await rebase(node, None, control)
        assert await node.pread(0, node.size) == before


@pytest.mark.asyncio
async def test_zeroes_of_the_old_backing_image_are_written_out(tmp_path):
    """As with qemu-img; what is behind its end need not be."""
    old = create(tmp_path / "old", 512 * KiB, "cluster_size=65536")
    new = create(tmp_path / "new", 1024 * KiB, "cluster_size=65536")
    async with open_image(old, format="qcow2") as node:
        await node.pwrite(0, b"o" * 64 * KiB)
    async with open_image(new, format="qcow2") as node:
        await node.pwrite(0, b"n" * 768 * KiB)
    path = create(tmp_path / "top", 1024 * KiB, "cluster_size=65536", old)
    async with open_image(path, format="qcow2") as node:
        async with open_image(new, format="qcow2", read_only=True) as backing:
            await rebase(node, backing, JobControl())
        await node.driver.change_backing_file(str(new), "qcow2")
    async with open_image(path, format="qcow2", read_only=True) as node:
        expected = b"o" * 64 * KiB + bytes(960 * KiB)
        assert bytes(await node.pread(0, node.size)) == expected
        kinds = [(await node.driver.map(n * 64 * KiB, 1))[0] for n in range(16)]
    assert kinds == [DATA] * 8 + [ZERO] * 4 + [UNALLOCATED] * 4


@pytest.mark.asyncio
async def test_what_is_allocated_as_a_whole_is_written_as_a_whole(tmp_path):
    new = create(tmp_path / "new", 512 * KiB, "cluster_size=65536")
    old = create(tmp_path / "old", 512 * KiB, "cluster_size=65536", new)
    async with open_image(old, format="qcow2") as node:
        await node.pwrite(64 * KiB, b"o" * 64 * KiB)
    path = create(tmp_path / "top", 512 * KiB, "cluster_size=131072", old)
    async with open_image(path, format="qcow2") as node:
        shared = node.backing.backing
        await rebase(node, shared, JobControl(), shared=shared)
        await node.driver.change_backing_file(str(new), "qcow2")
    # It says zero, too, of what is a hole of the file.
    line = ["qemu-img", "map", "--output=json", path]
    stretches = json.loads(subprocess.check_output(line))
    assert [(one["start"], one["length"], one["data"]) for one in stretches] == [
        (0, 128 * KiB, True),
        (128 * KiB, 384 * KiB, False),
    ]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("format_", "options", "nb_stored"),
    [
        ("qcow2", "cluster_size=65536", 0),
        ("qcow2", "extended_l2=on", 0),
        # These have no zero clusters: the zeroes are written out.
        ("qcow2", "compat=0.10", 4),
        ("qcow", None, 64),
    ],
)
async def test_zeroes_hide_the_first_backing_image(
    tmp_path, format_, options, nb_stored
):
    """An image without a backing image gets one with data."""
    path, below = tmp_path / "image", tmp_path / "below"
    words = ["-o", options] if options else []
    create_it = ["qemu-img", "create", "-qf", format_, *words, path, "512K"]
    subprocess.run(create_it, check=True)
    below.write_bytes(b"\1" * 256 * KiB)
    async with open_image(path, format=format_) as node:
        async with open_image(below, format="raw", read_only=True) as backing:
            await rebase(node, backing, JobControl())
        await node.driver.change_backing_file(str(below), "raw")
    async with open_image(path, format=format_, read_only=True) as node:
        assert node.backing is not None
        assert bytes(await node.pread(0, node.size)) == bytes(512 * KiB)
        offset = nb_data = 0
        while offset < node.size:
            kind, _, length = await node.driver.map(offset, node.size - offset)
            nb_data += (kind == DATA) * length // node.driver.cluster_size
            offset += length
        assert nb_data == nb_stored

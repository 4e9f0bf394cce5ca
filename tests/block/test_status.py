"""Block status through backing chains, against what qemu-img map says."""

import asyncio
import json
import random
import subprocess
import sys

import pytest

from nbdqcow import open_image
from nbdqcow.block.status import STATE_PAST_END


def qemu_io(path, *commands, image_format="qcow2"):
    arguments = [a for c in commands for a in ("-c", c)]
    subprocess.run(
        ["qemu-io", "-f", image_format, *arguments, path],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def create(path, size, cluster_size, base=None):
    backing = ["-b", base, "-F", "qcow2"] if base else []
    subprocess.run(
        ["qemu-img", "create", "-qf", "qcow2", "-o", f"cluster_size={cluster_size}",
         *backing, path, str(size)],
        check=True,
    )  # fmt: skip


async def our_map(path, limit):
    found = []
    async with open_image(path, format="qcow2", read_only=True) as node:
        offset = 0
        while offset < node.size:
            extents = await node.block_status(offset, node.size - offset, limit)
            assert 1 <= len(extents.lengths) <= limit
            for length, state, depth in zip(
                extents.lengths, extents.states, extents.depths, strict=True
            ):
                row = (int(state), int(depth))
                if row[0] & STATE_PAST_END:
                    # qemu-img map has it in no image at all.
                    row = (row[0] & ~STATE_PAST_END, 0)
                if found and found[-1][1:] == row:
                    found[-1] = (found[-1][0] + int(length), *row)
                else:
                    found.append((int(length), *row))
                offset += int(length)
        assert offset == node.size
    return found


def qemu_map(path):
    output = subprocess.run(
        ["qemu-img", "map", "--output=json", path],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    found = []
    for extent in json.loads(output):
        state = 0 if extent["data"] else 3 if extent["zero"] else 1
        present = extent.get("present", True)
        row = (state, extent["depth"] + 1 if present else 0)
        if found and found[-1][1:] == row:
            found[-1] = (found[-1][0] + extent["length"], *row)
        else:
            found.append((extent["length"], *row))
    return found


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
@pytest.mark.parametrize("limit", [1, 7, 1 << 17])
def test_chain_of_three_as_qemu_sees_it(tmp_path, cluster_size, limit):
    rnd = random.Random(cluster_size + limit)
    sizes = [cluster_size * n for n in (300, 200, 400)]
    base = None
    for level, size in enumerate(sizes):
        path = tmp_path / f"{level}.qcow2"
        create(path, size, cluster_size, base)
        clusters = size // cluster_size
        commands = []
        for _ in range(30):
            start = rnd.randrange(clusters)
            length = rnd.randrange(1, min(20, clusters - start) + 1) * cluster_size
            verb = rnd.choice(("write", "write", "write -z", "write -zu"))
            commands.append(f"{verb} {start * cluster_size} {length}")
        qemu_io(path, *commands)
        base = path
    assert asyncio.run(our_map(path, limit)) == qemu_map(path)


def test_sparse_and_compressed(tmp_path):
    raw, path = tmp_path / "a.raw", tmp_path / "a.qcow2"
    raw.write_bytes(b"abc" * 100_000)
    subprocess.run(
        ["qemu-img", "convert", "-cf", "raw", "-O", "qcow2", raw, path], check=True
    )
    subprocess.run(["qemu-img", "resize", "-q", path, "16T"], check=True)
    extents = asyncio.run(our_map(path, 1 << 17))
    assert [e[1:] for e in extents] == [(0, 1), (3, 0)]
    assert sum(e[0] for e in extents) == 16 << 40


class Turns:
    """Counts the turns that others get on the event loop."""

    def __init__(self):
        self.nb = 0

    async def __aenter__(self):
        self._task = asyncio.create_task(self._count())
        return self

    async def __aexit__(self, *_):
        self._task.cancel()

    async def _count(self):
        while True:
            self.nb += 1
            await asyncio.sleep(0)


LARGEST = [
    ("qcow2", ["-o", "cluster_size=2M"], 1 << 60),
    ("qcow2", ["-o", "cluster_size=2M,extended_l2=on"], 1 << 59),
    ("qcow", [], 1 << 40),
]


@pytest.mark.parametrize(("image_format", "options", "size"), LARGEST)
def test_a_long_way_gives_others_turns(tmp_path, image_format, options, size):
    path = str(tmp_path / "disk")
    subprocess.run(
        ["qemu-img", "create", "-qf", image_format, *options, path, str(size)],
        check=True,
    )

    async def look():
        async with open_image(path, format=image_format) as node:
            await node.pwrite(size - 4096, bytes(4095) + b"x")
            _, _, covered = await node.driver.map(0, size)
            assert covered < size // 16
            async with Turns() as turns:
                await node.prefetch(0, size)
            assert turns.nb > 16
            async with Turns() as turns:
                extents = await node.block_status(0, size, 2)
            assert turns.nb > 4
            assert int(extents.lengths.sum()) == size
            assert len(extents.lengths) == 2

    asyncio.run(look())


def test_where_nothing_is_stored_a_discard_is_short(tmp_path):
    path = str(tmp_path / "disk")
    subprocess.run(
        ["qemu-img", "create", "-qf", "qcow2", "-o", "cluster_size=2M", path,
         str(1 << 60)],
        check=True,
    )  # fmt: skip

    async def clear():
        async with open_image(path) as node:
            await node.pwrite(1 << 59, b"x" * 4096)
            for clear in (node.write_zeroes, node.discard):
                async with Turns() as turns:
                    await clear(0, 1 << 60)
                # A look at one L1 entry after the other takes 2000.
                assert 2 < turns.nb < 200
            assert await node.reads_zero(0, 1 << 60)

    asyncio.run(clear())


LOADING = """
import asyncio, builtins, sys, threading
from nbdqcow import open_image
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.requests import Request
from nbdqcow.server.block_status import block_status

really_import = builtins.__import__

def watch(name, *arguments):
    if name == "numpy" and "numpy" not in sys.modules:
        print(threading.current_thread() is threading.main_thread())
    return really_import(name, *arguments)

async def look():
    async with open_image(sys.argv[1], format="raw") as node:
        builtins.__import__ = watch
        request = Request(nbd.CMD_BLOCK_STATUS, 0, 1, 0, 4096, None)
        await block_status(node, request, [(0, "base:allocation")])

asyncio.run(look())
"""


def test_the_loop_does_not_wait_for_numpy(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    found = subprocess.run(
        [sys.executable, "-c", LOADING, path], check=True, capture_output=True
    )
    assert found.stdout == b"False\n"

"""Zeroes and discards of a whole large disk that hides a backing file: each L2 table
has to say so, but not each cluster costs."""

import asyncio
import json
import random
import sys

import pytest

from nbdqcow import open_image
from tests.block.qemu import qemu_img

GiB = 1 << 30
SIZE = 32 * GiB
NB_CLUSTERS = SIZE >> 16
PLACES = (0, 65536, 5 * GiB + 12345, SIZE - 512)


class Calls:
    """Counts the calls of Python's functions."""

    def __enter__(self):
        self.nb = 0
        sys.setprofile(self._count)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _count(self, frame, event, argument):
        self.nb += event == "call"


def overlay(tmp_path, options):
    below, path = tmp_path / "below", tmp_path / "above"
    qemu_img("create", "-qf", "qcow2", below, str(SIZE))

    async def fill():
        async with open_image(below, format="qcow2") as node:
            for place in PLACES:
                await node.pwrite(place, b"below".ljust(512))

    asyncio.run(fill())
    qemu_img(
        *("create", "-qf", "qcow2", "-b", below, "-F", "qcow2"),
        *(["-o", options] if options else []),
        path,
    )
    return path


@pytest.mark.parametrize("options", ["", "extended_l2=on"])
@pytest.mark.parametrize("what", ["discard", "write_zeroes"])
def test_a_cluster_costs_nothing_where_all_are_alike(tmp_path, what, options):
    path = overlay(tmp_path, options)

    async def run():
        async with open_image(path, format="qcow2") as node:
            await node.pwrite(7 * GiB, b"x" * 200_000)
            clear = getattr(node, what)
            with Calls() as calls:
                await clear(0, SIZE)
            assert calls.nb < NB_CLUSTERS / 2
            with Calls() as calls:
                await clear(0, SIZE)
            assert calls.nb < NB_CLUSTERS / 4
            for place in (*PLACES, 7 * GiB):
                assert await node.pread(place, 512) == bytes(512)
            await node.pwrite(PLACES[2], b"again")

    asyncio.run(run())
    qemu_img("check", path)
    found = json.loads(qemu_img("map", "--output=json", path))
    stored = [e for e in found if not e["zero"]]
    assert all(e["depth"] == 0 for e in found)
    assert [e["start"] >> 16 for e in stored] == [PLACES[2] >> 16]


@pytest.mark.parametrize("may_unmap", [True, False])
@pytest.mark.parametrize("extended", [False, True])
def test_tables_of_all_kinds(tmp_path, extended, may_unmap, seed):
    """What is alike and what is not, against what is known."""
    rnd = random.Random(f"{seed}/{extended}/{may_unmap}")
    options = "cluster_size=16k,extended_l2=on" if extended else "cluster_size=4k"
    unit = 512
    size = 8 << 20
    below, path = tmp_path / "below", tmp_path / "above"
    model = bytearray(rnd.randbytes(size // 4).ljust(size, b"b"))
    below.write_bytes(model)
    qemu_img(
        *("create", "-qf", "qcow2", "-b", below, "-F", "raw", "-o", options),
        path,
    )

    def place():
        length = rnd.choice((1, 7, 64, 1000, 5000)) * unit
        offset = rnd.randrange(size // unit) * unit
        return offset, min(length, size - offset)

    async def run():
        async with open_image(path, format="qcow2") as node:
            for _ in range(40):
                offset, length = place()
                if rnd.random() < 0.3:
                    data = rnd.randbytes(length)
                    await node.pwrite(offset, data)
                elif rnd.random() < 0.2:
                    # In whole clusters: what is left in them stays.
                    offset &= ~16383
                    length = min(-(-length // 16384) * 16384, size - offset)
                    data = bytes(length)
                    await node.discard(offset, length)
                else:
                    data = bytes(length)
                    await node.write_zeroes(offset, length, may_unmap=may_unmap)
                model[offset : offset + length] = data
                assert await node.pread(0, size) == model

    asyncio.run(run())
    qemu_img("check", path)
    qemu_img("convert", "-O", "raw", path, tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == model

"""Writes by worker threads of several runs at once, and `convert` with them."""

import errno
import random

import pytest

from nbdqcow import open_image
from nbdqcow.jobs import convert as convert_module
from nbdqcow.jobs.control import JobControl
from nbdqcow.jobs.convert import convert
from nbdqcow.jobs.pieces import ConvertOptions
from nbdqcow.jobs.transfer import Transfer, ZeroesFound
from nbdqcow.types import DATA
from tests.block.image_tool import img
from tests.conftest import SEED

KiB, MiB = 1 << 10, 1 << 20

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize("options", ["", "cluster_size=512", "extended_l2=on"])
async def test_work_on_several_runs(tmp_path, options):
    """Some of them in place, some in new clusters of which only a part is written."""
    rng = random.Random(SEED)
    size = 4 * MiB - 512
    expected = bytearray(rng.randbytes(size))
    (tmp_path / "below").write_bytes(expected)
    path = tmp_path / "overlay"
    words = ["-o", options] if options else []
    below = tmp_path / "below"
    img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", below, *words, path)
    nb_calls = nb_runs = 0
    async with open_image(path) as node:
        cluster_size = node.driver.cluster_size
        for _ in range(30):
            cuts = sorted(rng.sample(range(-(-size // cluster_size)), 16))
            runs = []
            for first, end in zip(cuts[::2], cuts[1::2], strict=True):
                start, stop = first * cluster_size, min(end * cluster_size, size)
                if rng.random() < 0.3:
                    start += rng.randrange(cluster_size)
                    stop -= rng.randrange(cluster_size)
                if start < stop:
                    runs.append((start, stop - start))
            data = b"".join(rng.randbytes(length) for _, length in runs)

            def work(start, count, write, data=data):
                nonlocal nb_calls
                nb_calls += 1
                middle = count // 2
                write(middle, data[start + middle : start + count])
                write(0, data[start : start + middle])

            await node.pwrite_runs_by(runs, work)
            nb_runs += len(runs)
            position = 0
            for start, length in runs:
                part = data[position : position + length]
                expected[start : start + length] = part
                position += length
        assert bytes(await node.pread(0, size)) == expected
    img("check", "-q", path)
    assert nb_calls != nb_runs


async def test_neighbours_are_written_by_one_call(tmp_path):
    path = tmp_path / "disk"
    img("create", "-q", "-f", "qcow2", path, 64 * MiB)
    calls = []
    async with open_image(path) as node:
        runs = [(start, 128 * KiB) for start in range(0, 64 * MiB, MiB)]
        await node.pwrite_runs_by(runs, lambda start, count, write: calls.append(count))
        assert sum(calls) == len(runs) * 128 * KiB
        assert len(calls) < 4


async def test_a_failure_leaves_no_run_behind(tmp_path):
    path = tmp_path / "disk"
    img("create", "-q", "-f", "qcow2", path, 8 * MiB)

    def fail(start, count, write):
        write(0, b"x" * 100)
        raise OSError(errno.EIO, "as bad as can be")

    async with open_image(path) as node:
        runs = [(start, 128 * KiB) for start in range(0, 8 * MiB, MiB)]
        with pytest.raises(OSError, match="as bad"):
            await node.pwrite_runs_by(runs, fail)
        assert await node.reads_zero(0, 8 * MiB)
        # Nobody waits for those clusters.
        await node.pwrite(0, b"y" * 8 * MiB)
    img("check", "-q", path)


@pytest.mark.parametrize(
    ("options", "unit"),
    [
        ("cluster_size=16K", 16 * KiB),
        ("cluster_size=64K", 64 * KiB),
        ("cluster_size=256K", 256 * KiB),
        ("extended_l2=on", 2 * KiB),
    ],
)
async def test_zeroes_where_none_were_expected(tmp_path, monkeypatch, options, unit):
    """Threads find them, and they take no place, as if one had looked before."""
    monkeypatch.setattr(convert_module, "_FULL_ENOUGH", 4 * MiB)
    rng = random.Random(SEED)
    units = []
    with (tmp_path / "disk").open("wb") as file:
        for number in range(48):
            # Data and holes in turn, so that pieces are joined.
            data = bytearray(rng.randbytes(MiB))
            for _ in range(rng.choice([0, 0, 0, 1, 2]) if number > 12 else 0):
                start = rng.randrange(0, MiB, unit)
                data[start : start + unit] = bytes(unit)
            file.seek(2 * number * MiB)
            file.write(data)
            units += [any(data[start : start + unit]) for start in range(0, MiB, unit)]
        file.truncate(96 * MiB - 512)
    nb_found = 0
    write = Transfer.write_full_blocking

    def seen(*arguments):
        nonlocal nb_found
        try:
            write(*arguments)
        except ZeroesFound:
            nb_found += 1
            raise

    monkeypatch.setattr(Transfer, "write_full_blocking", seen)
    img(
        "create", "-q", "-f", "qcow2", "-o", options,
        tmp_path / "out", 96 * MiB - 512,
    )  # fmt: skip
    async with (
        open_image(tmp_path / "disk", format="raw", read_only=True) as source,
        open_image(tmp_path / "out") as target,
    ):
        options = ConvertOptions(target_is_zero=True, nb_in_flight=1)
        await convert([source], target, options, JobControl())
        expected = (tmp_path / "disk").read_bytes()
        assert bytes(await target.pread(0, target.size)) == expected
        nb_bytes = offset = 0
        while offset < target.size:
            kind, _, length = await target.driver.map(offset, target.size - offset)
            nb_bytes += length if kind == DATA else 0
            offset += length
    assert nb_found
    assert nb_bytes == sum(units) * unit
    img("check", "-q", tmp_path / "out")

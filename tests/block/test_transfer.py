"""Data that goes from file to file in worker threads: the same as by reading it."""

import asyncio
import errno
import itertools
import os
import random
import re

import pytest

from nbdqcow import open_image
from nbdqcow.errors import NotSupported
from nbdqcow.jobs import convert as convert_module
from nbdqcow.jobs import pieces as pieces_module
from nbdqcow.jobs.control import JobCancelled, JobControl
from nbdqcow.jobs.convert import convert
from nbdqcow.jobs.errors import CopyError
from nbdqcow.jobs.pieces import ConvertOptions
from nbdqcow.jobs.status import ZEROES, Place
from nbdqcow.jobs.transfer import CHUNK, ReadError, Transfer
from nbdqcow.jobs.zeroes import data_runs
from nbdqcow.storage import file as file_module
from nbdqcow.storage.file import FileStorage
from nbdqcow.storage.linux import copy_file_range
from tests.block.image_tool import img
from tests.conftest import SEED

KiB, MiB = 1 << 10, 1 << 20

pytestmark = pytest.mark.asyncio


def some_disk(rng, nb_pieces=100, piece=32 * KiB):
    kinds = [
        bytes(piece),
        rng.randbytes(piece),
        bytes(piece - 600) + rng.randbytes(600),
        rng.randbytes(700) + bytes(piece - 700),
    ]
    # Long stretches of each, and short ones.
    runs = rng.choices(kinds, k=nb_pieces // 2)
    runs += [kinds[1]] * (nb_pieces // 4) + [kinds[0]] * (nb_pieces // 4)
    return b"".join(runs) + rng.randbytes(3 * 512)


async def convert_file(sources, path, format_, **options):
    nodes = []
    async with open_image(path, format=format_) as target:
        for source, source_format in sources:
            nodes.append(await open_image(source, format=source_format, read_only=True))
        try:
            await convert(nodes, target, ConvertOptions(**options), JobControl())
        finally:
            for node in nodes:
                await node.close()
    return path.read_bytes()


async def make_sources(directory, rng):
    """Yield lists of sources of one disk, and its content."""
    disk = some_disk(rng)
    disk = disk[:MiB] + bytes(MiB) + disk[2 * MiB :]
    half = len(disk) // 2 // (64 * KiB) * 64 * KiB
    (directory / "disk.raw").write_bytes(disk)
    img("create", "-q", "-f", "qcow2", directory / "disk.qcow2", len(disk))
    async with open_image(directory / "disk.qcow2") as node:
        await node.pwrite(0, disk)
        await node.write_zeroes(MiB, MiB)
    (directory / "below.raw").write_bytes(disk[:half])
    with (directory / "below.raw").open("r+b") as file:
        file.truncate(len(disk))
    img(
        "create", "-q", "-f", "qcow2", "-F", "raw", "-b", directory / "below.raw",
        directory / "overlay.qcow2",
    )  # fmt: skip
    img("create", "-q", "-f", "qcow2", directory / "packed.qcow2", len(disk))
    async with open_image(directory / "packed.qcow2") as node:
        await node.pwrite_compressed(0, disk)
        await node.pwrite(640 * KiB + 512, disk[640 * KiB + 512 : 900 * KiB])
    yield [("packed.qcow2", "qcow2")], disk
    yield [("disk.raw", "raw")], disk
    yield [("disk.qcow2", "qcow2")], disk
    yield [("overlay.qcow2", "qcow2")], disk[:half] + bytes(len(disk) - half)
    yield [("disk.raw", "raw"), ("disk.qcow2", "qcow2")], disk + disk


def see(monkeypatch):
    """Count what is moved and what is read."""
    seen = {"moved": 0, "read": 0, "joined": 0}
    cls = convert_module._Conversion
    plan, join = cls._try_plan_move, cls._try_join

    def counted(self, piece):
        move = plan(self, piece)
        seen["read" if move is None else "moved"] += 1
        return move

    def counted_together(self, pieces):
        joined = join(self, pieces)
        seen["joined"] += joined is not None
        return joined

    monkeypatch.setattr(cls, "_try_plan_move", counted)
    monkeypatch.setattr(cls, "_try_join", counted_together)
    return seen


def move_one_by_one(monkeypatch):
    monkeypatch.setattr(pieces_module, "_MAX_JOINED", 0)


def copy_plainly(monkeypatch, allowed=True):
    """Have the kernel copy, whatever the file system is, or never."""
    monkeypatch.setattr(
        FileStorage,
        "_find_plain_copies",
        lambda self, status: status.st_dev if allowed else None,
    )


def move_at_length(monkeypatch):
    """Have pieces be longer than what is read at a time, in a small disk."""
    monkeypatch.setattr(pieces_module, "_PIECE", 512 * KiB)
    monkeypatch.setattr(pieces_module, "_NB_PIECES", 1)


@pytest.mark.parametrize("sparse", [0, 4096, 65536])
@pytest.mark.parametrize("format_", ["raw", "qcow2"])
@pytest.mark.parametrize("is_zero", [True, False])
async def test_same_bytes_as_by_reading(
    tmp_path, monkeypatch, sparse, format_, is_zero
):
    rng = random.Random(SEED)
    seen = see(monkeypatch)
    async for names, disk in make_sources(tmp_path, rng):
        sources = [(tmp_path / name, kind) for name, kind in names]
        made = []
        for way in ("copied", "moved", "moved at length", "joined", "read"):
            path = tmp_path / way
            img("create", "-q", "-f", format_, path, len(disk))
            if not is_zero and format_ == "raw":
                path.write_bytes(rng.randbytes(1) * len(disk))
            with monkeypatch.context() as patch:
                copy_plainly(patch, way == "copied")
                if way != "joined":
                    move_one_by_one(patch)
                if way == "read":
                    patch.setattr(FileStorage, "writes_in_threads", False)
                if way == "moved at length":
                    move_at_length(patch)
                options = {"sparse": sparse, "target_is_zero": is_zero} | {
                    "nb_in_flight": 1
                }
                made.append(await convert_file(sources, path, format_, **options))
            async with open_image(path, format=format_) as node:
                assert bytes(await node.pread(0, len(disk))) == disk
        assert len(set(made)) == 1
    looks = format_ == "qcow2" and sparse > 0
    assert seen["moved"] or (looks and sparse < 16 * KiB)
    assert bool(seen["joined"]) == (looks and is_zero)


async def test_cold_pages_are_read(tmp_path, monkeypatch):
    disk = random.Random(SEED).randbytes(3 * MiB)
    (tmp_path / "disk").write_bytes(disk)
    seen = see(monkeypatch)
    monkeypatch.setattr(FileStorage, "try_pick", lambda *arguments: None)
    img("create", "-q", "-f", "qcow2", tmp_path / "out", len(disk))
    sources = [(tmp_path / "disk", "raw")]
    await convert_file(sources, tmp_path / "out", "qcow2", target_is_zero=True)
    async with open_image(tmp_path / "out") as node:
        assert bytes(await node.pread(0, len(disk))) == disk
    assert seen["read"]
    assert not seen["moved"]
    assert not seen["joined"]


@pytest.mark.parametrize("copied", [True, False])
async def test_an_image_is_laid_out_in_order(tmp_path, monkeypatch, copied):
    """Pieces whose bytes are in several files, too."""
    rng = random.Random(SEED)
    copy_plainly(monkeypatch, copied)
    base, top, out = (tmp_path / name for name in ("base", "top", "out"))
    base.write_bytes(rng.randbytes(16 * MiB))
    img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top)
    async with open_image(top) as node:
        for start in range(MiB, 16 * MiB, 3 * MiB):
            await node.pwrite(start, rng.randbytes(MiB))
    img("create", "-q", "-f", "qcow2", out, 16 * MiB)
    await convert_file([(top, "qcow2")], out, "qcow2", sparse=0)
    async with open_image(out, read_only=True) as node:
        assert (await node.driver.map(0, 16 * MiB))[2] == 16 * MiB


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
@pytest.mark.parametrize("sparse", [0, 65536])
async def test_what_the_kernel_can_not_copy_is_moved(
    tmp_path, monkeypatch, format_, sparse
):
    rng = random.Random(SEED)
    copy_plainly(monkeypatch)
    move_one_by_one(monkeypatch)
    copied = {"all": 0, "some": 0, "none": 0}
    ways = itertools.cycle(copied)

    def copy(source_fd, source_offset, fd, offset, length):
        way = next(ways)
        copied[way] += 1
        if way != "none":
            part = length if way == "all" else length // 2
            copy_file_range(source_fd, source_offset, fd, offset, part)
        if way != "all":
            raise rng.choice(
                [
                    NotSupported("ends here"),
                    OSError(errno.EIO, "bad"),
                    BlockingIOError(),
                ]
            )

    monkeypatch.setattr(file_module, "copy_file_range", copy)
    async for names, disk in make_sources(tmp_path, rng):
        sources = [(tmp_path / name, kind) for name, kind in names]
        path = tmp_path / "out"
        img("create", "-q", "-f", format_, path, len(disk))
        await convert_file(sources, path, format_, sparse=sparse, target_is_zero=True)
        async with open_image(path, format=format_) as node:
            assert bytes(await node.pread(0, len(disk))) == disk
        img("check", "-q", path) if format_ == "qcow2" else None
    assert all(copied.values()) or (format_ == "raw" and sparse)


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("format_", ["raw", "qcow2"])
async def test_source_shrinks(tmp_path, monkeypatch, format_, copied):
    copy_plainly(monkeypatch, copied)
    disk = random.Random(SEED).randbytes(5 * MiB)
    (tmp_path / "disk").write_bytes(disk)
    img("create", "-q", "-f", format_, tmp_path / "out", len(disk))
    left = 2 * MiB + 700
    place, name = (
        (file_module, "copy_file_range")
        if copied
        else (FileStorage, "pread_into_blocking")
    )
    moves = getattr(place, name)
    shrunk = []

    def shrink_and_move(*arguments):
        os.truncate(tmp_path / "disk", left)
        shrunk.append(left)
        moves(*arguments)

    monkeypatch.setattr(place, name, shrink_and_move)
    sources = [(tmp_path / "disk", "raw")]
    # In memory it has its old length.
    await convert_file(sources, tmp_path / "out", format_, sparse=0)
    async with open_image(tmp_path / "out", format=format_) as node:
        found = bytes(await node.pread(0, len(disk)))
    assert found == disk[:left] + bytes(len(disk) - left)
    assert shrunk


@pytest.mark.parametrize("action", ["reading", "writing"])
@pytest.mark.parametrize("format_", ["raw", "qcow2"])
async def test_errors(tmp_path, monkeypatch, action, format_):
    disk = random.Random(SEED).randbytes(5 * MiB)
    (tmp_path / "disk").write_bytes(disk)
    img("create", "-q", "-f", format_, tmp_path / "out", len(disk))
    copy_plainly(monkeypatch, allowed=False)

    def fail(*arguments):
        raise OSError(errno.EIO, "as bad as can be")

    monkeypatch.setattr(
        FileStorage,
        "pread_into_blocking" if action == "reading" else "write_by",
        fail,
    )
    with pytest.raises(CopyError) as caught:
        sources = [(tmp_path / "disk", "raw")]
        await convert_file(sources, tmp_path / "out", format_, target_is_zero=True)
    # Pieces fail at the same time, and one of them is first.
    offsets = "|".join(str(offset) for offset in range(0, len(disk), 2 * MiB))
    wanted = f"error while {action} at byte ({offsets}): as bad as can be"
    assert re.fullmatch(wanted, str(caught.value))
    img("check", "-q", tmp_path / "out") if format_ == "qcow2" else None


@pytest.mark.parametrize("at_length", [False, True])
@pytest.mark.parametrize("cluster_size", [16 * KiB, 64 * KiB, 512 * KiB])
async def test_compressed_clusters(tmp_path, monkeypatch, cluster_size, at_length):
    """Of any size; a damaged one is the same error either way."""
    rng = random.Random(SEED)
    if at_length:
        move_at_length(monkeypatch)
    seen = see(monkeypatch)
    disk = b"".join(rng.randbytes(500) * 50 for _ in range(100))
    disk = disk[: len(disk) // 512 * 512]
    path = tmp_path / "packed"
    options = f"cluster_size={cluster_size}"
    img("create", "-q", "-f", "qcow2", "-o", options, path, len(disk))
    async with open_image(path) as node:
        await node.pwrite_compressed(0, disk)
    (tmp_path / "out").write_bytes(bytes(len(disk)))
    found = await convert_file([(path, "qcow2")], tmp_path / "out", "raw")
    assert found == disk
    assert bool(seen["moved"]) == (cluster_size <= CHUNK)
    async with open_image(path, read_only=True) as node:
        _, descriptor, _ = await node.driver.map(cluster_size, 512)
    with path.open("r+b") as file:
        file.seek((descriptor & ((1 << 40) - 1)) + 100)
        file.write(b"\xff" * 100)
    texts = set()
    for moves in (True, False):
        monkeypatch.setattr(FileStorage, "writes_in_threads", moves)
        with pytest.raises(CopyError) as caught:
            await convert_file(
                [(path, "qcow2")], tmp_path / "out", "raw", target_is_zero=True
            )
        texts.add(str(caught.value))
    assert len(texts) == 1
    wanted = f"error while reading at byte {cluster_size}: damaged compressed cluster"
    assert wanted in texts.pop()


@pytest.mark.parametrize("in_threads", [True, False])
async def test_holes_of_raw_images_are_not_read(tmp_path, monkeypatch, in_threads):
    """Nobody but the file system knows of them; a server may be far away."""
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(8 * MiB)
        for place in range(0, 8 * MiB, MiB):
            os.pwrite(file.fileno(), b"x" * 64 * KiB, place)
    (tmp_path / "out").touch()
    os.truncate(tmp_path / "out", 8 * MiB)
    move_at_length(monkeypatch)
    monkeypatch.setattr(FileStorage, "reads_in_threads", in_threads)
    nb_read = 0

    def count(name, length_of):
        read = getattr(FileStorage, name)

        def counted(self, offset, what):
            nonlocal nb_read
            found = read(self, offset, what)
            if found is not None or name == "pread_into_blocking":
                nb_read += length_of(what)
            return found

        monkeypatch.setattr(FileStorage, name, counted)

    count("pread_into_blocking", len)
    count("try_pread", int)
    count("pread", int)
    sources = [(tmp_path / "disk", "raw")]
    disk = await convert_file(sources, tmp_path / "out", "raw", target_is_zero=True)
    assert disk == (tmp_path / "disk").read_bytes()
    assert nb_read == 8 * 64 * KiB


async def test_an_error_behind_a_hole_is_told_of_its_place(tmp_path):
    """And not of the hole's, with which it is in one piece."""
    path = tmp_path / "packed"
    img("create", "-q", "-f", "qcow2", path, 4 * MiB)
    async with open_image(path) as node:
        for place in (0, MiB, MiB + 64 * KiB):
            await node.pwrite_compressed(place, b"some data" * 7281 + b"\0" * 7)
        _, descriptor, _ = await node.driver.map(MiB + 64 * KiB, 512)
    with path.open("r+b") as file:
        file.seek(descriptor & ((1 << 40) - 1))
        file.write(b"\xff" * 20)
    (tmp_path / "out").touch()
    os.truncate(tmp_path / "out", 4 * MiB)
    with pytest.raises(CopyError) as caught:
        sources = [(path, "qcow2")]
        await convert_file(sources, tmp_path / "out", "raw", target_is_zero=True)
    assert caught.value.offset == MiB + 64 * KiB


@pytest.mark.parametrize("action", ["reading", "writing"])
async def test_errors_in_the_middle_of_long_pieces(tmp_path, monkeypatch, action):
    disk = random.Random(SEED).randbytes(5 * MiB)
    (tmp_path / "disk").write_bytes(disk)
    (tmp_path / "out").write_bytes(bytes(len(disk)))
    move_at_length(monkeypatch)
    bad = 3 * MiB + 512 * KiB

    def fail_at(name, end_of):
        do = getattr(FileStorage, name)

        def fail(self, offset, *arguments):
            if offset <= bad < end_of(offset, *arguments):
                raise OSError(errno.EIO, "as bad as can be")
            return do(self, offset, *arguments)

        monkeypatch.setattr(FileStorage, name, fail)

    if action == "reading":
        fail_at("pread_into_blocking", lambda offset, view: offset + len(view))
        fail_at("try_pread", lambda offset, length: offset + length)
        fail_at("pread", lambda offset, length: offset + length)
    else:
        fail_at("write_by", lambda offset, length, work: offset + length)
        fail_at("try_pwrite", lambda offset, data: offset + len(data))
    with pytest.raises(CopyError) as caught:
        sources = [(tmp_path / "disk", "raw")]
        await convert_file(sources, tmp_path / "out", "raw", target_is_zero=True)
    assert str(caught.value) == f"error while {action} at byte {bad}: as bad as can be"
    # What is before it is there.
    written = (tmp_path / "out").read_bytes()
    assert written[: 3 * MiB] == disk[: 3 * MiB]


async def test_cancelled_between_pieces(tmp_path):
    disk = random.Random(SEED).randbytes(9 * MiB)
    (tmp_path / "disk").write_bytes(disk)
    img("create", "-q", "-f", "qcow2", tmp_path / "out", len(disk))
    control = JobControl(lambda done, total: done and control.cancel())
    async with (
        open_image(tmp_path / "disk", format="raw", read_only=True) as source,
        open_image(tmp_path / "out") as target,
    ):
        with pytest.raises(JobCancelled):
            await convert([source], target, ConvertOptions(), control)
    img("check", "-q", tmp_path / "out")


async def test_progress_of_pieces_that_are_moved_together(tmp_path, monkeypatch):
    """Each is told of, as in qemu-img's ``convert -p``."""
    seen = see(monkeypatch)
    for name in ("disk", "out"):
        img("create", "-q", "-f", "qcow2", tmp_path / name, 64 * MiB)
    told = []
    control = JobControl(lambda done, total: told.append((done, total)))
    async with open_image(tmp_path / "disk") as source:
        for start in (0, 2, 4, 32):
            await source.pwrite(start * MiB, b"x" * MiB)
    async with (
        open_image(tmp_path / "disk", read_only=True) as source,
        open_image(tmp_path / "out") as target,
    ):
        options = ConvertOptions(sparse=64 * KiB, target_is_zero=True, count_data=True)
        await convert([source], target, options, control)
    assert seen["joined"] == 1
    assert told == [(done * MiB, 4 * MiB) for done in range(5)]


@pytest.mark.parametrize("cluster_size", [4096, 65536])
async def test_work_beside_old_content(tmp_path, cluster_size):
    """Each write by work does what a plain one does, in an overlay too."""
    rng = random.Random(SEED)
    size = 700_001
    expected = bytearray(rng.randbytes(size // 512 * 512))
    (tmp_path / "below").write_bytes(expected)
    path = tmp_path / "overlay"
    img(
        "create", "-q", "-f", "qcow2", "-F", "raw", "-b", tmp_path / "below",
        "-o", f"cluster_size={cluster_size}", path,
    )  # fmt: skip
    async with open_image(path) as node:
        assert node.writes_in_threads
        for _ in range(40):
            offset = rng.randrange(len(expected))
            length = min(rng.randrange(1, 200_000), len(expected) - offset)
            data = rng.randbytes(length)

            def work(start, count, write, data=data):
                middle = count // 2
                write(middle, data[start + middle : start + count])
                write(0, data[start : start + middle])

            await asyncio.gather(
                node.pwrite_by(offset, length, work), node.pread(offset, length)
            )
            expected[offset : offset + length] = data
        assert bytes(await node.pread(0, len(expected))) == expected
    img("check", "-q", path)


class Piece:
    """A file in memory that threads read."""

    def __init__(self, data):
        self.data = data

    def pread_into_blocking(self, offset, view):
        view[:] = self.data[offset : offset + len(view)]


@pytest.mark.parametrize("unit", [512, 4096, 65536])
async def test_units_across_places(unit):
    rng = random.Random(SEED)
    disk = some_disk(rng)
    places, position = [], 0
    storage = Piece(disk)
    while position < len(disk):
        length = min(rng.randrange(1, 3 * CHUNK), len(disk) - position)
        if rng.random() < 0.2:
            # A hole.
            disk = disk[:position] + bytes(length) + disk[position + length :]
            places.append(Place(ZEROES, 0, length))
        else:
            places.append(Place(storage, position, length))
        position += length
    transfer = Transfer(places)
    written = bytearray(b"x" * len(disk))

    def write(position, data):
        written[position : position + len(data)] = data

    transfer.write_data_blocking(unit, 0, len(disk), write)
    for start, length in transfer.zeroes:
        assert written[start : start + length] == b"x" * length
        written[start : start + length] = bytes(length)
    assert written == disk
    nb_zeroes = sum(n for has_data, n in data_runs(disk, unit) if not has_data)
    assert sum(length for _, length in transfer.zeroes) == nb_zeroes
    start = rng.randrange(len(disk))
    part = bytearray(len(disk) - start)

    def write_part(position, data):
        part[position : position + len(data)] = data

    transfer.write_blocking(start // 2, start - start // 2, len(part), write_part)
    assert part == disk[start:]


async def test_runs_that_could_not_be_written_leave_nothing_behind(tmp_path):
    """The first run is overwritten in place, its neighbour gets a new cluster."""
    path = tmp_path / "target"
    img("create", "-q", "-f", "qcow2", path, MiB)
    async with open_image(path) as node:
        await node.pwrite(0, b"x" * 64 * KiB)
        nb_calls = 0

        def work(start, count, write):
            nonlocal nb_calls
            nb_calls += 1
            assert (start, count) == (0, 128 * KiB)
            assert node.driver.in_flight
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        runs = [(0, 64 * KiB), (512 * KiB, 64 * KiB)]
        with pytest.raises(OSError, match="No space left"):
            await node.pwrite_runs_by(runs, work)
        assert nb_calls == 1
        assert not node.driver.in_flight
        assert await node.pread(512 * KiB, 64 * KiB) == bytes(64 * KiB)
    img("check", "-q", path)


async def test_a_file_is_as_long_as_it_was_written_before_reading_failed(tmp_path):
    path = tmp_path / "target"
    path.write_bytes(b"")
    storage = await FileStorage.open(str(path))

    def work(write):
        write(0, b"x" * 4096)
        raise ReadError(OSError(errno.EIO, os.strerror(errno.EIO)))

    with pytest.raises(ReadError):
        await storage.write_by(0, MiB, work)
    assert storage.length == path.stat().st_size == 4096
    await storage.close()

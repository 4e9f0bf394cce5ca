"""Dirty bitmaps that we keep while serving, beside those that QEMU's storage daemon
keeps for the same requests to the same image. ``make matrix`` runs them all."""

import asyncio
import contextlib
import dataclasses
import json
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from nbdqcow import open_image
from tests.differential.operations import Generator, Kind, Operation, Weights
from tests.nbd_client import CMD_FLAG_NO_HOLE, NbdClient
from tests.serving import check_image, need, run, serving

KiB, MiB = 1 << 10, 1 << 20
START_SECONDS = 30.0
STOP_SECONDS = 30.0
NB_ROUNDS = 2
NB_REQUESTS = 30
PREFIX = "qemu:dirty-bitmap:"
WEIGHTS = Weights(read=2, write=30, zero=15, trim=15, flush=2, cache=0)

Ranges = list[tuple[int, int]]


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """An image, and the granularities of its bitmaps in bytes, one of each."""

    cluster_size: int
    granularities: tuple[int, ...]
    size: int
    extended_l2: bool = False

    @property
    def bitmaps(self) -> list[str]:
        return [f"b{granularity}" for granularity in self.granularities] + ["off"]

    def __str__(self) -> str:
        return f"{self.cluster_size // 512}-sectors{'-sub' * self.extended_l2}"


CASES = (
    Case(512, (512, 4 * KiB), 2 * MiB + 1536),
    Case(4 * KiB, (1 * KiB, 2 * MiB), 3 * MiB + 512),
    Case(16 * KiB, (512, 4 * KiB, 64 * KiB), 3 * MiB, extended_l2=True),
    Case(64 * KiB, (4 * KiB, 64 * KiB, 256 * KiB), 8 * MiB + 7 * 512),
    Case(64 * KiB, (2 * KiB, 128 * KiB), 6 * MiB + 512, extended_l2=True),
    Case(2 * MiB, (32 * KiB, 2 * MiB), 15 * MiB + 512),
)
QUICK = (CASES[0], CASES[2], CASES[3])


def make_image(case: Case, path: Path) -> None:
    options = f"cluster_size={case.cluster_size}"
    if case.extended_l2:
        options += ",extended_l2=on"
    run("qemu-img", "create", "-qf", "qcow2", "-o", options, path, str(case.size))
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 1 0 {case.size // 3 & -512}", path)
    for name in case.bitmaps:
        granularity = ["-g", name[1:]] if name != "off" else ["--disable"]
        run("qemu-img", "bitmap", "--add", *granularity, path, name)


@contextlib.contextmanager
def storage_daemon(image: Path, bitmaps: Sequence[str]) -> Iterator[Path]:
    """Let QEMU's storage daemon serve an image; the block gets its socket."""
    with tempfile.TemporaryDirectory(prefix="nbdq-") as directory:
        socket = Path(directory) / "s"
        listed = "".join(f",bitmaps.{i}={name}" for i, name in enumerate(bitmaps))
        process = subprocess.Popen(
            [
                "qemu-storage-daemon",
                *("--blockdev", f"driver=file,node-name=f,filename={image}"),
                *("--blockdev", "driver=qcow2,node-name=q,file=f,discard=unmap"),
                *("--nbd-server", f"addr.type=unix,addr.path={socket}"),
                *("--export", f"nbd,id=e,node-name=q,name=,writable=on{listed}"),
            ]
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while True:
                with contextlib.suppress(OSError), NbdClient(socket):
                    break
                assert process.poll() is None, "qemu-storage-daemon ended"
                assert time.monotonic() < deadline, "qemu-storage-daemon is not ready"
                time.sleep(0.01)
            yield socket
        finally:
            # It closes its images, which stores the bitmaps.
            process.terminate()
            process.wait(STOP_SECONDS)
        assert process.returncode == 0


def send(client: NbdClient, operation: Operation) -> None:
    if operation.kind is Kind.WRITE:
        client.write(operation.offset, operation.data)
    elif operation.kind is Kind.ZERO:
        flags = 0 if operation.may_unmap else CMD_FLAG_NO_HOLE
        client.write_zeroes(operation.offset, operation.length, flags)
    elif operation.kind is Kind.TRIM:
        client.trim(operation.offset, operation.length)
    elif operation.kind is Kind.FLUSH:
        client.flush()
    else:
        client.read(operation.offset, operation.length)


def joined(ranges: Ranges) -> Ranges:
    found: Ranges = []
    for start, end in ranges:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, end))
    return found


def dirty_in_map(socket: Path, name: str) -> Ranges:
    """Return the dirty ranges that a client is told of."""
    uri = f"nbd+unix:///?socket={socket}"
    done = run("nbdinfo", "--json", f"--map={PREFIX}{name}", uri)
    return joined(
        [
            (one["offset"], one["offset"] + one["length"])
            for one in json.loads(done.stdout)
            if one["type"] & 1
        ]
    )


def dirty_by_qemu(image: Path, names: Sequence[str]) -> dict[str, Ranges]:
    """Return what QEMU reads of the bitmaps in a file, from a copy of it."""
    copy = image.with_suffix(".copy")
    shutil.copy(image, copy)
    with storage_daemon(copy, names) as socket:
        return {name: dirty_in_map(socket, name) for name in names}


async def dirty_by_us(image: Path) -> dict[str, Ranges]:
    """Return what we read of the bitmaps in a file."""
    found: dict[str, Ranges] = {}
    async with open_image(image, format="qcow2", read_only=True) as node:
        for name, bitmap in node.dirty_bitmaps.items():
            lengths, states = await bitmap.extents(0, node.size, 1 << 20)
            assert sum(lengths) == node.size
            offset, ranges = 0, []
            for length, state in zip(lengths.tolist(), states.tolist(), strict=True):
                if state:
                    ranges.append((offset, offset + length))
                offset += length
            found[name] = joined(ranges)
    return found


def described(image: Path) -> list[tuple[str, int, list[str]]]:
    """Return name, granularity and flags of the bitmaps, as qemu-img tells them."""
    info = json.loads(run("qemu-img", "info", "--output=json", image).stdout)
    return [
        (one["name"], one["granularity"], sorted(one["flags"]))
        for one in info["format-specific"]["data"]["bitmaps"]
    ]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=[pytest.mark.slow] * (case not in QUICK))
        for case in CASES
    ],
)
def test_bitmaps_are_the_storage_daemons(case: Case, tmp_path: Path, seed: int) -> None:
    need("qemu-img", "qemu-io", "qemu-storage-daemon", "nbdinfo")
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    make_image(case, ours)
    shutil.copy(ours, theirs)
    source = random.Random(seed)
    for _ in range(NB_ROUNDS):
        generator = Generator(
            source, case.size, case.cluster_size, WEIGHTS, maximum_length=128 * KiB
        )
        requests = [generator.next() for _ in range(NB_REQUESTS)]
        with (
            serving(ours) as server,
            storage_daemon(theirs, case.bitmaps) as socket,
            NbdClient(server.socket) as our_client,
            NbdClient(socket) as their_client,
        ):
            for operation in requests:
                send(our_client, operation)
                send(their_client, operation)
            for name in case.bitmaps:
                told = dirty_in_map(server.socket, name)
                assert told == dirty_in_map(socket, name), name
                assert bool(told) == (name != "off")
                # What is dirty all over shows nothing.
                assert told != [(0, case.size)] or name != case.bitmaps[0]
        assert described(ours) == described(theirs)
        read = [
            *(asyncio.run(dirty_by_us(image)) for image in (ours, theirs)),
            *(dirty_by_qemu(image, case.bitmaps) for image in (ours, theirs)),
        ]
        assert read[1:] == read[:-1]
        assert read[0]["off"] == []
        check_image(ours)

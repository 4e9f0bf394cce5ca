"""qcow2 images of every two options that can meet, made by one and changed by the
other: by QEMU and us, and the other way round. ``make matrix`` runs them all."""

import asyncio
import contextlib
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbdqcow import open_image
from nbdqcow.block.node import Node
from nbdqcow.cli.img import main
from tests.conftest import SEED, with_luks
from tests.pairwise import pairwise
from tests.serving import need, run

KiB, MiB = 1 << 10, 1 << 20
NB_QUICK = 3
NB_REQUESTS = 25
SECRET = ("--object", "secret,id=s,data=one")
ENCRYPTION = {
    "aes": ["encrypt.format=aes", "encrypt.key-secret=s"],
    "luks": ["encrypt.format=luks", "encrypt.key-secret=s", "encrypt.iter-time=10"],
}


def allowed(case: dict[str, Any]) -> bool:
    """Say whether QEMU makes such an image at all."""
    if case["version"] == 2 and (
        case["refcount_bits"] != 16
        or case["extended_l2"]
        or case["compression"] != "zlib"
        or case["data_file"]
    ):
        return False
    if case["extended_l2"] and case["cluster_size"] < 16 * KiB:
        return False
    return not (case["data_file"] == "raw" and case["backing"])


CASES = list(
    pairwise(
        allowed,
        version=(3, 2),
        cluster_size=(512, 4 * KiB, 16 * KiB, 64 * KiB, 2 * MiB),
        refcount_bits=(1, 8, 16, 64),
        extended_l2=(False, True),
        compression=("zlib", "zstd"),
        encryption=("", "aes", "luks"),
        data_file=("", "plain", "raw"),
        backing=("", "raw", "qcow2"),
    )
)


def name_of(case: dict[str, Any]) -> str:
    words = [f"v{case['version']}", f"{case['cluster_size'] / KiB:g}k"]
    words.append(f"r{case['refcount_bits']}")
    words += ["subclusters"] * case["extended_l2"] + [case["compression"]]
    words += [case["encryption"]] if case["encryption"] else []
    words += [f"data-{case['data_file']}"] if case["data_file"] else []
    words += [f"on-{case['backing']}"] if case["backing"] else []
    return "-".join(words)


def choose() -> list[int]:
    """Return the indices of this run's few cases. QEMU needs seconds to make a LUKS
    image, so that one of them is enough."""
    source = random.Random(SEED)
    slow = [i for i, case in enumerate(CASES) if case["encryption"] == "luks"]
    others = [i for i in range(len(CASES)) if i not in slow]
    return [source.choice(slow), *source.sample(others, NB_QUICK)]


QUICK = choose()
each_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case, id=name_of(case), marks=() if index in QUICK else pytest.mark.slow
        )
        for index, case in enumerate(CASES)
    ],
)


def ours(*words: str) -> str:
    """Run our image tool, in this process; return what it prints."""
    output = io.TextIOWrapper(io.BytesIO(), write_through=True)
    with contextlib.redirect_stdout(output):
        status = main(words)
    output.seek(0)
    text = output.read()
    assert status == 0, text
    return text


class Content:
    """What a guest has to find. Discarded bytes are the old ones or zeroes."""

    def __init__(self, data: bytes) -> None:
        self.data = np.frombuffer(bytearray(data), np.uint8)
        self.discarded = np.zeros(len(data), bool)

    @property
    def size(self) -> int:
        return len(self.data)

    def write(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        self.discarded[offset : offset + len(data)] = False

    def discard(self, offset: int, length: int) -> None:
        self.discarded[offset : offset + length] = True

    def resize(self, size: int) -> None:
        self.data = np.resize(self.data, size) * (np.arange(size) < self.size)
        self.discarded = np.resize(self.discarded, size) & (
            np.arange(size) < len(self.discarded)
        )

    def copy(self) -> "Content":
        other = Content(self.data.tobytes())
        other.discarded = self.discarded.copy()
        return other

    def check(self, found: bytes, what: str) -> None:
        """Fail at the first byte that is not as it must be."""
        assert len(found) == self.size, what
        bytes_found = np.frombuffer(found, np.uint8)
        right = (bytes_found == self.data) | (self.discarded & (bytes_found == 0))
        wrong = np.flatnonzero(~right)
        assert not wrong.size, f"{what}: {wrong.size} wrong from {wrong[0]:#x} on"


class Image:
    """One combination as files in ``directory``, and what they have to hold."""

    def __init__(
        self, case: dict[str, Any], directory: Path, source: random.Random
    ) -> None:
        self.case = case
        self.source = source
        self.directory = directory
        self.path = directory / "disk.qcow2"
        size = 5 * MiB if case["cluster_size"] == 2 * MiB else 2 * MiB
        self.size = size + 512 * source.randrange(64)
        self.below = self._make_backing()
        self.content = Content(self.below[: self.size].ljust(self.size, b"\0"))
        self.then: Content | None = None
        self.compresses = not (case["encryption"] or case["data_file"])
        # QEMU refuses to compress a cluster that has a place: those that may not.
        self.untouched = set(range(self.size // case["cluster_size"]))
        # Every cluster of a raw data file has its place from the start, and what
        # is there is decrypted: no zeroes.
        self.starts_as_noise = case["encryption"] and case["data_file"] == "raw"
        self.has_snapshots = not case["data_file"] and case["refcount_bits"] > 1
        self.opened = f"driver=qcow2,file.filename={self.path}"
        if case["encryption"]:
            self.opened += ",encrypt.key-secret=s"

    def _make_backing(self) -> bytes:
        if not self.case["backing"]:
            return b""
        below = self.source.randbytes(self.size * 3 // 4 // 512 * 512)
        raw, path = self.directory / "base.raw", self.directory / "base.qcow2"
        raw.write_bytes(below)
        if self.case["backing"] == "qcow2":
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
        return below

    def create_words(self) -> list[str]:
        case = self.case
        options = [
            f"compat={'0.10' if case['version'] == 2 else '1.1'}",
            f"cluster_size={case['cluster_size']}",
        ]
        if case["version"] == 3:
            options.append(f"refcount_bits={case['refcount_bits']}")
            options.append(f"extended_l2={'on' if case['extended_l2'] else 'off'}")
            options.append(f"compression_type={case['compression']}")
        options += ENCRYPTION.get(case["encryption"], [])
        if case["data_file"]:
            options.append(f"data_file={self.directory / 'data'}")
        if case["data_file"] == "raw":
            options.append("data_file_raw=on")
        words = ["create", "-qf", "qcow2", *SECRET, "-o", ",".join(options)]
        if case["backing"]:
            base = self.directory / f"base.{case['backing']}"
            words += ["-b", str(base), "-F", case["backing"]]
        return [*words, str(self.path), str(self.size)]

    def range(self) -> tuple[int, int]:
        """Draw some sectors, at times whole clusters, up to three."""
        cluster, size = self.case["cluster_size"], self.content.size
        unit = self.source.choice((512, 512, 4 * KiB, cluster))
        offset = self.source.randrange(size) // unit * unit
        length = unit * self.source.randint(1, max(1, min(3 * cluster // unit, 24)))
        length = min(length, size - offset)
        self.untouched -= {*range(offset // cluster, -(-(offset + length) // cluster))}
        return offset, length

    def clusters_to_compress(self) -> list[tuple[int, bytes]]:
        """Draw whole clusters with content that gets smaller."""
        if not self.compresses:
            return []
        cluster = self.case["cluster_size"]
        chosen = self.source.sample(sorted(self.untouched), min(2, len(self.untouched)))
        self.untouched -= {*chosen}
        word = self.source.randbytes(8)
        return [(index * cluster, word * (cluster // 8)) for index in chosen]

    def new_size(self) -> int:
        """Draw one: smaller only without snapshots, that QEMU keeps whole."""
        if self.case["version"] == 2 and self.then is not None:
            return self.content.size
        grown = self.content.size + 512 * self.source.randrange(1, 3000)
        grows = self.then is not None or self.source.random() < 0.5
        if grows and not self.starts_as_noise:
            return grown
        self.untouched.clear()
        return self.content.size // 2 // 512 * 512

    # -- by QEMU ---------------------------------------------------------------

    def qemu(self, command: str, *words: object) -> str:
        """Run a command of qemu-img on the image."""
        options = (*SECRET, "--image-opts", self.opened)
        return run("qemu-img", command, *map(str, words), *options).stdout

    def create_by_qemu(self) -> None:
        done = with_luks(lambda: run("qemu-img", *self.create_words(), check=False))
        assert done.returncode == 0, done.stderr
        if self.starts_as_noise:
            self.qemu_io([f"write -P 7 0 {self.size}"])
            self.content.write(0, b"\7" * self.size)
        self.requests_by_qemu()

    def qemu_io(self, commands: list[str]) -> None:
        words = [word for command in commands for word in ("-c", command)]
        done = run("qemu-io", *SECRET, "-d", "unmap", *words, "--image-opts",
                   self.opened)  # fmt: skip
        assert "failed" not in done.stdout + done.stderr, done.stdout + done.stderr

    def change_by_qemu(self) -> None:
        self.requests_by_qemu()
        if self.has_snapshots:
            self.qemu("snapshot", "-c", "then")
            self.then = self.content.copy()
        self.requests_by_qemu()
        size = self.new_size()
        if size != self.content.size:
            shrink = ["--shrink"] if size < self.content.size else []
            run("qemu-img", "resize", "-q", *shrink, *SECRET, "--image-opts",
                self.opened, str(size))  # fmt: skip
            self.content.resize(size)
            self.requests_by_qemu()

    def requests_by_qemu(self) -> None:
        commands: list[str] = []
        for index, (offset, data) in enumerate(self.clusters_to_compress()):
            file = self.directory / f"pattern{index}"
            file.write_bytes(data)
            commands.append(f"write -c -s {file} {offset} {len(data)}")
            self.content.write(offset, data)
        for _ in range(NB_REQUESTS):
            offset, length = self.range()
            chance = self.source.random()
            if chance < 0.6:
                pattern = self.source.randrange(1, 256)
                commands.append(f"write -P {pattern} {offset} {length}")
                self.content.write(offset, bytes([pattern]) * length)
            elif chance < 0.8:
                unmap = self.source.choice(("", "-u "))
                commands.append(f"write -z {unmap}{offset} {length}")
                self.content.write(offset, bytes(length))
            else:
                commands.append(f"discard {offset} {length}")
                self.content.discard(offset, length)
        self.qemu_io(commands)

    # -- by us -----------------------------------------------------------------

    async def fill_by_us(self) -> None:
        async with self.open() as node:
            if self.starts_as_noise:
                await node.write_zero_bytes(0, self.size)
            await self.requests_by_us(node)

    def open(self, **options: Any) -> Any:
        secret = {"secret": b"one"} if self.case["encryption"] else {}
        return open_image(self.path, format="qcow2", driver_options=secret, **options)

    async def change_by_us(self) -> None:
        async with self.open() as node:
            await self.requests_by_us(node)
            if self.has_snapshots:
                await node.driver.snapshot_create("then")
                self.then = self.content.copy()
            await self.requests_by_us(node)
            size = self.new_size()
            if size != self.content.size:
                await node.resize(size)
                self.content.resize(size)
                await self.requests_by_us(node)

    async def requests_by_us(self, node: Node) -> None:
        for offset, data in self.clusters_to_compress():
            await node.pwrite_compressed(offset, data)
            self.content.write(offset, data)
        for _ in range(NB_REQUESTS):
            offset, length = self.range()
            chance = self.source.random()
            if chance < 0.6:
                data = self.source.randbytes(length)
                await node.pwrite(offset, data)
                self.content.write(offset, data)
            elif chance < 0.8:
                await node.write_zeroes(
                    offset, length, may_unmap=self.source.random() < 0.5
                )
                self.content.write(offset, bytes(length))
            else:
                await node.discard(offset, length)
                self.content.discard(offset, length)

    # -- and both look -----------------------------------------------------------

    async def read_by_us(self) -> bytes:
        async with self.open(read_only=True) as node:
            return bytes(await node.pread(0, node.size))

    def read_by_qemu(self, *words: str) -> bytes:
        flat = self.directory / "flat.raw"
        run("qemu-img", "convert", *SECRET, *words, "--image-opts", self.opened,
            "-O", "raw", flat)  # fmt: skip
        return flat.read_bytes()

    def snapshot_by_us(self) -> bytes:
        flat = self.directory / "flat.raw"
        ours("convert", *SECRET, "-l", "then", "--image-opts", self.opened,
             "-O", "raw", str(flat))  # fmt: skip
        return flat.read_bytes()

    def check(self) -> None:
        """Let both check the image and read all of it, snapshot included."""
        for check in (self._check_by_qemu, self._check_by_us):
            report = json.loads(check())
            for what in ("corruptions", "leaks", "check-errors"):
                assert not report.get(what), (check, report)
        found = self.read_by_qemu()
        self.content.check(found, "qemu-img reads")
        assert asyncio.run(self.read_by_us()) == found, "we read something else"
        if self.case["data_file"] == "raw" and not self.case["encryption"]:
            data = (self.directory / "data").read_bytes()
            self.content.check(data[: self.content.size], "the raw data")
        if self.then is not None:
            found = self.read_by_qemu("-l", "snapshot.name=then")
            # QEMU gives it the size that the disk has now.
            found = found[: self.then.size]
            self.then.check(found, "qemu-img reads of the snapshot")
            assert self.snapshot_by_us() == found, "we read another snapshot"

    def _check_by_qemu(self) -> str:
        return self.qemu("check", "--output=json")

    def _check_by_us(self) -> str:
        options = (*SECRET, "--image-opts", self.opened)
        return ours("check", "--output=json", *options)


def test_every_two_options_meet() -> None:
    met = {
        pair
        for case in CASES
        for pair in [(a, case[a], b, case[b]) for a in case for b in case if a < b]
    }
    assert ("cluster_size", 2 * MiB, "encryption", "luks") in met
    assert ("data_file", "raw", "refcount_bits", 64) in met
    assert ("backing", "qcow2", "version", 2) in met
    assert all(map(allowed, CASES))
    assert len(CASES) < 45


@each_case
def test_qemu_makes_and_we_change(
    case: dict[str, Any], tmp_path: Path, seed: int
) -> None:
    need("qemu-img", "qemu-io")
    image = Image(case, tmp_path, random.Random(seed))
    image.create_by_qemu()
    asyncio.run(image.change_by_us())
    image.check()


@each_case
def test_we_make_and_qemu_changes(
    case: dict[str, Any], tmp_path: Path, seed: int
) -> None:
    need("qemu-img", "qemu-io")
    image = Image(case, tmp_path, random.Random(seed))
    ours(*image.create_words())
    asyncio.run(image.fill_by_us())
    image.change_by_qemu()
    image.check()

"""The same random history on two copies of an image, by us and by QEMU.

Requests, snapshots, bitmaps and resizing in any order, with compressed
clusters, subclusters and encryption. After each round QEMU finds no fault and
no leak in ours, we find none in QEMU's, and the two agree on every byte, on the
map, the bitmaps, the snapshots and how many clusters are in use. A reader of its
own finds every refcount right in both, and the same data shared as often.
"""

import asyncio
import contextlib
import io
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nbdqcow import open_image
from nbdqcow.cli.img import main
from nbdqcow.formats.qcow2.memory_bitmap import Bitmap
from tests.differential import histories
from tests.differential.histories import History, Step
from tests.differential.refcounts import Layout, assert_alike
from tests.interop.img_versions import text_as_7_2_says
from tests.serving import need, run

KiB, MiB = 1 << 10, 1 << 20
NB_ROUNDS = 2
NB_LONG_ROUNDS = int(os.environ.get("NBDQCOW_LONG_OPERATIONS", "30000")) // 300
ROUND_REQUESTS = 40
SECRET = ("--object", "secret,id=s,data=one")
SIZE = 3 * MiB + 512


@dataclass(frozen=True, slots=True)
class Case:
    """An image by ``-o`` options; ``base`` those of its backing image."""

    name: str
    options: str
    cluster_size: int = 64 * KiB
    base: str | None = None
    encrypted: bool = False
    data_file: bool = False


LUKS = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1"
AES = "encrypt.format=aes,encrypt.key-secret=s"
# The first five in each run of the tests, all of them in the long ones.
CASES = (
    Case(
        "subclusters-overlay",
        "extended_l2=on,cluster_size=16k,refcount_bits=32",
        16 * KiB,
        "extended_l2=on,cluster_size=128k",
    ),
    Case("luks", LUKS, encrypted=True),
    Case("v3-4k-overlay", "cluster_size=4k,refcount_bits=8", 4096, "compat=1.1"),
    Case("v2-overlay", "compat=0.10,cluster_size=512", 512, "cluster_size=4k"),
    Case("data-file-subclusters", "data_file=@.data,extended_l2=on", data_file=True),
    Case("v3", "cluster_size=64k"),
    Case("v2", "compat=0.10,cluster_size=4k", 4 * KiB),
    Case("v3-512", "cluster_size=512,refcount_bits=64", 512),
    Case("zstd", "cluster_size=32k,compression_type=zstd", 32 * KiB),
    Case("subclusters", "extended_l2=on"),
    Case(
        "subclusters-zstd",
        "extended_l2=on,compression_type=zstd,cluster_size=32k",
        32 * KiB,
    ),
    Case("2m-subclusters", "extended_l2=on,cluster_size=2M,refcount_bits=64", 2 * MiB),
    Case("lazy", "lazy_refcounts=on,cluster_size=4k", 4 * KiB),
    Case("aes", f"{AES},cluster_size=4k", 4 * KiB, encrypted=True),
    Case("luks-subclusters", f"{LUKS},extended_l2=on", encrypted=True),
    Case("data-file", "data_file=@.data", data_file=True),
    Case("data-file-raw", "data_file=@.data,data_file_raw=on", data_file=True),
)  # fmt: skip


def create(path: Path, options: str, *more: object) -> None:
    """Make an image by our tool: QEMU needs seconds for a LUKS one, and fails
    on some machines."""
    words = ["create", "-q", *SECRET, "-f", "qcow2"]
    assert main([*words, "-o", options, *map(str, more), str(path), str(SIZE)]) == 0


def nbdqcow_img(*words: str) -> str:
    """Run our image tool, and return what it prints."""
    output = io.TextIOWrapper(io.BytesIO())
    with contextlib.redirect_stdout(output):
        assert main([*words]) == 0, words
        output.flush()
    return output.buffer.getvalue().decode()  # type: ignore[attr-defined]


class Pair:
    """Two copies of one image: ``ours`` and ``theirs``."""

    def __init__(self, case: Case, directory: Path) -> None:
        self.case = case
        self.directory = directory
        self.ours, self.theirs = directory / "ours", directory / "theirs"
        link: tuple[object, ...] = ()
        if case.base is not None:
            base = directory / "base"
            options = ("-o", case.base, base, str(2 * MiB + 1536))
            run("qemu-img", "create", "-qf", "qcow2", *options)
            commands = ("write -P 9 100k 700k", "write -z 1M 100k", "write -P 8 2M 1k")
            for command in commands:
                run("qemu-io", "-f", "qcow2", "-c", command, base)
            link = ("-b", base, "-F", "qcow2")
        if case.data_file:
            for path in (self.ours, self.theirs):
                create(path, case.options.replace("@", str(path)), *link)
        else:
            create(self.ours, case.options, *link)
            shutil.copyfile(self.ours, self.theirs)
        self.secret = SECRET if case.encrypted else ()
        # Guest clusters that only we compressed, and where the disk ended once.
        self.compressed: set[int] = set()
        self.ends = {SIZE // case.cluster_size}

    def options(self, path: Path) -> str:
        """Return a copy's image options."""
        text = f"driver=qcow2,file.filename={path}"
        return text + (",encrypt.key-secret=s" if self.case.encrypted else "")

    async def _by_us(self, steps: list[Step]) -> None:
        options = {"secret": b"one"} if self.case.encrypted else {}
        async with open_image(
            self.ours, format="qcow2", driver_options=options
        ) as node:
            for step in steps:
                await histories.ours(node, step)

    def run(self, requests: list[Step], operation: Step | None) -> None:
        """Carry the same out on both copies."""
        steps = requests + ([operation] if operation else [])
        asyncio.run(self._by_us(steps))
        for name, clusters in (("compress", self.compressed), ("resize", self.ends)):
            clusters |= {
                step.arguments[0] // self.case.cluster_size
                for step in steps
                if step.name == name
            }
        theirs = self.options(self.theirs)
        histories.requests_by_qemu(theirs, requests, self.secret)
        if operation:
            histories.operation_by_qemu(theirs, self.theirs, operation, self.secret)

    # -- comparing ---------------------------------------------------------

    def compare(self, history: History) -> None:
        """Find the two copies alike and sound."""
        ours, theirs = self.options(self.ours), self.options(self.theirs)
        opened = (*self.secret, "--image-opts")
        run("qemu-img", "compare", *opened, ours, theirs)
        # Each program reads all of the other's image.
        nbdqcow_img("compare", "-q", *opened, ours, theirs)
        for image in (ours, theirs):
            self.check(image)
        for image in (ours, theirs):
            self.compare_maps(image)
        infos = [
            json.loads(run("qemu-img", "info", "--output=json", *opened, image).stdout)
            for image in (ours, theirs)
        ]
        assert infos[0]["virtual-size"] == infos[1]["virtual-size"] == history.size
        assert listed(infos[0]) == listed(infos[1])
        self.compare_bitmaps(history)
        for name in history.snapshots:
            self.compare_snapshot(name)
        layouts = [Layout(path) for path in (self.ours, self.theirs)]
        for layout in layouts:
            layout.assert_sound()
        # Our tables stay as they are where a raw data file becomes zero.
        if "data_file_raw" not in self.case.options:
            has_backing = self.case.base is not None
            assert_alike(*layouts, self.compressed, self.ends, has_backing=has_backing)

    def compare_bitmaps(self, history: History) -> None:
        """Find the same dirty in both copies, but for where the disk ended once:
        what is behind that is zeroed as it grows, by us only if anything is there."""
        marks = [asyncio.run(self.marks(path)) for path in (self.ours, self.theirs)]
        assert [sorted(found) for found in marks] == [sorted(history.bitmaps)] * 2
        for name, (granularity, ours) in marks[0].items():
            theirs = marks[1][name][1]
            assert granularity == marks[1][name][0]
            size = self.case.cluster_size
            allowed = {
                granule
                for index in self.ends
                for granule in range(
                    index * size // granularity, -(-(index + 1) * size // granularity)
                )
            }
            assert ours ^ theirs <= allowed, f"bitmap {name}"

    def compare_maps(self, image: str) -> None:
        """Let both programs tell what is where in one image."""
        words = ("map", "--output=json", *self.secret, "--image-opts", image)
        theirs = json.loads(text_as_7_2_says(run("qemu-img", *words).stdout))
        ours = json.loads(nbdqcow_img(*words))
        data_file = self.case.data_file
        assert comparable(ours, data_file=data_file) == comparable(
            theirs, data_file=data_file
        )

    def check(self, image: str) -> None:
        """Let both programs check an image: no finding, and the same counts."""
        words = ("check", "--output=json", *self.secret, "--image-opts", image)
        ours = json.loads(nbdqcow_img(*words))
        theirs = json.loads(run("qemu-img", *words).stdout)
        for name in ("corruptions", "leaks", "check-errors"):
            assert not ours.get(name), ours
            assert not theirs.get(name), theirs
        for name in ("allocated", "fragmented", "compressed"):
            name += "-clusters"
            assert ours.get(name) == theirs.get(name), name

    def compare_snapshot(self, name: str) -> None:
        flat = self.directory / "flat1", self.directory / "flat2"
        for image, target in zip((self.ours, self.theirs), flat, strict=True):
            words = ("-l", f"snapshot.name={name}", *self.secret, "-O", "raw")
            run(
                *("qemu-img", "convert", *words, "--image-opts"),
                *(self.options(image), target),
            )
        # QEMU shows as much as the disk has now: behind the end that it had then
        # is what had been there before.
        (self.directory / "flat3").unlink(missing_ok=True)
        last = ("--image-opts", self.options(self.ours), str(self.directory / "flat3"))
        nbdqcow_img("convert", *words, *last)
        data = (self.directory / "flat3").read_bytes()
        for path in flat:
            shown = path.read_bytes()
            length = min(len(shown), len(data))
            assert shown[:length] == data[:length], f"snapshot {name}"

    async def marks(self, path: Path) -> dict[str, tuple[int, set[int]]]:
        """Return of each bitmap its granularity and which granules are dirty."""
        options = {"secret": b"one"} if self.case.encrypted else {}
        found: dict[str, tuple[int, set[int]]] = {}
        async with open_image(
            path, format="qcow2", read_only=True, driver_options=options
        ) as node:
            for name, bitmap in node.dirty_bitmaps.items():
                assert isinstance(bitmap, Bitmap)
                size = 1 << bitmap.granularity_bits
                extents = await bitmap.extents(0, node.size, 1 << 20)
                dirty: set[int] = set()
                start = 0
                for length, state in zip(*(a.tolist() for a in extents), strict=True):
                    if state:
                        dirty.update(range(start // size, -(-(start + length) // size)))
                    start += length
                found[name] = size, dirty
        return found


def comparable(
    extents: list[dict[str, Any]], *, data_file: bool
) -> list[dict[str, Any]]:
    """Return a map that does not tell which data is a hole of the file: that is
    asked for only if the file seems to have many. Nor, in an image with a data
    file, where what is not stored has its place: 0 and none are one there."""
    joined: list[dict[str, Any]] = []
    for one in extents:
        one["zero"] &= not one["data"]
        if data_file and not one["data"]:
            one.pop("offset", None)
        last = joined[-1] if joined else {}
        same = all(last.get(k) == one[k] for k in ("depth", "present", "zero", "data"))
        place = last["offset"] + last["length"] if "offset" in last else None
        if same and place == one.get("offset") and (one["data"] or data_file):
            last["length"] += one["length"]
        else:
            joined.append(one)
    return joined


def listed(info: dict[str, Any]) -> tuple[Any, ...]:
    """Return what an image says of its snapshots and bitmaps."""
    bitmaps = info["format-specific"]["data"].get("bitmaps", [])
    return (
        [(s["id"], s["name"]) for s in info.get("snapshots", [])],
        sorted((b["name"], b["granularity"], sorted(b["flags"])) for b in bitmaps),
    )


LONG = [pytest.mark.slow, pytest.mark.timeout(0)]


@pytest.mark.parametrize(
    ("case", "nb_rounds"),
    [
        *(pytest.param(case, NB_ROUNDS, id=case.name) for case in CASES[:5]),
        *(
            pytest.param(case, NB_LONG_ROUNDS, id=f"{case.name}-long", marks=LONG)
            for case in CASES
        ),
    ],
)
def test_the_same_history_by_us_and_by_qemu(
    case: Case, nb_rounds: int, tmp_path: Path, seed: int
) -> None:
    need("qemu-img", "qemu-io")
    source = random.Random(f"{seed} {case.name}")
    pair = Pair(case, tmp_path)
    history = History(
        source,
        SIZE,
        case.cluster_size,
        compresses=not (case.encrypted or case.data_file),
        # QEMU frees them in version 2, whatever it is told.
        keeps_zeroes="0.10" not in case.options,
        has_bitmaps="0.10" not in case.options,
        has_snapshots=not case.data_file,
        resizes_snapshots="0.10" not in case.options,
    )
    past: list[Step] = []
    for _ in range(nb_rounds):
        requests = list(history.requests(ROUND_REQUESTS))
        operation = history.operation()
        past += [*requests, operation]
        pair.run(requests, operation)
        try:
            pair.compare(history)
        except AssertionError:
            print("\n".join(map(str, past)))
            raise

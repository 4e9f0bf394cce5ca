"""External data files: the image tool beside qemu-img, and what each left changed
by the other."""

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.interop.img_beside_qemu import qemu_io, settle
from tests.interop.img_programs import run_ours, run_theirs
from tests.serving import need

RUNNERS = (run_theirs, run_ours)
NB_STEPS = 8


def qemu_img(directory: Path, *arguments: object) -> None:
    subprocess.run(
        ["qemu-img", *map(str, arguments)],
        cwd=directory,
        check=True,
        capture_output=True,
        timeout=60,
    )


def prepare(directory: Path, raw: bool) -> None:
    """Make a base, an image with a data file over it, and a top; none with a
    backing file has a raw data file, neither of us allows that."""
    directory.mkdir()
    data = "data_file={}.data" + (",data_file_raw=on" if raw else "")
    qemu_img(directory, *["create", "-qf", "qcow2", "base", "3M"])
    qemu_io(directory, "base", "write -P 1 0 700k", "write -P 2 2M 100k")
    backing = () if raw else ("-b", "base", "-F", "qcow2")
    options = ("-o", data.format("middle"))
    qemu_img(directory, "create", "-qf", "qcow2", *options, *backing, "middle", "3M")
    qemu_io(directory, "middle", "write -P 3 300k 300k", "write -z 1M 128k")
    backing = ("-b", "middle", "-F", "qcow2")
    options = ("-o", "data_file=top.data")
    qemu_img(directory, "create", "-qf", "qcow2", *options, *backing, "top", "4M")
    qemu_io(directory, "top", "write -P 4 100k 100k", "write -P 5 2100k 64k")


def draw(source: random.Random) -> str:
    """Return a command line for the images of `prepare`."""
    name = source.choice(("middle", "top", "top"))
    size = 512 * source.randint(2 << 10, 12 << 10)
    return source.choice(
        (
            f"resize -q --shrink {name} {size}",
            "commit -q -d top",
            "commit -q top",
            "rebase -q -b base -F qcow2 top",
            "rebase -q -b middle -F qcow2 top",
            "rebase -q -u -b middle -F qcow2 top",
            "rebase -q -b '' top",
            f"amend -q -o lazy_refcounts={source.choice(('on', 'off'))} {name}",
            f"amend -q -o compat=0.10 {name}",
            f"snapshot -c s {name}",
            f"snapshot -l {name}",
            f"convert -q -O qcow2 -o data_file=new.data {name} new",
            f"convert -q -O qcow2 -o data_file=raw.data,data_file_raw=on {name} raw",
            f"convert -q -O qcow2 -B base -F qcow2 -o data_file=over.data {name} over",
            f"check -q {name}",
            f"check -r all -q {name}",
        )
    )


# What we say instead: see docs/divergences.md.
WORDS_OF_OURS = ("amend -q -o compat", "rebase -q -b '' top")


@pytest.mark.parametrize(
    ("raw", "number"),
    [
        (False, 1),
        (True, 2),
        *(pytest.param(i % 2, i, marks=pytest.mark.slow) for i in range(3, 23)),
    ],
)
def test_random_commands(raw, number, tmp_path: Path, seed: int) -> None:
    """After each of them both have the same disks. Then each goes on with what
    the other left."""
    need("qemu-img", "qemu-io")
    source = random.Random(f"{seed} {number}")
    directories = tmp_path / "theirs", tmp_path / "ours"
    for directory in directories:
        prepare(directory, bool(raw))
    for step in range(NB_STEPS):
        line = draw(source)
        print(line)
        runners = RUNNERS if step < NB_STEPS // 2 else RUNNERS[::-1]
        theirs, ours = (
            settle(runner(line, directory))
            for runner, directory in zip(runners, directories, strict=True)
        )
        if not line.startswith(WORDS_OF_OURS):
            assert ours == theirs, line
        assert ours[0] == theirs[0], (line, ours, theirs)
        compare(*directories)


def compare(one: Path, other: Path) -> None:
    """Find the same sound images in two directories, with the same bytes."""
    images = sorted(p.name for p in one.iterdir() if p.suffix != ".data")
    assert images == sorted(p.name for p in other.iterdir() if p.suffix != ".data")
    for name in images:
        for directory, runner in zip((one, other), RUNNERS[::-1], strict=True):
            status, output, errors = runner(f"check -q {name}", directory)
            assert (status, output, errors) == (0, b"", b""), (directory, name)
        disks = []
        for directory in (one, other):
            qemu_img(directory, "convert", "-O", "raw", name, directory / "disk.data")
            disks.append((directory / "disk.data").read_bytes())
            os.unlink(directory / "disk.data")
        assert disks[0] == disks[1], name
        if name == "raw":
            for directory, disk in zip((one, other), disks, strict=True):
                data = (directory / "raw.data").read_bytes()
                # QEMU ends it with a whole cluster.
                assert data.rstrip(b"\0") == disk.rstrip(b"\0")
                assert len(data) >= len(disk)


MISSING = (
    "check middle",
    "check --output=json middle",
    "check -r all middle",
    "check top",
    "check --image-opts driver=qcow2,file.filename=middle,data-file.filename=moved",
    "check --image-opts driver=qcow2,file.filename=middle,data-file.filename=absent",
    "map middle",
    "snapshot -l middle",
    "snapshot -c s middle",
    "resize middle +1M",
    "amend -o lazy_refcounts=on middle",
    "rebase -b '' middle",
    "commit top",
    "convert -O raw middle new",
    "compare middle base",
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the images of `prepare`, one of them without its data file."""
    need("qemu-img", "qemu-io")
    directory = tmp_path_factory.mktemp("missing") / "original"
    prepare(directory, raw=False)
    os.rename(directory / "middle.data", directory / "moved")
    return directory


@pytest.mark.parametrize("line", MISSING)
def test_a_data_file_that_is_missing(line: str, original: Path, tmp_path: Path) -> None:
    outcomes = []
    for runner in RUNNERS:
        directory = tmp_path / runner.__name__
        shutil.copytree(original, directory)
        outcomes.append(settle(runner(line, directory)))
        assert not (directory / "middle.data").exists()
    assert outcomes[0] == outcomes[1]

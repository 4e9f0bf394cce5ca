"""One command line in two copies of a directory of disks: qemu-img's and ours.

Standard output, standard error, exit status and the images must be equal. Our
images are then written to by qemu-io and checked.
"""

import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.interop.img_programs import (
    Outcome,
    files_of,
    look_at,
    run_ours,
    run_theirs,
)


def qemu_io(directory: Path, name: str, *commands: str, format_: str = "qcow2") -> None:
    arguments = [word for command in commands for word in ("-c", command)]
    subprocess.run(
        ["qemu-io", "-f", format_, *arguments, name],
        cwd=directory,
        check=True,
        capture_output=True,
        timeout=60,
    )


def prepare(directory: Path) -> None:
    """Fill a directory with images that have data."""
    directory.mkdir()

    def img(*arguments: str) -> None:
        subprocess.run(
            ["qemu-img", *arguments],
            cwd=directory,
            check=True,
            capture_output=True,
            env={**os.environ, "TZ": "UTC"},
        )

    def create(*arguments: str) -> None:
        img("create", "-q", "-f", "qcow2", *arguments)

    create("base.qcow2", "4M")
    qemu_io(directory, "base.qcow2", "write -P 7 1M 256k", "write -P 1 4000k 96k")
    create("-b", "base.qcow2", "-F", "qcow2", "overlay.qcow2")
    qemu_io(directory, "overlay.qcow2", "write -P 8 1088k 64k", "write -z 0 128k")
    create("-b", "overlay.qcow2", "-F", "qcow2", "top.qcow2", "5M")
    qemu_io(directory, "top.qcow2", "write -P 9 4500k 3000", "write -z 1M 64k")
    create("-b", "base.qcow2", "-F", "qcow2", "same.qcow2")
    create("snap.qcow2", "4M")
    qemu_io(directory, "snap.qcow2", "write -P 5 0 128k")
    img("snapshot", "-c", "one", "snap.qcow2")
    qemu_io(directory, "snap.qcow2", "write -P 6 64k 128k")
    img("snapshot", "-c", "two", "snap.qcow2")
    qemu_io(directory, "snap.qcow2", "write -P 3 2M 1k")
    create("bitmaps.qcow2", "4M")
    img("bitmap", "--add", "bitmaps.qcow2", "b0")
    img("bitmap", "--add", "-g", "4k", "--disable", "bitmaps.qcow2", "b1")
    qemu_io(directory, "bitmaps.qcow2", "write -P 2 300k 200k")
    shutil.copy(directory / "bitmaps.qcow2", directory / "broken.qcow2")
    subprocess.run(["qemu-io", "-c", "abort", "broken.qcow2"], cwd=directory)
    shutil.copy(directory / "bitmaps.qcow2", directory / "twice.qcow2")
    create("first.qcow2", "4M")
    img("bitmap", "--add", "first.qcow2", "b0")
    create("lettered.qcow2", "1M")
    img("snapshot", "-c", "n\u00e4me", "lettered.qcow2")
    create("-o", "cluster_size=4k,compat=0.10", "v2.qcow2", "1M")
    qemu_io(directory, "v2.qcow2", "write -P 4 100k 30k")
    create("-o", "preallocation=metadata", "full.qcow2", "1M")
    create("empty.qcow2", "4M")
    img("convert", "-c", "-O", "qcow2", "base.qcow2", "compressed.qcow2")
    img("convert", "base.qcow2", "base.raw")
    img("create", "-q", "-f", "raw", "x.raw", "10000")
    img("create", "-q", "-f", "raw", "empty.raw", "4M")
    qemu_io(
        directory,
        "empty.raw",
        "write -P 7 1M 64k",
        "write -P 0 2M 64k",
        "write -P 6 3000k 512",
        format_="raw",
    )
    os.rename(directory / "empty.raw", directory / "holes.raw")
    (directory / "text").write_text("no image\n")
    create("-u", "-b", "absent", "-F", "qcow2", "orphan.qcow2", "4M")
    create("-u", "-b", "text", "-F", "qcow2", "wrong.qcow2", "4M")
    for name, field, value in (("l1-offset", 0, 0x200), ("l1-size", 8, 1 << 28)):
        image = bytearray((directory / "snap.qcow2").read_bytes())
        entry = int.from_bytes(image[64:72], "big")
        length = 4 if field else 8
        image[entry + field : entry + field + length] = value.to_bytes(length, "big")
        (directory / f"bad-{name}.qcow2").write_bytes(image)
    create("-o", "lazy_refcounts=on", "unclosed.qcow2", "1M")
    subprocess.run(
        ["qemu-io", "-c", "write -P 3 0 64k", "-c", "abort", "unclosed.qcow2"],
        cwd=directory,
        capture_output=True,
    )
    (directory / "sub").mkdir()
    create("-u", "-b", "../base.qcow2", "-F", "qcow2", "sub/overlay.qcow2", "4M")


# What no two runs have in common.
VARYING = re.compile(
    rb"in [0-9.]+ seconds|#block[0-9]+|disk size: .*"
    rb"|[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}"
    # Where exactly clusters are is each program's own affair.
    rb'|,\n    "fragmented-clusters": [0-9]+|    "image-end-offset": [0-9]+,\n'
)


def settle(outcome: Outcome) -> Outcome:
    status, out, err = outcome
    return status, VARYING.sub(b"", out), VARYING.sub(b"", err)


def settled_look(directory: Path, name: str) -> list[Outcome]:
    """Return what qemu-img says of an image, but for what varies."""
    return [settle(outcome) for outcome in look_at(directory, name)]


READING = ("compare", "map", "measure", "info", "check")
IN_EVERY_RUN = 6
"""Of so many lines that change images one is in every test run."""


def lines(*given: str) -> Any:
    """Parametrise a test with command lines. Those that change images take ten
    times as long as the others: most of them are `slow`."""
    cases = []
    for index, line in enumerate(given):
        slow = not line.startswith(READING) and index % IN_EVERY_RUN
        cases.append(pytest.param(line, marks=pytest.mark.slow if slow else ()))
    return pytest.mark.parametrize("line", cases)


def compare(line: str, disks: Path, tmp_path: Path) -> None:
    """Run a line in two copies of ``disks``; all must be equal."""
    if line.startswith(READING):
        assert settle(run_ours(line, disks)) == settle(run_theirs(line, disks))
        return
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for directory in (theirs, ours):
        subprocess.run(["cp", "-a", "--", disks, directory], check=True)
    expected = settle(run_theirs(line, theirs))
    assert settle(run_ours(line, ours)) == expected
    names = files_of(ours)
    if expected[0] == 0:
        assert names == files_of(theirs)
    else:
        # What QEMU leaves of an image that could not be made, we take away.
        assert set(names) <= set(files_of(theirs))
        return
    changed = [
        name
        for name in names
        if not (disks / name).exists()
        or (ours / name).read_bytes() != (disks / name).read_bytes()
        or (theirs / name).read_bytes() != (disks / name).read_bytes()
    ]
    for name in changed:
        with ThreadPoolExecutor(2) as pool:
            same, seen = pool.map(settled_look, [theirs, ours], [name, name])
        assert seen == same, name
        assert_same_content(theirs / name, ours / name)
        assert_writable(ours, name)


def assert_same_content(theirs: Path, ours: Path) -> None:
    if ours.name == "orphan.qcow2":
        return
    done = subprocess.run(
        ["qemu-img", "compare", theirs, ours],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def assert_writable(directory: Path, name: str) -> None:
    """QEMU takes the image as its own."""
    if name == "orphan.qcow2":
        return
    info = run_theirs(f"info {shlex.quote(name)}", directory)[1]
    if b"file format: qcow2" not in info or b"(0 bytes)" in info:
        return
    qemu_io(directory, name, "write -P 77 0 512")
    status, out, err = run_theirs(f"check {shlex.quote(name)}", directory)
    assert status == 0, out + err

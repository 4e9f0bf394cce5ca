"""Command lines that read and write disks, given to qemu-img and to us.

As in `test_img_conformance`: standard output, standard error, exit status and
the images must be equal. Our images are then written to by qemu-io and checked.
"""

import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.interop.test_img_conformance import Outcome, run_ours, run_theirs


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
    (directory / "sub").mkdir()
    create("-u", "-b", "../base.qcow2", "-F", "qcow2", "sub/overlay.qcow2", "4M")


@pytest.fixture(scope="session")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed (tools/setup-system.sh test)")
    directory = tmp_path_factory.mktemp("commands") / "disks"
    prepare(directory)
    return directory


# What no two runs have in common.
VARYING = re.compile(
    rb"in [0-9.]+ seconds|#block[0-9]+|disk size: .*"
    # Where exactly clusters are is each program's own affair.
    rb'|,\n    "fragmented-clusters": [0-9]+|    "image-end-offset": [0-9]+,\n'
)


def settle(outcome: Outcome) -> Outcome:
    status, out, err = outcome
    return status, VARYING.sub(b"", out), VARYING.sub(b"", err)


READING = ("compare", "map", "measure", "info", "check")


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
            same, seen = pool.map(look_at, [theirs, ours], [name, name])
        assert seen == same, name
        assert_same_content(theirs / name, ours / name)
        assert_writable(ours, name)


def files_of(directory: Path) -> list[str]:
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file()
    )


def look_at(directory: Path, name: str) -> list[Outcome]:
    """Return what qemu-img says of an image."""
    quoted = shlex.quote(name)
    lines = [f"info {quoted}", f"check --output=json {quoted}"]
    return [settle(run_theirs(line, directory)) for line in lines]


def assert_same_content(theirs: Path, ours: Path) -> None:
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
    info = run_theirs(f"info {shlex.quote(name)}", directory)[1]
    if b"file format: qcow2" not in info or b"(0 bytes)" in info:
        return
    qemu_io(directory, name, "write -P 77 0 512")
    status, out, err = run_theirs(f"check {shlex.quote(name)}", directory)
    assert status == 0, out + err


CONVERT = [
    "convert",
    "convert base.qcow2",
    "convert -O qcow2 absent out",
    "convert -O foo base.qcow2 out",
    "convert -O foo absent out",
    "convert -f foo base.qcow2 out",
    "convert -f qcow2 x.raw out",
    *(
        f"convert {options} {name} out"
        for options in ("", "-O qcow2", "-S 0 -O qcow2", "-W -m 16 -C -O qcow2")
        for name in (
            *("base.qcow2", "overlay.qcow2", "top.qcow2", "snap.qcow2", "v2.qcow2"),
            *("full.qcow2", "empty.qcow2", "compressed.qcow2", "x.raw", "holes.raw"),
            *("text", "sub/overlay.qcow2"),
        )
    ),
    *(
        f"convert -O qcow2 -o {options} top.qcow2 out"
        for options in (
            *("cluster_size=512", "cluster_size=2M", "compat=0.10", "compat=v3"),
            *("preallocation=metadata", "preallocation=full", "lazy_refcounts=on"),
            *("refcount_bits=1", "foo=1", "cluster_size=3", "preallocation=foo"),
            *("size=6M", "size=1M", "help", "''", ",", "compat=0.10,"),
            *("backing_file=base.qcow2", "encryption=foo", "cluster_size=x"),
        )
    ),
    *(f"convert -S {size} holes.raw out" for size in ("512", "64k", "1M", "3", "17M",
                                                      "foo", "-1", "16M")),
    *(f"convert -S {size} -O qcow2 holes.raw out" for size in ("512", "64k", "16M")),
    *(f"convert -m {number} base.qcow2 out" for number in ("0", "1", "17", "x", "0x4")),
    *(f"convert -T {mode} base.qcow2 out" for mode in
      ("none", "writeback", "writethrough", "directsync", "unsafe", "off", "foo")),
    *(f"convert -t {mode} base.qcow2 out" for mode in
      ("none", "writeback", "writethrough", "directsync", "unsafe", "off", "foo")),
    *(f"convert -l {what} -O qcow2 snap.qcow2 out" for what in
      ("one", "two", "2", "foo", "snapshot.name=one", "snapshot.id=2",
       "snapshot.id=1,snapshot.name=one", "snapshot.id=1,snapshot.name=two",
       "snapshot.foo=1")),
    "convert -l one base.qcow2 snap.qcow2 out",
    "convert -l one base.qcow2 out",
    "convert -p -O qcow2 base.qcow2 out",
    "convert -p empty.qcow2 out",
    "convert -p absent out",
    "convert -p -O foo base.qcow2 out",
    "convert -q -p -O qcow2 base.qcow2 out",
    "convert -r 1G base.qcow2 out",
    "convert -r foo base.qcow2 out",
    "convert -C base.raw out",
    "convert -C holes.raw out",
    "convert -C -S 4k base.qcow2 out",
    "convert -C -c -O qcow2 base.qcow2 out",
    "convert -C --salvage base.qcow2 out",
    "convert --salvage -O qcow2 base.qcow2 out",
    "convert -U -O qcow2 base.qcow2 out",
    "convert -c base.qcow2 out",
    "convert -c -O qcow2 -o preallocation=full base.qcow2 out",
    "convert -o help -O qcow2",
    "convert -o help -O qcow2 base.qcow2 out",
    "convert -o help base.qcow2 out",
    "convert -o help -O foo base.qcow2 out",
    "convert base.qcow2 base.qcow2",
    "convert -O qcow2 base.qcow2 base.qcow2",
    "convert -O qcow2 base.qcow2 v2.qcow2",
    "convert base.qcow2 v2.qcow2",
    "convert base.qcow2 absent/out",
    "convert base.qcow2 .",
    "convert base.qcow2 ''",
    "convert '' out",
    "convert foo:bar out",
    "convert base.qcow2 foo:bar",
    "convert orphan.qcow2 out",
    "convert wrong.qcow2 out",
    "convert -O qcow2 base.qcow2 file:out",
    "convert -f qcow2 file:base.qcow2 out",
    "convert -f raw base.qcow2 out",
    # Several inputs
    "convert base.qcow2 top.qcow2 out",
    "convert -O qcow2 base.qcow2 x.raw v2.qcow2 out",
    "convert -O qcow2 text text out",
    "convert -O qcow2 base.qcow2 absent out",
    # Backing files
    "convert -B base.qcow2 -O qcow2 overlay.qcow2 out",
    "convert -B base.qcow2 -F qcow2 -O qcow2 overlay.qcow2 out",
    "convert -B base.qcow2 -F qcow2 -O qcow2 same.qcow2 out",
    "convert -B base.qcow2 -F qcow2 -O qcow2 base.qcow2 out",
    "convert -B base.raw -F raw -O qcow2 overlay.qcow2 out",
    "convert -B overlay.qcow2 -F qcow2 -O qcow2 top.qcow2 out",
    "convert -B overlay.qcow2 -F qcow2 -O qcow2 -S 0 top.qcow2 out",
    "convert -o backing_file=overlay.qcow2,backing_fmt=qcow2 -O qcow2 top.qcow2 out",
    "convert -B base.qcow2 -F qcow2 overlay.qcow2 out",
    "convert -F qcow2 -O qcow2 overlay.qcow2 out",
    "convert -F qcow2 overlay.qcow2 out",
    "convert -B base.qcow2 -F qcow2 -O qcow2 overlay.qcow2 base.qcow2 out",
    "convert -B absent -F qcow2 -O qcow2 overlay.qcow2 out",
    "convert -B base.qcow2 -F foo -O qcow2 overlay.qcow2 out",
    # No creation
    "convert -n base.qcow2 absent",
    "convert -n base.qcow2 x.raw",
    "convert -n base.qcow2 base.raw",
    "convert -n base.qcow2 holes.raw",
    "convert -n empty.qcow2 base.raw",
    "convert -n -O qcow2 base.qcow2 empty.qcow2",
    "convert -n -O qcow2 base.qcow2 snap.qcow2",
    "convert -n -O qcow2 base.qcow2 bitmaps.qcow2",
    "convert -n -O qcow2 base.qcow2 top.qcow2",
    "convert -n -O qcow2 v2.qcow2 overlay.qcow2",
    "convert -n -O qcow2 base.qcow2 v2.qcow2",
    "convert -n -O qcow2 base.qcow2 x.raw",
    "convert -n -o cluster_size=4k base.qcow2 base.raw",
    "convert -n -c base.qcow2 base.raw",
    "convert -n --target-is-zero base.qcow2 holes.raw",
    "convert -n --target-is-zero -O qcow2 base.qcow2 empty.qcow2",
    "convert -n --target-is-zero -O qcow2 base.qcow2 overlay.qcow2",
    "convert --target-is-zero base.qcow2 out",
    "convert -n -B base.qcow2 -F qcow2 overlay.qcow2 out",
    "convert -n -B base.qcow2 -F qcow2 -O qcow2 overlay.qcow2 same.qcow2",
    # Options as images
    "convert --image-opts -f raw base.qcow2 out",
    "convert --image-opts driver=qcow2,file.filename=base.qcow2 out",
    "convert --image-opts driver=qcow2,file.filename=absent out",
    "convert --target-image-opts base.qcow2 driver=raw,file.filename=out",
    "convert -n --target-image-opts base.qcow2 driver=raw,file.filename=holes.raw",
    "convert -n --target-image-opts base.qcow2 "
    "driver=qcow2,file.filename=empty.qcow2",
    "convert -n --target-image-opts -O raw base.qcow2 "
    "driver=raw,file.filename=holes.raw",
    'convert \'json:{"driver": "qcow2", "file": {"driver": "file", '
    '"filename": "base.qcow2"}}\' out',
    # Bitmaps
    "convert --bitmaps base.qcow2 out",
    "convert --bitmaps -O qcow2 base.qcow2 out",
    "convert --bitmaps -O qcow2 bitmaps.qcow2 out",
    "convert --bitmaps --skip-broken-bitmaps -O qcow2 bitmaps.qcow2 out",
    "convert --skip-broken-bitmaps base.qcow2 out",
    "convert --bitmaps -O qcow2 bitmaps.qcow2 base.qcow2 out",
    "convert -x",
    "convert --foo base.qcow2 out",
    "convert -O",
    "convert base.qcow2 out -O qcow2",
    "convert -qO qcow2 -- base.qcow2 out",
    "convert --object secret,id=a,data=b -O qcow2 base.qcow2 out",
]  # fmt: skip


COMPARE = [
    "compare",
    "compare a",
    "compare a b c",
    *(
        f"compare {options} {first} {second}"
        for options in ("", "-s", "-q", "-p")
        for first, second in (
            ("base.qcow2", "base.qcow2"),
            ("base.qcow2", "base.raw"),
            ("base.qcow2", "overlay.qcow2"),
            ("overlay.qcow2", "top.qcow2"),
            ("base.qcow2", "x.raw"),
            ("x.raw", "base.qcow2"),
            ("x.raw", "empty.qcow2"),
            ("text", "empty.qcow2"),
            ("base.qcow2", "holes.raw"),
            ("compressed.qcow2", "base.qcow2"),
            ("absent", "base.qcow2"),
            ("base.qcow2", "absent"),
        )
    ),
    "compare -s empty.qcow2 empty.qcow2",
    "compare -s same.qcow2 base.qcow2",
    "compare full.qcow2 v2.qcow2",
    "compare orphan.qcow2 base.qcow2",
    "compare base.qcow2 wrong.qcow2",
    "compare -T none base.qcow2 base.raw",
    "compare -T foo base.qcow2 base.raw",
    "compare -f raw base.qcow2 base.qcow2",
    "compare -F raw base.qcow2 base.qcow2",
    "compare -f qcow2 -F raw base.qcow2 base.raw",
    "compare -f foo base.qcow2 base.raw",
    "compare -F foo base.qcow2 base.raw",
    "compare -f foo absent absent",
    "compare --image-opts -f raw base.qcow2 base.raw",
    "compare --image-opts driver=qcow2,file.filename=base.qcow2 "
    "driver=raw,file.filename=base.raw",
    "compare -U base.qcow2 base.raw",
    "compare -x a b",
    "compare -T",
    "compare --foo",
    "compare '' base.qcow2",
]


MAP = [
    "map",
    "map a b",
    *(
        f"map {options} {name}"
        for options in (
            *("", "--output=json", "--output=json --start-offset=1M --max-length=1M"),
            "--start-offset=4000k",
        )
        for name in (
            *("base.qcow2", "overlay.qcow2", "top.qcow2", "same.qcow2", "snap.qcow2"),
            *("bitmaps.qcow2", "v2.qcow2", "full.qcow2", "compressed.qcow2", "x.raw"),
            *("base.raw", "holes.raw", "text", "sub/overlay.qcow2", "empty.qcow2"),
        )
    ),
    "map absent",
    "map orphan.qcow2",
    "map wrong.qcow2",
    "map -f raw base.qcow2",
    "map -f foo base.qcow2",
    "map -fqcow2 base.qcow2",
    "map -f qcow2 x.raw",
    "map --output=foo base.qcow2",
    "map --output=json --start-offset=4M base.qcow2",
    "map --output=json --start-offset=8M base.qcow2",
    "map --start-offset=8M base.qcow2",
    "map --output=json --max-length=0 base.qcow2",
    "map --max-length=0 base.qcow2",
    "map -s 1000 -l 100000 --output=json base.qcow2",
    "map -s 1048577 -l 1 --output=json base.qcow2",
    "map --start-offset=foo base.qcow2",
    "map --start-offset=-1 base.qcow2",
    "map --start-offset=9E base.qcow2",
    "map --max-length=foo base.qcow2",
    "map -U base.qcow2",
    "map --image-opts driver=qcow2,file.filename=base.qcow2",
    "map --image-opts -f raw base.qcow2",
    "map -q base.qcow2",
    "map --foo",
    "map -f",
]


@pytest.mark.parametrize("line", MAP)
def test_map(line: str, disks: Path, tmp_path: Path) -> None:
    compare(line, disks, tmp_path)


@pytest.mark.parametrize("line", COMPARE)
def test_compare(line: str, disks: Path, tmp_path: Path) -> None:
    compare(line, disks, tmp_path)


@pytest.mark.parametrize("line", CONVERT)
def test_convert(line: str, disks: Path, tmp_path: Path) -> None:
    compare(line, disks, tmp_path)

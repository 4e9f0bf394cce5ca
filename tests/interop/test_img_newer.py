"""What qemu-img learnt after 7.2: options with long names, and new ones."""

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.interop.img_beside_qemu import (
    READING,
    qemu_io,
    settle,
    settled_look,
)
from tests.interop.img_programs import TIME_ZONE, files_of, run_ours, run_theirs
from tests.interop.img_versions import turn_back


@pytest.fixture
def copy(disks: Path, tmp_path: Path) -> Path:
    subprocess.run(["cp", "-a", "--", disks, tmp_path / "ours"], check=True)
    return tmp_path / "ours"


SPELLINGS = [
    ("info --cache none base.qcow2", "info base.qcow2"),
    ("info -t off --format qcow2 base.qcow2", "info -f qcow2 base.qcow2"),
    ("check --cache none --quiet base.qcow2", "check -T none -q base.qcow2"),
    (
        "compare --a-format raw --b-format qcow2 --strict --progress --cache none "
        "base.raw base.qcow2",
        "compare -f raw -F qcow2 -s -p -T none base.raw base.qcow2",
    ),
    ("compare --quiet base.raw base.qcow2", "compare -q base.raw base.qcow2"),
    (
        "measure --format qcow2 --target-format qcow2 base.qcow2",
        "measure -f qcow2 -O qcow2 base.qcow2",
    ),
    ("measure --snapshot one snap.qcow2", "measure -l one snap.qcow2"),
    ("measure -s 1M -O qcow2", "measure --size 1M -O qcow2"),
    ("snapshot --list snap.qcow2", "snapshot -l snap.qcow2"),
    (
        "bench --format qcow2 --count 10 --depth 2 --offset 4k --buffer-size 8k "
        "--step-size 16k --cache none --aio threads --quiet base.qcow2",
        "bench -f qcow2 -c 10 -d 2 -o 4k -s 8k -S 16k -t none -i threads -q base.qcow2",
    ),
    ("bench --native base.qcow2", "bench -n base.qcow2"),
    (
        "bench --write --object secret,id=s,data=x --count 1 base.raw --format raw",
        "bench -w -c 1 base.raw -f raw",
    ),
    (
        "create --format qcow2 --options cluster_size=4k --backing base.qcow2 "
        "--backing-format qcow2 new.qcow2",
        "create -f qcow2 -o cluster_size=4k -b base.qcow2 -F qcow2 new.qcow2",
    ),
    (
        "create -f qcow2 -b absent -B qcow2 --backing-unsafe --quiet new.qcow2 1M",
        "create -f qcow2 -b absent -F qcow2 -u -q new.qcow2 1M",
    ),
    (
        "convert --source-format qcow2 --source-cache none --target-format qcow2 "
        "--target-format-options cluster_size=4k --target-cache none --compress "
        "--parallel 2 --oob-writes --quiet base.qcow2 new.qcow2",
        "convert -f qcow2 -T none -O qcow2 -o cluster_size=4k -t none -c -m 2 -W -q "
        "base.qcow2 new.qcow2",
    ),
    (
        "convert -O qcow2 -b base.qcow2 --backing-format qcow2 overlay.qcow2 new.qcow2",
        "convert -O qcow2 -B base.qcow2 -F qcow2 overlay.qcow2 new.qcow2",
    ),
    (
        "convert -O qcow2 --backing base.qcow2 -F qcow2 --rate-limit 1G same.qcow2 "
        "new.qcow2",
        "convert -O qcow2 -B base.qcow2 -F qcow2 -r 1G same.qcow2 new.qcow2",
    ),
    (
        "convert --snapshot one --sparse-size 0 --copy-range-offloading snap.qcow2 x",
        "convert -l one -S 0 -C snap.qcow2 x",
    ),
    ("convert --snapshot one snap.qcow2 x", "convert -l one snap.qcow2 x"),
    ("convert --no-create base.qcow2 absent", "convert -n base.qcow2 absent"),
    (
        "dd --format raw --output-format qcow2 bs=1M count=2 if=base.raw of=x",
        "dd -f raw -O qcow2 bs=1M count=2 if=base.raw of=x",
    ),
    (
        "commit --format qcow2 --cache none --drop --rate-limit 1G --quiet "
        "overlay.qcow2",
        "commit -f qcow2 -t none -d -r 1G -q overlay.qcow2",
    ),
    ("commit --base base.qcow2 top.qcow2", "commit -b base.qcow2 top.qcow2"),
    (
        "amend --format qcow2 --options lazy_refcounts=on --cache none --progress "
        "base.qcow2",
        "amend -f qcow2 -o lazy_refcounts=on -t none -p base.qcow2",
    ),
    ("bitmap --format qcow2 --clear bitmaps.qcow2 b0",
     "bitmap -f qcow2 --clear bitmaps.qcow2 b0"),
    (
        "rebase --format qcow2 --cache none --backing base.qcow2 --backing-format "
        "qcow2 --backing-cache none --quiet top.qcow2",
        "rebase -f qcow2 -t none -b base.qcow2 -F qcow2 -T none -q top.qcow2",
    ),
    (
        "rebase --backing-unsafe -B raw -b base.raw overlay.qcow2",
        "rebase -u -F raw -b base.raw overlay.qcow2",
    ),
    ("resize --format raw --quiet base.raw 5M", "resize -f raw -q base.raw 5M"),
    ("snapshot --create three --quiet snap.qcow2", "snapshot -c three -q snap.qcow2"),
    ("snapshot --apply one snap.qcow2", "snapshot -a one snap.qcow2"),
    ("snapshot --delete one snap.qcow2", "snapshot -d one snap.qcow2"),
]  # fmt: skip
"""Our line, and what 7.2 calls the same."""


@pytest.mark.parametrize(("ours", "theirs"), SPELLINGS)
def test_long_names(
    ours: str, theirs: str, disks: Path, copy: Path, tmp_path: Path
) -> None:
    if theirs.startswith(READING):
        assert settle(run_ours(ours, disks)) == settle(run_theirs(theirs, disks))
        return
    subprocess.run(["cp", "-a", "--", disks, tmp_path / "theirs"], check=True)
    expected = settle(run_theirs(theirs, tmp_path / "theirs"))
    assert settle(run_ours(ours, copy)) == expected
    names = files_of(copy)
    assert names == files_of(tmp_path / "theirs")
    for name in names:
        if (copy / name).read_bytes() != (tmp_path / "theirs" / name).read_bytes():
            assert settled_look(copy, name) == settled_look(
                tmp_path / "theirs", name
            ), name


QCOW2_LIMITS = """\
Block limits:
    write zeroes alignment: {zeroes}
    request alignment: 1
    min mem alignment: 1
    discard alignment: {cluster}
    opt mem alignment: 4096
    max iov: 1024
"""
RAW_LIMITS = """\
Block limits:
    request alignment: {request}
    min mem alignment: {memory}
    opt mem alignment: 4096
    max iov: 1024
"""


@pytest.mark.parametrize(
    ("line", "limits"),
    [
        ("base.qcow2", QCOW2_LIMITS.format(zeroes=65536, cluster=65536)),
        ("v2.qcow2", QCOW2_LIMITS.format(zeroes=4096, cluster=4096)),
        ("extended.qcow2", QCOW2_LIMITS.format(zeroes=2048, cluster=65536)),
        ("base.raw", RAW_LIMITS.format(request=512, memory=1)),
        ("-f raw base.raw", RAW_LIMITS.format(request=1, memory=1)),
        ("-f raw -t none base.raw", RAW_LIMITS.format(request=1, memory=512)),
    ],
)
def test_limits(line: str, limits: str, copy: Path) -> None:
    """What qemu-img 11 says of the same files."""
    run_theirs("create -f qcow2 -o extended_l2=on extended.qcow2 1M", copy)
    plain = run_ours(f"info {line}", copy)[1].decode()
    status, out, err = run_ours(f"info --limits {line}", copy)
    assert (status, err) == (0, b"")
    assert limits in out.decode()
    assert out.decode().replace(limits, "") == plain


def test_limits_in_json(disks: Path) -> None:
    out = run_ours("info --limits --output=json base.raw", disks)[1].decode()
    assert re.match(r'{\n    "limits": {\n        "request-alignment": 512,', out)


def test_remove_all_bitmaps(copy: Path) -> None:
    assert run_ours("bitmap --remove-all bitmaps.qcow2", copy) == (0, b"", b"")
    assert b"bitmaps:" not in run_theirs("info bitmaps.qcow2", copy)[1]
    assert run_ours("bitmap --remove-all --add twice.qcow2 x", copy) == (0, b"", b"")
    assert run_theirs("info twice.qcow2", copy)[1].count(b"name: ") == 1
    assert run_theirs("check twice.qcow2", copy)[0] == 0
    # One that was not closed, and none at all.
    for line in ("-f qcow2 broken.qcow2", "-f qcow2 base.qcow2", "-f raw base.raw"):
        assert run_ours(f"bitmap --remove-all {line}", copy) == (0, b"", b"")
    assert b"bitmaps:" not in run_theirs("info broken.qcow2", copy)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--remove-all bitmaps.qcow2 b0", b"Expecting filename"),
        ("--remove-all", b"Expecting filename"),
        (
            "--remove-all --remove bitmaps.qcow2 b0",
            b"Operation remove on bitmap b0 failed: Dirty bitmap 'b0' not found",
        ),
    ],
)
def test_remove_all_refused(arguments: str, message: bytes, copy: Path) -> None:
    assert run_ours(f"bitmap {arguments}", copy) == (1, b"", b"qemu-img: " + message)


@pytest.mark.parametrize("name", ["overlay.qcow2", "top.qcow2", "extended.qcow2"])
@pytest.mark.parametrize("base", ["", "empty.qcow2"])
def test_rebase_compressed(name: str, base: str, copy: Path) -> None:
    run_theirs(
        "create -q -f qcow2 -o extended_l2=on -b overlay.qcow2 -F qcow2 extended.qcow2",
        copy,
    )
    # A cluster of which a part is the image's own.
    qemu_io(copy, "extended.qcow2", "write -P 9 1088k 4k")
    run_theirs(f"convert {name} before", copy)
    backing = f"-b {shlex.quote(base)}" + (" -F qcow2" if base else "")
    assert run_ours(f"rebase -c {backing} {name}", copy) == (0, b"", b"")
    assert run_theirs(f"compare -f raw before {name}", copy)[0] == 0
    status, out, _ = run_theirs(f"check {name}", copy)
    assert status == 0
    compressed = re.search(rb"([0-9.]+)% compressed", out)
    assert compressed is not None
    assert float(compressed[1]) > 0


@pytest.mark.parametrize("option", ["-u ", ""])
def test_rebase_compressed_of_a_format_that_can_not(option: str, copy: Path) -> None:
    status, _, err = run_ours(f"rebase -c {option}-f raw -b '' base.raw", copy)
    assert (status, err) == (
        1,
        b"qemu-img: Compression not supported for this file format",
    )


@pytest.mark.parametrize(
    "line",
    [
        "info --backing-chain top.qcow2",
        "info --output=json overlay.qcow2",
        "info snap.qcow2",
        "snapshot -l snap.qcow2",
        "snapshot -l lettered.qcow2",
        "snapshot snap.qcow2",
        "map --output=json compressed.qcow2",
        "resize -x base.qcow2 1M",
        "info --backing-chain=yes base.qcow2",
        "check -r",
        "check --output=xml base.qcow2",
        "create -f qcow2 new.img 5x",
        "create -f qcow2 new.img .5G",
        "bench -d foo base.qcow2",
        "info absent",
    ],
)
def test_turned_back(
    line: str, copy: Path, newer_clients: Callable[..., list[str]]
) -> None:
    """What qemu-img 10 says, in the words of 7.2: other tests rely on that where
    there is no 7.2."""
    words = shlex.split(line)
    done = subprocess.run(
        newer_clients("qemu-img", *words),
        cwd=copy,
        capture_output=True,
        env={**os.environ, "TZ": TIME_ZONE},
    )
    # It goes by the path that it was started by.
    err = re.sub(rb"[^\s']*/bin/qemu-img", b"qemu-img", done.stderr.rstrip(b"\n"))
    said = done.returncode, done.stdout, err
    assert settle(turn_back(words, said)) == settle(run_ours(line, copy))

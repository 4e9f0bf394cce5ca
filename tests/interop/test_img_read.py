"""Command lines that compare, map and time disks, given to qemu-img and to us.

How they are compared: `img_beside_qemu`.
"""

from pathlib import Path

import pytest

from tests.interop.img_beside_qemu import compare, lines, qemu_io
from tests.interop.img_programs import run_ours, run_theirs

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
    "compare -F raw --image-opts file.filename=base.qcow2 file.filename=base.raw",
    "compare -p --object foo a b",
    "compare -T",
    "compare --foo",
    "compare '' base.qcow2",
]


@lines(*COMPARE)
def test_compare(line: str, disks: Path, tmp_path: Path) -> None:
    compare(line, disks, tmp_path)


@pytest.mark.parametrize("zeroed", [False, True])
def test_strict_comparison_behind_a_backing_file(tmp_path: Path, zeroed: bool) -> None:
    """Such zeroes count as the image's own."""
    for line in (
        "create -f qcow2 base 64k",
        "create -f qcow2 -b base -F qcow2 top 192k",
        "create -f qcow2 flat 192k",
    ):
        assert run_theirs(line, tmp_path)[0] == 0
    qemu_io(tmp_path, "top", "write 0 64k")
    qemu_io(tmp_path, "flat", "write 0 64k")
    if zeroed:
        qemu_io(tmp_path, "flat", "write -z 64k 128k")
    line = "compare -s top flat"
    outcome = run_ours(line, tmp_path)
    assert outcome == run_theirs(line, tmp_path)
    assert outcome[0] == (0 if zeroed else 1)


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
    "map --object secret,id=s --output=xml",
    "map --object secret,id=s,data=x --object secret,id=s,data=y",
    "map --object secret,id=s,data=!,format=base64 base.qcow2",
    "map --foo --object secret",
    "map --start-offset=foo --bar",
    "map --image-opts foo=1",
    "map --image-opts file.filename=base.qcow2,force-share=on",
    'map \'json:{"file.filename": "base.qcow2", "force-share": true}\'',
    "map --image-opts file.filename=base.qcow2,cache.direct=on,cache.no-flush=on",
    "map -f",
]


@lines(*MAP)
def test_map(line: str, disks: Path, tmp_path: Path) -> None:
    compare(line, disks, tmp_path)


BENCH = [
    "bench",
    "bench a b",
    "bench absent",
    *(f"bench {options} -c 3 base.qcow2" for options in (
        *("", "-d 2", "-s 64k", "-s 512", "-s 3G", "-s foo", "-s -1", "-S 8k"),
        "-S foo",
        *("-o 1M", "-o 9M", "-o foo", "-w", "-w --pattern=3", "--pattern=300"),
        *("--pattern=x", "-w --pattern=0x41", "-w --flush-interval=2"),
        *("-w --flush-interval=2 -d 1", "--flush-interval=2", "--no-drain"),
        *("-w --no-drain --flush-interval=2 -d 1", "-n", "-i threads", "-i foo"),
        *("-i native", "-t none", "-t foo", "-t writethrough", "-U", "-U -w", "-c foo"),
        *("-d foo", "-f raw", "-f foo", "-x", "--foo", "-q", "-s 16M", "-o 3M -S 1M"),
        *("-c 0", "-c -1", "-d -1"),
    )),
    "bench -c 3 x.raw",
    "bench -w -c 3 x.raw",
    "bench -c 2 -s 5000 x.raw",
    "bench --image-opts driver=qcow2,file.filename=base.qcow2 -c 3",
    "bench --image-opts -f raw base.qcow2",
]  # fmt: skip


@lines(*BENCH)
def test_bench(line: str, disks: Path, tmp_path: Path) -> None:
    compare(line, disks, tmp_path)

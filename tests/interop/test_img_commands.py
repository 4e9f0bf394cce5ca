"""Command lines that read and write disks, given to qemu-img and to us.

How they are compared: `img_beside_qemu`.
"""

from pathlib import Path

import pytest

from tests.conftest import find_tool
from tests.interop.img_beside_qemu import compare, lines, prepare, qemu_io
from tests.interop.img_programs import run_ours, run_theirs


@pytest.fixture(scope="session")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    find_tool("qemu-img")
    directory = tmp_path_factory.mktemp("commands") / "disks"
    prepare(directory)
    return directory


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
       "snapshot.foo=1", "snapshot.id")),
    "convert -l one bad-l1-offset.qcow2 out",
    "convert -l one bad-l1-size.qcow2 out",
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
    "convert -O qcow2 base.qcow2 file:out:put",
    "convert -f qcow2 file:base.qcow2 out",
    "convert -f raw base.qcow2 out",
    # Compressed
    *(f"convert -c -O qcow2 {options} out" for options in (
        *("base.qcow2", "top.qcow2", "compressed.qcow2", "x.raw", "text", "holes.raw"),
        *("empty.qcow2", "v2.qcow2", "full.qcow2", "-W -m 16 top.qcow2"),
        *("-o compression_type=zstd top.qcow2", "-o cluster_size=4k top.qcow2"),
        *("-o cluster_size=2M top.qcow2", "-o compat=0.10 base.qcow2"),
        *("base.qcow2 top.qcow2", "x.raw v2.qcow2 base.raw", "-S 64k holes.raw"),
        *("-o extended_l2=on top.qcow2", "-B base.qcow2 -F qcow2 overlay.qcow2"),
        *("-o compression_type=foo base.qcow2", "-o lazy_refcounts=on base.qcow2"),
    )),
    "convert -c -n -O qcow2 base.qcow2 empty.qcow2",
    "convert -c -n -O qcow2 base.qcow2 snap.qcow2",
    "convert -O qcow2 -o extended_l2=on top.qcow2 out",
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
    "convert -n -O qcow2 empty.qcow2 v2.qcow2",
    "convert -c -S 0 -O qcow2 base.qcow2 out",
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
    "convert --bitmaps -O qcow2 broken.qcow2 out",
    "convert --bitmaps --skip-broken-bitmaps -O qcow2 broken.qcow2 out",
    "convert --skip-broken-bitmaps base.qcow2 out",
    "convert --bitmaps -O qcow2 -o compat=0.10 bitmaps.qcow2 out",
    "convert --bitmaps -n -O qcow2 bitmaps.qcow2 twice.qcow2",
    "convert --bitmaps -O qcow2 bitmaps.qcow2 base.qcow2 out",
    "convert -x",
    "convert --foo base.qcow2 out",
    "convert -O",
    "convert base.qcow2 out -O qcow2",
    "convert -qO qcow2 -- base.qcow2 out",
    "convert --object secret,id=a,data=b -O qcow2 base.qcow2 out",
    "convert -O qcow2 -o encrypt.format=luks,encrypt.key-secret=a base.qcow2 out",
    "convert --object secret,id=b,data=b -O qcow2 "
    "-o encrypt.format=luks,encrypt.key-secret=a base.qcow2 out",
    "convert --object foo,id=b -O qcow2 base.qcow2 out",
    "convert --object secret,id=b,data=b -c -O qcow2 "
    "-o encrypt.format=luks,encrypt.key-secret=b base.qcow2 out",
    "convert -c -O qcow2 -o encryption=on base.qcow2 out",
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
    "compare -F raw --image-opts file.filename=base.qcow2 file.filename=base.raw",
    "compare -p --object foo a b",
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


DD = [
    "dd",
    "dd if=base.qcow2",
    "dd of=out",
    "dd bs=1M",
    "dd xxx if=base.qcow2 of=out",
    "dd foo=1 if=base.qcow2 of=out",
    *(
        f"dd {options} if={name} of=out"
        for options in ("", "-O qcow2 bs=1M", "bs=100 count=3", "bs=1M skip=1 count=2")
        for name in ("base.qcow2", "x.raw", "top.qcow2", "text", "compressed.qcow2")
    ),
    *(f"dd {word} if=base.qcow2 of=out" for word in (
        *("bs=0", "bs=foo", "bs=3G", "bs=-1", "bs=700", "bs=64k", "bs=0x200"),
        *("count=0", "count=-1", "count=foo", "count=100000000000", "count=1k"),
        *("skip=0", "skip=foo", "skip=-1", "skip=3", "skip=8192", "skip=8193"),
        *("skip=100000000000", "bs=1M skip=10", "bs=1M skip=4", "bs=1k skip=3 count=9"),
        *("-O foo", "-f foo", "-f qcow2", "-f raw", "-U", "-x", "--foo"),
        "-f foo -O foo",
    )),
    "dd skip=3 count=2 if=base.qcow2 of=out",
    "dd if=absent of=out",
    "dd if= of=out",
    "dd if=base.qcow2 of=",
    "dd if=base.qcow2 of=absent/out",
    "dd if=base.qcow2 of=.",
    "dd if=base.qcow2 of=base.qcow2",
    "dd if=base.qcow2 of=v2.qcow2",
    "dd if=base.qcow2 if=x.raw of=out",
    "dd --image-opts -f raw if=base.qcow2 of=out",
    "dd --image-opts if=driver=qcow2,file.filename=base.qcow2 of=out",
    "dd -O",
]  # fmt: skip


@lines(*DD)
def test_dd(line: str, disks: Path, tmp_path: Path) -> None:
    compare(line, disks, tmp_path)


SNAPSHOT = [
    "snapshot",
    "snapshot a b",
    *(
        f"snapshot {options} {name}"
        for options in ("", "-l", "-U -l", "-c new", "-a one", "-d one")
        for name in ("snap.qcow2", "base.qcow2", "x.raw", "absent", "overlay.qcow2")
        if (options, name) != ("-a one", "x.raw")
    ),
    "snapshot -c ''  snap.qcow2",
    "snapshot -c one snap.qcow2",
    "snapshot -c 1 snap.qcow2",
    "snapshot -a 1 snap.qcow2",
    "snapshot -a 2 snap.qcow2",
    "snapshot -a two snap.qcow2",
    "snapshot -a foo snap.qcow2",
    "snapshot -d 1 snap.qcow2",
    "snapshot -d two snap.qcow2",
    "snapshot -d foo snap.qcow2",
    "snapshot -q -c three snap.qcow2",
    "snapshot -a 1 -d 2 snap.qcow2",
    "snapshot -l -c x snap.qcow2",
    "snapshot -l -l snap.qcow2",
    "snapshot -U -c x snap.qcow2",
    "snapshot -U snap.qcow2",
    "snapshot -x",
    "snapshot -c",
    "snapshot -l orphan.qcow2",
    "snapshot -l wrong.qcow2",
    "snapshot -c x orphan.qcow2",
    "snapshot -c x bitmaps.qcow2",
    "snapshot -c x v2.qcow2",
    "snapshot -c x compressed.qcow2",
    f"snapshot -c {'x' * 300} snap.qcow2",
    "snapshot -c 'n\u00e4me' snap.qcow2",
    "snapshot -l lettered.qcow2",
    "snapshot -a one bitmaps.qcow2",
    "snapshot -a nope x.raw",
    "snapshot -l sub",
    "snapshot --image-opts driver=qcow2,file.filename=snap.qcow2",
    "snapshot --image-opts -l driver=qcow2,file.filename=snap.qcow2",
    "snapshot --image-opts -d one driver=qcow2,file.filename=snap.qcow2",
]


@lines(*SNAPSHOT)
def test_snapshot(line: str, disks: Path, tmp_path: Path) -> None:
    compare(line, disks, tmp_path)


BITMAP = [
    "bitmap",
    "bitmap bitmaps.qcow2",
    "bitmap bitmaps.qcow2 b0",
    *(
        f"bitmap {actions} bitmaps.qcow2 {name}"
        for actions in (
            *("--add", "--remove", "--clear", "--enable", "--disable", "--merge b0"),
            *("--merge b1", "--merge nope", "--add --disable", "--add --enable"),
            *("--remove --add", "--clear --merge b1 --disable", "--add --merge b0"),
        )
        for name in ("b0", "b1", "b2")
    ),
    *(f"bitmap --add -g {size} bitmaps.qcow2 b2" for size in (
        *("3", "1", "512", "foo", "4G", "2G", "64", "0", "-1", "64k", "1M"),
    )),
    "bitmap --add bitmaps.qcow2",
    "bitmap --add bitmaps.qcow2 a b",
    "bitmap --add bitmaps.qcow2 ''",
    f"bitmap --add bitmaps.qcow2 {'a' * 1023}",
    f"bitmap --add bitmaps.qcow2 {'a' * 1024}",
    "bitmap -g 64k --clear bitmaps.qcow2 b0",
    "bitmap -b base.qcow2 --clear bitmaps.qcow2 b0",
    "bitmap -F qcow2 --merge b1 bitmaps.qcow2 b0",
    "bitmap -b base.qcow2 -F qcow2 --merge b1 bitmaps.qcow2 b0",
    "bitmap -b absent --merge b0 bitmaps.qcow2 b1",
    "bitmap -b bitmaps.qcow2 --merge b0 bitmaps.qcow2 b1",
    "bitmap -b bitmaps.qcow2 -F qcow2 --add --merge b0 base.qcow2 b1",
    "bitmap -b bitmaps.qcow2 --add -g 1M --merge b0 --merge b1 base.qcow2 b1",
    "bitmap -b bitmaps.qcow2 --add --merge b0 v2.qcow2 b1",
    "bitmap -b bitmaps.qcow2 --add --merge b0 full.qcow2 b1",
    "bitmap --add v2.qcow2 b",
    "bitmap --add x.raw b",
    "bitmap -f raw --add x.raw b",
    "bitmap -f raw --clear x.raw b",
    "bitmap --add absent b",
    "bitmap --add overlay.qcow2 b",
    "bitmap --add orphan.qcow2 b",
    "bitmap --add -f foo bitmaps.qcow2 b",
    "bitmap --add --image-opts driver=qcow2,file.filename=base.qcow2 b",
    "bitmap --add --image-opts -f raw base.qcow2 b",
    "bitmap --merge",
    "bitmap -x",
    "bitmap --foo",
]  # fmt: skip


@lines(*BITMAP)
def test_bitmap(line: str, disks: Path, tmp_path: Path) -> None:
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


RESIZE = [
    "resize",
    "resize base.qcow2",
    "resize 16M",
    "resize a b c",
    *(
        f"resize {options} {name} {size}"
        for options in ("", "--shrink", "--preallocation=metadata",
                        "--preallocation=full")
        for name in ("base.qcow2", "snap.qcow2", "overlay.qcow2")
        for size in ("8M", "+1M", "-1M", "1M")
    ),
    *(f"resize base.qcow2 {size}" for size in (
        *("foo", "''", "+", "-", "0", "+0", "-100M", "9E", "+1000", "1.5M", "4M"),
        *("4194305", "1E", "100T", "+foo", "99999999999999999999"),
    )),
    *(f"resize --shrink base.qcow2 {size}" for size in ("0", "-4M", "1000", "512")),
    *(f"resize {options} x.raw {size}" for options in
      ("", "-f raw", "-f raw --shrink", "-f raw --preallocation=falloc",
       "-f raw --preallocation=full", "-f raw --preallocation=metadata")
      for size in ("20k", "5k", "+1000", "10k", "1000")),
    "resize bitmaps.qcow2 8M",
    "resize --shrink bitmaps.qcow2 1M",
    "resize v2.qcow2 8M",
    "resize unclosed.qcow2 2M",
    "resize compressed.qcow2 8M",
    "resize --shrink compressed.qcow2 1100k",
    "resize full.qcow2 8M",
    "resize --shrink top.qcow2 64k",
    "resize absent 1M",
    "resize orphan.qcow2 8M",
    "resize text 100",
    "resize -q base.qcow2 20M",
    "resize --preallocation=foo base.qcow2 22M",
    "resize --preallocation=falloc base.qcow2 8M",
    "resize -f foo base.qcow2 1M",
    "resize -f qcow2 base.qcow2 5M",
    "resize base.qcow2 -- 5M",
    "resize base.qcow2 -- -1k",
    "resize -x base.qcow2 1M",
    "resize --foo base.qcow2 1M",
    "resize --image-opts driver=qcow2,file.filename=base.qcow2 5M",
    "resize --image-opts -f raw base.qcow2 5M",
]  # fmt: skip


@lines(*RESIZE)
def test_resize(line: str, disks: Path, tmp_path: Path) -> None:
    compare(line, disks, tmp_path)


AMEND = [
    "amend",
    "amend base.qcow2",
    "amend a b",
    "amend -o help",
    "amend -f qcow2 -o help",
    "amend -f raw -o help",
    "amend -f foo -o help",
    "amend -o help base.qcow2",
    "amend -o backing_file=base.qcow2,backing_fmt=qcow2 overlay.qcow2",
    "amend -o backing_file=base.qcow2 overlay.qcow2",
    "amend -o backing_file=base.qcow2,backing_fmt=qcow2 base.qcow2",
    "amend -o help x.raw",
    "amend -o help absent",
    *(
        f"amend -o {options} {name}"
        for options in (
            *("compat=0.10", "compat=v3", "lazy_refcounts=on", "size=8M", "size=1M"),
            *("lazy_refcounts=off", "refcount_bits=1", "refcount_bits=64"),
            *("lazy_refcounts=on,compat=v3", "refcount_bits=8,size=5M"),
        )
        for name in ("base.qcow2", "v2.qcow2", "overlay.qcow2")
    ),
    *(f"amend -o {options} base.qcow2" for options in (
        *("compat=foo", "cluster_size=4k", "foo=1", ",", "''", "refcount_bits=3"),
        *("refcount_bits=foo", "size=foo", "size=0", "lazy_refcounts=foo"),
        *("backing_file=foo", "backing_file=x.raw,backing_fmt=raw", "encryption=on"),
        *("preallocation=full", "extended_l2=on", "compression_type=zlib"),
        *("data_file=foo", "data_file_raw=on", "compat=0.10,lazy_refcounts=on"),
        *("compat=0.10,refcount_bits=8", "refcount_bits=128", "encrypt.state=active"),
    )),
    "amend -p -o lazy_refcounts=on base.qcow2",
    "amend -p -o foo=1 base.qcow2",
    "amend -q -o compat=v3 base.qcow2",
    "amend --force -o compat=v3 base.qcow2",
    "amend -t foo -o compat=v3 base.qcow2",
    "amend -t none -o compat=v3 base.qcow2",
    "amend -f raw -o size=20M x.raw",
    "amend -o size=20M x.raw",
    "amend -o compat=v3 absent",
    "amend -o compat=v3",
    "amend -o compat=0.10 snap.qcow2",
    "amend -o compat=0.10 compressed.qcow2",
    "amend -o refcount_bits=1 snap.qcow2",
    "amend -o refcount_bits=2 snap.qcow2",
    "amend -f foo -o compat=v3 base.qcow2",
    "amend -x",
    "amend -o",
    "amend --image-opts -o compat=v3 file.filename=base.qcow2,force-share=on",
    "amend --image-opts -o compat=0.10 driver=qcow2,file.filename=base.qcow2",
]  # fmt: skip


@lines(*AMEND)
def test_amend(line: str, disks: Path, tmp_path: Path) -> None:
    compare(line, disks, tmp_path)


MEASURE = [
    "measure",
    "measure a b",
    *(f"measure {options}" for options in (
        *("--size 1G", "--size 0", "--size foo", "--size -1", "--size 1.5k"),
        "--size 9E",
        *("--size 1G -O foo", "--size 1G -O raw", "--size 1G -O qcow2"),
        *("--size 1G -O qcow2 --output=json", "--size 1G --output=foo"),
        *("--size 1G base.qcow2", "--size 1G -l foo", "--size 1G -f raw"),
        *("--size 1G --image-opts", "--image-opts -f raw x", "-o help -O qcow2"),
    )),
    *(f"measure -O qcow2 -o {options} --size 1G" for options in (
        *("cluster_size=4k", "cluster_size=2M", "cluster_size=3", "foo=1"),
        "compat=0.10",
        *("refcount_bits=1", "refcount_bits=64", "preallocation=metadata"),
        *("preallocation=full", "preallocation=foo", "extended_l2=on", "','"),
        "size=2G",
        *("lazy_refcounts=on", "extended_l2=on,cluster_size=2M", "cluster_size=512"),
    )),
    *(
        f"measure {options} {name}"
        for options in ("", "-O qcow2", "-O qcow2 --output=json",
                        "-O qcow2 -o cluster_size=4k")
        for name in (
            *("base.qcow2", "top.qcow2", "snap.qcow2", "bitmaps.qcow2", "x.raw"),
            *("holes.raw", "compressed.qcow2", "full.qcow2", "absent", "text"),
        )
    ),
    "measure -O qcow2 -o backing_file=base.qcow2 overlay.qcow2",
    "measure -O qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 overlay.qcow2",
    "measure -l one -O qcow2 snap.qcow2",
    "measure -l foo -O qcow2 snap.qcow2",
    "measure -l one x.raw",
    "measure --size 512 --image-opts -f raw",
    "measure --image-opts -f raw x.raw",
    "measure -l one -f raw base.qcow2",
    "measure -f raw -O qcow2 base.qcow2",
    "measure -f foo -O qcow2 base.qcow2",
    "measure -O foo base.qcow2",
    "measure -O foo absent",
    "measure -U -O qcow2 base.qcow2",
    "measure -O qcow2 --size 2251799813685248",
    "measure -O qcow2 --size 2251799813685249",
    "measure -O qcow2 -o cluster_size=512 --size 1T",
    "measure -O qcow2 --size 9223372036854774784",
    "measure --image-opts -O qcow2 driver=qcow2,file.filename=base.qcow2",
    "measure orphan.qcow2",
]  # fmt: skip


@lines(*MEASURE)
def test_measure(line: str, disks: Path, tmp_path: Path) -> None:
    compare(line, disks, tmp_path)


@lines(*MAP)
def test_map(line: str, disks: Path, tmp_path: Path) -> None:
    compare(line, disks, tmp_path)


@lines(*COMPARE)
def test_compare(line: str, disks: Path, tmp_path: Path) -> None:
    compare(line, disks, tmp_path)


@lines(*CONVERT)
def test_convert(line: str, disks: Path, tmp_path: Path) -> None:
    compare(line, disks, tmp_path)


@pytest.mark.parametrize(
    ("offset", "entry"), [(3 << 16, 1 << 63 | 0x42A00), (4 << 16, 1 << 63 | 0x52A01)]
)
def test_a_downgrade_of_a_damaged_image(offset, entry, tmp_path):
    """In an L1 entry, and in one of the L2 table."""
    results = []
    for name, run in (("theirs", run_theirs), ("ours", run_ours)):
        directory = tmp_path / name
        directory.mkdir()
        assert run_theirs("create -f qcow2 image 1M", directory)[0] == 0
        qemu_io(directory, "image", "write -z 0 64k")
        with open(directory / "image", "r+b") as file:
            file.seek(offset)
            file.write(entry.to_bytes(8, "big"))
        results.append(run("amend -o compat=0.10 image", directory))
        assert b"corrupt: true" in run_theirs("info image", directory)[1]
    assert results[0] == results[1]


@pytest.mark.parametrize("size", ["0", "512", "5k", "1M"])
def test_the_first_block_of_a_raw_image(size, tmp_path):
    """Who opens it with O_DIRECT looks there for how long a block is."""
    (tmp_path / "old").write_bytes(b"x" * 10000)
    for name in ("new", "old"):
        for run in (run_ours, run_theirs):
            line = f"create -f raw {name} {size}"
            assert run(line, tmp_path)[0] == 0
            status = (tmp_path / name).stat()
            blocks = status.st_size, status.st_blocks
            if run is run_ours:
                ours = blocks
        assert ours == blocks
        assert not any((tmp_path / name).read_bytes())

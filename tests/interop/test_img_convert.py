"""Command lines that copy disks into new images, given to qemu-img and to us.

How they are compared: `img_beside_qemu`.
"""

import json
from pathlib import Path

import pytest

from tests.interop.img_beside_qemu import compare, lines, qemu_io
from tests.interop.img_programs import run_ours, run_theirs

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
    "convert -l snapshot.name=one -O qcow2 snap.qcow2 base.qcow2 out",
    "convert -l snapshot.name=one base.qcow2 snap.qcow2 out",
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
    "convert --bitmaps -n -O qcow2 bitmaps.qcow2 top.qcow2",
    "convert --bitmaps -n -O qcow2 bitmaps.qcow2 first.qcow2",
    "convert -c -O qcow2 -B base.qcow2 -F qcow2 top.qcow2 out",
    "convert -c -S 0 -O qcow2 -B base.qcow2 -F qcow2 top.qcow2 out",
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


@lines(*CONVERT)
def test_convert(line: str, disks: Path, tmp_path: Path) -> None:
    compare(line, disks, tmp_path)


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
            "v2.qcow2",
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


@pytest.mark.parametrize("options", ["", "-S 0", "-o cluster_size=4k"])
@pytest.mark.parametrize("size", ["512k", "500k", "3M"])
def test_compressed_behind_a_backing_file_of_another_size(size, options, tmp_path):
    """What is zero behind the end of the backing file is there already, and what it
    has stays in it."""
    for line in (
        f"create -q -f qcow2 base {size}",
        "create -q -f qcow2 -F qcow2 -b base source 2M",
    ):
        assert run_theirs(line, tmp_path)[0] == 0
    qemu_io(tmp_path, "base", "write -P 7 0 500k")
    writes = ("write -P 8 64k 64k", "write -z 128k 64k", "write -P 9 1500k 64k")
    qemu_io(tmp_path, "source", *writes, "write -z 1M 128k")
    line = f"convert -c {options} -B base -F qcow2 -O qcow2 source"
    assert run_theirs(f"{line} theirs", tmp_path) == (0, b"", b"")
    assert run_ours(f"{line} ours", tmp_path) == (0, b"", b"")
    assert run_theirs("compare -s theirs ours", tmp_path)[0] == 0
    maps = []
    for name in ("theirs", "ours"):
        shown = json.loads(run_theirs(f"map --output=json {name}", tmp_path)[1])
        maps.append([{**entry, "offset": 0} for entry in shown])
    assert maps[0] == maps[1]

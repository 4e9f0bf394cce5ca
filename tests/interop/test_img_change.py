"""Command lines that change images in place, given to qemu-img and to us.

How they are compared: `img_beside_qemu`.
"""

from pathlib import Path

import pytest

from tests.interop.img_beside_qemu import compare, lines, qemu_io
from tests.interop.img_programs import run_ours, run_theirs

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

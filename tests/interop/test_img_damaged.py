"""Images with something wrong in them, checked by qemu-img and by us.

Of a header with one field changed: what QEMU refuses we refuse in its words, and the
reverse.
"""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from nbdqcow.formats.qcow2 import header as h
from nbdqcow.formats.qcow2.entries import OFLAG_COPIED, OFLAG_ZERO
from tests.builder import (
    ImageBuilder,
    builder_of_all_kinds,
    l2_table_offset,
    patched,
)
from tests.conftest import find_tool
from tests.interop.img_programs import look_at, run_ours, run_theirs

SMALL = ImageBuilder(cluster_bits=16).build()


@pytest.fixture(autouse=True)
def qemu_img() -> str:
    return find_tool("qemu-img")


def run_line(line: str, directory: Path) -> None:
    """Run one of QEMU's programs, which is to succeed."""
    subprocess.run(shlex.split(line), cwd=directory, check=True, capture_output=True)


def damaged(kind: str, **options) -> bytes:
    """Return an image with one kind of damage."""
    builder = builder_of_all_kinds(**options)
    match kind:
        case "leak":
            builder.allocate()
            builder.refcounts[5] = 3
        case "refcount-zero":
            builder.refcounts[5] = 0
        case "copied":
            builder.l2[0][0] &= ~OFLAG_COPIED
            builder.l1[0] &= ~OFLAG_COPIED
        case "copied-shared":
            builder.add_snapshot()
            builder.l2[0][0] |= OFLAG_COPIED
        case "snapshot-low":
            builder.add_snapshot()
            builder.refcounts[5] = 1
        case "twice":
            builder.l2[0][1] = builder.l2[0][0]
        case "table-twice":
            builder.l1[1] = builder.l1[0]
        case "beyond":
            builder.l2[0][1] = 0x12345678000 | OFLAG_COPIED
        case "unaligned":
            builder.l2[0][1] = 0x3200 | OFLAG_COPIED
        case "unaligned-zero":
            builder.l2[0][1] = 0x3200 | OFLAG_COPIED | OFLAG_ZERO
        case "reserved":
            builder.l2[0][1] = 0x3000 | 1 << 58 | OFLAG_COPIED
        case "table-beyond":
            builder.l1[1] = 0x123000
        case "table-unaligned":
            builder.l1[1] = 0x3200 | OFLAG_COPIED
        case "table-reserved":
            builder.l1[1] = 0x3001 | OFLAG_COPIED
        case "compressed-copied":
            builder.l2[0][30] |= OFLAG_COPIED
        case "compressed-beyond":
            builder.l2[0][30] = builder.compressed_entry(0x1234567, 700)
        case "no-refcount-table":
            return patched(builder.build(), (56, "I", 0))
        case "block-reserved":
            image = builder.build()
            return patched(image, (builder.header.refcount_table_offset + 8, "Q", 1))
        case "block-outside":
            builder.allocate()
            image = builder.build()
            place = builder.header.refcount_table_offset + 8
            return patched(image, (place, "Q", 1 << 40))
        case "dirty":
            return patched(builder.build(), (72, "Q", 1))
        case "corrupt":
            return patched(builder.build(), (72, "Q", 2))
        case "none":
            pass
        case _:
            raise AssertionError(kind)
    return builder.build()


DAMAGES = [
    *("none", "leak", "copied", "copied-shared", "snapshot-low", "twice"),
    *("table-twice", "beyond", "unaligned", "unaligned-zero", "reserved"),
    *("table-beyond", "table-unaligned", "table-reserved", "compressed-copied"),
    *("compressed-beyond", "dirty", "corrupt", "refcount-zero", "no-refcount-table"),
    "block-reserved",
]
# These need new refcount structures, which we put in another place.
REBUILT = {"refcount-zero", "no-refcount-table", "block-reserved"}


@pytest.mark.parametrize("options", ["", "--output=json", "-r leaks", "-r all"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_image(kind, options, tmp_path):
    results = []
    for name, run in (("theirs", run_theirs), ("ours", run_ours)):
        directory = tmp_path / name
        directory.mkdir()
        (directory / "image").write_bytes(damaged(kind))
        status, out, err = run(f"check {options} image", directory)
        if kind in REBUILT and options == "-r all":
            out = re.sub(rb"Image end offset: .*", b"", out)
            err = err.partition(b"Rebuilding")[0]
            results.append([status, out, err])
            if name == "ours":
                _, out, err = run_theirs("check image", directory)
                assert out.startswith(b"No errors were found")
                assert err == b""
            continue
        results.append([status, out, err, look_at(directory, "image")])
    assert results[0] == results[1]


@pytest.mark.parametrize("options", ["", "-r leaks"])
def test_leaks_are_repaired_beside_a_block_outside_the_file(options, tmp_path):
    results = []
    for run in (run_theirs, run_ours):
        (tmp_path / "image").write_bytes(damaged("block-outside"))
        shown = run(f"check {options} image", tmp_path)
        results.append([shown, look_at(tmp_path, "image")])
    assert results[0] == results[1]


@pytest.mark.parametrize("options", ["", "-r leaks", "-r all"])
@pytest.mark.parametrize("zeroed", ["4k 2k", "8k 2k"])
def test_unaligned_cluster_with_subclusters(zeroed, options, tmp_path):
    """Its offset can go if nothing is read there: see what is left of the image."""
    results = []
    for name, run in (("theirs", run_theirs), ("ours", run_ours)):
        directory = tmp_path / name
        directory.mkdir()
        image = directory / "image"
        for line in (
            "qemu-img create -q -f qcow2 -o extended_l2=on image 1M",
            f"qemu-io -f qcow2 -c 'write 4k 2k' -c 'write -z {zeroed}' image",
        ):
            run_line(line, directory)
        l2_offset = l2_table_offset(image.read_bytes())
        image.write_bytes(patched(image.read_bytes(), (l2_offset + 6, "B", 2)))
        status, out, err = run(f"check {options} image", directory)
        # Where new refcount structures go differs.
        rebuilt = b"Rebuilding" in err
        err = err.partition(b"Rebuilding")[0]
        shown = [status, err] if rebuilt else [status, out, err]
        results.append([*shown, run_theirs("map --output=json image", directory)])
    assert results[0] == results[1]
    if (zeroed, options) == ("4k 2k", "-r all"):
        assert results[0][0] == 0


@pytest.mark.parametrize("options", ["", "-r all"])
@pytest.mark.parametrize("data_file", ["", ",data_file=data"])
@pytest.mark.parametrize(
    ("index", "bitmap"),
    [
        # Stored and zero; the first cluster, which in a data file is at offset 0.
        (0, 0x1_FFFF_FFFF),
        (2, 0x8000_0001_0000_0001),
        # Stored nowhere.
        (4, 1),
        (4, 0x1_0000_0001),
    ],
)
def test_subclusters_that_can_not_be(index, bitmap, data_file, options, tmp_path):
    results = []
    for name, run in (("theirs", run_theirs), ("ours", run_ours)):
        directory = tmp_path / name
        directory.mkdir()
        image = directory / "image"
        for line in (
            f"qemu-img create -q -f qcow2 -o extended_l2=on{data_file} image 1M",
            "qemu-io -f qcow2 -c 'write 0 64k' -c 'write 128k 2k' image",
        ):
            run_line(line, directory)
        l2_offset = l2_table_offset(image.read_bytes())
        change = (l2_offset + 16 * index + 8, "Q", bitmap)
        image.write_bytes(patched(image.read_bytes(), change))
        results.append([run(f"check {options} image", directory), image.read_bytes()])
        results[-1].append(run("convert -O raw image new", directory)[0])
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "offset", [1 << 62, (1 << 63) - 0x10000, 1 << 63, (1 << 64) - 0x10000]
)
@pytest.mark.parametrize("options", ["", "-r all"])
def test_snapshot_past_the_end_of_all_files(offset, options, tmp_path):
    """What leaks then is kept: it may be the snapshot's."""
    builder = builder_of_all_kinds(cluster_bits=16)
    builder.add_snapshot()
    builder.snapshots[0] = patched(builder.snapshots[0], (0, "Q", offset))
    (tmp_path / "image").write_bytes(builder.build())
    status, out, err = run_ours(f"check {options} image", tmp_path)
    assert status == 2
    assert b"\n1 errors were found on the image.\n" in out
    assert err.startswith(b"ERROR: counting reference for region exceeding the end")
    assert look_at(tmp_path, "image")[0][0] == 0


@pytest.mark.parametrize("bitmap", [1, 0x1_0000_0000])
def test_a_compressed_cluster_with_subclusters_keeps_its_space(bitmap, tmp_path):
    image = tmp_path / "image"
    for line in (
        "qemu-img create -q -f qcow2 -o extended_l2=on image 1M",
        "qemu-io -f qcow2 -c 'write -c -P 5 0 64k' image",
    ):
        run_line(line, tmp_path)
    l2_offset = l2_table_offset(image.read_bytes())
    image.write_bytes(patched(image.read_bytes(), (l2_offset + 8, "Q", bitmap)))
    error = b"ERROR compressed cluster 0 with non-zero subcluster allocation bitmap"
    assert run_theirs("check image", tmp_path)[2].startswith(error)
    status, out, err = run_ours("check -r all image", tmp_path)
    assert (status, err.partition(b",")[0]) == (2, error)
    assert b"1 errors were found" in out
    assert b"leaked" not in out
    read = ["qemu-io", "-r", "-c", "read -P 5 0 64k", "image"]
    subprocess.run(read, cwd=tmp_path, check=True)


@pytest.mark.parametrize("index", [0, 1, 20])
@pytest.mark.parametrize(
    "line",
    [
        *("map image", "map --output=json image", "convert -O raw image new"),
        *("convert -c -O qcow2 image new", "convert --salvage -O raw image new"),
    ],
)
@pytest.mark.parametrize(
    ("compat", "byte", "value", "reason"),
    [
        ("1.1", 6, 2, b"Cluster allocation offset"),
        # Version 2 has no such flag: the cluster may be data or zeroes.
        ("0.10", 7, 1, b"Zero cluster entry found in pre-v3 image"),
    ],
)
def test_where_the_map_of_a_disk_ends(
    compat, byte, value, reason, index, line, tmp_path
):
    image = tmp_path / "image"
    for words in (
        f"qemu-img create -q -f qcow2 -o compat={compat} image 4M",
        "qemu-io -f qcow2 -c 'write 0 3M' image",
    ):
        run_line(words, tmp_path)
    l2_offset = l2_table_offset(image.read_bytes())
    change = (l2_offset + 8 * index + byte, "B", value)
    image.write_bytes(patched(image.read_bytes(), change))
    expected, shown = (run(line, tmp_path) for run in (run_theirs, run_ours))
    assert shown[:2] == expected[:2]
    # Theirs says what is wrong in a line of its own, once.
    ours, theirs = (outcome[2].splitlines()[-1] for outcome in (shown, expected))
    where = ours.partition(b": " + reason)[0]
    assert where + b": Input/output error" == theirs


@pytest.mark.parametrize("order", range(7))
@pytest.mark.parametrize("bits", [9, 12, 16])
def test_every_width_and_cluster_size(order, bits, tmp_path):
    kinds = ["none", "leak"] if order else ["none"]
    for kind in kinds:
        options = {"refcount_order": order, "cluster_bits": bits}
        if order < 2:
            # A refcount of 3 does not fit: the leak has to be a whole cluster.
            builder = builder_of_all_kinds(**options)
            builder.allocate()
            image = builder.build()
        else:
            image = damaged(kind, **options)
        (tmp_path / "image").write_bytes(image)
        for line in ("check image", "check --output=json image", "check -r all image"):
            expected = run_theirs(line, tmp_path)
            repaired = (tmp_path / "image").read_bytes()
            (tmp_path / "image").write_bytes(image)
            assert run_ours(line, tmp_path) == expected
            assert (tmp_path / "image").read_bytes() == repaired


def bitmaps_fields(nb_bitmaps, reserved, length, offset, autoclear=1):
    return [
        (112, "I", h.EXT_BITMAPS),
        (116, "I", 24),
        (120, "I", nb_bitmaps),
        (124, "I", reserved),
        (128, "Q", length),
        (136, "Q", offset),
        (144, "Q", 0),
        (88, "Q", autoclear),
    ]


MUTATIONS = [
    *([(offset, "I", value)] for offset in (0, 4, 20, 32, 36, 56, 60, 96, 100, 116)
      for value in (1, 8, 129, 65537, 0x7FFFFFFF, 0xFFFFFFFF)),
    *([(offset, "Q", value)] for offset in (8, 24, 40, 48, 64)
      for value in (1, 0x200, 1 << 40, 1 << 61, 1 << 63)),
    *([(72, "Q", 1 << bit)] for bit in (0, 1, 3, 4, 5, 63)),
    [(72, "Q", 1 << 5 | 1 << 6 | 1 << 63)],
    *([(80, "Q", 1 << bit)] for bit in (0, 1, 63)),
    *([(88, "Q", 1 << bit)] for bit in (0, 7)),
    [(104, "B", 1)],
    [(104, "B", 1), (72, "Q", 8)],
    [(104, "B", 2), (72, "Q", 8)],
    [(8, "Q", 0x2000), (16, "I", 4), (0x2000, "s", b"ab\0c")],
    [(8, "Q", 0x2000), (16, "I", 4), (0x2000, "s", b"\xffb\nc")],
    [(8, "Q", 0x2000), (16, "I", 1024)],
    [(8, "Q", 0xFFFD), (16, "I", 4)],
    [(8, "Q", 0x200), (16, "I", 0)],
    [(112, "I", h.EXT_BACKING_FORMAT), (116, "I", 16)],
    [(112, "I", h.EXT_CRYPTO), (116, "I", 16)],
    [(112, "I", h.EXT_DATA_FILE), (116, "I", 4), (120, "s", b"name" + bytes(12))],
    bitmaps_fields(0, 0, 0, 0),
    bitmaps_fields(65536, 0, 0, 0),
    bitmaps_fields(1, 0, 0, 0),
    bitmaps_fields(1, 1, 32, 0x10000),
    bitmaps_fields(1, 0, 1 << 40, 0x10000),
    bitmaps_fields(1, 0, 100, 0x10001),
    bitmaps_fields(1, 0, 100, 0),
    bitmaps_fields(1, 0, 32, 0x10000),
    bitmaps_fields(1, 0, 32, 0x10000, autoclear=0),
]  # fmt: skip
"""Of a header."""

STRICTER = "qcow2 header length is not a multiple of 8"


@pytest.mark.parametrize("fields", MUTATIONS, ids=repr)
def test_mutated_header(fields, tmp_path):
    (tmp_path / "image").write_bytes(patched(SMALL, *fields))
    status, out, err = run_theirs("info -f qcow2 image", tmp_path)
    our_status, our_out, our_err = run_ours("info -f qcow2 image", tmp_path)
    if STRICTER.encode() in our_err:
        return
    assert (our_status, our_out, our_err) == (status, out, err)

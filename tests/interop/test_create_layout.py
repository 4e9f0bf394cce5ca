"""New images beside those of qemu-img: the header's bytes, and the room taken."""

import json
import os
from pathlib import Path

import pytest

from nbdqcow.block.registry import blocking_file, format_tool
from tests.block.qemu import qemu_img

MiB = 1 << 20


def make(directory: Path, values: dict) -> tuple[Path, Path]:
    """Make an image with our tool and one with qemu-img."""
    words = {True: "on", False: "off"}
    texts = [
        f"{k}={words[v] if isinstance(v, bool) else v}"
        for k, v in values.items()
        if k != "size"
    ]
    options = ["-o", ",".join(texts)] if texts else []
    ours, theirs = directory / "ours", directory / "theirs"
    qemu_img("create", "-uqf", "qcow2", *options, theirs, values["size"])
    tool = format_tool("qcow2")
    plan = tool.prepare(values)
    file = blocking_file().create(str(ours))
    try:
        tool.create(file, plan)
    finally:
        file.close()
    return ours, theirs


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"size": 0},
        {"size": 1 << 40},
        {"compat": "0.10"},
        {"cluster_size": 512},
        {"cluster_size": 1024},
        {"cluster_size": 2048},
        {"cluster_size": 4096},
        {"cluster_size": 2 * MiB},
        *({"refcount_bits": 1 << order} for order in range(7)),
        {"lazy_refcounts": True},
        {"extended_l2": True},
        {"extended_l2": True, "cluster_size": 16384, "refcount_bits": 1},
        {"compression_type": "zstd"},
        {"backing_file": "base", "backing_fmt": "raw"},
        {"backing_file": "base", "backing_fmt": "qcow2", "cluster_size": 512},
        {"backing_file": "b" * 300, "backing_fmt": "qcow2", "compat": "0.10"},
    ],
    ids=str,
)
def test_the_header_is_qemus(tmp_path, values):
    ours, theirs = make(tmp_path, {"size": 8 * MiB} | values)
    length = values.get("cluster_size", 65536)
    heads = [path.read_bytes()[:length].hex(" ", 4) for path in (ours, theirs)]
    assert heads[0] == heads[1]
    assert ours.stat().st_size <= theirs.stat().st_size + length


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"size": 5 * MiB + 512},
        {"cluster_size": 4096, "refcount_bits": 1},
        {"compat": "0.10"},
        {"extended_l2": True},
        {"extended_l2": True, "backing_file": "base", "backing_fmt": "raw"},
    ],
    ids=str,
)
def test_preallocation_takes_as_much(tmp_path, values, preallocation):
    (tmp_path / "base").write_bytes(b"b" * 8 * MiB)
    values = {"size": 8 * MiB, "preallocation": preallocation} | values
    ours, theirs = make(tmp_path, values)
    reports = [
        json.loads(qemu_img("check", "--output=json", path)) for path in (ours, theirs)
    ]
    for report in reports:
        del report["filename"], report["image-end-offset"]
        # Where the tables lie is the maker's choice.
        report.pop("fragmented-clusters", None)
    assert reports[0] == reports[1]
    lengths = [os.stat(path).st_blocks * 512 for path in (ours, theirs)]
    assert abs(lengths[0] - lengths[1]) <= MiB
    qemu_img("compare", ours, theirs)

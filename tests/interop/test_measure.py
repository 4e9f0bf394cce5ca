"""The room that a new image would need: the numbers of qemu-img."""

import json
import subprocess

import pytest

from nbdqcow.block.registry import format_tool
from nbdqcow.errors import ImageError, NotSupported
from tests.conftest import with_luks

MiB = 1 << 20
SECRET = ["--object", "secret,id=s,data=x"]


def qemu(*arguments):
    words = ["qemu-img", "measure", "--output=json", *map(str, arguments)]
    done = with_luks(lambda: subprocess.run(words, capture_output=True, text=True))
    if done.returncode:
        return done.stderr.removeprefix("qemu-img: ").rstrip("\n")
    return json.loads(done.stdout)


def ours(format_name, values, *source):
    try:
        found = format_tool(format_name).measure(values, *source)
    except (ImageError, NotSupported) as error:
        return str(error)
    told = {"required": found.required, "fully-allocated": found.fully_allocated}
    return told if found.bitmaps is None else told | {"bitmaps": found.bitmaps}


OPTIONS = [
    {},
    {"cluster_size": 512},
    {"cluster_size": 2 * MiB, "refcount_bits": 1},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 4096, "extended_l2": True},
    {"cluster_size": 1000},
    {"refcount_bits": 64},
    {"refcount_bits": 3},
    {"compat": "0.10"},
    {"compat": "0.10", "refcount_bits": 8},
    {"compat": "0.10", "lazy_refcounts": True},
    {"preallocation": "metadata"},
    {"preallocation": "falloc"},
    {"preallocation": "full"},
    {"encrypt.format": "luks", "encrypt.key-secret": "s"},
    {
        "encrypt.format": "luks",
        "encrypt.key-secret": "s",
        "encrypt.cipher-alg": "aes-128",
        "cluster_size": 4096,
    },
]


def text(values):
    words = {True: "on"}
    return ",".join(
        f"{k}={words.get(v, v) if v is True else v}" for k, v in values.items()
    )


@pytest.mark.parametrize("values", OPTIONS, ids=text)
@pytest.mark.parametrize("size", [1000, 10 << 30])
def test_qcow2_of_a_size(size, values):
    options = ["-o", text(values)] if values else []
    theirs = qemu("-O", "qcow2", *options, *SECRET, "--size", size)
    assert ours("qcow2", values | {"size": size}) == theirs


def test_qcow2_of_an_image(tmp_path):
    source = tmp_path / "source"
    subprocess.run(["qemu-img", "create", "-qf", "qcow2", source, "1G"], check=True)
    write = ["qemu-io", "-f", "qcow2", "-c", "write 100k 1M", "-c", "write 500M 10M"]
    subprocess.run([*write, source], check=True, stdout=subprocess.DEVNULL)
    bitmaps = [("b1", 65536), ("another", 512)]
    for name, granularity in bitmaps:
        add = ["qemu-img", "bitmap", "--add", "-g", granularity, source, name]
        subprocess.run([str(word) for word in add], check=True)
    cases = [
        ({}, 1114112 + 10 * MiB),
        ({"cluster_size": 4096}, 1114112 + 10 * MiB),
        ({"compat": "0.10"}, 1114112 + 10 * MiB),
        ({"preallocation": "full"}, 1114112 + 10 * MiB),
        ({"backing_file": "x"}, 1 << 30),
    ]
    for values, data_length in cases:
        options = ["-o", text(values)] if values else []
        theirs = qemu("-O", "qcow2", *options, source)
        assert ours("qcow2", values | {"size": 1 << 30}, data_length, bitmaps) == theirs


def test_raw():
    for size in (0, 1000, 5 * MiB):
        assert ours("raw", {"size": size}) == qemu("-O", "raw", "--size", size)


def test_luks():
    """Without QEMU, which makes a key slot first and so takes its time."""
    required = "Parameter 'key-secret' is required for cipher"
    assert ours("luks", {"size": 1000}) == required
    for size, values, length in (
        (1 << 30, {}, 1075810304),
        (1 << 30, {"preallocation": "falloc"}, 1075810304),
        (1000001, {"cipher-alg": "aes-128"}, 2052673),
    ):
        found = ours("luks", {"key-secret": "s", "size": size} | values)
        assert found == {"required": length, "fully-allocated": length}
    wrong = {"key-secret": "s", "hash-alg": "foo"}
    assert ours("luks", wrong) == "Parameter 'hash-alg' does not accept value 'foo'"


def test_formats_that_do_not_know():
    theirs = qemu("-O", "qcow", "--size", 1000)
    assert theirs == "Block driver 'qcow' does not support size measurement"

"""Which format a file's first bytes are of."""

import pytest

from nbdqcow.block.registry import PROBE_LENGTH, format_names, probe_format

QCOW, LUKS = b"QFI\xfb", b"LUKS\xba\xbe"


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"", "raw"),
        (bytes(PROBE_LENGTH), "raw"),
        (QCOW, "raw"),
        (QCOW + b"\0\0\0", "raw"),
        (QCOW + b"\0\0\0\0", "raw"),
        (QCOW + b"\0\0\0\1", "qcow"),
        (QCOW + b"\0\0\0\2", "qcow2"),
        (QCOW + b"\0\0\0\3" + bytes(100), "qcow2"),
        # A version that nobody knows is an error of that format.
        (QCOW + b"\xff\xff\xff\xff", "qcow2"),
        (b"\0" + QCOW + b"\0\0\0\3", "raw"),
        (LUKS + b"\0\1", "luks"),
        (LUKS + b"\0\2", "raw"),
        (LUKS + b"\0", "raw"),
    ],
)
def test_probe_format(head, name):
    assert probe_format(head) == name
    assert name in format_names()


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"QED\0" + bytes(8), "qed"),
        (b"KDMV\1\0\0\0" + bytes(100), "vmdk"),
        (b"COWD\1\0\0\0" + bytes(100), "vmdk"),
        (b"# Disk DescriptorFile\nversion=1\nCID=", "vmdk"),
        (b"# Disk DescriptorFile\r\n\r\n  \nversion=3\r\n", "vmdk"),
        (b"version=2\n", "vmdk"),
        (b"vhdxfile" + bytes(8), "vhdx"),
        (b"conectix" + bytes(8), "vpc"),
        (b"<<< text >>>\n".ljust(64, b"\0") + b"\x7f\x10\xda\xbe\1\0\1\0", "vdi"),
        (b"WithoutFreeSpace\2\0\0\0", "parallels"),
        (b"WithouFreSpacExt\2\0\0\0", "parallels"),
        (b"Bochs Virtual HD Image".ljust(32, b"\0") + b"Redolog", "bochs"),
        (b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0", "cloop"),
    ],
)
def test_formats_that_are_not_here_are_no_raw_images(head, name):
    assert probe_format(head) == name
    assert name not in format_names()


@pytest.mark.parametrize(
    "head",
    [
        b"#!/bin/sh\nexec true\n",
        b"# a comment\nversion=4\n",
        b"version=1 of something",
        b"   version=1\n",
        b"#" * PROBE_LENGTH,
        b"\n" * PROBE_LENGTH,
        b" \n#\n" * (PROBE_LENGTH // 4),
        b"WithoutFreeSpac" + bytes(10),
        bytes(63) + b"\x7f\x10\xda\xbe",
    ],
)
def test_texts_and_others_are_raw(head):
    assert probe_format(head) == "raw"

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

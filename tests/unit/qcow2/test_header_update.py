"""A header that is changed is the old one or the new one at every moment."""

import random
from dataclasses import replace

import pytest

from nbdqcow.formats.qcow2 import header as h
from nbdqcow.formats.qcow2.create import CreateOptions, plan_create
from nbdqcow.formats.qcow2.header import Extension, Header
from nbdqcow.formats.qcow2.header_update import _writes

SECTOR = 512


def make(**options):
    return plan_create(CreateOptions(size=1 << 30, **options))


def essence(header):
    names = [e for e in header.extensions if e.type != h.EXT_FEATURE_NAMES]
    return replace(
        header,
        extensions=names,
        backing_file_offset=0,
        backing_file_size=0,
        extra=b"",
    )


def set_backing(header):
    header.backing_filename = "some/other/name" * 5
    header.set_extension(h.EXT_BACKING_FORMAT, b"raw")


def remove_backing(header):
    header.backing_filename = None
    header.set_extension(h.EXT_BACKING_FORMAT, None)


def add_bitmaps(header):
    header.extensions.append(Extension(h.EXT_BITMAPS, bytes(24)))
    header.compatible_features |= 1


def downgrade(header):
    header.version, header.header_length = 2, h.V2_HEADER_LENGTH
    header.set_extension(h.EXT_FEATURE_NAMES, None)


def upgrade(header):
    header.version, header.header_length = 3, h.V3_HEADER_LENGTH
    names = make().header.extension(h.EXT_FEATURE_NAMES)
    header.set_extension(h.EXT_FEATURE_NAMES, names)


@pytest.mark.parametrize("backing_file", [None, "base", "a/long/way/to/it/" * 15])
@pytest.mark.parametrize(
    ("version", "change"),
    [
        (3, set_backing),
        (3, remove_backing),
        (3, add_bitmaps),
        (3, downgrade),
        (2, upgrade),
        (2, set_backing),
    ],
)
def test_a_torn_change_leaves_one_of_both(version, change, backing_file, seed):
    rnd = random.Random(seed)
    plan = make(
        version=version,
        backing_file=backing_file,
        backing_format="qcow2" if backing_file else None,
    )
    old = plan.header
    disk = bytearray(plan.packed_header.ljust(65536, b"\0"))
    new = replace(old, extensions=list(old.extensions))
    change(new)
    packed = new.pack()
    seen = set()
    for offset, data in _writes(old, packed):
        for _ in range(20):
            torn = bytearray(disk)
            for start in range(0, len(data), SECTOR):
                if rnd.random() < 0.5:
                    piece = data[start : start + SECTOR]
                    torn[offset + start : offset + start + len(piece)] = piece
            found = essence(Header.parse(bytes(torn)))
            assert found in (essence(old), essence(new))
            seen.add(found == essence(new))
        disk[offset : offset + len(data)] = data
    assert True in seen
    assert Header.parse(bytes(disk)).extensions == new.extensions

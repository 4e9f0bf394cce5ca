"""What the tool says of images, sound and damaged."""

import random
import struct

import pytest

from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow2 import header as h
from nbdqcow.formats.qcow2.header import Extension
from nbdqcow.formats.qcow2.tool import Qcow2Tool
from tests.builder import BytesFile, ImageBuilder, patched


def bitmap_entry(
    name=b"b0",
    table_offset=0x1000,
    entries=1,
    flags=2,
    type_=1,
    granularity=16,
    extra=0,
) -> bytes:
    entry = struct.pack(
        ">QIIBBHI",
        table_offset,
        entries,
        flags,
        type_,
        granularity,
        len(name),
        extra,
    )
    entry += name
    return entry.ljust(-(-len(entry) // 8) * 8, b"\0")


def image_with_bitmaps(*entries: bytes, nb_bitmaps: int | None = None) -> bytes:
    builder = ImageBuilder(cluster_bits=12)
    directory = b"".join(entries)
    offset = builder.allocate(len(directory), directory)
    data = struct.pack(
        ">IIQQ",
        len(entries) if nb_bitmaps is None else nb_bitmaps,
        0,
        len(directory),
        offset,
    )
    builder.header.extensions.append(Extension(h.EXT_BITMAPS, data))
    builder.header.autoclear_features = h.AUTOCLEAR_BITMAPS
    return builder.build()


def describe(image: bytes):
    return Qcow2Tool().describe(BytesFile(image))


def test_bitmaps():
    info = describe(
        image_with_bitmaps(
            bitmap_entry(), bitmap_entry(b"two", flags=1, granularity=20)
        )
    )
    assert info.specific is not None
    assert info.specific["bitmaps"] == [
        {"flags": ["auto"], "name": "b0", "granularity": 65536},
        {"flags": ["in-use"], "name": "two", "granularity": 1 << 20},
    ]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"table_offset": 0}, "doesn't satisfy"),
        ({"table_offset": 1}, "doesn't satisfy"),
        ({"entries": 0}, "doesn't satisfy"),
        ({"entries": 2}, "doesn't satisfy"),
        ({"entries": 0xFFFFFFFF, "flags": 1}, "doesn't satisfy"),
        ({"flags": 8}, "doesn't satisfy"),
        ({"type_": 2}, "doesn't satisfy"),
        ({"granularity": 8}, "doesn't satisfy"),
        ({"granularity": 255}, "doesn't satisfy"),
        ({"name": b""}, "doesn't satisfy"),
        ({"name": b"x" * 1024}, "doesn't satisfy"),
        ({"extra": 8}, "extra data is not supported"),
    ],
)
def test_bad_bitmaps(change, text):
    with pytest.raises(ImageError, match=text):
        describe(image_with_bitmaps(bitmap_entry(**change)))


def test_a_broken_bitmap_directory():
    for image in (
        image_with_bitmaps(bitmap_entry()[:16]),
        image_with_bitmaps(bitmap_entry()[:24], nb_bitmaps=1),
        image_with_bitmaps(bitmap_entry(), nb_bitmaps=2),
    ):
        with pytest.raises(ImageError, match="Broken bitmap directory"):
            describe(image)


def test_snapshots():
    builder = ImageBuilder()
    builder.add_snapshot("one", vm_state=1 << 40)
    builder.add_snapshot("two")
    snapshots = describe(builder.build()).snapshots
    assert [(s.id, s.name) for s in snapshots] == [("1", "one"), ("2", "two")]
    assert snapshots[0].vm_state_length == 1 << 40
    assert snapshots[0].date_seconds == 1_700_000_000
    assert snapshots[0].icount is None


def test_too_much_extra_metadata():
    builder = ImageBuilder()
    builder.add_snapshot()
    image = builder.build()
    offset = builder.header.snapshots_offset
    with pytest.raises(ImageError, match="Too much extra metadata"):
        describe(patched(image, (offset + 36, "I", 1025)))


def test_the_snapshot_table_is_bounded():
    image = patched(ImageBuilder().build(), (60, "I", 65536), (64, "Q", 1 << 40))
    file = BytesFile(image)
    assert len(Qcow2Tool().describe(file).snapshots) == 65536
    assert file.nb_read < 16 << 20


def test_any_damage_ends_in_an_image_error(seed):
    rng = random.Random(seed)
    builder = ImageBuilder(cluster_bits=12)
    builder.add_snapshot()
    builder.add_snapshot("two")
    directory = bitmap_entry() + bitmap_entry(b"two")
    place = builder.allocate(len(directory), directory)
    builder.header.extensions.append(
        Extension(h.EXT_BITMAPS, struct.pack(">IIQQ", 2, 0, len(directory), place))
    )
    builder.header.autoclear_features = h.AUTOCLEAR_BITMAPS
    sound = builder.build()
    starts = [0, builder.header.snapshots_offset, place]
    for _ in range(1000):
        fields = [
            (
                rng.choice(starts) + rng.randrange(150),
                format_,
                rng.choice([rng.getrandbits(64), 0, -1, 1 << 10, 1 << 20])
                & ((1 << 8 * struct.calcsize(format_)) - 1),
            )
            for format_ in rng.choices("BHIQ", k=rng.randint(1, 3))
        ]
        image = patched(sound, *fields)
        if rng.random() < 0.2:
            image = image[: rng.randrange(len(image))]
        file = BytesFile(image)
        try:
            info = Qcow2Tool().describe(file)
            assert len(info.snapshots) <= 65536
        except ImageError:
            pass
        assert file.nb_read < 256 << 20

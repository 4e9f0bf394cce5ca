"""The header: parsing, refusing, packing."""

import random
import struct

import pytest

from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow2 import header as h
from nbdqcow.formats.qcow2.header import Extension, Header, needed
from tests.builder import ImageBuilder, patched


def feature_names(*entries: tuple[int, int, str]) -> bytes:
    return b"".join(
        bytes(entry[:2]) + entry[2].encode().ljust(46, b"\0") for entry in entries
    )


def small_image(**options) -> bytes:
    builder = ImageBuilder(cluster_bits=16, **options)
    builder.header.extensions = [
        Extension(h.EXT_FEATURE_NAMES, feature_names((0, 5, "five"), (0, 63, "last")))
    ]
    return builder.build()


IMAGE = small_image()
EXTENSION = 112  # where the extensions begin in IMAGE


def test_fields_of_a_new_image():
    header = Header.parse(IMAGE)
    assert header.version == 3
    assert header.size == 1 << 20
    assert header.cluster_size == 65536
    assert header.refcount_bits == 16
    assert header.l2_entries == 8192
    assert header.l1_size == header.l1_entries_needed == 1
    assert header.backing_filename is None
    assert header.backing_format is None
    assert header.feature_names == {(0, 5): "five", (0, 63): "last"}
    header.check_supported(read_only=False)
    header.check_layout(len(IMAGE))


def test_version_2_has_the_defaults_of_version_3():
    header = Header.parse(small_image(version=2))
    assert (header.version, header.header_length) == (2, 72)
    assert (header.refcount_bits, header.incompatible_features) == (16, 0)
    header.check_supported(read_only=False)


def test_needed_is_the_first_cluster():
    assert needed(IMAGE[:512]) == 65536
    assert needed(patched(IMAGE, (20, "I", 9))[:4096]) == 512
    assert needed(patched(IMAGE, (20, "I", 21))[:4096]) == 2 << 20
    assert needed(patched(IMAGE, (20, "I", 63))[:4096]) == 4096
    assert needed(bytes(4096)) == 4096
    assert needed(b"QFI\xfb") == 4


@pytest.mark.parametrize("version", [2, 3])
def test_pack_keeps_everything(version):
    header = Header.parse(small_image(version=version))
    if version == 3:
        header.header_length = 128
        header.extra = b"\0" * 7 + b"unknown!" + b"\0" * 8
        header.compatible_features = 1 << 40
        header.autoclear_features = 1 << 50
    header.extensions += [Extension(0x12345678, b"odd"), Extension(0x9ABCDEF0, b"")]
    header.set_extension(h.EXT_BACKING_FORMAT, b"raw")
    header.backing_filename = "d\udcffir/backing.img"
    packed = header.pack()
    again = Header.parse(packed)
    assert again == header
    assert again.backing_format == "raw"
    assert again.backing_filename == "d\udcffir/backing.img"
    assert again.pack() == packed


def test_set_extension_replaces_and_removes():
    header = Header.parse(IMAGE)
    header.set_extension(h.EXT_BACKING_FORMAT, b"raw")
    header.set_extension(h.EXT_FEATURE_NAMES, b"")
    header.set_extension(0x12345678, b"other")
    header.set_extension(h.EXT_DATA_FILE, b"data")
    assert [e.type for e in header.extensions] == [
        h.EXT_BACKING_FORMAT,
        h.EXT_DATA_FILE,
        h.EXT_FEATURE_NAMES,
        0x12345678,
    ]
    header.set_extension(h.EXT_BACKING_FORMAT, None)
    header.set_extension(h.EXT_BACKING_FORMAT, None)
    assert header.backing_format is None


def test_of_extensions_of_one_type_the_last_counts():
    header = Header.parse(IMAGE)
    header.extensions += [
        Extension(h.EXT_BACKING_FORMAT, b"qcow2"),
        Extension(0x12345678, b"other"),
        Extension(h.EXT_BACKING_FORMAT, b"raw"),
    ]
    header = Header.parse(header.pack())
    assert header.backing_format == "raw"
    header.set_extension(h.EXT_BACKING_FORMAT, b"qcow")
    assert header.extensions[1:] == [
        Extension(h.EXT_BACKING_FORMAT, b"qcow"),
        Extension(0x12345678, b"other"),
    ]


def test_the_last_feature_name_may_be_cut_short():
    header = Header.parse(IMAGE)
    names = feature_names((0, 5, "five")) + b"\x00\x3ftest"
    header.set_extension(h.EXT_FEATURE_NAMES, names)
    assert header.feature_names == {(0, 5): "five", (0, 63): "test"}
    header.set_extension(h.EXT_FEATURE_NAMES, feature_names((0, 5, "five")) + b"x")
    assert header.feature_names == {(0, 5): "five"}


def test_pack_refuses_what_does_not_fit():
    header = Header.parse(IMAGE)
    header.backing_filename = "x" * 1024
    with pytest.raises(ImageError, match="Backing file name too long"):
        header.pack()
    header.backing_filename = "x" * 1000
    header.cluster_bits = 9
    with pytest.raises(ImageError, match="does not fit the first cluster"):
        header.pack()


def test_backing_name_ends_at_a_nul():
    image = patched(IMAGE, (8, "Q", 0x2000), (16, "I", 4), (0x2000, "s", b"ab\0c"))
    assert Header.parse(image).backing_filename == "ab"
    image = patched(IMAGE, (8, "Q", 0x2000), (16, "I", 0))
    assert Header.parse(image).backing_filename is None


BITMAPS = (EXTENSION, "I", h.EXT_BITMAPS)


def bitmaps(nb_bitmaps, reserved, length, offset):
    data = struct.pack(">IIQQ", nb_bitmaps, reserved, length, offset)
    return [BITMAPS, (116, "I", 24), (120, "s", data + bytes(8)), (88, "Q", 1)]


REFUSED = [
    ([(0, "I", 1)], "Image is not in qcow2 format"),
    ([(4, "I", 1)], "Unsupported qcow2 version 1"),
    ([(4, "I", 4)], "Unsupported qcow2 version 4"),
    ([(20, "I", 8)], "Unsupported cluster size: 2^8"),
    ([(20, "I", 22)], "Unsupported cluster size: 2^22"),
    ([(8, "Q", 0x200), (16, "I", 1024)], "Backing file name too long"),
    ([(8, "Q", 0x10000), (16, "I", 5)], "Backing file name too long"),
    ([(8, "Q", 0xFFFD), (16, "I", 5)], "Backing file name too long"),
    ([(8, "Q", 1 << 62), (16, "I", 5)], "Invalid backing file offset"),
    ([(8, "Q", 40), (16, "I", 5)], "Invalid backing file offset"),
    ([(32, "I", 3)], "Unsupported encryption method 3"),
    ([(36, "I", 0)], "L1 table is too small"),
    ([(24, "Q", 1 << 40)], "L1 table is too small"),
    ([(36, "I", (4 << 20) + 1)], "Active L1 table too large"),
    ([(36, "I", 0xFFFFFFFF)], "Active L1 table too large"),
    ([(40, "Q", 0x30001)], "Active L1 table offset invalid"),
    ([(40, "Q", 1 << 63)], "Active L1 table offset invalid"),
    ([(48, "Q", 1)], "Reference count table offset invalid"),
    ([(48, "Q", 1 << 63)], "Reference count table offset invalid"),
    ([(56, "I", 0)], "Image does not contain a reference count table"),
    ([(56, "I", 129)], "Reference count table too large"),
    ([(56, "I", 0xFFFFFFFF)], "Reference count table too large"),
    ([(60, "I", 65537)], "Snapshot table too large"),
    ([(64, "Q", 1)], "Snapshot table offset invalid"),
    ([(24, "Q", 1 << 63)], "Image is too big"),
    ([(24, "Q", (1 << 64) - 1)], "Image is too big"),
    ([(72, "Q", 1 << 5)], "Unsupported qcow2 feature(s): five"),
    (
        [(72, "Q", 1 << 63 | 1 << 6 | 1 << 5)],
        "Unsupported qcow2 feature(s): five, last, Unknown incompatible feature: 40",
    ),
    (
        [(72, "Q", 8)],
        "qcow2: Compression type incompatible feature bit must not be set",
    ),
    (
        [(104, "B", 1)],
        "qcow2: Compression type incompatible feature bit must be set",
    ),
    ([(104, "B", 2), (72, "Q", 8)], "qcow2: unknown compression type: 2"),
    ([(72, "Q", 16), (20, "I", 13)], "Unsupported subcluster size: 256"),
    (
        [(96, "I", 7)],
        "Reference count entry width too large; may not exceed 64 bits",
    ),
    ([(100, "I", 103)], "qcow2 header too short"),
    ([(100, "I", 0x20000)], "qcow2 header exceeds cluster size"),
    ([(100, "I", 105)], "qcow2 header length is not a multiple of 8"),
    ([(116, "I", 0x7FFFFFFF)], "Header extension too large"),
    ([(116, "I", 0xFFFFFFFF)], "Header extension too large"),
    (
        [(EXTENSION, "I", h.EXT_BACKING_FORMAT)],
        "ERROR: ext_backing_format: len=96 too large (>=16)",
    ),
    (
        [(EXTENSION, "I", h.EXT_CRYPTO)],
        "CRYPTO header extension only expected with LUKS encryption method",
    ),
    ([BITMAPS], "bitmaps_ext: Invalid extension length"),
    (bitmaps(1, 1, 32, 0), "bitmaps_ext: Reserved field is not zero"),
    (bitmaps(0, 0, 32, 0), "found bitmaps extension with zero bitmaps"),
    (
        bitmaps(65536, 0, 32, 0),
        "bitmaps_ext: Image has 65536 bitmaps, exceeding the QEMU supported maximum "
        "of 65535",
    ),
    (bitmaps(1, 0, 0, 0), "Requested bitmap directory size is zero"),
    (bitmaps(1, 0, 32, 1), "bitmaps_ext: invalid bitmap directory offset"),
    (
        bitmaps(1, 0, 1 << 40, 0x10000),
        "bitmaps_ext: bitmap directory size (1099511627776) exceeds the maximum "
        "supported size (67107840)",
    ),
]


@pytest.mark.parametrize(("fields", "text"), REFUSED)
def test_refused_in_one_line(fields, text):
    with pytest.raises(ImageError) as refusal:
        Header.parse(patched(IMAGE, *fields))
    assert str(refusal.value) == text


def test_a_check_opens_what_it_reports_itself():
    image = patched(IMAGE, (56, "I", 0), (60, "I", 65537), (64, "Q", 1))
    assert Header.parse(image, for_check=True).refcount_table_clusters == 0


def test_raw_external_data_needs_a_data_file():
    header = Header.parse(patched(IMAGE, (88, "Q", 2)))
    with pytest.raises(ImageError, match="data-file-raw requires a data file"):
        header.check_supported(read_only=True)
    Header.parse(patched(IMAGE, (72, "Q", 4), (88, "Q", 2))).check_supported(
        read_only=False
    )


def test_a_corrupt_image_opens_read_only():
    header = Header.parse(patched(IMAGE, (72, "Q", 2)))
    assert header.corrupt
    assert not header.dirty
    header.check_supported(read_only=True)
    with pytest.raises(ImageError, match="cannot be opened read/write"):
        header.check_supported(read_only=False)


def test_an_image_with_bitmaps_opens():
    header = Header.parse(patched(IMAGE, *bitmaps(1, 0, 32, 0x10000)))
    assert header.bitmaps == h.BitmapsExtension(1, 32, 0x10000)
    assert header.bitmaps_consistent
    header.check_supported(read_only=False)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ([(40, "Q", 0)], "L1 table overlaps the header"),
        ([(48, "Q", 0)], "refcount table overlaps the header"),
        ([(40, "Q", 1 << 40)], "L1 table lies beyond the end of the file"),
        ([(48, "Q", 1 << 62)], "refcount table lies beyond the end of the file"),
        ([(56, "I", 128)], "refcount table lies beyond the end of the file"),
        ([(48, "Q", 0x10000)], "table overlaps the"),
        ([(60, "I", 1)], "snapshot table overlaps the header|header overlaps"),
    ],
)
def test_layout_refused(fields, text):
    header = Header.parse(patched(IMAGE, *fields))
    with pytest.raises(ImageError, match=text):
        header.check_layout(len(IMAGE))


def test_layout_lets_the_last_cluster_be_incomplete():
    header = Header.parse(IMAGE)
    header.l1_table_offset = 0x40000
    header.check_layout(0x40008)


def test_any_damage_ends_in_an_image_error():
    seed = 20
    rng = random.Random(seed)
    print("seed", seed)
    values = [0, 1, 2, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 64) - 1, 1 << 63]
    accepted = 0
    for _ in range(4000):
        fields = []
        for _ in range(rng.randint(1, 3)):
            format_ = rng.choice("BHIQ")
            width = struct.calcsize(format_)
            value = rng.choice([*values, rng.getrandbits(64)]) & ((1 << 8 * width) - 1)
            fields.append((rng.randrange(240), format_, value))
        image = patched(IMAGE, *fields)[: rng.choice([65536, rng.randrange(300)])]
        try:
            header = Header.parse(image, for_check=rng.random() < 0.5)
            accepted += 1
            header.pack()
            header.check_supported(read_only=False)
            header.check_layout(len(IMAGE))
        except ImageError as error:
            text = str(error)
            assert "\n" not in text
    assert accepted > 100


@pytest.mark.parametrize("length", [0, 1, 3, 4, 8, 23, 24, 71, 72, 103, 104, 111])
def test_truncated_headers(length):
    try:
        Header.parse(IMAGE[:length])
    except ImageError:
        return
    assert length >= 104

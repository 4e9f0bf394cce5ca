"""New images: their layout, and what is refused."""

import pytest

from nbdqcow.block.tools import REPAIR_NONE
from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow2.create import CreateOptions, plan_create
from nbdqcow.formats.qcow2.header import Header
from nbdqcow.formats.qcow2.tool import Qcow2Tool
from tests.builder import BytesFile


def make(**options) -> BytesFile:
    file = BytesFile(b"old content" * 1000)
    Qcow2Tool().create(file, plan_create(CreateOptions(**options)))
    return file


@pytest.mark.parametrize(
    "options",
    [
        {"size": 0},
        {"size": 1},
        {"size": 1 << 30},
        {"size": 1 << 30, "version": 2},
        {"size": 1 << 30, "cluster_size": 512},
        {"size": 4 << 30, "cluster_size": 512, "refcount_bits": 64},
        {"size": 1 << 40, "cluster_size": 2 << 20},
        *({"size": 1 << 20, "refcount_bits": 1 << order} for order in range(7)),
        {"size": 3 << 20, "cluster_size": 4096, "lazy_refcounts": True},
        {"size": 1 << 20, "backing_file": "b", "backing_format": "raw"},
        *(
            {"size": size, "cluster_size": cluster_size, "preallocation": mode}
            for size in (0, 1, 1 << 20, (1 << 20) + 513)
            for cluster_size in (512, 65536)
            for mode in ("metadata", "falloc", "full")
        ),
    ],
)
def test_new_images_are_sound(options):
    file = make(**options)
    found: list[str] = []
    result = Qcow2Tool().check(file, REPAIR_NONE, found.append)
    assert found == []
    assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0)
    header = Header.parse(bytes(file.data))
    header.check_supported(read_only=False)
    header.check_layout(file.length)
    assert header.size == -(-options["size"] // 512) * 512
    if options.get("preallocation", "off") != "off":
        assert result.allocated_clusters == result.total_clusters
        assert result.fragmented_clusters == 0
    else:
        assert result.allocated_clusters == 0
    # All that the file has is in use: the last cluster may be incomplete.
    assert 0 <= result.image_end_offset - file.length < header.cluster_size


def test_the_smallest_layout_is_qemus():
    header = Header.parse(bytes(make(size=1 << 30).data))
    assert header.refcount_table_offset == 0x10000
    assert header.l1_table_offset == 0x30000
    assert len(header.feature_names) == 8


def test_backing_file_is_named():
    file = make(size=512, backing_file="back/ing", backing_format="qcow2")
    header = Header.parse(bytes(file.data))
    assert header.backing_filename == "back/ing"
    assert header.backing_format == "qcow2"


REFUSED = [
    ({"cluster_size": 256}, "Cluster size must be a power of two"),
    ({"cluster_size": 4 << 20}, "Cluster size must be a power of two"),
    ({"cluster_size": 65535}, "Cluster size must be a power of two"),
    ({"cluster_size": 0}, "Cluster size must be a power of two"),
    ({"refcount_bits": 3}, "Refcount width must be a power of two"),
    ({"refcount_bits": 128}, "Refcount width must be a power of two"),
    ({"refcount_bits": 0}, "Refcount width must be a power of two"),
    ({"refcount_bits": 8, "version": 2}, "Different refcount widths than 16 bits"),
    ({"lazy_refcounts": True, "version": 2}, "Lazy refcounts only supported"),
    ({"backing_format": "raw"}, "Backing format cannot be used without"),
    ({"backing_file": "x" * 1024}, "Backing file name too long"),
    ({"backing_file": "x" * 500, "cluster_size": 512}, "does not fit"),
    ({"backing_file": "x", "preallocation": "full"}, "Backing file and prealloc"),
    ({"size": 129 << 30, "cluster_size": 512}, "The image size is too large"),
    ({"size": (1 << 63) - 1}, "Image size cannot be negative"),
    ({"size": (1 << 63) - 1024}, "exceeds maximum"),
    ({"size": 1 << 62}, "The image size is too large"),
    ({"extended_l2": True, "version": 2}, "Extended L2 entries are only"),
    ({"extended_l2": True, "cluster_size": 8192}, "Extended L2 entries are only"),
    ({"compression_type": "zstd", "version": 2}, "Non-zlib compression type"),
    ({"data_file_raw": True}, "data-file-raw requires data-file"),
    ({"data_file": "d", "version": 2}, "External data files are only supported with"),
    (
        {"data_file": "d", "data_file_raw": True, "backing_file": "b"},
        "Backing file and data-file-raw cannot be used at the same time",
    ),
]


@pytest.mark.parametrize(("options", "text"), REFUSED)
def test_refused(options, text):
    with pytest.raises(ImageError, match=text):
        plan_create(CreateOptions(**{"size": 1 << 20, **options}))


@pytest.mark.parametrize(("name", "bit"), [("zlib", 0), ("zstd", 1)])
def test_compression_type(name, bit):
    header = plan_create(CreateOptions(size=1 << 20, compression_type=name)).header
    assert header.compression_type == bit
    assert bool(header.incompatible_features & (1 << 3)) == bool(bit)


def test_a_table_too_large_for_preallocation():
    with pytest.raises(ImageError, match="refcount table"):
        plan_create(
            CreateOptions(
                size=100 << 30,
                cluster_size=512,
                refcount_bits=64,
                preallocation="metadata",
            )
        )

"""Images that nobody made in good faith.

Each builder gets an empty directory and returns the path of the image to open.
"""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from nbdqcow.formats.qcow2.entries import OFLAG_COMPRESSED, OFLAG_COPIED
from tests.builder import ImageBuilder, patched
from tests.crash.histories import created

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
U32, U63 = (1 << 32) - 1, (1 << 63) - 1

BUILDERS: dict[str, Callable[[Path], Path]] = {}


def image(function: Callable[[Path], Path | bytes]) -> Callable[[Path], Path]:
    """Register a builder; bytes become a file."""

    def build(directory: Path) -> Path:
        made = function(directory)
        if isinstance(made, Path):
            return made
        path = directory / "image.qcow2"
        path.write_bytes(made)
        return path

    BUILDERS[function.__name__] = build
    return build


def builder(size: int = MiB, **options: int) -> ImageBuilder:
    made = ImageBuilder(size, **options)
    made.add_data(0, b"data")
    return made


# -- the header ------------------------------------------------------------------


def _header(name: str, *fields: tuple[int, str, int]) -> None:
    def build(directory: Path) -> bytes:
        return patched(builder().build(), *fields)

    build.__name__ = name
    image(build)


for _name, _fields in {
    "version_0": [(4, "I", 0)],
    "backing_name_of_4_gib": [(8, "Q", 200), (16, "I", U32)],
    "backing_name_far_away": [(8, "Q", U63), (16, "I", 100)],
    "cluster_bits_63": [(20, "I", 63)],
    "cluster_bits_0": [(20, "I", 0)],
    "size_of_16_eib": [(24, "Q", (1 << 64) - 512)],
    "size_of_8_eib_without_l1": [(24, "Q", U63), (36, "I", 0)],
    "encrypted_without_a_header": [(32, "I", 2)],
    "encrypted_by_aes": [(32, "I", 1)],
    "l1_of_32_gib": [(36, "I", U32)],
    "l1_of_32_mib_past_the_end": [(36, "I", 4 * MiB)],
    "l1_on_the_header": [(40, "Q", 0)],
    "l1_far_away": [(40, "Q", U63 & ~511)],
    "refcount_table_on_the_header": [(48, "Q", 0)],
    "refcount_table_of_2_tib": [(56, "I", U32)],
    "refcount_table_of_8_mib": [(56, "I", 16384)],
    "snapshots_4_billion": [(60, "I", U32), (64, "Q", 512)],
    "snapshots_on_the_header": [(60, "I", 512), (64, "Q", 0)],
    "snapshots_past_the_end": [(60, "I", 512), (64, "Q", 1 << 40)],
    "header_of_4_gib": [(100, "I", U32 & ~7)],
    "refcounts_of_2_to_the_31_bits": [(96, "I", 31)],
    "extension_of_4_gib": [(112, "II", 0)],
    "every_feature": [(72, "Q", (1 << 64) - 1)],
    "dirty_and_corrupt": [(72, "Q", 3)],
    "extended_l2": [(72, "Q", 1 << 4)],
}.items():
    if _name == "extension_of_4_gib":
        _fields = [(112, "I", 0x12345678), (116, "I", U32)]
    _header(_name, *_fields)


@image
def truncated_in_the_header(directory: Path) -> bytes:
    return builder().build()[:60]


@image
def truncated_in_the_tables(directory: Path) -> bytes:
    return builder().build()[:700]


@image
def no_bytes(directory: Path) -> bytes:
    return b""


# -- tables ----------------------------------------------------------------------


@image
def l1_names_itself(directory: Path) -> bytes:
    made = builder()
    made.l1[1] = made.header.l1_table_offset | OFLAG_COPIED
    return made.build()


@image
def l1_names_the_header(directory: Path) -> bytes:
    made = builder()
    made.l1[1] = 1 << 56
    made.l1[2] = 511
    made.l1[3] = OFLAG_COPIED
    return made.build()


@image
def l2_names_all_metadata(directory: Path) -> bytes:
    made = builder()
    for index in range(len(made.l2[0])):
        made.l2[0][index] = (index % 8) * 512 | OFLAG_COPIED
    return made.build()


@image
def l2_names_its_table(directory: Path) -> bytes:
    made = builder()
    made.l2[0][1] = made.l1[0]
    return made.build()


@image
def l2_past_the_end(directory: Path) -> bytes:
    made = builder()
    made.l2[0][1] = (1 << 56) - 512 | OFLAG_COPIED
    made.l2[0][2] = 513 | OFLAG_COPIED
    made.l1[1] = (1 << 55) | OFLAG_COPIED
    return made.build()


@image
def clusters_shared_by_all(directory: Path) -> Path:
    """Thousands of L1 entries, all of one L2 table, all of one cluster."""
    made = builder(64 * 512)
    made.l2[0][:] = [made.l2[0][0]] * 64
    data = made.build()
    nb = 1 << 12
    offset = 1 << 20
    data = patched(data, (24, "Q", nb * 64 * 512), (36, "I", nb), (40, "Q", offset))
    path = directory / "image.qcow2"
    with path.open("wb") as file:
        file.write(data)
        file.seek(offset)
        file.write(struct.pack(">Q", made.l1[0]) * nb)
    return path


@image
def refcount_table_names_itself(directory: Path) -> bytes:
    data = builder().build()
    (offset,) = struct.unpack_from(">Q", data, 48)
    return patched(data, (offset, "Q", offset), (offset + 8, "Q", offset))


@image
def refcount_blocks_everywhere(directory: Path) -> bytes:
    data = builder().build()
    (offset,) = struct.unpack_from(">Q", data, 48)
    words = [(offset + 8 * i, "Q", (i * 512) | (i % 3)) for i in range(64)]
    return patched(data, *words)


@image
def refcounts_all_zero(directory: Path) -> bytes:
    made = builder()
    made.refcounts.clear()
    return made.build()


@image
def refcounts_all_full(directory: Path) -> bytes:
    made = builder(refcount_order=6)
    made.refcounts = dict.fromkeys(range(64), (1 << 64) - 1)
    return made.build()


@image
def sparse_file_of_a_tebibyte(directory: Path) -> Path:
    path = directory / "image.qcow2"
    path.write_bytes(builder().build())
    os.truncate(path, 1 << 40)
    return path


@image
def sparse_file_of_2_29_clusters(directory: Path) -> Path:
    path = directory / "image.qcow2"
    path.write_bytes(builder().build())
    os.truncate(path, 512 << 29)
    return path


@image
def sparse_file_without_refcounts(directory: Path) -> Path:
    """The refcounts of 2^27 clusters must be built anew."""
    made = builder()
    made.add_data(0)
    made.refcounts = {}
    path = directory / "image.qcow2"
    path.write_bytes(made.build())
    os.truncate(path, 512 << 27)
    return path


# -- snapshots ---------------------------------------------------------------------


def _snapshots(entry: bytes, nb: int) -> bytes:
    made = builder()
    entry = entry.ljust(-(-len(entry) // 8) * 8, b"\0")
    offset = made.allocate(len(entry) * nb, entry * nb)
    made.header.nb_snapshots, made.header.snapshots_offset = nb, offset
    return made.build()


def _entry(l1: int, nb_l1: int, id_: int, name: int, extra: int) -> bytes:
    return struct.pack(">QIHHIIQII", l1, nb_l1, id_, name, 0, 0, 0, 0, extra)


@image
def snapshots_without_anything(directory: Path) -> bytes:
    return _snapshots(_entry(0, 0, 0, 0, 0), 512)


@image
def snapshots_with_l1_tables_of_32_mib(directory: Path) -> bytes:
    """Each of them elsewhere, all past the end of the file."""
    entries = [_entry((1 << 32) + (i << 25), 4 * MiB, 0, 0, 0) for i in range(4096)]
    return _many_snapshots(entries)


def _many_snapshots(entries: list[bytes]) -> bytes:
    made = builder()
    table = b"".join(entries)
    made.header.nb_snapshots = len(entries)
    made.header.snapshots_offset = made.allocate(len(table), table)
    return made.build()


@image
def snapshot_with_4_gib_of_extra_data(directory: Path) -> bytes:
    return _snapshots(_entry(512, 1, 65535, 65535, U32), 3)


@image
def snapshots_on_one_l1_table(directory: Path) -> bytes:
    return _snapshots(_entry(512, 32, 0, 0, 0), 512)


# -- bitmaps -----------------------------------------------------------------------


def _bitmaps(
    directory_data: bytes, nb: int, *, size: int = MiB, length: int | None = None
) -> bytes:
    made = builder(size)
    offset = made.allocate(max(512, len(directory_data)), directory_data)
    made.header.autoclear_features = 1
    made.header.set_extension(
        0x23852875,
        struct.pack(
            ">IIQQ", nb, 0, len(directory_data) if length is None else length, offset
        ),
    )
    return made.build()


def _bitmap(name: bytes, table: int, entries: int, bits: int) -> bytes:
    data = struct.pack(">QIIBBHI", table, entries, 2, 1, bits, len(name), 0) + name
    return data.ljust(-(-len(data) // 8) * 8, b"\0")


@image
def bitmaps_65535_in_no_directory(directory: Path) -> bytes:
    return _bitmaps(b"", 65535, length=65535 * 1024)


@image
def bitmaps_of_one_name(directory: Path) -> bytes:
    return _bitmaps(_bitmap(b"a", 512, 1, 9) * 1000, 1000)


@image
def bitmap_tables_past_the_end(directory: Path) -> bytes:
    entries = [_bitmap(b"%d" % i, 1 << 40, 1, 9) for i in range(1000)]
    return _bitmaps(b"".join(entries), 1000)


@image
def bitmap_table_of_a_gibibyte(directory: Path) -> bytes:
    return _bitmaps(_bitmap(b"a", 1 << 20, 0x8000000, 9), 1)


@image
def bitmaps_of_a_large_disk(directory: Path) -> Path:
    """A few KiB that stand for gigabytes of bits, all of them ones."""
    size, cluster = 32 * GiB * 64, 64 * KiB
    made = ImageBuilder(size, cluster_bits=16)
    nb_table = size // 512 // 8 // cluster
    table = made.allocate(nb_table * 8, struct.pack(">Q", 1) * nb_table)
    entries = [_bitmap(b"%d" % i, table, nb_table, 9) for i in range(64)]
    data = b"".join(entries)
    offset = made.allocate(len(data), data)
    made.header.autoclear_features = 1
    made.header.set_extension(
        0x23852875, struct.pack(">IIQQ", len(entries), 0, len(data), offset)
    )
    path = directory / "image.qcow2"
    path.write_bytes(made.build())
    return path


# -- compressed clusters -----------------------------------------------------------


@image
def zip_bomb(directory: Path) -> bytes:
    """Streams of a gibibyte of zeroes where clusters of 2 MiB are expected."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    piece = packer.compress(bytes(8 * MiB)) + packer.flush(zlib.Z_FULL_FLUSH)
    stream = piece * 128 + packer.flush()
    made = ImageBuilder(256 * MiB, cluster_bits=21)
    offset = made.allocate(2 * MiB, stream[: 2 * MiB])
    entry = made.compressed_entry(offset, 2 * MiB)
    for index in range(128):
        made.set_entry(index, entry)
    made.refcounts[offset >> 21] = 128
    return made.build()


@image
def compressed_garbage(directory: Path) -> bytes:
    made = builder(cluster_bits=12)
    made.set_entry(1, made.compressed_entry(made.allocate(data=b"\xff" * 4096), 4000))
    made.set_entry(2, made.compressed_entry(0, 4000))
    made.set_entry(3, made.compressed_entry((1 << 50), 4000))
    made.set_entry(4, (1 << 64) - 1)
    made.set_entry(5, OFLAG_COMPRESSED)
    return made.build()


# -- other files --------------------------------------------------------------------


def _overlay(path: Path, backing: str, format_: str | None = "qcow2") -> Path:
    options = {"backing_fmt": format_} if format_ else {}
    path.write_bytes(created(backing_file=backing, **options))
    return path


@image
def backing_itself(directory: Path) -> Path:
    return _overlay(directory / "image.qcow2", "image.qcow2")


@image
def backing_cycle_of_three(directory: Path) -> Path:
    _overlay(directory / "b", "c")
    _overlay(directory / "c", "image.qcow2")
    return _overlay(directory / "image.qcow2", "b")


@image
def backing_cycle_by_links(directory: Path) -> Path:
    (directory / "link").symlink_to("image.qcow2")
    return _overlay(directory / "image.qcow2", "./link")


@image
def backing_chain_of_300(directory: Path) -> Path:
    for index in range(300):
        _overlay(directory / f"{index}", f"{index + 1}")
    return _overlay(directory / "image.qcow2", "0")


@image
def backing_a_pipe(directory: Path) -> Path:
    os.mkfifo(directory / "pipe")
    return _overlay(directory / "image.qcow2", "pipe", "raw")


@image
def backing_a_directory(directory: Path) -> Path:
    return _overlay(directory / "image.qcow2", ".", "raw")


@image
def backing_an_endless_device(directory: Path) -> Path:
    return _overlay(directory / "image.qcow2", "/dev/zero", "raw")


@image
def backing_by_json(directory: Path) -> Path:
    nested = '{"driver":"qcow2","file":' * 8
    return _overlay(directory / "image.qcow2", "json:" + nested, None)


@image
def backing_of_an_unknown_protocol(directory: Path) -> Path:
    return _overlay(directory / "image.qcow2", "fat:rw:/etc", "raw")


@image
def data_in_etc_shadow(directory: Path) -> bytes:
    made = builder()
    made.header.incompatible_features |= 1 << 2
    made.header.set_extension(0x44415441, b"/etc/shadow")
    return made.build()


@image
def data_in_itself(directory: Path) -> bytes:
    made = builder()
    made.header.incompatible_features |= 1 << 2
    made.header.set_extension(0x44415441, b"image.qcow2")
    return made.build()


# -- LUKS ------------------------------------------------------------------------------


@image
def luks_header_past_the_end(directory: Path) -> bytes:
    made = builder()
    made.header.crypt_method = 2
    made.header.set_extension(0x0537BE77, struct.pack(">QQ", 1 << 40, 1 << 40))
    return made.build()


@image
def luks_with_endless_iterations(directory: Path) -> bytes:
    header = bytearray(592)
    struct.pack_into(
        ">6sH32s32s32sII20s32sI40s", header, 0, b"LUKS\xba\xbe", 1, b"aes",
        b"xts-plain64", b"sha256", 8192, 64, b"", b"", U32, b"uuid",
    )  # fmt: skip
    for slot in range(8):
        struct.pack_into(
            ">II32sII", header, 208 + 48 * slot, 0x00AC71F3, U32, b"", 8 + slot * 500,
            4000,
        )  # fmt: skip
    made = builder()
    area = bytes(header).ljust(2 * MiB, b"\0")
    offset = made.allocate(len(area), area)
    made.header.crypt_method = 2
    made.header.set_extension(0x0537BE77, struct.pack(">QQ", offset, len(area)))
    return made.build()

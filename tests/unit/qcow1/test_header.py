"""The header of qcow images: what is read, what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdqcow.block.steps import Flush, Read, Write
from nbdqcow.errors import ImageError, UnsupportedFeature
from nbdqcow.formats.qcow1.header import (
    HEADER_LENGTH,
    MAX_L1_BYTES,
    Header,
    compressed_entry,
    compressed_range,
    read_header,
)
from tests.builder import patched
from tests.qcow1_image import Image

SOUND = Image(1 << 20, backing=b"base.raw").build()


def read(data: bytes) -> Header:
    steps = read_header(len(data))
    answer = b""
    try:
        while True:
            step = steps.send(answer) if answer else next(steps)
            assert not isinstance(step, Write | Flush)
            assert isinstance(step, Read)
            assert 0 < step.length <= 1023
            piece = data[step.offset : step.offset + step.length]
            answer = piece.ljust(step.length, b"\0")
    except StopIteration as stop:
        header = stop.value
    header.check_l1(len(data))
    return header


def test_fields() -> None:
    header = read(SOUND)
    assert header == Header(
        size=1 << 20,
        l1_table_offset=56,
        backing_file_offset=48,
        backing_file_size=8,
        backing_filename="base.raw",
    )
    assert header.pack() == SOUND[:HEADER_LENGTH]
    assert (header.l1_size, header.l2_table_bytes) == (1, 4096)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ((0, "I", 0x514649FA), "Image not in qcow format"),
        ((24, "Q", 1), "Image size is too small (must be at least 2 bytes)"),
        ((24, "Q", 0), "Image size is too small (must be at least 2 bytes)"),
        ((24, "Q", (1 << 64) - 1), "Image too large"),
        ((24, "Q", 1 << 63), "Image too large"),
        ((24, "Q", (MAX_L1_BYTES // 8 << 21) + 1), "Image too large"),
        ((24, "Q", 1 << 40), "Could not read L1 table: it is past the file's end"),
        ((32, "B", 8), "Cluster size must be between 512 and 64k"),
        ((32, "B", 17), "Cluster size must be between 512 and 64k"),
        ((32, "B", 255), "Cluster size must be between 512 and 64k"),
        ((33, "B", 5), "L2 table size must be between 512 and 64k"),
        ((33, "B", 14), "L2 table size must be between 512 and 64k"),
        ((36, "I", 2), "invalid encryption method in qcow header"),
        ((16, "I", 1024), "Backing file name too long"),
        ((16, "I", (1 << 32) - 1), "Backing file name too long"),
        ((8, "Q", 1 << 63), "Backing file name lies beyond the end of the file"),
        ((16, "I", 1023), "Backing file name lies beyond the end of the file"),
        ((40, "Q", 1 << 62), "Could not read L1 table: it is past the file's end"),
        ((40, "Q", 52), "L1 table offset 0x34 unaligned"),
        ((40, "Q", 8), "L1 table overlaps with the image header"),
    ],
)
def test_refusals(field: tuple[int, str, int], text: str) -> None:
    with pytest.raises(ImageError) as error:
        read(patched(SOUND, field))
    assert str(error.value) == text


def test_other_versions_are_named() -> None:
    with pytest.raises(UnsupportedFeature) as error:
        read(patched(SOUND, (4, "I", 3)))
    assert str(error.value) == (
        "qcow (v1) does not support qcow version 3\nTry the 'qcow2' driver instead."
    )
    with pytest.raises(UnsupportedFeature, match="support qcow version 9"):
        read(patched(SOUND, (4, "I", 9)))


@pytest.mark.parametrize("length", [0, 1, 4, 47])
def test_a_short_file_is_no_image(length: int) -> None:
    with pytest.raises(ImageError, match="not in qcow format"):
        read(SOUND[:length])


@given(st.binary(max_size=60), st.integers(0, 59))
def test_any_bytes_give_a_header_or_an_image_error(data: bytes, at: int) -> None:
    damaged = SOUND[:at] + data + SOUND[at + len(data) :]
    try:
        header = read(damaged)
    except ImageError:
        return
    assert header.l1_bytes <= min(MAX_L1_BYTES, len(damaged))


def test_a_name_ends_at_a_nul_and_may_be_empty() -> None:
    assert read(patched(SOUND, (52, "s", b"\0"))).backing_filename == "base"
    assert read(patched(SOUND, (48, "s", b"\0"))).backing_filename is None
    assert read(patched(SOUND, (16, "I", 0))).backing_filename is None
    odd = read(patched(SOUND, (48, "s", b"\xff\xfe"))).backing_filename
    assert odd is not None
    assert odd.encode("utf-8", "surrogateescape") == b"\xff\xfese.raw"


@given(st.integers(9, 16), st.data())
def test_descriptors_of_compressed_clusters(bits: int, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, (1 << 63 - bits) - 1))
    length = data.draw(st.integers(0, (1 << bits) - 1))
    entry = compressed_entry(offset, length, bits)
    assert entry >> 63 == 1
    assert compressed_range(entry, bits) == (offset, length)

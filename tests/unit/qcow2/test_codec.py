"""Streams of compressed clusters: right, bounded, and whatever was done to them."""

import random
import sys
import zlib

import numpy as np
import pytest

from nbdqcow.errors import BlockError
from nbdqcow.formats.qcow2 import codec
from nbdqcow.formats.qcow2.entries import (
    OFLAG_COMPRESSED,
    OFLAG_COPIED,
    compressed_entry,
    compressed_range,
    compressed_ranges,
    max_compressed_offset,
)
from nbdqcow.formats.qcow2.header import COMPRESSION_ZLIB, COMPRESSION_ZSTD

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CLUSTER = 65536
TYPES = pytest.mark.parametrize("type_", [COMPRESSION_ZLIB, COMPRESSION_ZSTD])


def text(length, seed=1):
    rnd = random.Random(seed)
    return bytes(rnd.choices(b"abcdefgh \n", k=length))


def raw_deflate(data, window_bits=12):
    packer = zlib.compressobj(6, zlib.DEFLATED, -window_bits)
    return packer.compress(data) + packer.flush()


@pytest.fixture(params=["with", "without"])
def _wheels(request, monkeypatch):
    """Both ways: with the fast libraries, and where there are none."""
    if request.param == "without":
        monkeypatch.setattr(codec, "deflate", None)
        monkeypatch.setattr(codec, "deflater", None)


@TYPES
@pytest.mark.usefixtures("_wheels")
@pytest.mark.parametrize("length", [512, 4096, CLUSTER, 2 << 20])
def test_round_trip_with_what_follows_in_the_sector(type_, length):
    compress, decompress = codec.codec(type_)
    data = text(length)
    packed = compress(data)
    assert len(packed) < length
    for tail in (b"", bytes(300), b"\xff" * 511, random.Random(2).randbytes(511)):
        assert decompress(packed + tail, length) == data
        assert decompress(memoryview(packed + tail), length) == data


@pytest.mark.usefixtures("_wheels")
def test_deflate_keeps_to_a_window_of_4_kib():
    data = text(3000) + random.Random(3).randbytes(9000)
    data = (data * 8)[:CLUSTER]
    decoder = zlib.decompressobj(-12)
    packed = codec.deflate_blocking(data)
    # One byte at a time, the window is all that the decoder has.
    plain = b"".join(decoder.decompress(packed[i : i + 1]) for i in range(len(packed)))
    assert plain == data


@pytest.mark.usefixtures("_wheels")
def test_inflate_takes_any_window():
    block = random.Random(4).randbytes(20_000)
    data = (block * 4)[:CLUSTER]
    packed = raw_deflate(data, 15)
    assert len(packed) < 25_000
    assert codec.inflate_blocking(packed, CLUSTER) == data


@TYPES
@pytest.mark.usefixtures("_wheels")
def test_never_more_than_a_cluster(type_):
    compress, decompress = codec.codec(type_)
    bomb = compress(bytes(64 << 20))
    assert len(bomb) < 1 << 20
    assert decompress(bomb, CLUSTER) == bytes(CLUSTER)


@TYPES
@pytest.mark.usefixtures("_wheels")
def test_damage_is_an_error(type_, seed):
    compress, decompress = codec.codec(type_)
    data = text(CLUSTER)
    packed = bytearray(compress(data))
    rnd = random.Random(seed)
    with pytest.raises(BlockError, match="damaged compressed cluster"):
        decompress(packed[: len(packed) // 2], CLUSTER)
    with pytest.raises(BlockError, match="damaged compressed cluster"):
        decompress(compress(data[:-1]), CLUSTER)
    with pytest.raises(BlockError, match="damaged compressed cluster"):
        decompress(b"\xff" * 512, CLUSTER)
    for _ in range(300):
        broken = packed[:]
        for _ in range(rnd.randrange(1, 4)):
            broken[rnd.randrange(len(broken))] = rnd.randrange(256)
        try:
            assert len(decompress(broken, CLUSTER)) == CLUSTER
        except BlockError:
            continue


def test_zstd_of_several_frames():
    data = text(CLUSTER)
    frames = [zstd.compress(data[i : i + 10_000]) for i in range(0, CLUSTER, 10_000)]
    assert codec.unzstd_blocking(b"".join(frames) + b"garbage", CLUSTER) == data


def test_zstd_without_a_content_size():
    packer = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 21})
    data = text(CLUSTER)
    packed = packer.compress(data) + packer.flush()
    assert codec.unzstd_blocking(packed + bytes(100), CLUSTER) == data


def test_a_frame_that_wants_much_memory_is_refused():
    options = {zstd.CompressionParameter.window_log: 27}
    packer = zstd.ZstdCompressor(options=options)
    packed = packer.compress(text(CLUSTER)) + packer.flush()
    with pytest.raises(BlockError, match="damaged compressed cluster"):
        codec.unzstd_blocking(packed, CLUSTER)


def test_a_cluster_of_empty_frames_takes_no_time():
    empty = zstd.compress(b"")
    with pytest.raises(BlockError, match="too short"):
        codec.unzstd_blocking(empty * ((4 << 20) // len(empty)), 2 << 20)


@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
def test_descriptors(cluster_bits, seed):
    rnd = random.Random(seed)
    cluster_size = 1 << cluster_bits
    for _ in range(200):
        length = rnd.randrange(1, cluster_size)
        end = rnd.choice((max_compressed_offset(cluster_bits), 1 << 40))
        offset = rnd.randrange(end - length + 1)
        entry = compressed_entry(offset, length, cluster_bits)
        assert entry & OFLAG_COMPRESSED
        assert not entry & OFLAG_COPIED
        start, covered = compressed_range(entry, cluster_bits)
        assert start == offset
        assert length <= covered < length + 512
        assert (start + covered) % 512 == 0


@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
def test_many_descriptors(cluster_bits, seed):
    rnd = random.Random(seed)
    entries = [OFLAG_COMPRESSED | rnd.getrandbits(62) for _ in range(200)]
    starts, ends = compressed_ranges(np.array(entries, np.uint64), cluster_bits)
    for entry, start, end in zip(entries, starts, ends, strict=True):
        offset, length = compressed_range(entry, cluster_bits)
        assert (start, end) == (offset, offset + length)

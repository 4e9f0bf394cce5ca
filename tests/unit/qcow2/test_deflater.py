"""zlib-ng with settings of our own: right, as short as QEMU's, in every thread."""

import os
import random
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from nbdqcow.formats.qcow2.deflater import deflate_blocking

CLUSTER = 65536
REPOSITORY = Path(__file__).resolve().parents[3]


def inflate(packed):
    decoder = zlib.decompressobj(-12)
    plain = decoder.decompress(packed)
    assert decoder.eof
    assert not decoder.unused_data
    return plain


def zlib_length(data):
    """How long QEMU makes it."""
    packer = zlib.compressobj(6, zlib.DEFLATED, -12, 9)
    return len(packer.compress(data) + packer.flush())


def texts():
    return b"".join(
        path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py"))
    )


def program():
    libraries = Path(np.__file__).parent.rglob("*.so")
    return max(map(Path.read_bytes, libraries), key=len)


@pytest.mark.parametrize("content", [texts, program])
def test_as_short_as_with_zlib(content):
    data = content()[: 2 << 20]
    clusters = [data[i : i + CLUSTER] for i in range(0, len(data), CLUSTER)]
    ours = 0
    for cluster in clusters:
        packed = deflate_blocking(cluster)
        assert inflate(packed) == cluster
        ours += len(packed)
    assert ours < 1.015 * sum(map(zlib_length, clusters))


@pytest.mark.parametrize("length", [0, 1, 511, 512, 1023, CLUSTER, 3 << 20])
def test_noise(length, seed):
    data = random.Random(seed).randbytes(length)
    packed = deflate_blocking(data)
    assert inflate(packed) == data
    assert len(packed) < length + 64 + length // 200


def test_text_behind_noise_is_compressed(seed):
    data = random.Random(seed).randbytes(2048) + bytes(CLUSTER - 2048)
    packed = deflate_blocking(data)
    assert inflate(packed) == data
    assert len(packed) < 2500


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer(kind):
    assert inflate(deflate_blocking(kind(b"abc" * 9000))) == b"abc" * 9000


def test_short_ones_after_long_ones_in_several_threads(seed):
    def work(number):
        rnd = random.Random(seed + number)
        for _ in range(60):
            length = rnd.choice([1, 512, 4096, CLUSTER, 1 << 20])
            alphabet = rnd.choice(
                [b"ab", b"\0\1\2", b"etaoin shrdlu", bytes(range(256))]
            )
            data = bytes(rnd.choices(alphabet, k=1024)) * (-(-length // 1024))
            assert inflate(deflate_blocking(data[:length])) == data[:length]

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(6)))


def test_threads_give_their_memory_back():
    """Of 600 threads' streams there is nothing left, and that would be 300 MiB."""
    program = """
import resource, threading
from nbdqcow.formats.qcow2.deflater import deflate_blocking

def work():
    deflate_blocking(b"text" * 4000)
    deflate_blocking(b"data\\0" * 4000)

def peak():
    for _ in range(300):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak()
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 20_000


@pytest.mark.parametrize(
    "change",
    [
        "sys.modules['zlib_ng'] = None",
        # Another library's file has none of its functions.
        "import zlib_ng.zlib_ng as z, _ctypes; z.__file__ = _ctypes.__file__",
    ],
)
def test_without_the_functions_zlib_does_it(change):
    program = f"""
import sys
{change}
from nbdqcow.formats.qcow2 import codec
assert codec.deflater is None
data = b"abc" * 9000
assert codec.inflate_blocking(codec.deflate_blocking(data), len(data)) == data
"""
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)

"""The images that the cells run on, kept in one directory between runs."""

import contextlib
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.cells import GiB, KiB, MiB
from bench.peers import BenchError

FULL_SIZE = GiB
HUGE_SIZE = 1024 * GiB
COMPRESSED_SIZE = 256 * MiB
_SOURCES = (Path("/usr/lib"), Path("/usr/share"))
_CLUSTER_SIZE = 64 * KiB
_COPIED = 1 << 63


def qemu_img(*words: str | Path) -> None:
    """Run qemu-img; its own message becomes the error."""
    try:
        subprocess.run(
            ["qemu-img", *map(str, words)], check=True, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise BenchError("qemu-img is needed to make the images") from None
    except subprocess.CalledProcessError as error:
        raise BenchError(error.stderr.strip().splitlines()[-1]) from None


def full_raw(directory: Path) -> Path:
    """Return a raw file of random data."""
    path = directory / "full.raw"
    if not path.exists() or path.stat().st_size != FULL_SIZE:
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            for _ in range(FULL_SIZE // MiB):
                file.write(os.urandom(MiB))
            os.fsync(file.fileno())
        partial.rename(path)
    return path


def full_qcow2(directory: Path) -> Path:
    """Return a qcow2 image with the data of `full_raw`, all allocated."""
    path = directory / "full.qcow2"
    if not path.exists():
        partial = path.with_suffix(".partial")
        source = full_raw(directory)
        qemu_img("convert", "-f", "raw", "-O", "qcow2", source, partial)
        partial.rename(path)
    return path


def luks_qcow2(directory: Path) -> Path:
    """Return a qcow2 image with the data of `full_raw`, encrypted; the
    passphrase is in `secret_file`."""
    path = directory / "luks.qcow2"
    if not path.exists():
        partial = path.with_suffix(".partial")
        secret = f"secret,id=s,file={secret_file(directory)}"
        options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=100"
        words = ["create", "-q", "-f", "qcow2", "--object", secret, "-o", options]
        # With ours: QEMU can't measure its time on every machine.
        command = [sys.executable, "-m", "nbdqcow.cli.img", *words]
        subprocess.run([*command, partial, str(FULL_SIZE)], check=True)
        target = f"driver=qcow2,file.filename={partial},encrypt.key-secret=s"
        words = ["convert", "-n", "--object", secret, "-f", "raw"]
        qemu_img(*words, full_raw(directory), "--target-image-opts", target)
        partial.rename(path)
    return path


def full_qcow1(directory: Path) -> Path:
    """Return a qcow image, version 1, with the data of `full_raw`."""
    path = directory / "full.qcow"
    if not path.exists():
        partial = path.with_suffix(".partial")
        source = full_raw(directory)
        qemu_img("convert", "-f", "raw", "-O", "qcow", source, partial)
        partial.rename(path)
    return path


def secret_file(directory: Path) -> Path:
    """Return a file with the passphrase of `luks_qcow2`."""
    path = directory / "secret"
    path.write_text("passphrase")
    return path


def fresh_empty(directory: Path) -> Path:
    """Return an image without a single data cluster."""
    path = directory / "empty.qcow2"
    path.unlink(missing_ok=True)
    qemu_img("create", "-q", "-f", "qcow2", path, str(4 * FULL_SIZE))
    return path


def fresh_subclusters(directory: Path) -> Path:
    """Return an image with extended L2 entries and no data cluster."""
    path = directory / "subclusters.qcow2"
    path.unlink(missing_ok=True)
    options = ("-o", "extended_l2=on")
    qemu_img("create", "-q", "-f", "qcow2", *options, path, str(4 * FULL_SIZE))
    return path


def fresh_overlay(directory: Path) -> Path:
    """Return an empty overlay over `full_qcow2`."""
    path = directory / "overlay.qcow2"
    path.unlink(missing_ok=True)
    backing = full_qcow2(directory)
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing, path)
    return path


def huge_qcow2(directory: Path) -> Path:
    """Return a 1 TiB image with every cluster mapped."""
    return _huge_qcow2(directory / "huge.qcow2", 1)


def fragmented_qcow2(directory: Path) -> Path:
    """Return a 1 TiB image with every second cluster mapped."""
    return _huge_qcow2(directory / "fragmented.qcow2", 2)


def compressed_qcow2(directory: Path, compression_type: str) -> Path:
    """Return an image of compressed clusters: what this machine's files hold."""
    path = directory / f"{compression_type}.qcow2"
    if not path.exists():
        source, partial = directory / "files.raw", path.with_suffix(".partial")
        with source.open("wb") as file:
            for content in _file_contents():
                file.write(content[: COMPRESSED_SIZE - file.tell()])
                if file.tell() == COMPRESSED_SIZE:
                    break
            else:
                raise BenchError("this machine has too few files to make an image of")
        option = f"compression_type={compression_type}"
        words = ("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", option)
        qemu_img(*words, source, partial)
        source.unlink()
        partial.rename(path)
    return path


def _file_contents() -> Iterator[bytes]:
    """Yield the content of programs, libraries and texts, in a fixed order."""
    for top in _SOURCES:
        for directory, names, files in os.walk(top):
            names.sort()
            for name in sorted(files):
                path = Path(directory, name)
                if path.is_file() and not path.is_symlink():
                    with contextlib.suppress(PermissionError):
                        yield path.read_bytes()


def _huge_qcow2(path: Path, stride: int) -> Path:
    """Return a 1 TiB image with one of ``stride`` clusters mapped.

    Only the metadata is written, straight into a sparse file; data clusters
    are holes, in guest order behind it. qcow2.txt "Header", "Host cluster
    management", "Cluster mapping".
    """
    if path.exists():
        return path
    l2_entries = _CLUSTER_SIZE // 8
    nb_l2 = HUGE_SIZE // _CLUSTER_SIZE // l2_entries
    nb_data = HUGE_SIZE // _CLUSTER_SIZE // stride
    refcounts_each = _CLUSTER_SIZE // 2
    # Header, refcount table and L1 table take one cluster each.
    nb_blocks = 0
    while nb_blocks * refcounts_each < 3 + nb_blocks + nb_l2 + nb_data:
        nb_blocks += 1
    blocks_at, l1_at = 2, 2 + nb_blocks
    l2_at = l1_at + 1
    data_at = l2_at + nb_l2
    nb_clusters = data_at + nb_data
    assert nb_blocks <= l2_entries
    assert nb_l2 <= l2_entries

    def table(first_cluster: int, count: int, flags: int) -> bytes:
        clusters = np.arange(first_cluster, first_cluster + count, dtype=np.uint64)
        entries = clusters * np.uint64(_CLUSTER_SIZE) | np.uint64(flags)
        return entries.astype(">u8").tobytes()

    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        b"QFI\xfb",
        3,
        0,
        0,
        _CLUSTER_SIZE.bit_length() - 1,
        HUGE_SIZE,
        0,
        nb_l2,
        l1_at * _CLUSTER_SIZE,
        1 * _CLUSTER_SIZE,
        1,
        0,
        0,
        0,
        0,
        0,
        4,
        104,
    )
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(header)
        file.seek(1 * _CLUSTER_SIZE)
        file.write(table(blocks_at, nb_blocks, 0))
        file.seek(blocks_at * _CLUSTER_SIZE)
        refcounts = np.zeros(nb_blocks * refcounts_each, dtype=">u2")
        refcounts[:nb_clusters] = 1
        file.write(refcounts.tobytes())
        file.seek(l1_at * _CLUSTER_SIZE)
        file.write(table(l2_at, nb_l2, _COPIED))
        for index in range(nb_l2):
            file.seek((l2_at + index) * _CLUSTER_SIZE)
            nb_mapped = l2_entries // stride
            mapped = table(data_at + index * nb_mapped, nb_mapped, _COPIED)
            entries = np.zeros(l2_entries, ">u8")
            entries[::stride] = np.frombuffer(mapped, ">u8")
            file.write(entries.tobytes())
        file.truncate(nb_clusters * _CLUSTER_SIZE)
        os.fsync(file.fileno())
    partial.rename(path)
    return path


def warm_up(path: Path) -> None:
    """Bring a file into the page cache."""
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(MiB)
        while file.readinto(buffer):
            pass


def write_back(path: Path) -> None:
    """Wait until a file has no dirty pages: one run's are not the next one's."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

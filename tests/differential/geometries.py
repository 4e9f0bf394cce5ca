"""The images that random operations run on, all made by qemu-img."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.differential.model import Bytes
from tests.serving import run

KiB, MiB = 1 << 10, 1 << 20


@dataclass(frozen=True, slots=True)
class Layer:
    """One backing file: its format, size in bytes and share of data in it."""

    size: int
    image_format: str = "qcow2"
    cluster_size: int = 64 * KiB
    filled: float = 0.6
    extended_l2: bool = False


@dataclass(frozen=True, slots=True)
class Geometry:
    """One image: ``backing`` from the top down, None of it if empty.

    ``filled`` is the share of an image without backing that has data when it
    is made; ``compressed`` stores that data in compressed clusters.
    ``extended_l2`` gives it subclusters, ``preallocation`` is qemu-img's, and
    ``more`` are further options of it; ``{here}`` is the image's directory.
    """

    name: str
    size: int
    image_format: str = "qcow2"
    cluster_size: int = 64 * KiB
    version: int = 3
    backing: tuple[Layer, ...] = ()
    filled: float = 0.0
    compressed: bool = False
    nb_connections: int = 2
    extended_l2: bool = False
    preallocation: str = "off"
    more: str = ""

    def __str__(self) -> str:
        return self.name


GEOMETRIES = (
    Geometry("v3-512", 3 * MiB + 3 * 512, cluster_size=512),
    Geometry("v3-4k", 5 * MiB + 512, cluster_size=4 * KiB, nb_connections=3),
    Geometry("v3-64k", 8 * MiB + 7 * 512),
    Geometry("v3-2m", 15 * MiB + 512, cluster_size=2 * MiB),
    Geometry("v2-512", 2 * MiB, cluster_size=512, version=2),
    Geometry("v2-64k", 6 * MiB + 512, version=2),
    Geometry("v3-filled", 8 * MiB, filled=0.7),
    Geometry("v3-compressed", 6 * MiB + 512, filled=0.8, compressed=True),
    Geometry(
        "v2-4k-compressed",
        3 * MiB,
        cluster_size=4 * KiB,
        version=2,
        filled=0.8,
        compressed=True,
    ),
    Geometry(
        "overlay-on-short-raw",
        8 * MiB + 512,
        backing=(Layer(5 * MiB + 1536, "raw"),),
    ),
    Geometry(
        "overlay-on-odd-raw",
        4 * MiB,
        cluster_size=4 * KiB,
        backing=(Layer(2 * MiB + 513, "raw"),),
    ),
    Geometry(
        "v2-overlay-on-qcow2",
        5 * MiB + 512,
        version=2,
        backing=(Layer(5 * MiB + 512, cluster_size=4 * KiB),),
    ),
    Geometry(
        "overlay-on-long-qcow2",
        4 * MiB + 512,
        cluster_size=512,
        backing=(Layer(7 * MiB),),
        nb_connections=3,
    ),
    Geometry(
        "three-levels",
        6 * MiB + 1024,
        cluster_size=4 * KiB,
        backing=(
            Layer(4 * MiB + 512, cluster_size=64 * KiB, filled=0.3),
            Layer(5 * MiB, "raw"),
        ),
    ),
    Geometry(
        "2m-over-512",
        13 * MiB,
        cluster_size=2 * MiB,
        backing=(Layer(9 * MiB + 512, cluster_size=512),),
    ),
    Geometry("subclusters-16k", 3 * MiB + 512, cluster_size=16 * KiB, extended_l2=True),
    Geometry(
        "subclusters-overlay",
        5 * MiB + 512,
        extended_l2=True,
        backing=(Layer(4 * MiB + 1536, cluster_size=16 * KiB, extended_l2=True),),
        nb_connections=3,
    ),
    Geometry(
        "subclusters-2m-on-raw",
        13 * MiB + 512,
        cluster_size=2 * MiB,
        extended_l2=True,
        backing=(Layer(9 * MiB + 512, "raw"),),
    ),
    Geometry(
        "subclusters-compressed",
        6 * MiB + 512,
        filled=0.8,
        compressed=True,
        extended_l2=True,
    ),
    Geometry(
        "subclusters-preallocated",
        5 * MiB,
        cluster_size=128 * KiB,
        extended_l2=True,
        preallocation="metadata",
        backing=(Layer(6 * MiB, "raw"),),
    ),
    Geometry("data-file", 4 * MiB + 512, more="data_file={here}/data"),
    Geometry(
        "data-file-subclusters",
        3 * MiB,
        extended_l2=True,
        backing=(Layer(2 * MiB + 512, cluster_size=4 * KiB),),
        more="data_file={here}/data",
        nb_connections=3,
    ),
    Geometry(
        "qcow-4k",
        3 * MiB,
        "qcow",
        cluster_size=4 * KiB,
        filled=0.4,
        compressed=True,
    ),
    Geometry(
        "qcow-overlay",
        3 * MiB,
        "qcow",
        cluster_size=512,
        backing=(Layer(2 * MiB + 512, "raw"),),
        nb_connections=3,
    ),
    Geometry(
        "qcow2-over-qcow",
        4 * MiB + 512,
        backing=(Layer(3 * MiB + 1024, "qcow", cluster_size=4 * KiB),),
    ),
    Geometry("raw", 4 * MiB, "raw", cluster_size=4 * KiB, filled=0.5),
    Geometry("raw-odd", MiB + 1, "raw", cluster_size=4 * KiB),
)


def random_content(source: random.Random, size: int, filled: float) -> Bytes:
    """Return ``size`` bytes with data of random kinds in runs between zeroes.

    Some of the data compresses well, some does not.
    """
    content = np.zeros(size, dtype=np.uint8)
    offset = 0
    while offset < size:
        length = min(source.randint(1, 96) * 4 * KiB, size - offset)
        if source.random() < filled:
            if source.random() < 0.5:
                data = source.randbytes(length)
            else:
                word = source.randbytes(source.randint(1, 64))
                data = (word * (length // len(word) + 1))[:length]
            content[offset : offset + length] = np.frombuffer(data, dtype=np.uint8)
        offset += length
    return content


def _write_sparse(path: Path, content: Bytes) -> None:
    """Write a raw file, with holes where whole 4 KiB blocks are zero."""
    with path.open("wb") as file:
        for offset in range(0, len(content), 4 * KiB):
            block = content[offset : offset + 4 * KiB]
            if block.any():
                file.seek(offset)
                file.write(block.tobytes())
        file.truncate(len(content))


def _options(
    image_format: str,
    cluster_size: int,
    version: int,
    *,
    extended_l2: bool,
    preallocation: str = "off",
    more: str = "",
) -> list[str]:
    if image_format != "qcow2":
        return []
    options = f"compat={'0.10' if version == 2 else '1.1'},cluster_size={cluster_size}"
    if extended_l2:
        options += ",extended_l2=on"
    return ["-o", f"{options},preallocation={preallocation}{more and ',' + more}"]


def _create(
    path: Path,
    size: int,
    image_format: str,
    cluster_size: int,
    version: int,
    backing: tuple[Path, str] | None,
    *,
    extended_l2: bool = False,
    preallocation: str = "off",
    more: str = "",
) -> None:
    command = ["qemu-img", "create", "-q", "-f", image_format]
    command += _options(
        image_format,
        cluster_size,
        version,
        extended_l2=extended_l2,
        preallocation=preallocation,
        more=more,
    )
    if backing is not None:
        command += ["-b", str(backing[0]), "-F", backing[1]]
    run(*command, path, str(size))


def _convert(source: Path, target: Path, geometry: Geometry) -> None:
    image_format = geometry.image_format
    run(
        *("qemu-img", "convert", "-f", "raw", "-O", image_format),
        *(["-c"] if geometry.compressed else []),
        *_options(
            image_format,
            geometry.cluster_size,
            geometry.version,
            extended_l2=geometry.extended_l2,
            more=geometry.more.format(here=target.parent),
        ),
        *(source, target),
        # QEMU 7.2 ends with a write of no bytes, which its qcow driver takes
        # for an error: the image is whole, and compared later.
        check=not (image_format == "qcow" and geometry.compressed),
    )


def _fill_overlay(source: random.Random, path: Path, layer: Layer) -> None:
    """Write some runs into an overlay through qemu-io."""
    commands: list[str] = []
    offset = 0
    while offset < layer.size:
        length = min(512 * source.randint(1, 512), layer.size - offset)
        length -= length % 512
        if length and source.random() < layer.filled:
            pattern = source.randint(0, 255)
            verb = f"write -P {pattern}" if pattern > 50 else "write -z"
            commands += ["-c", f"{verb} {offset} {length}"]
        offset += max(length, 512)
    if commands:
        run("qemu-io", "-f", layer.image_format, *commands, path)


def build(geometry: Geometry, directory: Path, source: random.Random) -> Path:
    """Make the image and its backing files; return the top one's path."""
    below: tuple[Path, str] | None = None
    for index, layer in enumerate(reversed(geometry.backing)):
        path = directory / f"base{index}.{layer.image_format}"
        content = random_content(source, layer.size, layer.filled)
        if layer.image_format == "raw":
            _write_sparse(path, content)
        else:
            _create(
                *(path, layer.size, layer.image_format, layer.cluster_size, 3, below),
                extended_l2=layer.extended_l2,
            )
            _fill_overlay(source, path, layer)
        below = (path, layer.image_format)
    image = directory / f"disk.{geometry.image_format}"
    content = random_content(source, geometry.size, geometry.filled)
    if geometry.image_format == "raw":
        _write_sparse(image, content)
    elif geometry.filled:
        flat = directory / "flat.raw"
        _write_sparse(flat, content)
        _convert(flat, image, geometry)
    else:
        _create(
            image,
            geometry.size,
            geometry.image_format,
            geometry.cluster_size,
            geometry.version,
            below,
            extended_l2=geometry.extended_l2,
            preallocation=geometry.preallocation,
            more=geometry.more.format(here=directory),
        )
    return image


def content_by_qemu(image: Path, geometry: Geometry, directory: Path) -> Bytes:
    """Return the guest's content of the image as QEMU reads it."""
    if geometry.image_format == "raw":
        return np.fromfile(image, dtype=np.uint8)
    flat = directory / "content.raw"
    image_format = geometry.image_format
    run("qemu-img", "convert", "-f", image_format, "-O", "raw", image, flat)
    content = np.fromfile(flat, dtype=np.uint8)
    flat.unlink()
    return content

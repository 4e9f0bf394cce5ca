"""Block status of the same images through our server and through qemu-nbd."""

import contextlib
import json
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.interop.img_versions import text_as_7_2_says
from tests.serving import REFERENCE, need, run, serving

pytestmark = pytest.mark.skipif(REFERENCE, reason="qemu-nbd is the reference here")
MiB = 1 << 20


def create(path: Path, size: int, *options: str, base: Path | None = None) -> Path:
    backing = ["-b", base, "-F", "qcow2"] if base else []
    words = [word for option in options for word in ("-o", option)]
    run("qemu-img", "create", "-q", "-f", "qcow2", *words, *backing, path, str(size))
    return path


def qemu_io(path: Path, *commands: str, image_format: str = "qcow2") -> None:
    words = [word for command in commands for word in ("-c", command)]
    run("qemu-io", "-f", image_format, *words, path)


def random_writes(path: Path, size: int, seed: int, verbs: list[str]) -> None:
    source = random.Random(seed)
    commands = []
    for _ in range(40):
        start = source.randrange(0, size - MiB, 512)
        length = source.randrange(512, MiB, 512)
        commands.append(f"{source.choice(verbs)} {start} {length}")
    qemu_io(path, *commands)


def chain(tmp_path: Path, seed: int, *options: str) -> Path:
    """Three images, the middle one shorter and the top one longer."""
    base = None
    for level, size in enumerate((40 * MiB, 30 * MiB, 50 * MiB)):
        path = create(tmp_path / f"{level}.qcow2", size, *options, base=base)
        random_writes(
            path, size, seed + level, ["write -P 7", "write -z", "write -zu", "discard"]
        )
        base = path
    assert base is not None
    return base


def version_2(tmp_path: Path, seed: int) -> Path:
    path = create(tmp_path / "v2.qcow2", 30 * MiB, "compat=0.10")
    random_writes(path, 30 * MiB, seed, ["write -P 7", "discard"])
    return path


def compressed(tmp_path: Path, seed: int) -> Path:
    raw, path = tmp_path / "source.raw", tmp_path / "compressed.qcow2"
    source = random.Random(seed)
    with raw.open("wb") as file:
        for index in range(20):
            file.seek(index * MiB)
            file.write(bytes([source.randrange(256)]) * source.randrange(1, MiB))
        file.truncate(20 * MiB)
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, path)
    # Whole clusters: where the file is short of data, QEMU takes the image for
    # preallocated, and the rest of a cluster for a hole of the file.
    qemu_io(path, "write -P 9 3M 128k", "write -z 5M 1M")
    return path


def sparse_raw(tmp_path: Path, seed: int) -> Path:
    path = tmp_path / "sparse.raw"
    source = random.Random(seed)
    with path.open("wb") as file:
        for _ in range(20):
            file.seek(source.randrange(0, 19 * MiB, 65536))
            file.write(b"x" * source.randrange(1, MiB))
        file.truncate(20 * MiB + 512)
    return path


IMAGES: dict[str, tuple[str, Callable[[Path, int], Path]]] = {
    "chain": ("qcow2", chain),
    "chain-512": ("qcow2", lambda path, seed: chain(path, seed, "cluster_size=512")),
    "chain-2M": ("qcow2", lambda path, seed: chain(path, seed, "cluster_size=2M")),
    "v2": ("qcow2", version_2),
    "compressed": ("qcow2", compressed),
    "empty": ("qcow2", lambda path, seed: create(path / "empty.qcow2", 1 << 40)),
    "raw": ("raw", sparse_raw),
}


@contextlib.contextmanager
def qemu_nbd(image: Path, image_format: str) -> Iterator[str]:
    """Serve by qemu-nbd; yields the URI."""
    with tempfile.TemporaryDirectory(prefix="nbdq-") as directory:
        socket = Path(directory) / "s"
        command = ["qemu-nbd", "-r", "-t", "-A", "-e", "4", "-f", image_format]
        process = subprocess.Popen([*command, "-k", socket, image])
        try:
            deadline = time.monotonic() + 20
            uri = f"nbd+unix:///?socket={socket}"
            while run("nbdinfo", "--size", uri, check=False).returncode:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield uri
        finally:
            process.terminate()
            process.wait(20)


def merged(listing: str) -> list[tuple[int, int, str]]:
    """Return start, length and type of extents, neighbours of a kind joined:
    what one server tells in two replies, another may in one."""
    found: list[tuple[int, int, str]] = []
    for extent in json.loads(listing):
        start, length, kind = extent["offset"], extent["length"], extent["description"]
        if found and found[-1][2] == kind:
            found[-1] = (found[-1][0], found[-1][1] + length, kind)
        else:
            found.append((start, length, kind))
    return found


@pytest.mark.parametrize("name", IMAGES)
def test_maps_are_those_of_qemu_nbd(
    tmp_path: Path,
    seed: int,
    newer_clients: Callable[..., list[str]],
    name: str,
) -> None:
    need("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")
    image_format, make = IMAGES[name]
    image = make(tmp_path, seed)
    with (
        serving(image, image_format=image_format, read_only=True) as server,
        qemu_nbd(image, image_format) as reference,
    ):
        for option in ("--map", "--map=qemu:allocation-depth"):
            words = ("nbdinfo", option, "--json")
            theirs = merged(run(*words, reference).stdout)
            assert merged(run(*words, server.uri).stdout) == theirs
            # The same with 64-bit lengths.
            assert merged(run(*newer_clients(*words, server.uri)).stdout) == theirs
        words = ("qemu-img", "map", "--output=json")
        theirs = json.loads(text_as_7_2_says(run(*words, reference).stdout))
        said = text_as_7_2_says(run(*words, server.uri).stdout)
        assert json.loads(said) == theirs
        newer = json.loads(run(*newer_clients(*words, server.uri)).stdout)
        for extent in newer:
            extent.pop("compressed")
        assert newer == theirs


def test_a_map_of_16_tib_is_made_at_once(
    tmp_path: Path, newer_clients: Callable[..., list[str]]
) -> None:
    need("qemu-img", "nbdinfo")
    path = create(tmp_path / "huge.qcow2", 16 << 40)
    qemu_io(path, "write 8T 64k")
    wanted = [
        (0, 8 << 40, "hole,zero"),
        (8 << 40, 65536, "data"),
        ((8 << 40) + 65536, (8 << 40) - 65536, "hole,zero"),
    ]
    with serving(path, read_only=True) as server:
        words = ("nbdinfo", "--map", "--json", server.uri)
        assert merged(run(*words).stdout) == wanted
        done = run(*newer_clients(*words))
        # No extent was cut at 4 GiB.
        assert len(json.loads(done.stdout)) == 3
        assert merged(done.stdout) == wanted


def test_a_sparse_image_is_copied_as_one(tmp_path: Path, seed: int) -> None:
    need("nbdcopy", "qemu-img")
    image = chain(tmp_path, seed)
    copy, reference = tmp_path / "copy.raw", tmp_path / "reference.raw"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, reference)
    with serving(image, read_only=True) as server:
        run("nbdcopy", server.uri, copy)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", copy, reference)
    assert os.stat(copy).st_blocks <= os.stat(reference).st_blocks + 4096

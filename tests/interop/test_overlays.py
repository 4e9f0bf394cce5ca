"""Images that we made and wrote, read by QEMU; and chains of three levels."""

import random
from pathlib import Path

import numpy as np
import pytest

from tests.differential.model import Bytes
from tests.nbd_client import NbdClient
from tests.serving import check_image, compare_images, nbdqcow_img, need, run, serving

KiB, MiB = 1 << 10, 1 << 20

CLUSTER_SIZES = (512, 4 * KiB, 64 * KiB, 2 * MiB)
COMPAT = {2: "0.10", 3: "1.1"}


def write_randomly(
    source: random.Random, image: Path, model: Bytes, nb_writes: int, clusters: int
) -> None:
    """Write through our server at unaligned places, some of it zeroes."""
    with serving(image) as server, NbdClient(server.socket) as client:
        assert client.size == len(model)
        for _ in range(nb_writes):
            length = source.randint(1, min(3 * clusters, 300 * KiB))
            offset = source.randrange(len(model) - length)
            if source.random() < 0.2:
                client.write_zeroes(offset, length)
                model[offset : offset + length] = 0
            else:
                data = source.randbytes(length)
                client.write(offset, data)
                model[offset : offset + length] = np.frombuffer(data, np.uint8)
        for offset in range(0, len(model), MiB):
            length = min(MiB, len(model) - offset)
            expected = model[offset : offset + length].tobytes()
            assert client.read(offset, length) == expected, hex(offset)
        client.disconnect()


def check_by_qemu(image: Path, model: Bytes, directory: Path) -> None:
    """QEMU finds the image clean, and in it what the model holds."""
    expected = directory / "expected.raw"
    model.tofile(expected)
    check_image(image)
    compare_images(expected, image, second_format="qcow2")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
def test_our_images_written_by_us_are_read_by_qemu(
    cluster_size: int, version: int, tmp_path: Path, seed: int
) -> None:
    """Three levels, each made by our tool and written through our server."""
    need("qemu-img")
    source = random.Random(seed)
    sizes = (3 * MiB + 512, 5 * MiB + 1024, 4 * MiB + 512)
    model = np.zeros(0, dtype=np.uint8)
    below: Path | None = None
    for level, size in enumerate(sizes):
        image = tmp_path / f"level{level}.qcow2"
        backing = ["-b", str(below), "-F", "qcow2"] if below else []
        options = f"compat={COMPAT[version]},cluster_size={cluster_size}"
        nbdqcow_img(
            *("create", "-q", "-f", "qcow2", "-o", options, *backing),
            *(image, str(size)),
        )
        check_image(image)
        # A shorter backing file reads as zeroes behind its end.
        above = np.zeros(size, dtype=np.uint8)
        above[: len(model)] = model[:size]
        model = above
        write_randomly(source, image, model, 30, cluster_size)
        check_by_qemu(image, model, tmp_path)
        below = image
    # Nobody wrote into a backing file.
    for level in range(2):
        check_image(tmp_path / f"level{level}.qcow2")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
def test_chains_made_by_qemu_with_mixed_cluster_sizes(
    cluster_size: int, version: int, tmp_path: Path, seed: int
) -> None:
    """The level that we write has another cluster size than those below."""
    need("qemu-img", "qemu-io")
    source = random.Random(seed)
    base, middle, top = (tmp_path / f"{n}.qcow2" for n in ("base", "middle", "top"))
    size = 6 * MiB + 512
    run("qemu-img", "create", "-q", "-f", "qcow2", base, str(size))
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 1 0 {size}", base)
    run(
        *("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"),
        *("-b", base.name, "-F", "qcow2", middle, "4M"),
    )
    run(
        *("qemu-io", "-f", "qcow2", "-c", "write -P 2 1M 777k"),
        *("-c", "write -z 3M 300k", middle),
    )
    run(
        *("qemu-img", "create", "-q", "-f", "qcow2", "-o"),
        f"compat={COMPAT[version]},cluster_size={cluster_size}",
        *("-b", middle.name, "-F", "qcow2", top, str(size)),
    )
    model = np.zeros(size, dtype=np.uint8)
    model[: 4 * MiB] = 1
    model[MiB : MiB + 777 * KiB] = 2
    model[3 * MiB : 3 * MiB + 300 * KiB] = 0
    before = base.read_bytes(), middle.read_bytes()
    write_randomly(source, top, model, 40, cluster_size)
    check_by_qemu(top, model, tmp_path)
    assert (base.read_bytes(), middle.read_bytes()) == before


def test_our_check_agrees_with_qemu_on_a_written_image(
    tmp_path: Path, seed: int
) -> None:
    need("qemu-img")
    image = tmp_path / "a.qcow2"
    nbdqcow_img("create", "-q", "-f", "qcow2", image, "8M")
    model = np.zeros(8 * MiB, dtype=np.uint8)
    write_randomly(random.Random(seed), image, model, 50, 64 * KiB)
    ours = nbdqcow_img("check", image).stdout
    theirs = run("qemu-img", "check", image).stdout
    assert ours.splitlines()[0] == theirs.splitlines()[0]

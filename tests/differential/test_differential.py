"""Random operations over NBD, every answer compared with a model.

``NBDQCOW_SEED`` repeats a run, ``NBDQCOW_OPERATIONS`` (in `make
differential-long`: ``NBDQCOW_LONG_OPERATIONS``) is the number for each geometry,
``NBDQCOW_DEPTH`` the requests in flight: depth 1 repeats exactly.
"""

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import qcow1_image
from tests.differential.geometries import (
    GEOMETRIES,
    Geometry,
    build,
    content_by_qemu,
)
from tests.differential.model import DiskModel
from tests.differential.operations import Generator, Weights
from tests.differential.runner import NbdTarget, Record, Runner
from tests.nbd_client import NbdClient
from tests.serving import (
    REFERENCE,
    Server,
    check_image,
    compare_images,
    need,
    run,
    serving,
)

NB_OPERATIONS = int(os.environ.get("NBDQCOW_OPERATIONS", "1200"))
NB_CRASH_OPERATIONS = int(os.environ.get("NBDQCOW_CRASH_OPERATIONS", "300"))
NB_LONG_OPERATIONS = int(os.environ.get("NBDQCOW_LONG_OPERATIONS", "30000"))
DEPTH = int(os.environ.get("NBDQCOW_DEPTH", "10"))
ROUND_OPERATIONS = 400
# QEMU 7.2 may hand a cluster out again that was freed while a request on it was
# in flight, which these tests find as wrong data or a broken refcount.
WEIGHTS = Weights(trim=0, zero=0) if REFERENCE and DEPTH > 1 else Weights()


@contextlib.contextmanager
def connected(server: Server, nb_connections: int) -> Iterator[list[NbdClient]]:
    """Connect several clients; half of them say goodbye at the end."""
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(NbdClient(server.socket)) for _ in range(nb_connections)
        ]
        yield clients
        for client in clients[::2]:
            client.disconnect()


def check_and_compare(image: Path, geometry: Geometry, model: DiskModel) -> None:
    """Let QEMU look at a closed image."""
    if geometry.image_format == "raw":
        assert image.read_bytes() == model.base.tobytes()
        return
    if geometry.image_format == "qcow":
        qcow1_image.check(image)
    else:
        check_image(image)
    expected = image.with_suffix(".expected")
    model.base.tofile(expected)
    compare_images(expected, image, second_format=geometry.image_format)


def run_rounds(
    geometry: Geometry, tmp_path: Path, seed: int, nb_operations: int
) -> None:
    """Run the operations on one image, which QEMU checks after each round."""
    need("qemu-img", "qemu-io")
    if REFERENCE and geometry.size % 512:
        pytest.skip("qemu-nbd 7.2 rounds the size of a raw image up to 512")
    source = random.Random(seed)
    image = build(geometry, tmp_path, source)
    model = DiskModel(content_by_qemu(image, geometry, tmp_path))
    history: list[Record] = []
    for round_index in range(max(1, nb_operations // ROUND_OPERATIONS)):
        with (
            serving(image, image_format=geometry.image_format) as server,
            connected(server, geometry.nb_connections) as clients,
        ):
            assert clients[0].size == model.size
            runner = Runner(
                NbdTarget(clients, source),
                model,
                Generator(source, model.size, geometry.cluster_size, WEIGHTS),
                source,
                DEPTH,
                overlap=(0.0, 0.3, 1.0)[round_index % 3],
                history=history,
            )
            runner.run(min(nb_operations, ROUND_OPERATIONS))
            if round_index % 3 == 0:
                runner.verify_all()
            else:
                runner.settle()
        check_and_compare(image, geometry, model)


# The others have their turn in `test_node` and in the long runs.
QUICK_GEOMETRIES = tuple(
    geometry
    for geometry in GEOMETRIES
    if geometry.name
    not in (
        "subclusters-2m-on-raw",
        "subclusters-compressed",
        "subclusters-preallocated",
    )
)


@pytest.mark.parametrize("geometry", QUICK_GEOMETRIES, ids=str)
def test_random_operations(geometry: Geometry, tmp_path: Path, seed: int) -> None:
    run_rounds(geometry, tmp_path, seed, NB_OPERATIONS)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_many_random_operations(geometry: Geometry, tmp_path: Path, seed: int) -> None:
    run_rounds(geometry, tmp_path, seed, NB_LONG_OPERATIONS)


CRASH_GEOMETRIES = tuple(
    geometry
    for geometry in GEOMETRIES
    if geometry.name
    in (
        *("v3-512", "v3-64k", "v2-4k-compressed", "three-levels", "subclusters-16k"),
        "raw",
    )
)


@pytest.mark.parametrize("geometry", CRASH_GEOMETRIES, ids=str)
def test_killed_server_keeps_what_was_flushed(
    geometry: Geometry, tmp_path: Path, seed: int
) -> None:
    """SIGKILL with requests in flight: flushed and FUA writes are there, any
    other byte holds one of its older or newer values, nothing is corrupt.

    qemu-nbd fails this now and then: it hands out a freed cluster before the
    table that freed it is on disk, so that old mappings show other data.
    """
    need("qemu-img", "qemu-io")
    source = random.Random(seed)
    image = build(geometry, tmp_path, source)
    model = DiskModel(content_by_qemu(image, geometry, tmp_path))
    history: list[Record] = []
    for _ in range(3):
        with (
            serving(image, image_format=geometry.image_format) as server,
            contextlib.ExitStack() as stack,
        ):
            clients = [
                stack.enter_context(NbdClient(server.socket))
                for _ in range(geometry.nb_connections)
            ]
            runner = Runner(
                NbdTarget(clients, source),
                model,
                Generator(
                    source,
                    model.size,
                    geometry.cluster_size,
                    Weights(read=10, write=60, zero=12, trim=10, flush=8, cache=0),
                ),
                source,
                DEPTH,
                crash_safe=True,
                history=history,
            )
            runner.start(NB_CRASH_OPERATIONS // 3)
            server.kill()
        model.crash()
        if geometry.image_format == "qcow2":
            check_image(image, leaks_allowed=True)
            run("qemu-img", "check", "-q", "-r", "leaks", image)
        with (
            serving(image, image_format=geometry.image_format) as server,
            connected(server, 1) as clients,
        ):
            generator = Generator(source, model.size, geometry.cluster_size)
            runner = Runner(
                NbdTarget(clients, source),
                model,
                generator,
                source,
                depth=1,
                history=history,
            )
            runner.settle()
            runner.verify_all()
        check_and_compare(image, geometry, model)

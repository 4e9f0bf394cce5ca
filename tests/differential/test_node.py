"""Random operations on a node in this process: denser than over a socket."""

import asyncio
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from nbdqcow import open_image
from nbdqcow.block.node import Node
from nbdqcow.storage.file import FileStorage
from tests import qcow1_image
from tests.differential.geometries import (
    GEOMETRIES,
    Geometry,
    build,
    content_by_qemu,
)
from tests.differential.model import DiskModel
from tests.differential.node_target import NodeTarget
from tests.differential.operations import Generator, Weights
from tests.differential.runner import Record, Runner
from tests.differential.slow_storage import SlowStorage
from tests.differential.test_differential import check_and_compare
from tests.serving import check_image, need

NB_OPERATIONS = int(os.environ.get("NBDQCOW_NODE_OPERATIONS", "600"))
NB_LONG_OPERATIONS = int(os.environ.get("NBDQCOW_LONG_OPERATIONS", "30000"))
NB_CRASHES = int(os.environ.get("NBDQCOW_NODE_CRASHES", "12"))
ROUND_OPERATIONS = 200


async def opened(image: Path, geometry: Geometry, cache: int | None = None) -> Node:
    return await open_image(image, format=geometry.image_format, l2_cache_size=cache)


@pytest.fixture
def slow_down(monkeypatch: pytest.MonkeyPatch) -> Callable[[random.Random], None]:
    """Has images opened from now on sit on slow storage."""

    def slow_down(source: random.Random) -> None:
        class SlowFile:
            @staticmethod
            async def open(*arguments: Any, **options: Any) -> SlowStorage:
                inner = await FileStorage.open(*arguments, **options)
                return SlowStorage(inner, source)

        monkeypatch.setattr("nbdqcow.block.open.storage_driver", lambda name: SlowFile)

    return slow_down


@pytest.mark.parametrize(
    "nb_operations",
    [
        pytest.param(NB_OPERATIONS, id="short"),
        pytest.param(
            NB_LONG_OPERATIONS,
            id="long",
            marks=[pytest.mark.slow, pytest.mark.timeout(0)],
        ),
    ],
)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_random_operations_on_a_node(
    geometry: Geometry,
    nb_operations: int,
    tmp_path: Path,
    seed: int,
    slow_down: Callable[[random.Random], None],
) -> None:
    need("qemu-img", "qemu-io")
    source = random.Random(seed)
    image = build(geometry, tmp_path, source)
    model = DiskModel(content_by_qemu(image, geometry, tmp_path))
    history: list[Record] = []
    for round_index in range(max(3, nb_operations // ROUND_OPERATIONS)):
        # A cache of a few tables: they are evicted all the time.
        cache = (None, 16 * geometry.cluster_size, 1)[round_index % 3]
        if round_index == 1:
            slow_down(source)
        loop = (asyncio, uvloop)[round_index % 2].new_event_loop()
        try:
            node = loop.run_until_complete(opened(image, geometry, cache))
            runner = Runner(
                NodeTarget(node, loop, source),
                model,
                Generator(source, model.size, geometry.cluster_size),
                source,
                depth=16,
                overlap=(0.3, 1.0, 1.0)[round_index % 3],
                history=history,
            )
            runner.run(min(nb_operations, ROUND_OPERATIONS))
            runner.verify_all()
            loop.run_until_complete(node.close())
        finally:
            loop.close()
        check_and_compare(image, geometry, model)


@pytest.mark.parametrize(
    "geometry",
    [
        geometry
        for geometry in GEOMETRIES
        if geometry.name
        in (
            *("v3-512", "v3-64k", "v2-4k-compressed", "three-levels"),
            *("subclusters-overlay", "qcow-4k"),
        )
    ],
    ids=str,
)
def test_the_file_is_a_good_image_at_any_moment(
    geometry: Geometry,
    tmp_path: Path,
    seed: int,
    slow_down: Callable[[random.Random], None],
) -> None:
    """What a kill would leave, looked at with requests in flight: no corruption,
    and every byte durable or one of the values written since."""
    need("qemu-img", "qemu-io")
    source = random.Random(seed)
    image = build(geometry, tmp_path, source)
    left = tmp_path / "left.qcow2"
    slow_down(source)
    model = DiskModel(content_by_qemu(image, geometry, tmp_path))
    loop = uvloop.new_event_loop()
    try:
        node = loop.run_until_complete(opened(image, geometry))
        runner = Runner(
            NodeTarget(node, loop, source),
            model,
            Generator(
                source,
                model.size,
                geometry.cluster_size,
                Weights(read=5, write=50, zero=10, trim=15, flush=12, cache=0),
            ),
            source,
            depth=16,
            crash_safe=True,
        )
        for _ in range(NB_CRASHES):
            runner.start(source.randint(1, 100))
            shutil.copyfile(image, left)
            if geometry.image_format == "qcow":
                qcow1_image.check(left)
            else:
                check_image(left, leaks_allowed=True)
            content = content_by_qemu(left, geometry, tmp_path)
            runner.check_left(content.tobytes())
        runner.drain()
        loop.run_until_complete(node.close())
    finally:
        loop.close()
    if geometry.image_format == "qcow2":
        check_image(image)

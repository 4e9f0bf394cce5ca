"""Random operations on a node in this process: denser than over a socket."""

import asyncio
import os
import random
from pathlib import Path

import pytest
import uvloop

from nbdqcow import open_image
from nbdqcow.block.node import Node
from tests.differential.geometries import (
    GEOMETRIES,
    Geometry,
    build,
    content_by_qemu,
)
from tests.differential.model import DiskModel
from tests.differential.node_target import NodeTarget
from tests.differential.operations import Generator
from tests.differential.runner import Record, Runner
from tests.differential.test_differential import check_and_compare
from tests.serving import need

NB_OPERATIONS = int(os.environ.get("NBDQCOW_NODE_OPERATIONS", "1200"))
NB_ROUNDS = 3


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_random_operations_on_a_node(
    geometry: Geometry, tmp_path: Path, seed: int
) -> None:
    need("qemu-img", "qemu-io")
    source = random.Random(seed)
    image = build(geometry, tmp_path, source)
    model = DiskModel(content_by_qemu(image, geometry, tmp_path))
    history: list[Record] = []
    for round_index in range(NB_ROUNDS):
        # A cache of a few tables: they are evicted all the time.
        cache = (None, 16 * geometry.cluster_size, 1)[round_index]
        loop = (asyncio, uvloop)[round_index % 2].new_event_loop()
        try:

            async def opened(cache: int | None = cache) -> Node:
                return await open_image(
                    image, format=geometry.image_format, l2_cache_size=cache
                )

            node = loop.run_until_complete(opened())
            runner = Runner(
                NodeTarget(node, loop, source),
                model,
                Generator(source, model.size, geometry.cluster_size),
                source,
                depth=16,
                overlap=(0.3, 1.0, 1.0)[round_index],
                history=history,
            )
            runner.run(NB_OPERATIONS // NB_ROUNDS)
            runner.verify_all()
            loop.run_until_complete(node.close())
        finally:
            loop.close()
        check_and_compare(image, geometry, model)

"""Random operations on encrypted images; QEMU reads what they have made."""

import asyncio
import os
import random
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import uvloop

from nbdqcow import open_image
from nbdqcow.block.node import Node
from nbdqcow.cli.img import main
from tests.differential.geometries import random_content
from tests.differential.model import Bytes, DiskModel
from tests.differential.node_target import NodeTarget
from tests.differential.operations import Generator
from tests.differential.runner import Record, Runner
from tests.differential.test_node import slow_down
from tests.serving import need

__all__ = ["slow_down"]

KiB, MiB = 1 << 10, 1 << 20
NB_ROUNDS = 3
NB_LONG_ROUNDS = int(os.environ.get("NBDQCOW_LONG_OPERATIONS", "30000")) // 1000
ROUND_OPERATIONS = 120
SECRET = ["--object", "secret,id=s,data=one"]
LUKS = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1"
AES = "encrypt.format=aes,encrypt.key-secret=s"


@dataclass(frozen=True, slots=True)
class Case:
    """An image by the options that make it; ``base`` those of its backing image,
    with data, None without one. ``@`` is the images' directory."""

    name: str
    options: str
    cluster_size: int
    base: str | None = None
    image_format: str = "qcow2"


ESSIV = f"{LUKS},encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv"
CASES = (
    Case("luks", LUKS, 64 * KiB),
    Case("luks-cbc", f"{ESSIV},cluster_size=512", 512),
    Case("aes", f"{AES},cluster_size=4k", 4 * KiB),
    Case("aes-v2", f"{AES},compat=0.10", 64 * KiB),
    Case("luks-over-luks", f"{LUKS},cluster_size=4k", 4 * KiB, LUKS),
    Case("aes-over-luks", f"{AES},cluster_size=2M", 2 * MiB, f"{LUKS},cluster_size=4k"),
    Case("plain-over-aes", "cluster_size=64k", 64 * KiB, f"{AES},compat=0.10"),
    Case("luks-subclusters", f"{LUKS},extended_l2=on", 64 * KiB, AES),
    Case("aes-subclusters", f"{AES},extended_l2=on,cluster_size=16k", 16 * KiB, LUKS),
    Case("luks-data-file", f"{LUKS},data_file=@disk.data", 64 * KiB),
    Case("aes-raw-data", f"{AES},data_file=@disk.data,data_file_raw=on", 64 * KiB),
    Case("container", "key-secret=s,iter-time=1", 4 * KiB, image_format="luks"),
)
SIZE = 3 * MiB + 1536


def create(*words: object) -> None:
    """Make an image with our own tool: QEMU needs seconds for it."""
    assert main(["create", "-q", *SECRET, *map(str, words)]) == 0


def build(case: Case, directory: Path, source: random.Random) -> Path:
    image = directory / "disk"
    options = case.options.replace("@", f"{directory}/")
    words: list[object] = ["-f", case.image_format, "-o", options]
    if case.base is not None:
        base = directory / "base"
        create("-f", "qcow2", "-o", case.base, base, 2 * MiB + 512)
        content = directory / "base.raw"
        random_content(source, 2 * MiB + 512, 0.7).tofile(content)
        target = f"driver=qcow2,file.filename={base}"
        if "encrypt" in case.base:
            target += ",encrypt.key-secret=s"
        qemu("convert", "-n", "-f", "raw", content, "--target-image-opts", target)
        words += ["-u", "-b", base, "-F", "qcow2"]
    create(*words, image, SIZE)
    return image


def qemu(command: str, *words: object) -> str:
    done = subprocess.run(
        ["qemu-img", command, *SECRET, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def qemu_options(image: Path, case: Case) -> str:
    prefix = "" if case.image_format == "luks" else "encrypt."
    options = f"driver={case.image_format},file.filename={image}"
    if "key-secret" in case.options:
        options += f",{prefix}key-secret=s"
    if case.base is not None:
        options += ",backing.encrypt.key-secret=s"
    return options


def content_by_qemu(image: Path, case: Case) -> Bytes:
    """Let QEMU check the image and read all of it."""
    opened = ("--image-opts", qemu_options(image, case))
    if case.image_format == "qcow2":
        qemu("check", *opened)
    output = image.with_suffix(".raw")
    qemu("convert", *opened, "-O", "raw", output)
    return np.fromfile(output, np.uint8)[:SIZE]


async def opened(image: Path, case: Case, cache: int | None) -> Node:
    return await open_image(
        image,
        format=case.image_format,
        l2_cache_size=cache,
        driver_options={"secret": b"one"},
    )


LONG = [pytest.mark.slow, pytest.mark.timeout(0)]


@pytest.mark.parametrize(
    ("case", "nb_rounds"),
    [
        *(pytest.param(case, NB_ROUNDS, id=case.name) for case in CASES),
        *(
            pytest.param(case, NB_LONG_ROUNDS, id=f"{case.name}-long", marks=LONG)
            for case in CASES
        ),
    ],
)
def test_random_operations_on_encrypted_images(
    case: Case,
    nb_rounds: int,
    tmp_path: Path,
    seed: int,
    slow_down: Callable[[random.Random], None],
) -> None:
    need("qemu-img")
    source = random.Random(seed)
    image = build(case, tmp_path, source)
    model = DiskModel(content_by_qemu(image, case))
    history: list[Record] = []
    kept: bytes | None = None
    for round_index in range(nb_rounds):
        if round_index == 1:
            slow_down(source)
        loop = (asyncio, uvloop)[round_index % 2].new_event_loop()
        try:
            cache = (None, 16 * case.cluster_size, 1)[round_index % 3]
            node = loop.run_until_complete(opened(image, case, cache))
            runner = Runner(
                NodeTarget(node, loop, source),
                model,
                Generator(source, model.size, case.cluster_size),
                source,
                depth=16,
                overlap=(0.3, 1.0, 1.0)[round_index % 3],
                history=history,
            )
            runner.run(ROUND_OPERATIONS)
            runner.verify_all()
            if (
                kept is None
                and case.image_format == "qcow2"
                and "data_file" not in (case.options)
            ):
                # From now on clusters are shared.
                kept = model.base.tobytes()
                loop.run_until_complete(node.driver.snapshot_create("kept"))
            loop.run_until_complete(node.close())
        finally:
            loop.close()
        assert content_by_qemu(image, case).tobytes() == model.base.tobytes()
    if kept is not None:
        with asyncio.Runner() as running:
            node = running.run(opened(image, case, None))
            running.run(node.driver.snapshot_apply("kept"))
            running.run(node.close())
        assert content_by_qemu(image, case).tobytes() == kept

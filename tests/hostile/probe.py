"""Does to hostile images what users do, each in a process with limits.

``python -m tests.hostile.probe DIRECTORY [MUTANT]`` forks for each image and
each thing to do, after everything has been loaded, and prints a line of JSON
for each: how it ended, the processor's seconds and the memory.
"""

import asyncio
import json
import logging
import os
import resource
import shutil
import signal
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path

# Loaded before the forks, so that only the image's memory counts.
import numpy as np

from nbdqcow import open_image
from nbdqcow.block.tools import REPAIR_ALL, REPAIR_NONE
from nbdqcow.cli.img_names import image_name
from nbdqcow.cli.img_open import describe_chain
from nbdqcow.errors import NbdQcowError
from nbdqcow.formats.qcow2 import codec
from nbdqcow.formats.qcow2.header import Header
from nbdqcow.formats.qcow2.tool import Qcow2Tool
from nbdqcow.storage.blocking import BlockingLocalFile
from tests.hostile.images import BUILDERS, MiB

CPU_SECONDS = 12
WALL_SECONDS = 60
MEMORY = 768 * MiB
"""What a child may take beyond what it begins with."""


def info(path: Path) -> str:
    name = image_name(str(path), None, image_opts=False)
    return str(sum(1 for _ in describe_chain(name)))


def check(path: Path, repair: int = REPAIR_NONE) -> str:
    file = BlockingLocalFile.open(str(path), read_only=repair == REPAIR_NONE)
    lines: list[str] = []
    try:
        result = Qcow2Tool().check(file, repair, lines.append)
    finally:
        file.close()
    return f"{result.corruptions} corruptions, {result.leaks} leaks"


def repair(path: Path) -> str:
    first = check(path, REPAIR_ALL)
    return f"{first}; then {check(path)}"


def read(path: Path) -> str:
    async def run() -> str:
        async with open_image(path, read_only=True, format="qcow2") as node:
            await _read_some(node)
            if hasattr(node.driver, "snapshot_list"):
                await node.driver.snapshot_list()
            return f"{node.size} bytes"

    return asyncio.run(run())


async def _read_some(node) -> None:
    """Read the beginning and the end, and ask for status, errors or not."""
    for start in (0, max(0, node.size - 4 * MiB)):
        for offset in range(start, min(start + 4 * MiB, node.size), 64 << 10):
            try:
                await node.pread(offset, min(64 << 10, node.size - offset))
            except OSError:
                continue
    offset = 0
    for _ in range(20):
        if offset < node.size:
            found = await node.block_status(offset, node.size - offset, 1000)
            offset += int(found.lengths.sum())


def write(path: Path) -> str:
    async def run() -> str:
        async with open_image(path, format="qcow2") as node:
            for offset in (0, 512, 70_000, max(0, node.size - 512)):
                if offset + 512 > node.size:
                    continue
                for request in (
                    node.pwrite(offset, b"x" * 512),
                    node.discard(offset, 512),
                    node.write_zeroes(offset, 512),
                    node.flush(),
                ):
                    try:
                        await request
                    except OSError:
                        continue
            for operation in ("snapshot_create", "snapshot_delete"):
                try:
                    await getattr(node.driver, operation)("1")
                except OSError:
                    continue
        return "written"

    return asyncio.run(run())


ACTIONS: dict[str, Callable[[Path], str]] = {
    "info": info,
    "check": check,
    "read": read,
    "write": write,
    "repair": repair,
}


def unbounded_tables() -> None:
    """A mutant: the header's tables may have any length."""
    Header._check_tables = lambda self, for_check: None  # type: ignore[method-assign]


def unbounded_streams() -> None:
    """A mutant: a compressed cluster is as long as its stream."""

    def inflate(data: bytes, length: int) -> bytes:
        return zlib.decompressobj(-15).decompress(data)[:length]

    codec.inflate_blocking = inflate


MUTANTS = {m.__name__: m for m in (unbounded_tables, unbounded_streams)}


def limit() -> None:
    """Set the limits of a child."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + MEMORY + 256 * MiB
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(WALL_SECONDS)


def run_child(action: Callable[[Path], str], path: Path, write_fd: int) -> int:
    """Do one thing; return the exit status: 0 if it ended as it should."""
    limit()
    status = 1
    try:
        text = action(path)
        status = 0
    except (NbdQcowError, OSError) as error:
        text = f"{type(error).__name__}: {error}"
        # As in QEMU's message there is a word for each image of a chain.
        status = 0 if len(text) < 16_000 else 1
    except BaseException:
        text = traceback.format_exc()
    os.write(write_fd, text.encode(errors="replace")[-8000:])
    return status


def fork(action: Callable[[Path], str], path: Path) -> dict[str, object]:
    read_fd, write_fd = os.pipe()
    # What it has now, which is where a child begins. Not its peak: that is
    # also of whoever ran before in this process.
    before = int(Path("/proc/self/statm").read_text().split()[1])
    before *= resource.getpagesize()
    pid = os.fork()
    if not pid:
        os.close(read_fd)
        os._exit(run_child(action, path, write_fd))
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as pipe:
        text = pipe.read().decode(errors="replace")
    _, status, usage = os.wait4(pid, 0)
    return {
        "status": os.waitstatus_to_exitcode(status),
        "text": text,
        "cpu": round(usage.ru_utime + usage.ru_stime, 2),
        "memory": max(0, usage.ru_maxrss * 1024 - before),
    }


def main() -> None:
    directory = Path(sys.argv[1])
    names, actions = list(BUILDERS), ACTIONS
    if len(sys.argv) > 2:
        MUTANTS[sys.argv[2]]()
        names = sys.argv[3:]
        actions = {"read": read}
    logging.disable(logging.CRITICAL)
    np.unique(np.arange(4))
    for name in names:
        for what, action in actions.items():
            place = directory / name
            place.mkdir()
            found = fork(action, BUILDERS[name](place))
            print(json.dumps({"image": name, "action": what, **found}), flush=True)
            shutil.rmtree(place)


if __name__ == "__main__":
    main()

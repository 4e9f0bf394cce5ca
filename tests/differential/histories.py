"""One random history of everything an image can go through, for two drivers.

`ours` carries a step out on an open node of ours, `by_qemu` returns the same
for QEMU's tools. What a step does depends on nothing but the step.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbdqcow.block.node import Node
from tests.serving import run

SECTOR = 512


@dataclass(frozen=True, slots=True)
class Step:
    """One operation by its name and arguments; offsets and lengths in bytes."""

    name: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return " ".join(map(str, (self.name, *self.arguments)))


IO = ("write", "zero", "discard", "compress")


def is_io(step: Step) -> bool:
    """Whether the step is a request, not an operation on the image."""
    return step.name in IO


@dataclass
class History:
    """Draws steps that are possible, one after the other.

    Attributes:
        size: the disk's, bytes, after all steps so far.
        snapshots, bitmaps: the names that there are now.
        compresses, has_bitmaps, has_snapshots, resizes_snapshots: what the image
            can do; the last one is to be resized with snapshots.
        keeps_zeroes: whether zeroes are written that shall not free clusters.
    """

    source: random.Random
    size: int
    cluster_size: int
    compresses: bool = True
    keeps_zeroes: bool = True
    has_bitmaps: bool = True
    has_snapshots: bool = True
    resizes_snapshots: bool = True
    snapshots: dict[str, int] = field(default_factory=dict)
    bitmaps: list[str] = field(default_factory=list)
    _nb_names: int = 0

    def requests(self, nb: int) -> Iterator[Step]:
        """Draw requests to the disk as it is."""
        for _ in range(nb):
            yield self._request()

    def _request(self) -> Step:
        source, size, cluster = self.source, self.size, self.cluster_size
        kind = source.choices(IO, (50, 20, 15, 15 if self.compresses else 0))[0]
        if kind == "compress":
            offset = source.randrange(max(1, size // cluster)) * cluster
            length = min(cluster, size - offset)
            return Step(kind, (offset, length, source.randrange(256)))
        shape = source.random()
        if shape < 0.5:
            length = SECTOR * source.randint(1, 40)
        elif shape < 0.8:
            length = cluster * source.randint(1, 4)
        else:
            length = SECTOR * source.randint(1, 600)
        unit = source.choice((SECTOR, SECTOR, 2048, cluster))
        offset = source.randrange(size) // unit * unit
        length = min(length, size - offset)
        if kind == "write":
            return Step(kind, (offset, length, source.randrange(256)))
        if kind == "zero":
            unmap = source.random() < 0.5 or not self.keeps_zeroes
            return Step(kind, (offset, length, unmap))
        return Step(kind, (offset, length))

    def operation(self) -> Step:
        """Draw something that is done with the image while nobody writes."""
        source = self.source
        while True:
            kind = source.choice(
                (
                    *("snapshot", "snapshot", "apply", "delete", "resize"),
                    *("add", "add", "remove", "clear", "merge", "enable", "disable"),
                )
            )
            if kind in ("snapshot", "apply", "delete"):
                if self.has_snapshots and (step := self._snapshot_step(kind)):
                    return step
            elif kind == "resize":
                if self.resizes_snapshots or not self.snapshots:
                    return self._resize()
            elif self.has_bitmaps and (step := self._bitmap_step(kind)):
                return step

    def _new_name(self, letter: str) -> str:
        self._nb_names += 1
        return f"{letter}{self._nb_names}"

    def _snapshot_step(self, kind: str) -> Step | None:
        if kind == "snapshot":
            if len(self.snapshots) > 3:
                return None
            name = self._new_name("s")
            self.snapshots[name] = self.size
            return Step(kind, (name,))
        if not self.snapshots:
            return None
        name = self.source.choice(list(self.snapshots))
        if kind == "apply":
            if self.bitmaps:  # Neither we nor QEMU do that.
                return None
            self.size = self.snapshots[name]
        else:
            del self.snapshots[name]
        return Step(kind, (name,))

    def _resize(self) -> Step:
        source = self.source
        smaller = source.random() < 0.4 and not self.snapshots
        if smaller:
            size = self.size - SECTOR * source.randint(1, 2000)
        else:
            size = self.size + SECTOR * source.randint(1, 2000)
        self.size = min(max(size, 1 << 20), 8 << 20)
        return Step("resize", (self.size,))

    def _bitmap_step(self, kind: str) -> Step | None:
        source = self.source
        if kind == "add":
            if len(self.bitmaps) > 3:
                return None
            name = self._new_name("b")
            self.bitmaps.append(name)
            granularity = 512 << source.randrange(9)
            return Step(kind, (name, granularity, source.random() < 0.2))
        if not self.bitmaps:
            return None
        name = source.choice(self.bitmaps)
        if kind == "remove":
            self.bitmaps.remove(name)
        if kind == "merge":
            other = source.choice(self.bitmaps)
            return None if other == name else Step(kind, (name, other))
        return Step(kind, (name,))


def payload(length: int, number: int) -> bytes:
    """Return what is written for a pattern of qemu-io's."""
    return bytes([number]) * length


async def ours(node: Node, step: Step) -> None:
    """Carry a step out on an open image of ours."""
    driver: Any = node.driver
    match step.name, step.arguments:
        case "write", (offset, length, number):
            data = payload(length, number)
            if not node.try_pwrite(offset, data):
                await node.pwrite(offset, data)
        case "zero", (offset, length, unmap):
            await node.write_zeroes(offset, length, may_unmap=unmap)
        case "discard", (offset, length):
            await node.discard(offset, length)
        case "compress", (offset, length, number):
            await node.pwrite_compressed(offset, payload(length, number))
        case "snapshot", (name,):
            await driver.snapshot_create(name)
        case "apply", (name,):
            await driver.snapshot_apply(name)
        case "delete", (name,):
            await driver.snapshot_delete(name)
        case "resize", (size,):
            await node.resize(size)
        case "add", (name, granularity, disabled):
            driver.bitmap_add(name, granularity=granularity, enabled=not disabled)
        case "remove", (name,):
            await driver.bitmap_remove(name)
        case "clear", (name,):
            driver.bitmap_clear(name)
        case "merge", (name, other):
            await driver.bitmap_merge(name, other)
        case "enable", (name,):
            driver.bitmap_enable(name)
        case "disable", (name,):
            driver.bitmap_enable(name, False)
        case _:
            raise AssertionError(step)


def _io_command(step: Step) -> str:
    match step.name, step.arguments:
        case "write", (offset, length, number):
            return f"write -P {number} {offset} {length}"
        case "zero", (offset, length, unmap):
            return f"write -z {'-u ' if unmap else ''}{offset} {length}"
        case "discard", (offset, length):
            return f"discard {offset} {length}"
        case "compress", (offset, length, number):
            # QEMU 7.2 breaks its image when it compresses into space that it has
            # freed: it writes the same bytes plainly.
            return f"write -P {number} {offset} {length}"
    raise AssertionError(step)


def requests_by_qemu(
    image: str, steps: Sequence[Step], secret: Sequence[str] = ()
) -> None:
    """Let qemu-io send requests to the image, given by image options."""
    commands: list[str] = []
    for step in steps:
        commands += ["-c", _io_command(step)]
    done = run("qemu-io", *secret, "-d", "unmap", *commands, "--image-opts", image)
    assert "failed" not in done.stdout + done.stderr, done.stdout + done.stderr


def operation_by_qemu(
    image: str, path: Path, step: Step, secret: Sequence[str] = ()
) -> None:
    """Let qemu-img carry out an operation; ``image`` is the options of ``path``."""
    named = ("--image-opts", image)
    match step.name, step.arguments:
        case "snapshot", (name,):
            run("qemu-img", "snapshot", *secret, "-c", name, *named)
        case "apply", (name,):
            run("qemu-img", "snapshot", *secret, "-a", name, *named)
        case "delete", (name,):
            run("qemu-img", "snapshot", *secret, "-d", name, *named)
        case "resize", (size,):
            shown = run("qemu-img", "info", "--output=json", *secret, *named).stdout
            info = json.loads(shown)
            end, cluster_size = info["virtual-size"], info["cluster-size"]
            run("qemu-img", "resize", "-q", "--shrink", *secret, *named, str(size))
            if rest := min(-end % cluster_size, size - end) if end < size else 0:
                # As we do, see docs/qcow2.md: with QEMU what was there comes back.
                zero = Step("zero", (end, rest, False))
                requests_by_qemu(image, [zero], secret)
        case "add", (name, granularity, disabled):
            words = ["--disable"] if disabled else []
            words = ["--add", "-g", str(granularity), *words]
            run("qemu-img", "bitmap", *secret, *words, *named, name)
        case "merge", (name, other):
            run("qemu-img", "bitmap", *secret, "--merge", other, *named, name)
        case ("remove" | "clear" | "enable" | "disable") as what, (name,):
            run("qemu-img", "bitmap", *secret, f"--{what}", *named, name)
        case _:
            raise AssertionError(step)

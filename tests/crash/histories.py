"""Short histories of an image, one for each operation that changes metadata.

Each is an image, and steps that one client does one after the other. What every
sector of the disk may hold is known at each moment: now, and after a crash.
The images are small, with clusters of 512 bytes mostly, so that a few steps
cross every boundary there is.
"""

import functools
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from nbdqcow.block.node import Node
from nbdqcow.block.storage import StorageDriver
from nbdqcow.block.tools import OptionValue
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.formats.qcow2.tool import Qcow2Tool
from nbdqcow.formats.raw import RawDriver
from nbdqcow.storage.memory import MemoryStorage
from tests.builder import BytesFile, ImageBuilder

SECTOR = 512
KiB = 1 << 10
LOOKED_AT = 4 << 20
"""Bytes of a disk that are looked at: none of the steps goes beyond."""
ZERO = bytes(SECTOR)

Sectors = Mapping[int, bytes]


class Disk:
    """What each sector of the disk may hold, as the client knows it.

    Attributes:
        now: by sector, what a read may return; a missing one is in ``base``.
        later: the same after a crash.
        snapshots: by name, the content of the sectors known then.
    """

    def __init__(self, base: Callable[[int], bytes], size: int) -> None:
        self.base = base
        self.size = size
        self.now: dict[int, frozenset[bytes]] = {}
        self.later: dict[int, frozenset[bytes]] = {}
        self.snapshots: dict[str, dict[int, frozenset[bytes]]] = {}

    def possible(self, sector: int) -> frozenset[bytes]:
        """Return what a read of a sector may return now."""
        return self.now.get(sector) or frozenset((self.base(sector),))

    def begin(self, changes: Sectors) -> None:
        """These sectors are about to change."""
        for sector, value in changes.items():
            old = self.possible(sector)
            self.later[sector] = self.later.get(sector, old) | old | {value}
            self.now[sector] = old | {value}

    def succeed(self, changes: Sectors, *, optional: bool) -> None:
        """They have changed; ``optional``: or they may have."""
        if not optional:
            self.now.update({s: frozenset((v,)) for s, v in changes.items()})

    def flushed(self) -> None:
        """All that was answered is durable."""
        self.later = dict(self.now)


@dataclass(frozen=True, slots=True)
class Step:
    """One request, or one operation on the image.

    Attributes:
        run: does it.
        changes: says which sectors get which content, given what is known.
        flushes: makes durable all that was answered before it, itself too.
        optional: the sectors may also stay as they are.
        after: what else is known of the disk once it has succeeded.
    """

    name: str
    run: Callable[[Node], Awaitable[object]]
    changes: Callable[[Disk], Sectors] = lambda disk: {}
    flushes: bool = False
    optional: bool = False
    after: Callable[[Disk], None] = lambda disk: None


@dataclass(frozen=True)
class History:
    """An image and what happens to it.

    Attributes:
        image: builds the file.
        backing: the content of a raw backing file, or None.
        clean: it has no leaks from the start, nor may it have any at its end.
        options: of the driver.
        costly: a look at one disk takes long, so that few are looked at.
        background: a commit runs after a step, whose failure nobody awaits:
            the next one does its work.
    """

    name: str
    image: Callable[[], bytes]
    steps: Sequence[Step]
    backing: bytes | None = None
    clean: bool = True
    options: Mapping[str, object] = field(default_factory=dict)
    costly: bool = False
    background: bool = False

    def __str__(self) -> str:
        return self.name

    async def open(self, storage: StorageDriver) -> Node:
        """Open the image for writing."""
        driver = await Qcow2Driver.open(storage, read_only=False, options=self.options)
        below = None
        if self.backing is not None:
            memory = MemoryStorage(self.backing, read_only=True)
            raw = await RawDriver.open(memory, read_only=True, options={})
            below = Node(raw, filename="backing")
        return Node(driver, filename="disk", backing=below)


# -- steps ---------------------------------------------------------------------


def pattern(seed: object, length: int) -> bytes:
    """Return bytes that nothing else in a test has."""
    return random.Random(f"{seed}/{length}").randbytes(length)


def split(offset: int, data: bytes) -> Sectors:
    return {
        (offset + at) // SECTOR: data[at : at + SECTOR]
        for at in range(0, len(data), SECTOR)
    }


def write(offset: int, length: int, tag: object = "", *, fua: bool = False) -> Step:
    data = pattern(("write", offset, tag), length)

    async def run(node: Node) -> None:
        if fua or not node.try_pwrite(offset, data):
            await node.pwrite(offset, data, fua=fua)

    return Step(
        f"write {offset:#x}+{length:#x}{' fua' if fua else ''}",
        run,
        lambda disk: split(offset, data),
        flushes=fua,
    )


def zero(offset: int, length: int, *, may_unmap: bool = True) -> Step:
    return Step(
        f"zero {offset:#x}+{length:#x}{'' if may_unmap else ' no_hole'}",
        lambda node: node.write_zeroes(offset, length, may_unmap=may_unmap),
        lambda disk: split(offset, bytes(length)),
    )


def discard(offset: int, length: int) -> Step:
    return Step(
        f"discard {offset:#x}+{length:#x}",
        lambda node: node.discard(offset, length),
        lambda disk: split(offset, bytes(length)),
        optional=True,
    )


def flush() -> Step:
    return Step("flush", lambda node: node.flush(), flushes=True)


def read(offset: int, length: int) -> Step:
    return Step(
        f"read {offset:#x}+{length:#x}", lambda node: node.pread(offset, length)
    )


def snapshot_create(name: str) -> Step:
    def keep(disk: Disk) -> None:
        disk.snapshots[name] = dict(disk.now)

    return Step(
        f"snapshot create {name}",
        lambda node: node.driver.snapshot_create(name, date_nanoseconds=10**18),
        flushes=True,
        after=keep,
    )


def snapshot_delete(name: str) -> Step:
    return Step(
        f"snapshot delete {name}",
        lambda node: node.driver.snapshot_delete(name),
        flushes=True,
    )


def snapshot_apply(name: str) -> Step:
    def changes(disk: Disk) -> Sectors:
        kept = disk.snapshots[name]
        return {
            sector: next(iter(kept.get(sector, (disk.base(sector),))))
            for sector in disk.now
        }

    return Step(
        f"snapshot apply {name}",
        lambda node: node.driver.snapshot_apply(name),
        changes,
        flushes=True,
    )


def write_compressed(offset: int, nb_clusters: int, cluster_size: int) -> Step:
    data = b"".join(
        compressible(offset // cluster_size + i) for i in range(nb_clusters)
    )
    return Step(
        f"write compressed {offset:#x}+{len(data):#x}",
        lambda node: node.pwrite_compressed(offset, data),
        lambda disk: split(offset, data),
    )


def resize(size: int, *, known: int) -> Step:
    """Change the size; what is new, or was beyond a smaller one, is zero."""
    sectors = range(min(size, known) // SECTOR, max(size, known) // SECTOR)
    return Step(
        f"resize {size:#x}",
        lambda node: node.resize(size),
        lambda disk: dict.fromkeys(sectors, ZERO),
        optional=size < known,
    )


def make_empty() -> Step:
    return Step(
        "make empty",
        lambda node: node.driver.make_empty(),
        lambda disk: dict.fromkeys(range(disk.size // SECTOR), ZERO),
        flushes=True,
    )


def amend(**options: OptionValue) -> Step:
    return Step(
        f"amend {options}",
        lambda node: node.amend(options, lambda done, total: None),
        flushes=True,
    )


def bitmap(action: str, name: str, *arguments: object) -> Step:
    async def run(node: Node) -> None:
        done = getattr(node.driver, f"bitmap_{action}")(name, *arguments)
        if done is not None:
            await done

    return Step(f"bitmap {action} {name}", run)


# -- images --------------------------------------------------------------------


def created(**values: object) -> bytes:
    """Return an empty image made with these ``-o`` options."""
    file = BytesFile()
    tool = Qcow2Tool()
    given = {"size": 128 * KiB, "cluster_size": 512, **values}
    tool.create(file, tool.prepare(given))
    return bytes(file.data)


@functools.lru_cache
def filled(nb_clusters: int, *, refcount_order: int = 4, version: int = 3) -> bytes:
    """Return an image whose first clusters have data, its content `pattern`."""
    builder = ImageBuilder(128 * KiB, refcount_order=refcount_order, version=version)
    for index in range(nb_clusters):
        builder.add_data(index, pattern(("base", index), SECTOR))
    return builder.build()


@functools.lru_cache
def compressed() -> bytes:
    """Return an image with some compressed clusters, some sharing a sector."""
    builder = ImageBuilder(128 * KiB, cluster_bits=12)
    for index in range(0, 12, 2):
        builder.add_compressed(index, compressible(index), skip=index * 20)
        builder.add_data(index + 1, compressible(index + 1))
    return builder.build()


def compressible(cluster: int) -> bytes:
    return bytes([cluster + 1, 7, 9, 255 - cluster]) * KiB


@functools.lru_cache
def nearly_full_refcount_table() -> bytes:
    """Return an image whose next clusters need a larger refcount table.

    With counts of 64 bits a block describes 64 clusters, and a table of one
    cluster 64 blocks: 2 MiB of file.
    """
    builder = ImageBuilder(4 << 20, refcount_order=6)
    for index in range(3930):
        builder.add_data(index, b"%d" % index)
    image = builder.build()
    assert 4060 * SECTOR <= len(image) <= 4096 * SECTOR, len(image) // SECTOR
    return image


BACKING = b"".join(pattern(("backing", i), SECTOR) for i in range(192))

HISTORIES = [
    History(
        "allocate",
        created,
        [
            write(0, 512),
            write(0x7E00, 0x400),
            flush(),
            write(0x400, 0x600),
            write(0x10000, 0x200),
            flush(),
            write(0x200, 0x400, "again"),
        ],
    ),
    History(
        "overwrite",
        functools.partial(filled, 8),
        [
            write(0x200, 0x400),
            write(0x400, 0x200, "again", fua=True),
            write(0, 0x200),
            flush(),
            write(0, 0x200, "again"),
        ],
    ),
    History(
        "copy-on-write",
        functools.partial(
            created,
            cluster_size=4096,
            size=96 * KiB,
            backing_file="base",
            backing_fmt="raw",
        ),
        [
            write(0x200, 0x200),
            write(0x2E00, 0x600),
            flush(),
            write(0x5000, 0x1000),
            zero(0x6200, 0x400),
            write(0x200, 0x200, "again"),
            discard(0x2000, 0x1000),
            flush(),
            write(0x2400, 0x200),
        ],
        backing=BACKING[: 80 * KiB],
    ),
    History(
        "compressed",
        compressed,
        [
            read(0, 0x3000),
            write(0x200, 0x200),
            write(0x2000, 0x1000),
            flush(),
            discard(0x4000, 0x2000),
            write(0xC000, 0x1000),
            flush(),
            write(0x6E00, 0x400),
        ],
    ),
    History(
        "discard",
        functools.partial(filled, 12),
        [
            discard(0x200, 0x400),
            write(0x1800, 0x200),
            flush(),
            write(0x2000, 0x400),
            discard(0, 0x200),
            write(0, 0x200, "again"),
            flush(),
            write(0x3000, 0x200),
        ],
    ),
    History(
        "zero",
        functools.partial(filled, 12),
        [
            zero(0x200, 0x400),
            zero(0x800, 0x400, may_unmap=False),
            write(0x800, 0x200),
            flush(),
            write(0x200, 0x200),
            zero(0x1000, 0x200),
            zero(0x4000, 0x400),
            flush(),
            write(0x2000, 0x200),
        ],
    ),
    History(
        "version-2",
        functools.partial(filled, 6, version=2),
        [
            write(0x1000, 0x400),
            discard(0, 0x400),
            flush(),
            write(0x2000, 0x400),
            zero(0x1000, 0x200),
            flush(),
        ],
    ),
    History(
        "refcount-block",
        functools.partial(filled, 48, refcount_order=6),
        [write(0x6000 + i * 0x200, 0x200) for i in range(14)]
        + [flush(), write(0xA000, 0x200)],
    ),
    History(
        "refcount-table",
        nearly_full_refcount_table,
        [write(0x200000 + i * 0x4000, 0x4000) for i in range(2)]
        + [flush(), write(0x280000, 0x200)],
        costly=True,
    ),
    History(
        "narrow-refcounts",
        functools.partial(filled, 6, refcount_order=1),
        [
            write(0x1000, 0x200),
            snapshot_create("one"),
            write(0, 0x200),
            snapshot_delete("one"),
            write(0x200, 0x200),
        ],
    ),
    History(
        "snapshot-create",
        functools.partial(filled, 6),
        [
            write(0x1000, 0x200),
            snapshot_create("one"),
            write(0, 0x200),
            write(0x1000, 0x200, "again"),
            flush(),
            snapshot_create("two"),
        ],
    ),
    History(
        "snapshot-delete",
        functools.partial(filled, 6),
        [
            snapshot_create("one"),
            write(0, 0x200),
            snapshot_create("two"),
            snapshot_delete("one"),
            write(0x200, 0x200),
            snapshot_delete("two"),
            write(0x400, 0x200),
        ],
    ),
    History(
        "snapshot-apply",
        functools.partial(filled, 6),
        [
            write(0, 0x200),
            snapshot_create("one"),
            write(0x200, 0x400),
            discard(0x600, 0x200),
            snapshot_apply("one"),
            write(0x200, 0x200, "again"),
        ],
    ),
    History(
        "long-l1-table",
        functools.partial(created, size=160 << 20, refcount_bits=64),
        [
            write(0, 0x200),
            snapshot_create("one"),
            write(0, 0x200, "again"),
            snapshot_delete("one"),
        ],
        costly=True,
    ),
    History(
        "compressed-write",
        functools.partial(created, cluster_size=4096),
        [
            write_compressed(0, 3, 4096),
            write(0x1200, 0x200),
            flush(),
            write_compressed(0x8000, 2, 4096),
            discard(0x2000, 0x1000),
            flush(),
            write(0x8000, 0x200),
        ],
    ),
    History(
        "subclusters",
        functools.partial(created, cluster_size=16384, extended_l2=True),
        [
            write(0x200, 0x200),
            write(0x3E00, 0x400),
            flush(),
            zero(0x200, 0x400),
            write(0x600, 0x200),
            discard(0x4000, 0x4000),
            flush(),
            write(0x4200, 0x200),
        ],
    ),
    History(
        "grow",
        functools.partial(filled, 6),
        [
            write(0x1000, 0x200),
            resize(256 * KiB, known=128 * KiB),
            write(0x20000, 0x400),
            flush(),
            resize(3 << 20, known=256 * KiB),
            write(0x2FFC00, 0x400),
        ],
    ),
    History(
        "shrink",
        functools.partial(filled, 12),
        [
            write(0x4000, 0x400),
            resize(0x1000, known=128 * KiB),
            write(0x200, 0x200),
            resize(0x8000, known=0x1000),
            write(0x1000, 0x200),
        ],
        background=True,
    ),
    History(
        "make-empty",
        functools.partial(filled, 12),
        [write(0x4000, 0x400), make_empty(), write(0x200, 0x200), flush()],
        background=True,
    ),
    History(
        "bitmaps",
        functools.partial(filled, 6),
        [
            bitmap("add", "one"),
            write(0x1000, 0x200),
            bitmap("add", "two"),
            write(0x200, 0x200),
            flush(),
            bitmap("remove", "one"),
            write(0x400, 0x200),
        ],
    ),
    History(
        "refcount-width",
        functools.partial(filled, 6),
        [
            write(0x1000, 0x200),
            amend(refcount_bits=32),
            write(0x1200, 0x400),
            amend(refcount_bits=8),
            write(0x200, 0x200),
        ],
    ),
    History(
        "downgrade",
        functools.partial(filled, 6),
        [
            bitmap("add", "one"),
            zero(0x200, 0x400, may_unmap=False),
            snapshot_create("one"),
            write(0xC00, 0x200),
            amend(compat="0.10"),
            write(0x400, 0x200),
        ],
    ),
]
"""Opening the image before the steps and closing it after them belong to each."""


def base_content(history: History) -> Callable[[int], bytes]:
    """Return what the sectors hold before any step, by the images' builders."""
    match history.name:
        case "copy-on-write":
            nb = len(history.backing or b"") // SECTOR
            return lambda s: BACKING[s * SECTOR :][:SECTOR] if s < nb else ZERO
        case "compressed":
            return lambda s: compressible(s // 8)[:SECTOR] if s // 8 < 12 else ZERO
        case "refcount-table":
            return lambda s: (b"%d" % s).ljust(SECTOR, b"\0") if s < 3930 else ZERO
    nb_filled = {
        "allocate": 0,
        "long-l1-table": 0,
        "compressed-write": 0,
        "subclusters": 0,
        "shrink": 12,
        "make-empty": 12,
        "overwrite": 8,
        "discard": 12,
        "zero": 12,
    }
    nb = nb_filled.get(history.name, 48 if history.name == "refcount-block" else 6)
    return lambda s: pattern(("base", s), SECTOR) if s < nb else ZERO

"""What is measured, and what is wanted. One table, so that both are seen."""

import enum
from dataclasses import dataclass, field
from typing import Final

KiB: Final = 1 << 10
MiB: Final = 1 << 20
GiB: Final = 1 << 30

OURS: Final = "nbdqcow"
QEMU: Final = "qemu-nbd"
QEMU_URING: Final = "qemu-uring"
NBDKIT: Final = "nbdkit"


class Disk(enum.Enum):
    """What a cell runs on."""

    FULL = "every cluster allocated, in page cache"
    EMPTY = "a fresh empty image for each run"
    SUBCLUSTERS = "a fresh empty image with extended L2 entries for each run"
    OVERLAY = "a fresh overlay over the full image for each run"
    HUGE = "1 TiB, every cluster mapped, sparse"
    LUKS = "as full, encrypted with LUKS"
    ZLIB = "every cluster compressed by zlib, in page cache"
    ZSTD = "every cluster compressed by zstd, in page cache"
    QCOW1 = "as FULL, in the qcow format of version 1"


@dataclass(frozen=True, slots=True)
class Cell:
    """One row: a load of fio's, and the least ratios of operations/s to peers.

    Attributes:
        rw: fio's name of the load.
        block: bytes of each request.
        depth: requests in flight on each of ``nb_connections``.
        nb_requests: end after so many requests; 0 means after a time. Where
            requests allocate, all servers must do the same work.
        targets: peer name to the ratio wanted.
        compare_cpu: our CPU time per operation must not exceed qemu-nbd's.
        tls: the connection is encrypted, with no certificate of the client.
    """

    name: str
    rw: str
    block: int
    depth: int
    targets: dict[str, float]
    nb_connections: int = 1
    disk: Disk = Disk.FULL
    nb_requests: int = 0
    compare_cpu: bool = True
    tls: bool = False


def _targets(
    qemu: float, uring: float, nbdkit: float | None = None
) -> dict[str, float]:
    targets = {QEMU: qemu, QEMU_URING: uring}
    return targets if nbdkit is None else {**targets, NBDKIT: nbdkit}


CELLS: Final = (
    Cell("randread-4k-qd1", "randread", 4 * KiB, 1, _targets(1.2, 1.0, 0.95)),
    Cell("randread-4k-qd16", "randread", 4 * KiB, 16, _targets(3.5, 1.8, 1.3)),
    Cell("randread-4k-qd64", "randread", 4 * KiB, 64, _targets(3.5, 1.8, 1.3)),
    Cell(
        "randread-4k-qd16-4conn",
        "randread",
        4 * KiB,
        16,
        _targets(3, 1.8, 1.3),
        nb_connections=4,
    ),
    Cell("randwrite-4k-qd1", "randwrite", 4 * KiB, 1, _targets(1.2, 1.2, 0.8)),
    Cell("randwrite-4k-qd16", "randwrite", 4 * KiB, 16, _targets(2, 2, 1.1)),
    Cell("randwrite-4k-qd64", "randwrite", 4 * KiB, 64, _targets(2.5, 2.2, 1.2)),
    Cell("randread-64k-qd16", "randread", 64 * KiB, 16, _targets(2.5, 1.2, 1.2)),
    Cell("randwrite-64k-qd16", "randwrite", 64 * KiB, 16, _targets(1.8, 1.4, 1.0)),
    Cell("read-1m-qd8", "read", MiB, 8, _targets(3, 2.5, 1.2)),
    Cell("write-1m-qd8", "write", MiB, 8, _targets(2, 1.8, 1.0)),
    Cell(
        "alloc-write-64k-qd16",
        "write",
        64 * KiB,
        16,
        _targets(1.3, 1.3),
        disk=Disk.EMPTY,
        nb_requests=GiB // (64 * KiB),
    ),
    Cell(
        "subclusters-alloc-randwrite-4k-qd16",
        "randwrite",
        4 * KiB,
        16,
        _targets(1.2, 1.2),
        disk=Disk.SUBCLUSTERS,
        nb_requests=65536,
    ),
    Cell(
        "overlay-randwrite-4k-qd16",
        "randwrite",
        4 * KiB,
        16,
        _targets(1.2, 1.2),
        disk=Disk.OVERLAY,
        nb_requests=8192,
    ),
    Cell(
        "huge-randread-4k-qd16",
        "randread",
        4 * KiB,
        16,
        {QEMU: 0.8},
        disk=Disk.HUGE,
        compare_cpu=False,
    ),
    *(
        Cell(
            f"compressed-{disk.name.lower()}-{name}",
            name.partition("-")[0],
            block,
            depth,
            {QEMU: target},
            disk=disk,
        )
        for disk, target in ((Disk.ZLIB, 2), (Disk.ZSTD, 1.5))
        for name, block, depth in (
            ("randread-4k-qd1", 4 * KiB, 1),
            ("randread-4k-qd16", 4 * KiB, 16),
            ("read-1m-qd8", MiB, 8),
        )
    ),
    Cell(
        "qcow1-randread-4k-qd16",
        "randread",
        4 * KiB,
        16,
        {QEMU: 1.5},
        disk=Disk.QCOW1,
    ),
    Cell(
        "qcow1-randwrite-4k-qd16",
        "randwrite",
        4 * KiB,
        16,
        {QEMU: 1.5},
        disk=Disk.QCOW1,
    ),
    Cell("tls-randread-4k-qd16", "randread", 4 * KiB, 16, {QEMU: 1.5}, tls=True),
    Cell("tls-randwrite-4k-qd16", "randwrite", 4 * KiB, 16, {QEMU: 1.5}, tls=True),
    Cell("tls-randread-64k-qd16", "randread", 64 * KiB, 16, {QEMU: 1.2}, tls=True),
    Cell("tls-randwrite-64k-qd16", "randwrite", 64 * KiB, 16, {QEMU: 1.2}, tls=True),
    *(
        Cell(f"luks-{name}", rw, block, depth, {QEMU: 0.8}, disk=Disk.LUKS)
        for name, rw, block, depth in (
            ("randread-4k-qd1", "randread", 4 * KiB, 1),
            ("randread-4k-qd16", "randread", 4 * KiB, 16),
            ("randwrite-4k-qd1", "randwrite", 4 * KiB, 1),
            ("randwrite-4k-qd16", "randwrite", 4 * KiB, 16),
            ("randread-64k-qd16", "randread", 64 * KiB, 16),
            ("randwrite-64k-qd16", "randwrite", 64 * KiB, 16),
            ("read-1m-qd8", "read", MiB, 8),
            ("write-1m-qd8", "write", MiB, 8),
        )
    ),
)

FAIRNESS: Final = "fairness"
FAIRNESS_P99_SECONDS: Final = 0.005

IDLE_MEMORY: Final = "memory-idle"
IDLE_MEMORY_LIMIT: Final = 60 * MiB

HUGE_MEMORY: Final = "memory-huge"
HUGE_CACHE: Final = 32 * MiB
HUGE_MEMORY_LIMIT: Final = HUGE_CACHE + 100 * MiB

CONNECTIONS: Final = "memory-connections"
NB_CONNECTIONS: Final = 1000
CONNECTIONS_LIMIT: Final = 100 * MiB

STRUCTURED: Final = "structured"
STRUCTURED_FIO: Final = "structured-fio"
STRUCTURED_CELL: Final = "randread-4k-qd16"
STRUCTURED_LIMIT: Final = 5.0

MAP: Final = "map-fragmented"

SNAPSHOT_LATENCY: Final = "snapshot-latency"
SNAPSHOT_LATENCY_LIMIT: Final = 2.0


@dataclass(slots=True)
class Sample:
    """One run of one cell against one server.

    Attributes:
        rate: operations a second; throughput: bytes a second.
        p99: 99th percentile of completion latency, in seconds.
        cpu: server CPU time per operation, in seconds.
    """

    rate: float
    throughput: float
    p99: float
    cpu: float


@dataclass(slots=True)
class Claim:
    """A figure with a limit of its own, outside the table of ratios."""

    name: str
    text: str
    value: float
    limit: float
    unit: str
    details: dict[str, float] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Say whether the value keeps its limit."""
        return self.value <= self.limit

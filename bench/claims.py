"""Figures with limits of their own, outside the table of ratios."""

import operator
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Final

from bench import images, snapshots
from bench.cells import (
    CELLS,
    CONNECTIONS,
    CONNECTIONS_LIMIT,
    FAIRNESS,
    FAIRNESS_P99_SECONDS,
    HUGE_CACHE,
    HUGE_MEMORY,
    HUGE_MEMORY_LIMIT,
    IDLE_MEMORY,
    IDLE_MEMORY_LIMIT,
    MAP,
    NB_CONNECTIONS,
    OURS,
    QEMU,
    SNAPSHOT_LATENCY,
    SNAPSHOT_LATENCY_LIMIT,
    STRUCTURED,
    STRUCTURED_CELL,
    STRUCTURED_FIO,
    STRUCTURED_LIMIT,
    Claim,
    Disk,
    MiB,
)
from bench.load import run_cell, run_fairness
from bench.peers import PEERS, BenchError, Peer, running
from bench.report import progress
from bench.wire import BlockReader, attach


def claim_fairness(
    peer: Peer, directory: Path, nb_rounds: int, seconds: float
) -> Claim:
    """Measure what a small reader suffers from a large writer."""
    image = images.full_qcow2(directory)
    images.warm_up(image)
    runs = []
    for round_index in range(nb_rounds):
        images.write_back(image)
        with running(peer, image) as server:
            runs.append(run_fairness(server, seconds))
        progress(
            f"{FAIRNESS:26} round {round_index + 1} {peer.name:10}"
            f" p99 {runs[-1]['p99'] * 1e3:.2f} ms"
            f"  worst {runs[-1]['worst'] * 1e3:.1f} ms"
            f"  stream {runs[-1]['throughput'] / 1e6:,.0f} MB/s"
        )
    return Claim(
        FAIRNESS,
        f"{peer.name}: p99 of 4 KiB reads, depth 1, beside a 1 MiB write stream",
        median(run["p99"] for run in runs) * 1e3,
        FAIRNESS_P99_SECONDS * 1e3,
        "ms",
        {
            "worst ms": max(run["worst"] for run in runs) * 1e3,
            "reads/s": median(run["rate"] for run in runs),
            "stream MB/s": median(run["throughput"] for run in runs) / 1e6,
        },
    )


def claim_idle_memory(
    peer: Peer, directory: Path, nb_rounds: int, seconds: float
) -> Claim:
    """Measure a server that serves an image to nobody."""
    with running(peer, images.full_qcow2(directory)) as server:
        memory = server.memory()
    return Claim(
        IDLE_MEMORY,
        f"{peer.name}: resident memory, idle",
        memory["VmRSS"] / MiB,
        IDLE_MEMORY_LIMIT / MiB,
        "MiB",
        {"anonymous MiB": memory["RssAnon"] / MiB},
    )


def claim_huge_memory(
    peer: Peer, directory: Path, nb_rounds: int, seconds: float
) -> Claim:
    """Measure the peak while random reads go over a 1 TiB map."""
    cell = next(cell for cell in CELLS if cell.disk is Disk.HUGE)
    image = images.huge_qcow2(directory)
    with running(peer, image, l2_cache_size=HUGE_CACHE) as server:
        run_cell(cell, server, seconds, seed=1)
        memory = server.memory()
    return Claim(
        HUGE_MEMORY,
        f"{peer.name}: peak resident memory, 1 TiB mapped,"
        f" {HUGE_CACHE // MiB} MiB L2 cache",
        memory["VmHWM"] / MiB,
        HUGE_MEMORY_LIMIT / MiB,
        "MiB",
        {"anonymous MiB": memory["RssAnon"] / MiB},
    )


_STYLES: Final[dict[str, tuple[str, ...]]] = {
    "structured": (),
    "simple": ("--no-structured-replies",),
}
"""Options of our server by the replies that it gives."""
_TURN: Final = 0.1
"""Seconds for which one connection reads while the other waits: what slows the
machine down slows down both."""


class _Costs:
    """Rates by the style of replies, and the server's seconds for a request."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._rates: dict[str, list[float]] = {style: [] for style in _STYLES}
        self._cpu: dict[str, list[float]] = {style: [] for style in _STYLES}

    def add(self, style: str, rate: float, cpu: float) -> None:
        """Note what a round has shown."""
        self._rates[style].append(rate)
        self._cpu[style].append(cpu)
        progress(
            f"{self._name:26} round {len(self._rates[style])} {style:10}"
            f" {rate:10,.0f}/s  CPU {cpu * 1e6:6.2f} us/op"
        )

    def claim(self, peer: Peer, text: str) -> Claim:
        """Return what structured replies cost over simple ones."""
        rates = {style: median(found) for style, found in self._rates.items()}
        details = {f"{style}/s": rate for style, rate in rates.items()}
        details |= {
            f"{style} us": median(cpu) * 1e6 for style, cpu in self._cpu.items()
        }
        return Claim(
            self._name,
            f"{peer.name}: cost of structured replies, {text}",
            (rates["simple"] / rates["structured"] - 1) * 100,
            STRUCTURED_LIMIT,
            "%",
            details,
        )


def claim_structured(
    peer: Peer, directory: Path, nb_rounds: int, seconds: float
) -> Claim:
    """Measure what structured replies cost, on two connections that take turns."""
    image = images.full_qcow2(directory)
    images.warm_up(image)
    costs = _Costs(STRUCTURED)
    for round_index in range(nb_rounds):
        with running(peer, image) as server, ExitStack() as stack:
            readers = {
                style: stack.enter_context(
                    BlockReader(
                        server,
                        images.FULL_SIZE,
                        1 + round_index,
                        structured=style == "structured",
                    )
                )
                for style in _STYLES
            }
            totals = {style: [0.0, 0.0, 0.0] for style in _STYLES}
            for _ in range(round(seconds / _TURN)):
                for style, reader in readers.items():
                    before = server.cpu_seconds()
                    found = *reader.read(_TURN), server.cpu_seconds() - before
                    totals[style] = list(map(operator.add, totals[style], found))
        for style, (nb_requests, elapsed, cpu) in totals.items():
            costs.add(style, nb_requests / elapsed, cpu / nb_requests)
    return costs.claim(peer, "4 KiB reads, depth 16")


def claim_structured_fio(
    peer: Peer, directory: Path, nb_rounds: int, seconds: float
) -> Claim:
    """Measure what they cost with fio, whose library, libnbd, makes four calls of
    recv(2) for each where it makes two for a simple one."""
    cell = next(cell for cell in CELLS if cell.name == STRUCTURED_CELL)
    image = images.full_qcow2(directory)
    images.warm_up(image)
    costs = _Costs(STRUCTURED_FIO)
    for round_index in range(nb_rounds):
        for style, options in _STYLES.items():
            with running(peer, image, options=options) as server:
                sample = run_cell(cell, server, seconds, 1 + round_index)
            costs.add(style, sample.rate, sample.cpu)
    return costs.claim(peer, "the same by fio")


def claim_connections(
    peer: Peer, directory: Path, nb_rounds: int, seconds: float
) -> Claim:
    """Measure what idle connections cost."""
    options = ("--max-connections", str(NB_CONNECTIONS))
    nb_files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    image = images.full_qcow2(directory)
    try:
        with running(peer, image, options=options) as server, ExitStack() as stack:
            before = server.memory()["VmRSS"]
            for _ in range(NB_CONNECTIONS):
                stack.enter_context(attach(server))
            after = server.memory()["VmRSS"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (nb_files, most))
    return Claim(
        CONNECTIONS,
        f"{peer.name}: memory for {NB_CONNECTIONS:,} idle connections",
        (after - before) / MiB,
        CONNECTIONS_LIMIT / MiB,
        "MiB",
    )


def claim_map(peer: Peer, directory: Path, nb_rounds: int, seconds: float) -> Claim:
    """Measure how long a client takes for the map of a fragmented image.

    `nbdinfo --map --totals` asks for the status of 1 TiB of which every second
    cluster is allocated: 16 million extents. The data clusters are holes of
    the file, and qemu-nbd, which takes the image for preallocated, looks them
    up there: an image full of data costs it less.
    """
    image = images.fragmented_qcow2(directory)
    servers = [peer, *(p for p in PEERS if p.name == QEMU and not p.missing())]
    times: dict[str, list[float]] = {one.name: [] for one in servers}
    for round_index in range(min(nb_rounds, 3)):
        for one in servers:
            with running(one, image) as server:
                start = time.perf_counter()
                _run(["nbdinfo", "--map", "--totals", server.uri])
                times[one.name].append(time.perf_counter() - start)
            progress(
                f"{MAP:26} round {round_index + 1} {one.name:10}"
                f" {times[one.name][-1]:6.2f} s"
            )
    ours, theirs = median(times[peer.name]), median(times.get(QEMU, [0.0]))
    return Claim(
        MAP,
        f"{peer.name}: map of 1 TiB, every second cluster, by nbdinfo",
        ours,
        theirs,
        "s",
        {"ratio": theirs / ours},
    )


def claim_snapshot_latency(
    peer: Peer, directory: Path, nb_rounds: int, seconds: float
) -> Claim:
    """Measure how long a client waits while a snapshot of 1 TiB is made."""
    image = images.huge_qcow2(directory)
    if shutil.which(snapshots.DAEMON) is None:
        raise BenchError(f"{snapshots.DAEMON} is not installed")
    waits: dict[str, list[snapshots.Waits]] = {peer.name: [], snapshots.DAEMON: []}
    for round_index in range(min(nb_rounds, 3)):
        for name, found in waits.items():
            found.append(snapshots.measure(name, image, seed=1 + round_index))
            progress(
                f"{SNAPSHOT_LATENCY:26} round {round_index + 1} {name:10}"
                f" longest wait {found[-1].longest * 1e3:,.1f} ms"
                f"  snapshot {found[-1].snapshot:.2f} s"
                f"  wait before {found[-1].before * 1e3:,.1f} ms"
            )
    ours, theirs = (
        median(one.longest for one in found) * 1e3 for found in waits.values()
    )
    return Claim(
        SNAPSHOT_LATENCY,
        f"{peer.name}: longest wait of a client while a snapshot of 1 TiB is made,"
        f" to {snapshots.DAEMON}'s",
        ours / theirs,
        SNAPSHOT_LATENCY_LIMIT,
        "times",
        {"ms": ours, f"{snapshots.DAEMON} ms": theirs},
    )


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise BenchError(f"{command[0]} is not installed") from None
    except subprocess.CalledProcessError as error:
        raise BenchError(f"{command[0]}: {error.stderr.strip()}") from None


_CLAIMS: Final[dict[str, Callable[[Peer, Path, int, float], Claim]]] = {
    FAIRNESS: claim_fairness,
    IDLE_MEMORY: claim_idle_memory,
    HUGE_MEMORY: claim_huge_memory,
    CONNECTIONS: claim_connections,
    STRUCTURED: claim_structured,
    STRUCTURED_FIO: claim_structured_fio,
    MAP: claim_map,
    SNAPSHOT_LATENCY: claim_snapshot_latency,
}
CLAIMS: Final = tuple(_CLAIMS)

_ONLY_OURS: Final = (
    CONNECTIONS,
    STRUCTURED,
    STRUCTURED_FIO,
    MAP,
    SNAPSHOT_LATENCY,
)


def run_claims(
    names: list[str], peer: Peer, directory: Path, nb_rounds: int, seconds: float
) -> list[Claim]:
    """Measure the figures that have limits of their own."""
    return [
        _CLAIMS[name](peer, directory, nb_rounds, seconds)
        for name in names
        if peer.name == OURS or name not in _ONLY_OURS
    ]

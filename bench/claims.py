"""Figures with limits of their own, outside the table of ratios."""

import resource
import shutil
import socket
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
    STRUCTURED_LIMIT,
    Claim,
    Disk,
    MiB,
)
from bench.load import run_cell, run_fairness
from bench.peers import PEERS, BenchError, Peer, Server, running
from bench.report import progress
from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd


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


def claim_structured(
    peer: Peer, directory: Path, nb_rounds: int, seconds: float
) -> Claim:
    """Measure what structured replies cost over simple ones."""
    cell = next(cell for cell in CELLS if cell.name == STRUCTURED_CELL)
    image = images.full_qcow2(directory)
    images.warm_up(image)
    options: dict[str, tuple[str, ...]] = {
        "structured": (),
        "simple": ("--no-structured-replies",),
    }
    rates: dict[str, list[float]] = {style: [] for style in options}
    for round_index in range(nb_rounds):
        for style, more in options.items():
            with running(peer, image, options=more) as server:
                sample = run_cell(cell, server, seconds, seed=1 + round_index)
            rates[style].append(sample.rate)
            progress(
                f"{STRUCTURED:26} round {round_index + 1} {style:10}"
                f" {sample.rate:10,.0f}/s  CPU {sample.cpu * 1e6:6.1f} us/op"
            )
    structured, simple = median(rates["structured"]), median(rates["simple"])
    return Claim(
        STRUCTURED,
        f"{peer.name}: cost of structured replies, 4 KiB reads, depth 16",
        (simple / structured - 1) * 100,
        STRUCTURED_LIMIT,
        "%",
        {"structured/s": structured, "simple/s": simple},
    )


def _attach(server: Server) -> socket.socket:
    """Return a connection in the transmission phase, made by hand."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(server.socket))
    replies = connection.makefile("rb")
    replies.read(codec.GREETING.size)
    go = codec.option_request(nbd.OPT_GO, codec.info_request(""))
    connection.sendall(codec.CLIENT_FLAGS.pack(3) + go)
    while True:
        head = replies.read(codec.OPTION_REPLY.size)
        _, _, reply, length = codec.OPTION_REPLY.unpack(head)
        replies.read(length)
        if reply == nbd.REP_ACK:
            return connection
        if reply != nbd.REP_INFO:
            raise BenchError(f"a connection was refused with {reply:#x}")


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
                stack.enter_context(_attach(server))
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
    MAP: claim_map,
    SNAPSHOT_LATENCY: claim_snapshot_latency,
}
CLAIMS: Final = tuple(_CLAIMS)

_ONLY_OURS: Final = (CONNECTIONS, STRUCTURED, MAP, SNAPSHOT_LATENCY)


def run_claims(
    names: list[str], peer: Peer, directory: Path, nb_rounds: int, seconds: float
) -> list[Claim]:
    """Measure the figures that have limits of their own."""
    return [
        _CLAIMS[name](peer, directory, nb_rounds, seconds)
        for name in names
        if peer.name == OURS or name not in _ONLY_OURS
    ]

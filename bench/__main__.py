"""``python -m bench``: our server and its peers, side by side.

Every round runs every server once, in turn, so that what the machine does
meanwhile hits all of them. Figures are medians over the rounds.
"""

import argparse
import dataclasses
import datetime
import fnmatch
import json
import os
import platform
import sys
from pathlib import Path
from statistics import median

from bench import images
from bench.cells import (
    CELLS,
    FAIRNESS,
    FAIRNESS_P99_SECONDS,
    HUGE_CACHE,
    HUGE_MEMORY,
    HUGE_MEMORY_LIMIT,
    IDLE_MEMORY,
    IDLE_MEMORY_LIMIT,
    OURS,
    Cell,
    Claim,
    Disk,
    MiB,
    Sample,
)
from bench.load import run_cell, run_fairness
from bench.peers import PEERS, BenchError, Peer, running
from bench.report import absolute_table, claim_table, ratio_table

CLAIMS = (FAIRNESS, IDLE_MEMORY, HUGE_MEMORY)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def prepare(cell: Cell, peer: Peer, directory: Path) -> Path:
    """Return the image for one run, in the state the cell wants."""
    if cell.disk is Disk.EMPTY:
        return images.fresh_empty(directory)
    if cell.disk is Disk.SUBCLUSTERS:
        return images.fresh_subclusters(directory)
    if cell.disk is Disk.OVERLAY:
        return images.fresh_overlay(directory)
    if cell.disk is Disk.HUGE:
        return images.huge_qcow2(directory)
    path = images.full_raw(directory) if peer.raw else images.full_qcow2(directory)
    images.write_back(path)
    return path


def run_rounds(
    cell: Cell, peers: list[Peer], directory: Path, nb_rounds: int, seconds: float
) -> dict[str, list[Sample]]:
    """Run one cell against every peer that it has a meaning for."""
    able = [p for p in peers if not (p.raw and cell.disk is not Disk.FULL)]
    samples: dict[str, list[Sample]] = {peer.name: [] for peer in able}
    images.warm_up(images.full_qcow2(directory))
    if any(peer.raw for peer in able):
        images.warm_up(images.full_raw(directory))
    cache = HUGE_CACHE if cell.disk is Disk.HUGE else None
    for round_index in range(nb_rounds):
        for peer in able:
            image = prepare(cell, peer, directory)
            with running(peer, image, l2_cache_size=cache, tls=cell.tls) as server:
                sample = run_cell(cell, server, seconds, seed=1 + round_index)
            samples[peer.name].append(sample)
            progress(
                f"{cell.name:26} round {round_index + 1} {peer.name:10}"
                f" {sample.rate:10,.0f}/s {sample.throughput / 1e6:7,.0f} MB/s"
                f" p99 {sample.p99 * 1e6:8,.0f} us  CPU {sample.cpu * 1e6:6.1f} us/op"
            )
    return samples


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


def claim_idle_memory(peer: Peer, directory: Path) -> Claim:
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


def claim_huge_memory(peer: Peer, directory: Path, seconds: float) -> Claim:
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


def run_claims(
    names: list[str], peer: Peer, directory: Path, nb_rounds: int, seconds: float
) -> list[Claim]:
    """Measure the figures that have limits of their own."""
    claims = []
    if FAIRNESS in names:
        claims.append(claim_fairness(peer, directory, nb_rounds, seconds))
    if IDLE_MEMORY in names:
        claims.append(claim_idle_memory(peer, directory))
    if HUGE_MEMORY in names:
        claims.append(claim_huge_memory(peer, directory, seconds))
    return claims


def machine() -> str:
    """Return a line on when and where this ran."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    today = datetime.datetime.now(tz=datetime.UTC).date()
    return (
        f"{today}, {os.cpu_count()} x {model}, Linux {platform.release()},"
        f" Python {platform.python_version()}"
    )


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Run our server and its peers side by side.",
        epilog=f"cells: {', '.join([c.name for c in CELLS] + list(CLAIMS))};"
        f" peers: {', '.join(p.name for p in PEERS)}",
    )
    default_dir = Path(os.environ.get("TMPDIR") or "var") / "bench"
    parser.add_argument(
        "--dir",
        type=Path,
        default=default_dir,
        help="where the images are kept (4 GiB; not a tmpfs); default %(default)s",
    )
    parser.add_argument("--rounds", type=int, help="default 5, with --quick 3")
    parser.add_argument("--seconds", type=float, help="default 3, with --quick 2")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 2 seconds")
    parser.add_argument("--cells", help="patterns, separated by commas: 'randread*'")
    parser.add_argument("--peers", help="names, separated by commas")
    parser.add_argument("--markdown", action="store_true", help="print markdown")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (3 if options.quick else 5)
    options.seconds = options.seconds or (2.0 if options.quick else 3.0)
    return options


def choose(
    options: argparse.Namespace,
) -> tuple[list[Cell], list[str], list[Peer]]:
    """Return the cells, the claims and the peers that are asked for."""
    patterns = options.cells.split(",") if options.cells else ["*"]

    def wanted(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    cells = [cell for cell in CELLS if wanted(cell.name)]
    claims = [name for name in CLAIMS if wanted(name)]
    if not cells and not claims:
        raise BenchError(f"no cell is named '{options.cells}'")
    names = options.peers.split(",") if options.peers else [p.name for p in PEERS]
    unknown = set(names) - {peer.name for peer in PEERS}
    if unknown:
        raise BenchError(f"no peer is named '{sorted(unknown)[0]}'")
    peers = [peer for peer in PEERS if peer.name in names]
    for peer in [peer for peer in peers if peer.missing()]:
        progress(f"{peer.name} is left out: {peer.program} is not installed")
        peers.remove(peer)
    if not peers:
        raise BenchError("no server to run")
    return cells, claims, peers


def run(options: argparse.Namespace) -> int:
    """Run what was asked for and print it; return the number of misses."""
    cells, claim_names, peers = choose(options)
    options.dir.mkdir(parents=True, exist_ok=True)
    directory = options.dir.resolve()
    results = {
        cell.name: run_rounds(cell, peers, directory, options.rounds, options.seconds)
        for cell in cells
    }
    claims = []
    for peer in peers:
        # The limits are ours to keep; another server is measured on request.
        if peer.name == OURS or (options.peers and not peer.raw):
            claims += run_claims(
                claim_names, peer, directory, options.rounds, options.seconds
            )
    for name in ("empty.qcow2", "overlay.qcow2"):
        (directory / name).unlink(missing_ok=True)

    others = [peer.name for peer in peers if peer.name != OURS]
    ratios, missed = ratio_table(cells, results, others)
    missed += [f"{claim.name}: {claim.text}" for claim in claims if not claim.met]
    tables = [absolute_table(cells, results), ratios, claim_table(claims)]
    print(f"{machine()}; {options.rounds} rounds of {options.seconds:g} s")
    for table in tables:
        if table.rows:
            print()
            print(table.markdown() if options.markdown else table.plain())
    for line in missed:
        progress(f"missed: {line}")
    if options.json:
        report = {
            "machine": machine(),
            "rounds": options.rounds,
            "seconds": options.seconds,
            "cells": {
                cell: {
                    peer: [dataclasses.asdict(sample) for sample in samples]
                    for peer, samples in by_peer.items()
                }
                for cell, by_peer in results.items()
            },
            "claims": [dataclasses.asdict(claim) for claim in claims],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return len(missed)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        run(options)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

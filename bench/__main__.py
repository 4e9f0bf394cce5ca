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

from bench import images
from bench.cells import CELLS, HUGE_CACHE, OURS, Cell, Disk, Sample
from bench.claims import CLAIMS, run_claims
from bench.load import run_cell
from bench.peers import PEERS, BenchError, Peer, running
from bench.report import absolute_table, claim_table, progress, ratio_table


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
    if cell.disk is Disk.LUKS:
        path = images.luks_qcow2(directory)
        images.warm_up(path)
        images.write_back(path)
        return path
    if cell.disk in (Disk.ZLIB, Disk.ZSTD):
        path = images.compressed_qcow2(directory, cell.disk.name.lower())
        images.warm_up(path)
        return path
    if cell.disk is Disk.QCOW1:
        path = images.full_qcow1(directory)
        images.warm_up(path)
    else:
        path = images.full_raw(directory) if peer.raw else images.full_qcow2(directory)
    images.write_back(path)
    return path


def run_rounds(
    cell: Cell, peers: list[Peer], directory: Path, nb_rounds: int, seconds: float
) -> dict[str, list[Sample]]:
    """Run one cell against every peer that it has a meaning for."""
    able = [p for p in peers if not (p.raw and cell.disk is not Disk.FULL)]
    samples: dict[str, list[Sample]] = {peer.name: [] for peer in able}
    secret = images.secret_file(directory) if cell.disk is Disk.LUKS else None
    if cell.disk in (Disk.FULL, Disk.OVERLAY):
        images.warm_up(images.full_qcow2(directory))
        if any(peer.raw for peer in able):
            images.warm_up(images.full_raw(directory))
    cache = HUGE_CACHE if cell.disk is Disk.HUGE else None
    # Memory that was never used costs many times more to write to, and whoever
    # comes first would pay for it: a round that does not count has it used.
    warm_ups = 1 if cell.nb_requests else 0
    for round_index in range(-warm_ups, nb_rounds):
        first = round_index % len(able) if able else 0
        for peer in able[first:] + able[:first]:
            image = prepare(cell, peer, directory)
            with running(
                peer, image, l2_cache_size=cache, tls=cell.tls, secret=secret
            ) as server:
                sample = run_cell(cell, server, seconds, seed=1 + round_index)
            if round_index < 0:
                continue
            samples[peer.name].append(sample)
            progress(
                f"{cell.name:26} round {round_index + 1} {peer.name:10}"
                f" {sample.rate:10,.0f}/s {sample.throughput / 1e6:7,.0f} MB/s"
                f" p99 {sample.p99 * 1e6:8,.0f} us  CPU {sample.cpu * 1e6:6.1f} us/op"
            )
    return samples


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
    for name in ("empty.qcow2", "overlay.qcow2", "subclusters.qcow2"):
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

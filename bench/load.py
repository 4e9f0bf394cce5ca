"""Loads: fio's nbd engine, run once against one server."""

import json
import os
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from bench.cells import Cell, KiB, MiB, Sample
from bench.peers import BenchError, Server


def _command(
    name: str, uri: str, rw: str, block: int, depth: int, *more: str
) -> list[str]:
    return [
        "fio",
        f"--name={name}",
        "--ioengine=nbd",
        f"--uri={uri}",
        f"--rw={rw}",
        f"--bs={block}",
        f"--iodepth={depth}",
        "--group_reporting",
        "--output-format=json",
        *more,
    ]


def _job(process: subprocess.Popen[str], direction: str) -> dict[str, Any]:
    """Wait for fio and return the figures of one direction."""
    output, errors = process.communicate()
    if process.returncode:
        lines = errors.strip().splitlines() or output.strip().splitlines()
        raise BenchError(f"fio: {lines[-1] if lines else 'failed without a word'}")
    # Warnings may come before the report.
    (job,) = json.loads(output[output.index("{") :])["jobs"]
    if job["error"]:
        raise BenchError(f"fio: error {job['error']} in {job['jobname']}")
    figures: dict[str, Any] = job[direction]
    return figures


def _start(command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
    except FileNotFoundError:
        raise BenchError("fio is not installed") from None


def _p99(figures: dict[str, Any]) -> float:
    return float(figures["clat_ns"]["percentile"]["99.000000"]) / 1e9


def run_cell(cell: Cell, server: Server, seconds: float, seed: int) -> Sample:
    """Run one cell's load; ``seed`` chooses the same offsets for every peer."""
    if cell.nb_requests:
        limits = [f"--io_size={cell.nb_requests * cell.block}"]
    else:
        limits = ["--time_based", f"--runtime={seconds}s"]
    command = _command(
        cell.name,
        server.uri,
        cell.rw,
        cell.block,
        cell.depth,
        f"--numjobs={cell.nb_connections}",
        f"--randseed={seed}",
        # A map of what was hit would cost fio memory and time on large disks.
        "--norandommap",
        *limits,
    )
    cpu_before = server.cpu_seconds()
    direction = "read" if cell.rw.endswith("read") else "write"
    figures = _job(_start(command, server.client_environment), direction)
    cpu = server.cpu_seconds() - cpu_before
    nb_requests = figures["total_ios"]
    if not nb_requests:
        raise BenchError(f"{cell.name}: not one request was answered")
    return Sample(
        rate=figures["iops"],
        throughput=figures["bw_bytes"],
        p99=_p99(figures),
        cpu=cpu / nb_requests,
    )


def run_fairness(server: Server, seconds: float) -> dict[str, float]:
    """Read 4 KiB at depth 1 while another client streams and flushes.

    Returns the reader's ``rate`` and ``p99`` and ``worst`` latency in seconds,
    and the writer's ``throughput`` in bytes a second.
    """
    lead = 0.5
    writer = _start(
        _command(
            "stream",
            server.uri,
            "write",
            MiB,
            8,
            "--fsync=64",
            "--time_based",
            f"--runtime={seconds + 2 * lead}s",
        ),
        server.client_environment,
    )
    time.sleep(lead)
    reader = _start(
        _command(
            "reader",
            server.uri,
            "randread",
            4 * KiB,
            1,
            "--norandommap",
            "--time_based",
            f"--runtime={seconds}s",
        ),
        server.client_environment,
    )
    reads = _job(reader, "read")
    writes = _job(writer, "write")
    return {
        "rate": reads["iops"],
        "p99": _p99(reads),
        "worst": reads["clat_ns"]["max"] / 1e9,
        "throughput": writes["bw_bytes"],
    }

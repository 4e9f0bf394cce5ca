"""``python -m bench.maps``: the map of a fragmented image, side by side.

`nbdinfo --map --totals` asks for the status of a 1 TiB image of which every
second cluster is allocated: 16 million extents. Its data clusters are holes of
the file, and qemu-nbd, which takes the image for preallocated, looks them up
there: an image full of data costs it less.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from bench import images
from bench.cells import OURS, QEMU
from bench.peers import PEERS, BenchError, running


def time_map(uri: str) -> float:
    """Return the seconds that a client takes for the whole map."""
    start = time.perf_counter()
    done = subprocess.run(
        ["nbdinfo", "--map", "--totals", uri], capture_output=True, text=True
    )
    if done.returncode:
        raise BenchError(done.stderr.strip())
    return time.perf_counter() - start


def main() -> int:
    """Print the median seconds of each server, and the ratio."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.maps", description="Map a fragmented image."
    )
    parser.add_argument("--dir", type=Path, default=Path("var/bench"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    peers = [peer for peer in PEERS if peer.name in (OURS, QEMU)]
    seconds: dict[str, list[float]] = {peer.name: [] for peer in peers}
    cpu: dict[str, list[float]] = {peer.name: [] for peer in peers}
    try:
        image = images.fragmented_qcow2(options.dir)
        for _ in range(options.rounds):
            for peer in peers:
                with running(peer, image) as server:
                    before = server.cpu_seconds()
                    seconds[peer.name].append(time_map(server.uri))
                    cpu[peer.name].append(server.cpu_seconds() - before)
    except (BenchError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    for name, found in seconds.items():
        print(f"{name:20} {median(found):6.2f} s, CPU {median(cpu[name]):6.2f} s")
    print(f"ratio of the speeds: {median(seconds[QEMU]) / median(seconds[OURS]):.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

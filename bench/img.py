"""``python -m bench.img``: commands of the image tool beside qemu-img.

Whole processes on the same files, page cache warm, in turns; of each the best
run counts. Smaller files with ``--scale`` for a machine with little room.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdqcow.units import GiB, MiB

_OURS: Final = [sys.executable, "-m", "nbdqcow.cli.img"]
_THEIRS: Final = ["qemu-img"]


@dataclass(frozen=True, slots=True)
class Row:
    """One command; ``theirs`` if qemu-img has better flags for it. ``wanted`` is
    how many times as fast as it we mean to be."""

    name: str
    ours: str
    wanted: float
    theirs: str | None = None


ROWS: Final = (
    Row("convert raw to qcow2, 50 % holes", "convert -O qcow2 half.raw out", 1.0),
    Row("convert qcow2 to raw, 50 % holes", "convert -O raw half.qcow2 out", 1.0),
    Row(
        "convert -c, text and binary",
        "convert -c -O qcow2 mixed.raw out",
        2.0,
        "convert -c -m 16 -W -O qcow2 mixed.raw out",
    ),
    Row("convert a compressed image to raw", "convert -O raw mixed.qcow2 out", 2.0),
    Row("compare equal images", "compare half.raw half.qcow2", 1.0),
    Row("map, fragmented", "map --output=json fragmented.qcow2", 1.0),
    Row("check, 16 Mi clusters (scale 1)", "check fragmented.qcow2", 1.0),
    Row("info", "info half.qcow2", 0.0),
)


def main() -> None:
    """Run the rows and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.img")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--directory", default=None, help="where the files go")
    parser.add_argument("--row", default="", help="only rows whose name has this")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        directory = Path(name)
        _make_files(directory, arguments.scale)
        print(f"{'':34} {'qemu-img':>9} {'ours':>9} {'times':>6} {'wanted':>6}")
        for row in ROWS:
            if arguments.row in row.name:
                _print_row(row, directory, arguments.runs)


def _print_row(row: Row, directory: Path, nb_runs: int) -> None:
    theirs, ours = [], []
    for _ in range(nb_runs):
        theirs.append(_time([*_THEIRS, *(row.theirs or row.ours).split()], directory))
        ours.append(_time([*_OURS, *row.ours.split()], directory))
    times = min(theirs) / min(ours)
    print(
        f"{row.name:34} {min(theirs):8.2f}s {min(ours):8.2f}s {times:6.2f} "
        f"{row.wanted:6.1f}",
        flush=True,
    )


def _time(command: list[str], directory: Path) -> float:
    (directory / "out").unlink(missing_ok=True)
    started = time.perf_counter()
    subprocess.run(
        command,
        cwd=directory,
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    return time.perf_counter() - started


def _make_files(directory: Path, scale: float) -> None:
    rng = random.Random(1)
    half = int(4 * GiB * scale) // (2 * MiB) * (2 * MiB)
    data = rng.randbytes(MiB)
    _write(directory / "half.raw", half, lambda index: b"" if index % 2 else data)
    words = [rng.randbytes(rng.randrange(2, 9)).hex() for _ in range(4000)]

    def mixed(index: int) -> bytes:
        if index % 4 == 3:
            return rng.randbytes(MiB)
        return " ".join(rng.choices(words, k=MiB // 8)).encode()[:MiB].ljust(MiB)

    _write(directory / "mixed.raw", int(GiB * scale) // MiB * MiB, mixed)

    def img(*given: str) -> None:
        subprocess.run([*_THEIRS, *given], cwd=directory, check=True)

    img("convert", "-O", "qcow2", "half.raw", "half.qcow2")
    img("convert", "-c", "-m", "16", "-W", "-O", "qcow2", "mixed.raw", "mixed.qcow2")
    _make_fragmented(directory / "fragmented.qcow2", int(1024 * GiB * scale))


def _write(path: Path, length: int, block: Callable[[int], bytes]) -> None:
    with path.open("wb") as file:
        file.truncate(length)
        for index in range(length // MiB):
            if data := block(index):
                file.seek(index * MiB)
                file.write(data)


def _make_fragmented(path: Path, size: int) -> None:
    """Make an image whose clusters are all mapped, to places in no order."""
    import numpy as np

    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata",
         path, str(size)],
        check=True,
    )  # fmt: skip
    rng = np.random.default_rng(1)
    with path.open("r+b") as file:
        head = file.read(48)
        file.seek(int.from_bytes(head[40:48]))
        l1 = np.frombuffer(file.read(8 * int.from_bytes(head[36:40])), ">u8")
        for entry in l1 & np.uint64(0x00FF_FFFF_FFFF_FE00):
            file.seek(int(entry))
            table = np.frombuffer(file.read(65536), ">u8")
            file.seek(int(entry))
            file.write(rng.permutation(table).astype(">u8").tobytes())


if __name__ == "__main__":
    if shutil.which("qemu-img") is None:
        sys.exit("qemu-img is not installed")
    main()

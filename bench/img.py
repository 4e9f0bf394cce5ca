"""``python -m bench.img``: commands of the image tool beside qemu-img.

Whole processes on the same files, page cache warm, in turns; of each the best
run counts. Ours begin with compiled modules, as those of an installed package
do, whatever the environment says. Beside the times: how long the file is that we
make, theirs is 1. Smaller files with ``--scale`` for a machine
with little room; only the files that the chosen rows need are made.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdqcow.units import GiB, MiB

_OURS: Final = [sys.executable, "-m", "nbdqcow.cli.img"]
_THEIRS: Final = ["qemu-img"]
_TREE: Final = Path(__file__).parents[1]

_MOST_OF_A_FILE: Final = 16 * MiB
_ENOUGH_SECONDS: Final = 30
"""A row that has taken so long is not run again."""


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
        "convert -c, words and noise",
        "convert -c -O qcow2 made.raw out",
        2.0,
        "convert -c -m 16 -W -O qcow2 made.raw out",
    ),
    Row(
        "convert -c, texts and programs",
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
        rows = [row for row in ROWS if arguments.row in row.name]
        _compile_modules(directory)
        _make_files(directory, arguments.scale, rows)
        print(
            f"{'':34} {'qemu-img':>9} {'ours':>9} {'times':>6} {'wanted':>6}"
            f" {'bytes':>6}"
        )
        for row in rows:
            _print_row(row, directory, arguments.runs)


def _print_row(row: Row, directory: Path, nb_runs: int) -> None:
    theirs: list[float] = []
    ours: list[float] = []
    size = ""
    out = directory / "out"
    while len(ours) < nb_runs and sum(theirs + ours) < _ENOUGH_SECONDS:
        theirs.append(_time([*_THEIRS, *(row.theirs or row.ours).split()], directory))
        their_length = out.stat().st_size if out.exists() else 0
        ours.append(_time([*_OURS, *row.ours.split()], directory))
        if their_length:
            size = f"{out.stat().st_size / their_length:.4f}"
    times = min(theirs) / min(ours)
    print(
        f"{row.name:34} {min(theirs):8.2f}s {min(ours):8.2f}s {times:6.2f} "
        f"{row.wanted:6.1f} {size:>6}",
        flush=True,
    )


def _time(command: list[str], directory: Path) -> float:
    (directory / "out").unlink(missing_ok=True)
    # What is written back meanwhile takes a processor from whoever uses both.
    os.sync()
    environment = _environment(directory)
    started = time.perf_counter()
    subprocess.run(
        command, cwd=directory, check=True, stdout=subprocess.DEVNULL, env=environment
    )
    return time.perf_counter() - started


def _environment(directory: Path) -> dict[str, str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(_TREE),
        "PYTHONPYCACHEPREFIX": str(directory / "pycache"),
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def _compile_modules(directory: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "compileall", "-q", _TREE / "nbdqcow"],
        check=True,
        env=_environment(directory),
    )
    # Those of Python itself, where they are not compiled already.
    _time([*_OURS, "--version"], directory)


def _make_files(directory: Path, scale: float, rows: Iterable[Row]) -> None:
    """Make the files that ``rows`` name, and what they are made from."""
    needed = {word for row in rows for word in row.ours.split()}
    if needed & {"half.raw", "half.qcow2"}:
        _make_half(directory / "half.raw", int(4 * GiB * scale))
        _img(directory, "convert -O qcow2 half.raw half.qcow2")
    if "made.raw" in needed:
        _make_made(directory / "made.raw", int(GiB * scale))
    if needed & {"mixed.raw", "mixed.qcow2"}:
        _make_mixed(directory / "mixed.raw", int(GiB * scale))
    if "mixed.qcow2" in needed:
        _img(directory, "convert -c -m 16 -W -O qcow2 mixed.raw mixed.qcow2")
    if "fragmented.qcow2" in needed:
        _make_fragmented(directory / "fragmented.qcow2", int(1024 * GiB * scale))


def _img(directory: Path, arguments: str) -> None:
    subprocess.run([*_THEIRS, *arguments.split()], cwd=directory, check=True)


def _make_half(path: Path, length: int) -> None:
    """Make a file of data and holes in turn, a MiB each."""
    data = random.Random(1).randbytes(MiB)
    with path.open("wb") as file:
        file.truncate(length)
        for offset in range(0, length - MiB + 1, 2 * MiB):
            file.seek(offset)
            file.write(data)


def _make_made(path: Path, length: int) -> None:
    """Make a file of which three quarters are words and the rest is noise: it is the
    same on every machine."""
    rng = random.Random(1)
    words = [rng.randbytes(rng.randrange(2, 9)).hex() for _ in range(4000)]
    text = " ".join(rng.choices(words, k=MiB)).encode()
    with path.open("wb") as file:
        for index in range(length // MiB):
            if index % 4 == 3:
                file.write(rng.randbytes(MiB))
            else:
                # No two clusters of the file are the same.
                start = rng.randrange(len(text) - MiB)
                file.write(text[start : start + MiB])


def _make_mixed(path: Path, length: int) -> None:
    """Make a file of this machine's texts and programs in turn, a MiB each."""
    texts, programs = _pieces(is_text=True), _pieces(is_text=False)
    with path.open("wb") as file:
        for _ in range(0, length, 2 * MiB):
            file.write(next(texts))
            file.write(next(programs))
        file.truncate(length)


def _pieces(*, is_text: bool) -> Iterator[bytes]:
    """Yield a MiB at a time of what there is, again and again."""
    held = bytearray()
    while True:
        for directory, directories, names in os.walk("/usr"):
            directories.sort()
            for name in sorted(names):
                path = os.path.join(directory, name)
                if os.path.islink(path) or not os.path.isfile(path):
                    continue
                with open(path, "rb") as file:
                    head = file.read(4096)
                    if head and (b"\0" not in head) == is_text:
                        held += head + file.read(_MOST_OF_A_FILE)
                while len(held) >= MiB:
                    yield bytes(held[:MiB])
                    del held[:MiB]


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
        # All tables in the same disorder: that takes a tenth of the time.
        order = rng.permutation(8192)
        for entry in l1 & np.uint64(0x00FF_FFFF_FFFF_FE00):
            file.seek(int(entry))
            table = np.frombuffer(file.read(65536), ">u8")
            file.seek(int(entry))
            file.write(table[order].tobytes())


if __name__ == "__main__":
    if shutil.which("qemu-img") is None:
        sys.exit("qemu-img is not installed")
    main()

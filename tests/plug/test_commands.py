"""Power cuts under the image tool's commands, and what their exit status 0 promises.

As in test_servers.py: whole programs, recorded from outside.
"""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import find_tool
from tests.plug.programs import (
    build_recorder,
    check,
    content,
    recorded,
    rounds,
    run,
    write_all,
)
from tests.plug.recording import NEVER, FileHistory, Recording, read_recording

KiB, MiB = 1 << 10, 1 << 20
NB_CUTS = 4

OPTIONS = ("", "cluster_size=4k", "compat=0.10", "extended_l2=on", "lazy_refcounts=on")


@pytest.fixture(scope="module")
def recorder(tmp_path_factory) -> Path:
    find_tool("gcc")
    find_tool("qemu-io")
    return build_recorder(tmp_path_factory.mktemp("recorder"))


def run_recorded(
    recorder: Path, directory: Path, words: list[str]
) -> tuple[Recording, subprocess.CompletedProcess[str]]:
    """Run a command of the image tool in ``directory``."""
    log = directory.with_name("log")
    program = "import sys; from nbdqcow.cli.img import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=directory,
        env=recorded(recorder, directory, log),
        capture_output=True,
        text=True,
        timeout=100,
    )
    return read_recording(log), done


# -- exit status 0 -----------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "create -f qcow2 -o data_file=new.data new 1M",
        "create -f raw -o preallocation=full new 1M",
        "convert -t writeback -O qcow2 old new",
        "convert -t none -O raw old new",
        "convert -t writeback -O qcow2 old there",
        "dd -O qcow2 if=old of=new",
        "dd -O raw if=old of=there",
    ],
)
def test_what_is_done_is_durable(words, tmp_path, recorder):
    """As much as with QEMU: whatever is not told to be unsafe, names included."""
    directory = tmp_path / "files"
    directory.mkdir()
    for name in ("old", "there"):
        (directory / name).write_bytes(os.urandom(64 * KiB) + bytes(64 * KiB))
    command, *rest = words.split()
    source = ["-f", "raw"] if "old" in rest else []
    recording, done = run_recorded(recorder, directory, [command, *source, *rest])
    assert done.returncode == 0, done.stderr
    for file, calls in recording.files.items():
        loose = [c.kind for c in calls if c.kind != "F" and c.durable_at == NEVER]
        assert not loose, f"{file}: {loose}"
    flushed = [c.begun for c in recording.calls_of(directory) if c.kind == "F"]
    for place, _, new in recording.renames:
        assert any(at > place for at in flushed), f"{new}: its name may be lost"


# -- power cuts ----------------------------------------------------------------------


def fill(image: Path, rnd: random.Random, image_format: str = "qcow2") -> None:
    size = image.stat().st_size
    if image_format != "raw":
        size = int.from_bytes(image.read_bytes()[24:32], "big")
    words = []
    for _ in range(8):
        length = min(rnd.choice((4, 64, 200)) * KiB, size)
        offset = rnd.randrange((size - length) // 4096 + 1) * 4096
        kind = rnd.choice(("write -P 1", "write -P 2", "write -z", "write -z -u"))
        words += ["-c", f"{kind} {offset} {length}"]
    run("qemu-io", "-f", image_format, "-d", "unmap", *words, image)


def make(
    directory: Path,
    name: str,
    rnd: random.Random,
    *,
    base: str = "",
    options: tuple[str, ...] = OPTIONS,
    size: int = MiB,
) -> None:
    words = ["-b", str(directory / base), "-F", "qcow2"] if base else []
    if chosen := rnd.choice(options):
        words += ["-o", chosen]
    image = directory / name
    run("qemu-img", "create", "-q", "-f", "qcow2", *words, image, size)
    fill(image, rnd)


def commit(directory: Path, rnd: random.Random) -> list[str]:
    make(directory, "base", rnd, size=rnd.choice((MiB, MiB // 2)))
    make(directory, "top", rnd, base="base")
    return ["commit", *rnd.choice(([], [], ["-d"])), "top"]


def rebase(directory: Path, rnd: random.Random) -> list[str]:
    make(directory, "base", rnd)
    make(directory, "other", rnd, size=rnd.choice((MiB, MiB // 2)))
    make(directory, "middle", rnd, base="base")
    make(directory, "top", rnd, base="middle")
    new = rnd.choice(("base", "other", ""))
    if not new:
        return ["rebase", "-b", "", "top"]
    return ["rebase", "-b", str(directory / new), "-F", "qcow2", "top"]


def resize(directory: Path, rnd: random.Random) -> list[str]:
    make(directory, "top", rnd)
    size = rnd.choice((64 * MiB, MiB + 512, MiB - 64 * KiB, 512, 4 * MiB))
    words = []
    if size == 4 * MiB:
        mode = rnd.choice(("metadata", "falloc", "full"))
        words = [f"--preallocation={mode}"]
    return ["resize", *words, "--shrink", "top", str(size)]


def snapshot(directory: Path, rnd: random.Random) -> list[str]:
    make(directory, "top", rnd)
    for name in ("one", "two"):
        run("qemu-img", "snapshot", "-c", name, directory / "top")
        fill(directory / "top", rnd)
    action = rnd.choice((["-c", "three"], ["-a", "one"], ["-d", "one"], ["-d", "two"]))
    return ["snapshot", *action, "top"]


def amend(directory: Path, rnd: random.Random) -> list[str]:
    make(directory, "top", rnd, options=("", "cluster_size=4k", "compat=0.10"))
    if rnd.random() < 0.5:
        run("qemu-img", "snapshot", "-c", "one", directory / "top")
        fill(directory / "top", rnd)
    option = rnd.choice(
        (
            *("compat=0.10", "compat=1.1", "compat=1.1,refcount_bits=64"),
            *("compat=1.1,refcount_bits=8", "compat=1.1,lazy_refcounts=on"),
        )
    )
    return ["amend", "-f", "qcow2", "-o", option, "top"]


def bitmap(directory: Path, rnd: random.Random) -> list[str]:
    make(directory, "top", rnd, options=("", "cluster_size=4k", "extended_l2=on"))
    for name in ("b", "c"):
        run("qemu-img", "bitmap", "--add", directory / "top", name)
        fill(directory / "top", rnd)
    actions = ("--remove top b", "--clear top b", "--merge c top b", "--add top d")
    return ["bitmap", *rnd.choice(actions).split()]


def repair(directory: Path, rnd: random.Random) -> list[str]:
    """Refcounts that are wrong, at random."""
    make(directory, "top", rnd, options=("", "cluster_size=4k", "compat=0.10"))
    with open(directory / "top", "r+b") as file:
        data = bytearray(file.read())
        table = int.from_bytes(data[48:56], "big")
        block = int.from_bytes(data[table : table + 8], "big")
        for _ in range(rnd.choice((1, 5, 20))):
            data[block + rnd.randrange(64)] ^= 1
        file.seek(0)
        file.write(data)
    return ["check", "-q", "-r", "all", "top"]


COMMANDS: tuple[Callable[[Path, random.Random], list[str]], ...] = (
    *(commit, rebase, resize, snapshot, amend, bitmap, repair),
)


@dataclass(slots=True)
class Image:
    """The image that a command works on, before and after it."""

    path: Path
    before: bytes
    after: bytes

    def look(self, command: str, *, at_end: bool, done: bool) -> None:
        """See that the disk is the old or the new one; at the end the new one."""
        # While it is being repaired it may be as wrong as it was.
        if command != "repair" or (at_end and done):
            for path in sorted(self.path.parent.iterdir()):
                check(path, "qcow2")
        disk = content(self.path, "qcow2")
        if at_end:
            assert disk == self.after, "the end is not durable"
        assert disk in (self.before, self.after), "the disk is neither old nor new"


def cut_power(
    prepare: Callable[[Path, random.Random], list[str]],
    directory: Path,
    recorder: Path,
    seed: int,
    nb_cuts: int,
) -> str:
    rnd = random.Random(seed)
    files = directory / "files"
    files.mkdir()
    words = prepare(files, rnd)
    before = {path: path.read_bytes() for path in files.iterdir()}
    image = files / "top"
    old = content(image, "qcow2")
    recording, done = run_recorded(recorder, files, words)
    assert "Traceback" not in done.stderr, done.stderr
    histories = {
        path: FileHistory(data, recording.calls_of(path))
        for path, data in before.items()
    }
    for path, history in histories.items():
        assert path.read_bytes() == history.last, f"{path}: not all was recorded"
    look = Image(image, old, content(image, "qcow2")).look
    end = recording.nb_records
    cuts = {*rnd.sample(range(end + 1), min(nb_cuts, end + 1)), end}
    nb_disks = 0
    for cut in sorted(cuts):
        for style in ("mixed", rnd.choice(("old", "new"))):
            write_all({p: h.file_at(cut, style, rnd) for p, h in histories.items()})
            try:
                look(
                    prepare.__name__,
                    at_end=cut == end,
                    done=done.returncode == 0,
                )
            except AssertionError as error:
                error.add_note(f"{words}: {style} disk of cut {cut} of {end}")
                raise
            nb_disks += 1
    return f"plugs of commands: {words[0]}, {nb_disks} disks of {len(cuts)} cuts"


@pytest.mark.parametrize("prepare", COMMANDS)
def test_power_cuts(prepare, tmp_path, recorder, seed, figures):
    figures(cut_power(prepare, tmp_path, recorder, seed, NB_CUTS))


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("prepare", COMMANDS)
def test_many_power_cuts(prepare, tmp_path, recorder, seed, figures):
    for number, directory in rounds(tmp_path):
        figures(cut_power(prepare, directory, recorder, seed + number, 4 * NB_CUTS))

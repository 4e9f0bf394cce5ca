"""Power cuts under the servers as they are: whole programs, on a real file.

A client of several connections sends random requests while `recorder.c` writes down
what reaches the file and what the client is told. Then the plug is pulled at some of
the places in that order, and QEMU looks at what may be left.
"""

import contextlib
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import find_tool, wait_until_listening
from tests.nbd_client import CMD_FLAG_FUA, CMD_FLUSH, NbdClient
from tests.plug.client import Client, Model, Request
from tests.plug.programs import (
    SECRET,
    build_recorder,
    check,
    content,
    image_words,
    recorded,
    rounds,
    run,
    write_all,
)
from tests.plug.recording import (
    MAPPED,
    NEVER,
    FileHistory,
    Recording,
    note_kill,
    read_recording,
)

KiB, MiB = 1 << 10, 1 << 20
NB_REQUESTS, NB_CUTS = 120, 3

MIXED = "wwwwwwzztf"
SMALL_WRITES = "w" * 40 + "f"


@dataclass(frozen=True)
class Case:
    """An image and how it is served.

    ``commands``, ``max_length``: see `Client`. ``patch``: what is run in the server
    first.
    """

    name: str
    options: str = ""
    format: str = "qcow2"
    size: int = 4 * MiB
    backing: bool = False
    luks: bool = False
    compressed: bool = False
    snapshot: bool = False
    bitmap: bool = False
    qemu_options: tuple[str, ...] | None = None
    commands: str = MIXED
    max_length: int = 96 * KiB
    patch: str = ""

    def __str__(self) -> str:
        return self.name


# Mapped overwrites, on whatever file system and kernel, from the first one on.
OVERWRITES = """
from nbdqcow.storage import inline_file, overwrite
inline_file.overwrite_pays = lambda fd: True
overwrite.MIN_WRITES = 0
"""
LUKS = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
UNMAP = ("--discard=unmap",)

CASES = [
    Case("small_clusters", "cluster_size=512", size=2 * MiB, max_length=16 * KiB),
    Case("old_overlay", "compat=0.10,cluster_size=4k", backing=True),
    Case("subclusters", "extended_l2=on,cluster_size=16k", backing=True),
    Case("lazy", "lazy_refcounts=on,cluster_size=4k"),
    Case("data_file", "data_file=data,cluster_size=4k"),
    Case("luks", LUKS + ",cluster_size=4k", luks=True),
    Case("qcow1", format="qcow", backing=True),
    Case("bitmap", "cluster_size=4k", bitmap=True, snapshot=True),
    Case("direct", "cluster_size=4k", qemu_options=(*UNMAP, "--cache=none")),
    Case("mapped", commands=SMALL_WRITES, max_length=8 * KiB, patch=OVERWRITES),
]
MORE_CASES = [
    Case("default"),
    Case("large_clusters", "cluster_size=2M", size=64 * MiB),
    Case("narrow_counts", "refcount_bits=1,cluster_size=4k"),
    Case("raw_data_file", "data_file=data,data_file_raw=on"),
    Case("compressed", compressed=True),
    Case("compressed_small", "cluster_size=4k", compressed=True),
    Case("snapshot", snapshot=True),
    Case("raw", format="raw"),
    Case("raw_direct", format="raw", qemu_options=(*UNMAP, "--cache=none")),
    Case("raw_direct_sync", format="raw", qemu_options=("--cache=directsync",)),
    Case("raw_mapped", format="raw", commands=SMALL_WRITES, patch=OVERWRITES),
    Case(
        "write_through",
        "cluster_size=4k",
        qemu_options=(*UNMAP, "--cache=writethrough"),
    ),
    Case(
        "detect_zeroes",
        "cluster_size=4k",
        qemu_options=(*UNMAP, "--detect-zeroes=unmap"),
    ),
]


@pytest.fixture(scope="module")
def recorder(tmp_path_factory) -> Path:
    find_tool("gcc")
    find_tool("qemu-img")
    return build_recorder(tmp_path_factory.mktemp("recorder"))


def make_image(case: Case, directory: Path) -> Path:
    image, old = directory / "disk", directory.parent / "old"
    old.write_bytes(b"".join(b"%8d" % (i // 3) * 64 for i in range(case.size // KiB)))
    os.truncate(old, case.size)
    options = case.options.replace("=data", f"={directory / 'data'}")
    words = ["-o", options] if options else []
    if case.backing:
        base = directory / "base"
        old.rename(base)
        words += ["-b", str(base), "-F", "raw"]
    if case.compressed or case.snapshot or case.format == "raw":
        words += ["-c"] if case.compressed else []
        run("qemu-img", "convert", "-O", case.format, "-f", "raw", *words, old, image)
    else:
        words += SECRET if case.luks else []
        run("qemu-img", "create", "-q", "-f", case.format, *words, image, case.size)
    if case.snapshot:
        run("qemu-img", "snapshot", "-c", "one", image)
    if case.bitmap:
        run("qemu-img", "bitmap", "--add", image, "b")
    return image


@contextlib.contextmanager
def served(
    case: Case, image: Path, environment: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Yield a server's process, and the socket that it listens on."""
    with tempfile.TemporaryDirectory(prefix="nbdq-") as directory:
        socket = Path(directory) / "s"
        if case.luks or case.qemu_options is not None:
            module = "nbdqcow.cli.nbd"
            words = ["-t", "-e0", "-k", str(socket), *(case.qemu_options or UNMAP)]
            words += image_words(image, case.format, luks=case.luks)
        else:
            module = "nbdqcow.cli.main"
            words = ["serve", str(image), "--unix", str(socket)]
            words += ["--format", case.format]
        program = f"{case.patch}\nimport sys\nfrom {module} import main\n"
        program += "sys.argv[0] = 'nbdqcow'\nsys.exit(main())"
        process = subprocess.Popen(
            [sys.executable, "-c", program, *words],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            wait_until_listening(socket, process)
            yield process, socket
        finally:
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()


@dataclass(slots=True)
class Played:
    """What a server was asked to do, and what it did."""

    case: Case
    image: Path
    histories: dict[Path, FileHistory]
    recording: Recording
    client: Client
    model: Model
    base: bytes
    status: int
    errors: str

    def pull_the_plug(self, nb_cuts: int, rnd: random.Random) -> int:
        """Look at disks of so many cuts, and of the end; return how many."""
        places = [at for at, _ in self.recording.replies.values()]
        for calls in self.recording.files.values():
            for call in calls:
                if call.kind == "F" and call.ended < NEVER:
                    places += [call.begun, call.ended] * 4
        end = self.recording.nb_records
        cuts = {min(rnd.choice(places) + rnd.randrange(6), end) for _ in range(nb_cuts)}
        nb_disks = 0
        for cut in sorted(cuts | {end}):
            for style in ("mixed", rnd.choice(("old", "new"))):
                write_all(
                    {p: h.file_at(cut, style, rnd) for p, h in self.histories.items()}
                )
                try:
                    self._look(cut)
                except AssertionError as error:
                    error.add_note(f"{self.case}: {style} disk of cut {cut} of {end}")
                    raise
                nb_disks += 1
        return nb_disks

    def _look(self, cut: int) -> None:
        case = self.case
        check(self.image, case.format, luks=case.luks)
        disk = content(self.image, case.format, luks=case.luks)
        problems = self.model.problems(disk, cut)
        if case.bitmap:
            problems += unmarked(self.image.read_bytes(), self.base, disk)
        assert not problems, "\n".join([f"{len(problems)} problems", *problems[:5]])


def play(
    case: Case,
    directory: Path,
    recorder: Path,
    rnd: random.Random,
    nb_requests: int,
    fail: str = "",
    nb_killed: int = 0,
) -> Played:
    """Let a client work on a server until it is told to end; before that on one that
    is killed after ``nb_killed`` requests."""
    files = directory / "files"
    files.mkdir()
    image, log = make_image(case, files), directory / "log"
    before = {path: path.read_bytes() for path in files.iterdir()}
    base = content(image, case.format, luks=case.luks)
    environment = recorded(recorder, files, log, fail=fail)
    requests: list[Request] | None = None
    kill = None
    if nb_killed:
        requests = []
        with served(case, image, environment) as (_, socket):
            client = Client(socket, log, rnd, case.commands, case.max_length, requests)
            client.run(nb_killed, wait=False)
        client.close()
        kill = note_kill(log, files)
    with served(case, image, environment) as (process, socket):
        client = Client(socket, log, rnd, case.commands, case.max_length, requests)
        with contextlib.closing(client):
            client.run(nb_killed + nb_requests)
            if rnd.random() < 0.5:
                client.disconnect()
            process.send_signal(signal.SIGTERM)
            errors = process.communicate(timeout=100)[1].decode()
    recording = read_recording(log, kill)
    histories = {
        path: FileHistory(data, recording.calls_of(path))
        for path, data in before.items()
    }
    for path, history in histories.items():
        assert path.read_bytes() == history.last, f"{path}: not all was recorded"
    below = (files / "base").read_bytes() if case.backing else b""
    write_through = any(
        mode in (case.qemu_options or ())
        for mode in ("--cache=writethrough", "--cache=directsync")
    )
    model = Model(
        base, below, client.requests, recording,
        write_through=write_through, nb_killed=nb_killed,
    )  # fmt: skip
    assert "Traceback" not in errors, errors
    return Played(
        case, image, histories, recording, client, model, base,
        process.returncode, errors,
    )  # fmt: skip


def unmarked(file: bytes, base: bytes, disk: bytes) -> list[str]:
    """Return what was written of a disk and is not marked in its one bitmap, if that
    one is to be trusted. Source: qcow2.txt, "Bitmaps"."""
    size = 1 << int.from_bytes(file[20:24], "big")
    position = int.from_bytes(file[100:104], "big")
    kind, length = struct.unpack_from(">II", file, position)
    while kind != 0x23852875:
        assert kind, "the image has lost its bitmaps"
        position += 8 + (length + 7) // 8 * 8
        kind, length = struct.unpack_from(">II", file, position)
    (directory,) = struct.unpack_from(">Q", file, position + 24)
    table, nb_entries, flags, _, bits = struct.unpack_from(">QIIBB", file, directory)
    if flags & 1 or not file[95] & 1:
        return []
    marks = b""
    for entry in struct.unpack_from(f">{nb_entries}Q", file, table):
        start = entry & 0x00FF_FFFF_FFFF_FE00
        filler = (b"\xff" if entry & 1 else b"\0") * size
        marks += file[start : start + size] if start else filler
    return [
        f"{index << bits:#x} was written and is not marked"
        for index in range(len(base) >> bits)
        if base[index << bits : (index + 1) << bits]
        != disk[index << bits : (index + 1) << bits]
        and not marks[index >> 3] >> (index & 7) & 1
    ]


# -- tests -----------------------------------------------------------------------


def cut_power(
    case: Case, directory: Path, recorder: Path, seed: int, size: int,
    *, after_kill: bool = False,
) -> str:  # fmt: skip
    """Return what was explored; ``size`` times as much as for a short test.

    ``after_kill``: of a server that goes on with the image of one that was killed at
    work.
    """
    rnd = random.Random(seed)
    nb_requests, nb_killed = NB_REQUESTS * size, 0
    if after_kill:
        nb_requests, nb_killed = nb_requests // 2, rnd.randrange(1, NB_REQUESTS)
    played = play(case, directory, recorder, rnd, nb_requests, nb_killed=nb_killed)
    assert played.status == 0, played.errors
    assert not any(r.error for r in played.client.requests)
    if case.patch == OVERWRITES:
        calls = played.recording.calls_of(played.image)
        assert any(call.flags == MAPPED for call in calls if call.kind == "W")
    nb_disks = played.pull_the_plug(NB_CUTS * size, rnd)
    kind = "plugs after kills" if after_kill else "plugs"
    return f"{kind}: {case}, {nb_disks} disks of {NB_CUTS * size + 1} cuts"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_power_cuts(case, tmp_path, recorder, seed, figures):
    figures(cut_power(case, tmp_path, recorder, seed, 1))


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("case", CASES + MORE_CASES, ids=str)
def test_many_power_cuts(case, tmp_path, recorder, seed, figures):
    for number, directory in rounds(tmp_path):
        figures(cut_power(case, directory, recorder, seed + number, 3))


@pytest.mark.parametrize(
    "case",
    [
        Case("default"),
        Case("data_file", "data_file=data"),
        Case("qcow1", format="qcow"),
        Case("raw", format="raw"),
        Case("raw_direct", format="raw", qemu_options=("--cache=none",)),
    ],
    ids=str,
)
def test_a_flush_covers_what_a_killed_server_wrote(case, tmp_path, recorder, seed):
    """Its clients come back, and ask for a flush of what it had answered."""
    rnd = random.Random(seed)
    files = tmp_path / "files"
    files.mkdir()
    image, log = make_image(case, files), tmp_path / "log"
    before = {path: path.read_bytes() for path in files.iterdir()}
    environment = recorded(recorder, files, log)
    with served(case, image, environment) as (_, socket):
        client = Client(socket, log, rnd, "w", 32 * KiB)
        with contextlib.closing(client):
            client.run(40)
    with (
        served(case, image, environment) as (_, socket),
        contextlib.closing(NbdClient(socket)) as connection,
    ):
        assert connection.request(CMD_FLUSH).error == 0
    recording = read_recording(log)
    # The tables of an image with a data file may not have been written yet.
    assert any(call.kind == "W" for path in before for call in recording.calls_of(path))
    for path, data in before.items():
        calls = recording.calls_of(path)
        history = FileHistory(data, calls)
        assert path.read_bytes() == history.last
        assert history.file_at(recording.nb_records, "old", rnd) == history.last


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_power_cuts_after_a_kill(case, tmp_path, recorder, seed, figures):
    figures(cut_power(case, tmp_path, recorder, seed, 1, after_kill=True))


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("case", CASES + MORE_CASES, ids=str)
def test_many_power_cuts_after_kills(case, tmp_path, recorder, seed, figures):
    for number, directory in rounds(tmp_path):
        figures(cut_power(case, directory, recorder, seed + number, 2, after_kill=True))


def fail_a_call(
    case: Case, kinds: str, directory: Path, recorder: Path, seed: int
) -> str:
    """Let system calls of some kinds fail, then cut power."""
    rnd = random.Random(seed)
    first = rnd.randrange({"F": 12, "A": 8}.get(kinds, 120)) + 1
    if kinds == "F" and case.format == "qcow2":
        # Not those at opening, after which there would be no server. The last of
        # them is for the marks of bitmaps in use.
        first += 3 if case.bitmap else 1
    error, count = rnd.choice((5, 28)), rnd.choice((1, 3, 1 << 30))
    fail = f"{kinds}:{first}:{error}:{count}"
    played = play(case, directory, recorder, rnd, NB_REQUESTS, fail)
    errors = {r.error for r in played.client.requests if r.error}
    assert errors <= {error}, f"{fail}: the client was told {errors}"
    for request in played.client.requests:
        # Those on their way may have been covered before.
        if request.log_length < played.recording.lost_at:
            continue
        if request.command == CMD_FLUSH or request.flags & CMD_FLAG_FUA:
            assert request.error, f"{fail}: {request} did not fail after a loss"
    nb_disks = played.pull_the_plug(NB_CUTS, rnd)
    return f"plugs after faults: {case} {fail}, {nb_disks} disks of {NB_CUTS + 1} cuts"


FAILING = [
    (Case("default"), "F"),
    (Case("small_clusters", "cluster_size=4k"), "WA"),
    (Case("data_file", "data_file=data"), "F"),
]


@pytest.mark.parametrize(("case", "kinds"), FAILING, ids=str)
def test_failing_calls(case, kinds, tmp_path, recorder, seed, figures):
    figures(fail_a_call(case, kinds, tmp_path, recorder, seed))


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("case", CASES + MORE_CASES, ids=str)
def test_many_failing_calls(case, tmp_path, recorder, seed, figures):
    for number, directory in rounds(tmp_path):
        kinds = ("F", "W", "A", "WA")[number % 4]
        figures(fail_a_call(case, kinds, directory, recorder, seed + number))


def test_what_can_not_be_flushed_is_not_opened(tmp_path, recorder):
    """Who knows what a killed program had written that is lost now."""
    files = tmp_path / "files"
    files.mkdir()
    image = make_image(Case("default"), files)
    done = subprocess.run(
        [sys.executable, "-m", "nbdqcow", "serve", image, "--unix", tmp_path / "s"],
        env=recorded(recorder, files, tmp_path / "log", fail="F:1:5:1"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "Input/output error" in done.stderr
    assert str(image) in done.stderr
    assert done.stderr.count("\n") == 1


# -- mutants ---------------------------------------------------------------------

MUTANTS = {
    "flushes that skip the file": """
from nbdqcow.storage.file import FileStorage
FileStorage._sync_blocking = lambda self: None
""",
    "mapped writes that no flush knows of": OVERWRITES
    + """
from nbdqcow.storage.inline_file import InlineFile
def note(self, started, end, nb_written):
    self.length = max(self.length, end)
InlineFile._note_inline_write = note
""",
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_server_is_caught(name, tmp_path, recorder, seed):
    case = Case(
        name, format="raw", commands=SMALL_WRITES, max_length=8 * KiB,
        patch=MUTANTS[name],
    )  # fmt: skip
    rnd = random.Random(seed)
    played = play(case, tmp_path, recorder, rnd, NB_REQUESTS)
    with pytest.raises(AssertionError, match="problems"):
        played.pull_the_plug(10 * NB_CUTS, rnd)


def test_a_forgotten_loss_is_caught(tmp_path, recorder, seed):
    patch = """
from nbdqcow.storage.file import FileStorage
FileStorage._fail_syncs = lambda self, error: error
"""
    case = Case("forgetful", commands="wwwwf", patch=patch)

    def play_and_cut(nth: int) -> None:
        # A sync that covers one table only may fail unseen: that is written again.
        directory = tmp_path / str(nth)
        directory.mkdir()
        rnd = random.Random(seed + nth)
        played = play(case, directory, recorder, rnd, NB_REQUESTS, f"F:{nth}:5:1")
        played.pull_the_plug(10 * NB_CUTS, rnd)

    with pytest.raises(AssertionError, match=r"problems|errors were found"):
        for nth in range(2, 12):
            play_and_cut(nth)

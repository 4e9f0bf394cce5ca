"""``python -m tests.iotests [OPTION ...] [NAME ...]``: QEMU's own block tests.

They (QEMU's ``tests/qemu-iotests``) are run with our programs in the place of
qemu-img and qemu-nbd; what does not pass is run with QEMU's programs, too. On one
machine it has to end alike, for some tests fail there with either; `KNOWN` has the
exceptions with their reasons. The tests themselves are fetched
(`tools/iotests-sources.sh`) and not a part of this project. Takes half an hour for
qcow2.

``--protocol nbd`` puts the images behind qemu-nbd, ``fuse`` behind a FUSE export of
QEMU's, ``--options compat=0.10`` makes them with these options of ``qemu-img
create``; most tests can do with that.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from threading import get_ident
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parent.parent
SOURCES: Final = REPOSITORY / "var/iotests"
FORMATS: Final = ("qcow2", "qcow", "raw", "luks")
TIMEOUT: Final = 300.0
"""Seconds for one test."""

_PREFIX: Final = "iot-"
"""Of temporary directories' names."""

_FAULTS: Final = "blkdebug: other steps fail, and leave a sound image"
_EVENTS: Final = "on a busy machine QEMU's events are others, or in another order"
_REBUILT: Final = (
    "refcount blocks that can't be are made anew, behind the end of the file; QEMU "
    "lets the file grow over them, or refuses to shrink the disk"
)

KNOWN: Final[Mapping[str, str]] = {
    "055": "makes a vmdk image",
    "060": f"damages what QEMU has at fixed places after a snapshot; {_REBUILT}",
    "080": (
        "a snapshot that can't be taken leaks nothing, and one that is damaged keeps "
        "an image from being opened for writing, where QEMU's writes fail"
    ),
    "098": _FAULTS,
    "108": _REBUILT,
    "110": "asks for QEMU's quorum driver",
    "112": "a snapshot that fails leaks nothing; other steps of -p",
    "113": "reads a bochs image",
    "127": _EVENTS,
    "144": _EVENTS,
    "148": "asks for QEMU's quorum driver",
    "162": "asks for QEMU's ssh driver",
    "184": "asks for QEMU's throttle driver",
    "194": _EVENTS,
    "217": _FAULTS,
    "233": (
        "failures of TLS are in OpenSSL's words, and TLS-PSK needs Python 3.13; info "
        "shows credentials; a client that may not use an export is told so"
    ),
    "241": (
        "an export has the size of its file; QEMU's is a multiple of 512, so that a "
        "copy of it is longer, and writing there makes the file longer"
    ),
    "261": (
        "damage reaches from a snapshot table into the next cluster, which with QEMU "
        "is free and with ours is in use: tables are at other places"
    ),
    "271": f"tables are at other places after a snapshot; {_REBUILT}",
    "274": (
        "a disk that grows hides what its backing file has, and no more; clusters "
        "that are preallocated for that are holes of the file, not zero clusters"
    ),
    "280": _EVENTS,
    "282": "a file that is there stays when creating an image in it fails",
    "301": "qcow: vmdk and its words; a commit that is refused says why",
    "312": "asks for QEMU's quorum driver",
}
"""What does not pass with ours, and why: some on purpose, some not yet."""

_TCG: Final = """\
#!/bin/bash
# Distributions build QEMU without the qtest accelerator: another stands for it.
arguments=()
for argument in "$@"; do
    [ "$argument" = qtest ] && argument=tcg
    arguments+=("$argument")
done
exec -a qemu-system-x86_64 "$QEMU_REAL" "${arguments[@]}"
"""


_CHANGES: Final = (
    # A busy machine takes longer than a second to start a server.
    (
        "common.rc",
        "sleep 1 # FIXME: qemu-nbd needs to be listening before we continue",
        """\
while [ ! -S "$SOCK_DIR/nbd" ] && kill -0 $! 2>/dev/null; do sleep 0.1; done""",
    ),
    # The server takes the format apart, and qemu-io is told to do it once more.
    (
        "testenv.py",
        "' -f ' + self.imgfmt",
        "' -f ' + ('raw' if self.imgproto == 'nbd' else self.imgfmt)",
    ),
)
"""What has to be otherwise in the tests: a file, a text in it and the new one."""


class Outcome(Enum):
    """How a test ended; its value is what is printed."""

    PASSED = "pass"
    FAILED = "fail"
    NOT_RUN = "not run"
    TIMED_OUT = "timeout"
    SAME = "fails in the same way with QEMU's programs"


class Programs:
    """The programs that the tests are to use, as environment variables."""

    def __init__(self, directory: Path) -> None:
        qemu = _find("qemu-system-x86_64")
        self.qemus = {
            "QEMU_PROG": qemu,
            "QEMU_IO_PROG": _find("qemu-io"),
            "QSD_PROG": _find("qemu-storage-daemon"),
            "QEMU_IMG_PROG": _find("qemu-img"),
            "QEMU_NBD_PROG": _find("qemu-nbd"),
            "QEMU_REAL": qemu,
        }
        accelerators = subprocess.check_output([qemu, "-accel", "help"], text=True)
        if "qtest" not in accelerators.split():
            wrapper = directory / Path(qemu).name  # The tests look for it in messages.
            wrapper.write_text(_TCG)
            wrapper.chmod(0o755)
            self.qemus["QEMU_PROG"] = str(wrapper)
        self.ours = dict(self.qemus)
        for variable, name, script in (
            ("QEMU_IMG_PROG", "qemu-img", "nbdqcow-img"),
            ("QEMU_NBD_PROG", "qemu-nbd", "nbdqcow-nbd"),
        ):
            link = directory / name
            link.symlink_to(Path(sys.executable).parent / script)
            self.ours[variable] = str(link)


def _find(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise SystemExit(f"iotests: {program} is needed (`make test` installs it)")
    return path


def run(
    name: str, how: Sequence[str], programs: Mapping[str, str], work: Path
) -> tuple[Outcome, str]:
    """Run one test in a directory of its own; returns what it printed, too.

    ``how`` are options of `check`.
    """
    # A copy for each thread: some tests write beside themselves.
    sources = work / f"sources-{get_ident()}"
    if not sources.exists():
        shutil.copytree(SOURCES, sources, symlinks=True)
        for file_name, old, new in _CHANGES:
            changed = sources / "tests/qemu-iotests" / file_name
            text = changed.read_text()
            assert old in text
            changed.write_text(text.replace(old, new))
    with (
        tempfile.TemporaryDirectory(prefix=_PREFIX, dir=work) as directory,
        _cleared(directory),
    ):
        scratch, sockets = Path(directory, "scratch"), Path(directory, "s")
        scratch.mkdir()
        sockets.mkdir()
        places = {"TEST_DIR": str(scratch), "SOCK_DIR": str(sockets)}
        with subprocess.Popen(
            ["./check", *how, name],
            cwd=sources / "tests/qemu-iotests",
            env={**os.environ, **programs, **places},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=TIMEOUT)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return Outcome.TIMED_OUT, ""
    if process.returncode:
        return Outcome.FAILED, output
    if "\nNot run: " in output:
        return Outcome.NOT_RUN, output
    return Outcome.PASSED, output


@contextmanager
def _cleared(directory: str) -> Iterator[None]:
    """End what a test that failed has left running here, and unmount what it has."""
    try:
        yield
    finally:
        # A daemon has left the test's session, but not its environment.
        mark = f"TEST_DIR={directory}/".encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (process / "environ").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
            except OSError:  # It is gone, or another user's.
                continue
        for mount in _mounts_in(directory):
            # A mount of a FUSE server that is no more is there, and can't be used.
            unmount = ["umount", "--lazy", mount]
            if os.geteuid() != 0:
                unmount = ["fusermount3", "-u", "-z", mount]
            subprocess.run(unmount, check=True)


def _mounts_in(directory: str) -> list[str]:
    # The fields of proc(5); names are escaped only where they have spaces.
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    mounts = [line.split()[4] for line in lines]
    return [mount for mount in reversed(mounts) if mount.startswith(f"{directory}/")]


def all_names() -> list[str]:
    """Return the names of the tests, as `check` takes them."""
    place = SOURCES / "tests/qemu-iotests"
    numbers = (path.name for path in place.glob("[0-9][0-9][0-9]"))
    others = (
        path.name
        for path in (place / "tests").iterdir()
        if "." not in path.name and os.access(path, os.X_OK)
    )
    return sorted(numbers) + sorted(others)


def missing(output: str) -> set[str]:
    """Return what of the expected output a failed test did not print.

    What it printed in its place has process ids, times and tracebacks, which vary.
    """
    lines = output[output.find("\n--- ") + 1 :].splitlines()
    return {
        line for line in lines if line.startswith("-") and not line.startswith("--- ")
    }


def main() -> int:
    """Run what is asked for; 1 if something ends otherwise with QEMU's programs."""
    parser = argparse.ArgumentParser(prog="python -m tests.iotests")
    parser.add_argument("--format", default="qcow2", choices=FORMATS)
    parser.add_argument("--protocol", default="file", choices=("file", "nbd", "fuse"))
    parser.add_argument("--options", metavar="NAME=VALUE,...")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args()
    subprocess.run([REPOSITORY / "tools/iotests-sources.sh", SOURCES], check=True)
    names = options.names or all_names()
    how = [f"-{options.format}", f"-{options.protocol}"]
    if options.options is not None:
        how += ["-o", options.options]
    with (
        tempfile.TemporaryDirectory(prefix=_PREFIX) as directory,
        ThreadPoolExecutor(options.jobs) as pool,
    ):
        work = Path(directory)
        programs = Programs(work)

        def both(name: str) -> tuple[Outcome, Outcome, str]:
            ours, output = run(name, how, programs.ours, work)
            if ours is Outcome.PASSED:
                return ours, ours, ""
            qemus, expected = run(name, how, programs.qemus, work)
            same = missing(output) <= missing(expected)
            if ours is qemus is Outcome.FAILED and same:
                ours = Outcome.SAME
            return qemus, ours, output

        nb_passed = nb_counted = nb_wrong = 0
        for name, (qemus, ours, output) in zip(
            names, pool.map(both, names), strict=True
        ):
            if qemus not in (Outcome.PASSED, Outcome.FAILED):
                text = f"{name}: {qemus.value} with QEMU's programs, not counted"
                print(text, flush=True)
                continue
            nb_counted += 1
            good = ours in (Outcome.PASSED, Outcome.SAME)
            nb_passed += good
            known = KNOWN.get(name)
            print(f"{name}: {ours.value}{f' ({known})' if known else ''}", flush=True)
            if not good and known is None:
                nb_wrong += 1
                print(output[output.find("\n--- ") + 1 :])
    print(
        f"{options.format}: of {nb_counted} tests that QEMU's programs can do here, "
        f"{nb_passed} end alike with ours; {nb_wrong} of the others are not explained"
    )
    return 1 if nb_wrong else 0


if __name__ == "__main__":
    sys.exit(main())

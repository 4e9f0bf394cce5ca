"""Random command lines given to qemu-img and to us: what differs.

    python -m tests.interop.img_random --seconds 600 --seed 1

prints each line that is answered differently, made as short as it can be. Ours
runs in a forked process, which takes a tenth of the time of a new one.
"""

import argparse
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from nbdqcow.cli import img
from tests.conftest import with_luks
from tests.interop.img_beside_qemu import prepare as prepare_disks
from tests.interop.img_beside_qemu import qemu_io, settle
from tests.interop.img_intended import Difference, unintended
from tests.interop.img_lines import READING, CommandLines, shrink
from tests.interop.img_programs import TIME_ZONE
from tests.interop.img_versions import Outcome, as_7_2_says

SECONDS = 30
"""After so many a program is stopped."""
KILLED = -int(signal.SIGKILL)
_ANSWER = ("status", "out", "err")


def prepare(directory: Path) -> None:
    """Fill a directory with the images that `img_lines` names."""
    prepare_disks(directory)

    def img_(*words: str) -> None:
        done = with_luks(
            lambda: subprocess.run(
                ["qemu-img", *words], cwd=directory, capture_output=True
            )
        )
        done.check_returncode()

    (directory / "secret").write_text("one")
    secret = ("--object", "secret,id=s,data=one")
    quick = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    img_("create", "-f", "qcow", "old.qcow", "1M")
    img_("create", "-fqcow2", "-odata_file=data.raw", "external.qcow2", "1M")
    qemu_io(directory, "external.qcow2", "write -P 3 64k 70k")
    img_("create", "-fqcow2", "-oextended_l2=on", "extended.qcow2", "1M")
    qemu_io(directory, "extended.qcow2", "write -P 3 4k 70k", "write -z 128k 6k")
    img_("create", "-fqcow2", *secret, "-o", quick, "encrypted.qcow2", "1M")
    img_("create", "-fluks", *secret, "-okey-secret=s,iter-time=10", "luks.img", "1M")
    img_("create", "-fqcow2", "\u00e9 \t.qcow2", "1M")
    img_("create", "-fraw", "a,b.raw", "1M")
    (directory / "none").touch()
    (directory / "link").symlink_to("base.qcow2")
    (directory / "dangling").symlink_to("nowhere")


def load() -> None:
    """Import what our command may need, once for all forked processes."""
    for path in Path(img.__file__).parent.glob("img_*.py"):
        import_module(f"nbdqcow.cli.{path.stem}")


def run_theirs(line: list[str], directory: Path) -> Outcome:
    try:
        done = subprocess.run(
            ["qemu-img", *line],
            cwd=directory,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=SECONDS,
            check=False,
            env={**os.environ, "TZ": TIME_ZONE},
        )
    except subprocess.TimeoutExpired:
        return KILLED, b"", b""
    outcome = done.returncode, done.stdout, done.stderr.rstrip(b"\n")
    return as_7_2_says(line, outcome)


def run_ours(line: list[str], directory: Path) -> Outcome:
    """Run our command in a forked process, which has files for its output."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        process = os.fork()
        if process == 0:
            _as_the_command(line, directory, out.fileno(), err.fileno())
        deadline = time.monotonic() + SECONDS
        delay = 0.002
        look = os.WEXITED | os.WNOWAIT | os.WNOHANG
        while os.waitid(os.P_PID, process, look) is None:
            if time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
            time.sleep(delay)
            delay = min(delay * 1.3, 0.05)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        out.seek(0)
        err.seek(0)
        return status, out.read(), err.read().rstrip(b"\n")


def _as_the_command(line: list[str], directory: Path, out: int, err: int) -> None:
    status = 70
    try:
        os.chdir(directory)
        null = os.open(os.devnull, os.O_RDONLY)
        for number, descriptor in enumerate((null, out, err)):
            os.dup2(descriptor, number)
        os.environ["TZ"] = TIME_ZONE
        time.tzset()
        sys.argv = ["qemu-img", *line]
        for name, number in (("stdout", 1), ("stderr", 2)):
            stream = io.TextIOWrapper(io.FileIO(number, "w", closefd=False), "utf-8")
            setattr(sys, name, stream)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = img.main()
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                status = 71
        os._exit(status)


class Pair:
    """Two copies of a directory in which lines are run."""

    def __init__(self, pristine: Path, scratch: Path) -> None:
        self._pristine = pristine
        self._copies = scratch / "theirs", scratch / "ours"
        self._contents = {
            name: (pristine / name).read_bytes() for name in files_of(pristine)
        }

    def differences(self, line: list[str]) -> list[Difference]:
        """Run ``line`` in both copies; return what differs, expected ones included."""
        reading = line[0] in READING
        theirs, ours = (self._pristine,) * 2 if reading else self._copies
        if not reading:
            for copy in self._copies:
                shutil.rmtree(copy, ignore_errors=True)
                subprocess.run(["cp", "-a", "--", self._pristine, copy], check=True)
        expected = settle(with_luks(lambda: run_theirs(line, theirs)))
        got = settle(run_ours(line, ours))
        found = [
            Difference(what, one, other)
            for what, one, other in zip(_ANSWER, expected, got, strict=True)
            if one != other
        ]
        if not reading:
            found += self._files(expected[0] == 0 and got[0] == 0)
        return found

    def _files(self, succeeded: bool) -> list[Difference]:
        theirs, ours = self._copies
        names = files_of(ours)
        found = []
        if succeeded and names != files_of(theirs):
            found.append(Difference("names", files_of(theirs), names))
        if not set(names) <= set(files_of(theirs)) | set(self._contents):
            found.append(Difference("left over", files_of(theirs), names))
        for name in names:
            if not (theirs / name).exists():
                continue
            before = self._contents.get(name)
            contents = [(copy / name).read_bytes() for copy in self._copies]
            if contents[0] == contents[1]:
                continue
            if not succeeded and name not in self._contents:
                continue
            if not succeeded and contents[1] == before:
                # What a failed command has not touched.
                continue
            one, other = (look_at(copy, name) for copy in self._copies)
            if one != other:
                found.append(Difference(f"file {name}", one, other))
            images = [str(copy / name) for copy in self._copies]
            if run_theirs(["compare", *images], theirs)[0] == 1:
                found.append(Difference(f"content of {name}", None, None))
        return found


def look_at(directory: Path, name: str) -> list[Outcome]:
    """Return what qemu-img says of an image."""
    return [
        settle(run_theirs(["info", name], directory)),
        settle(run_theirs(["check", "--output=json", name], directory)),
    ]


def files_of(directory: Path) -> list[str]:
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and not path.is_symlink()
    )


def shape_of(found: Sequence[Difference]) -> object:
    """What two lines have in common that differ for the same reason: all but names
    and numbers."""
    text = json.dumps([[one.what, repr(one.theirs), repr(one.ours)] for one in found])
    return re.sub(r"'[^']*'|[0-9]+|[a-z0-9]+\.(qcow2|raw)", "", text)


def describe(found: Sequence[Difference]) -> str:
    """Return differences as lines of text."""
    return "\n".join(
        f"  {one.what}\n    theirs: {one.theirs!r}\n    ours:   {one.ours!r}"
        for one in found
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--oddness", type=float, default=0.12)
    parser.add_argument("--command")
    given = parser.parse_args()
    load()
    with tempfile.TemporaryDirectory(prefix="img-lines-") as scratch:
        pristine = Path(scratch) / "pristine"
        prepare(pristine)
        pair = Pair(pristine, Path(scratch))
        seen: set[object] = set()
        end = time.monotonic() + given.seconds
        count = 0
        for line in CommandLines(given.seed, given.oddness):
            if given.command and line[0] != given.command:
                continue
            if time.monotonic() > end:
                break
            count += 1
            found = unintended(pair.differences(line))
            if not found:
                continue
            shape = shape_of(found)
            if shape in seen:
                continue
            seen.add(shape)

            def fails(candidate: list[str], shape: object = shape) -> bool:
                again = pair.differences(candidate)
                return shape_of(unintended(again)) == shape

            short = shrink(line, fails)
            found = unintended(pair.differences(short))
            print(f"--- {shlex.join(short)}\n    (from: {shlex.join(line)})")
            print(describe(found), flush=True)
        print(f"{count} lines, seed {given.seed}, {len(seen)} differ")
    return 1 if seen else 0


if __name__ == "__main__":
    sys.exit(main())

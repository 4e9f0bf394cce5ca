"""What each command locks and leaves to others: qemu-img's and ours beside a holder of
one byte of the file."""

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import with_luks
from tests.interop.img_beside_qemu import qemu_io, settle
from tests.interop.img_programs import Outcome, run_ours, run_theirs

_F_OFD_SETLK = 37
_FLOCK = struct.Struct("@hhqqi0q")
BYTES = (100, 101, 103, 200, 201, 203)
"""Reads, writes, resizes; lets nobody read, write, resize."""


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("images")

    def img(line: str) -> None:
        done = with_luks(lambda: run_theirs(line, directory))
        assert done[0] == 0, done

    for format_ in ("raw", "qcow", "qcow2"):
        img(f"create -q -f {format_} d.{format_} 1M")
        qemu_io(directory, f"d.{format_}", "write 0 64k", format_=format_)
        img(f"create -q -f qcow2 -F {format_} -b d.{format_} over.{format_}")
    img("create -q -f qcow2 -o data_file=data,data_file_raw=on external.qcow2 1M")
    img(
        "create -q -f luks --object secret,id=s,data=x -o key-secret=s,iter-time=10"
        " d.luks 1M"
    )
    img("create -q -f raw other.raw 1M")
    return directory


@contextmanager
def held(path: Path, byte: int) -> Iterator[None]:
    """Be another program that has one byte of a file locked."""
    with open(path, "r+b") as file:
        lock = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
        fcntl.fcntl(file, _F_OFD_SETLK, lock)
        yield


def run_beside(
    held_name: str, byte: int, line: str, pristine: Path, scratch: Path
) -> tuple[Outcome, Outcome]:
    """Return what both programs said of a line, each beside a holder of a byte."""
    said = []
    for run in (run_theirs, run_ours):
        copy = scratch / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        subprocess.run(["cp", "-a", pristine, copy], check=True)
        with held(copy / held_name, byte):
            status, out, err = with_luks(lambda run=run, copy=copy: run(line, copy))
        said.append(settle((status, out, err)))
    return said[0], said[1]


LUKS = (
    "--object secret,id=s,data=x --image-opts driver=luks,key-secret=s,"
    "file.filename=d.luks"
)
WINDOW = "--image-opts driver=raw,size=64k,file.filename=d.raw"
RAW = [
    "info d.raw",
    "info --backing-chain -U d.raw",
    "map -f raw d.raw",
    "map --image-opts driver=raw,file.filename=d.raw,force-share=on",
    f"map {WINDOW}",
    f"info {WINDOW}",
    "check d.raw",
    "measure -O qcow2 d.raw",
    "compare d.raw other.raw",
    "compare -U d.raw other.raw",
    "snapshot -l d.raw",
    "snapshot -c x d.raw",
    "convert -O raw d.raw out",
    "convert -U -O raw d.raw out",
    "convert -n -O raw other.raw d.raw",
    "bench -w -q -c 1 -f raw d.raw",
    "resize -f raw d.raw 2M",
    "create -f qcow2 -F raw -b d.raw new",
    "amend -f raw -o size=1M d.raw",
    "map over.raw",
    "check over.raw",
    "convert -O raw over.raw out",
    "bench -w -q -c 1 over.raw",
    "rebase -F raw -b other.raw over.raw",
]
QCOW2 = [
    "info d.qcow2",
    "map d.qcow2",
    "check -r all d.qcow2",
    "create -f qcow2 -F qcow2 -b d.qcow2 new",
    "commit over.qcow2",
    "convert -O raw over.qcow2 out",
]
CASES = [
    *(("d.raw", line) for line in RAW),
    *(("d.qcow2", line) for line in QCOW2),
    *(("d.qcow", line) for line in ("info d.qcow", "map d.qcow", "commit over.qcow")),
    *(
        ("data", f"{command} external.qcow2")
        for command in (
            *("info", "map", "check", "check -r all", "snapshot -l"),
            *("convert -O raw --target-is-zero -n other.raw", "resize --shrink"),
        )
    ),
    ("data", "convert -O raw external.qcow2 out"),
    *(("d.luks", f"{command} {LUKS}") for command in ("check", "measure -O raw")),
    ("d.luks", "info d.luks"),
    ("d.luks", f"resize {LUKS} 2M"),
    (
        "d.luks",
        f"amend {LUKS} -o state=active,new-secret=s,keyslot=1,iter-time=10",
    ),
]


@pytest.mark.parametrize(("name", "line"), CASES, ids=lambda text: text[:60])
def test_the_same_locks(name: str, line: str, pristine: Path, tmp_path: Path) -> None:
    for byte in BYTES:
        theirs, ours = run_beside(name, byte, line, pristine, tmp_path)
        assert ours == theirs, byte


@pytest.mark.parametrize("line", ["commit over.raw", "commit -d over.raw"])
def test_commit_into_a_raw_image(line: str, pristine: Path, tmp_path: Path) -> None:
    # Whether it asks to change the length depends on the lengths, in QEMU.
    for byte in BYTES[:-1]:
        theirs, ours = run_beside("d.raw", byte, line, pristine, tmp_path)
        assert ours == theirs, byte


@pytest.mark.parametrize(
    "line",
    ["create -f raw d.raw 1M", "convert other.raw d.raw", "dd if=other.raw of=d.raw"],
)
def test_an_image_that_others_write_to_is_not_replaced(
    line: str, pristine: Path, tmp_path: Path
) -> None:
    subprocess.run(["cp", "-a", pristine, tmp_path / "copy"], check=True)
    before = (tmp_path / "copy/d.raw").read_bytes()
    with held(tmp_path / "copy/d.raw", 101):
        status, _, err = run_ours(line, tmp_path / "copy")
    assert status == 1
    assert b'Failed to get shared "write" lock' in err
    assert (tmp_path / "copy/d.raw").read_bytes() == before


def test_dd_keeps_off_a_source_that_others_write_to(
    pristine: Path, tmp_path: Path
) -> None:
    """It may be the target, too, and is then emptied if it has several links."""
    subprocess.run(["cp", "-a", pristine, tmp_path / "copy"], check=True)
    image = tmp_path / "copy/d.raw"
    (tmp_path / "copy/link").hardlink_to(image)
    before = image.read_bytes()
    assert run_ours("dd -f raw if=d.raw of=link", tmp_path / "copy")[0] == 1
    assert image.read_bytes() == before


def test_no_image_is_its_own_raw_backing_file(pristine: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-a", pristine, tmp_path / "copy"], check=True)
    image = tmp_path / "copy/over.raw"
    before = image.read_bytes()
    status, _, err = run_ours("rebase -F raw -b over.raw over.raw", tmp_path / "copy")
    assert status == 1
    assert b"lock" in err
    assert image.read_bytes() == before


def test_a_qcow_image_is_not_said_to_be_guessed(pristine: Path) -> None:
    line = "snapshot -a x d.qcow"
    assert run_ours(line, pristine) == run_theirs(line, pristine)


def test_no_backing_file_is_called_by_the_name_that_was_given(pristine: Path) -> None:
    line = "rebase -u -f raw -b '' d.raw"
    assert run_ours(line, pristine) == run_theirs(line, pristine)

"""rebase and commit of nbdqcow-img beside qemu-img's: same answers, same disks.

How many clusters are allocated may differ, for QEMU compares sectors and we what is
allocated together.
"""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import find_tool
from tests.interop.img_beside_qemu import qemu_io
from tests.interop.img_programs import files_of, run_ours, run_theirs

COUNTS = re.compile(
    rb"disk size: .*"
    rb'|(,\n)?    "(image-end-offset|(total|allocated|fragmented)-clusters)": [0-9]+'
)
PROGRESS = re.compile(rb"(    \([0-9.]+/100%\)\r)+")
ONE = "--object secret,id=s,data=one"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with chains of images, longer and shorter ones."""
    find_tool("qemu-img")
    path = tmp_path_factory.mktemp("rebase") / "chain"
    path.mkdir()

    def create(*arguments: str) -> None:
        line = ["qemu-img", "create", "-q", "-f", "qcow2", *arguments]
        subprocess.run(line, cwd=path, check=True, capture_output=True)

    create("base.qcow2", "4M")
    qemu_io(path, "base.qcow2", "write -P 1 0 2M", "write -P 6 3M 4k")
    create("-b", "base.qcow2", "-F", "qcow2", "middle.qcow2", "3M")
    qemu_io(path, "middle.qcow2", "write -P 2 1M 1M", "write -P 5 2500k 3k")
    create("-b", "middle.qcow2", "-F", "qcow2", "top.qcow2", "5M")
    commands = ("write -P 9 512k 64k", "write -z 1M 64k", "write -P 3 4700k 5000")
    qemu_io(path, "top.qcow2", *commands)
    create("-b", "middle.qcow2", "-F", "qcow2", "compressed.qcow2", "3M")
    qemu_io(path, "compressed.qcow2", "write -c -P 4 64k 64k")
    create("-o", "cluster_size=4k,compat=0.10", "other.qcow2", "3500k")
    commands = ("write -P 1 0 1M", "write -P 2 1M 100k", "write -P 8 2M 1M")
    qemu_io(path, "other.qcow2", *commands)
    create("-b", "other.qcow2", "-F", "qcow2", "old.qcow2", "-o", "compat=0.10")
    qemu_io(path, "old.qcow2", "write -P 3 1M 4k")
    create("-b", "base.qcow2", "-F", "qcow2", "extended.qcow2", "-o", "extended_l2=on")
    qemu_io(path, "extended.qcow2", "write -P 3 2M 4k", "write -z 66k 2k")
    create("-b", "base.qcow2", "-F", "qcow2", "small.qcow2", "1M")
    qemu_io(path, "small.qcow2", "write -P 3 0 64k")
    create("-u", "-b", "absent", "-F", "qcow2", "orphan.qcow2", "1M")
    (path / "disk.raw").write_bytes(b"\1" * 3_000_000)
    create("-b", "disk.raw", "-F", "raw", "raw-top.qcow2", "4M")
    qemu_io(path, "raw-top.qcow2", "write -P 3 2M 64k", "write -z 0 128k")
    (path / "sub").mkdir()
    create("-u", "-b", "../middle.qcow2", "-F", "qcow2", "sub/top.qcow2", "3M")
    return path


def settle(outcome: tuple[int, bytes, bytes]) -> tuple[int, bytes, bytes]:
    status, out, err = outcome
    return status, COUNTS.sub(b"", PROGRESS.sub(b"%", out)), err


def compare(line: str, chain: Path, tmp_path: Path) -> None:
    """Run a line in two copies of ``chain``; all disks must be equal."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for directory in (theirs, ours):
        subprocess.run(["cp", "-a", "--", chain, directory], check=True)
    expected = settle(run_theirs(line, theirs))
    assert settle(run_ours(line, ours)) == expected
    names = files_of(ours)
    assert names == files_of(theirs)
    for name in names:
        ours_bytes = (ours / name).read_bytes()
        if ours_bytes == (theirs / name).read_bytes() or name.endswith(".raw"):
            assert ours_bytes == (theirs / name).read_bytes()
            continue
        if expected[0] and ours_bytes == (chain / name).read_bytes():
            # We refuse before anything is copied.
            continue
        for look in (f"info {name}", f"check --output=json {name}"):
            assert settle(run_ours(look, ours)) == settle(run_theirs(look, theirs))
        if b"aaa" in expected[2] or "-b a" in line:
            # The new backing file is not there.
            continue
        done = run_theirs(f"compare {ours / name} {theirs / name}", ours)
        assert done[0] == 0, (name, done)
        qemu_io(ours, name, "write -P 77 0 512")
        assert run_theirs(f"check {name}", ours)[0] == 0, name


REBASE = [
    "-b other.qcow2 -F qcow2 top.qcow2",
    "-b other.qcow2 -F qcow2 compressed.qcow2",
    "-b base.qcow2 -F qcow2 top.qcow2",
    "-b base.qcow2 -F qcow2 -U top.qcow2",
    "-b disk.raw -F raw top.qcow2",
    "-b '' top.qcow2",
    "-b middle.qcow2 -F qcow2 old.qcow2",
    "-b '' old.qcow2",
    "-b middle.qcow2 -F qcow2 base.qcow2",
    "-b other.qcow2 -F qcow2 extended.qcow2",
    "-b middle.qcow2 -F qcow2 small.qcow2",
    "-b ../other.qcow2 -F qcow2 sub/top.qcow2",
    "-p -b other.qcow2 -F qcow2 top.qcow2",
    "-q -p -t none -T none -b other.qcow2 -F qcow2 small.qcow2",
    "-u -b other.qcow2 -F qcow2 top.qcow2",
    "-u -b absent -F qcow2 top.qcow2",
    "-u -b absent -F host_device top.qcow2",
    "-b disk.raw -F file top.qcow2",
    "-u -b '' top.qcow2",
    "-u top.qcow2",
    "-u -F qcow2 top.qcow2",
    "-u -b base.qcow2 -F qcow2 orphan.qcow2",
    f"-u -b {'a' * 1023} -F qcow2 top.qcow2",
    f"-u -b {'a' * 1024} -F qcow2 top.qcow2",
    "-b middle.qcow2 -F qcow2 top.qcow2",
    "-b other.qcow2 top.qcow2",
    "-u -b other.qcow2 top.qcow2",
    "-b absent -F qcow2 top.qcow2",
    "-b orphan.qcow2 -F qcow2 top.qcow2",
    "-b other.qcow2 -F foo top.qcow2",
    "-u -b other.qcow2 -F foo top.qcow2",
    "-b top.qcow2 -F qcow2 top.qcow2",
    "-b base.qcow2 -F qcow2 orphan.qcow2",
    "-b base.qcow2 -F qcow2 absent",
    "-f foo -b base.qcow2 top.qcow2",
    "-f raw -b base.qcow2 -F qcow2 disk.raw",
    "-f raw -u -b base.qcow2 -F qcow2 disk.raw",
    "-t foo -b base.qcow2 top.qcow2",
    "-T foo -b base.qcow2 top.qcow2",
    "-p -T foo -b base.qcow2 top.qcow2",
    "",
    "top.qcow2",
    "-b base.qcow2",
    "-b base.qcow2 a b",
    "-x top.qcow2",
    "-b",
]


@pytest.mark.parametrize("arguments", REBASE)
def test_rebase(arguments: str, chain: Path, tmp_path: Path) -> None:
    compare(f"rebase {arguments}", chain, tmp_path)


def test_a_backing_file_of_a_format_that_only_qemu_has(tmp_path: Path) -> None:
    assert run_theirs("create -q -f qcow2 top 1M", tmp_path)[0] == 0
    assert run_ours("rebase -u -b absent -F vmdk top", tmp_path) == (0, b"", b"")
    shown = run_theirs("info top", tmp_path)
    assert b"backing file format: vmdk" in shown[1]
    assert run_ours("info top", tmp_path) == shown


COMMIT = [
    "top.qcow2",
    "-d top.qcow2",
    "-b middle.qcow2 top.qcow2",
    "-b base.qcow2 top.qcow2",
    "-b ./base.qcow2 -d top.qcow2",
    "-b ../base.qcow2 sub/top.qcow2",
    "-p small.qcow2",
    "-q -t none compressed.qcow2",
    "-r 100M old.qcow2",
    "extended.qcow2",
    "raw-top.qcow2",
    "-f qcow2 top.qcow2",
    "--image-opts driver=qcow2,file.filename=small.qcow2",
    "-b absent top.qcow2",
    "-b top.qcow2 top.qcow2",
    "-b base.qcow2 base.qcow2",
    "base.qcow2",
    "-f raw disk.raw",
    "orphan.qcow2",
    "absent",
    "-f foo top.qcow2",
    "-t foo top.qcow2",
    "-r foo top.qcow2",
    "",
    "a b",
    "-x top.qcow2",
    "-b",
]


@pytest.mark.parametrize("arguments", COMMIT)
def test_commit(arguments: str, chain: Path, tmp_path: Path) -> None:
    compare(f"commit {arguments}", chain, tmp_path)


def test_a_disk_stays_what_it_was(chain: Path, tmp_path: Path) -> None:
    """From one backing image to the next, and at last to none."""
    directory = tmp_path / "copy"
    subprocess.run(["cp", "-a", "--", chain, directory], check=True)
    before = run_theirs("convert -O raw top.qcow2 before.raw", directory)
    assert before[0] == 0
    for base in ("-b other.qcow2 -F qcow2", "-b disk.raw -F raw",
                 "-b base.qcow2 -F qcow2", "-b ''"):  # fmt: skip
        assert run_ours(f"rebase {base} top.qcow2", directory) == (0, b"", b"")
        done = run_theirs("compare -f qcow2 -F raw top.qcow2 before.raw", directory)
        assert done[0] == 0, (base, done)
        assert run_theirs("check top.qcow2", directory)[0] == 0


@pytest.mark.parametrize("name", ["other.qcow2", "base.qcow2"])
def test_a_first_backing_image(name: str, chain: Path, tmp_path: Path) -> None:
    """Where QEMU 7.2 lets it show through what was zero in a version 2 image."""
    directory = tmp_path / "copy"
    subprocess.run(["cp", "-a", "--", chain, directory], check=True)
    shutil.copy(directory / name, directory / "before.qcow2")
    (directory / "new.raw").write_bytes(b"\7" * (5 << 20))
    assert run_ours(f"rebase -b new.raw -F raw {name}", directory) == (0, b"", b"")
    done = run_theirs(f"compare {name} before.qcow2", directory)
    assert done[0] == 0, done
    assert run_theirs(f"check {name}", directory)[0] == 0


@pytest.mark.parametrize("kind", ["luks", "aes"])
def test_encrypted_images(kind: str, tmp_path: Path) -> None:
    """An encrypted chain: its images have one passphrase."""
    options = f"encrypt.format={kind},encrypt.key-secret=s"
    if kind == "luks":
        options += ",encrypt.iter-time=10"
    for line in (
        f"create -q -f qcow2 {ONE} -o {options} base.qcow2 1M",
        f"create -q -f qcow2 {ONE} -o {options} other.qcow2 1M",
        f"create -q -u -f qcow2 {ONE} -o {options} -b base.qcow2 -F qcow2 top.qcow2 2M",
    ):
        assert run_ours(line, tmp_path) == (0, b"", b"")
    for number, name in enumerate(("base.qcow2", "other.qcow2", "top.qcow2")):
        opts = f"driver=qcow2,file.filename={name},encrypt.key-secret=s"
        if name == "top.qcow2":
            opts += ",backing.encrypt.key-secret=s"
        subprocess.run(
            ["qemu-io", *shlex.split(ONE), "--image-opts", opts,
             "-c", f"write -P {number + 1} {number * 200}k 300k"],
            cwd=tmp_path, check=True, capture_output=True,
        )  # fmt: skip
    opts = "driver=qcow2,file.filename=top.qcow2,encrypt.key-secret=s"
    chained = f"{opts},backing.encrypt.key-secret=s"
    convert = f"convert {ONE} --image-opts {chained} -O raw before.raw"
    assert run_theirs(convert, tmp_path)[0] == 0
    for line in (
        f"rebase {ONE} --image-opts -b other.qcow2 -F qcow2 {opts}",
        f"commit -q {ONE} --image-opts {opts}",
    ):
        assert run_ours(line, tmp_path) == (0, b"", b"")
        raw = "driver=raw,file.filename=before.raw"
        done = run_theirs(f"compare {ONE} --image-opts {chained} {raw}", tmp_path)
        assert done[0] == 0, (line, done)

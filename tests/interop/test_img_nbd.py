"""The image tool on exports of qemu-nbd, beside qemu-img on the same."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import find_tool, wait_until_listening
from tests.interop.img_programs import run_ours, run_theirs

MiB = 1 << 20

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-nbd") is None, reason="qemu-nbd is not installed"
)


@contextmanager
def exported(image: Path, format_: str, *options: str) -> Iterator[str]:
    """Serve ``image`` while the block runs; its URI."""
    socket, pid_file = image.with_suffix(".sock"), image.with_suffix(".pid")
    subprocess.run(
        ["qemu-nbd", "-t", "-e", "4", "-f", format_, "--fork", "-k", socket,
         f"--pid-file={pid_file}", *options, image],
        check=True,
        timeout=60,
    )  # fmt: skip
    process = int(pid_file.read_text())
    try:
        yield f"nbd+unix:///?socket={socket}"
    finally:
        os.kill(process, 15)
        # Until then it has the image locked.
        while is_running(process):
            time.sleep(0.01)


@contextmanager
def nbdkit(directory: Path, *arguments: str) -> Iterator[str]:
    """Run it while the block runs; its URI."""
    socket = directory / "s"
    line = [find_tool("nbdkit"), "-f", "-U", socket, *arguments]
    with subprocess.Popen(line, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until_listening(socket, process)
            yield f"nbd+unix:///?socket={socket}"
        finally:
            process.terminate()


def is_running(process: int) -> bool:
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(") ")[2][0] != "Z"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    def qemu(*arguments: object) -> None:
        subprocess.run(
            [str(one) for one in arguments], check=True, capture_output=True, timeout=60
        )

    base = tmp_path / "base.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", base, "4M")
    qemu("qemu-io", "-c", "write -P 7 1M 256k", "-c", "write -P 9 3M 512", base)
    (tmp_path / "noise").write_bytes(os.urandom(8 * MiB))
    return tmp_path


def test_an_export_is_read(directory):
    with exported(directory / "base.qcow2", "qcow2", "-r") as uri:
        for line in (
            f"compare {uri} {uri}",
            f"compare {uri} noise",
            f"map --output=json {uri}",
            f"measure -O qcow2 {uri}",
            f"convert -O qcow2 {uri} out",
            f"dd bs=64k count=20 if={uri} of=out",
            f"check {uri}",
            f"snapshot -c a {uri}",
        ):
            expected = run_theirs(line, directory)
            status, out, err = run_ours(line, directory)
            assert (status, out) == expected[:2], line
            # A URI is shown as it was given.
            assert bool(err) == bool(expected[2]), line
        status, out, _ = run_ours(f"info {uri}", directory)
        assert status == 0
        assert b"file format: raw\nvirtual size: 4 MiB (4194304 bytes)" in out
        assert b"disk size: unavailable" in out
        assert run_ours(f"convert -O qcow2 {uri} new", directory) == (0, b"", b"")
    subprocess.run(
        ["qemu-img", "compare", directory / "base.qcow2", directory / "new"],
        check=True,
        capture_output=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("line", "format_"),
    [
        ("convert base.qcow2 {uri}", "raw"),
        ("convert -n base.qcow2 {uri}", "raw"),
        ("convert -O qcow2 base.qcow2 {uri}", "qcow2"),
        ("convert -c -O qcow2 base.qcow2 {uri}", "qcow2"),
        ("dd if=base.qcow2 of={uri}", "raw"),
    ],
)
def test_an_export_is_written(directory, line, format_):
    """And nothing of its old content shows."""
    length = {"raw": 4 * MiB, "qcow2": 8 * MiB}[format_]
    noise = directory / "noise"
    os.truncate(noise, length)
    with exported(noise, "raw") as uri:
        assert run_ours(line.format(uri=uri), directory) == (0, b"", b"")
        again = run_ours(f"compare base.qcow2 {uri}", directory)
        assert again == (0, b"Images are identical.\n", b"")
    subprocess.run(
        ["qemu-img", "compare", "-F", format_, directory / "base.qcow2", noise],
        check=True,
        capture_output=True,
        timeout=60,
    )


def test_an_image_is_created_in_an_export(directory):
    for line in (
        "create -f qcow2 {uri} 1M",
        "create -f qcow2 -b base.qcow2 -F qcow2 -u {uri} 4M",
        "create -f raw {uri} 1M",
        "create -f qcow2 -o help {uri}",
    ):
        with exported(directory / "noise", "raw") as uri:
            expected = run_theirs(line.format(uri=uri), directory)
            os.pwrite((file := os.open(directory / "noise", os.O_RDWR)), b"x" * 9999, 0)
            os.close(file)
            assert run_ours(line.format(uri=uri), directory)[::2] == expected[::2]
        if "qcow2 {uri}" in line:
            subprocess.run(
                ["qemu-img", "check", "-U", "-f", "qcow2", directory / "noise"],
                check=True,
                capture_output=True,
                timeout=60,
            )
    line = "create -f raw null-co:// 1M"
    assert run_ours(line, directory) == run_theirs(line, directory)


def test_an_export_that_is_too_small(directory):
    os.truncate(directory / "noise", MiB)
    with exported(directory / "noise", "raw") as uri:
        for line in (f"convert base.qcow2 {uri}", f"dd if=base.qcow2 of={uri}"):
            outcome = run_ours(line, directory)
            assert outcome == run_theirs(line, directory)
            assert outcome[2].endswith(b": Cannot grow NBD nodes")
        status, _, err = run_ours(f"convert -n base.qcow2 {uri}", directory)
        assert (status, err) == (
            1,
            b"qemu-img: output file is smaller than input file",
        )


@pytest.mark.parametrize(
    "context", ["qemu:allocation-depth", "qemu:dirty-bitmap:b,,0", "base:allocation"]
)
def test_a_map_of_a_context(directory, context):
    """What a bitmap marks is shown as a hole, as qemu-img shows it."""
    for line in (
        ["qemu-img", "create", "-q", "-fqcow2", "-bbase.qcow2", "-Fqcow2", "top.qcow2"],
        ["qemu-img", "bitmap", "--add", "top.qcow2", "b,0"],
        ["qemu-io", "-c", "write 1M 128k", "-c", "write -z 2M 64k", "top.qcow2"],
    ):
        subprocess.run(line, cwd=directory, check=True, capture_output=True, timeout=60)
    options = ("-r", "-A", "-B", "b,0")
    with exported(directory / "top.qcow2", "qcow2", *options) as uri:
        path = uri.partition("=")[2]
        place = f"server.type=unix,server.path={path}"
        below = f"file.server.type=unix,file.server.path={path}"
        for named in (
            f"driver=raw,file.driver=nbd,{below},file.x-dirty-bitmap={context}",
            f"driver=nbd,{place},x-dirty-bitmap={context}",
        ):
            line = f"map --output=json --image-opts {named}"
            assert run_ours(line, directory) == run_theirs(line, directory)
        line = f"map --image-opts driver=nbd,{place},x-dirty-bitmap=other"
        status, _, err = run_ours(line, directory)
        assert status == 1
        assert b"requested x-dirty-bitmap other not found" in err
        # It changes the map only.
        line = f"compare {uri} {uri}&x-dirty-bitmap=qemu:allocation-depth"
        assert run_ours(line, directory) == (0, b"Images are identical.\n", b"")


def test_nbd_is_a_format_too(directory):
    """One that images name for their backing file."""
    with exported(directory / "base.qcow2", "qcow2", "-r") as uri:
        for line in (
            f"create -f qcow2 -b {uri} -F nbd top.qcow2",
            "map --output=json top.qcow2",
            f"compare -f qcow2 -F nbd top.qcow2 {uri}",
        ):
            expected = run_theirs(line, directory)
            assert expected[0] == 0
            assert run_ours(line, directory) == expected


@pytest.mark.parametrize("first", [0, 4096])
def test_all_that_an_export_can_be(directory, first):
    """Zeroes that have a place, and a hole that may be anything, too."""
    size, step = 1 << 20, 192 << 10
    extents = ["0", "hole,zero", "zero", "hole", "zero", "hole,zero"]
    told = "; ".join(
        f"echo {first + n * step} {step} {flags}" for n, flags in enumerate(extents)
    )
    options = [
        f"get_size=echo {size}", "pread=head -c $3 /dev/zero", "can_extents=exit 0",
        f"extents=echo 0 {first} zero; {told}",
    ]  # fmt: skip
    with nbdkit(directory, "eval", *options) as uri:
        server = f"file.server.type=unix,file.server.path={directory}/s"
        window = f"driver=raw,offset=65536,file.driver=nbd,{server}"
        for line in (
            f"map --output=json {uri}",
            f"map --output=json -s 200k -l 400k {uri}",
            f"map --output=json --image-opts {window}",
            f"create -f qcow2 -b {uri} -F raw top.qcow2 2M",
            "map --output=json top.qcow2",
        ):
            assert run_ours(line, directory) == run_theirs(line, directory), line
        # What convert copies is counted.
        sizes = [
            json.loads(run(f"measure --output=json -O qcow2 {uri}", directory)[1])
            for run in (run_ours, run_theirs)
        ]
        assert sizes[0]["required"] - sizes[1]["required"] == step + 16 * first


def test_an_export_of_no_whole_sectors(directory):
    with nbdkit(directory, "--filter=truncate", "memory", "1048575") as uri:
        for line in (
            f"map --output=json {uri}",
            f"map --output=json -s 1048574 {uri}",
            f"map --output=json -s 1048575 {uri}",
            f"create -f qcow2 -b {uri} -F raw top.qcow2",
            "map --output=json top.qcow2",
        ):
            assert run_ours(line, directory) == run_theirs(line, directory), line


@pytest.mark.parametrize("format_", ["raw", "luks", "qcow2"])
def test_what_is_known_of_an_export(directory, format_):
    """Of its own it has no flag that says whether it is dirty."""
    secret = "--object secret,id=s,data=x"
    options = "-o key-secret=s,iter-time=10" if format_ == "luks" else ""
    line = f"create -f {format_} {secret} {options} image 1M"
    assert run_ours(line, directory)[0] == 0
    with nbdkit(directory, "file", str(directory / "image")) as uri:
        line = f"info --output=json -f {format_} {uri}"
        found, expected = (
            json.loads(run(line, directory)[1]) for run in (run_ours, run_theirs)
        )
        found["filename"] = expected["filename"]
        assert list(found.items()) == list(expected.items())


@pytest.mark.parametrize("size", ["16M", "--shrink 4M", "4M", "8M"])
def test_an_export_keeps_its_size(directory, size):
    with nbdkit(directory, "memory", "8M") as uri:
        line = f"resize -f raw {uri} {size}"
        assert run_ours(line, directory) == run_theirs(line, directory)


def test_an_error_of_the_server_s_is_told_by_its_name(directory):
    failing = ("--filter=error", "memory", "8M", "error-pwrite-rate=100%")
    with nbdkit(directory, *failing, "error-pwrite=ENOSPC") as uri:
        line = f"convert -n -O raw noise {uri}"
        status, _, err = run_ours(line, directory)
        assert (status, run_theirs(line, directory)[0]) == (1, 1)
        assert b"No space left on device" in err


def test_nobody_serves(directory):
    uri = f"nbd+unix:///?socket={directory}/absent"
    for line in (f"info {uri}", f"map {uri}", f"convert base.qcow2 {uri}"):
        status, _, err = run_ours(line, directory)
        assert status == 1
        assert err.count(b"\n") == 0
        assert b"Traceback" not in err

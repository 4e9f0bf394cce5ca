"""``qemu-nbd --snapshot``: writes that nobody keeps."""

import os
import subprocess

import pytest

from tests.conftest import wait_until_listening
from tests.interop.commands import info
from tests.interop.nbd_beside_qemu import image, ours, path, program, start, theirs
from tests.serving import run

__all__ = ["image", "ours", "path", "program", "start", "theirs"]

MiB = 1 << 20


@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_the_image_stays_as_it_is(start, tmp_path, path, format):
    raw, disk = tmp_path / "disk.raw", tmp_path / "disk"
    raw.write_bytes(b"a" * (3 * MiB) + b"b" * 5000)
    run("qemu-img", "convert", "-f", "raw", "-O", format, raw, disk)
    before = disk.read_bytes()
    process = start("-s", "-t", "-f", format, "--discard=unmap", disk)
    uri = f"nbd+unix:///?socket={path}"
    for _ in range(2):
        run("qemu-io", "-f", "raw", "-c", "write -P 1 1000 3000", uri)
        run("qemu-io", "-f", "raw", "-c", "discard 1M 1M", "-c", "flush", uri)
        # What was written, what is beside it, and what was discarded.
        for wanted in ("-P 1 1000 3000", "-P 97 0 1000", "-P 97 4000 60000",
                       "-P 0 1M 1M", "-P 97 2M 1M", "-P 98 3M 5000"):  # fmt: skip
            run("qemu-io", "-f", "raw", "-c", f"read {wanted}", uri)
    assert not info(uri)["is_read_only"]
    process.terminate()
    assert process.wait(20) == 0
    assert disk.read_bytes() == before


def test_others_may_read_the_image_meanwhile(start, image, path):
    start("-s", "-t", "-f", "qcow2", image)
    run("qemu-io", "-f", "raw", "-c", "write 0 64k", f"nbd+unix:///?socket={path}")
    run("qemu-img", "info", image)
    run("qemu-io", "-r", "-c", "read -P 0 0 64k", image)


def test_a_read_only_export_needs_no_overlay(start, image, path):
    start("-s", "-r", "-f", "qcow2", image)
    assert info(f"nbd+unix:///?socket={path}")["is_read_only"]


def test_its_file_has_no_name_and_its_place_can_be_chosen(ours, image, path, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    command = [ours, "-s", "-t", "-f", "qcow2", "-k", str(path), str(image)]
    environment = {**os.environ, "TMPDIR": str(place)}
    with subprocess.Popen(command, env=environment) as process:
        wait_until_listening(path, process)
        run("qemu-io", "-f", "raw", "-c", "write 0 1M", f"nbd+unix:///?socket={path}")
        open_files = [
            os.readlink(entry) for entry in os.scandir(f"/proc/{process.pid}/fd")
        ]
        assert any(name.startswith(f"{place}/") for name in open_files)
        assert list(place.iterdir()) == []
        process.terminate()
        assert process.wait(20) == 0


def test_no_place_for_the_overlay(ours, image, path):
    done = subprocess.run(
        [ours, "-s", "-f", "qcow2", "-k", path, image],
        env={**os.environ, "TMPDIR": "/none"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "qemu-nbd: Could not create a temporary overlay in '/none':"
        " No such file or directory\n"
    )

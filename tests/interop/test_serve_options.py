"""Servers of images with lazy refcounts, killed; and images named by options."""

import json
import subprocess

import pytest

from nbdqcow.formats.qcow2.header import Header
from tests.interop.commands import info
from tests.interop.nbd_beside_qemu import image, ours, path, program, start, theirs
from tests.nbd_client import NbdClient
from tests.serving import check_image, need, run, serving

__all__ = ["image", "ours", "path", "program", "start", "theirs"]

MiB = 1 << 20


@pytest.mark.parametrize("repairer", ["qemu-img", "qemu-io", "nbdqcow"])
def test_a_killed_server_leaves_what_a_check_repairs(tmp_path, repairer, seed):
    need("qemu-img", "qemu-io")
    disk = tmp_path / "a.qcow2"
    options = "lazy_refcounts=on,cluster_size=4k"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, disk, "8M")
    expected = bytearray(8 * MiB)
    with serving(disk) as server:
        with NbdClient(server.socket) as client:
            for number in range(64):
                data = bytes([number + 1]) * 5000
                client.write(number * 100_000, data)
                expected[number * 100_000 : number * 100_000 + 5000] = data
            client.flush()
        assert Header.parse(disk.read_bytes()[:4096]).dirty
        server.kill()
    match repairer:
        case "qemu-img":
            run("qemu-img", "check", "-q", "-r", "all", disk)
        case "qemu-io":
            run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1", disk)
        case "nbdqcow":
            with serving(disk):
                pass
    assert not Header.parse(disk.read_bytes()[:4096]).dirty
    check_image(disk)
    raw = tmp_path / "raw"
    run("qemu-img", "convert", "-O", "raw", disk, raw)
    assert raw.read_bytes() == expected


OPTIONS = [
    "lazy-refcounts=on,cache-size=1M,cache-clean-interval=1",
    "l2-cache-size=1M,refcount-cache-size=512k,overlap-check=all",
    "overlap-check.template=none,overlap-check.active-l2=on",
    "pass-discard-request=on,pass-discard-snapshot=off,pass-discard-other=on",
    "discard=unmap,detect-zeroes=unmap,node-name=disk",
    "backing.driver=raw,backing.file.driver=file,backing.file.filename=BASE",
]


@pytest.mark.parametrize("options", OPTIONS)
def test_options_are_those_of_qemu(start, image, path, tmp_path, options):
    base = tmp_path / "base"
    base.write_bytes(b"b" * MiB)
    options = options.replace("BASE", str(base))
    start(
        "--image-opts", f"driver=qcow2,file.driver=file,file.filename={image},{options}"
    )
    assert info(f"nbd+unix:///?socket={path}")["export-size"] == 10 << 20


def test_a_json_name_and_no_backing_file(start, image, path, tmp_path):
    overlay = tmp_path / "overlay"
    run("qemu-img", "create", "-qf", "qcow2", "-b", image, "-F", "qcow2", overlay)
    named = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": str(overlay)},
        "backing": None,
    }
    start("json:" + json.dumps(named))
    assert info(f"nbd+unix:///?socket={path}")["export-size"] == 10 << 20


def test_an_image_on_an_nbd_server_by_options(start, image, path, tmp_path):
    with serving(image, image_format="raw") as server:
        start(
            "--image-opts",
            f"driver=qcow2,file.driver=nbd,file.server.type=unix,"
            f"file.server.path={server.socket}",
        )
        assert info(f"nbd+unix:///?socket={path}")["export-size"] == 10 << 20


REFUSED = [
    "overlap-check=some",
    "cache-size=64k,l2-cache-size=128k",
    "cache-size=1M,l2-cache-size=64k,refcount-cache-size=64k",
    "lazy-refcounts=maybe",
    "overlap-check=all,overlap-check.template=none",
]


@pytest.mark.parametrize("options", REFUSED)
def test_options_are_refused_as_by_qemu(program, image, options):
    done = subprocess.run(
        [program, "--image-opts", f"driver=qcow2,file.filename={image},{options}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1

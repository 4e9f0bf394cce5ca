"""What an image says of zeroes that were written through ``nbdqcow-nbd``: tools and
tests look at its map, not at its content alone."""

import json
import subprocess

import pytest

from tests.conftest import find_tool, wait_until_listening
from tests.interop.nbd_beside_qemu import ours, path, theirs, wait_gone

__all__ = ["ours", "path", "theirs"]

WORK = (
    "write -z 0 64k",
    "write -zu 65536 70000",
    "write -P 5 256k 128k",
    "write -zu 256k 30k",
    "write -z 320k 64k",
    "discard 384k 128k",
    "write -zu 500k 100k",
    "write -P 0 768k 64k",
    "write -z 1000k 5k",
)
DETECTING = ("--discard=unmap", "--detect-zeroes=unmap")
DETECTED = ("write -P 0 700k 1", "write -P 0 900k 10k")
BACKING = ("-b", "base", "-F", "qcow2")


def work_through(program, path, directory, create, options):
    """Return the map of an image after the work, without places in the file."""
    img = find_tool("qemu-img")
    image = directory / "image"
    line = [img, "create", "-q", "-f", "qcow2", *create, image, "1M"]
    subprocess.run(line, check=True, cwd=directory)
    command = [program, "-t", "-k", path, "-f", "qcow2", *options, image]
    with subprocess.Popen(command) as process:
        try:
            wait_until_listening(path, process)
            lines = (*WORK, *DETECTED) if options == DETECTING else WORK
            words = [word for line in lines for word in ("-c", line)]
            uri = f"nbd+unix:///?socket={path}"
            io = [find_tool("qemu-io"), "-f", "raw", uri, *words]
            subprocess.run(io, check=True, stdout=subprocess.DEVNULL)
        finally:
            process.terminate()
    wait_gone(path)
    subprocess.run([img, "check", "-q", image], check=True)
    out = subprocess.run(
        [img, "map", "--output=json", image], check=True, capture_output=True
    ).stdout
    return [{**each, "offset": None} for each in json.loads(out)]


@pytest.mark.parametrize("options", [(), ("--discard=unmap",), DETECTING])
@pytest.mark.parametrize("create", [(), ("-o", "extended_l2=on"), BACKING])
def test_as_qemu_nbd(ours, theirs, path, tmp_path, create, options):
    base = [find_tool("qemu-img"), "create", "-q", "-f", "qcow2", tmp_path / "base"]
    subprocess.run([*base, "1M"], check=True)
    by_ours, by_theirs = (
        work_through(program, path, tmp_path, create, options)
        for program in (ours, theirs)
    )
    assert by_ours == by_theirs

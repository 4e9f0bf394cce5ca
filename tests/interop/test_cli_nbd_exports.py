"""What ``nbdqcow-nbd`` exports of an image, as qemu-nbd does."""

import json
import subprocess

import pytest

from tests.conftest import find_tool
from tests.interop.commands import info, run
from tests.interop.nbd_beside_qemu import (
    image,
    ours,
    path,
    program,
    start,
    theirs,
    wait_gone,
)

__all__ = ["image", "ours", "path", "program", "start", "theirs"]


def nbdsh(script, path):
    """Return ``result`` of a script with a libnbd handle ``h`` for a socket."""
    python = "/usr/bin/python3"
    probe = [python, "-c", "import nbd"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip(f"{python} has no module nbd (python3-libnbd)")
    program = "import json, sys, nbd\nh = nbd.NBD()\n" + script
    text, _ = run(python, "-c", program + "print(json.dumps(result))", path)
    return json.loads(text)


@pytest.mark.parametrize(
    ("options", "multi_conn", "read_only"),
    [
        ((), False, False),
        (("-r",), False, True),
        (("-e", "2"), True, False),
        (("-e", "0", "-r"), True, True),
    ],
)
def test_multi_conn(start, image, path, options, multi_conn, read_only):
    start("-t", *options, "-f", "qcow2", "-x", "a name", "-D", "what it is", image)
    export = info(f"nbd+unix:///a%20name?socket={path}")
    assert export["can_multi_conn"] is multi_conn
    assert export["is_read_only"] is read_only
    assert export["description"] == "what it is"


def test_discard_is_ignored_unless_asked_for(start, image, path):
    qemu_img = find_tool("qemu-img")
    run(find_tool("qemu-io"), "-c", "write 0 1M", image)
    start("-f", "qcow2", image).stderr.fileno()
    run(find_tool("qemu-io"), "-f", "raw", f"nbd+unix:///?socket={path}",
        "-c", "discard 0 1M")  # fmt: skip
    wait_gone(path)
    assert '"data": true' in run(qemu_img, "map", "--output=json", image)[0]
    start("-f", "qcow2", "--discard=unmap", image)
    run(find_tool("qemu-io"), "-f", "raw", f"nbd+unix:///?socket={path}",
        "-c", "discard 0 1M")  # fmt: skip
    wait_gone(path)
    assert '"data": true' not in run(qemu_img, "map", "--output=json", image)[0]


def test_image_opts(start, image, path):
    start("--image-opts", f"driver=qcow2,file.driver=file,file.filename={image}")
    assert info(f"nbd+unix:///?socket={path}")["export-size"] == 10 << 20


def test_an_offset_into_a_raw_image(start, tmp_path, path):
    raw = tmp_path / "disk.raw"
    raw.write_bytes(b"a" * 4096 + b"b" * 8192)
    start("-o", "0x1000", "-f", "raw", raw)
    uri = f"nbd+unix:///?socket={path}"
    run(find_tool("qemu-io"), "-f", "raw", uri, "-c", "read -P 0x62 0 8k",
        "-c", "write -P 0x63 0 512")  # fmt: skip
    wait_gone(path)
    assert raw.read_bytes() == b"a" * 4096 + b"c" * 512 + b"b" * 7680


def test_contexts_are_offered_on_demand(start, image, path):
    start("-t", "-e", "0", "-f", "qcow2", image)
    uri = f"nbd+unix:///?socket={path}"
    assert info(uri)["contexts"] == ["base:allocation"]


def test_allocation_depth(start, image, path):
    start("-t", "-A", "-f", "qcow2", image)
    contexts = info(f"nbd+unix:///?socket={path}")["contexts"]
    assert contexts == ["base:allocation", "qemu:allocation-depth"]


def test_a_named_export_has_no_other_name(start, image, path):
    start("-t", "-x", "disk", "-f", "qcow2", image)
    assert info(f"nbd+unix:///disk?socket={path}")["export-size"] == 10 << 20
    run(find_tool("nbdinfo"), f"nbd+unix:///?socket={path}", status=1)


def test_a_bitmap_that_is_not_there(program, image, path):
    _, err = run(program, "-B", "b0", "-f", "qcow2", "-k", path, image, status=1)
    assert err == "qemu-nbd: Bitmap 'b0' is not found\n"


def test_an_offset_into_a_qcow2_image(start, image, path):
    """The window is one of the guest's disk, not of the file."""
    qemu_io = find_tool("qemu-io")
    run(qemu_io, "-c", "write -P 1 0 2M", "-c", "write -z 4M 1M", image)
    process = start("-t", "-o", "1049088", "-f", "qcow2", "--discard=unmap", image)
    uri = f"nbd+unix:///?socket={path}"
    assert info(uri)["export-size"] == (10 << 20) - 1049088
    run(qemu_io, "-f", "raw", uri, "-c", "read -P 1 0 1048064",
        "-c", "read -P 0 1048064 1M", "-c", "write -P 2 512 8M",
        "-c", "write -P 3 1000 3000", "-c", "write -z 64k 128k",
        "-c", "discard 256k 128k")  # fmt: skip
    extents = json.loads(run(find_tool("nbdinfo"), "--map", "--json", uri)[0])
    assert {extent["type"] for extent in extents} == {0, 3}
    process.terminate()
    assert process.wait(20) == 0
    run(qemu_io, image, "-c", "read -P 1 0 1049600", "-c", "read -P 2 1049600 488",
        "-c", "read -P 3 1050088 3000", "-c", "read -P 0 1114624 128k")  # fmt: skip
    run(find_tool("qemu-img"), "check", "-q", image)


def test_an_offset_past_the_end(ours, image, path):
    _, err = run(ours, "-o", "11M", "-f", "qcow2", "-k", path, image, status=1)
    assert err == "qemu-nbd: Invalid offset '11M'\n"
    _, err = run(ours, "-o", "99999999", "-f", "qcow2", "-k", path, image, status=1)
    assert err == (
        "qemu-nbd: Offset (99999999) cannot be greater than size of the containing"
        " file (10485760)\n"
    )


def test_load_snapshot(image, start, path):
    uri = f"nbd+unix:///?socket={path}"
    qemu_io = (find_tool("qemu-io"), "-f", "qcow2", "-c")
    run(*qemu_io, "write -P 1 0 1M", image)
    run(find_tool("qemu-img"), "snapshot", "-c", "first", image)
    run(*qemu_io, "write -P 2 0 1M", image)
    run(find_tool("qemu-img"), "snapshot", "-c", "2nd", image)
    run(*qemu_io, "write -P 3 0 1M", image)
    for option, pattern in (
        ("first", 1), ("1", 1), ("snapshot.name=2nd", 2),
        ("snapshot.id=1,snapshot.name=first", 1),
    ):  # fmt: skip
        process = start("-r", "-l", option, image)
        run(
            find_tool("qemu-io"),
            "-r",
            "-f",
            "raw",
            "-c",
            f"read -P {pattern} 0 1M",
            uri,
        )
        assert process.wait(20) == 0


def test_bitmaps_of_the_chain(image, start, path, tmp_path):
    """Each -B adds one; that of a backing file has its name, too."""
    qemu_img, top = find_tool("qemu-img"), tmp_path / "top"
    run(qemu_img, "bitmap", "--add", "--disable", image, "low")
    run(qemu_img, "create", "-f", "qcow2", "-b", image, "-F", "qcow2", top)
    for name in ("a", "b", "c"):
        run(qemu_img, "bitmap", "--add", "--disable", top, name)
    start("-t", "-r", "-B", "a", "-B", "low", "-B", "b", "-f", "qcow2", top)
    uri = f"nbd+unix:///?socket={path}"
    contexts = info(uri)["contexts"]
    assert sorted(contexts[1:]) == [f"qemu:dirty-bitmap:{n}" for n in ("a", "b", "low")]
    text, _ = run(find_tool("nbdinfo"), "--map=qemu:dirty-bitmap:low", uri)
    assert text.split()[:3] == ["0", str(10 << 20), "0"]


def test_bitmap(image, start, path):
    run(find_tool("qemu-img"), "bitmap", "--add", image, "b0")
    qemu_io = (find_tool("qemu-io"), "-c")
    run(*qemu_io, "write 1M 64k", image)
    run(find_tool("qemu-img"), "bitmap", "--disable", image, "b0")
    # Given twice it is still one, which clients that add up would count twice.
    start("-t", "-r", "-B", "b0", "-B", "b0", image)
    uri = f"nbd+unix:///?socket={path}"
    text, _ = run(find_tool("nbdinfo"), "--map=qemu:dirty-bitmap:b0", uri)
    assert [line.split()[:3] for line in text.splitlines()] == [
        ["0", "1048576", "0"],
        ["1048576", "65536", "1"],
        ["1114112", "9371648", "0"],
    ]
    # What QEMU's client takes as a map is the bitmap: dirty is no data.
    options = f"driver=nbd,server.type=unix,server.path={path}"
    options += ",x-dirty-bitmap=qemu:dirty-bitmap:b0"
    text, _ = run(
        find_tool("qemu-img"), "map", "--output=json", "--image-opts", options
    )
    extents = [(e["start"], e["length"], e["data"]) for e in json.loads(text)]
    assert extents == [
        (0, 1 << 20, True),
        (1 << 20, 64 << 10, False),
        ((1 << 20) + (64 << 10), 9371648, True),
    ]


@pytest.mark.parametrize(
    ("options", "asks", "told"),
    [
        # A guessed raw image: whole sectors for who asks, anything for others.
        ((), True, [512, 512]),
        ((), False, [0, 1]),
        (("-f", "raw"), True, [1, 1]),
        (("-f", "raw"), False, [1, 1]),
    ],
    ids=str,
)
def test_block_sizes(start, path, tmp_path, options, asks, told):
    raw = tmp_path / "disk.raw"
    with raw.open("wb") as file:
        file.truncate(1 << 20)
    start(*options, raw)
    found = nbdsh(
        "h.set_opt_mode(True)\n"
        f"h.set_request_block_size({asks})\n"
        "h.connect_unix(sys.argv[1])\n"
        "def ask(call):\n"
        "    try:\n"
        "        call()\n"
        "        return h.get_block_size(nbd.SIZE_MINIMUM)\n"
        "    except nbd.Error:\n"
        "        return 0\n"
        "result = [ask(h.opt_info), ask(h.opt_go)]\n"
        "h.shutdown()\n",
        path,
    )
    assert found == told


def test_a_sector_of_zeroes_is_a_hole_of_a_read(start, path, tmp_path):
    image = tmp_path / "small.qcow2"
    create = ("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", image, "3k")
    run(find_tool("qemu-img"), *create)
    commands = ("-c", "write -P 1 0 3k", "-c", "write -zu 2k 512")
    run(find_tool("qemu-io"), "-d", "unmap", "-f", "qcow2", *commands, image)
    start("-f", "qcow2", image)
    found = nbdsh(
        "h.connect_unix(sys.argv[1])\n"
        "result = []\n"
        "def chunk(data, offset, status, error):\n"
        "    result.append([offset, len(data), status])\n"
        "data = h.pread_structured(1024, 2048, chunk)\n"
        "assert data == bytes(512) + b'\\1' * 512\n"
        "h.pread_structured(1024, 2048, chunk, nbd.CMD_FLAG_DF)\n"
        "h.shutdown()\n",
        path,
    )
    data, hole = 1, 2
    assert found == [[2048, 512, hole], [2560, 512, data], [2048, 1024, data]]

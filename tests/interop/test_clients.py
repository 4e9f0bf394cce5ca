"""Real clients on a served image: libnbd's tools, qemu-io, nbdcopy, nbdsh."""

import json
import os
import random
from pathlib import Path

import pytest

from tests import nbd_client
from tests.nbd_client import NbdClient, NbdError
from tests.serving import (
    REFERENCE,
    check_image,
    compare_images,
    need,
    run,
    serving,
)

MiB = 1 << 20
COPY_LENGTH = int(os.environ.get("NBDQCOW_COPY_LENGTH", str(256 * MiB)))

# qemu-nbd 7.2 answers every invalid request with EINVAL.
by_the_specification = pytest.mark.skipif(
    REFERENCE, reason="qemu-nbd differs from the specification here"
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A 10 GiB qcow2 image as QEMU makes it, with nothing in it."""
    need("qemu-img")
    path = tmp_path / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "10G")
    return path


def create_raw(path: Path, length: int) -> Path:
    with path.open("wb") as file:
        file.truncate(length)
    return path


def test_nbdinfo_tells_what_the_server_can_do(image: Path) -> None:
    need("nbdinfo")
    with serving(image) as server:
        information = json.loads(run("nbdinfo", "--json", server.uri).stdout)
        listing = json.loads(run("nbdinfo", "--list", "--json", server.uri).stdout)
        plain = run("nbdinfo", server.uri).stdout
        assert run("nbdinfo", "--size", server.uri).stdout == f"{10 << 30}\n"
    assert information["protocol"] == "newstyle-fixed"
    (export,) = information["exports"]
    assert export["export-size"] == 10 << 30
    assert not export["is_read_only"]
    for ability in ("flush", "fua", "trim", "zero", "fast_zero", "cache"):
        assert export[f"can_{ability}"], ability
    assert export["can_multi_conn"]
    assert export["block_size_minimum"] == 1
    assert export["block_size_maximum"] == 32 * MiB
    assert len(listing["exports"]) == 1
    assert "export-size: 10737418240" in plain


def test_qemu_io_writes_reads_zeroes_and_discards(image: Path, tmp_path: Path) -> None:
    need("qemu-io")
    commands = (
        "write -P 0x11 0 1M",
        "write -P 0x22 65k 3k",
        "write -P 0x33 5G 200k",
        "read -P 0x11 0 65k",
        "read -P 0x22 65k 3k",
        "read -P 0 2M 1M",
        "write -z 128k 64k",
        "read -P 0 128k 64k",
        "write -zu 256k 256k",
        "read -P 0 256k 256k",
        "write -z 700k 1000",
        "discard 5G 64k",
        "flush",
        "aio_write -P 0x44 2M 512k",
        "aio_write -P 0x55 3M 512k",
        "aio_flush",
        "read -P 0x44 2M 512k",
        "read -P 0x55 3M 512k",
        "write -f -P 0x66 4M 4k",
        "read -P 0x66 4M 4k",
        "writev -P 0x77 6M 512 1536 4096",
        "readv -P 0x77 6M 6144",
    )
    words = [word for command in commands for word in ("-c", command)]
    with serving(image) as server:
        done = run("qemu-io", "-f", "raw", *words, server.uri)
        # qemu-io exits 0 after a failed pattern in some of its commands.
        output = done.stdout + done.stderr
        assert "failed" not in output, output
        # The discarded 64 KiB hold what was there or zeroes: ask which.
        with NbdClient(server.socket) as client:
            discarded = client.read(5 << 30, 64 << 10)
    assert discarded in (bytes(64 << 10), b"\x33" * (64 << 10))
    check_image(image)

    model = create_raw(tmp_path / "model.raw", 10 << 30)
    with model.open("r+b") as file:
        for offset, data in (
            (0, b"\x11" * MiB),
            (65 << 10, b"\x22" * (3 << 10)),
            (5 << 30, b"\x33" * (200 << 10)),
            (5 << 30, discarded),
            (128 << 10, bytes(64 << 10)),
            (256 << 10, bytes(256 << 10)),
            (700 << 10, bytes(1000)),
            (2 * MiB, b"\x44" * (512 << 10)),
            (3 * MiB, b"\x55" * (512 << 10)),
            (4 * MiB, b"\x66" * (4 << 10)),
            (6 * MiB, b"\x77" * 6144),
        ):
            file.seek(offset)
            file.write(data)
    compare_images(model, image, second_format="qcow2")


def test_nbdcopy_in_and_out_keeps_every_byte(
    image: Path, tmp_path: Path, seed: int
) -> None:
    need("nbdcopy")
    source = random.Random(seed)
    original, copy = tmp_path / "original.raw", tmp_path / "copy.raw"
    with original.open("wb") as file:
        for offset in range(0, COPY_LENGTH, MiB):
            if source.random() < 0.1:
                continue
            file.seek(offset)
            file.write(source.randbytes(MiB))
        file.truncate(10 << 30)
    with serving(image) as server:
        run("nbdcopy", "--flush", original, server.uri)
        run("nbdcopy", server.uri, copy)
    check_image(image)
    compare_images(original, image, second_format="qcow2")
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", original, copy)


def test_four_connections_write_side_by_side(image: Path, seed: int) -> None:
    source = random.Random(seed)
    with serving(image) as server:
        clients = [NbdClient(server.socket) for _ in range(4)]
        pieces = [source.randbytes(300_001) for _ in clients]
        # Neighbours share clusters: each write begins where another ends.
        for round_index in range(8):
            base = round_index * 4 * 300_001
            cookies = [
                client.submit(
                    nbd_client.CMD_WRITE,
                    base + index * len(piece),
                    len(piece),
                    piece,
                )
                for index, (client, piece) in enumerate(
                    zip(clients, pieces, strict=True)
                )
            ]
            for client, cookie in zip(clients, cookies, strict=True):
                assert client.wait(cookie).error == 0
            for client in clients:
                assert client.read(base, 4 * 300_001) == b"".join(pieces)
        for client in clients:
            client.disconnect()
    check_image(image)


def test_largest_payload_passes_and_a_larger_read_is_refused(image: Path) -> None:
    payload = os.urandom(MiB) * 32
    with serving(image) as server, NbdClient(server.socket) as client:
        client.write(12345, payload)
        assert client.read(12345, len(payload)) == payload
        # Several such reads at once: the server's memory is its own affair.
        cookies = [
            client.submit(nbd_client.CMD_READ, 12345, len(payload)) for _ in range(3)
        ]
        assert all(client.wait(cookie).data == payload for cookie in cookies)
        reply = client.request(nbd_client.CMD_READ, 0, 64 * MiB)
        assert reply.error in (nbd_client.EINVAL, 75)  # EOVERFLOW
        assert client.read(12345, 10) == payload[:10]


@pytest.mark.skipif(REFERENCE, reason="qemu-nbd 7.2 rounds the size up to 512")
def test_raw_file_with_an_odd_size(tmp_path: Path) -> None:
    need("nbdinfo")
    path = create_raw(tmp_path / "odd.raw", MiB + 1)
    with serving(path, image_format="raw") as server:
        assert run("nbdinfo", "--size", server.uri).stdout == f"{MiB + 1}\n"
        with NbdClient(server.socket) as client:
            client.write(MiB - 1, b"xy")
            assert client.read(MiB - 2, 3) == b"\0xy"
            with pytest.raises(NbdError) as caught:
                client.write(MiB, b"ab")
            assert caught.value.error == nbd_client.ENOSPC
    assert path.stat().st_size == MiB + 1
    assert path.read_bytes()[-3:] == b"\0xy"


@by_the_specification
def test_read_only_export_refuses_changes_and_serves_on(image: Path) -> None:
    before = image.read_bytes()
    with (
        serving(image, read_only=True) as server,
        NbdClient(server.socket) as client,
    ):
        assert client.flags & nbd_client.FLAG_READ_ONLY
        for command, data in (
            (nbd_client.CMD_WRITE, bytes(4096)),
            (nbd_client.CMD_TRIM, b""),
            (nbd_client.CMD_WRITE_ZEROES, b""),
        ):
            assert client.request(command, 0, 4096, data).error == nbd_client.EPERM
        assert client.read(0, 4096) == bytes(4096)
    assert image.read_bytes() == before


@by_the_specification
@pytest.mark.parametrize(
    ("offset", "length"),
    [(10 << 30, 512), ((10 << 30) - 1, 2), ((1 << 64) - 512, 512), (1 << 63, 1)],
)
def test_requests_past_the_end(image: Path, offset: int, length: int) -> None:
    """ENOSPC for what would write, EINVAL for a read; and still in sync."""
    wanted = {
        nbd_client.CMD_READ: {nbd_client.EINVAL},
        nbd_client.CMD_WRITE: {nbd_client.ENOSPC},
        nbd_client.CMD_WRITE_ZEROES: {nbd_client.ENOSPC},
        # The specification asks for EINVAL and lets ENOSPC pass.
        nbd_client.CMD_TRIM: {nbd_client.EINVAL, nbd_client.ENOSPC},
        nbd_client.CMD_CACHE: {nbd_client.EINVAL, nbd_client.ENOSPC},
    }
    with serving(image) as server, NbdClient(server.socket) as client:
        for command, errors in wanted.items():
            data = bytes(length) if command == nbd_client.CMD_WRITE else b""
            reply = client.request(command, offset, length, data)
            assert reply.error in errors, (command, reply)
        client.write(0, b"in sync")
        assert client.read(0, 7) == b"in sync"


def test_unknown_commands_and_flags_are_refused_in_sync(image: Path) -> None:
    with serving(image) as server, NbdClient(server.socket) as client:
        assert client.request(200, 0, 4096).error == nbd_client.EINVAL
        assert client.request(9999).error == nbd_client.EINVAL
        reply = client.request(nbd_client.CMD_READ, 0, 512, flags=1 << 15)
        assert reply.error == nbd_client.EINVAL
        reply = client.request(nbd_client.CMD_WRITE, 0, 3, b"abc", flags=1 << 9)
        assert reply.error == nbd_client.EINVAL
        client.write(7, b"in sync")
        assert client.read(7, 7) == b"in sync"


NBDSH = """
import errno, sys
import nbd

handle = nbd.NBD()
handle.set_strict_mode(0)
handle.connect_uri(sys.argv[1])

def refusal(call):
    try:
        call()
    except nbd.Error as error:
        return error.errno
    return None

size = handle.get_size()
results = {
    "write past the end": refusal(lambda: handle.pwrite(b"x" * 1024, size - 512)),
    "zero past the end": refusal(lambda: handle.zero(1024, size - 512)),
    "read past the end": refusal(lambda: handle.pread(1024, size - 512)),
    "write": refusal(lambda: handle.pwrite(b"x" * 512, 0)),
}
assert len(handle.pread(512, 0)) == 512
handle.shutdown()
print(results)
"""


@by_the_specification
@pytest.mark.parametrize("read_only", [False, True])
def test_errors_as_libnbd_sees_them(image: Path, read_only: bool) -> None:
    # libnbd's Python binding belongs to the system's interpreter.
    probe = run("/usr/bin/python3", "-c", "import nbd", check=False)
    if probe.returncode:
        pytest.skip("/usr/bin/python3 has no module nbd (python3-libnbd)")
    with serving(image, read_only=read_only) as server:
        done = run("/usr/bin/python3", "-c", NBDSH, server.uri)
    assert done.stdout.strip() == str(
        {
            "write past the end": "EPERM" if read_only else "ENOSPC",
            "zero past the end": "EPERM" if read_only else "ENOSPC",
            "read past the end": "EINVAL",
            "write": "EPERM" if read_only else None,
        }
    )


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 64, b""])
def test_a_stranger_does_not_disturb_others(image: Path, first: bytes) -> None:
    import socket

    with serving(image) as server, NbdClient(server.socket) as client:
        stranger = socket.socket(socket.AF_UNIX)
        with stranger:
            stranger.connect(str(server.socket))
            stranger.sendall(first)
            client.write(0, b"undisturbed")
            assert client.read(0, 11) == b"undisturbed"
        assert client.read(0, 11) == b"undisturbed"

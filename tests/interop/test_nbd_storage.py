"""Our client against every server there is."""

import asyncio
import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest

from nbdqcow.block.open import open_image
from nbdqcow.errors import ImageError
from nbdqcow.storage.nbd.driver import NbdStorage
from tests.certificates import Authority
from tests.conftest import find_free_port, find_tool
from tests.interop.commands import run

MiB = 1 << 20
SIZE = 8 * MiB

SERVERS = {
    "ours": [sys.executable, "-m", "nbdqcow", "serve", "{raw}", "-f", "raw",
             "--unix", "{socket}"],
    "ours-qcow2": [sys.executable, "-m", "nbdqcow", "serve", "{qcow2}", "-f", "qcow2",
                   "--unix", "{socket}"],
    "qemu-nbd": ["qemu-nbd", "-t", "-f", "raw", "--discard=unmap", "-k", "{socket}",
                 "{raw}"],
    "qemu-nbd-qcow2": ["qemu-nbd", "-t", "-f", "qcow2", "-k", "{socket}", "{qcow2}"],
    "nbdkit": ["nbdkit", "-f", "-U", "{socket}", "memory", str(SIZE)],
    "nbdkit-512": ["nbdkit", "-f", "-U", "{socket}", "--filter=blocksize-policy",
                   "memory", str(SIZE), "blocksize-minimum=512",
                   "blocksize-preferred=4096", "blocksize-maximum=64K",
                   "blocksize-error-policy=error"],
    "nbdkit-simple": ["nbdkit", "-f", "-U", "{socket}", "--no-sr", "memory", str(SIZE)],
    "nbdkit-old": ["nbdkit", "-f", "-U", "{socket}", "--mask-handshake=0", "memory",
                   str(SIZE)],
    "nbdkit-plain": ["nbdkit", "-f", "-U", "{socket}", "--filter=nozero",
                     "--filter=fua", "memory", str(SIZE), "zeromode=none",
                     "fuamode=emulate"],
    "nbd-server": ["nbd-server", "-d", "-C", "{config}"],
}  # fmt: skip

CONFIG = """\
[generic]
    listenaddr = 127.0.0.1
    port = {port}
    allowlist = true
[disk]
    exportname = {raw}
    flush = true
    fua = true
    trim = true
"""


@pytest.fixture
def start(served, short_path, tmp_path):
    """``start("qemu-nbd")`` starts that server; returns where its export is."""

    def start(name):
        if not name.startswith("ours"):
            find_tool(SERVERS[name][0])
        raw, qcow2 = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
        socket = short_path / name
        with raw.open("wb") as file:
            file.truncate(SIZE)
        run(find_tool("qemu-img"), "create", "-q", "-f", "qcow2", qcow2, str(SIZE))
        port, config = find_free_port(), tmp_path / "config"
        config.write_text(CONFIG.format(port=port, raw=raw))
        command = [
            word.format(raw=raw, qcow2=qcow2, socket=socket, config=config)
            for word in SERVERS[name]
        ]
        command[0] = find_tool(command[0]) if "/" not in command[0] else command[0]
        if name == "nbd-server":
            # In the foreground it has one client, so none may come to try.
            served(command=command, is_ready=lambda: listens(port))
            return f"nbd://127.0.0.1:{port}/disk"
        uri = f"nbd+unix:///?socket={socket}"
        served(command=command, is_ready=lambda: answers(uri))
        return uri

    return start


def listens(port):
    """Whether this machine has a listener on a TCP port."""
    return f":{port:04X} 00000000:0000 0A" in Path("/proc/net/tcp").read_text()


def answers(uri):
    # libnbd 1.22's --size can't be told by a server of the oldest newstyle.
    command = [find_tool("nbdinfo"), "--no-content", uri]
    return subprocess.run(command, capture_output=True, timeout=60).returncode == 0


async def work(storage, seed, nb_rounds=60):
    """Random operations, several at a time, against a model."""
    rng = random.Random(seed)
    model = bytearray(SIZE)
    # Where a discard leaves any content.
    unknown = bytearray(SIZE)

    async def one(start, end):
        offset = rng.randrange(start, end)
        length = rng.choice((1, 511, 4096, rng.randrange(1, end - start), end))
        length = max(1, min(length, end - offset))
        stop = offset + length
        match rng.choice(("read", "write", "write", "writev", "zero", "discard",
                          "status", "flush", "prefetch")):  # fmt: skip
            case "read":
                expected = bytes(model[offset:stop])
                mask = bytes(unknown[offset:stop])
                data = bytes(await storage.pread(offset, length))
                if any(mask):
                    pairs = zip(data, expected, mask, strict=True)
                    assert all(a == b or m for a, b, m in pairs)
                else:
                    assert data == expected
            case "write":
                data = rng.randbytes(length)
                await storage.pwritev(offset, [data], fua=rng.random() < 0.2)
                model[offset:stop] = data
                unknown[offset:stop] = bytes(length)
            case "writev":
                data = rng.randbytes(length)
                middle = rng.randrange(length + 1)
                await storage.pwritev(offset, [data[:middle], data[middle:]])
                model[offset:stop] = data
                unknown[offset:stop] = bytes(length)
            case "zero":
                await storage.write_zeroes(offset, length, may_unmap=rng.random() < 0.5)
                model[offset:stop] = bytes(length)
                unknown[offset:stop] = bytes(length)
            case "discard":
                unknown[offset:stop] = b"\1" * length
                await storage.discard(offset, length)
            case "status":
                allocated, nb = await storage.block_status(offset, length)
                assert 1 <= nb <= length
                if not allocated:
                    assert not any(
                        a and not m
                        for a, m in zip(
                            model[offset : offset + nb],
                            unknown[offset : offset + nb],
                            strict=True,
                        )
                    )
            case "flush":
                await storage.flush()
            case "prefetch":
                await storage.prefetch(offset, length)

    for _ in range(nb_rounds):
        nb = rng.randrange(1, 9)
        cuts = sorted(rng.sample(range(1, SIZE), nb - 1))
        bounds = [0, *cuts, SIZE]
        await asyncio.gather(*(one(a, b) for a, b in itertools.pairwise(bounds)))
    await storage.flush()
    data = await storage.pread(0, SIZE)
    assert all(a == b or m for a, b, m in zip(bytes(data), model, unknown, strict=True))


@pytest.mark.asyncio
@pytest.mark.parametrize("name", SERVERS)
async def test_random_operations(start, seed, name):
    storage = await NbdStorage.open(start(name))
    try:
        assert storage.length == SIZE
        await work(storage, seed)
        # Past the end.
        assert await storage.pread(SIZE - 3, 10) == bytes(
            await storage.pread(SIZE - 3, 3)
        ) + bytes(7)
        with pytest.raises(OSError, match="no room"):
            await storage.pwritev(SIZE - 1, [b"ab"])
    finally:
        await storage.close()


@pytest.mark.parametrize("server", ["qemu-nbd", "ours", "nbdkit-512"])
def test_qcow2_on_an_export(start, served, short_path, tmp_path, server):
    """A qcow2 image in a raw export, served by us, written by QEMU."""
    inner = start(server)
    run(find_tool("qemu-img"), "create", "-q", "-f", "qcow2", inner, "6M")
    outer = f"nbd+unix:///?socket={short_path}/outer"
    server = served(inner, "--format", "qcow2", "--unix", short_path / "outer")
    run(
        find_tool("qemu-io"), "-f", "raw", outer,
        "-c", "write -P 7 65535 70000", "-c", "write -P 9 3M 1M",
        "-c", "write -z 1M 64k", "-c", "discard 3M 64k", "-c", "flush",
        "-c", "read -P 7 65535 70000",
    )  # fmt: skip
    source = tmp_path / "source"
    source.write_bytes(random.Random(1).randbytes(6 * MiB))
    run(find_tool("nbdcopy"), source, outer)
    server.stop()
    run(find_tool("qemu-img"), "check", "-f", "qcow2", inner)
    run(find_tool("qemu-img"), "compare", "-f", "raw", "-F", "qcow2", source, inner)


@pytest.mark.asyncio
async def test_backing_file_on_an_export(start, tmp_path):
    uri = start("qemu-nbd")
    data = random.Random(2).randbytes(MiB)
    async with open_image(uri, format="raw") as node:
        await node.pwrite(MiB, data)
        await node.flush()
    overlay = tmp_path / "overlay.qcow2"
    run(
        find_tool("qemu-img"), "create", "-q", "-f", "qcow2",
        "-b", uri, "-F", "raw", overlay,
    )  # fmt: skip
    async with open_image(overlay) as node:
        assert node.size == SIZE
        assert await node.pread(MiB, MiB) == data
        await node.pwrite(MiB + 5, b"hello")
        assert bytes(await node.pread(MiB, 20)) == data[:5] + b"hello" + data[10:20]
    with pytest.raises(ImageError, match="outside the allowed paths"):
        await open_image(overlay, allowed_paths=[str(tmp_path)])
    async with open_image(overlay, allowed_paths=[str(tmp_path), uri]) as node:
        assert bytes(await node.pread(MiB + 5, 5)) == b"hello"


@pytest.fixture
def pki(tmp_path):
    authority = Authority()
    authority.write_server(tmp_path / "server")
    authority.write_client(tmp_path / "alice", authority.client("alice"))
    authority.write_client(tmp_path / "nobody")
    Authority().write_client(tmp_path / "stranger")
    return tmp_path


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["ours", "qemu-nbd", "nbdkit"])
async def test_tls(served, pki, seed, name):
    port = find_free_port()
    raw = pki / "disk.raw"
    with raw.open("wb") as file:
        file.truncate(SIZE)
    command = {
        "ours": [sys.executable, "-m", "nbdqcow", "serve", raw, "-f", "raw", "--listen",
                 f"127.0.0.1:{port}", "--tls-certificates", pki / "server"],
        "qemu-nbd": [find_tool("qemu-nbd"), "-t", "-f", "raw", "-b", "127.0.0.1", "-p",
                     str(port), "--object", "tls-creds-x509,id=t,endpoint=server,"
                     f"verify-peer=off,dir={pki / 'server'}", "--tls-creds", "t", raw],
        "nbdkit": [find_tool("nbdkit"), "-f", "-i", "127.0.0.1", "-p", str(port),
                   "--tls=require", f"--tls-certificates={pki / 'server'}", "memory",
                   str(SIZE)],
    }[name]  # fmt: skip
    served(command=list(map(str, command)), is_ready=lambda: listens(port))
    uri = f"nbds://localhost:{port}/?tls-certificates={pki}"
    storage = await NbdStorage.open(f"{uri}/alice")
    try:
        await work(storage, seed, 10)
    finally:
        await storage.close()
    for rest, reason in (
        ("/stranger", "certificate is refused"),
        ("/nobody&tls-hostname=other.example", "ostname mismatch"),
        ("/none", "No such file"),
    ):
        with pytest.raises(ImageError, match=reason):
            await NbdStorage.open(uri + rest)
    storage = await NbdStorage.open(f"{uri}/stranger&tls-verify-peer=0")
    await storage.close()
    with pytest.raises(ImageError, match=r"TLS|tls"):
        await NbdStorage.open(f"nbd://127.0.0.1:{port}/")


@pytest.mark.asyncio
async def test_no_tls(start, pki):
    uri = start("qemu-nbd").replace("nbd+unix", "nbds+unix")
    with pytest.raises(ImageError, match="TLS not configured"):
        await NbdStorage.open(f"{uri}&tls-certificates={pki}/nobody")


@pytest.mark.asyncio
async def test_older_names(start, short_path):
    start("qemu-nbd")
    for name in (
        f"nbd:unix:{short_path}/qemu-nbd",
        f"nbd:unix:{short_path}/qemu-nbd:exportname=",
    ):
        async with open_image(name, format="raw") as node:
            assert node.size == SIZE
    with pytest.raises(ImageError, match="none"):
        await open_image(f"nbd:unix:{short_path}/qemu-nbd:exportname=none")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nbd+unix:///?socket=/none/at/all", "No such file"),
        ("nbd://127.0.0.1:{port}/", "refused"),
        ("nbd:127.0.0.1:{port}", "refused"),
        ("nbd://host.invalid/", "address resolution failed for host.invalid:10809: "),
        ("nbd+unix:///", "needs a socket"),
        ("nbd:", "NBD server address missing"),
        ("nbd:unix:", "needs a path"),
        ("http://h/", "Unknown protocol 'http'"),
    ],
)
async def test_no_server(name, reason):
    name = name.format(port=find_free_port())
    with pytest.raises(ImageError, match=reason) as raised:
        await open_image(name)
    assert "\n" not in str(raised.value)

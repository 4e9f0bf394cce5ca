"""Image locks against QEMU's own programs, both ways round."""

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdqcow.errors import ImageInUse
from nbdqcow.storage.file import FileStorage

Tool = Callable[[str], str]


def qemu(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def image(tmp_path: Path, tool: Tool) -> str:
    filename = str(tmp_path / "disk.qcow2")
    done = qemu(tool("qemu-img"), "create", "-q", "-f", "qcow2", filename, "1M")
    assert done.returncode == 0, done.stderr
    return filename


@contextmanager
def qemu_nbd(
    program: str, image: str, socket_path: Path, *options: str
) -> Iterator[int]:
    """Serve an image with qemu-nbd; yields its pid."""
    process = subprocess.Popen(
        [program, "-t", "-f", "qcow2", "-k", str(socket_path), *options, image]
    )
    try:
        deadline = time.monotonic() + 20
        # The socket comes first; who greets has opened the image.
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            while client.connect_ex(str(socket_path)) != 0:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert client.recv(8) == b"NBDMAGIC"
        yield process.pid
    finally:
        # qemu-nbd forgets a SIGTERM that comes while it is still starting.
        process.kill()
        process.wait()


@pytest.mark.asyncio
async def test_qemu_keeps_off_an_image_that_we_write(image: str, tool: Tool):
    storage = await FileStorage.open(image)
    hint = f"Is another process using the image [{image}]?"
    info = qemu(tool("qemu-img"), "info", image)
    assert info.returncode == 1
    assert 'Failed to get shared "write" lock' in info.stderr
    assert hint in info.stderr
    shared = qemu(tool("qemu-img"), "info", "-U", image)
    assert shared.returncode == 0
    for command in (
        ("qemu-io", "-f", "qcow2", "-c", "read 0 512", image),
        ("qemu-img", "resize", "-f", "qcow2", image, "2M"),
    ):
        done = qemu(tool(command[0]), *command[1:])
        assert done.returncode == 1
        assert 'Failed to get "write" lock' in done.stderr
        assert hint in done.stderr
    await storage.close()
    info = qemu(tool("qemu-img"), "info", image)
    assert info.returncode == 0


@pytest.mark.asyncio
async def test_qemu_reads_an_image_that_we_read(image: str, tool: Tool):
    storage = await FileStorage.open(image, read_only=True)
    read = ("-f", "qcow2", "-c", "read 0 512", image)
    done = qemu(tool("qemu-io"), "-r", *read)
    assert done.returncode == 0, done.stderr
    done = qemu(tool("qemu-io"), *read)
    assert done.returncode == 1
    assert 'Failed to get "write" lock' in done.stderr
    await storage.close()


@pytest.mark.asyncio
async def test_we_keep_off_an_image_that_qemu_writes(
    image: str, tool: Tool, tmp_path: Path
):
    with qemu_nbd(tool("qemu-nbd"), image, tmp_path / "s") as pid:
        for read_only, message in (
            (False, 'Failed to get "write" lock'),
            (True, 'Failed to get shared "write" lock'),
        ):
            with pytest.raises(ImageInUse) as caught:
                await FileStorage.open(image, read_only=read_only)
            assert str(caught.value) == (
                f"{message}\nIs another process using the image [{image}]?"
                f" Held by qemu-nbd (pid {pid})."
            )
        storage = await FileStorage.open(image, read_only=True, shared=True)
        await storage.close()
    storage = await FileStorage.open(image)
    await storage.close()


@pytest.mark.asyncio
async def test_we_read_an_image_that_qemu_reads(image: str, tool: Tool, tmp_path: Path):
    with qemu_nbd(tool("qemu-nbd"), image, tmp_path / "s", "-r"):
        storage = await FileStorage.open(image, read_only=True)
        await storage.close()
        with pytest.raises(ImageInUse, match='Failed to get "write" lock'):
            await FileStorage.open(image)


@pytest.mark.asyncio
async def test_a_backing_file_is_shared_with_readers_only(
    image: str, tool: Tool, tmp_path: Path
):
    overlay = str(tmp_path / "overlay.qcow2")
    options = ("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", image, overlay)
    done = qemu(tool("qemu-img"), *options)
    assert done.returncode == 0, done.stderr
    with qemu_nbd(tool("qemu-nbd"), overlay, tmp_path / "s"):
        base = await FileStorage.open(image, read_only=True)
        await base.close()
        with pytest.raises(ImageInUse, match='Failed to get "write" lock'):
            await FileStorage.open(image)
    base = await FileStorage.open(image, read_only=True)
    other = str(tmp_path / "other.qcow2")
    done = qemu(tool("qemu-img"), *options[:-1], other)
    assert done.returncode == 0, done.stderr
    with qemu_nbd(tool("qemu-nbd"), other, tmp_path / "s2"):
        pass
    await base.close()

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nbdqcow.block.storage import FileRole
from nbdqcow.errors import ImageError, ImageInUse
from nbdqcow.storage import locks
from nbdqcow.storage.file import FileStorage

READ_ONLY = locks.choose(FileRole.IMAGE, read_only=True)


def held_bytes(fd: int) -> set[int]:
    """Which bytes a descriptor of ours has locked, as the kernel tells."""
    held: set[int] = set()
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        if line.startswith("lock:"):
            assert "OFDLCK" in line
            assert "READ" in line
            first, last = map(int, line.split()[-2:])
            held.update(range(first, last + 1))
    return held


@pytest.mark.parametrize(
    ("permissions", "expected"),
    [
        (READ_ONLY, {100, 201, 203}),
        (locks.READ_WRITE, {100, 101, 103, 201, 203}),
        (locks.choose(FileRole.IMAGE, read_only=True, shared=True), {100}),
        (locks.choose(FileRole.IMAGE, read_only=True, reads_data=False), {201, 203}),
        (locks.choose(FileRole.DATA, read_only=False), {100, 101, 103, 203}),
        (locks.choose(FileRole.PLAIN, read_only=True), {100}),
        (locks.choose(FileRole.PLAIN, read_only=False), {100, 101}),
        (locks.choose(FileRole.PLAIN, read_only=False, resizes=True), {100, 101, 103}),
        (locks.Permissions(locks.WRITE_UNCHANGED, locks.WRITE_UNCHANGED), {102, 202}),
    ],
)
def test_locks_the_bytes_that_qemu_locks(
    tmp_path: Path, permissions: locks.Permissions, expected: set[int]
):
    path = tmp_path / "disk"
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    locks.lock_blocking(fd, str(path), permissions)
    assert held_bytes(fd) == expected
    os.close(fd)


@pytest.mark.asyncio
async def test_readers_share_and_writers_do_not(tmp_path: Path):
    filename = str(tmp_path / "disk")
    Path(filename).touch()
    readers = [await FileStorage.open(filename, read_only=True) for _ in range(3)]
    with pytest.raises(ImageInUse, match=r'^Failed to get "write" lock\n'):
        await FileStorage.open(filename)
    with pytest.raises(ImageInUse):
        await FileStorage.create(filename, 5)
    for reader in readers:
        await reader.close()

    writer = await FileStorage.open(filename)
    with pytest.raises(ImageInUse, match=r'^Failed to get shared "write" lock\n'):
        await FileStorage.open(filename, read_only=True)
    with pytest.raises(ImageInUse, match=r'^Failed to get "write" lock\n'):
        await FileStorage.open(filename)
    for options in ({"shared": True}, {"locking": False}):
        reader = await FileStorage.open(filename, read_only=True, **options)
        await reader.close()
    unlocked = await FileStorage.open(filename, locking=False)
    await unlocked.close()
    await writer.close()
    writer = await FileStorage.open(filename)
    await writer.close()


@pytest.mark.asyncio
async def test_a_refused_create_keeps_the_content(tmp_path: Path):
    filename = str(tmp_path / "disk")
    Path(filename).write_bytes(b"precious")
    reader = await FileStorage.open(filename, read_only=True)
    with pytest.raises(ImageInUse):
        await FileStorage.create(filename, 100)
    assert await reader.pread(0, 8) == b"precious"
    await reader.close()


def test_names_the_holder(tmp_path: Path):
    path = tmp_path / "disk"
    path.touch()
    script = (
        "import os, sys\n"
        "from nbdqcow.storage import locks\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "locks.lock_blocking(fd, sys.argv[1], locks.READ_WRITE)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        command = Path(f"/proc/{holder.pid}/comm").read_text().strip()
        fd = os.open(path, os.O_RDWR)
        with pytest.raises(ImageInUse) as caught:
            locks.lock_blocking(fd, str(path), locks.READ_WRITE)
        os.close(fd)
        holder.communicate()
    assert str(caught.value) == (
        'Failed to get "write" lock\n'
        f"Is another process using the image [{path}]?"
        f" Held by {command} (pid {holder.pid})."
    )


def test_names_itself_but_not_its_own_descriptor(tmp_path: Path):
    path = tmp_path / "disk"
    path.touch()
    first, second = (os.open(path, os.O_RDWR) for _ in range(2))
    locks.lock_blocking(first, str(path), locks.READ_WRITE)
    with pytest.raises(ImageInUse, match=rf"this process \(pid {os.getpid()}\)\.$"):
        locks.lock_blocking(second, str(path), locks.READ_WRITE)
    os.close(first)
    # The second still has its own locks, and they are no reason to refuse it.
    locks.lock_blocking(second, str(path), locks.READ_WRITE)
    os.close(second)


def test_without_proc_nobody_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "disk"
    path.touch()
    first, second = (os.open(path, os.O_RDWR) for _ in range(2))
    locks.lock_blocking(first, str(path), locks.READ_WRITE)

    def no_proc(path: str) -> list[str]:
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(os, "listdir", no_proc)
    with pytest.raises(ImageInUse, match=re.escape(f"[{path}]?") + "$"):
        locks.lock_blocking(second, str(path), locks.READ_WRITE)
    os.close(first)
    os.close(second)


def test_a_whole_file_lock_of_another_kind_is_in_use_too(tmp_path: Path):
    path = tmp_path / "disk"
    path.touch()
    first, second = (os.open(path, os.O_RDWR) for _ in range(2))
    whole = locks._FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    fcntl.fcntl(first, locks._F_OFD_SETLK, whole)
    with pytest.raises(ImageInUse, match=rf"lock byte 100\n.*\(pid {os.getpid()}\)"):
        locks.lock_blocking(second, str(path), READ_ONLY)
    os.close(first)
    os.close(second)


def test_says_that_a_file_can_not_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "disk"
    path.touch()
    fd = os.open(path, os.O_RDWR)

    def no_locks(fd: int, command: int, lock: bytes) -> bytes:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "fcntl", no_locks)
    with pytest.raises(ImageError, match=r"No locks available .*locking off"):
        locks.lock_blocking(fd, str(path), READ_ONLY)
    os.close(fd)

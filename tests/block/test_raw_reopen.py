"""Raw images that are made read-only, writable again and shorter in use."""

import asyncio
import errno
import gc
import os
import threading

import pytest

from nbdqcow import open_image
from nbdqcow.errors import BlockError, ImageInUse
from nbdqcow.storage.file import FileStorage
from tests.block.test_luks_driver import SECRET, container  # noqa: F401

MIB = 1 << 20


class _Gate:
    """Lets writes begin in their threads, and go on when told to."""

    def __init__(self, monkeypatch):
        self.entered, self.opened = threading.Event(), threading.Event()
        self.log = []
        write, sync = FileStorage._pwritev_blocking, FileStorage._sync_blocking

        def slow_write(storage, *arguments):
            self.entered.set()
            assert self.opened.wait(60)
            write(storage, *arguments)
            self.log.append("write")

        def noted_sync(storage):
            self.log.append("sync")
            sync(storage)

        monkeypatch.setattr(FileStorage, "_pwritev_blocking", slow_write)
        monkeypatch.setattr(FileStorage, "_sync_blocking", noted_sync)

    async def begun(self):
        while not self.entered.is_set():
            await asyncio.sleep(0)


@pytest.mark.asyncio
async def test_a_write_that_has_begun_is_durable_once_read_only(tmp_path, monkeypatch):
    path = tmp_path / "disk"
    path.write_bytes(bytes(4 * MIB))
    async with open_image(path, format="raw") as node:
        gate = _Gate(monkeypatch)
        writing = asyncio.create_task(node.pwrite(0, b"\1" * MIB))
        await gate.begun()
        reopening = asyncio.create_task(node.reopen(read_only=True))
        for _ in range(10):
            await asyncio.sleep(0)
        with pytest.raises(BlockError):
            await node.pwrite(MIB, b"\2" * MIB)
        gate.opened.set()
        await writing
        await reopening
        await node.flush()
        assert gate.log[-2:] == ["write", "sync"]
    assert path.read_bytes() == b"\1" * MIB + bytes(3 * MIB)


@pytest.mark.asyncio
async def test_what_fails_without_its_caller_is_one_line(tmp_path, monkeypatch, caplog):
    """asyncio says nothing of it, which would be a traceback."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    async with open_image(path, format="raw") as node:
        go_on = asyncio.Event()

        async def fail(*, read_only):
            await go_on.wait()
            raise OSError(errno.ENOSPC, "no more")

        monkeypatch.setattr(node.driver, "reopen", fail)
        reopening = asyncio.create_task(node.reopen(read_only=True))
        await asyncio.sleep(0)
        reopening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reopening
        go_on.set()
    del reopening
    gc.collect()
    assert [record.getMessage() for record in caplog.records] == [f"{path}: no more"]


@pytest.mark.asyncio
async def test_the_map_is_not_that_of_an_earlier_time(tmp_path):
    """What a read-only image's map said counts no more once it was written to."""
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(4 * MIB)
    async with open_image(path, format="raw", read_only=True) as node:
        assert await node.reads_zero(0, 4 * MIB)
        await node.reopen(read_only=False)
        await node.pwrite(MIB, b"\1" * 65536)
        await node.reopen(read_only=True)
        assert not await node.reads_zero(0, 4 * MIB)


@pytest.mark.asyncio
async def test_a_luks_disk_shrinks_after_the_writes_behind_its_end(
    container,  # noqa: F811
    monkeypatch,
):
    async with open_image(container, driver_options=SECRET) as node:
        end = os.stat(container).st_size
        gate = _Gate(monkeypatch)
        writing = asyncio.create_task(node.pwrite(0, b"\1" * MIB))
        await gate.begun()
        shrinking = asyncio.create_task(node.resize(512))
        for _ in range(10):
            await asyncio.sleep(0)
        gate.opened.set()
        await writing
        await shrinking
        assert os.stat(container).st_size == end - MIB + 512


@pytest.mark.asyncio
async def test_a_read_on_its_way_does_not_keep_the_old_locks(tmp_path):
    """A thread that is in a system call keeps the file open that it began with."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    async with open_image(path, format="raw") as node:
        in_use = os.dup(node.driver.storage._fd)
        try:
            await node.reopen(read_only=True)
            async with open_image(path, format="raw", read_only=True) as other:
                assert await other.pread(0, 1) == b"\0"
            await node.reopen(read_only=False)
            with pytest.raises(ImageInUse):
                async with open_image(path, format="raw"):
                    pass
        finally:
            os.close(in_use)
        await node.pwrite(0, b"\1")

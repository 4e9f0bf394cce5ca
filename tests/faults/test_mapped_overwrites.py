"""What was overwritten through a mapping of the file is durable after a flush.

No power can be cut here, so that the system calls are looked at: a successful
fdatasync(2) of the file begins after the store, before the flush is answered.
"""

import asyncio
import os
from pathlib import Path

import pytest

from nbdqcow.block.node import Node
from nbdqcow.formats.raw import RawDriver
from nbdqcow.storage import overwrite
from nbdqcow.storage.file import FileStorage
from nbdqcow.storage.inline_file import InlineFile
from nbdqcow.storage.overwrite import Overwriter

SIZE = 1 << 20


async def overwrite_and_flush(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how many overwrites went through the mapping, each of them flushed."""
    path.write_bytes(os.urandom(SIZE))
    storage = await FileStorage.open(str(path))
    if storage._overwriter is None:
        # Where write(2) is as quick, it would not be used.
        storage._overwriter = Overwriter(storage._fd)
    seen: list[bytes] = []
    sync, nb_mapped = os.fdatasync, 0
    monkeypatch.setattr(overwrite, "MIN_WRITES", 0)
    store = storage._overwriter.try_write

    def look_and_sync(fd: int) -> None:
        seen.append(path.read_bytes())
        sync(fd)

    def count(offset: int, data: bytes, now: float) -> bool:
        nonlocal nb_mapped
        done = store(offset, data, now)
        nb_mapped += done
        return done

    monkeypatch.setattr(os, "fdatasync", look_and_sync)
    monkeypatch.setattr(storage._overwriter, "try_write", count)
    driver = await RawDriver.open(storage, read_only=False, options={})
    node = Node(driver, filename="disk")
    try:
        for number in range(8):
            data = b"%d" % number * 700
            seen.clear()
            if not node.try_pwrite(number * 5000, data):
                await node.pwrite(number * 5000, data)
            await node.flush()
            assert seen, "a flush after an overwrite syncs nothing"
            found = seen[-1][number * 5000 :][: len(data)]
            assert found == data, "the sync came before the store"
    finally:
        await node.close()
    return nb_mapped


def test_a_flush_syncs_what_was_overwritten(tmp_path, monkeypatch, figures):
    nb_mapped = asyncio.run(overwrite_and_flush(tmp_path / "disk", monkeypatch))
    assert nb_mapped
    figures(f"mapped overwrites: {nb_mapped} flushed")


# -- mutants -----------------------------------------------------------------------


def forgets_inline_writes(monkeypatch):
    """An inline write is nothing that a flush would have to sync."""
    monkeypatch.setattr(InlineFile, "_note_inline_write", lambda *arguments: None)


def flushes_nothing(monkeypatch):
    """A flush of the file does nothing."""

    async def flush(self):
        pass

    monkeypatch.setattr(FileStorage, "flush", flush)


@pytest.mark.parametrize("mutate", [forgets_inline_writes, flushes_nothing])
def test_a_broken_flush_is_caught(mutate, tmp_path, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        asyncio.run(overwrite_and_flush(tmp_path / "disk", monkeypatch))

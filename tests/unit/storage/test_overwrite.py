"""Writes through a mapping: the same bytes, and never a fatal signal."""

import os
import random
from types import SimpleNamespace

import pytest

from nbdqcow.storage import overwrite
from nbdqcow.storage.overwrite import MAX_LENGTH, MIN_WRITES, Overwriter
from nbdqcow.storage.residency import Residency
from nbdqcow.units import KiB, MiB

PAGE = 4 * KiB


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(MiB))
    return path


@pytest.fixture
def at_once(monkeypatch):
    """No write goes the other way first."""
    monkeypatch.setattr(overwrite, "MIN_WRITES", 0)


@pytest.fixture
def overwriter(path, at_once):
    fd = os.open(path, os.O_RDWR)
    overwriter = Overwriter(fd)
    yield overwriter
    overwriter.close()
    os.close(fd)


def test_random_writes_against_a_model(path, overwriter, seed, monkeypatch):
    monkeypatch.setattr(overwrite, "BUDGET", 64 * KiB)
    source = random.Random(seed)
    model = bytearray(path.read_bytes())
    nb_done = 0
    for _ in range(500):
        length = source.randint(1, source.choice((10, PAGE, MAX_LENGTH)))
        offset = source.randrange(MiB - length + 1)
        data = source.randbytes(length)
        if overwriter.try_write(offset, data, 0.0):
            model[offset : offset + length] = data
            nb_done += 1
    assert path.read_bytes() == model
    # The file has just been written, so it is in page cache.
    assert nb_done > 400


def test_a_file_that_grew(path, overwriter):
    assert overwriter.try_write(0, b"x", 0.0)
    with path.open("ab") as file:
        file.write(bytes(MiB))
    assert overwriter.try_write(2 * MiB - 3, b"end", 0.0)
    assert path.read_bytes().endswith(b"\0end")


def test_past_the_end_is_left_to_others(path, overwriter):
    assert not overwriter.try_write(MiB - 1, b"ab", 0.0)
    assert not overwriter.try_write(4 * MiB, b"ab", 0.0)
    assert not overwriter.try_write(0, bytes(MAX_LENGTH + 1), 0.0)
    assert path.stat().st_size == MiB


def test_a_hole_is_left_to_others(tmp_path, at_once):
    path = tmp_path / "sparse"
    path.write_bytes(b"")
    os.truncate(path, MiB)
    fd = os.open(path, os.O_RDWR)
    overwriter = Overwriter(fd)
    assert not overwriter.try_write(PAGE, b"ab", 0.0)
    overwriter.close()
    os.close(fd)


def test_a_file_cut_short_after_the_look_at_it(path, overwriter, monkeypatch):
    assert overwriter.try_write(0, b"x", 0.0)

    monkeypatch.setattr(Residency, "is_resident", lambda *arguments: True)
    os.truncate(path, PAGE)
    # Partly there, then not at all: EFAULT, where a store would be SIGBUS.
    assert not overwriter.try_write(PAGE - 2, b"abcd", 0.0)
    assert not overwriter.try_write(MiB // 2, b"abcd", 0.0)
    assert overwriter.try_write(PAGE - 2, b"ab", 0.0)
    assert path.stat().st_size == PAGE


def nb_refused(overwriter: Overwriter, offset: int, now: float) -> int:
    """Return how many writes go the other way before one is taken."""
    return next(n for n in range(1000) if overwriter.try_write(offset, b"x", now))


def test_writes_go_the_other_way_until_many_went_to_the_same_place(path):
    os.truncate(path, 8 * MiB)
    path.write_bytes(bytes(8 * MiB))
    fd = os.open(path, os.O_RDWR)
    overwriter = Overwriter(fd)
    assert nb_refused(overwriter, 0, 1.0) == MIN_WRITES
    assert nb_refused(overwriter, 2 * MiB - 1, 1.0) == 0
    assert nb_refused(overwriter, 2 * MiB, 1.0) == MIN_WRITES
    overwriter.written_back()
    assert nb_refused(overwriter, 0, 1.0) == MIN_WRITES
    # Whether it was flushed or not, the kernel has written it back by then.
    assert nb_refused(overwriter, 0, 5.9) == 0
    assert nb_refused(overwriter, 0, 6.1) == MIN_WRITES
    overwriter.close()
    os.close(fd)


def test_writes_all_over_a_large_file_are_not_counted_for_ever(path):
    fd = os.open(path, os.O_RDWR)
    overwriter = Overwriter(fd)
    for folio in range(20_000):
        assert not overwriter.try_write(folio * 2 * MiB, b"x", 0.0)
    assert len(overwriter._nb_writes) <= 4096
    overwriter.close()
    os.close(fd)


def test_where_it_pays(path, monkeypatch):
    with path.open("rb") as file:
        for release, magic, wanted in (
            ("6.18.2-cloud", overwrite.EXT4_MAGIC, True),
            ("6.16", overwrite.EXT4_MAGIC, True),
            ("6.1.0-18-amd64", overwrite.EXT4_MAGIC, False),
            ("7.0.1", 0x58465342, False),
            ("unknown", overwrite.EXT4_MAGIC, False),
        ):
            uname = SimpleNamespace(release=release)
            monkeypatch.setattr(os, "uname", lambda u=uname: u)
            monkeypatch.setattr(overwrite, "filesystem_type", lambda fd, m=magic: m)
            assert overwrite.pays(file.fileno()) is wanted, release

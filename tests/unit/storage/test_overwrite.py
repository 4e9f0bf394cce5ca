"""Writes through a mapping: the same bytes, and never a fatal signal."""

import os
import random
from types import SimpleNamespace

import pytest

from nbdqcow.storage import overwrite
from nbdqcow.storage.overwrite import MAX_LENGTH, Overwriter
from nbdqcow.storage.residency import Residency
from nbdqcow.units import KiB, MiB

PAGE = 4 * KiB


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(MiB))
    return path


@pytest.fixture
def overwriter(path):
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
        if overwriter.try_write(offset, data):
            model[offset : offset + length] = data
            nb_done += 1
    assert path.read_bytes() == model
    # The file has just been written, so it is in page cache.
    assert nb_done > 400


def test_a_file_that_grew(path, overwriter):
    assert overwriter.try_write(0, b"x")
    with path.open("ab") as file:
        file.write(bytes(MiB))
    assert overwriter.try_write(2 * MiB - 3, b"end")
    assert path.read_bytes().endswith(b"\0end")


def test_past_the_end_is_left_to_others(path, overwriter):
    assert not overwriter.try_write(MiB - 1, b"ab")
    assert not overwriter.try_write(4 * MiB, b"ab")
    assert not overwriter.try_write(0, bytes(MAX_LENGTH + 1))
    assert path.stat().st_size == MiB


def test_a_hole_is_left_to_others(tmp_path):
    path = tmp_path / "sparse"
    path.write_bytes(b"")
    os.truncate(path, MiB)
    fd = os.open(path, os.O_RDWR)
    overwriter = Overwriter(fd)
    assert not overwriter.try_write(PAGE, b"ab")
    overwriter.close()
    os.close(fd)


def test_a_file_cut_short_after_the_look_at_it(path, overwriter, monkeypatch):
    assert overwriter.try_write(0, b"x")

    monkeypatch.setattr(Residency, "is_resident", lambda *arguments: True)
    os.truncate(path, PAGE)
    # Partly there, then not at all: EFAULT, where a store would be SIGBUS.
    assert not overwriter.try_write(PAGE - 2, b"abcd")
    assert not overwriter.try_write(MiB // 2, b"abcd")
    assert overwriter.try_write(PAGE - 2, b"ab")
    assert path.stat().st_size == PAGE


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

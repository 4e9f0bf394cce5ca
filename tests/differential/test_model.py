"""The oracle itself: what it must accept and, above all, what it must refuse."""

import numpy as np
import pytest

from tests.differential.model import NEVER, DiskModel, Mismatch


@pytest.fixture
def model() -> DiskModel:
    return DiskModel(np.full(64, 0x11, dtype=np.uint8))


def accepts(model: DiskModel, *values: int, at: int | None = None) -> None:
    """The first 8 bytes may read as each of the values and as no other."""
    for value in (0, 0x11, 0xAA, 0xBB):
        submitted_at = model.tick() if at is None else at
        data = bytes([value]) * 8
        copy = DiskModel(model.base.copy())
        copy.maybe_zero[:] = model.maybe_zero
        copy.changes = list(model.changes)
        copy._crashed = model._crashed
        if value in values:
            copy.check_read(0, data, submitted_at)
        else:
            with pytest.raises(Mismatch):
                copy.check_read(0, data, submitted_at)


def test_a_finished_write_hides_the_old_value(model: DiskModel) -> None:
    change = model.begin(0, 8, b"\xaa" * 8)
    accepts(model, 0x11, 0xAA)
    model.end(change)
    accepts(model, 0xAA)
    model.fold(NEVER)
    assert not model.changes
    accepts(model, 0xAA)


def test_a_read_begun_before_the_reply_may_see_the_old_value(model: DiskModel) -> None:
    change = model.begin(0, 8, b"\xaa" * 8)
    read_at = model.tick()
    model.end(change)
    model.fold(read_at)
    accepts(model, 0x11, 0xAA, at=read_at)


def test_writes_in_flight_together_land_in_either_order(model: DiskModel) -> None:
    first = model.begin(0, 8, b"\xaa" * 8)
    second = model.begin(0, 8, b"\xbb" * 8)
    model.end(second)
    accepts(model, 0xAA, 0xBB)
    model.end(first)
    model.fold(NEVER)
    accepts(model, 0xAA, 0xBB)
    third = model.begin(0, 8, b"\x11" * 8)
    model.end(third)
    model.fold(NEVER)
    accepts(model, 0x11)


def test_a_partly_overwritten_write_shows_through(model: DiskModel) -> None:
    first = model.begin(0, 8, b"\xaa" * 8)
    second = model.begin(2, 4, b"\xbb" * 4)
    model.end(first)
    model.end(second)
    model.fold(NEVER)
    model.check_read(0, b"\xaa\xaa\xbb\xaa\xbb\xbb\xaa\xaa", model.tick())
    with pytest.raises(Mismatch) as caught:
        model.check_read(0, b"\xaa\xaa\xbb\xaa\xbb\xbb\xbb\xaa", model.tick())
    assert caught.value.offset == 6


def test_a_trimmed_byte_is_old_or_zero_until_it_was_read(model: DiskModel) -> None:
    model.end(model.begin(0, 8, None, optional=True))
    model.fold(NEVER)
    accepts(model, 0, 0x11)
    model.check_read(0, bytes(8), model.tick())
    accepts(model, 0)


def test_a_flushed_write_survives_a_crash_and_others_may(model: DiskModel) -> None:
    model.end(model.begin(0, 8, b"\xaa" * 8))
    model.flushed_at = model.tick()
    model.end(model.begin(0, 8, b"\xbb" * 8))
    model.crash()
    accepts(model, 0xAA, 0xBB)
    assert model.open_ranges() == [(0, 8)]
    model.settle([(0, b"\xbb" * 8)])
    accepts(model, 0xBB)


def test_fua_is_durable_and_a_value_it_replaced_is_gone(model: DiskModel) -> None:
    model.end(model.begin(0, 8, b"\xaa" * 8))
    model.end(model.begin(0, 8, b"\xbb" * 8, fua=True))
    model.crash()
    accepts(model, 0xBB)

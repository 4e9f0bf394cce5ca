"""Refcount entries of every width, one at a time and in bulk."""

import random

import numpy as np
import pytest

from nbdqcow.formats.qcow2.refcount_codec import (
    filled_block,
    pack_counts,
    pack_refcounts,
    set_refcount,
    unpack_counts,
    unpack_refcounts,
)

ORDERS = range(7)


@pytest.mark.parametrize("order", ORDERS)
def test_single_and_bulk_agree(order, seed):
    rng = random.Random(seed)
    nb_entries = 512 * 8 >> order
    limit = (1 << (1 << order)) - 1
    values = [rng.randint(0, limit) for _ in range(nb_entries)]
    block = bytearray(512)
    for index, value in enumerate(values):
        set_refcount(block, index, order, value)
    counts = unpack_counts(block, order)
    assert counts.tolist()[:nb_entries] == values
    assert pack_counts(counts, order) == bytes(block)
    assert unpack_refcounts(block, order).tolist() == counts.tolist()
    assert unpack_refcounts(block, order).tolist() == values
    assert pack_refcounts(np.array(values, np.uint64), order) == bytes(block)


def test_layout():
    block = bytearray(512)
    set_refcount(block, 1, 0, 1)
    assert block[0] == 0b10
    set_refcount(block, 1, 2, 0xA)
    assert block[0] == 0xA2
    set_refcount(block, 1, 4, 0x1234)
    assert block[2:4] == b"\x12\x34"


@pytest.mark.parametrize("order", ORDERS)
def test_too_large(order):
    with pytest.raises(OverflowError):
        set_refcount(bytearray(512), 0, order, 1 << (1 << order))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("nb_used", [0, 1, 7, 9, 63])
def test_filled_block(order, nb_used):
    block = filled_block(512, order, nb_used)
    assert len(block) == 512
    values = unpack_refcounts(block, order)
    assert values[:nb_used].tolist() == [1] * nb_used
    assert not values[nb_used:].any()

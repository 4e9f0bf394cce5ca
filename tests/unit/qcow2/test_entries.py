"""What the words of L2 entries mean."""

import random

import pytest

from nbdqcow.formats.qcow2.entries import (
    ALL_ALLOCATED,
    ALL_ZERO,
    OFLAG_COPIED,
    is_sound,
    subcluster_mask,
    subcluster_stretch,
)
from nbdqcow.types import DATA, UNALLOCATED, ZERO


def bitmap_of(kinds):
    bits = {DATA: 1, ZERO: 1 << 32, UNALLOCATED: 0}
    return sum(bits[kind] << index for index, kind in enumerate(kinds))


@pytest.mark.parametrize("seed", range(20))
def test_stretches_are_the_runs_of_like_subclusters(seed):
    rnd = random.Random(seed)
    kinds = []
    while len(kinds) < 32:
        kinds += [rnd.choice((DATA, ZERO, UNALLOCATED))] * rnd.randrange(1, 12)
    kinds = kinds[:32]
    bitmap = bitmap_of(kinds)
    for first in range(32):
        nb = 1
        while first + nb < 32 and kinds[first + nb] == kinds[first]:
            nb += 1
        assert subcluster_stretch(bitmap, first) == (kinds[first], nb)


@pytest.mark.parametrize(
    ("bitmap", "kind"), [(ALL_ALLOCATED, DATA), (ALL_ZERO, ZERO), (0, UNALLOCATED)]
)
def test_a_stretch_ends_with_the_cluster(bitmap, kind):
    for first in range(32):
        assert subcluster_stretch(bitmap, first) == (kind, 32 - first)


def test_masks():
    assert subcluster_mask(0, 31) == ALL_ALLOCATED
    assert subcluster_mask(3, 3) == 8
    assert subcluster_mask(4, 6) == 0b1110000


@pytest.mark.parametrize(
    ("entry", "bitmap", "sound"),
    [
        (0, 0, True),
        (0, ALL_ZERO, True),
        (0, 1, False),
        (OFLAG_COPIED | 65536, 0, True),
        (OFLAG_COPIED | 65536, ALL_ALLOCATED, True),
        (65536, 1 << 33 | 1, True),
        (65536, 1 << 32 | 1, False),
        (65536, ALL_ALLOCATED | 1 << 63, False),
    ],
)
def test_soundness(entry, bitmap, sound):
    assert is_sound(entry, bitmap) == sound

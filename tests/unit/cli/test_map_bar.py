"""The bar under the table of `map`."""

import pytest

from nbdqcow.cli.map_bar import MapBar
from nbdqcow.jobs.map import HAS_DATA, HAS_OFFSET, IS_PRESENT, IS_ZERO

DATA = HAS_DATA | HAS_OFFSET | IS_PRESENT
ZERO = IS_ZERO | IS_PRESENT


def bar(start, end, width, *rows):
    shown = MapBar(start, end, width)
    shown.add([(*row, None) for row in rows])
    return str(shown).splitlines()[0]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "[..........]"),
        ([(0, 100, DATA, 0, 0)], "[##########]"),
        ([(10, 20, DATA, 0, 0), (50, 10, DATA, 0, 1)], "[.##..+....]"),
        ([(0, 30, ZERO, 0, 0), (29, 1, DATA, 0, 0)], "[zz#.......]"),
        # A hole in preallocated space, and nothing at all.
        ([(0, 10, DATA | IS_ZERO, 0, 0), (90, 10, IS_ZERO, 0, 0)], "[z.........]"),
        # The least data is seen.
        ([(99, 1, DATA, 0, 0)], "[.........#]"),
    ],
)
def test_bar(rows, expected):
    assert bar(0, 100, 12, *rows) == expected


def test_bar_of_a_part():
    assert bar(1000, 1100, 12, (1050, 50, DATA, 0, 0)) == "[.....#####]"
    assert bar(0, 3, 7, (1, 1, DATA, 0, 0)) == "[.###.]"
    assert bar(0, 100, 1, (5, 1, DATA, 0, 0)) == "[#]"

"""Combinations of options in which every two values meet."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any


def _all_allowed(row: dict[str, Any]) -> bool:
    return True


def pairwise(
    allowed: Callable[[dict[str, Any]], bool] = _all_allowed, **values: Sequence[Any]
) -> Iterator[dict[str, Any]]:
    """Yield allowed combinations until every two values of different names that
    may meet have met: always the same ones, of few the most first."""
    names = list(values)
    rows = [
        dict(zip(names, row, strict=True))
        for row in itertools.product(*values.values())
    ]
    bits: dict[tuple[str, Any, str, Any], int] = {}
    pairs: dict[int, int] = {}
    for index, row in enumerate(rows):
        if allowed(row):
            pairs[index] = 0
            for (name, value), (other, its) in itertools.combinations(row.items(), 2):
                key = (name, value, other, its)
                pairs[index] |= bits.setdefault(key, 1 << len(bits))
    missing = (1 << len(bits)) - 1
    while missing:
        best = max(pairs, key=lambda index: (pairs[index] & missing).bit_count())
        missing &= ~pairs[best]
        yield rows[best]

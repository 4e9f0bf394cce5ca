"""``map`` at a terminal: the whole disk in one line, under the table."""

from collections.abc import Sequence
from typing import Final

from nbdqcow.jobs.map import HAS_DATA, IS_PRESENT, IS_ZERO, Row

_NOTHING, _ZERO, _BELOW, _HERE = range(4)
_SIGNS: Final = ".z+#"
"""By what a cell has at most: nothing, zeroes that the image itself says, data of
a backing file, data of the image."""
_LEGEND: Final = "# data   + data of a backing file   z zeroes   . nothing"


class MapBar:
    """A bar of cells, each a part of the disk.

    ``start`` and ``end`` are the bytes that it shows; ``width`` is how many
    signs there are room for.
    """

    def __init__(self, start: int, end: int, width: int) -> None:
        self._start = start
        self._length = end - start
        self._cells = bytearray(max(1, width - 2))

    def add(self, rows: Sequence[Row]) -> None:
        """Take rows of the map, in any order."""
        cells, nb_cells = self._cells, len(self._cells)
        for start, length, flags, _, depth, _ in rows:
            if flags & HAS_DATA and not flags & IS_ZERO:
                rank = _BELOW if depth else _HERE
            elif flags & IS_PRESENT and not depth:
                rank = _ZERO
            else:
                continue
            first = (start - self._start) * nb_cells // self._length
            end = (start + length - self._start) * nb_cells
            last = (end - 1) // self._length
            for cell in range(first, last + 1):
                cells[cell] = max(cells[cell], rank)

    def __str__(self) -> str:
        """Return the bar and what its signs mean, in two lines."""
        bar = "".join(_SIGNS[rank] for rank in self._cells)
        return f"[{bar}]\n{_LEGEND}\n"

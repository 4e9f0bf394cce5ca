"""The map of a disk as a picture: people look before they read."""

import struct
import zlib
from collections.abc import Sequence
from typing import Final
from xml.sax.saxutils import escape

from nbdqcow.block.node import Node
from nbdqcow.errors import ImageError
from nbdqcow.jobs.map import HAS_DATA, HAS_OFFSET, IS_PRESENT, IS_ZERO, Row
from nbdqcow.units import format_size

_COLUMNS: Final = 128
_MAX_CELLS: Final = _COLUMNS * 64
_CELL: Final = 8
"""Pixels of a cell's side."""
_BACKGROUND: Final = (255, 255, 255)

_HOLE, _ZERO, _COMPRESSED, _DATA = range(4)
_NAMES: Final = ("hole", "zero", "compressed", "data")
_COLOURS: Final = ((236, 239, 241), (176, 190, 197), (255, 167, 38), (30, 136, 229))
_DEPTH_COLOURS: Final = ((67, 160, 71), (142, 36, 170), (216, 27, 96), (109, 76, 65))
"""Data of backing images, the first one's first; deeper ones share the last."""


class Picture:
    """A disk in cells, each of them the same number of bytes, from left to right
    and down. A cell has the colour of what most of its bytes are."""

    def __init__(self, node: Node, start: int, end: int) -> None:
        """Take up no rows yet: of the bytes ``[start, end)`` of a disk."""
        self._name = node.filename
        self._start, self._end = start, max(end, start + 1)
        length = self._end - self._start
        self._cell_length = max(1, -(-length // _MAX_CELLS))
        self._cells: list[dict[tuple[int, int], int]] = [
            {} for _ in range(-(-length // self._cell_length))
        ]
        self._totals: dict[tuple[int, int], int] = {}
        self._host_end = -1
        self._nb_data = self._nb_jumps = 0

    def add(self, rows: Sequence[Row]) -> None:
        """Take up rows, in their order."""
        for start, length, flags, host_offset, depth, _ in rows:
            kind = _kind_of(flags)
            key = (kind, depth if kind in (_DATA, _COMPRESSED) else 0)
            self._totals[key] = self._totals.get(key, 0) + length
            if kind == _DATA:
                self._nb_data += 1
                self._nb_jumps += host_offset != self._host_end
                self._host_end = host_offset + length
            self._fill(start - self._start, length, key)

    def _fill(self, start: int, length: int, key: tuple[int, int]) -> None:
        end, size = start + length, self._cell_length
        for index in range(start // size, -(-end // size)):
            covered = min(end, (index + 1) * size) - max(start, index * size)
            cell = self._cells[index]
            cell[key] = cell.get(key, 0) + covered

    def _colours(self) -> list[tuple[int, int, int]]:
        return [
            _colour(max(cell, key=lambda key: cell[key]) if cell else (_HOLE, 0))
            for cell in self._cells
        ]

    # -- files -----------------------------------------------------------

    def save(self, filename: str) -> None:
        """Write a file: SVG or PNG, as its name says. Raises `ImageError` for
        another name and `OSError`."""
        lower = filename.lower()
        if lower.endswith(".svg"):
            data = self.svg().encode()
        elif lower.endswith(".png"):
            data = self.png()
        else:
            raise ImageError(f"'{filename}': a picture is a .svg or a .png file")
        with open(filename, "wb") as file:
            file.write(data)

    def svg(self) -> str:
        """Return the picture with a legend."""
        colours = self._colours()
        width = _COLUMNS * _CELL
        height = -(-len(colours) // _COLUMNS) * _CELL
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
            f'height="{height + 70}" font-family="sans-serif" font-size="12">',
            f'<rect width="{width}" height="{height + 70}" fill="white"/>',
        ]
        index = 0
        while index < len(colours):
            colour, end = colours[index], index + 1
            line_end = min(index // _COLUMNS * _COLUMNS + _COLUMNS, len(colours))
            while end < line_end and colours[end] == colour:
                end += 1
            x, y = index % _COLUMNS * _CELL, index // _COLUMNS * _CELL
            parts.append(
                f'<rect x="{x}" y="{y}" width="{(end - index) * _CELL}" '
                f'height="{_CELL}" fill="{_hex(colour)}"/>'
            )
            index = end
        parts.append(
            f'<text x="4" y="{height + 18}">{escape(self._name)}: '
            f"{format_size(self._end - self._start)}, a cell is "
            f"{format_size(self._cell_length)}; {escape(self._fragmentation())}</text>"
        )
        x = 4
        for key, total in sorted(self._totals.items(), reverse=True):
            text = f"{_name(key)}: {format_size(total)}"
            parts.append(
                f'<rect x="{x}" y="{height + 34}" width="12" height="12" '
                f'fill="{_hex(_colour(key))}" stroke="gray"/>'
                f'<text x="{x + 16}" y="{height + 45}">{text}</text>'
            )
            x += 32 + 7 * len(text)
        return "\n".join([*parts, "</svg>\n"])

    def _fragmentation(self) -> str:
        if not self._nb_data:
            return "no data"
        return f"{self._nb_data} stretches of data, {self._nb_jumps} places in files"

    def png(self) -> bytes:
        """Return the picture alone."""
        colours = self._colours()
        missing = -len(colours) % _COLUMNS
        colours += [_BACKGROUND] * missing
        lines = []
        for start in range(0, len(colours), _COLUMNS):
            row = b"".join(
                bytes(colour) * _CELL for colour in colours[start : start + _COLUMNS]
            )
            lines += [b"\0" + row] * _CELL
        size = struct.pack(">IIBBBBB", _COLUMNS * _CELL, len(lines), 8, 2, 0, 0, 0)
        return (
            b"\x89PNG\r\n\x1a\n"
            + _chunk(b"IHDR", size)
            + _chunk(b"IDAT", zlib.compress(b"".join(lines)))
            + _chunk(b"IEND", b"")
        )


def _chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG file: length, kind, data, checksum of the two."""
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def _kind_of(flags: int) -> int:
    if flags & IS_ZERO:
        return _ZERO if flags & (IS_PRESENT | HAS_DATA) else _HOLE
    return _DATA if flags & HAS_OFFSET else _COMPRESSED


def _colour(key: tuple[int, int]) -> tuple[int, int, int]:
    kind, depth = key
    if kind == _DATA and depth:
        return _DEPTH_COLOURS[min(depth, len(_DEPTH_COLOURS)) - 1]
    return _COLOURS[kind]


def _name(key: tuple[int, int]) -> str:
    kind, depth = key
    return f"{_NAMES[kind]}, backing {depth}" if depth else _NAMES[kind]


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)

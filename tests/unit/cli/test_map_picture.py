"""Pictures of maps: each cell has the colour of most of it."""

import struct
import xml.etree.ElementTree as ElementTree
import zlib
from types import SimpleNamespace

import pytest

from nbdqcow.cli.map_picture import Picture
from nbdqcow.errors import ImageError
from nbdqcow.jobs.map import HAS_DATA, HAS_OFFSET, IS_PRESENT, IS_ZERO

DATA = HAS_DATA | IS_PRESENT | HAS_OFFSET
NODE = SimpleNamespace(filename="a<b&c.qcow2")
SIZE = 128 * 64 * 100


def picture():
    drawn = Picture(NODE, 0, SIZE)
    drawn.add(
        [
            (0, 1000, DATA, 5000, 0, NODE),
            (1000, 130, IS_ZERO | IS_PRESENT, -1, 0, NODE),
            (1130, 70, HAS_DATA | IS_PRESENT, -1, 0, NODE),
            (1200, 100, DATA, 7000, 3, NODE),
            (1300, SIZE - 1300, IS_ZERO, -1, 0, NODE),
        ]
    )
    return drawn


def test_svg_is_xml_with_a_legend():
    root = ElementTree.fromstring(picture().svg())
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert texts[0].startswith("a<b&c.qcow2: 800 KiB, a cell is 100 B")
    assert "2 stretches of data, 2 places in files" in texts[0]
    assert texts[1:] == [
        "data, backing 3: 100 B",
        "data: 0.977 KiB",
        "compressed: 70 B",
        "zero: 130 B",
        "hole: 799 KiB",
    ]


def test_png_has_the_cells():
    data = picture().png()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height, depth, colours = struct.unpack(">IIBB", data[16:26])
    assert (width, height, depth, colours) == (1024, 512, 8, 2)
    length = struct.unpack(">I", data[33:37])[0]
    pixels = zlib.decompress(data[41 : 41 + length])
    line = pixels[1 : 1 + 3 * width]
    cells = [tuple(line[at : at + 3]) for at in range(0, 14 * 24, 24)]
    assert len(set(cells[:10])) == 1
    assert len({cells[0], cells[10], cells[11], cells[12], cells[13]}) == 5


def test_an_empty_disk_has_a_picture(tmp_path):
    empty = Picture(NODE, 0, 0)
    empty.save(str(tmp_path / "a.SVG"))
    empty.save(str(tmp_path / "a.png"))
    with pytest.raises(ImageError, match="a picture is"):
        empty.save(str(tmp_path / "a.gif"))

"""docs/qcow2.md has a row for all that the header can say, and its tests exist."""

import re
from pathlib import Path

import pytest

from nbdqcow.formats.qcow2 import header

TESTS = Path(__file__).parents[2]
PAGE = (TESTS.parent / "docs" / "qcow2.md").read_text()


def numbers(title: str) -> set[str]:
    """Return the first column of the table in a section."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return {row.strip("` ") for row in re.findall(r"^\|([^|]+)\|", section, re.M)}


@pytest.mark.parametrize(
    ("title", "known"),
    [
        ("Incompatible features", header.INCOMPAT_KNOWN_MASK),
        ("Compatible features", header.COMPAT_LAZY_REFCOUNTS),
        ("Autoclear features", header.AUTOCLEAR_KNOWN_MASK),
    ],
)
def test_each_feature_has_a_row(title, known):
    bits = {str(bit) for bit in range(64) if known >> bit & 1}
    assert bits == {row for row in numbers(title) if row.isdigit()}


def test_each_extension_has_a_row():
    types = [value for name, value in vars(header).items() if name.startswith("EXT_")]
    assert {f"0x{value:08x}" for value in types} <= numbers("Header extensions")


def test_the_fields_leave_no_gap():
    rows = re.findall(r"^\| (\d+) \| (\d+) \|", PAGE, re.M)
    end = 0
    for offset, length in rows:
        assert int(offset) == end
        end += int(length)
    assert end == 105


def test_each_test_exists():
    names = set(re.findall(r"(?<!/)\b(?:unit|block|interop|crash)/test_\w+", PAGE))
    assert len(names) > 20
    for name in names:
        path = name.replace("unit/", "unit/qcow2/")
        assert (TESTS / f"{path}.py").exists(), name

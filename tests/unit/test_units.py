"""Sizes, as qemu-img reads and prints them."""

import pytest

from nbdqcow.units import SizeTooLarge, format_size, parse_size, round_up


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1", 1),
        ("+5", 5),
        (" 5", 5),
        ("5B", 5),
        ("5b", 5),
        ("1k", 1024),
        ("1K", 1024),
        ("1.5G", 1610612736),
        ("5.G", 5 << 30),
        ("1.0", 1),
        ("0.1M", 104857),
        ("5t", 5 << 40),
        ("5P", 5 << 50),
        ("7E", 7 << 60),
        ("0x100", 256),
        ("0XfF", 255),
        ("9223372036854775807", (1 << 63) - 1),
        ("0" * 5000 + "1", 1),
        ("1." + "5" * 5000 + "k", 1592),
    ],
)
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        *("", "-5", "1.5", "1e3", "1e3k", "5x", "5kB", ".5G", "5,5", "nan", "inf"),
        *("0x", "0x1.8k", "0x10k", "5 ", "1_000", "\N{ARABIC-INDIC DIGIT FIVE}", "k"),
    ],
)
def test_no_size(text):
    with pytest.raises(ValueError, match="invalid size") as refusal:
        parse_size(text)
    assert not isinstance(refusal.value, SizeTooLarge)


@pytest.mark.parametrize(
    "text", ["8E", "9223372036854775808", "9" * 5000, "0x" + "f" * 16]
)
def test_size_too_large(text):
    with pytest.raises(SizeTooLarge):
        parse_size(text)


def test_a_limit_and_a_default_suffix():
    assert parse_size("8E", limit=1 << 64) == 1 << 63
    with pytest.raises(SizeTooLarge):
        parse_size("16E", limit=1 << 64)
    assert parse_size("5", "M") == 5 << 20
    assert parse_size("5k", "M") == 5 << 10


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (10240, "10 KiB"),
        (197120, "192 KiB"),
        (200704, "196 KiB"),
        (999 << 10, "999 KiB"),
        (1000 << 10, "0.977 MiB"),
        (10 << 30, "10 GiB"),
        ((1 << 63) - 1, "8 EiB"),
    ],
)
def test_format_size(size, text):
    assert format_size(size) == text


def test_round_up():
    assert [round_up(value, 8) for value in (0, 1, 8, 9)] == [0, 8, 8, 16]

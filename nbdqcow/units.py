"""Sizes as people write them and as qemu-img prints them."""

from typing import Final

KiB: Final = 1 << 10
MiB: Final = 1 << 20
GiB: Final = 1 << 30
TiB: Final = 1 << 40

SECTOR_SIZE: Final = 512

_SUFFIXES: Final = "BKMGTPE"


def parse_size(text: str, default_suffix: str = "B") -> int:
    """Return the bytes that ``text`` means, as qemu's ``qemu_strtosz`` does.

    A number, decimal with an optional fraction or hexadecimal (``0x``), and
    one of the suffixes ``B k M G T P E`` in either case, powers of 1024.
    Raises `ValueError` with the text in its message.
    """
    digits, suffix = text.strip(), default_suffix
    if digits[:2].lower() == "0x":
        try:
            return int(digits, 16)
        except ValueError:
            raise ValueError(f"invalid size '{text}'") from None
    if digits and digits[-1].upper() in _SUFFIXES:
        digits, suffix = digits[:-1], digits[-1].upper()
    shift = 10 * _SUFFIXES.index(suffix)
    whole, _, fraction = digits.partition(".")
    if (
        not whole.isascii()
        or not whole.isdigit()
        or (fraction and not (fraction.isascii() and fraction.isdigit()))
    ):
        raise ValueError(f"invalid size '{text}'")
    size = int(whole) << shift
    if fraction:
        if shift == 0:
            raise ValueError(f"invalid size '{text}': a byte has no fraction")
        size += (int(fraction) << shift) // 10 ** len(fraction)
    if size >= 1 << 63:
        raise ValueError(f"size '{text}' is too large")
    return size


def format_size(size: int) -> str:
    """Return ``size`` bytes as qemu-img prints it: ``10 GiB``, ``1.5 KiB``."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    index = 0
    # qemu's size_to_str moves up a unit at 1000 of the one below, so that no
    # number has more than three digits before its point.
    while index < len(units) - 1 and size >= 1000 << (10 * index):
        index += 1
    return f"{size / (1 << (10 * index)):.3g} {units[index]}"


def round_up(value: int, alignment: int) -> int:
    """Return the least multiple of ``alignment`` not below ``value``."""
    return -(-value // alignment) * alignment

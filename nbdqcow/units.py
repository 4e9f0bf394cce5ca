"""Units and rounding; sizes and truth values as people write them, sizes as qemu-img
prints them."""

import re
from typing import Final

KiB: Final = 1 << 10
MiB: Final = 1 << 20
GiB: Final = 1 << 30
TiB: Final = 1 << 40

SECTOR_SIZE: Final = 512
MAX_DISK_LENGTH: Final = (1 << 63) - (1 << 30)
"""Of any disk in QEMU, in bytes."""

BOOLEANS: Final = {
    **dict.fromkeys(("on", "yes", "true", "y"), True),
    **dict.fromkeys(("off", "no", "false", "n"), False),
}
"""What QEMU takes for a truth value in an option's text."""

_SUFFIXES: Final = "BKMGTPE"
_MAX_DIGITS: Final = 40
_SIZE: Final = re.compile(
    r"[ \t\n\v\f\r]*\+?"
    r"(?:0[xX]([0-9a-fA-F]+)|([0-9]+)(?:\.([0-9]*))?([BKMGTPEbkmgtpe])?)"
)


class SizeTooLarge(ValueError):
    """A well-formed size beyond the limit."""


def parse_size(text: str, default_suffix: str = "B", *, limit: int = 1 << 63) -> int:
    """Return the bytes that ``text`` means, as qemu's ``qemu_strtosz`` does.

    A number, decimal with an optional fraction or hexadecimal (``0x``), and,
    if decimal, one of the suffixes ``B k M G T P E`` in either case, powers of
    1024. Raises `ValueError` with the text in its message, `SizeTooLarge` from
    ``limit`` on.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"invalid size '{text}'")
    hexadecimal, whole, fraction, suffix = match.groups()
    if hexadecimal:
        size = int(hexadecimal, 16)
    else:
        shift = 10 * _SUFFIXES.index((suffix or default_suffix).upper())
        fraction = (fraction or "").rstrip("0")
        if fraction and shift == 0:
            raise ValueError(f"invalid size '{text}': a byte has no fraction")
        # There could be more digits than int() takes.
        whole = whole.lstrip("0") or "0"
        if len(whole) > _MAX_DIGITS:
            raise SizeTooLarge(f"size '{text}' is too large")
        fraction = fraction[:_MAX_DIGITS]
        size = int(whole) << shift
        if fraction:
            size += (int(fraction) << shift) // 10 ** len(fraction)
    if size >= limit:
        raise SizeTooLarge(f"size '{text}' is too large")
    return size


def size_expected(name: str) -> str:
    """Return what QEMU says of an option that `parse_size` can't understand."""
    return (
        f"Parameter '{name}' expects a non-negative number below 2^64\n"
        "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
        "and exabytes, respectively."
    )


def boolean_expected(name: str) -> str:
    """Return what QEMU says of an option whose text is none of `BOOLEANS`."""
    return f"Parameter '{name}' expects 'on' or 'off'"


def format_size(size: int) -> str:
    """Return ``size`` bytes as qemu-img prints it: ``10 GiB``, ``1.5 KiB``."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    index = 0
    # qemu's size_to_str moves up a unit at 1000 of the one below, so that no
    # number has more than three digits before its point.
    while index < len(units) - 1 and size >= 1000 << (10 * index):
        index += 1
    return f"{size / (1 << (10 * index)):.3g} {units[index]}"


def format_hex(number: int) -> str:
    """Return ``number`` as C's ``%#x`` prints it: zero has no prefix."""
    return f"{number:#x}" if number else "0"


def round_down(value: int, alignment: int) -> int:
    """Return the greatest multiple of ``alignment`` not above ``value``."""
    return value // alignment * alignment


def round_up(value: int, alignment: int) -> int:
    """Return the least multiple of ``alignment`` not below ``value``."""
    return -(-value // alignment) * alignment

"""What the commands of ``nbdqcow-img`` have in common: options and output."""

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, Final

from nbdqcow.block.tools import CACHE_MODES, OptionValue
from nbdqcow.cli.getopt_scan import Fault, Scan, scan
from nbdqcow.cli.messages import error
from nbdqcow.cli.option_text import as_flag, split_pairs
from nbdqcow.errors import ImageError, UsageError
from nbdqcow.units import (
    BOOLEANS,
    SizeTooLarge,
    boolean_expected,
    parse_size,
    size_expected,
)

MAX_AMOUNT: Final = (1 << 63) - 1


def parse_arguments(
    arguments: Sequence[str], short: str, long: Mapping[str, str]
) -> tuple[Iterator[tuple[str, str]], list[str]]:
    """Return options and operands as getopt_long finds them.

    ``long`` maps a long name, with ``=`` if it takes an argument, to what is
    returned for it. What is wrong with an option's value is said before what is
    wrong with a later option: the iterator gives all options in front of the wrong
    one, and then raises `UsageError` in qemu-img's words.
    """
    found = scan(arguments, short, long)
    return _until_fault(found), found.operands


def _until_fault(found: Scan) -> Iterator[tuple[str, str]]:
    yield from found.options
    match found.fault:
        case Fault.UNKNOWN:
            raise UsageError(f"unrecognized option '{found.at}'")
        case Fault.NO_ARGUMENT:
            raise UsageError(f"missing argument for option '{found.at}'")


def wants_json(value: str) -> bool:
    """Return whether ``--output`` asks for json. Raises `ImageError`."""
    if value not in ("human", "json"):
        raise ImageError("--output must be used with human or json as argument.")
    return value == "json"


def parse_amount(
    text: str, name: str, minimum: int = 0, maximum: int = MAX_AMOUNT
) -> int:
    """Return the number that ``text`` means. Raises `ImageError`."""
    try:
        amount = parse_size(text)
    except SizeTooLarge:
        amount = -1
    except ValueError:
        error(f"Invalid {name} specified. You may use k, M, G, T, P or E suffixes for")
        raise ImageError(
            "kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."
        ) from None
    if not minimum <= amount <= maximum:
        raise ImageError(
            f"Invalid {name} specified. Must be between {minimum} and {maximum}."
        )
    return amount


def check_cache(text: str, message: str) -> str:
    """Return a cache mode. Raises `ImageError` with ``message`` before it."""
    text = {"off": "none"}.get(text, text)
    if text not in CACHE_MODES:
        raise ImageError(f"{message}{text}")
    return text


def check_compression(format_: str) -> None:
    """Raise `ImageError` for a format without compressed clusters."""
    if format_ in ("raw", "luks"):
        raise ImageError("Compression not supported for this file format")


# -- -o ----------------------------------------------------------------------


def check_option_list(text: str) -> str:
    """Return the text of one ``-o TEXT``. Raises `ImageError` if its first or last
    option is empty (``,,`` is a comma)."""
    last = len(text) - len(text.rstrip(","))
    if not text or text[0] == "," or last % 2:
        raise ImageError(f"Invalid option list: {text}")
    return text


def wants_help(text: str) -> bool:
    """Whether ``-o TEXT`` asks for the list of options."""
    return any(key in ("help", "?") for key, _ in split_pairs(text))


def split_options(known: Container[str], text: str) -> Iterator[tuple[str, str]]:
    """Yield ``(name, value)`` of an ``-o`` string; a bare name is ``on``, or
    ``off`` behind a ``no``. Raises `ImageError` for an unknown name."""
    for key, value in split_pairs(text):
        name = key
        if value is None:
            name, value = (key, "on") if key in known else as_flag(key)
        if name not in known:
            raise ImageError(f"Invalid parameter '{name}'")
        yield name, value


def convert_option(name: str, kind: str, value: str) -> OptionValue:
    """Return the value that an option's text means. Raises `ImageError`."""
    match kind:
        case "bool":
            if value in BOOLEANS:
                return BOOLEANS[value]
            raise ImageError(boolean_expected(name))
        case "size":
            try:
                return parse_size(value, limit=1 << 64)
            except SizeTooLarge:
                pass
            except ValueError:
                raise ImageError(size_expected(name)) from None
        case "num":
            try:
                number = int(value, 0)
            except ValueError:
                raise ImageError(f"Parameter '{name}' expects a number") from None
            if abs(number) < 1 << 64:
                return number
        case _:
            return value
    raise ImageError(f"Value '{value}' is out of range for parameter '{name}'")


# -- output --------------------------------------------------------------------


def format_json(value: Any, indent: int = 0) -> str:
    """Return ``value`` as json, laid out as qemu-img does."""
    outer, inner = "    " * indent, "    " * (indent + 1)
    if isinstance(value, Mapping):
        items = [
            f"{inner}{_json_string(key)}: {format_json(item, indent + 1)}"
            for key, item in value.items()
        ]
        return _brackets("{", items, outer + "}")
    if isinstance(value, list):
        items = [inner + format_json(item, indent + 1) for item in value]
        return _brackets("[", items, outer + "]")
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else _json_string(value)


def _brackets(opening: str, items: list[str], closing: str) -> str:
    lines = [opening, ",\n".join(items), closing] if items else [opening, closing]
    return "\n".join(lines)


_ESCAPES: Final = {
    '"': '\\"',
    "\\": "\\\\",
    "\b": "\\b",
    "\f": "\\f",
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
}


def _json_string(text: str) -> str:
    out = []
    for char in text:
        code = ord(char)
        if char in _ESCAPES:
            out.append(_ESCAPES[char])
        elif 0x20 <= code < 0x7F:
            out.append(char)
        elif 0xDC80 <= code <= 0xDCFF:
            # A byte that was no UTF-8.
            out.append("\\uFFFD")
        elif code > 0xFFFF:
            code -= 0x10000
            out.append(f"\\u{0xD800 | code >> 10:04X}\\u{0xDC00 | code & 0x3FF:04X}")
        else:
            out.append(f"\\u{code:04X}")
    return f'"{"".join(out)}"'


def print_tree(value: Mapping[str, Any] | list[Any], depth: int) -> None:
    """Print nested values as qemu-img does for people."""
    if isinstance(value, list):
        pairs = [(f"[{index}]", item) for index, item in enumerate(value)]
    else:
        pairs = [(key.replace("-", " "), item) for key, item in value.items()]
    for key, item in pairs:
        if isinstance(item, Mapping | list):
            print(f"{'    ' * depth}{key}:")
            print_tree(item, depth + 1)
        else:
            text = str(item).lower() if isinstance(item, bool) else item
            print(f"{'    ' * depth}{key}: {text}")

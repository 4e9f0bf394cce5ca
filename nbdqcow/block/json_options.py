"""``json:`` names, and the objects that they are, as dotted keys and texts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

from nbdqcow.errors import ImageError

Pairs: TypeAlias = Mapping[str, str | None]
"""Dotted keys and their values as text; None is JSON's null."""

JSON_PREFIX: Final = "json:"
NO_TEXT: Final = "\0"
"""What a backing file is that is neither null, nor a text, nor options."""
_MAX_DEPTH: Final = 300
_STRING: Final = r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'"""
_STRINGS: Final = ("driver", "filename", "file", "data-file", "image", "test", "raw")
"""Last parts of keys whose values are names. What JSON has there, and is no string,
counts as null, as in QEMU, which looks for a string and for nothing else."""


def json_pairs(name: str) -> Pairs:
    """Return the pairs of a name that begins with ``json:``. Raises `ImageError`."""
    try:
        given = load_json(name.removeprefix(JSON_PREFIX))
        if not isinstance(given, dict):
            raise ImageError("Invalid JSON object given")
        return flatten(given)
    except DuplicateKeyError as error:
        raise ImageError(f"Could not parse the JSON options: {error}") from None
    except (ValueError, RecursionError):
        raise ImageError("Could not parse the JSON options") from None


class DuplicateKeyError(ValueError):
    """A JSON object has a key twice: nobody knows which value is meant."""

    def __init__(self) -> None:
        super().__init__("JSON parse error, duplicate key")


def load_json(text: str) -> Any:
    """Return the value of JSON text, with QEMU's liberties: `double_quoted`.

    Raises `DuplicateKeyError` and other kinds of `ValueError`, and `RecursionError`.
    """
    # Most names have none, and small commands feel what it takes to load.
    import json

    return json.loads(double_quoted(text), object_pairs_hook=_with_single_keys)


def _with_single_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise DuplicateKeyError
    return found


def double_quoted(text: str) -> str:
    """Return JSON text with the strings in double quotes that have single ones,
    which QEMU takes as well."""

    def quote(found: re.Match[str]) -> str:
        string = found[0]
        if string.startswith('"'):
            return string
        return '"' + re.sub(r'\\.|"', _requote, string[1:-1]) + '"'

    return re.sub(_STRING, quote, text)


def _requote(found: re.Match[str]) -> str:
    return {"\\'": "'", '"': '\\"'}.get(found[0], found[0])


def flatten(given: Mapping[str, Any]) -> dict[str, str | None]:
    """Return a JSON object as dotted keys and texts; what is in a list has its
    number for a key. What is in an object within goes before a dotted key of the
    same name, as in QEMU. Raises `ImageError`."""
    pairs: dict[str, str | None] = {}

    def walk(prefix: str, value: Mapping[str, Any], depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ImageError("the JSON options are nested too deep")
        within: list[tuple[str, Mapping[str, Any]]] = []
        for key, item in value.items():
            name = prefix + key
            if isinstance(item, list):
                item = {str(index): each for index, each in enumerate(item)}
            last = name.rpartition(".")[2]
            if isinstance(item, dict) and item:
                within.append((f"{name}.", item))
            elif last == "backing" and not isinstance(item, str | None):
                pairs[name] = NO_TEXT
            elif isinstance(item, dict):
                # As good as null where QEMU wants a text.
                pairs[name] = None
            elif not isinstance(item, str) and last in _STRINGS:
                pairs[name] = None
            elif isinstance(item, bool):
                pairs[name] = "on" if item else "off"
            elif isinstance(item, float):
                # As C prints it.
                pairs[name] = f"{item:.17g}"
            else:
                pairs[name] = None if item is None else str(item)
        for name, item in within:
            walk(name, item, depth + 1)

    walk("", given, 0)
    return pairs

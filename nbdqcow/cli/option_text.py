"""Options as one text, ``name=value,...``, as all of QEMU's tools take them.

Only in a value two commas are one that belongs to it.
"""

import re
from collections.abc import Iterator
from typing import Final

from nbdqcow.cli.messages import error
from nbdqcow.errors import UsageError

_NAME: Final = re.compile("[^=,]*")
_VALUE: Final = re.compile("(?:[^,]|,,)*", re.DOTALL)
_FIRST: Final = "file"
"""What an image's options begin with if there is no name: another image."""
_SNAPSHOT_KEYS: Final = ("snapshot.id", "snapshot.name")


def split_pairs(text: str) -> Iterator[tuple[str, str | None]]:
    """Yield each name with its value, None if it has none."""
    at = 0
    while at < len(text):
        name, at = _take(_NAME, text, at)
        value = None
        if text.startswith("=", at):
            value, at = _take(_VALUE, text, at + 1)
            value = value.replace(",,", ",")
        yield name, value
        # The comma behind it.
        at += 1


def _take(what: re.Pattern[str], text: str, at: int) -> tuple[str, int]:
    found = what.match(text, at)
    assert found is not None
    return found[0], found.end()


def as_flag(name: str) -> tuple[str, str]:
    """Return which option a name without a value switches on, or off, and its value."""
    return (name[2:], "off") if name.startswith("no") else (name, "on")


def parse_keyval(text: str, *, warns: bool = True) -> dict[str, str]:
    """Return an image's options. A first one without a name is ``file``. ``warns`` of
    names without a value."""
    pairs: dict[str, str] = {}
    if text and not text.startswith("=", _take(_NAME, text, 0)[1]):
        first, at = _take(_VALUE, text, 0)
        pairs[_FIRST] = first.replace(",,", ",")
        text = text[at + 1 :]
    pairs.update(_settings(text, warns=warns))
    return pairs


def _settings(text: str, *, warns: bool = True) -> Iterator[tuple[str, str]]:
    """Yield each option with what it is set to. ``warns`` of names without a value."""
    for name, value in split_pairs(text):
        key, setting = (name, value) if value is not None else as_flag(name)
        if value is None and warns:
            error(
                f"warning: short-form boolean option '{name}' deprecated\n"
                f"Please use {key}={setting} instead"
            )
        yield key, setting


def parse_properties(text: str) -> dict[str, str]:
    """Return an object's properties, which all have values. Raises `UsageError`."""
    pairs: dict[str, str] = {}
    for name, value in split_pairs(text):
        if not name:
            raise UsageError("Invalid parameter ''")
        if value is None:
            raise UsageError(f"Expected '=' after parameter '{name}'")
        pairs[name] = value
    return pairs


def parse_snapshot(text: str) -> str | tuple[str | None, str | None]:
    """Return which snapshot an option asks for: an ID or name, or ``(ID, name)``, each
    of them optional. Raises `UsageError`."""
    if not text.startswith("snapshot."):
        return text
    found: dict[str, str] = {}
    for key, setting in _settings(text):
        if key not in _SNAPSHOT_KEYS:
            raise UsageError(f"Invalid parameter '{key}'")
        found[key] = setting
    return found.get("snapshot.id"), found.get("snapshot.name")

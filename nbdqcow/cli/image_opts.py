"""``--image-opts``: an image as a set of options (QEMU's keyval syntax)."""

from typing import Any

from nbdqcow.block.image_options import Pairs
from nbdqcow.block.image_options import parse_pairs as _parse_pairs
from nbdqcow.errors import ImageError, UsageError


def parse_keyval(text: str, *, flags: bool = True) -> dict[str, str]:
    """Return the pairs of ``key=value,...``; ``,,`` is a comma in a value.

    With ``flags`` a key without ``=`` is ``on``; the first one is ``file`` with
    that value. Raises `UsageError`.
    """
    pairs: dict[str, str] = {}
    for index, item in enumerate(text.replace(",,", "\0").split(",")):
        if not item:
            continue
        key, equals, value = item.replace("\0", ",").partition("=")
        if not (flags or equals):
            raise UsageError(f"Expected '=' after parameter '{key}'")
        if not equals and index == 0:
            pairs["file"] = key
            continue
        if not key:
            raise UsageError(f"'{text}' is not key=value,...")
        pairs[key] = value if equals else "on"
    return pairs


def parse_image_opts(text: str) -> tuple[str, dict[str, Any]]:
    """Return the file name, and the options of `open_image` that are given.

    ``key_secret`` among them is the id of an object, for the caller to look up.

    Raises `UsageError`, by name, for an option that we don't have.
    """
    return parse_pairs(parse_keyval(text), text)


def parse_pairs(pairs: Pairs, text: str) -> tuple[str, dict[str, Any]]:
    """Do as `parse_image_opts` does with keys and values; ``text`` is what
    messages show."""
    try:
        return _parse_pairs(pairs)
    except ImageError as exc:
        raise UsageError(f"'{text}': {exc}") from None

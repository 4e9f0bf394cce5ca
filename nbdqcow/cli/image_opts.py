"""``--image-opts``: an image as a set of options (QEMU's keyval syntax)."""

from collections.abc import Mapping
from typing import Any

from nbdqcow.errors import UsageError
from nbdqcow.units import parse_size

_BOOLEANS = {"on": True, "yes": True, "off": False, "no": False}
_DISCARD_MODES = {"unmap": "unmap", "on": "unmap", "ignore": "ignore", "off": "ignore"}
_DETECT_ZEROES_MODES = {mode: mode for mode in ("off", "on", "unmap")}


def parse_keyval(text: str) -> dict[str, str]:
    """Return the pairs of ``key=value,...``; ``,,`` is a comma in a value.

    A key without ``=`` is ``on``. Raises `UsageError`.
    """
    pairs: dict[str, str] = {}
    for item in text.replace(",,", "\0").split(","):
        if not item:
            continue
        key, equals, value = item.replace("\0", ",").partition("=")
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


def parse_pairs(pairs: dict[str, str], text: str) -> tuple[str, dict[str, Any]]:
    """Do as `parse_image_opts` does with keys and values; ``text`` is what
    messages show. ``pairs`` is used up."""
    filename = pairs.pop("file.filename", None) or pairs.pop("filename", None)
    if filename is None:
        raise UsageError(f"'{text}' has no file.filename=NAME")
    if pairs.pop("file.driver", "file") != "file":
        raise UsageError("the only file.driver is 'file'")
    options: dict[str, Any] = {}
    for key, value in pairs.items():
        match key:
            case "driver":
                # A file without a format over it is served as it is.
                options["format"] = "raw" if value == "file" else value
            case "read-only":
                options["read_only"] = _boolean(key, value)
            case "discard":
                options["discard"] = _choice(key, value, _DISCARD_MODES)
            case "detect-zeroes":
                options["detect_zeroes"] = _choice(key, value, _DETECT_ZEROES_MODES)
            case "l2-cache-size":
                options["l2_cache_size"] = _size(key, value)
            case "file.locking":
                options["lock"] = value == "auto" or _boolean(key, value)
            case "data-file.filename" | "data-file.file.filename":
                options.setdefault("driver_options", {})["data_file"] = value
            case "data-file.driver" | "data-file.file.driver":
                _choice(key, value, {"file": "file", "raw": "raw"})
            case "encrypt.key-secret":
                options["key_secret"] = value
            case "encrypt.format":
                # The image says the same; it is not asked for twice.
                _choice(key, value, {"aes": "aes", "luks": "luks"})
            case "cache.direct" | "cache.no-flush":
                _boolean(key, value)
            case _:
                raise UsageError(f"image option '{key}' is not supported")
    cache = _cache_mode(pairs)
    if cache is not None:
        options["cache"] = cache
    return filename, options


def _cache_mode(pairs: Mapping[str, str]) -> str | None:
    if "cache.direct" not in pairs and "cache.no-flush" not in pairs:
        return None
    direct = _BOOLEANS[pairs.get("cache.direct", "off")]
    no_flush = _BOOLEANS[pairs.get("cache.no-flush", "off")]
    if direct and no_flush:
        raise UsageError("cache.direct=on with cache.no-flush=on is not supported")
    return "none" if direct else "unsafe" if no_flush else "writeback"


def _boolean(key: str, value: str) -> bool:
    if value not in _BOOLEANS:
        raise UsageError(f"Parameter '{key}' expects 'on' or 'off'")
    return _BOOLEANS[value]


def _choice(key: str, value: str, choices: Mapping[str, str]) -> str:
    if value not in choices:
        raise UsageError(f"Parameter '{key}' does not accept value '{value}'")
    return choices[value]


def _size(key: str, value: str) -> int:
    try:
        return parse_size(value)
    except ValueError as exc:
        raise UsageError(f"Parameter '{key}': {exc}") from None

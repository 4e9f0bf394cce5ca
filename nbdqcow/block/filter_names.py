"""Names of files with a filter over them: ``blkdebug:CONFIG:FILE`` and others.

An image that takes the place of a file, ``file.driver=raw,file.offset=4096,...``, is
named as if a filter without options were over it (`LAYER`).
What can't be said so is said by options. They become a name as well, for a
name is all that an image is known by: ``blkdebug:json:{...}`` with dotted keys.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from nbdqcow.block.registry import LAYER, filter_names, split_protocol
from nbdqcow.errors import ImageError

_MAX_DEPTH: Final = 16
_OPTIONS: Final = "json:"
_CHILDREN: Final = {
    "blkdebug": ("image",),
    "blkverify": ("test", "raw"),
    LAYER: ("image",),
}
"""The files below a filter; the first one is the one that it is about."""
_PLAIN: Final = (("filename",), ("driver", "filename"), ("filename", "driver"))
_NULL: Final = {"driver": "null-co"}
_NAMES: Final = ("driver", "filename", "file")
"""Options of a file that are as good as not there if null is their value."""
_NO_LIMIT: Final = "0"
_ORDER: Final = ("offset", "driver", "size", "file")
_NUMBERS: Final = ("errno", "sector", "state", "new_state", "align")


class FilteredName(NamedTuple):
    """What the name of a filtered file says.

    Attributes:
        driver: the filter.
        children: the options of each file below, as `parse_pairs` takes them.
        config: the configuration file, or None.
        options: of the filter itself, by dotted keys.
    """

    driver: str
    children: Mapping[str, Mapping[str, str]]
    config: str | None
    options: Mapping[str, str]


def is_filtered(filename: str) -> bool:
    """Whether a filter is over the file of that name, or a format. Raises
    `ImageError`."""
    names = (*filter_names(), LAYER)
    return bool(filename) and split_protocol(filename)[0] in names


def is_window(filename: str) -> bool:
    """Whether the file of that name is a raw image, perhaps a part of another file.
    Raises `ImageError`."""
    if split_protocol(filename)[0] != LAYER:
        return False
    (image,) = children_of(filename)
    return image.get("driver") == "raw"


def parse_filtered_name(filename: str) -> FilteredName:
    """Return what the name of a filtered file says. Raises `ImageError`."""
    driver, _, rest = filename.partition(":")
    driver = driver.lower()
    names = _CHILDREN[driver]
    if rest.startswith(_OPTIONS):
        return _parse_options(driver, rest.removeprefix(_OPTIONS))
    first, colon, name = rest.partition(":")
    if not colon or (driver == "blkverify" and not first):
        needed = {
            LAYER: "options",
            "blkdebug": "both config file and image path",
            "blkverify": "raw copy and original image path",
        }
        raise ImageError(f"{driver} requires {needed[driver]}")
    if driver == "blkverify":
        children = {"test": {"filename": name}, "raw": {"filename": first}}
        return FilteredName(driver, children, None, {})
    return FilteredName(driver, {names[0]: {"filename": name}}, first or None, {})


def _parse_options(driver: str, text: str) -> FilteredName:
    import json

    try:
        pairs = json.loads(text)
    except (ValueError, RecursionError):
        raise ImageError("Could not parse the JSON options") from None
    if not isinstance(pairs, dict) or not all(
        isinstance(value, str) for value in pairs.values()
    ):
        raise ImageError("Invalid JSON object given")
    return _sort_options(driver, pairs)


def _sort_options(driver: str, pairs: Mapping[str, str | None]) -> FilteredName:
    children: dict[str, dict[str, str]] = {name: {} for name in _CHILDREN[driver]}
    options: dict[str, str] = {}
    for key, value in pairs.items():
        first, dot, rest = key.partition(".")
        if value is None and first in children and rest in ("", *_NAMES):
            continue
        if value is None and driver == "blkdebug" and not dot:
            # A limit that is none; what is no limit the filter refuses by name.
            if key != "config":
                options[key] = _NO_LIMIT
            continue
        if value is None:
            raise ImageError(f"Parameter '{key}' has no value")
        if first in children and not dot:
            raise ImageError(f"Cannot find device='{value}' nor node-name='{value}'")
        if first in children:
            children[first][rest] = value
        elif first in ("take-child-perms", "unshare-child-perms"):
            raise ImageError(f"the option '{first}' of {driver} is not supported")
        elif key not in ("driver", "node-name", "read-only", "auto-read-only"):
            options[key] = value
    for name, child in children.items():
        if not child:
            raise ImageError(f'A block device must be specified for "{name}"')
    config = options.pop("config", None) if driver == "blkdebug" else None
    return FilteredName(driver, children, config, options)


def layer_name(driver: str, pairs: Mapping[str, str | None]) -> str:
    """Return the name of a file that is an image of a format, ``pairs`` being its
    other options. Raises `ImageError`."""
    below = {f"image.{key}": value for key, value in pairs.items()}
    return filtered_name(LAYER, {"image.driver": driver, **below})


def filtered_name(driver: str, pairs: Mapping[str, str | None]) -> str:
    """Return the name that options of a filter make. Raises `ImageError`."""
    named = _sort_options(driver, pairs)
    places = [_plain_name(named.children[name]) for name in _CHILDREN[driver]]
    if not named.options and None not in places:
        first = (named.config or "") if driver == "blkdebug" else places[1]
        # In front there can't be a colon.
        if first is not None and ":" not in first and not first.startswith("json"):
            return f"{driver}:{first}:{places[0]}"
    import json

    said = {key: value for key, value in pairs.items() if value is not None}
    kept = {**said, **named.options}
    kept.pop("driver", None)
    return f"{driver}:{_OPTIONS}{json.dumps(kept)}"


def _plain_name(file: Mapping[str, str]) -> str | None:
    """Return the name that says the same as a file's options, or None."""
    if file == _NULL:
        return "null-co://"
    if tuple(file) in _PLAIN and file.get("driver", "file") == "file":
        # A path, whatever it looks like.
        return None if ":" in file["filename"] else file["filename"]
    return None


def children_of(filename: str) -> list[Mapping[str, str]]:
    """Return the options of the files below a filtered one; the first is the
    one that the filter is about. Raises `ImageError`."""
    named = parse_filtered_name(filename)
    return [named.children[name] for name in _CHILDREN[named.driver]]


def innermost(filename: str) -> str:
    """Return the name of the file below all filters. Raises `ImageError`."""
    from nbdqcow.block.image_options import parse_pairs

    for _ in range(_MAX_DEPTH):
        if not is_filtered(filename):
            return filename
        filename, _ = parse_pairs(children_of(filename)[0])
    raise ImageError(f"more than {_MAX_DEPTH} filters over a file")


def shown_name(filename: str, format_: str) -> str:
    """Return what an image in a file is called: its name, or if that is made of
    options the ``json:`` name that says them. Raises `ImageError`."""
    if not is_filtered(filename):
        return filename
    driver, _, rest = filename.partition(":")
    if not rest.startswith(_OPTIONS):
        return filename
    import json

    named = parse_filtered_name(filename)
    if driver == LAYER:
        below = _nested(named.children["image"])
        return _OPTIONS + json.dumps({"driver": format_, "file": below})
    file: dict[str, Any] = {"driver": driver}
    for name, child in named.children.items():
        file[name] = {"driver": "file", **child}
    if named.config is not None:
        file["config"] = named.config
    for key, value in named.options.items():
        option = key.rpartition(".")[2]
        if option in ("once", "immediately"):
            file[key] = value == "on"
        else:
            is_number = option in _NUMBERS and value.isascii() and value.isdecimal()
            file[key] = int(value[:20]) if is_number else value
    return _OPTIONS + json.dumps({"driver": format_, "file": file})


def _nested(pairs: Mapping[str, str]) -> dict[str, Any]:
    """Return the options of an image that is a file, as QEMU shows them."""
    values: dict[str, Any] = {}
    below: dict[str, str] = {}
    for key, value in pairs.items():
        first, dot, rest = key.partition(".")
        if first == "file" and dot:
            below[rest] = value
        elif key == "filename":
            below[key] = value
        else:
            is_number = key in ("offset", "size") and value.isdecimal()
            values[key] = int(value[:20]) if is_number else value
    is_image = below.keys() & {"file", "offset", "size"} or any("." in k for k in below)
    values["file"] = _nested(below) if is_image else {"driver": "file", **below}
    shown: dict[str, Any] = {k: values.pop(k) for k in _ORDER if k in values}
    return {**shown, **values}

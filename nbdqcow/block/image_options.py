"""Images named by options: dotted keys, ``json:`` names, QEMU's option names.

``{"driver": "qcow2", "file": {"driver": "file", "filename": "a"}}`` and
``driver=qcow2,file.driver=file,file.filename=a`` say the same.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from nbdqcow.block.filter_names import filtered_name, layer_name
from nbdqcow.block.json_options import NO_TEXT, Pairs, json_pairs
from nbdqcow.block.registry import (
    check_place,
    filter_names,
    format_names,
    unmistakable_path,
)
from nbdqcow.errors import ImageError
from nbdqcow.units import BOOLEANS, boolean_expected, parse_size, size_expected

NO_OPTIONS: Final[Mapping[str, Any]] = MappingProxyType({})

_DISCARD_MODES: Final = {
    "unmap": "unmap",
    "on": "unmap",
    "ignore": "ignore",
    "off": "ignore",
}
_DETECT_ZEROES_MODES: Final = ("off", "on", "unmap")
_LOCKING_MODES: Final = ("auto", "on", "off")
_AIO_MODES: Final = ("threads", "native", "io_uring")
FILE_DRIVERS: Final = ("file", "host_device")
COMPRESS: Final = "compress"
"""QEMU's filter over an image, by way of which all that is written is compressed."""
_COMPRESSING: Final = ("qcow", "qcow2")
"""Formats that have compressed clusters."""
NO_FILE_NAME: Final = "The 'file' block driver requires a file name"
_NO_PLACE: Final = "Must specify either driver or file"
_NULL_REFERENCE: Final[Mapping[str, None]] = {"": None}
"""What `_groups` makes of a null in the place of a file."""
_REFERENCE_WITH_OPTIONS: Final = (
    "Cannot reference an existing block device with additional options or a new "
    "filename"
)
_NODE_NAME: Final = "[a-zA-Z][a-zA-Z0-9._-]*"
_MAX_NODE_NAME: Final = 31

_ENCRYPTING: Final = {
    "encrypt.format": ("qcow", "qcow2"),
    "encrypt.key-secret": ("qcow", "qcow2"),
    "key-secret": ("luks",),
}
"""Options that only these formats have."""

_DRIVER_FLAGS: Final = (
    *("lazy-refcounts", "discard-no-unref"),
    *("pass-discard-request", "pass-discard-snapshot", "pass-discard-other"),
)
_DRIVER_SIZES: Final = (
    *("cache-size", "refcount-cache-size", "l2-cache-entry-size"),
    # Ours: QEMU keeps nothing that it has decompressed.
    "compressed-cache-size",
)
_OVERLAP: Final = "overlap-check"
_OWN: Final = (
    *("driver", "read-only", "force-share", "discard", "detect-zeroes", "node-name"),
    *("l2-cache-size", "cache.direct", "cache.no-flush", "cache.writeback"),
    *("auto-read-only", "encrypt.key-secret", "key-secret", "encrypt.format"),
    *("offset", "size", "cache-clean-interval", _OVERLAP, *_DRIVER_FLAGS),
    *_DRIVER_SIZES,
)
"""Options that are left out if null is their value."""
OVERLAP_TEMPLATES: Final = ("none", "constant", "cached", "all")
OVERLAP_CLASSES: Final = (
    *("main-header", "active-l1", "active-l2", "refcount-table", "refcount-block"),
    *("snapshot-table", "inactive-l1", "inactive-l2", "bitmap-directory"),
)


class UnknownOption(ImageError):
    """An option that images don't have, whatever their format; this one's is not named.

    Attributes:
        key: the option.
        filename: of the image, or None.
    """

    def __init__(self, text: str, key: str = "", filename: str | None = None) -> None:
        super().__init__(text)
        self.key = key
        self.filename = filename


class BackingOverride(NamedTuple):
    """What to open in the place of the backing file that an image names.

    Attributes:
        filename: None for the one that the image names.
        none: open no backing image at all.
        options: what `parse_pairs` returned for it.
    """

    filename: str | None = None
    none: bool = False
    options: Mapping[str, Any] = NO_OPTIONS


def parse_json_name(
    name: str, format_: str | None = None
) -> tuple[str, dict[str, Any]]:
    """Return what `parse_pairs` does for a name that begins with ``json:``.

    A format that is given besides takes the place of the one in the name: who says
    ``raw`` has no guest's tables believed. Raises `ImageError`.
    """
    pairs = json_pairs(name)
    if format_ is not None and pairs.get("driver") in format_names():
        pairs = {**pairs, "driver": format_}
    filename, options = parse_pairs(pairs)
    return filename, options if format_ is None else {**options, "format": format_}


def parse_pairs(pairs: Pairs) -> tuple[str, dict[str, Any]]:
    """Return the file's name, and the options of `nbdqcow.open_image` given.

    ``key_secret`` among them is the id of an object, for the caller to look up.
    Raises `ImageError`, by name, for an option that we don't have.
    """
    _check_has_place(pairs)
    filename, options = _parse(pairs)
    if filename is None:
        if (driver := pairs.get("driver")) in FILE_DRIVERS:
            raise ImageError(f"The '{driver}' block driver requires a file name")
        raise ImageError('A block device must be specified for "file"')
    return filename, options


def check_node_names(pairs: Pairs, taken: set[str], *, below: bool = True) -> None:
    """See that no two nodes that options name have the same name, nor one that is
    ``taken``, and add theirs to those. Without ``below`` the names in the place of
    backing files don't count. Raises `ImageError`."""
    named = [
        (key.startswith("backing."), value)
        for key, value in pairs.items()
        if value is not None and key.rpartition(".")[2] == "node-name"
    ]
    # Backing files are opened last.
    for is_below, name in sorted(named, key=lambda one: one[0]):
        if is_below and not below:
            return
        if name in taken:
            prefix = "Could not open backing file: " if is_below else ""
            raise ImageError(f"{prefix}Duplicate nodes with node-name='{name}'")
        taken.add(name)


def _check_has_place(pairs: Pairs) -> None:
    if pairs.get("driver") is None and not any(
        value is not None and key.partition(".")[0] in ("file", "filename")
        for key, value in pairs.items()
    ):
        raise ImageError(_NO_PLACE)


def _parse(pairs: Pairs) -> tuple[str | None, dict[str, Any]]:
    file, backing, data_file, own = _groups(pairs, ("file", "backing", "data-file"))
    options: dict[str, Any] = {}
    if own.get("driver") == COMPRESS:
        return _parse_compressing(file, own)
    filename = own.pop("filename", None)
    if (driver := own.get("driver")) in filter_names():
        # All options are the filter's: also those called as others of an image.
        assert driver is not None
        return filtered_name(driver, pairs), {"format": "raw"}
    if driver == "nbd" or driver in NULL_DRIVERS:
        # A protocol without a format over it is served as it is.
        names = _NBD if driver == "nbd" else _NULL
        file = {key: value for key, value in own.items() if "." in key or key in names}
        file["driver"] = own["driver"]
        own = {key: value for key, value in own.items() if key not in file}
        options["format"] = "raw"
    elif driver is not None and driver not in (*format_names(), *FILE_DRIVERS):
        raise ImageError(f"Unknown driver '{driver}'")
    if file:
        if filename is not None:
            file.setdefault("filename", filename)
        filename = _file_name(file, options)
    if filename is not None and driver in FILE_DRIVERS:
        check_place(driver, filename)
    if backing.get("") == NO_TEXT:
        own["backing"] = None
        backing = {}
    try:
        more = _take_all_own(driver, own, options)
    except UnknownOption as error:
        error.filename = filename
        raise
    if data_file and data_file != _NULL_REFERENCE:
        more["data_file"] = _data_file_name(data_file)
    if backing:
        try:
            options["backing"] = _backing(backing)
        except ImageError as error:
            raise error.with_text(f"Could not open backing file: {error}") from None
    if (cache := _cache_mode(own)) is not None:
        options["cache"] = cache
    if more:
        options["driver_options"] = more
    return filename, options


def _parse_compressing(file: Pairs, own: Pairs) -> tuple[str | None, dict[str, Any]]:
    """Do as `_parse` does for an image, ``file``, that is written to compressed."""
    above: dict[str, Any] = {}
    given = {key: value for key, value in own.items() if key != "driver"}
    unknown = list(_untaken(COMPRESS, given, lambda k, v: _take_own(k, v, above)))
    if not file or file == _NULL_REFERENCE:
        return None, {}
    if "" in file:
        raise ImageError(_no_such_node(file[""]))
    filename, options = _parse({"driver": "file", **file})
    if unknown:
        raise ImageError(not_supported(COMPRESS, unknown[0]))
    if (cache := _cache_mode(own)) is not None:
        above["cache"] = cache
    if options["format"] not in _COMPRESSING:
        below = file.get("driver", "file")
        raise ImageError(f"Compression is not supported for underlying format: {below}")
    return filename, {**options, **above, "compresses": True}


def _groups(pairs: Pairs, names: tuple[str, ...]) -> list[dict[str, str | None]]:
    """Return the keys below each of ``names`` without it, then all others.

    A name itself as a key is the key ``""``.
    """
    groups: dict[str, dict[str, str | None]] = {name: {} for name in (*names, "")}
    for key, value in pairs.items():
        first, _, rest = key.partition(".")
        if first in names:
            groups[first][rest] = value
        else:
            groups[""][key] = value
    return list(groups.values())


def _take_all_own(
    driver: str | None, own: Pairs, options: dict[str, Any]
) -> dict[str, Any]:
    """Take the image's own options; return those of its driver. Raises `ImageError`
    for one that it does not have."""
    more: dict[str, Any] = {}
    for key in _untaken(
        driver,
        own,
        lambda k, v: _take_own(k, v, options) or _take_driver_own(k, v, more),
    ):
        if driver is None:
            raise UnknownOption(not_supported("raw", key), key)
        raise ImageError(not_supported(driver, key))
    _take_overlap_checks(own, more)
    return more


def _untaken(
    driver: str | None, own: Pairs, take: Callable[[str, str], bool]
) -> Iterator[str]:
    """Have ``take`` take the options that images of a format can have; yield the
    others, and those that it says it does not know. Null is no option at all."""
    for key, value in own.items():
        fits = driver is None or driver in _ENCRYPTING.get(key, (driver,))
        if value is None and fits and key in _OWN:
            continue
        if value is None or not fits or not take(key, value):
            yield key


def not_supported(format_: str, key: str) -> str:
    """Return what is said of an option that the images of a format don't have."""
    return f"Block format '{format_}' does not support the option '{key}'"


def _take_own(key: str, value: str, options: dict[str, Any]) -> bool:
    """Take an option that images of all formats have; whether it is one."""
    match key:
        case "driver":
            if value in FILE_DRIVERS:
                value = "raw"
            options.setdefault("format", value)
        case "read-only" | "force-share":
            # That the file below it says so is enough.
            option = key.replace("-", "_")
            options[option] = _boolean(key, value) or options.get(option, False)
        case "discard":
            options["discard"] = _discard_mode(value)
        case "detect-zeroes":
            options["detect_zeroes"] = _mode(value, _DETECT_ZEROES_MODES)
        case "l2-cache-size":
            options["l2_cache_size"] = _size(key, value)
        case "encrypt.key-secret" | "key-secret":
            options["key_secret"] = value
        case "cache.direct" | "cache.no-flush" | "cache.writeback" | "auto-read-only":
            _boolean(key, value)
        case "node-name":
            _check_node_name(value)
        case _:
            return False
    return True


def _take_driver_own(key: str, value: str, more: dict[str, Any]) -> bool:
    """Take an option of one format; whether it is one."""
    name = key.replace("-", "_")
    if key in _DRIVER_FLAGS:
        more[name] = _boolean(key, value)
    elif key in _DRIVER_SIZES:
        more[name] = _size(key, value)
    elif key == "cache-clean-interval":
        more[name] = _interval(key, value)
    elif key in ("offset", "size", "encrypt.format"):
        more[key.replace(".", "_")] = value
    elif key.partition(".")[0] != _OVERLAP:
        return False
    return True


def _take_overlap_checks(own: Pairs, more: dict[str, Any]) -> None:
    """Take ``overlap-check``: a template, and classes that differ from it."""
    template: str | None = None
    switches: dict[str, bool] = {}
    for key, value in own.items():
        first, _, name = key.partition(".")
        if first != _OVERLAP or value is None:
            continue
        if name in ("", "template"):
            if template not in (None, value):
                raise ImageError(
                    f"Conflicting values for qcow2 options '{_OVERLAP}' ('{template}')"
                    f" and '{_OVERLAP}.template' ('{value}')"
                )
            template = value
        elif name in OVERLAP_CLASSES:
            switches[name] = _boolean(key, value)
        else:
            raise ImageError(f"image option '{key}' is not supported")
    if template is not None and template not in OVERLAP_TEMPLATES:
        raise ImageError(
            f"Unsupported value '{template}' for qcow2 option '{_OVERLAP}'. Allowed are"
            " any of the following: none, constant, cached, all"
        )
    if template is not None or switches:
        more["overlap_check"] = (template or "cached", switches)


def _no_such_node(name: str | None) -> str:
    return f"Cannot find device='{name}' nor node-name='{name}'"


# -- files -----------------------------------------------------------------

_NBD_WAITS: Final = ("reconnect-delay", "open-timeout")
_NBD: Final = (
    "host", "port", "path", "export", "tls-creds", "tls-hostname", "x-dirty-bitmap",
    *_NBD_WAITS,
)  # fmt: skip
_NULL: Final = ("size", "latency-ns", "read-zeroes")
NULL_DRIVERS: Final = ("null-co", "null-aio")

_FILE: Final = ("locking", "aio")
_COMMON: Final = (
    *("read-only", "auto-read-only", "force-share", "discard", "detect-zeroes"),
    *("cache.direct", "cache.no-flush", "node-name"),
)
"""Options that every image has, and every file below one."""


def _file_name(file: dict[str, str | None], options: dict[str, Any]) -> str:
    """Return the name of the file that ``file.*`` options describe."""
    if "" in file:
        if len(file) > 1:
            raise ImageError(_REFERENCE_WITH_OPTIONS)
        if file[""] is None:
            raise ImageError('A block device must be specified for "file"')
        raise ImageError(_no_such_node(file[""]))
    driver = file.pop("driver", None)
    if driver is None:
        if (
            file.keys() <= {"filename", *_FILE, *_COMMON}
            and file.get("filename") is None
        ):
            raise ImageError(_NO_PLACE)
        driver = "file"
    if driver == "nbd":
        _take_common(file, options)
        return _nbd_uri(file)
    if driver in NULL_DRIVERS:
        _take_common(file, options)
        return _null_name(driver, file)
    if driver in filter_names():
        return filtered_name(driver, file)
    if driver in format_names():
        return layer_name(driver, file)
    if driver not in FILE_DRIVERS:
        raise ImageError(f"Unknown driver '{driver}'")
    filename = file.pop("filename", None)
    if filename is None:
        raise ImageError(NO_FILE_NAME)
    path = unmistakable_path(filename)
    check_place(driver, path)
    _take_common(file, options)
    for key, value in file.items():
        if value is None and key in _FILE:
            continue
        value = value or ""
        match key:
            case "locking":
                options["lock"] = _mode(value, _LOCKING_MODES) != "off"
            case "aio":
                # What this says to QEMU's driver, ours finds out by itself.
                _mode(value, _AIO_MODES)
            case _:
                raise ImageError(
                    f"Block protocol '{driver}' doesn't support the option '{key}'"
                )
    return path


def _take_common(file: dict[str, str | None], options: dict[str, Any]) -> None:
    """Take what any file may be told, out of ``file``.

    A file that is read-only or shared makes the image over it so. The rest is how
    QEMU's drivers do their work, and only has to be right.
    """
    said: dict[str, Any] = {}
    for key in _COMMON:
        value = file.pop(key, None)
        if value is not None:
            _take_own(key, value, said)
    for option in ("read_only", "force_share"):
        if said.get(option):
            options[option] = True


def _nbd_uri(file: dict[str, str | None]) -> str:
    """Return the URI of the export that options of an NBD client describe."""
    # Not above: it brings more modules than all of `info` has.
    from urllib.parse import quote

    texts = {key: value or "" for key, value in file.items()}
    kind = texts.pop("server.type", None)
    if kind not in (None, "inet", "unix", "vsock", "fd"):
        raise ImageError(f"Parameter 'type' does not accept value '{kind}'")
    if "path" in texts and "host" in texts:
        raise ImageError("path and host may not be used at the same time")
    if "server.host" in texts and "server.port" not in texts:
        raise ImageError("Parameter 'port' is missing")
    waits = {f"x-{name}": _seconds(texts, name) for name in _NBD_WAITS if name in texts}
    path = texts.pop("server.path", None) or texts.pop("path", None)
    host = texts.pop("server.host", None) or texts.pop("host", None)
    port = texts.pop("server.port", None) or texts.pop("port", None) or "10809"
    export = quote(texts.pop("export", ""), safe="/")
    context = texts.pop("x-dirty-bitmap", None)
    credentials, hostname = texts.pop("tls-creds", None), texts.pop("tls-hostname", "")
    if texts:
        raise ImageError(f"image option 'file.{next(iter(texts))}' is not supported")
    scheme = "nbd"
    parameters = {"socket": path, "x-dirty-bitmap": context, **waits}
    if credentials is not None:
        scheme = "nbds"
        parameters |= {"tls-creds": credentials, "tls-hostname": hostname}
    query = "&".join(
        f"{key}={quote(text, safe='/:')}" for key, text in parameters.items() if text
    )
    behind = f"{export and '/'}{export}{query and '?'}{query}"
    if path is not None and host is None and kind in (None, "unix"):
        return f"{scheme}+unix://{behind}"
    if host is None or path is not None or kind not in (None, "inet"):
        raise ImageError("NBD server address missing")
    if ":" in host:
        host = f"[{host}]"
    return f"{scheme}://{host}:{quote(port)}{behind}"


def _seconds(texts: dict[str, str], name: str) -> str:
    """Take a number of seconds out of options of an NBD client."""
    text = texts.pop(name)
    if not (text.isascii() and text.isdigit() and int(text) >> 32 == 0):
        raise ImageError(f"Parameter '{name}' expects a number")
    return text


def _null_name(driver: str, file: dict[str, str | None]) -> str:
    """Return the name that `nbdqcow.storage.null` has for a file of zeroes."""
    texts = {key: value for key, value in file.items() if value is not None}
    if "read-zeroes" in texts:
        # It reads as zeroes in any case.
        _boolean("read-zeroes", texts.pop("read-zeroes"))
    for key in texts:
        if key not in _NULL:
            raise ImageError(f"image option 'file.{key}' is not supported")
    sizes = {key: _size(key, value) for key, value in texts.items()}
    query = "&".join(f"{key}={size}" for key, size in sizes.items())
    return f"{driver}://{query and '?'}{query}"


def _data_file_name(pairs: dict[str, str | None]) -> str:
    if "" in pairs:
        raise ImageError(_no_such_node(pairs[""]))
    _check_has_place(pairs)
    name, options = _parse(pairs)
    if name is None or options.get("format", "raw") != "raw" or len(options) > 1:
        raise ImageError("image option 'data-file' is a file's name, and no more")
    return name


def _backing(pairs: dict[str, str | None]) -> BackingOverride:
    if "" in pairs:
        name = pairs.pop("")
        if name and pairs:
            raise ImageError(_REFERENCE_WITH_OPTIONS)
        if name:
            raise ImageError(_no_such_node(name))
        return BackingOverride(none=True)
    filename, options = _parse(pairs)
    return BackingOverride(filename, options=options)


# -- values ----------------------------------------------------------------


def _cache_mode(pairs: Pairs) -> str | None:
    modes = {
        key: _boolean(f"cache.{key}", pairs[f"cache.{key}"])
        for key in ("direct", "no-flush", "writeback")
        if pairs.get(f"cache.{key}") is not None
    }
    if not modes:
        return None
    direct, through = modes.get("direct", False), not modes.get("writeback", True)
    # Together with another one it asks for less than that does.
    if modes.get("no-flush", False) and not (direct or through):
        return "unsafe"
    if direct:
        return "directsync" if through else "none"
    return "writethrough" if through else "writeback"


def _boolean(key: str, value: str | None) -> bool:
    if value not in BOOLEANS:
        raise ImageError(boolean_expected(key))
    return BOOLEANS[value]


def _mode(value: str, modes: Sequence[str]) -> str:
    if value not in modes:
        raise ImageError(f"invalid parameter value: {value}")
    return value


def _check_node_name(name: str) -> None:
    """Refuse what QEMU does not take for a node's name; nobody refers to one here."""
    if re.fullmatch(_NODE_NAME, name) is None:
        raise ImageError(f"Invalid node-name: '{name}'")
    if len(name) > _MAX_NODE_NAME:
        raise ImageError("Node name too long")


def _discard_mode(value: str) -> str:
    if value not in _DISCARD_MODES:
        raise ImageError("Invalid discard option")
    return _DISCARD_MODES[value]


def _size(key: str, value: str) -> int:
    try:
        return parse_size(value, limit=1 << 64)
    except ValueError:
        raise ImageError(size_expected(key)) from None


def _interval(key: str, value: str) -> int:
    """Return seconds, as in C: a number that is below 0 is a large one."""
    if re.fullmatch(r"\s*[-+]?(0[xX][0-9a-fA-F]+|[0-9]{1,20})", value) is None:
        raise ImageError(f"Parameter '{key}' expects a number")
    seconds = int(value, 16 if "x" in value.lower() else 10)
    if not 0 <= seconds < 1 << 32:
        if abs(seconds) >= 1 << 64:
            raise ImageError(f"Parameter '{key}' expects a number")
        raise ImageError("Cache clean interval too big")
    return seconds

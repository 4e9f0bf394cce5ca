"""The drivers by name, loaded when first used, and format probing."""

from importlib import import_module
from typing import Any, Final

from nbdqcow.block.driver import FormatDriver
from nbdqcow.errors import ImageError

_FORMATS: Final = {
    "raw": "nbdqcow.formats.raw:RawDriver",
    "qcow2": "nbdqcow.formats.qcow2.driver:Qcow2Driver",
}
_STORAGE: Final = {
    "file": "nbdqcow.storage.file:FileStorage",
    "memory": "nbdqcow.storage.memory:MemoryStorage",
    "null": "nbdqcow.storage.null:NullStorage",
}

PROBE_LENGTH: Final = 2048
"""Bytes of a file that `probe_format` is given."""


def _load(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


def format_names() -> list[str]:
    """Return the names of all format drivers."""
    return list(_FORMATS)


def format_driver(name: str) -> Any:
    """Return the class of a format driver. Raises `ImageError`."""
    if name not in _FORMATS:
        raise ImageError(f"Unknown driver '{name}'")
    return _load(_FORMATS[name])


def storage_driver(name: str) -> Any:
    """Return the class of a storage driver. Raises `ImageError`."""
    if name not in _STORAGE:
        raise ImageError(f"Unknown protocol '{name}'")
    return _load(_STORAGE[name])


def probe_format(head: bytes, filename: str) -> str:
    """Return the name of the format that ``head`` looks most like.

    A guest can write any header into a raw image: never probe what a guest
    could have written unless the user asked for it.
    """
    best, best_score = "raw", 0
    for name in _FORMATS:
        driver: type[FormatDriver] = format_driver(name)
        score = driver.probe(head, filename)
        if score > best_score:
            best, best_score = name, score
    return best

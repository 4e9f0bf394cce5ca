"""The drivers by name, loaded when first used, and format probing."""

import os
import stat
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from nbdqcow.block.storage import FileRole
from nbdqcow.errors import ImageError, ImageInUse
from nbdqcow.types import Buffer

if TYPE_CHECKING:
    # Tools use this module too, and need no event loop.
    from nbdqcow.block.tools import FormatTool

_FORMATS: Final = {
    "raw": "nbdqcow.formats.raw:RawDriver",
    "qcow": "nbdqcow.formats.qcow1.driver:Qcow1Driver",
    "qcow2": "nbdqcow.formats.qcow2.driver:Qcow2Driver",
    "luks": "nbdqcow.formats.luks:LuksDriver",
}
_TOOLS: Final = {
    "raw": "nbdqcow.formats.raw_tool:RawTool",
    "qcow": "nbdqcow.formats.qcow1.tool:Qcow1Tool",
    "qcow2": "nbdqcow.formats.qcow2.tool:Qcow2Tool",
    "luks": "nbdqcow.formats.luks_tool:LuksTool",
}
_STORAGE: Final = {
    "file": "nbdqcow.storage.file:FileStorage",
    "memory": "nbdqcow.storage.memory:MemoryStorage",
    "nbd": "nbdqcow.storage.nbd.driver:NbdStorage",
    "null": "nbdqcow.storage.null:NullStorage",
}

_FILTERS: Final = {
    "blkdebug": "nbdqcow.filters.blkdebug:BlkdebugStorage",
    "blkverify": "nbdqcow.filters.blkverify:BlkverifyStorage",
}
"""Storage drivers over others. They are for tests: nothing loads them but a name
that asks for one."""

LAYER: Final = "x-format"
"""What stands before the colon if the file is a whole image: a window of a file, which
a raw image is, or the disk of any format."""

DEVICE: Final = "host_device"
_EXPORT: Final = "nbd"
_ALIASES: Final = {"file": "raw", DEVICE: "raw", _EXPORT: "raw"}
"""QEMU's names for no format at all: images name their backing file's so."""

_WITHOUT_METADATA: Final = ("raw", "luks")
"""What such an image has beside its data never changes while it is in use."""

_BLOCKING_FILE: Final = "nbdqcow.storage.blocking:BlockingLocalFile"

_PROTOCOLS: Final = {
    "file": "file",
    "nbd": "nbd",
    "nbds": "nbd",
    "nbd+tcp": "nbd",
    "nbds+tcp": "nbd",
    "nbd+unix": "nbd",
    "nbds+unix": "nbd",
    "nbd+vsock": "nbd",
    "nbds+vsock": "nbd",
    "null-co": "null",
    "null-aio": "null",
    **{name: name for name in (*_FILTERS, LAYER)},
}
"""What stands before the colon of a file name, and the storage driver that it
means."""

_SIGNATURES: Final = (
    (b"QFI\xfb", 4, range(1, 2), "qcow"),
    (b"QFI\xfb", 4, range(2, 1 << 32), "qcow2"),
    (b"LUKS\xba\xbe", 2, range(1, 2), "luks"),
)
"""How files begin: a magic, the bytes of the version behind it, versions, and
the format. Here, so that to probe a file does not load all drivers."""
_FOREIGN: Final = (
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\n", "cloop"),
)
"""What is where in files of formats that QEMU knows by their content, and that there
are not here. They are no raw images: taken for one, a disk would be what is in the
file, and nobody told."""
_VMDK_TEXT: Final = rb"(?:#[^\n]*\n| *\r?\n)*version=[123]\r?\n"
"""A file that says where a disk of the format vmdk is."""
_MIN_HEAD: Final = 8

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
    name = _ALIASES.get(name, name)
    if name not in _FORMATS:
        raise ImageError(f"Unknown driver '{name}'")
    return _load(_FORMATS[name])


def storage_driver(name: str) -> Any:
    """Return the class of a storage driver. Raises `ImageError`."""
    if name not in _STORAGE:
        raise ImageError(f"Unknown protocol '{name}'")
    return _load(_STORAGE[name])


def filter_names() -> list[str]:
    """Return the names of all storage drivers over others."""
    return list(_FILTERS)


def filter_driver(name: str) -> Any:
    """Return the class of a storage driver over others."""
    return _load(_FILTERS[name])


def tool_names() -> list[str]:
    """Return the names of all formats that have a tool."""
    return sorted(_TOOLS)


def format_tool(name: str) -> "FormatTool":
    """Return the tool of a format. Raises `ImageError`."""
    name = _ALIASES.get(name, name)
    if name not in _TOOLS:
        raise ImageError(f"Unknown driver '{name}'")
    tool: FormatTool = _load(_TOOLS[name])()
    return tool


def blocking_file() -> Any:
    """Return the class of local files for programs without an event loop."""
    return _load(_BLOCKING_FILE)


def split_protocol(filename: str) -> tuple[str, str]:
    """Return the storage driver that ``filename`` is for, and what it is to
    open. Raises `ImageError`.

    A file whose name has a colon is written ``./a:b``, as in QEMU.
    """
    protocol, colon, rest = filename.partition(":")
    if not colon or "/" in protocol:
        return "file", filename
    driver = _PROTOCOLS.get(protocol.lower())
    if driver is None:
        raise ImageError(f"Unknown protocol '{protocol}'")
    return driver, unmistakable_path(rest) if driver == "file" else filename


def unmistakable_path(path: str) -> str:
    """Return ``path`` so that nothing before a colon looks like a protocol."""
    return f"./{path}" if ":" in path.partition("/")[0] else path


def data_file_name(name: str) -> str:
    """Return the name that an image has for its data file as that of a file here:
    who has written the image must not choose what its host connects to, nor what
    else it opens (CVE-2024-4467)."""
    return name if name.startswith("file:") else unmistakable_path(name)


def role_of_file(
    format_: str, raw_role: FileRole, driver_options: Mapping[str, Any]
) -> FileRole:
    """Return what an image's file is to who opens the image. ``raw_role``: what that
    of a raw image, or of an encrypted one without other metadata, is.

    Part of a file as a disk counts as data in it.
    """
    if _ALIASES.get(format_, format_) not in _WITHOUT_METADATA:
        return FileRole.IMAGE
    if raw_role is FileRole.KEYS and format_ != "luks":
        return FileRole.PLAIN
    is_window = any(driver_options.get(name) is not None for name in ("offset", "size"))
    if is_window and raw_role is FileRole.PLAIN:
        return FileRole.DATA
    return raw_role


def role_of_data_file(raw_role: FileRole) -> FileRole:
    """Return what an external data file is to who opens its image; ``raw_role`` as
    in `role_of_file`."""
    return FileRole.SOURCE if raw_role is FileRole.SOURCE else FileRole.DATA


def check_place(format_: str | None, filename: str) -> None:
    """Refuse a file that is no device if ``format_`` asks for one, and a path if it
    asks for an export: who names a disk must not get a file in its place, for it may
    be gone. Raises `ImageError`."""
    if format_ not in (DEVICE, _EXPORT):
        return
    protocol, path = split_protocol(filename)
    if format_ == _EXPORT:
        if protocol == "file":
            raise ImageError("File name string for NBD must start with 'nbd:'")
        return
    try:
        mode = os.stat(path).st_mode if protocol == "file" else 0
    except (OSError, ValueError):
        return  # Whoever opens it says what is wrong.
    if not (stat.S_ISBLK(mode) or stat.S_ISCHR(mode)):
        raise ImageError(
            f"'{DEVICE}' driver requires '{path}' to be either a character or block "
            "device"
        )


class RoleFinder:
    """Tells the role of an image's file, and so its format: a `RoleOf`.

    Attributes:
        format: the image's format; None as long as it is not known.
    """

    def __init__(
        self,
        format_: str | None,
        raw_role: FileRole,
        driver_options: Mapping[str, Any],
    ) -> None:
        self.format = format_
        self._raw_role = raw_role
        self._driver_options = driver_options

    def __call__(self, head: Buffer) -> FileRole:
        """Return the role of the file that begins with ``head``."""
        if self.format is None:
            self.format = probe_format(bytes(head[:PROBE_LENGTH]))
        return role_of_file(self.format, self._raw_role, self._driver_options)

    def mark(self, error: ImageInUse) -> None:
        """Note in an error whether the file is one without metadata."""
        name = self.format or ""
        error.is_of_raw = _ALIASES.get(name, name) in _WITHOUT_METADATA


def is_remote(filename: str) -> bool:
    """Tell whether ``filename`` is no path. Raises `ImageError`."""
    return split_protocol(filename)[0] != "file"


def probe_format(head: bytes) -> str:
    """Return the name of the format that ``head`` is of: the file's first
    `PROBE_LENGTH` bytes, or all of a shorter one. It may be one that there is not.

    A guest can write any header into a raw image: never probe what a guest
    could have written unless the user asked for it.
    """
    if len(head) >= _MIN_HEAD:
        for magic, nb_version_bytes, versions, name in _SIGNATURES:
            end = len(magic) + nb_version_bytes
            version = int.from_bytes(head[len(magic) : end], "big")
            if head.startswith(magic) and version in versions:
                return name
        for offset, magic, name in _FOREIGN:
            if head.startswith(magic, offset):
                return name
        if head[0] in b"# \r\nv":
            # Not above: most files have no text, and small commands no need of it.
            import re

            if re.match(_VMDK_TEXT, head):
                return "vmdk"
    return "raw"

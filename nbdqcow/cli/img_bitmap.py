"""``nbdqcow-img bitmap``: the persistent dirty bitmaps of an image."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from nbdqcow.block.node import Node
from nbdqcow.cli.img import print_help
from nbdqcow.cli.img_nodes import ImageArguments, open_node
from nbdqcow.cli.img_options import parse_amount, parse_arguments
from nbdqcow.cli.img_run import run_command
from nbdqcow.errors import BlockError, ImageError

_LONG: Final = {
    "help": "-h",
    "object=": "--object",
    "image-opts": "--image-opts",
    "format=": "-f",
    "add": "add",
    "remove": "remove",
    "remove-all": "remove-all",
    "clear": "clear",
    "enable": "enable",
    "disable": "disable",
    "merge=": "merge",
    "source-file=": "-b",
    "source-format=": "-F",
    "granularity=": "-g",
}
_ACTIONS: Final = ("add", "remove", "remove-all", "clear", "enable", "disable", "merge")
_MAX_NAME: Final = 1023
_NODE: Final = "#block100"
"""What QEMU calls an image inside; only the number means nothing to us."""


@dataclass(slots=True)
class _Settings:
    """What the command line says: actions are names and merges' sources."""

    images: ImageArguments = field(default_factory=ImageArguments)
    actions: list[tuple[str, str]] = field(default_factory=list)
    source_file: str | None = None
    source_format: str | None = None
    granularity: int | None = None


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    options, operands = parse_arguments(arguments, ":b:f:F:g:h", _LONG)
    settings = _Settings()
    for name, value in options:
        match name:
            case "-h":
                print_help()
                return 0
            case "-b":
                settings.source_file = value
            case "-F":
                settings.source_format = value
            case "-g":
                settings.granularity = parse_amount(value, "granularity") or None
            case _ if name in _ACTIONS:
                settings.actions.append((name, value))
            case _:
                settings.images.take(name, value)
    _check(settings, operands)
    filename, *bitmaps = operands
    bitmap = bitmaps[0] if bitmaps else ""
    settings.images.check()
    return run_command(lambda: _operate(settings, filename, bitmap))


def _check(settings: _Settings, operands: Sequence[str]) -> None:
    if not settings.actions:
        raise ImageError(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or "
            "--merge"
        )
    names = [name for name, _ in settings.actions]
    if settings.granularity is not None and "add" not in names:
        raise ImageError("granularity only supported with --add")
    if settings.source_format is not None and settings.source_file is None:
        raise ImageError("-F only supported with -b")
    if settings.source_file is not None and "merge" not in names:
        raise ImageError("Merge bitmap source file only supported with --merge")
    if all(name == "remove-all" for name in names):
        if len(operands) != 1:
            raise ImageError("Expecting filename")
    elif len(operands) != 2:
        raise ImageError("Expecting filename and bitmap name")


async def _operate(settings: _Settings, filename: str, bitmap: str) -> int:
    node = await open_node(filename, settings.images, writable=True, with_backing=False)
    source: Node | None = None
    try:
        if settings.source_file is not None:
            source = await open_node(
                settings.source_file,
                ImageArguments(format=settings.source_format),
                with_backing=False,
            )
        for action, other in settings.actions:
            try:
                await _act(settings, node, source, bitmap, action, other)
            except (ImageError, BlockError) as exc:
                raise ImageError(
                    f"Operation {action} on bitmap {bitmap} failed: {exc}"
                ) from None
    finally:
        if source is not None:
            await source.close()
        await node.close()
    return 0


async def _act(
    settings: _Settings,
    node: Node,
    source: Node | None,
    bitmap: str,
    action: str,
    other: str,
) -> None:
    driver: Any = node.driver
    found = {}
    if hasattr(driver, "bitmap_list"):
        found = {info.name: info for info in driver.bitmap_list()}
    if action == "remove-all":
        for name in found:
            await driver.bitmap_remove(name)
        return
    if action == "add":
        _check_new(settings, driver, bitmap, found)
        driver.bitmap_add(bitmap, granularity=settings.granularity)
        return
    _check_known(bitmap, found, usable=action != "remove")
    if action == "remove":
        await driver.bitmap_remove(bitmap)
    elif action == "clear":
        driver.bitmap_clear(bitmap)
    elif action != "merge":
        driver.bitmap_enable(bitmap, action == "enable")
    elif source is None:
        _check_known(other, found, usable=True)
        await driver.bitmap_merge(bitmap, other)
    else:
        there: Any = source.driver
        known = {}
        if hasattr(there, "bitmap_list"):
            known = {info.name: info for info in there.bitmap_list()}
        _check_known(other, known, usable=True)
        if source.size != node.size:
            raise ImageError(
                f"Bitmaps are of different sizes (destination size is {node.size}, "
                f"source size is {source.size}) and can't be merged"
            )
        await driver.bitmap_merge_from(bitmap, there.dirty_bitmaps[other])


def _check_new(
    settings: _Settings, driver: Any, bitmap: str, found: dict[str, Any]
) -> None:
    granularity = settings.granularity
    if not bitmap:
        raise ImageError("Bitmap name cannot be empty")
    if granularity is not None and not (
        512 <= granularity < 1 << 32 and granularity.bit_count() == 1
    ):
        raise ImageError("Granularity must be power of 2 and at least 512")
    if bitmap in found:
        raise ImageError(f"Bitmap already exists: {bitmap}")
    if not hasattr(driver, "bitmap_add"):
        raise ImageError(
            f"Can't store persistent bitmaps to {_NODE}: Operation not supported"
        )
    prefix = f"Can't make bitmap '{bitmap}' persistent in '{_NODE}': "
    if driver.header.version < 3:
        raise ImageError(f"{prefix}Cannot store dirty bitmaps in qcow2 v2 files")
    if len(bitmap.encode("utf-8", "surrogateescape")) > _MAX_NAME:
        raise ImageError(
            f"{prefix}Name length exceeds maximum ({_MAX_NAME} characters)"
        )


def _check_known(bitmap: str, found: dict[str, Any], *, usable: bool) -> None:
    if bitmap not in found:
        raise ImageError(f"Dirty bitmap '{bitmap}' not found")
    if usable and found[bitmap].inconsistent:
        raise ImageError(
            f"Bitmap '{bitmap}' is inconsistent and cannot be used\n"
            "Try block-dirty-bitmap-remove to delete this bitmap from disk"
        )

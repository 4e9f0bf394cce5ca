"""Persistent bitmaps of one image copied to another."""

from typing import Any

from nbdqcow.block.node import Node
from nbdqcow.errors import BlockError, ImageError


def bitmap_driver(node: Node) -> Any:
    """Return the driver of an image that can have bitmaps.

    Raises `ImageError` for a format without.
    """
    if not hasattr(node.driver, "bitmap_list"):
        raise _unsupported(node)
    return node.driver


def _unsupported(node: Node) -> ImageError:
    text = f"Format driver '{node.format_name}' does not support bitmaps"
    return ImageError(text)


def has_bitmaps(node: Node) -> bool:
    """Tell whether an image can have bitmaps."""
    driver: Any = node.driver
    return hasattr(driver, "bitmap_list") and bool(driver.header.version >= 3)


def check_bitmaps(node: Node) -> None:
    """See that an image can have bitmaps. Raises `ImageError`."""
    if not has_bitmaps(node):
        raise _unsupported(node)


def inconsistent_bitmaps(node: Node) -> list[str]:
    """Return the bitmaps of an image that can't be copied, the last one of the
    image first."""
    if not hasattr(node.driver, "bitmap_list"):
        return []
    infos = bitmap_driver(node).bitmap_list()
    return [info.name for info in reversed(infos) if info.inconsistent]


async def copy_bitmaps(source: Node, target: Node) -> None:
    """Give ``target`` the bitmaps of ``source``, which has the same size, but for
    those that are inconsistent. Raises `ImageError`.
    """
    if not hasattr(source.driver, "bitmap_list"):
        return
    there = bitmap_driver(target)
    infos = bitmap_driver(source).bitmap_list()
    names = {info.name for info in there.bitmap_list()}
    for info in reversed(infos):
        if info.name in names and not info.inconsistent:
            raise ImageError(
                f"Failed to create bitmap {info.name}: Bitmap already exists: "
                f"{info.name}"
            )
    for info in infos:
        if info.inconsistent:
            continue
        try:
            there.bitmap_add(info.name, granularity=info.granularity, enabled=False)
            bitmap = source.driver.dirty_bitmaps[info.name]
            await there.bitmap_merge_from(info.name, bitmap)
            if info.enabled:
                there.bitmap_enable(info.name)
        except BlockError as error:
            raise ImageError(
                f"Failed to populate bitmap {info.name}: {error}"
            ) from None

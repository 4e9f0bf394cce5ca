"""Persistent bitmaps of one image copied to another."""

from typing import Any

from nbdqcow.block.node import Node
from nbdqcow.errors import BlockError, ImageError


def bitmap_driver(node: Node) -> Any:
    """Return the driver of an image that can have bitmaps.

    Raises `ImageError` for a format without.
    """
    if not hasattr(node.driver, "bitmap_list"):
        raise ImageError(f"Format driver '{node.format_name}' does not support bitmaps")
    return node.driver


def check_bitmaps(node: Node) -> None:
    """See that an image can have bitmaps. Raises `ImageError`."""
    bitmap_driver(node)


def copy_bitmaps(source: Node, target: Node, *, skip_broken: bool) -> None:
    """Give ``target`` the bitmaps of ``source``, which has the same size.

    Raises `ImageError`; an inconsistent one is left out with ``skip_broken``.
    """
    if not hasattr(source.driver, "bitmap_list"):
        return
    there = bitmap_driver(target)
    for info in bitmap_driver(source).bitmap_list():
        if info.inconsistent:
            if skip_broken:
                continue
            raise ImageError(f"Cannot copy inconsistent bitmap '{info.name}'")
        try:
            there.bitmap_add(info.name, granularity=info.granularity, enabled=False)
            there.bitmaps.merge_from(info.name, source.driver.dirty_bitmaps[info.name])
            if info.enabled:
                there.bitmap_enable(info.name)
        except BlockError as error:
            raise ImageError(
                f"Failed to populate bitmap {info.name}: {error}"
            ) from None

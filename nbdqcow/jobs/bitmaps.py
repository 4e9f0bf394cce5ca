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
    """Give ``target`` the bitmaps of ``source`` but for those that are inconsistent.

    They are taken from the last one on, as in QEMU. If one can't be copied, those
    that have been stay. Raises `ImageError`.
    """
    if not hasattr(source.driver, "bitmap_list"):
        return
    there = bitmap_driver(target)
    infos = [
        info
        for info in reversed(bitmap_driver(source).bitmap_list())
        if not info.inconsistent
    ]
    names = {info.name for info in there.bitmap_list()}
    nb_copied = next(
        (index for index, info in enumerate(infos) if info.name in names), len(infos)
    )
    if nb_copied and source.size != target.size:
        raise ImageError(
            f"Failed to populate bitmap {infos[0].name}: Bitmaps are of different sizes"
            f" (destination size is {target.size}, source size is {source.size}) and "
            "can't be merged"
        )
    # In the image they have the order that they had.
    for info in reversed(infos[:nb_copied]):
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
    if nb_copied < len(infos):
        name = infos[nb_copied].name
        raise ImageError(
            f"Failed to create bitmap {name}: Bitmap already exists: {name}"
        )

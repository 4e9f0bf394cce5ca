"""Finding an image in a chain by what a command line calls it."""

import os
from collections.abc import Iterator

from nbdqcow.block.node import Node
from nbdqcow.block.open import backing_path
from nbdqcow.block.registry import is_remote
from nbdqcow.errors import ImageError


def overlays(top: Node) -> Iterator[Node]:
    """Yield the images of a chain that have a backing image, from the top."""
    node = top
    while node.backing is not None:
        yield node
        node = node.backing


def overlay_of(top: Node, name: str) -> Node | None:
    """Return the image whose backing image is called ``name``, or None.

    It may be called so as the image calls it, or by a path, which is relative
    to the directory of the image above it.
    """
    for node in overlays(top):
        assert node.backing is not None
        if name == node.driver.backing_filename:
            return node
        try:
            path = backing_path(node.filename, name)
            found = node.backing.filename
            if is_remote(path) or is_remote(found):
                same = path == found
            else:
                same = os.path.realpath(path) == os.path.realpath(found)
        except ImageError:
            continue
        if same:
            return node
    return None

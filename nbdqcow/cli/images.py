"""Images as the serving commands open them."""

from typing import Any

from nbdqcow.block.node import Node
from nbdqcow.block.open import open_image
from nbdqcow.cli.messages import warn_of_guess
from nbdqcow.errors import ImageError


async def open_node(filename: str, **options: Any) -> Node:
    """Open an image (`nbdqcow.block.open.open_image`).

    Every failure is an `ImageError` that names the file; its cause is an
    `OSError` if the file itself could not be opened. Warns of a writable
    image that was taken for raw only because no other format knew it.
    """
    opening = f"Could not open '{filename}'"
    try:
        node = await open_image(filename, **options)
    except ImageError as exc:
        text = str(exc)
        if not text.startswith(opening):
            text = f"{opening}: {text}"
        raise type(exc)(text) from exc.__cause__
    except OSError as exc:
        raise ImageError(f"{opening}: {exc.strerror or exc}") from exc
    if node.guessed_raw and not node.read_only:
        warn_of_guess(filename)
    return node

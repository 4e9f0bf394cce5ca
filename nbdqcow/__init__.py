"""nbdqcow: an asyncio NBD server with qcow2, qcow and raw drivers of its own.

The block layer is the public library::

    async with nbdqcow.open_image("disk.qcow2") as disk:
        data = await disk.pread(0, 4096)

Importing this package costs nothing: names are loaded when first used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nbdqcow.block.open import open_image as open_image

__all__ = ["__version__", "open_image"]


def __getattr__(name: str) -> Any:
    if name == "open_image":
        from nbdqcow.block.open import open_image

        return open_image
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""``nbdqcow-img rename``: another file name, with the backing link kept.

QEMU has no such command; VirtualBox has.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

from nbdqcow.block.open import open_image
from nbdqcow.block.rename import rename_image
from nbdqcow.cli.img import print_help
from nbdqcow.cli.img_options import parse_arguments
from nbdqcow.errors import UsageError

_LONG: Final = {"help": "-h", "format=": "-f"}


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    options, operands = parse_arguments(arguments, ":hf:", _LONG)
    format_ = None
    for name, value in options:
        match name:
            case "-h":
                print_help()
                return 0
            case "-f":
                format_ = value
    if len(operands) != 2:
        raise UsageError("Expecting the image's file name and its new one")
    old, new = operands
    asyncio.run(_rename(old, new, format_))
    return 0


async def _rename(old: str, new: str, format_: str | None) -> None:
    async with open_image(old, format=format_) as node:
        await rename_image(node, new)

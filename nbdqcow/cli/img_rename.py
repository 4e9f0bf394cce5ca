"""``nbdqcow-img rename``: another file name, with the backing link kept.

QEMU has no such command; VirtualBox has.
"""

from collections.abc import Sequence
from typing import Final

from nbdqcow.block.rename import rename_image
from nbdqcow.cli.img import print_help
from nbdqcow.cli.img_nodes import ImageArguments, open_node
from nbdqcow.cli.img_options import parse_arguments
from nbdqcow.cli.img_run import run_command
from nbdqcow.errors import UsageError

_LONG: Final = {
    "help": "-h",
    "format=": "-f",
    "object=": "--object",
    "image-opts": "--image-opts",
}


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    options, operands = parse_arguments(arguments, ":hf:", _LONG)
    images = ImageArguments()
    for name, value in options:
        if name == "-h":
            print_help()
            return 0
        images.take(name, value)
    if len(operands) != 2:
        raise UsageError("Expecting the image's file name and its new one")
    images.check()
    return run_command(lambda: _rename(operands[0], operands[1], images))


async def _rename(old: str, new: str, images: ImageArguments) -> int:
    async with await open_node(old, images, writable=True, with_backing=False) as node:
        await rename_image(node, new)
    return 0

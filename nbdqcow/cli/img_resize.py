"""``nbdqcow-img resize``: disks that become longer or shorter."""

from collections.abc import Sequence
from typing import Any, Final

from nbdqcow.block.tools import PREALLOCATIONS
from nbdqcow.cli.img import print_help
from nbdqcow.cli.img_create import preallocation_failure
from nbdqcow.cli.img_nodes import ImageArguments, closing, open_node
from nbdqcow.cli.img_options import convert_option, parse_arguments
from nbdqcow.cli.img_run import run_command
from nbdqcow.cli.messages import error
from nbdqcow.errors import BlockError, ImageError, UsageError
from nbdqcow.jobs.status import disk_size
from nbdqcow.units import MAX_DISK_LENGTH

_LONG: Final = {
    "help": "-h",
    "object=": "--object",
    "image-opts": "--image-opts",
    "preallocation=": "--preallocation",
    "shrink": "--shrink",
    "format=": "-f",
    "quiet": "-q",
}
_MAX_SIZE: Final = (1 << 63) - 1


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    if len(arguments) < 2:
        raise UsageError("Not enough arguments")
    # The size is no option, even if it begins with a minus.
    size_text = arguments[-1]
    options, operands = parse_arguments(arguments[:-1], ":f:hq", _LONG)
    images = ImageArguments()
    preallocation, quiet, shrink = "off", False, False
    for name, value in options:
        match name:
            case "-h":
                print_help()
                return 0
            case "-q":
                quiet = True
            case "--shrink":
                shrink = True
            case "--preallocation":
                if value not in PREALLOCATIONS:
                    raise ImageError(f"Invalid preallocation mode '{value}'")
                preallocation = value
            case _:
                images.take(name, value)
    if len(operands) != 1:
        raise UsageError("Expecting image file name and size")
    sign = {"+": 1, "-": -1}.get(size_text[:1], 0)
    amount = int(convert_option("size", "size", size_text[1:] if sign else size_text))
    images.check()
    status = run_command(
        lambda: _resize(operands[0], images, sign, amount, preallocation, shrink)
    )
    if status == 0 and not quiet:
        print("Image resized.")
    return status


async def _resize(
    name: str,
    images: ImageArguments,
    sign: int,
    amount: int,
    preallocation: str,
    shrink: bool,
) -> int:
    node: Any = await open_node(name, images, writable=True, resizes=True)
    async with closing(node):
        old = disk_size(node)
        size = old + sign * amount if sign else amount
        if not 0 < size <= _MAX_SIZE:
            raise ImageError("New image size must be positive")
        if size <= old and preallocation != "off":
            raise ImageError("Preallocation can only be used for growing images")
        if size < old and not shrink:
            error("Use the --shrink option to perform a shrink operation.")
            raise ImageError(
                "warning: Shrinking an image will delete all data beyond the shrunken "
                "image's end. Before performing such an operation, make sure there is "
                "no important data there."
            )
        if size > MAX_DISK_LENGTH:
            raise ImageError(f"offset({size}) exceeds maximum({MAX_DISK_LENGTH})")
        try:
            await node.resize(size, preallocation=preallocation)
        except OSError as exc:
            # An own reason of the driver's is told as it is.
            if isinstance(exc, BlockError):
                raise
            reason = exc.strerror
            failure = preallocation_failure(node.format_name, preallocation, reason)
            raise ImageError(failure or f"Could not resize file: {reason}") from None
    return 0

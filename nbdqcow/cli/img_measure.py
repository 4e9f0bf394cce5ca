"""``nbdqcow-img measure``: how much room would a new image need?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from nbdqcow.block.tools import PREALLOCATIONS
from nbdqcow.cli.img import print_help
from nbdqcow.cli.img_create import find_tool
from nbdqcow.cli.img_names import GivenObjects
from nbdqcow.cli.img_options import (
    check_option_list,
    format_json,
    parse_amount,
    parse_arguments,
    wants_json,
)
from nbdqcow.cli.img_snapshot import parse_snapshot
from nbdqcow.cli.img_target import parse_create_options
from nbdqcow.cli.messages import error
from nbdqcow.errors import ImageError

if TYPE_CHECKING:
    from nbdqcow.block.tools import Secrets
    from nbdqcow.cli.img_nodes import ImageArguments

_LONG: Final = {
    "help": "-h",
    "image-opts": "--image-opts",
    "object=": "--object",
    "output=": "--output",
    "size=": "-s",
    "force-share": "-U",
    "format=": "-f",
    "snapshot=": "-l",
    "target-format=": "-O",
}
_DEFAULT_CLUSTER: Final = 65536


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    options, operands = parse_arguments(arguments, ":hf:l:o:O:s:U", _LONG)
    format_, output = "raw", "human"
    common: list[tuple[str, str]] = []
    objects = GivenObjects()
    option_lists: list[str] = []
    size: int | None = None
    snapshot: Any = None
    for name, value in options:
        match name:
            case "-h":
                print_help()
                return 0
            case "-l":
                snapshot = parse_snapshot(value)
            case "-o":
                option_lists.append(check_option_list(value))
            case "-O":
                format_ = value
            case "--object":
                objects.add(value)
            case "--output":
                output = value
            case "-s":
                size = parse_amount(value, "image size")
            case _:
                common.append((name, value))
    json = wants_json(output)
    needing = [name for name, _ in common if name in ("-f", "--image-opts")]
    if len(operands) > 1:
        raise ImageError("At most one filename argument is allowed.")
    if not operands and (needing or snapshot is not None):
        raise ImageError("--image-opts, -f, and -l require a filename argument.")
    if not operands and size is None:
        raise ImageError("Either --size N or one filename must be specified.")
    if operands and size is not None:
        raise ImageError("--size N cannot be used together with a filename.")
    text = ",".join(option_lists)
    if not operands:
        _measure(format_, text, size or 0, objects.secret, json=json)
        return 0
    # Not above: they bring the event loop.
    from nbdqcow.cli.img_nodes import ImageArguments
    from nbdqcow.cli.img_run import run_command

    images = ImageArguments(objects=objects)
    for name, value in common:
        images.take(name, value)
    images.check()
    return run_command(
        lambda: _measure_image(operands[0], images, snapshot, format_, text, json=json)
    )


async def _measure_image(
    name: str,
    images: "ImageArguments",
    snapshot: Any,
    format_: str,
    text: str,
    *,
    json: bool,
) -> int:
    from nbdqcow.cli.img_nodes import open_node
    from nbdqcow.jobs.bitmaps import bitmap_driver, has_bitmaps
    from nbdqcow.jobs.map import data_length
    from nbdqcow.jobs.status import disk_size

    node = await open_node(name, images, snapshot=snapshot)
    try:
        size = disk_size(node)
        bitmaps = None
        if has_bitmaps(node):
            found = bitmap_driver(node).bitmap_list()
            bitmaps = [(one.name, one.granularity) for one in found]
        values = _parse(format_, text)
        cluster_size = int(values.get("cluster_size", _DEFAULT_CLUSTER))
        length = size
        if "backing_file" not in values and cluster_size > 0:
            length = await data_length(node, cluster_size)
        _measure(format_, text, size, images.secret, length, bitmaps, json=json)
    finally:
        await node.close()
    return 0


def _parse(format_: str, text: str) -> dict[str, Any]:
    tool = find_tool(format_)
    try:
        return dict(parse_create_options(tool, text))
    except ImageError as exc:
        error(str(exc))
        raise ImageError(f"Invalid options for file format '{format_}'") from None


def _measure(
    format_: str,
    text: str,
    size: int,
    secrets: "Secrets",
    length: int = 0,
    bitmaps: Sequence[tuple[str, int]] | None = None,
    *,
    json: bool,
) -> None:
    tool: Any = find_tool(format_)
    values = _parse(format_, text)
    values["size"] = size
    preallocation = str(values.get("preallocation", "off"))
    if format_ != "raw" and preallocation not in PREALLOCATIONS:
        raise ImageError(f"invalid parameter value: {preallocation}")
    prefix = "encrypt." if values.get("encrypt.format") == "luks" else ""
    if (key_secret := values.get(f"{prefix}key-secret")) is not None:
        secrets(str(key_secret))
    found = tool.measure(values, length, bitmaps)
    if json:
        shown = {} if found.bitmaps is None else {"bitmaps": found.bitmaps}
        shown["required"] = found.required
        shown["fully-allocated"] = found.fully_allocated
        print(format_json(shown))
        return
    print(f"required size: {found.required}")
    print(f"fully allocated size: {found.fully_allocated}")
    if found.bitmaps is not None:
        print(f"bitmaps size: {found.bitmaps}")

"""``nbdqcow-img dd``: part of a disk copied into a new image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from nbdqcow.block.node import Node
from nbdqcow.block.storage import FileRole
from nbdqcow.cli.img import print_help
from nbdqcow.cli.img_create import UnknownFormat, check_creation, find_tool
from nbdqcow.cli.img_nodes import ImageArguments, closing, open_node
from nbdqcow.cli.img_options import MAX_AMOUNT, parse_amount, parse_arguments
from nbdqcow.cli.img_run import run_command
from nbdqcow.cli.img_target import NewImage
from nbdqcow.cli.messages import error
from nbdqcow.errors import ImageError
from nbdqcow.jobs.control import JobControl
from nbdqcow.jobs.copy import copy
from nbdqcow.jobs.errors import CopyError
from nbdqcow.jobs.status import disk_size

_LONG: Final = {
    "help": "-h",
    "object=": "--object",
    "image-opts": "--image-opts",
    "force-share": "-U",
    "format=": "-f",
    "output-format=": "-O",
}
_MAX_BLOCK: Final = (1 << 31) - 1


@dataclass(slots=True)
class _Operands:
    """What dd's own kind of arguments says; ``skip`` is in blocks."""

    source: str | None = None
    target: str | None = None
    block_size: int = 512
    count: int | None = None
    skip: int = 0


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    options, words = parse_arguments(arguments, ":hf:O:U", _LONG)
    images, target_format = ImageArguments(), "raw"
    for name, value in options:
        match name:
            case "-h":
                print_help()
                return 0
            case "-O":
                target_format = value
            case _:
                images.take(name, value)
    operands = _parse(words)
    if operands.source is None or operands.target is None:
        raise ImageError("Must specify both input and output files")
    images.check()
    return run_command(
        lambda: _copy(
            images, target_format, operands, str(operands.source), str(operands.target)
        )
    )


def _parse(words: Sequence[str]) -> _Operands:
    operands = _Operands()
    for word in words:
        name, equals, value = word.partition("=")
        match name if equals else "":
            case "if":
                operands.source = value
            case "of":
                operands.target = value
            case "bs":
                operands.block_size = parse_amount(value, "bs", 1, _MAX_BLOCK)
            case "count":
                operands.count = parse_amount(value, "count")
            case "skip":
                operands.skip = parse_amount(value, "skip")
            case _:
                raise ImageError(f"unrecognized operand {name}")
    return operands


async def _copy(
    images: ImageArguments,
    target_format: str,
    operands: _Operands,
    source_name: str,
    target_name: str,
) -> int:
    # The target may be the same file, which is emptied first if it is written in place.
    source = await open_node(source_name, images, raw_role=FileRole.SOURCE)
    try:
        try:
            tool = find_tool(target_format)
        except UnknownFormat:
            raise ImageError("Unknown file format") from None
        end = disk_size(source)
        if operands.count is not None:
            end = min(end, operands.count * operands.block_size)
        start = min(operands.skip * operands.block_size, MAX_AMOUNT)
        try:
            check_creation(target_format, target_name)
            new = NewImage.created(target_name, tool, {"size": max(0, end - start)})
        except ImageError as exc:
            raise ImageError(
                f"{target_name}: error while creating output image: {exc}"
            ) from None
        with new:
            target = await open_node(
                new.path,
                ImageArguments(format=target_format),
                writable=True,
                shown=target_name,
            )
            async with closing(target):
                if start > end:
                    error(f"{source_name}: cannot skip to specified offset")
                if start < end:
                    await _copy_blocks(source, target, start, end - start)
            new.commit(durable=True)
    finally:
        await source.close()
    return 0


async def _copy_blocks(source: Node, target: Node, start: int, length: int) -> None:
    try:
        await copy(source, target, start, length, JobControl())
    except CopyError as exc:
        ends = {"reading": "reading from input", "writing": "writing to output"}
        raise ImageError(
            f"error while {ends[exc.action]} image file: {exc.reason}"
        ) from None

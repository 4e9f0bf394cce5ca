"""``nbdqcow-img map``: what is where in the chain of an image."""

import shutil
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Final

from nbdqcow.block.node import Node
from nbdqcow.block.node_storage import below_filters
from nbdqcow.cli.img import print_help
from nbdqcow.cli.img_nodes import ImageArguments, open_node
from nbdqcow.cli.img_options import (
    MAX_AMOUNT,
    parse_amount,
    parse_arguments,
    wants_json,
)
from nbdqcow.cli.img_run import run_command
from nbdqcow.cli.messages import is_our_name
from nbdqcow.errors import ImageError, UsageError
from nbdqcow.jobs.errors import reason_of
from nbdqcow.jobs.map import HAS_DATA, HAS_OFFSET, IS_PRESENT, IS_ZERO, Row, map_disk
from nbdqcow.jobs.status import disk_size
from nbdqcow.units import format_hex

_LONG: Final = {
    "help": "-h",
    "format=": "-f",
    "output=": "--output",
    "object=": "--object",
    "image-opts": "--image-opts",
    "force-share": "-U",
    "start-offset=": "-s",
    "max-length=": "-l",
    "picture=": "--picture",
}


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    options, operands = parse_arguments(arguments, ":f:s:l:hU", _LONG)
    images = ImageArguments()
    output, start, length = "human", 0, MAX_AMOUNT
    picture: str | None = None
    for name, value in options:
        match name:
            case "-h":
                print_help()
                return 0
            case "--output":
                output = value
            case "--picture":
                picture = value
            case "-s":
                start = parse_amount(value, "start offset")
            case "-l":
                length = parse_amount(value, "max length")
            case _:
                images.take(name, value)
    if len(operands) != 1:
        raise UsageError("Expecting one image file name")
    json = wants_json(output)
    images.check()
    if picture is not None:
        return run_command(lambda: _draw(operands[0], images, start, length, picture))
    return run_command(lambda: _map(operands[0], images, start, length, json=json))


async def _map(
    name: str, images: ImageArguments, start: int, length: int, *, json: bool
) -> int:
    write = sys.stdout.write
    node = await open_node(name, images)
    shown = below_filters(node)
    separator = ""
    try:
        end = min(disk_size(shown), start + length)
        write("[" if json else f"{'Offset':16}{'Length':16}{'Mapped to':16}File\n")
        bar = None
        if not json and start < end and sys.stdout.isatty() and is_our_name():
            from nbdqcow.cli.map_bar import MapBar

            bar = MapBar(start, end, shutil.get_terminal_size().columns)
        async for rows in _rows(shown, start, end):
            if bar is not None:
                bar.add(rows)
            lines = json_lines(rows) if json else human_lines(rows)
            if lines and json:
                write(separator + ",\n".join(lines))
                separator = ",\n"
            elif lines:
                write("".join(lines))
        if json and start >= end:
            write(_NOTHING % start)
        write("]\n" if json else "")
        if bar is not None:
            write(str(bar))
    except ImageError:
        write(separator if json else "")
        raise
    finally:
        sys.stdout.flush()
        await node.close()
    return 0


async def _rows(node: Node, start: int, end: int) -> AsyncIterator[list[Row]]:
    """Yield what `map_disk` does. Raises `ImageError` where it fails."""
    try:
        async for rows in map_disk(node, start, end):
            yield rows
    except OSError as exc:
        raise ImageError(f"Could not read file metadata: {reason_of(exc)}") from None


async def _draw(
    name: str, images: ImageArguments, start: int, length: int, filename: str
) -> int:
    from nbdqcow.cli.map_picture import Picture

    node = await open_node(name, images)
    shown = below_filters(node)
    try:
        end = min(disk_size(shown), start + length)
        picture = Picture(shown, start, end)
        async for rows in _rows(shown, start, end):
            picture.add(rows)
    finally:
        await node.close()
    picture.save(filename)
    return 0


_NOTHING: Final = (
    '{ "start": %d, "length": 0, "depth": 0, "present": false, "zero": false, '
    '"data": false}'
)


def _template(flags: int) -> str:
    words = [
        str(bool(flags & flag)).lower() for flag in (IS_PRESENT, IS_ZERO, HAS_DATA)
    ]
    return (
        '{ "start": %d, "length": %d, "depth": %d, "present": '
        f'{words[0]}, "zero": {words[1]}, "data": {words[2]}'
        # A number that is not shown takes no place.
        + (', "offset": %d}' if flags & HAS_OFFSET else "%.0s}")
    )


_TEMPLATES: Final = [_template(flags) for flags in range(16)]
_PLAIN: Final = HAS_DATA | IS_PRESENT | HAS_OFFSET


def json_lines(rows: Sequence[Row]) -> list[str]:
    """Return rows as qemu-img writes them."""
    templates = _TEMPLATES
    return [
        f'{{ "start": {start}, "length": {length}, "depth": {depth}, "present": true, '
        f'"zero": false, "data": true, "offset": {host_offset}}}'
        # Most are so, and this way takes half the time.
        if flags == _PLAIN
        else templates[flags] % (start, length, depth, host_offset)
        for start, length, flags, host_offset, depth, _ in rows
    ]


def human_lines(rows: Sequence[Row]) -> list[str]:
    """Return rows for people, without the zeroes. Raises `ImageError` for data
    that has no place in a file."""
    lines = []
    for start, length, flags, host_offset, _, node in rows:
        if flags & (HAS_DATA | IS_ZERO) != HAS_DATA:
            continue
        if not flags & HAS_OFFSET:
            raise ImageError(
                "File contains external, encrypted or compressed clusters."
            )
        numbers = "".join(f"{format_hex(n):16}" for n in (start, length, host_offset))
        file = node.driver.data
        # A raw image is nowhere but in the file below its filters, as in QEMU.
        while node.format_name == "raw" and file.inner is not None:
            file = file.inner
        lines.append(f"{numbers}{file.filename}\n")
    return lines

"""``nbdqcow-img map``: what is where in the chain of an image."""

import sys
from collections.abc import Sequence
from typing import Final

from nbdqcow.cli.img import print_help
from nbdqcow.cli.img_nodes import ImageArguments, open_node
from nbdqcow.cli.img_options import (
    MAX_AMOUNT,
    parse_amount,
    parse_arguments,
    wants_json,
)
from nbdqcow.cli.img_run import run_command
from nbdqcow.errors import ImageError, UsageError
from nbdqcow.jobs.map import map_entries
from nbdqcow.jobs.status import Entry, disk_size

_LONG: Final = {
    "help": "-h",
    "format=": "-f",
    "output=": "--output",
    "object=": "--object",
    "image-opts": "--image-opts",
    "force-share": "-U",
    "start-offset=": "-s",
    "max-length=": "-l",
}
_NB_LINES: Final = 1 << 10
"""Lines written in one go."""


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    options, operands = parse_arguments(arguments, ":f:s:l:hU", _LONG)
    images = ImageArguments()
    output, start, length = "human", 0, MAX_AMOUNT
    for name, value in options:
        match name:
            case "-h":
                print_help()
                return 0
            case "--output":
                output = value
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
    return run_command(lambda: _map(operands[0], images, start, length, json=json))


async def _map(
    name: str, images: ImageArguments, start: int, length: int, *, json: bool
) -> int:
    lines: list[str] = []
    write = sys.stdout.write
    node = await open_node(name, images)
    try:
        end = min(disk_size(node), start + length)
        line = json_line if json else human_line
        write("[" if json else f"{'Offset':16}{'Length':16}{'Mapped to':16}File\n")
        async for offset, entry in map_entries(node, start, end):
            if text := line(offset, entry):
                lines.append(text)
            if len(lines) == _NB_LINES:
                write(_join(lines, json))
                lines = [""] if json else []
        if json and start >= end:
            lines.append(_NOTHING % start)
        write(_join(lines, json))
        write("]\n" if json else "")
    finally:
        sys.stdout.flush()
        await node.close()
    return 0


_NOTHING: Final = (
    '{ "start": %d, "length": 0, "depth": 0, "present": false, "zero": false, '
    '"data": false}'
)


def _join(lines: Sequence[str], json: bool) -> str:
    return (",\n" if json else "").join(lines)


def json_line(offset: int, entry: Entry) -> str:
    """Return an entry as qemu-img writes it."""
    text = (
        f'{{ "start": {offset}, "length": {entry.length}, "depth": {entry.depth}, '
        f'"present": {_WORDS[entry.present]}, "zero": {_WORDS[entry.is_zero]}, '
        f'"data": {_WORDS[entry.is_data]}'
    )
    if entry.host_offset >= 0:
        return f'{text}, "offset": {entry.host_offset}}}'
    return text + "}"


_WORDS: Final = ("false", "true")


def human_line(offset: int, entry: Entry) -> str:
    """Return an entry for people: nothing for zeroes. Raises `ImageError` for
    data that has no place in a file."""
    if not entry.is_data or entry.is_zero:
        return ""
    if entry.host_offset < 0:
        raise ImageError("File contains external, encrypted or compressed clusters.")
    name = entry.node.driver.data.filename
    numbers = (offset, entry.length, entry.host_offset)
    return "".join(f"{_hex(number):16}" for number in numbers) + f"{name}\n"


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"

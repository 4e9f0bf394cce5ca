"""``nbdqcow-img amend``: another format version, other options."""

import errno
import os
from collections.abc import Sequence
from typing import Any, Final

from nbdqcow.block.node import Node
from nbdqcow.block.storage import FileRole
from nbdqcow.block.tools import FormatTool, OptionSpec, OptionValue
from nbdqcow.cli.img import print_help
from nbdqcow.cli.img_create import find_tool, print_specs
from nbdqcow.cli.img_nodes import ImageArguments, open_node
from nbdqcow.cli.img_options import (
    check_cache,
    check_option_list,
    convert_option,
    parse_arguments,
    split_options,
    wants_help,
)
from nbdqcow.cli.img_run import ProgressLine, run_command
from nbdqcow.errors import (
    BlockError,
    CorruptImage,
    ImageError,
    ImageInUse,
    UsageError,
)

_LONG: Final = {
    "help": "-h",
    "object=": "--object",
    "image-opts": "--image-opts",
    "force": "--force",
    "options=": "-o",
    "format=": "-f",
    "cache=": "-t",
    "progress": "-p",
    "quiet": "-q",
}
_AMENDABLE: Final = (
    *("backing_file", "backing_fmt", "compat", "data_file", "data_file_raw"),
    *("lazy_refcounts", "refcount_bits", "size"),
)


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    options, operands = parse_arguments(arguments, ":ho:f:t:pq", _LONG)
    images, shown, quiet, force = ImageArguments(), False, False, False
    option_lists: list[str] = []
    for name, value in options:
        match name:
            case "-h":
                print_help()
                return 0
            case "-o":
                option_lists.append(check_option_list(value))
            case "-t":
                images.cache = value
            case "-p":
                shown = True
            case "-q":
                quiet = True
            case "--force":
                force = True
            case _:
                images.take(name, value)
    if not option_lists:
        raise UsageError("Must specify options (-o)")
    text = ",".join(option_lists)
    progress = ProgressLine(shown, quiet=quiet)
    try:
        if images.format is not None and wants_help(text):
            _print_help(images.format)
            return 0
        if len(operands) != 1:
            raise ImageError("Expecting one image file name")
        images.cache = check_cache(images.cache, "Invalid cache option: ")
        images.check()
        return run_command(
            lambda: _amend(operands[0], images, text, progress, force=force), progress
        )
    finally:
        progress.end()


def amend_specs(tool: FormatTool, shown: str) -> list[OptionSpec]:
    """Return the options that can be changed; ``shown`` is what messages call the
    format. Raises `ImageError`."""
    if not tool.key_options:
        raise ImageError(f"Format driver '{shown}' does not support option amendment")
    own = []
    if tool.supports_backing:
        own = [spec for spec in tool.create_options if spec.name in _AMENDABLE]
    return [*tool.key_options, *own]


def _print_help(format_: str) -> None:
    specs = amend_specs(find_tool(format_, "option amendment"), format_)
    print(f"Amend options for '{format_}':")
    print_specs(specs)


async def _amend(
    name: str, images: ImageArguments, text: str, progress: ProgressLine, *, force: bool
) -> int:
    try:
        node = await open_node(name, images, writable=True, raw_role=FileRole.KEYS)
    except ImageInUse as exc:
        if not exc.is_of_raw or "Failed to get shared" not in str(exc):
            raise
        # QEMU asks for that when the disk is open.
        text = str(exc).removeprefix(f"Could not open '{name}': ")
        raise ImageInUse(text) from None
    try:
        tool = find_tool(node.format_name)
        if wants_help(text):
            _print_help(tool.name)
            return 0
        values = _parse(tool, text, images.shown_format(name, tool.name))
        progress.show(0)
        driver: Any = node.driver
        keys = {
            spec.name: values.pop(spec.name)
            for spec in tool.key_options
            if spec.name in values
        }
        try:
            if keys:
                await driver.amend_keys(keys, images.secret, force=force)
            if values:
                await _amend_format(node, values, progress)
        finally:
            progress.show(100)
    finally:
        await node.close()
    return 0


async def _amend_format(
    node: Node, values: dict[str, OptionValue], progress: ProgressLine
) -> None:
    try:
        await node.amend(values, progress)
    except CorruptImage as exc:
        if "compat" not in values:
            raise
        # Where exactly was said when the image was marked.
        text = f"Failed to turn zero into data clusters: {os.strerror(errno.EIO)}"
        raise ImageError(text) from exc
    except BlockError as exc:
        if str(exc) != "Cannot amend the backing file":
            raise
        raise ImageError(f"{exc}\nYou can use 'qemu-img rebase' instead.") from None


def _parse(tool: FormatTool, text: str, shown: str) -> dict[str, OptionValue]:
    kinds = {spec.name: spec.kind for spec in amend_specs(tool, shown)}
    creatable = {spec.name: spec.kind for spec in tool.create_options}
    values: dict[str, OptionValue] = {}
    for name, value in split_options(kinds | creatable, text):
        if name not in kinds:
            raise ImageError(
                f"Invalid parameter '{name}'\n"
                "This option is only supported for image creation"
            )
        values[name] = convert_option(name, kinds[name], value)
    return values

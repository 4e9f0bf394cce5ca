"""``nbdqcow-img create``: new images."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from nbdqcow.block.registry import (
    DEVICE,
    blocking_file,
    check_place,
    filter_names,
    format_tool,
    is_remote,
    split_protocol,
)
from nbdqcow.block.steps import BlockingFile
from nbdqcow.block.tools import FormatTool, OptionSpec, OptionValue, Secrets
from nbdqcow.cli.img import print_help
from nbdqcow.cli.img_names import GivenObjects
from nbdqcow.cli.img_open import (
    backing_path,
    check_backing_chain,
    local_path,
    open_image_file,
)
from nbdqcow.cli.img_options import (
    check_option_list,
    convert_option,
    parse_amount,
    parse_arguments,
    split_options,
    wants_help,
)
from nbdqcow.cli.messages import error
from nbdqcow.cli.program import Signalled, signals_raised
from nbdqcow.errors import ImageError, UsageError

_LONG: Final = {
    "help": "-h",
    "object=": "--object",
    "format=": "-f",
    "options=": "-o",
    "backing=": "-b",
    "backing-format=": "-F",
    "backing-unsafe": "-u",
    "quiet": "-q",
}

# Options of the file below, whatever its format: nbdqcow takes them, and
# acts on ``preallocation``.
_FILE_OPTIONS: Final = (
    OptionSpec("nocow", "bool", "Turn off copy-on-write (valid only on btrfs)"),
    OptionSpec(
        "preallocation",
        "str",
        "Preallocation mode (allowed values: off, falloc, full)",
    ),
    OptionSpec(
        "extent_size_hint", "size", "Extent size hint for the image file, 0 to disable"
    ),
)
_NEVER_CREATED: Final = frozenset(
    (
        *("blkdebug", "blklogwrites", "blkverify", "bochs", "cloop", "compress"),
        *("copy-before-write", "copy-on-read", "dmg", "null-aio", "null-co", "nvme"),
        *("preallocate", "quorum", "replication", "snapshot-access", "throttle"),
        "vvfat",
    )
)
"""What QEMU has under ``-f`` and makes no images of."""

_MAX_EXTENT_SIZE_HINT: Final = (1 << 32) - 1
"""What the kernel has a field for."""


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    options, operands = parse_arguments(arguments, ":B:F:b:f:ho:qu", _LONG)
    format_, quiet, unsafe = "raw", False, False
    given: dict[str, str] = {}
    option_lists: list[str] = []
    objects = GivenObjects()
    for name, value in options:
        match name:
            case "-h":
                print_help()
                return 0
            case "-f":
                format_ = value
            case "-b":
                given["backing_file"] = value
            case "-F" | "-B":
                given["backing_fmt"] = value
            case "-o":
                option_lists.append(check_option_list(value))
            case "-q":
                quiet = True
            case "-u":
                unsafe = True
            case _:
                objects.add(value)
    text = ",".join(option_lists)
    filename = operands[0] if operands else None
    if wants_help(text):
        print_option_help(format_, filename)
        return 0
    if filename is None:
        raise UsageError("Expecting image file name")
    size = parse_amount(operands[1], "image size") if len(operands) > 1 else None
    if len(operands) > 2:
        raise UsageError(f"Unexpected argument: {operands[2]}")
    try:
        _create(
            filename,
            format_,
            text,
            given,
            size,
            objects.secret,
            quiet=quiet,
            unsafe=unsafe,
        )
    except ImageError as exc:
        error(f"{filename}: {exc}")
        return 1
    return 0


class UnknownFormat(ImageError):
    """There is no format of that name."""


def find_tool(format_: str, wanted: str = "image creation") -> FormatTool:
    """Return the tool of a format, for what is ``wanted`` of it. Raises `ImageError`
    in qemu-img's words."""
    try:
        return format_tool(format_)
    except ImageError:
        if format_ in _NEVER_CREATED:
            raise ImageError(
                f"Format driver '{format_}' does not support {wanted}"
            ) from None
        raise UnknownFormat(f"Unknown file format '{format_}'") from None


def check_creation(format_: str, filename: str) -> None:
    """See that ``filename`` is there if ``format_`` asks for a device, or an export:
    nobody can create one. Raises `ImageError`."""
    try:
        if format_ == DEVICE:
            os.stat(local_path(filename))
        check_place(format_, filename)
    except (OSError, ImageError) as exc:
        reason: object = exc
        if isinstance(exc, OSError):
            reason = f"Could not open '{filename}': {exc.strerror}"
        raise ImageError(
            f"Protocol driver '{format_}' does not support image creation, and opening "
            f"the image failed: {reason}"
        ) from None


def option_specs(tool: FormatTool) -> list[OptionSpec]:
    """Return the format's options and the file's, the format's before its namesake."""
    own = {spec.name for spec in tool.create_options}
    return [
        *tool.create_options,
        *(spec for spec in _FILE_OPTIONS if spec.name not in own),
    ]


def check_file_options(values: Mapping[str, OptionValue]) -> None:
    """See that the file's own options can be meant. Raises `ImageError`."""
    hint = values.get("extent_size_hint", 0)
    if isinstance(hint, int) and hint > _MAX_EXTENT_SIZE_HINT:
        raise ImageError("Extent size hint is too large")


def print_option_help(format_: str, filename: str | None) -> None:
    """Print what ``-o`` can say; of a file as well if there is a name."""
    tool = find_tool(format_)
    if filename is None:
        specs = list(tool.create_options)
        print(f"Supported {format_} options:")
    else:
        is_remote(filename)
        specs = option_specs(tool)
        print("Supported options:")
    print_specs(specs)
    if filename is None:
        print(
            "\nThe protocol level may support further options.\n"
            "Specify the target filename to include those options."
        )


def print_specs(specs: Sequence[OptionSpec]) -> None:
    """Print options as qemu-img does, by name."""
    kinds = {
        "str": "<str>",
        "size": "<size>",
        "num": "<num>",
        "bool": "<bool (on/off)>",
    }
    for spec in sorted(specs, key=lambda spec: spec.name):
        print(f"  {spec.name + '=' + kinds[spec.kind]:<22} - {spec.help}")


def _create(
    filename: str,
    format_: str,
    option_text: str,
    given: dict[str, str],
    size: int | None,
    secrets: Secrets,
    *,
    quiet: bool,
    unsafe: bool,
) -> None:
    tool = find_tool(format_)
    remote = bool(filename) and is_place_of_images(filename)
    path = filename if remote or not filename else local_path(filename)
    specs = option_specs(tool)
    texts: dict[str, str] = {}
    values: dict[str, OptionValue] = {}
    kinds = {spec.name: spec.kind for spec in specs}
    for name, text in split_options(kinds, option_text):
        values[name] = convert_option(name, kinds[name], text)
        texts[name] = text
    if size is not None:
        if "size" in values:
            raise ImageError("The image size must be specified only once")
        values["size"] = size
    for name, what in (
        ("backing_file", "file"),
        ("backing_fmt", "file format"),
    ):
        if name in given:
            if not tool.supports_backing:
                raise ImageError(
                    f"Backing {what} not supported for file format '{format_}'"
                )
            values[name] = texts[name] = given[name]
    _use_backing(path, values, unsafe=unsafe)
    if "size" not in values:
        raise ImageError("Image creation needs a size parameter")
    if not quiet:
        _print_formatting(filename, format_, specs, values, texts)
    check_creation(format_, filename)
    check_file_options(values)
    plan = tool.prepare(values, secrets=secrets)
    preallocation = values.get("preallocation")
    try:
        with signals_raised(), _without_parts(tool, plan, path):
            create_data_file(tool, plan, path, preallocation)
            write_image(tool, plan, path, path, preallocation)
    except ImageError as exc:
        if isinstance(exc.__cause__, OSError) and exc.__cause__.errno == errno.EFBIG:
            raise ImageError(
                f"The image size is too large for file format '{tool.name}'"
            ) from None
        raise


@contextlib.contextmanager
def _without_parts(tool: FormatTool, plan: Any, path: str) -> Iterator[None]:
    """Remove new files of an image if the block is interrupted: nobody could tell a
    part from a whole one. A file that was there may be as it was, so it stays."""
    paths = [path]
    if name := tool.data_file_name(plan):
        paths.append(backing_path(path, name))
    new = [one for one in paths if not os.path.lexists(one)]
    try:
        yield
    except (KeyboardInterrupt, Signalled):
        for one in new:
            with contextlib.suppress(OSError):
                os.unlink(one)
        raise


def preallocation_failure(format_: str, mode: object, reason: str | None) -> str | None:
    """Return why an image could not take the space that ``mode`` asks for, in
    qemu-img's words; None for a mode that asks for none."""
    action = {
        "full": "Could not write zeros for preallocation",
        "falloc": "Could not preallocate new data",
    }.get(str(mode))
    if action is None:
        return None
    below = "Failed to resize underlying file: " if format_ == "qcow2" else ""
    return f"{below}{action}: {reason}"


_HEADERS: Final = {"qcow2": "qcow2 header", "luks": "encryption header"}
"""What of a new image is written first, or is all that is written."""


def write_image(
    tool: FormatTool, plan: Any, path: str, shown: str, preallocation: object = "off"
) -> None:
    """Write a planned image to ``path``, ``shown`` in messages, which say for
    what ``preallocation`` there is no space.

    One that can't be completed is removed, as with QEMU. Raises `ImageError`.
    """
    try:
        file = open_new(path)
    except OSError as exc:
        raise ImageError(f"Could not create '{shown}': {exc.strerror}") from None
    try:
        tool.create(file, plan)
    except OSError as exc:
        if os.path.isfile(path):
            with contextlib.suppress(OSError):
                os.unlink(path)
        if exc.errno == errno.EFBIG:
            raise ImageError(f"Could not resize file: {exc.strerror}") from exc
        failure = preallocation_failure(tool.name, preallocation, exc.strerror)
        if tool.name == "qcow2" and preallocation == "metadata":
            failure = f"Allocating clusters failed: {exc.strerror}"
        if failure is not None and tool.name == "qcow2":
            failure = f"Could not resize image: {failure}"
        if failure is None:
            what = _HEADERS.get(tool.name, f"'{shown}'")
            failure = f"Could not write {what}: {exc.strerror}"
        raise ImageError(failure) from None
    finally:
        file.close()


def is_place_of_images(filename: str) -> bool:
    """Tell whether ``filename`` is no path. Raises `ImageError` if what it names
    can't hold a new image."""
    driver, name = split_protocol(filename)
    if driver == "null" or driver in filter_names():
        raise ImageError(
            f"Protocol driver '{name.partition(':')[0]}' does not support image "
            "creation"
        )
    return driver != "file"


def open_new(path: str) -> BlockingFile:
    """Open a file for a new image: a path, or the export that is to hold it.

    Raises `ImageError` and `OSError`.
    """
    file: BlockingFile
    if path and is_place_of_images(path):
        # Not above: it brings the event loop.
        from nbdqcow.cli.img_remote import RemoteFile

        try:
            file = RemoteFile.open(path, read_only=False)
        except ImageError as exc:
            raise ImageError(
                "Protocol driver 'nbd' does not support image creation, and opening "
                f"the image failed: {exc}"
            ) from None
    else:
        file = blocking_file().create(path)
    return file


def create_data_file(
    tool: FormatTool, plan: Any, image_path: str, preallocation: object = "off"
) -> None:
    """Create the external data file that a planned image is to have, if any.

    Its name is relative to the image's directory. ``preallocation`` is what
    messages say there is no space for. Raises `ImageError`; no new file is left.
    """
    name = tool.data_file_name(plan)
    if name is None:
        return
    path = backing_path(image_path, name) if name else name
    if os.path.realpath(path) == os.path.realpath(image_path):
        raise ImageError(f"'{name}' can't be the data file: it is the image itself")
    place = local_path(path) if path else path
    was_there = os.path.lexists(place)
    try:
        file = blocking_file().create(place)
    except OSError as exc:
        raise ImageError(f"Could not create '{path}': {exc.strerror}") from None
    try:
        tool.create_data_file(file, plan)
    except OSError as exc:
        if not was_there:
            with contextlib.suppress(OSError):
                os.unlink(place)
        failure = preallocation_failure("raw", preallocation, exc.strerror)
        raise ImageError(
            f"Could not resize image: {failure}"
            if failure is not None
            else f"Could not write '{path}': {exc.strerror}"
        ) from None
    finally:
        file.close()


def _use_backing(path: str, values: dict[str, OptionValue], *, unsafe: bool) -> None:
    """Look at the backing file: it must be there, and may give the size."""
    if "backing_file" not in values:
        return
    name = str(values["backing_file"])
    if not name:
        raise ImageError("Expected backing file name, got empty string")
    if name == path:
        raise ImageError(
            "Error: Trying to create an image with the same filename as the backing "
            "file"
        )
    backing_format = values.get("backing_fmt")
    if unsafe:
        if backing_format is None and "size" in values:
            raise ImageError("Backing file specified without backing format")
        return
    try:
        with open_image_file(
            backing_path(path, name),
            None if backing_format is None else str(backing_format),
            force_share=True,
            reads_data=False,
        ) as image:
            info = image.tool.describe(image.file)
            check_backing_chain(image, info, force_share=True, reads_data=False)
    except ImageError as exc:
        raise ImageError(f"{exc}\nCould not open backing image.") from None
    if backing_format is None:
        raise ImageError(
            "Backing file specified without backing format\n"
            f"Detected format of {image.tool.name}."
        )
    values.setdefault("size", info.virtual_size)


def _print_formatting(
    filename: str,
    format_: str,
    specs: Sequence[OptionSpec],
    values: dict[str, OptionValue],
    texts: dict[str, str],
) -> None:
    line = f"Formatting '{filename}', fmt={format_}"
    for spec in specs:
        if spec.name in values:
            value = values[spec.name]
            text = texts.get(spec.name, str(value))
            if spec.kind in ("size", "num"):
                number = int(value) & ((1 << 64) - 1)
                text = str(number - (1 << 64) if number >> 63 else number)
            elif spec.kind == "str":
                text = text.replace(",", ",,")
        elif spec.default is not None:
            text = spec.default
        else:
            continue
        line += f" {spec.name}={text}"
    print(line)
    sys.stdout.flush()

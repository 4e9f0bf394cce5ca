"""``nbdqcow-img convert``: disks copied into a new image."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from nbdqcow.block.node import Node
from nbdqcow.block.registry import is_remote
from nbdqcow.block.storage import FileRole
from nbdqcow.block.tools import FormatTool, OptionValue
from nbdqcow.cli.img import print_help
from nbdqcow.cli.img_create import check_creation, find_tool, print_option_help
from nbdqcow.cli.img_nodes import (
    ImageArguments,
    close_nodes,
    closing,
    open_node,
)
from nbdqcow.cli.img_options import (
    check_cache,
    check_compression,
    check_option_list,
    parse_amount,
    parse_arguments,
    wants_help,
)
from nbdqcow.cli.img_run import ProgressLine, run_command
from nbdqcow.cli.img_snapshot import parse_snapshot
from nbdqcow.cli.img_streams import (
    StandardOutput,
    is_stream,
    room_beside,
    standard_input,
)
from nbdqcow.cli.img_target import NewImage, parse_create_options
from nbdqcow.cli.messages import error
from nbdqcow.errors import ImageError
from nbdqcow.jobs.bitmaps import (
    check_bitmaps,
    copy_bitmaps,
    has_bitmaps,
    inconsistent_bitmaps,
)
from nbdqcow.jobs.control import JobControl
from nbdqcow.jobs.convert import convert
from nbdqcow.jobs.pieces import ConvertOptions
from nbdqcow.jobs.status import disk_size
from nbdqcow.jobs.stream import stream
from nbdqcow.units import SECTOR_SIZE, KiB, MiB

_LONG: Final = {
    "help": "-h",
    "object=": "--object",
    "image-opts": "--image-opts",
    "force-share": "-U",
    "target-image-opts": "--target-image-opts",
    "salvage": "--salvage",
    "target-is-zero": "--target-is-zero",
    "bitmaps": "--bitmaps",
    "skip-broken-bitmaps": "--skip-broken-bitmaps",
    "source-format=": "-f",
    "source-cache=": "-T",
    "snapshot=": "-l",
    "target-format=": "-O",
    "target-format-options=": "-o",
    "target-cache=": "-t",
    "backing=": "-B",
    "backing-format=": "-F",
    "sparse-size=": "-S",
    "no-create": "-n",
    "compress": "-c",
    "rate-limit=": "-r",
    "parallel=": "-m",
    "oob-writes": "-W",
    "copy-range-offloading": "-C",
    "progress": "-p",
    "quiet": "-q",
}
_MAX_IN_FLIGHT: Final = 16
_MAX_SPARSE: Final = 16 * MiB


@dataclass(slots=True)
class _Settings:
    """What the command line says; see `run`."""

    images: ImageArguments = field(default_factory=ImageArguments)
    target_format: str | None = None
    backing_file: str | None = None
    backing_format: str | None = None
    option_lists: list[str] = field(default_factory=list)
    snapshot: Any = None
    sparse: int = 4 * KiB
    is_sparse_given: bool = False
    compressed: bool = False
    copy_range: bool = False
    progress: bool = False
    quiet: bool = False
    no_create: bool = False
    target_cache: str = "unsafe"
    nb_in_flight: int = 8
    in_order: bool = True
    rate: int | None = None
    salvage: bool = False
    target_image_opts: bool = False
    target_is_zero: bool = False
    bitmaps: bool = False
    skip_broken_bitmaps: bool = False
    sources: Sequence[str] = ()
    target: str = ""


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    options, operands = parse_arguments(
        arguments, ":hf:O:b:B:CcF:o:l:S:pt:T:qnm:WUr:", _LONG
    )
    settings = _Settings()
    for name, value in options:
        if name == "-h":
            print_help()
            return 0
        _take(settings, name, value)
    if settings.target_format is None and not settings.target_image_opts:
        settings.target_format = "raw"
    text = ",".join(settings.option_lists)
    _check_combinations(settings)
    if wants_help(text):
        assert settings.target_format is not None
        print_option_help(
            settings.target_format, operands[-1] if len(operands) > 1 else None
        )
        return 0
    if len(operands) < 2:
        raise ImageError("Must specify image file name")
    settings.sources, settings.target = operands[:-1], operands[-1]
    _check_streams(settings)
    settings.images.cache = check_cache(
        settings.images.cache, "Invalid source cache option: "
    )
    progress = ProgressLine(settings.progress, quiet=settings.quiet)
    progress.show(0)
    try:
        settings.images.check()
        return run_command(lambda: _convert(settings, text, progress), progress)
    finally:
        progress.end()


def _take(settings: _Settings, name: str, value: str) -> None:
    if settings.images.take(name, value):
        return
    match name:
        case "-O":
            settings.target_format = value
        case "-B" | "-b":
            settings.backing_file = value
        case "-F":
            settings.backing_format = value
        case "-C":
            settings.copy_range = True
        case "-c":
            settings.compressed = True
        case "-o":
            settings.option_lists.append(check_option_list(value))
        case "-l":
            settings.snapshot = parse_snapshot(value)
        case "-S":
            settings.sparse = _parse_sparse(value)
            settings.is_sparse_given = True
        case "-p":
            settings.progress = True
        case "-t":
            settings.target_cache = value
        case "-T":
            settings.images.cache = value
        case "-q":
            settings.quiet = True
        case "-n":
            settings.no_create = True
        case "-m":
            settings.nb_in_flight = _parse_in_flight(value)
        case "-W":
            settings.in_order = False
        case "-r":
            settings.rate = parse_amount(value, "rate limit")
        case "--salvage":
            settings.salvage = True
        case "--target-image-opts":
            settings.target_image_opts = True
        case "--target-is-zero":
            settings.target_is_zero = True
        case "--bitmaps":
            settings.bitmaps = True
        case "--skip-broken-bitmaps":
            settings.skip_broken_bitmaps = True


def _parse_sparse(text: str) -> int:
    sparse = parse_amount(text, "buffer size for sparse output")
    if sparse % SECTOR_SIZE or sparse > _MAX_SPARSE:
        raise ImageError(
            "Invalid buffer size for sparse output specified. Valid sizes are "
            f"multiples of {SECTOR_SIZE} up to {_MAX_SPARSE}. Select 0 to disable "
            "sparse detection (fully allocates output)."
        )
    return sparse


def _parse_in_flight(text: str) -> int:
    try:
        number = int(text, 0)
    except ValueError:
        number = 0
    if not 1 <= number <= _MAX_IN_FLIGHT:
        raise ImageError(
            "Invalid number of coroutines. Allowed number of coroutines is between 1 "
            f"and {_MAX_IN_FLIGHT}"
        )
    return number


def _check_combinations(settings: _Settings) -> None:
    if settings.skip_broken_bitmaps and not settings.bitmaps:
        raise ImageError("Use of --skip-broken-bitmaps requires --bitmaps")
    if settings.copy_range and settings.compressed:
        raise ImageError("Cannot enable copy offloading when -c is used")
    if settings.option_lists and settings.no_create:
        raise ImageError("-o has no effect when skipping image creation")
    if settings.copy_range and settings.is_sparse_given:
        raise ImageError("Cannot enable copy offloading when -S is used")
    if settings.copy_range and settings.salvage:
        raise ImageError("Cannot use copy offloading in salvaging mode")
    if settings.target_image_opts and not settings.no_create:
        raise ImageError("--target-image-opts requires use of -n flag")
    if settings.target_is_zero and not settings.no_create:
        raise ImageError("--target-is-zero requires use of -n flag")
    if settings.target_is_zero and settings.backing_file is not None:
        raise ImageError(
            "Cannot use --target-is-zero when the destination image has a backing file"
        )
    if settings.bitmaps and settings.snapshot is not None:
        raise ImageError("--bitmaps: a snapshot has no bitmaps")


def _check_streams(settings: _Settings) -> None:
    """See that standard input and output can do what is asked of them."""
    if sum(map(is_stream, settings.sources)) > 1:
        raise ImageError("Standard input can be only one of the images")
    if not is_stream(settings.target):
        return
    if settings.target_format != "raw":
        raise ImageError("Only a raw image can be written to standard output")
    refused = {
        "-n": settings.no_create,
        "-o": settings.option_lists,
        "-B": settings.backing_file is not None,
        "-c": settings.compressed,
        "-p": settings.progress and not settings.quiet,
        "--bitmaps": settings.bitmaps,
        "--salvage": settings.salvage,
    }
    for option, is_given in refused.items():
        if is_given:
            raise ImageError(f"{option} can't be used with standard output")


async def _convert(settings: _Settings, text: str, progress: ProgressLine) -> int:
    cache = settings.images.cache
    sources: list[Node] = []
    async with contextlib.AsyncExitStack() as stack:
        names = list(settings.sources)
        for index in [i for i, name in enumerate(names) if is_stream(name)]:
            file = standard_input(room_beside(settings.target))
            names[index] = await stack.enter_async_context(file)
        # They are closed before the file that standard input is in.
        stack.push_async_callback(close_nodes, sources)
        for name, shown in zip(names, settings.sources, strict=True):
            source = await open_node(
                name, settings.images, cache=cache, shown=shown,
                raw_role=FileRole.SOURCE,
            )  # fmt: skip
            sources.append(source)
        if settings.snapshot is not None:
            await _show_snapshot(settings, names[0], sources, cache)
        if is_stream(settings.target):
            await _write_stream(settings, sources, progress)
        else:
            await _convert_to_target(settings, text, sources, progress)
    return 0


async def _write_stream(
    settings: _Settings, sources: Sequence[Node], progress: ProgressLine
) -> None:
    """Write the disks to standard output."""
    control = JobControl(progress, rate=settings.rate)
    output = StandardOutput()
    try:
        await stream(sources, output.write, control)
    finally:
        await output.close()


async def _show_snapshot(
    settings: _Settings, name: str, sources: list[Node], cache: str
) -> None:
    """Let the first source be what it was in a snapshot."""
    if len(sources) > 1 and isinstance(settings.snapshot, str):
        # QEMU has no objection to the other way of naming one.
        raise ImageError("No support for concatenating multiple snapshot")
    await sources.pop(0).close()
    sources.insert(
        0,
        await open_node(
            name, settings.images, cache=cache, snapshot=settings.snapshot,
            shown=settings.sources[0], raw_role=FileRole.SOURCE,
        ),
    )  # fmt: skip


async def _convert_to_target(
    settings: _Settings, text: str, sources: Sequence[Node], progress: ProgressLine
) -> None:
    size = sum(map(disk_size, sources))
    tool, values = None, {}
    if not settings.no_create:
        assert settings.target_format is not None
        tool = find_tool(settings.target_format)
        values = _creation_values(settings, tool, text, size, sources)
    if settings.bitmaps:
        _check_bitmaps(settings, sources)
    if tool is not None and settings.target:
        # An unknown protocol is no failure of the creation.
        is_remote(settings.target)
    target_cache = check_cache(settings.target_cache, "Invalid cache option: ")
    target_arguments = ImageArguments(
        format=settings.target_format,
        image_opts=settings.target_image_opts,
        objects=settings.images.objects,
    )
    target_arguments.check()
    new: NewImage | None = None
    path = settings.target
    with contextlib.ExitStack() as stack:
        if tool is not None:
            new = stack.enter_context(_create(settings, tool, values))
            path = new.path
        try:
            target = await open_node(
                path,
                target_arguments,
                writable=True,
                cache=target_cache,
                secret=_secret_of(values, settings.images),
                # Nobody knows what else is to be seen in an image that was there.
                explicit_zeroes=settings.no_create,
            )
        except ImageError as exc:
            shown = str(exc) if new is None else new.rename_in(str(exc))
            raise ImageError(shown) from None
        async with closing(target):
            await _copy(
                settings,
                sources,
                target,
                values,
                progress,
                # A raw disk is what it is in; others do not show it.
                is_new=new is not None
                and not (new.holds_old_data and target.format_name == "raw"),
            )
        if new is not None:
            new.commit(durable=target_cache != "unsafe")


def _check_bitmaps(settings: _Settings, sources: Sequence[Node]) -> None:
    """See that the bitmaps can be copied. Raises `ImageError`."""
    if len(sources) > 1:
        raise ImageError("Copying bitmaps only possible with single source")
    if not has_bitmaps(sources[0]):
        raise ImageError("Source lacks bitmap support")
    if settings.skip_broken_bitmaps:
        return
    for name in inconsistent_bitmaps(sources[0]):
        raise ImageError(
            f"Cannot copy inconsistent bitmap '{name}'\nTry --skip-broken-bitmaps, "
            "or use 'qemu-img bitmap --remove' to delete it"
        )


def _create(
    settings: _Settings, tool: FormatTool, values: Mapping[str, OptionValue]
) -> NewImage:
    """Return the new image, to be opened. Raises `ImageError`, and leaves none."""
    assert settings.target_format is not None
    try:
        check_creation(settings.target_format, settings.target)
        return NewImage.created(settings.target, tool, values, settings.images.secret)
    except ImageError as exc:
        raise ImageError(
            f"{settings.target}: error while converting {settings.target_format}: {exc}"
        ) from None


def _creation_values(
    settings: _Settings,
    tool: FormatTool,
    text: str,
    size: int,
    sources: Sequence[Node],
) -> dict[str, OptionValue]:
    """Return the ``-o`` values of the new image. Raises `ImageError`."""
    values = parse_create_options(tool, text)
    values["size"] = size
    for name, given, what in (
        ("backing_file", settings.backing_file, "file"),
        ("backing_fmt", settings.backing_format, "file format"),
    ):
        if given is None:
            continue
        if not tool.supports_backing:
            raise ImageError(
                f"Backing {what} not supported for file format '{tool.name}'"
            )
        values[name] = given
    if "backing_file" in values and len(sources) > 1:
        raise ImageError(
            "Having a backing file for the target makes no sense when concatenating "
            "multiple input images"
        )
    if "backing_file" in values and "backing_fmt" not in values:
        raise ImageError("Use of backing file requires explicit backing format")
    if settings.compressed:
        check_compression(tool.name)
        if values.get("encryption") or values.get("encrypt.format"):
            raise ImageError(
                "Compression and encryption not supported at the same time"
            )
        if str(values.get("preallocation", "off")) != "off":
            raise ImageError(
                "Compression and preallocation not supported at the same time"
            )
    return values


def _secret_of(values: dict[str, OptionValue], images: ImageArguments) -> bytes | None:
    """Return the passphrase that the new image was made with."""
    key = values.get("encrypt.key-secret", values.get("key-secret"))
    return None if key is None else images.secret(str(key))


def _begins_zero(target: Node, values: dict[str, OptionValue]) -> bool:
    """Whether a new image reads as zeroes: not where there is room for encrypted
    data already, for that decrypts to noise."""
    return target.driver.data.name != "encrypted" or (
        target.driver.cluster_size > 1 and values.get("preallocation", "off") == "off"
    )


async def _copy(
    settings: _Settings,
    sources: Sequence[Node],
    target: Node,
    values: dict[str, OptionValue],
    progress: ProgressLine,
    *,
    is_new: bool,
) -> None:
    if settings.compressed:
        check_compression(target.format_name)
    if settings.bitmaps:
        check_bitmaps(target)
    if disk_size(target) < sum(map(disk_size, sources)):
        raise ImageError("output file is smaller than input file")
    has_backing = target.backing is not None
    control = JobControl(progress, rate=settings.rate)
    await convert(
        sources,
        target,
        ConvertOptions(
            sparse=settings.sparse,
            compressed=settings.compressed,
            target_is_zero=not has_backing
            and (settings.target_is_zero or (is_new and _begins_zero(target, values))),
            target_has_backing=has_backing
            and (settings.backing_file is not None or "backing_file" in values),
            backing_size=target.backing.size if target.backing is not None else 0,
            nb_in_flight=settings.nb_in_flight,
            in_order=settings.in_order,
            copy_range=settings.copy_range,
            salvage=settings.salvage,
            # QEMU tells of what is lost as it counts, too.
            count_data=(settings.progress and not settings.quiet) or settings.salvage,
        ),
        control,
        lambda what, offset, reason: error(
            f"warning: error while reading {what} {offset}: {reason}"
        ),
    )
    if settings.bitmaps:
        for name in inconsistent_bitmaps(sources[0]):
            error(f"warning: Skipping inconsistent bitmap '{name}'")
        await copy_bitmaps(sources[0], target)
    progress.show(100)

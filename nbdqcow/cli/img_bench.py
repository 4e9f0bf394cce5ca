"""``nbdqcow-img bench``: how fast is this image?"""

from collections.abc import Sequence
from typing import Any, Final

from nbdqcow.cli.img import print_help
from nbdqcow.cli.img_nodes import ImageArguments, closing, open_node
from nbdqcow.cli.img_options import check_cache, parse_amount, parse_arguments
from nbdqcow.cli.img_run import run_command
from nbdqcow.cli.messages import describe
from nbdqcow.errors import ImageError, UsageError
from nbdqcow.jobs.bench import BenchOptions, bench

_LONG: Final = {
    "help": "-h",
    "flush-interval=": "--flush-interval",
    "pattern=": "--pattern",
    "no-drain": "--no-drain",
    "image-opts": "--image-opts",
    "force-share": "-U",
    "object=": "--object",
    "format=": "-f",
    "cache=": "-t",
    "count=": "-c",
    "depth=": "-d",
    "offset=": "-o",
    "buffer-size=": "-s",
    "step-size=": "-S",
    "write": "-w",
    "aio=": "-i",
    "native": "-n",
    "quiet": "-q",
}
_AIO: Final = ("threads", "native", "io_uring")
_MAX_LENGTH: Final = (1 << 31) - 1


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    options, operands = parse_arguments(arguments, ":hc:d:f:ni:o:qs:S:t:wU", _LONG)
    images = ImageArguments()
    found: dict[str, Any] = {}
    aio, writes, pattern = "threads", False, 0
    for name, value in options:
        match name:
            case "-h":
                print_help()
                return 0
            case "-c":
                found["count"] = _number(value, "request count")
            case "-d":
                found["depth"] = _number(value, "queue depth")
            case "-n":
                aio = "native"
            case "-i":
                if value not in _AIO:
                    raise ImageError(f"Invalid aio option: {value}")
                aio = value
            case "-o":
                found["offset"] = parse_amount(value, "offset")
            case "-q":
                # Not that it would make QEMU's command any quieter.
                pass
            case "-s":
                found["length"] = parse_amount(value, "buffer size", 0, _MAX_LENGTH)
            case "-S":
                found["step"] = parse_amount(value, "step_size", 0, _MAX_LENGTH)
            case "-t":
                try:
                    images.cache = check_cache(value, "")
                except ImageError:
                    raise ImageError("Invalid cache mode") from None
            case "-w":
                writes = True
            case "--pattern":
                pattern = _number(value, "pattern byte", 0xFF)
            case "--flush-interval":
                found["flush_interval"] = _number(value, "flush interval")
            case "--no-drain":
                found["drain"] = False
            case _:
                images.take(name, value)
    if len(operands) != 1:
        raise UsageError("Expecting one image file name")
    settings = _settings(found, pattern if writes else None)
    images.check()
    if aio == "native" and images.cache not in ("none", "directsync"):
        raise ImageError(
            f"Could not open '{operands[0]}': aio=native was specified, but it "
            "requires cache.direct=on, which was not specified."
        )
    return run_command(lambda: _bench(operands[0], images, settings))


def _number(text: str, what: str, maximum: int = (1 << 31) - 1) -> int:
    try:
        number = int(text, 0)
    except ValueError:
        number = -1
    if not 0 <= number <= maximum:
        raise ImageError(f"Invalid {what} specified")
    return number


def _settings(found: dict[str, Any], pattern: int | None) -> BenchOptions:
    length = found.get("length", 4096)
    interval, depth = found.get("flush_interval", 0), found.get("depth", 64)
    if pattern is None and interval:
        raise ImageError("--flush-interval is only available in write tests")
    if not depth:
        raise ImageError("Invalid queue depth specified")
    if interval and interval < depth:
        raise ImageError("Flush interval can't be smaller than depth")
    return BenchOptions(
        count=found.get("count", 75000),
        depth=depth,
        offset=found.get("offset", 0),
        step=found.get("step") or length,
        length=length,
        pattern=pattern,
        flush_interval=interval,
        drain=found.get("drain", True),
    )


async def _bench(name: str, images: ImageArguments, options: BenchOptions) -> int:
    node = await open_node(name, images, writable=options.pattern is not None)
    async with closing(node):
        kind = "read" if options.pattern is None else "write"
        print(
            f"Sending {options.count} {kind} requests, {options.length} bytes each, "
            f"{options.depth} in parallel (starting at offset {options.offset}, "
            f"step size {options.step})"
        )
        if options.flush_interval:
            print(f"Sending flush every {options.flush_interval} requests")
        try:
            seconds = await bench(node, options)
        except OSError as exc:
            raise ImageError(f"Failed request: {describe(exc)}") from None
        print(f"Run completed in {seconds:3.3f} seconds.")
    return 0

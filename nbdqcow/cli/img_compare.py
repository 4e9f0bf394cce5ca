"""``nbdqcow-img compare``: do two disks have the same content?"""

from collections.abc import Sequence
from typing import Final

from nbdqcow.block.node import Node
from nbdqcow.cli.img import print_help
from nbdqcow.cli.img_nodes import ImageArguments, close_nodes, open_node
from nbdqcow.cli.img_options import check_cache, parse_arguments
from nbdqcow.cli.img_run import ProgressLine, run_command
from nbdqcow.cli.messages import describe, error
from nbdqcow.errors import ImageError, NbdQcowError, UsageError
from nbdqcow.jobs.compare import CompareError, Comparison, compare
from nbdqcow.jobs.control import JobControl

_LONG: Final = {
    "help": "-h",
    "object=": "--object",
    "image-opts": "--image-opts",
    "force-share": "-U",
    "a-format=": "-f",
    "b-format=": "-F",
    "strict": "-s",
    "cache=": "-T",
    "progress": "-p",
    "quiet": "-q",
}

_DIFFERENT: Final = 1
_FAILED: Final = 2
_UNREADABLE: Final = 4


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    options, operands = parse_arguments(arguments, ":hf:F:T:pqsU", _LONG)
    images = ImageArguments()
    second_format: str | None = None
    progress_shown = quiet = strict = False
    for name, value in options:
        match name:
            case "-h":
                print_help()
                return 0
            case "-F":
                second_format = value
            case "-T":
                images.cache = value
            case "-p":
                progress_shown = True
            case "-q":
                quiet = True
            case "-s":
                strict = True
            case _:
                try:
                    images.take(name, value)
                except ImageError as exc:
                    error(str(exc))
                    return _FAILED
    if len(operands) != 2:
        raise UsageError("Expecting two image file names")
    progress = ProgressLine(progress_shown, quiet=quiet, step=2.0)

    async def main() -> int:
        nodes: list[Node] = []
        try:
            for name, format_ in zip(
                operands, (images.format, second_format), strict=True
            ):
                # -f is not the second one's.
                images.format = None
                if images.image_opts and format_ is not None:
                    raise ImageError("--image-opts and --format are mutually exclusive")
                node = await open_node(name, images, format_=format_)
                nodes.append(node)
            progress.show(0)
            found = await compare(
                nodes[0],
                nodes[1],
                JobControl(progress),
                strict=strict,
                on_longer=lambda: _say("Warning: Image size mismatch!", quiet),
            )
        finally:
            await close_nodes(nodes)
        return _report(found, strict=strict, quiet=quiet)

    try:
        images.cache = check_cache(images.cache, "Invalid source cache option: ")
        images.check()
        return run_command(main, progress)
    except CompareError as exc:
        error(
            f"Error while reading offset {exc.offset} of {operands[exc.which]}: {exc}"
        )
        return _UNREADABLE
    except (NbdQcowError, OSError) as exc:
        error(describe(exc))
        return _FAILED
    finally:
        progress.end()


def _report(found: Comparison, *, strict: bool, quiet: bool) -> int:
    """Say what was found; return the exit status."""
    status = _DIFFERENT
    if strict and found.sizes_differ:
        text = "Strict mode: Image size mismatch!"
    elif found.status_offset is not None:
        text = f"Strict mode: Offset {found.status_offset} block status mismatch!"
    elif found.content_offset is not None:
        text = f"Content mismatch at offset {found.content_offset}!"
    else:
        text, status = "Images are identical.", 0
    _say(text, quiet)
    return status


def _say(text: str, quiet: bool) -> None:
    # Unless progress is shown, what goes to a pipe comes after an error, as with
    # QEMU's.
    if not quiet:
        print(text)

"""``nbdqcow-img commit``: an image's data goes to its backing image."""

from collections.abc import Sequence
from typing import Any, Final

from nbdqcow.block.node import Node
from nbdqcow.block.storage import FileRole
from nbdqcow.cli.img import print_help
from nbdqcow.cli.img_chain import overlay_of
from nbdqcow.cli.img_nodes import ImageArguments, closing, open_node
from nbdqcow.cli.img_options import check_cache, parse_amount, parse_arguments
from nbdqcow.cli.img_run import ProgressLine, run_command
from nbdqcow.errors import ImageError, ImageInUse, NotSupported, UsageError
from nbdqcow.jobs.commit import commit
from nbdqcow.jobs.control import JobControl
from nbdqcow.jobs.errors import CopyError, reason_of

_LONG: Final = {
    "help": "-h",
    "object=": "--object",
    "image-opts": "--image-opts",
    "format=": "-f",
    "cache=": "-t",
    "drop": "-d",
    "base=": "-b",
    "rate-limit=": "-r",
    "progress": "-p",
    "quiet": "-q",
}


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    options, operands = parse_arguments(arguments, ":f:ht:b:dpqr:", _LONG)
    images = ImageArguments()
    base: str | None = None
    keep = shown = quiet = False
    rate: int | None = None
    for name, value in options:
        match name:
            case "-h":
                print_help()
                return 0
            case "-t":
                images.cache = value
            case "-b":
                base = value
                # What is below the image would no longer fit an empty one.
                keep = True
            case "-d":
                keep = True
            case "-p":
                shown = True
            case "-q":
                quiet = True
            case "-r":
                rate = parse_amount(value, "rate limit")
            case _:
                images.take(name, value)
    if len(operands) != 1:
        raise UsageError("Expecting one image file name")
    images.cache = check_cache(images.cache, "Invalid cache option: ")
    images.check()
    progress = ProgressLine(shown, quiet=quiet)
    control = JobControl(progress, rate=rate)
    status = run_command(
        lambda: _commit(operands[0], images, base, control, progress, keep=keep),
        progress,
    )
    if status == 0 and not quiet:
        print("Image committed.")
    return status


async def _commit(
    name: str,
    images: ImageArguments,
    base_name: str | None,
    control: JobControl,
    progress: ProgressLine,
    *,
    keep: bool,
) -> int:
    top = await open_node(name, images, writable=True)
    async with closing(top):
        try:
            progress.show(0)
            if top.backing is None and base_name is None:
                raise ImageError("Image does not have a backing file")
            above = top if base_name is None else overlay_of(top, base_name)
            if above is None:
                raise ImageError(
                    f"Did not find '{base_name}' in the backing chain of '{name}'"
                )
            base = await _open_for_writing(above, images)
            try:
                await commit(top, base, control)
            except CopyError as exc:
                raise ImageError(f"Block job failed: {exc.reason}") from None
            if not keep:
                await _make_empty(top, name)
            progress.show(100)
        finally:
            progress.end()
    return 0


async def _open_for_writing(above: Node, images: ImageArguments) -> Node:
    """Open the backing image of ``above`` anew, so that it can be written to."""
    found = above.backing
    assert found is not None
    above.backing = None
    filename, format_, secret = (
        found.filename,
        # A guess stays one: no header of another format may come to a raw image.
        None if found.guessed_raw else found.format_name,
        getattr(found.driver, "secret", None),
    )
    await found.close()
    try:
        above.backing = await open_node(
            filename,
            ImageArguments(cache=images.cache, objects=images.objects),
            writable=True,
            format_=format_,
            secret=secret,
            warns=False,
            # Only its length is kept from others.
            raw_role=FileRole.DATA,
        )
    except ImageError as exc:
        # QEMU asks for more rights to what it has open already: to say once that it
        # could not be opened is enough.
        opening = f"Could not open '{filename}': "
        text = str(exc).removeprefix(opening)
        if not isinstance(exc, ImageInUse) and not text.startswith(opening):
            raise
        raise exc.with_text(text) from None
    return above.backing


async def _make_empty(top: Node, name: str) -> None:
    driver: Any = top.driver
    try:
        await driver.make_empty()
    except NotSupported:
        # It is no worse for having what its backing image has as well.
        return
    except OSError as exc:
        raise ImageError(f"Failed to empty {name}: {reason_of(exc)}") from None

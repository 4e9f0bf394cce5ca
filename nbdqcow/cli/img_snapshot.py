"""``nbdqcow-img snapshot``: internal snapshots of an image."""

import errno
import os
from collections.abc import Sequence
from typing import Any, Final

from nbdqcow.cli import option_text
from nbdqcow.cli.img import print_help
from nbdqcow.cli.img_info import print_snapshots
from nbdqcow.cli.img_names import GivenObjects
from nbdqcow.cli.img_open import check_backing_chain, open_image_file
from nbdqcow.cli.img_options import parse_arguments
from nbdqcow.cli.messages import describe, error
from nbdqcow.errors import ImageError, UsageError

_LONG: Final = {
    "help": "-h",
    "object=": "--object",
    "image-opts": "--image-opts",
    "force-share": "-U",
    "format=": "-f",
    "list": "-l",
    "create=": "-c",
    "apply=": "-a",
    "delete=": "-d",
    "quiet": "-q",
}
_MAX_NAME_BYTES: Final = 255
_VERBS: Final = {"-a": "apply", "-c": "create", "-d": "delete"}


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    options, operands = parse_arguments(arguments, ":la:c:d:f:hqU", _LONG)
    action, snapshot = "", ""
    common: list[tuple[str, str]] = []
    objects = GivenObjects()
    for name, value in options:
        match name:
            case "-h":
                print_help()
                return 0
            case "-l" | "-a" | "-c" | "-d":
                if action:
                    raise UsageError("Cannot mix '-l', '-a', '-c', '-d'")
                action, snapshot = name, value
            case "-q":
                pass
            case "--object":
                objects.add(value)
                common.append((name, value))
            case _:
                common.append((name, value))
    if len(operands) != 1:
        raise UsageError("Expecting one image file name")
    if action == "-l" and all(name == "-U" for name, _ in common):
        return _list(operands[0], force_share=bool(common))
    return _operate(operands[0], common, objects, action, snapshot)


def parse_snapshot(text: str) -> Any:
    """Return which snapshot an option asks for: an ID or name, or ``(ID, name)``.

    Raises `ImageError`.
    """
    try:
        return option_text.parse_snapshot(text)
    except UsageError as exc:
        error(str(exc))
        raise ImageError(f"Failed in parsing snapshot param '{text}'") from None


def _list(filename: str, *, force_share: bool) -> int:
    """List the snapshots, for which nothing large need be loaded."""
    try:
        with open_image_file(filename, None, force_share=force_share) as image:
            info = image.tool.describe(image.file)
            # They must be there as for any other use of the image.
            check_backing_chain(image, info, force_share=force_share)
    except ImageError as exc:
        raise type(exc)(f"Could not open '{filename}': {exc}") from None
    if info.snapshots:
        print_snapshots(info.snapshots)
    return 0


def _operate(
    filename: str,
    common: Sequence[tuple[str, str]],
    objects: GivenObjects,
    action: str,
    snapshot: str,
) -> int:
    from nbdqcow.cli.img_nodes import ImageArguments, open_node
    from nbdqcow.cli.img_run import run_command
    from nbdqcow.cli.messages import warn_of_guess

    images = ImageArguments(objects=objects)
    for name, value in common:
        if name != "--object":
            images.take(name, value)
    images.check()

    async def main() -> int:
        node = await open_node(filename, images, writable=action != "-l")
        try:
            driver: Any = node.driver
            if not hasattr(driver, "snapshot_list"):
                if action in _VERBS:
                    if action == "-a" and node.guessed_raw:
                        # It is opened anew.
                        warn_of_guess(filename)
                    raise ImageError(_no_snapshots(action, snapshot))
            elif action == "-l":
                if snapshots := await driver.snapshot_list():
                    print_snapshots(snapshots)
            elif action in _VERBS:
                await _change(driver, action, snapshot)
        finally:
            await node.close()
        return 0

    return run_command(main)


def _no_snapshots(action: str, snapshot: str) -> str:
    """Return what qemu-img says of a format without snapshots."""
    prefix = f"Could not {_VERBS[action]} snapshot '{snapshot}': "
    if action == "-c":
        number = errno.ENOTSUP
        return f"{prefix}{-number} ({os.strerror(number)})"
    if action == "-a":
        return f"{prefix}Block driver does not support snapshots"
    return f"{prefix}snapshot not found"


async def _change(driver: Any, action: str, snapshot: str) -> None:
    prefix = f"Could not {_VERBS[action]} snapshot '{snapshot}': "
    try:
        if action == "-c":
            # QEMU's command cuts names, and writes this number.
            name = os.fsdecode(os.fsencode(snapshot)[:_MAX_NAME_BYTES])
            await driver.snapshot_create(name, icount=0)
        elif action == "-a":
            await driver.snapshot_apply(snapshot)
        else:
            found = [
                one.id for one in await driver.snapshot_list() if one.name == snapshot
            ]
            if not found:
                raise ImageError(f"{prefix}snapshot not found")
            await driver.snapshot_delete(found[0])
    except OSError as exc:
        number = exc.errno or errno.EIO
        if action == "-c":
            text = f"{-number} ({os.strerror(number)})"
        elif number == errno.ENOENT:
            text = f"Failed to load snapshot: {os.strerror(number)}"
        else:
            text = describe(exc)
        raise ImageError(prefix + text) from None

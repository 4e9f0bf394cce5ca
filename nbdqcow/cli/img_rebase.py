"""``nbdqcow-img rebase``: another backing image below an image."""

import errno
import os
from collections.abc import Sequence
from typing import Any, Final, NoReturn

from nbdqcow.block.node import Node
from nbdqcow.block.open import backing_path
from nbdqcow.block.storage import FileRole
from nbdqcow.block.tools import BACKING_FORMATS
from nbdqcow.cli.img import print_help
from nbdqcow.cli.img_chain import overlay_of
from nbdqcow.cli.img_nodes import ImageArguments, closing, open_node
from nbdqcow.cli.img_open import identity_of
from nbdqcow.cli.img_options import check_cache, check_compression, parse_arguments
from nbdqcow.cli.img_run import ProgressLine, run_command
from nbdqcow.errors import BlockError, ImageError, NotSupported, UsageError
from nbdqcow.jobs.control import JobControl
from nbdqcow.jobs.errors import CopyError
from nbdqcow.jobs.rebase import rebase

_LONG: Final = {
    "help": "-h",
    "object=": "--object",
    "image-opts": "--image-opts",
    "force-share": "-U",
    "format=": "-f",
    "cache=": "-t",
    "backing=": "-b",
    "backing-format=": "-F",
    "backing-cache=": "-T",
    "backing-unsafe": "-u",
    "compress": "-c",
    "progress": "-p",
    "quiet": "-q",
}
_MAX_NAME_BYTES: Final = 1023


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    options, operands = parse_arguments(arguments, ":hf:F:B:b:cupt:T:qU", _LONG)
    images = ImageArguments()
    base: str | None = None
    base_format: str | None = None
    source_cache = "writeback"
    unsafe = compressed = shown = quiet = force_share = False
    for name, value in options:
        match name:
            case "-h":
                print_help()
                return 0
            case "-F" | "-B":
                base_format = value
            case "-b":
                base = value
            case "-u":
                unsafe = True
            case "-c":
                compressed = True
            case "-p":
                shown = True
            case "-t":
                images.cache = value
            case "-T":
                source_cache = value
            case "-q":
                quiet = True
            case "-U":
                # Of the backing images: this one is written to.
                force_share = True
            case _:
                images.take(name, value)
    if len(operands) != 1:
        raise UsageError("Expecting one image file name")
    if not unsafe and base is None:
        raise UsageError("Must specify backing file (-b) or use unsafe mode (-u)")
    progress = ProgressLine(shown, quiet=quiet)
    try:
        progress.show(0)
        images.cache = check_cache(images.cache, "Invalid cache option: ")
        source_cache = check_cache(source_cache, "Invalid source cache option: ")
        images.check()
        sources = ImageArguments(
            force_share=force_share, cache=source_cache, objects=images.objects
        )
        change = _Change(base, base_format, unsafe, compressed)
        return run_command(
            lambda: change.run(operands[0], images, sources, progress), progress
        )
    finally:
        progress.end()


class _Change:
    """One run of the command: the image gets the backing file ``base``, or none."""

    def __init__(
        self, base: str | None, base_format: str | None, unsafe: bool, compressed: bool
    ) -> None:
        self._shown = "(null)" if base is None else base
        self._base = base or None
        self._base_format = base_format
        self._unsafe = unsafe
        self._compressed = compressed

    async def run(
        self,
        name: str,
        images: ImageArguments,
        sources: ImageArguments,
        progress: ProgressLine,
    ) -> int:
        """Change the image ``name``; return the exit status."""
        node = await open_node(
            name, images, writable=True, with_backing=not self._unsafe
        )
        async with closing(node):
            if self._compressed:
                check_compression(node.format_name)
            if self._base_format not in (None, *BACKING_FORMATS):
                raise ImageError(f"Invalid format name: '{self._base_format}'")
            if self._base is not None and self._base_format is None:
                self._fail("backing format must be specified")
            if len(os.fsencode(self._base or "")) > _MAX_NAME_BYTES:
                self._fail(os.strerror(errno.EINVAL))
            if not self._unsafe:
                try:
                    await self._copy(node, sources, JobControl(progress))
                except CopyError as exc:
                    if exc.action != "writing":
                        raise
                    raise ImageError(
                        f"Error while writing to COW image: {exc.reason}"
                    ) from None
            await self._change_header(node)
            progress.show(100)
        return 0

    async def _copy(
        self, node: Node, sources: ImageArguments, control: JobControl
    ) -> None:
        """Copy what the new backing image has otherwise."""
        if self._base is None:
            await rebase(node, None, control, compressed=self._compressed)
            return
        path = backing_path(node.filename, self._base)
        above = overlay_of(node, self._base)
        if above is not None:
            await rebase(
                node,
                above.backing,
                control,
                shared=above.backing,
                compressed=self._compressed,
            )
            return
        try:
            backing = await open_node(
                path,
                sources,
                format_=self._base_format,
                secret=getattr(node.driver, "secret", None),
                # An image that is its own backing file is refused by its own locks.
                raw_role=FileRole.IMAGE
                if identity_of(path) == identity_of(node.filename)
                else FileRole.PLAIN,
            )
        except ImageError as exc:
            text = str(exc).removeprefix(f"Could not open '{path}': ")
            raise ImageError(
                f"Could not open new backing file '{self._base}': {text}"
            ) from None
        try:
            await rebase(node, backing, control, compressed=self._compressed)
        finally:
            await backing.close()

    async def _change_header(self, node: Node) -> None:
        driver: Any = node.driver
        format_ = None if self._base is None else self._base_format
        try:
            await driver.change_backing_file(self._base, format_)
        except NotSupported:
            self._fail("Operation not supported")
        except BlockError as exc:
            if exc.errno == errno.ENOSPC:
                self._fail("No space left in the file header")
            self._fail(os.strerror(exc.errno or errno.EIO))

    def _fail(self, reason: str) -> NoReturn:
        raise ImageError(
            f"Could not change the backing file to '{self._shown}': {reason}"
        )

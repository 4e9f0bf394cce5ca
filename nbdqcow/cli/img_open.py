"""Opening images for commands that need no event loop."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from nbdqcow.block.filter_names import innermost, is_filtered
from nbdqcow.block.image_options import (
    NO_FILE_NAME,
    NO_OPTIONS,
    UnknownOption,
    not_supported,
    parse_json_name,
)
from nbdqcow.block.json_options import JSON_PREFIX
from nbdqcow.block.registry import (
    PROBE_LENGTH,
    RoleFinder,
    blocking_file,
    check_place,
    data_file_name,
    format_tool,
    is_remote,
    probe_format,
    role_of_data_file,
    unmistakable_path,
)
from nbdqcow.block.steps import BlockingFile
from nbdqcow.block.storage import FileRole
from nbdqcow.block.tools import FormatTool, ImageInfo
from nbdqcow.cli.img_names import ImageName
from nbdqcow.errors import ImageError, ImageInUse


class OpenImage(NamedTuple):
    """One image file that is open, its format known; no backing file.

    ``data_file`` is the external data file that the options name, or None.
    """

    filename: str
    file: BlockingFile
    tool: FormatTool
    data_file: str | None = None


@contextmanager
def open_image_file(
    filename: str,
    format_: str | None,
    *,
    read_only: bool = True,
    force_share: bool = False,
    raw_role: FileRole = FileRole.PLAIN,
    pairs: Mapping[str, object] = NO_OPTIONS,
    reads_data: bool = True,
) -> Iterator[OpenImage]:
    """Open one image file and tell its format. Raises `ImageError`.

    ``raw_role``: what the file of a raw image is; ``pairs``: its options, of which
    those count that make it part of a file; ``reads_data``: not only what the
    metadata say is wanted.

    The messages start with what is wrong, not with "Could not open": the
    caller knows how to call the image.
    """
    data_file = None
    if filename.startswith(JSON_PREFIX):
        filename, options = parse_json_name(filename)
        format_ = format_ or options.get("format")
        data_file = options.get("driver_options", {}).get("data_file")
    remote = bool(filename) and is_remote(filename)
    path = filename if remote else local_path(filename)
    if not path:
        raise ImageError(NO_FILE_NAME)
    check_place(format_, filename)
    tool = None if format_ is None else format_tool(format_)
    finder = RoleFinder(format_, raw_role, pairs)
    file: BlockingFile
    try:
        if remote:
            # Not above: it brings the event loop.
            from nbdqcow.cli.img_remote import RemoteFile

            file = RemoteFile.open(path, read_only=read_only, force_share=force_share)
        else:
            file = blocking_file().open(
                path,
                read_only=read_only,
                force_share=force_share,
                role=finder,
                reads_data=reads_data,
            )
    except OSError as exc:
        raise ImageError(f"Could not open '{path}': {exc.strerror}") from None
    except ImageError as exc:
        # The caller says that much itself.
        text = str(exc).removeprefix(f"Could not open '{path}': ")
        if isinstance(exc, ImageInUse):
            finder.mark(exc)
        raise exc.with_text(text) from None
    try:
        if tool is None and finder.format is not None:
            # What was locked for one format is not opened as another.
            tool = format_tool(finder.format)
        elif tool is None:
            try:
                head = bytes(file.pread(0, min(PROBE_LENGTH, file.length)))
            except OSError as exc:
                raise ImageError(
                    f"Could not read image for determining its format: {exc.strerror}"
                ) from None
            tool = format_tool(probe_format(head))
        yield OpenImage(path, file, tool, data_file)
    finally:
        file.close()


def reason_of_refusal(exc: Exception) -> str:
    """Return why the options of an image are refused. Which format has no such option
    is only known of a file that is there, if they don't name it."""
    if not isinstance(exc, UnknownOption) or exc.filename is None:
        return str(exc)
    try:
        with open_image_file(exc.filename, None, force_share=True) as image:
            return not_supported(image.tool.name, exc.key)
    except ImageError as error:
        return str(error)


def identity_of(filename: str) -> object:
    """Return what is the same for all names of one image: links to a file, and
    other paths to it, are names, too. A file that is not there is its name."""
    try:
        if filename.startswith(JSON_PREFIX):
            filename, _ = parse_json_name(filename)
        if is_filtered(filename):
            filename = innermost(filename)
        if filename and not is_remote(filename):
            status = os.stat(local_path(filename))
            return status.st_dev, status.st_ino
    except (ImageError, OSError, ValueError):
        # Whoever opens it says what is wrong.
        pass
    return filename


def local_path(filename: str) -> str:
    """Return the path that ``filename`` names: ``file:`` may stand before it.

    Raises `ImageError` for other protocols, by name.
    """
    if not filename:
        raise ImageError(NO_FILE_NAME)
    protocol, colon, rest = filename.partition(":")
    if not colon or "/" in protocol:
        return filename
    if protocol != "file":
        raise ImageError(f"Unknown protocol '{protocol}'")
    return unmistakable_path(rest)


def backing_path(filename: str, backing_filename: str) -> str:
    """Return where a backing file named in ``filename`` is looked for."""
    protocol, colon, _ = backing_filename.partition(":")
    if colon and "/" not in protocol:
        return backing_filename
    return os.path.join(os.path.dirname(innermost(filename)), backing_filename)


def describe_chain(
    image: ImageName, *, whole_chain: bool = True
) -> Iterator[tuple[OpenImage, ImageInfo]]:
    """Yield an image and what it says of itself, then its backing files.

    Each is open only until the next one is asked for. Raises `ImageError`
    with the whole message.
    """
    seen: set[object] = set()
    name: str | None = image.filename
    text, format_, pairs = image.text, image.format, image.pairs
    while name is not None:
        identity = identity_of(name)
        if identity in seen:
            raise ImageError(f"Backing file '{name}' creates an infinite loop.")
        seen.add(identity)
        try:
            with open_image_file(
                name,
                format_,
                force_share=image.force_share,
                pairs=pairs,
                reads_data=False,
            ) as opened:
                info = opened.tool.describe(opened.file)
                yield opened, info
        except ImageError as exc:
            raise exc.with_text(f"Could not open '{text}': {exc}") from None
        if not whole_chain or info.backing_filename is None:
            return
        format_, pairs = info.backing_format, NO_OPTIONS
        name = text = backing_path(opened.filename, info.backing_filename)


def check_backing_chain(
    image: OpenImage,
    info: ImageInfo,
    *,
    force_share: bool = False,
    data_file: str | None = None,
    raw_role: FileRole = FileRole.PLAIN,
    reads_data: bool = True,
    read_only: bool = True,
) -> None:
    """See that the data file and every backing file, with theirs, can be opened.

    ``data_file`` takes the place of the one that the image names, and is to be
    written to unless ``read_only``; for the rest see `open_image_file`. Raises
    `ImageError`.
    """

    def check_data_file(
        image: OpenImage, info: ImageInfo, given: str | None, *, read_only: bool
    ) -> None:
        if info.data_filename is not None:
            with open_image_file(
                _find_data_file(image, info.data_filename, given),
                "raw",
                read_only=read_only,
                force_share=force_share,
                raw_role=role_of_data_file(raw_role),
                reads_data=reads_data,
            ):
                pass

    check_data_file(image, info, data_file, read_only=read_only)
    above = image.filename
    seen = {identity_of(above)}
    prefix = ""
    while info.backing_filename is not None:
        prefix += "Could not open backing file: "
        name = backing_path(above, info.backing_filename)
        identity = identity_of(name)
        if identity in seen:
            raise ImageError(f"{prefix}Backing file '{name}' creates an infinite loop.")
        seen.add(identity)
        try:
            with open_image_file(
                name,
                info.backing_format,
                force_share=force_share,
                raw_role=raw_role,
                reads_data=reads_data,
            ) as below:
                info = below.tool.describe(below.file)
                check_data_file(below, info, None, read_only=True)
                above = below.filename
        except ImageError as exc:
            if isinstance(exc, ImageInUse) and exc.is_of_raw:
                raise
            raise exc.with_text(f"{prefix}{exc}") from None


def _find_data_file(image: OpenImage, name_in_image: str, given: str | None) -> str:
    """Return where the external data file of an image is. Raises `ImageError`."""
    name = given or image.data_file
    if name is None:
        if not name_in_image:
            raise ImageError("'data-file' is required for this image")
        name = backing_path(image.filename, data_file_name(name_in_image))
    return name

"""Opening images: the one gate through which files come in.

Backing files are found as QEMU finds them: relative to the directory of the
image that names them.
"""

import asyncio
import os
import stat
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, NamedTuple

from nbdqcow.block.driver import FormatDriver
from nbdqcow.block.filter_names import (
    children_of,
    innermost,
    is_filtered,
    is_window,
    parse_filtered_name,
)
from nbdqcow.block.image_options import (
    NO_OPTIONS,
    BackingOverride,
    parse_json_name,
    parse_pairs,
)
from nbdqcow.block.json_options import JSON_PREFIX
from nbdqcow.block.node import Node
from nbdqcow.block.registry import (
    LAYER,
    PROBE_LENGTH,
    RoleFinder,
    check_place,
    data_file_name,
    filter_driver,
    format_driver,
    is_remote,
    probe_format,
    role_of_data_file,
    split_protocol,
    storage_driver,
)
from nbdqcow.block.storage import FileRole, RoleOf, StorageDriver
from nbdqcow.block.tools import Secrets, no_secrets
from nbdqcow.errors import ImageError, ImageInUse
from nbdqcow.units import MiB

MAX_CHAIN_DEPTH: Final = 256
_MAX_CONFIG_LENGTH: Final = MiB


class OpenOptions(NamedTuple):
    """How an image is opened. Sizes are bytes.

    Attributes:
        format: the driver's name; None probes, which is only for images that
            no guest could have written.
        cache: one of `CACHE_MODES`, with QEMU's meanings.
        discard: ``unmap`` gives discarded space back, ``ignore`` does nothing.
        detect_zeroes: ``off``, ``on`` or ``unmap``.
        l2_cache_size: of each image of the chain; None for the default.
        allowed_paths: directories and files that backing files may come
            from, symbolic links resolved; None for any.
        lock: False opens without image locks (QEMU's ``locking=off``).
        force_share: opens read-only beside a writer (QEMU's ``-U``).
        backing: what to open in the place of the backing file that the image
            names; None for that one.
        with_backing: False opens the image alone: what it does not have reads
            as zeroes. For work on its metadata.
        driver_options: for the format driver of the image itself, as its
            class describes them; ``data_file``, the path of its external data
            file, comes before the one that the image names.
        secrets: how a name of many options finds the passphrase whose id it
            gives.
        images_name_filters: whether a file that an image names may be one with
            a filter over it, such as ``blkdebug``.
        raw_role: what the file of a raw image is. With `FileRole.PLAIN` other
            programs may write to it meanwhile, as QEMU lets them.
        resizes: the image is to be given another size.
        compresses: what is written to it is stored compressed.
    """

    format: str | None = None
    read_only: bool = False
    cache: str = "writeback"
    discard: str = "unmap"
    detect_zeroes: str = "off"
    l2_cache_size: int | None = None
    allowed_paths: Sequence[str] | None = None
    lock: bool = True
    force_share: bool = False
    driver_options: Mapping[str, Any] = NO_OPTIONS
    with_backing: bool = True
    backing: BackingOverride | None = None
    secrets: Secrets = no_secrets
    images_name_filters: bool = False
    raw_role: FileRole = FileRole.IMAGE
    resizes: bool = False
    compresses: bool = False


class Opening:
    """What `open_image` returns: await it, or use it in ``async with``."""

    def __init__(self, filename: str, options: OpenOptions) -> None:
        self._filename = filename
        self._options = options
        self._node: Node | None = None

    def __await__(self) -> Generator[object, None, Node]:
        return _open_chain(self._filename, self._options, ()).__await__()

    async def __aenter__(self) -> Node:
        self._node = await self
        return self._node

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._node is not None
        await self._node.close()


def open_image(
    filename: str | os.PathLike[str],
    *,
    format: str | None = None,
    read_only: bool = False,
    cache: str = "writeback",
    discard: str = "unmap",
    detect_zeroes: str = "off",
    l2_cache_size: int | None = None,
    allowed_paths: Sequence[str] | None = None,
    lock: bool = True,
    force_share: bool = False,
    driver_options: Mapping[str, Any] | None = None,
    with_backing: bool = True,
    backing: BackingOverride | None = None,
    secrets: Secrets = no_secrets,
    images_name_filters: bool = False,
    raw_role: FileRole = FileRole.IMAGE,
    resizes: bool = False,
    compresses: bool = False,
) -> Opening:
    """Open an image with its backing chain; see `OpenOptions`.

    ``filename`` is a path, perhaps after ``file:``, the URI of an NBD export,
    or ``json:{...}`` with options as QEMU names them, which come before those
    given here, but for the format. ``blkdebug:CONFIG:FILE`` is a file that fails by
    rules.
    Use ``async with open_image(...) as node`` or ``node = await
    open_image(...)`` and close the node. Raises `ImageError` (`ImageInUse`
    for a locked one) and `OSError`.
    """
    return Opening(
        os.fspath(filename),
        OpenOptions(
            format, read_only, cache, discard, detect_zeroes, l2_cache_size,
            allowed_paths, lock, force_share, driver_options or {}, with_backing,
            backing, secrets, images_name_filters, raw_role, resizes,
            compresses,
        ),
    )  # fmt: skip


async def _open_chain(
    filename: str, options: OpenOptions, above: tuple[str, ...]
) -> Node:
    """Open ``filename`` and what it is backed by; ``above`` are the real
    paths of the overlays that led here."""
    if filename.startswith(JSON_PREFIX):
        filename, given = _parse_json_name(filename, options.format)
        options = _with_given(options, given)
    real = _real_path(filename)
    if real in above:
        raise ImageError(f"Backing chain of '{above[0]}' loops at '{filename}'")
    if len(above) >= MAX_CHAIN_DEPTH:
        raise ImageError(f"Backing chain of '{above[0]}' is too deep")
    check_place(options.format, filename)
    finder = RoleFinder(options.format, options.raw_role, options.driver_options)
    try:
        storage = await open_storage(filename, options, role=finder, above=above)
    except ImageInUse as error:
        finder.mark(error)
        raise
    guessed = options.format is None
    # What was locked for one format is not opened as another.
    options = options._replace(format=finder.format)
    try:
        driver = await _open_driver(filename, storage, options, (*above, real))
    except BaseException:
        await storage.close()
        raise
    try:
        backing = await _open_backing(filename, driver, options, (*above, real))
    except BaseException:
        await _close_unused(driver)
        raise
    kind = Node
    if options.compresses:
        # Not above: hardly anybody asks for it.
        from nbdqcow.block.compressing import CompressingNode as kind
    return kind(
        driver,
        filename=filename,
        backing=backing,
        writethrough=options.cache in ("writethrough", "directsync"),
        unsafe=options.cache == "unsafe",
        discard=options.discard == "unmap",
        detect_zeroes=options.detect_zeroes,
        guard=_looks_formatted if guessed and driver.name == "raw" else None,
    )


def _looks_formatted(head: bytes) -> bool:
    return probe_format(head) != "raw"


async def open_storage(
    filename: str,
    options: OpenOptions,
    *,
    role: FileRole | RoleOf = FileRole.IMAGE,
    above: tuple[str, ...] = (),
) -> StorageDriver:
    """Open the file under an image: a path, perhaps after ``file:``, or the
    URI of an NBD export, perhaps with filters over it. ``above``: the real
    paths of the images that led here."""
    if is_filtered(filename):
        return await _open_filtered(filename, options, above)
    protocol, name = split_protocol(filename)
    storage: StorageDriver
    if protocol != "file":
        storage = await storage_driver(protocol).open(name, read_only=options.read_only)
        return storage
    storage = await storage_driver("file").open(
        name,
        read_only=options.read_only,
        cache={"writethrough": "writeback", "directsync": "none"}.get(
            options.cache, options.cache
        ),
        # What a guest discards stops at the node; what a format frees does not.
        discard="unmap",
        locking=options.lock,
        shared=options.force_share,
        role=role,
        resizes=options.resizes,
    )
    return storage


async def _open_filtered(
    filename: str, options: OpenOptions, above: tuple[str, ...]
) -> StorageDriver:
    """Open what is below a filter, and put it over that. Raises `ImageError`."""
    innermost(filename)
    named = parse_filtered_name(filename)
    if named.driver == LAYER:
        return await _open_child(named.children["image"], options, above, False)
    config = b"" if named.config is None else await _read_config(named.config)
    below: list[StorageDriver] = []
    try:
        for name, child in named.children.items():
            # What is verified is an image of any format, as in QEMU.
            probes = name == "test"
            # One by one: those that are open are closed if the next can't be.
            below.append(await _open_child(child, options, above, probes))
        kind = filter_driver(named.driver)
        storage: StorageDriver = kind(
            *below, pairs=named.options, filename=filename, config=config
        )
    except BaseException:
        for file in below:
            await file.close()
        raise
    return storage


async def _open_child(
    pairs: Mapping[str, str],
    options: OpenOptions,
    above: tuple[str, ...],
    probes: bool,
) -> StorageDriver:
    """Open a file below a filter: bytes, or an image with all that is below it.

    ``probes``: without a format it is one that is to be found out.
    """
    name, given = parse_pairs(pairs)
    plain = options._replace(
        format=None, driver_options={}, detect_zeroes="off", backing=None,
        compresses=False,
    )  # fmt: skip
    below = _with_given(plain, given)
    plain_formats = ("raw",) if probes else (None, "raw")
    if below.format in plain_formats and not below.driver_options:
        try:
            return await open_storage(name, below, above=above)
        except OSError as error:
            raise ImageError(f"Could not open '{name}': {error.strerror}") from None
    # Not above: most images have no filter over their format.
    from nbdqcow.block.node_storage import NodeStorage

    return NodeStorage(await _open_chain(name, below, above))


async def _read_config(path: str) -> bytes:
    """Return what a filter's configuration file has. Raises `ImageError`."""
    try:
        return await asyncio.to_thread(_read_config_blocking, path)
    except OSError as error:
        raise ImageError(
            f"Could not read blkdebug config file: {error.strerror}"
        ) from None


def _read_config_blocking(path: str) -> bytes:
    # Whoever opens a FIFO without the flag may wait for ever.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if path == os.devnull:
            return b""
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ImageError(f"'{path}' is no regular file")
        return os.pread(fd, _MAX_CONFIG_LENGTH, 0)
    finally:
        os.close(fd)


async def _open_driver(
    filename: str, storage: StorageDriver, options: OpenOptions, above: tuple[str, ...]
) -> FormatDriver:
    name = options.format
    if name is None:
        head = await storage.pread(0, min(PROBE_LENGTH, storage.length))
        name = probe_format(bytes(head))
    given = options.driver_options.get("data_file")

    async def open_data_file(name_in_image: str | None) -> StorageDriver:
        return await _open_data_file(filename, given, name_in_image, options, above)

    kind = format_driver(name)
    if options.driver_options.get("snapshot") is not None and not kind.shows_snapshots:
        raise ImageError(
            f"Block format '{name}' does not support temporarily loading internal"
            " snapshots"
        )
    try:
        driver: FormatDriver = await kind.open(
            storage,
            read_only=options.read_only,
            options={
                "l2_cache_size": options.l2_cache_size,
                "discard": options.discard == "unmap",
                **options.driver_options,
                "open_data_file": open_data_file,
            },
        )
    except ImageError as error:
        raise type(error)(f"Could not open '{filename}': {error}") from None
    if given is not None and driver.data_file is None:
        await _close_unused(driver)
        raise ImageError(
            f"Could not open '{filename}': 'data-file' can only be set for images with"
            f" an external data file"
        )
    return driver


async def _close_unused(driver: FormatDriver) -> None:
    """Close an image that is not to be opened after all, for a reason of which its
    user is told. Its bitmaps are in use on disk by now, if it was for writing."""
    try:
        with suppress(OSError, ImageError):
            await driver.close()
    finally:
        await driver.close_files()


async def _open_data_file(
    filename: str,
    given: str | None,
    name_in_image: str | None,
    options: OpenOptions,
    above: tuple[str, ...],
) -> StorageDriver:
    """Open the external data file of the image ``filename``: the one ``given``
    by who opens it, or the one that the image names.

    ``above`` are the real paths of this image and of its overlays. Raises
    `ImageError`.
    """
    if given is None and name_in_image is None:
        raise ImageError("'data-file' is required for this image")
    if given is not None:
        path = given
    else:
        assert name_in_image is not None
        path = backing_path(filename, data_file_name(name_in_image))
        _check_named(path, options)
    role = role_of_data_file(options.raw_role)
    if _real_path(path) in above:
        raise ImageError(f"'{path}' can't be the data file: it is the image itself")
    try:
        return await open_storage(path, options, role=role, above=above)
    except OSError as error:
        raise ImageError(f"Could not open '{path}': {error.strerror}") from None


async def _open_backing(
    filename: str, driver: FormatDriver, options: OpenOptions, above: tuple[str, ...]
) -> Node | None:
    wanted = options.backing or BackingOverride()
    below = options._replace(
        format=driver.backing_format,
        detect_zeroes="off",
        driver_options=_passed_down(options.driver_options),
        backing=None,
        resizes=False,
        compresses=False,
    )
    if options.raw_role is FileRole.KEYS:
        # What an image is backed by keeps its own.
        below = below._replace(raw_role=FileRole.PLAIN)
    if wanted.none or not options.with_backing:
        return None
    if wanted.filename is not None:
        path = wanted.filename
        below = below._replace(format=None)
        if driver.backing_filename is None:
            # What is discarded must not show what is there now.
            driver.backing_filename = path
    elif driver.backing_filename is not None:
        name = driver.backing_filename
        if name.startswith(JSON_PREFIX):
            path, given = _parse_json_name(name)
            _check_names_allowed(path, given, options)
            below = _with_given(below, given)
        else:
            path = backing_path(filename, name)
            _check_named(path, options)
    else:
        return None
    below = _with_given(below, wanted.options)._replace(read_only=True)
    try:
        return await _open_chain(path, below, above)
    except (ImageError, OSError) as error:
        if isinstance(error, ImageInUse) and error.is_of_raw:
            raise
        text = error.strerror if isinstance(error, OSError) else str(error)
        prefix = f"Could not open '{path}': "
        if isinstance(error, OSError) or not str(error).startswith("Could not open"):
            text = f"{prefix}{text}"
        kind = type(error) if isinstance(error, ImageError) else ImageError
        raise kind(f"Could not open backing file: {text}") from None


def _parse_json_name(
    name: str, format_: str | None = None
) -> tuple[str, dict[str, Any]]:
    try:
        return parse_json_name(name, format_)
    except ImageError as error:
        raise ImageError(f"Could not open '{name}': {error}") from None


def _with_given(options: OpenOptions, given: Mapping[str, Any]) -> OpenOptions:
    """Return ``options`` with those that a name gives in their place."""
    more = {**options.driver_options, **given.get("driver_options", {})}
    changes = {**given, "driver_options": more}
    if (key := changes.pop("key_secret", None)) is not None:
        more["secret"] = options.secrets(key)
    return options._replace(**changes)


def _check_names_allowed(
    path: str, given: Mapping[str, Any], options: OpenOptions
) -> None:
    """Check all files that a ``json:`` name in an image's header names."""
    _check_named(path, options)
    data_file = given.get("driver_options", {}).get("data_file")
    if data_file is not None:
        _check_named(data_file, options)
    below: BackingOverride | None = given.get("backing")
    if below is not None and below.filename is not None:
        _check_names_allowed(below.filename, below.options, options)


def _check_named(path: str, options: OpenOptions) -> None:
    """Check a file that an image names. Raises `ImageError`."""
    if not is_filtered(path):
        check_allowed(path, options.allowed_paths)
        return
    if not (options.images_name_filters or is_window(path)):
        raise ImageError(
            f"'{path}': an image can't name a file with the filter "
            f"'{path.partition(':')[0]}' over it"
        )
    innermost(path)
    if (config := parse_filtered_name(path).config) is not None:
        check_allowed(f"file:{config}", options.allowed_paths)
    for child in children_of(path):
        _check_names_allowed(*parse_pairs(child), options)


def _passed_down(driver_options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what backing images are opened with as well: the passphrase, for
    the overlay of an encrypted image is mostly encrypted alike, and what may be
    kept, for what is compressed is mostly below."""
    passed = ("secret", "compressed_cache_size")
    return {k: v for k, v in driver_options.items() if k in passed}


def backing_path(image_filename: str, backing_filename: str) -> str:
    """Return the path of a backing file that an image names.

    Raises `ImageError` for a path that is relative to no directory.
    """
    protocol, colon, rest = backing_filename.partition(":")
    if colon and protocol == "file" and "/" not in protocol:
        backing_filename = rest
    elif colon and "/" not in protocol:
        return backing_filename
    image_filename = innermost(image_filename)
    if not backing_filename.startswith("/") and is_remote(image_filename):
        raise ImageError(
            f"'{backing_filename}' is a relative path, and '{image_filename}' is in "
            f"no directory"
        )
    return os.path.join(os.path.dirname(image_filename), backing_filename)


def _real_path(filename: str) -> str:
    filename = innermost(filename)
    return filename if is_remote(filename) else os.path.realpath(filename)


def check_allowed(path: str, allowed_paths: Sequence[str] | None) -> None:
    """Refuse a path outside ``allowed_paths``. Raises `ImageError`.

    An export of an NBD server is allowed by its very name.
    """
    if allowed_paths is None:
        return
    if is_remote(path):
        if path in allowed_paths:
            return
        raise ImageError(f"'{path}' is outside the allowed paths")
    real = os.path.realpath(split_protocol(path)[1])
    for allowed in map(os.path.realpath, allowed_paths):
        if real == allowed or real.startswith(allowed.rstrip("/") + "/"):
            return
    raise ImageError(f"'{path}' is outside the allowed paths")

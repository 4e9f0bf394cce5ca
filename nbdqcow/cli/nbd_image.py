"""The image of ``nbdqcow-nbd``, opened as its options say, with qemu-nbd's words."""

import contextlib
from typing import TYPE_CHECKING, Any, NoReturn

from nbdqcow.block.image_options import NO_FILE_NAME, parse_json_name
from nbdqcow.block.json_options import JSON_PREFIX
from nbdqcow.block.node import Node
from nbdqcow.block.registry import format_driver
from nbdqcow.block.storage import FileRole
from nbdqcow.cli.images import open_node
from nbdqcow.cli.nbd_options import Settings
from nbdqcow.crypto.secrets import PassphraseRequired
from nbdqcow.errors import CredentialsError, ImageError, UsageError

if TYPE_CHECKING:
    from nbdqcow.cli.objects import Objects

_NO_SNAPSHOT = "Can't find snapshot"


async def open_served(settings: Settings, objects: "Objects") -> Node:
    """Open what is to be served. Raises `ImageError` and `UsageError`."""
    filename, options = _take_options(settings, objects)
    offset = settings.open_options.get("driver_options", {}).get("offset", 0)
    read_only = options.get("read_only", False)
    throwaway = settings.throwaway and not read_only
    if settings.snapshot is not None or throwaway:
        options["read_only"] = True
    if options.get("read_only", False):
        # Others may write to a raw image that is only read, as with qemu-nbd; what is
        # mapped of the file must stay.
        options["raw_role"] = FileRole.DATA
    try:
        node = await open_node(filename, **options)
    except ImageError as exc:
        _raise_as_qemu(settings, filename, exc)
    try:
        if node.read_only and not options.get("read_only", False):
            # By a ``json:`` name: it says what -r is for.
            _fail(settings.filename, "Block node is read-only")
        if settings.throwaway and settings.snapshot is not None:
            # The file that takes the writes has no snapshots.
            raise ImageError(f"Failed to load snapshot: {_NO_SNAPSHOT}")
        if offset and node.format_name != "raw":
            # A raw image has been opened so already.
            node = await _open_window(node, offset)
        if throwaway:
            from nbdqcow.cli.throwaway import open_throwaway

            node = await open_throwaway(node, options.get("detect_zeroes", "off"))
        return node
    except BaseException:
        await node.close()
        raise


def _take_options(settings: Settings, objects: "Objects") -> tuple[str, dict[str, Any]]:
    """Return the file and the options of `open_node` that are asked for."""
    name = filename = settings.filename
    options: dict[str, Any] = {"discard": "ignore"}
    options |= settings.open_options
    # As qemu-nbd has it: clients and tools are shown that these were written.
    options["driver_options"] = {
        **options.get("driver_options", {}),
        "explicit_zeroes": True,
    }
    if (format_ := options.get("format")) is not None:
        try:
            # Before anything is opened.
            format_driver(format_)
        except ImageError as exc:
            _fail(name, str(exc))
    options["secrets"] = lambda name: objects.secret(name).encode()
    if settings.image_opts:
        from nbdqcow.block.image_options import parse_pairs
        from nbdqcow.cli.image_tls import with_credentials
        from nbdqcow.cli.option_text import parse_keyval
        from nbdqcow.crypto.secrets import Secret

        try:
            filename, given = parse_pairs(parse_keyval(name))
            filename = with_credentials(filename, objects)
        except (ImageError, CredentialsError) as exc:
            _fail(name, str(exc))
        if given.get("read_only", False) and not options.get("read_only", False):
            _fail(name, "Block node is read-only")
        driver_options = options["driver_options"] | given.pop("driver_options", {})
        options |= given | {"read_only": options.get("read_only", False)}
        options["driver_options"] = driver_options
        if (key_id := options.pop("key_secret", None)) is not None:
            try:
                secret = Secret(objects.secret(key_id).encode())
            except UsageError as exc:
                _fail(name, str(exc))
            driver_options["secret"] = secret
    elif not filename.removeprefix("file:"):
        _fail(name, NO_FILE_NAME)
    if settings.native_aio and options.get("cache") not in ("none", "directsync"):
        _fail(
            name,
            "aio=native was specified, but it requires cache.direct=on, which was"
            " not specified.",
        )
    if settings.snapshot is not None:
        options["driver_options"] = {
            **options.get("driver_options", {}),
            "snapshot": settings.snapshot,
        }
    return filename, options


async def _open_window(node: Node, offset: int) -> Node:
    """Return what is behind ``offset`` in a disk, as a disk. Raises `ImageError`."""
    from nbdqcow.block.node_storage import NodeStorage

    driver = await format_driver("raw").open(
        NodeStorage(node), read_only=node.read_only, options={"offset": offset}
    )
    return Node(driver, filename=node.filename)


def _fail(name: str, reason: str) -> NoReturn:
    raise ImageError(f"Failed to blk_new_open '{name}': {reason}") from None


def _raise_as_qemu(settings: Settings, filename: str, exc: ImageError) -> NoReturn:
    """Raise why an image can't be opened, as qemu-nbd has it: the file is
    named a second time only if the file itself is what can't be opened."""
    opening = f"Could not open '{filename}': "
    reason = str(exc)
    if isinstance(exc.__cause__, OSError) and reason.startswith(
        f"{opening}Could not open '"
    ):
        # The file has another name, as with json: and file:.
        reason = reason.removeprefix(opening)
    elif not isinstance(exc.__cause__, OSError) or reason.startswith(
        f"{opening}Failed to connect to "
    ):
        reason = reason.removeprefix(opening)
        if filename.startswith(JSON_PREFIX):
            with contextlib.suppress(ImageError):
                # The file that it names: as with other names, once is enough.
                path, _ = parse_json_name(filename)
                reason = reason.removeprefix(f"Could not open '{path}': ")
    if settings.snapshot is not None:
        if reason.startswith("Can't find"):
            raise ImageError(f"Failed to load snapshot: {_NO_SNAPSHOT}") from None
        if (at := reason.find(" does not support temporarily loading")) >= 0:
            raise ImageError(
                f"Failed to load snapshot: {reason[:at]} used by device ''{reason[at:]}"
            ) from None
    if "o" in settings.given and reason.startswith("Offset ("):
        # qemu-nbd's window is a disk above the image.
        raise ImageError(reason) from None
    if isinstance(exc, PassphraseRequired):
        option = (
            "encrypt.key-secret" if "image is encrypted" in reason else "key-secret"
        )
        reason = f"Parameter '{option}' is required for cipher"
    _fail(settings.filename, reason)

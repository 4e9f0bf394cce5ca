"""Images as nodes, for the commands that read and write disks."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

from nbdqcow.block.image_options import NO_FILE_NAME, check_node_names, parse_pairs
from nbdqcow.block.node import Node
from nbdqcow.block.open import open_image
from nbdqcow.block.registry import is_remote
from nbdqcow.block.storage import FileRole
from nbdqcow.cli.img_names import (
    READ_ONLY,
    GivenObjects,
    check_force_share,
    pairs_of,
    shown_format,
)
from nbdqcow.cli.img_open import check_backing_chain, open_image_file, reason_of_refusal
from nbdqcow.cli.messages import warn_of_guess
from nbdqcow.crypto.secrets import PassphraseRequired, Secret
from nbdqcow.errors import ImageError, ImageInUse, NbdQcowError, UsageError

_NO_SNAPSHOTS: Final = "does not support temporarily loading"


@dataclass(slots=True)
class ImageArguments:
    """What commands are told about the images that they open.

    Attributes:
        format: ``-f``; None guesses.
        image_opts: names are options, ``--image-opts``.
        force_share: ``-U``.
        cache: ``-t`` or ``-T``.
        objects: ``--object``.
    """

    format: str | None = None
    image_opts: bool = False
    force_share: bool = False
    cache: str = "writeback"
    objects: GivenObjects = field(default_factory=GivenObjects)

    def take(self, name: str, value: str) -> bool:
        """Take an option that all commands have; False for any other.

        Raises `ImageError` for an object that can't be.
        """
        match name:
            case "-f":
                self.format = value
            case "-U":
                self.force_share = True
            case "--image-opts":
                self.image_opts = True
            case "--object":
                self.objects.add(value)
            case _:
                return False
        return True

    def shown_format(self, name: str, format_: str) -> str:
        """Return what messages call the format of the image ``name``."""
        pairs = pairs_of(name, image_opts=self.image_opts, warns=False) or {}
        return shown_format(format_, self.format, pairs.get("driver"))

    def check(self) -> None:
        """See that the options go together. Raises `ImageError`."""
        if self.image_opts and self.format is not None:
            raise ImageError("--image-opts and --format are mutually exclusive")

    def secret(self, name: str) -> bytes:
        """Return the passphrase of that id. Raises `ImageError`."""
        return self.objects.secret(name)


async def open_node(
    name: str,
    arguments: ImageArguments,
    *,
    writable: bool = False,
    format_: str | None = None,
    cache: str | None = None,
    snapshot: Any = None,
    shown: str | None = None,
    with_backing: bool = True,
    secret: "Secret | bytes | None" = None,
    explicit_zeroes: bool = False,
    warns: bool = True,
    raw_role: FileRole = FileRole.PLAIN,
    resizes: bool = False,
) -> Node:
    """Open an image with its backing chain.

    ``format_`` and ``cache`` go before those of ``arguments``; ``shown`` is
    what messages call it; ``with_backing``: see `OpenOptions`;
    ``secret`` opens it if it is encrypted, and ``name`` does not say what does;
    ``explicit_zeroes``: see the `Settings` of qcow2; ``warns`` of a raw image
    whose format is guessed; for ``raw_role`` and ``resizes`` see `OpenOptions`.
    Raises `ImageError` in qemu-img's words.
    """
    filename, options = _parse_name(name, arguments)
    filename = arguments.objects.with_credentials(filename, shown or name)
    if format_ is not None:
        options["format"] = format_
    elif arguments.format is not None:
        options["format"] = arguments.format
    options.setdefault("cache", cache or arguments.cache)
    opening = f"Could not open '{shown or name}': "
    force_share = options.pop("force_share", False) or arguments.force_share
    if force_share and writable:
        raise ImageError(
            f"{opening}force-share=on can only be used with read-only images"
        )
    driver_options: dict[str, Any] = {} if secret is None else {"secret": secret}
    driver_options |= options.pop("driver_options", {})
    if explicit_zeroes:
        driver_options["explicit_zeroes"] = True
    try:
        if (key := options.pop("key_secret", None)) is not None:
            driver_options["secret"] = arguments.secret(key)
        if snapshot is not None:
            driver_options["snapshot"] = snapshot
        options["read_only"] = options.get("read_only", False) or not writable
        node = await open_image(
            filename,
            force_share=force_share,
            driver_options=driver_options,
            with_backing=with_backing,
            secrets=arguments.secret,
            # As with QEMU's: these serve nobody.
            images_name_filters=True,
            raw_role=raw_role,
            resizes=resizes,
            **options,
        )
    except (ImageError, OSError) as exc:
        if isinstance(exc, ImageInUse) and writable and warns:
            own = f"[{filename.removeprefix('file:')}]" in str(exc)
            if own and exc.is_of_raw and options.get("format") is None:
                warn_of_guess(filename)
        if snapshot is not None and (failure := _snapshot_failure(str(exc))):
            raise ImageError(f"Failed to load snapshot: {failure}") from None
        if not is_remote(filename):
            _explain(
                filename, options, opening, writable, raw_role, force_share=force_share
            )
        inner = None if filename == name else filename
        raise _in_qemus_words(exc, opening, inner) from None
    if writable and options["read_only"]:
        # Its options say so.
        await node.close()
        raise ImageError(opening + READ_ONLY)
    guessed = options.get("format") is None and node.driver.name == "raw"
    if writable and warns and guessed:
        warn_of_guess(filename)
    return node


def _snapshot_failure(text: str) -> str | None:
    """Return why a snapshot can't be shown, in qemu-img's words, if that is what
    ``text`` says of an image that could not be opened."""
    if "Can't find" in text:
        return "Can't find snapshot"
    if (at := text.find("Snapshot L1 table")) >= 0:
        return text[at:]
    if (at := text.find(_NO_SNAPSHOTS)) >= 0:
        format_name = text[:at].rpartition("Block format ")[2].rstrip()
        return f"Block format {format_name} used by device '' {text[at:]}"
    return None


def _in_qemus_words(
    exc: ImageError | OSError, opening: str, inner: str | None
) -> ImageError:
    """Return what qemu-img would say of an image that could not be opened: behind
    ``opening``, and once. ``inner`` is the file's name if that is not the image's."""
    text = str(exc) if isinstance(exc, ImageError) else exc.strerror or str(exc)
    if inner is not None:
        text = text.removeprefix(f"Could not open '{inner}': ")
    if isinstance(exc, PassphraseRequired):
        before, what, _ = text.rpartition("the image is encrypted")
        option = "encrypt.key-secret"
        if not what:
            before, _, _ = text.rpartition("the disk is encrypted")
            option = "key-secret"
        text = f"{before}Parameter '{option}' is required for cipher"
    if text.startswith(opening) and not isinstance(exc.__cause__, OSError):
        opening = ""
    error = exc if isinstance(exc, ImageError) else ImageError()
    return error.with_text(f"{opening}{text}")


def _explain(
    filename: str,
    options: Mapping[str, Any],
    opening: str,
    writable: bool,
    raw_role: FileRole,
    *,
    force_share: bool,
) -> None:
    """Raise what qemu-img would say of an image that could not be opened."""
    try:
        with open_image_file(
            filename,
            options.get("format"),
            read_only=not writable,
            force_share=force_share,
            raw_role=raw_role,
            pairs=options.get("driver_options", {}),
        ) as image:
            info = image.tool.describe(image.file)
            check_backing_chain(
                image,
                info,
                force_share=force_share,
                data_file=options.get("driver_options", {}).get("data_file"),
                raw_role=raw_role,
                read_only=not writable,
            )
    except ImageError as exc:
        raise exc.with_text(f"{opening}{exc}") from None


def _parse_name(name: str, arguments: ImageArguments) -> tuple[str, dict[str, Any]]:
    """Return the file and the options of `open_image` that ``name`` means."""
    try:
        pairs = pairs_of(name, image_opts=arguments.image_opts)
        given = None if pairs is None else parse_pairs(pairs)
        if pairs is not None:
            check_node_names(pairs, arguments.objects.node_names)
    except (ImageError, UsageError) as exc:
        reason = reason_of_refusal(exc)
        raise ImageError(f"Could not open '{name}': {reason}") from None
    if given is not None:
        if arguments.image_opts and arguments.force_share:
            check_force_share(given[1])
        return given
    if name in ("", "file:"):
        raise ImageError(f"Could not open '{name}': {NO_FILE_NAME}")
    try:
        is_remote(name)
    except ImageError as exc:
        raise ImageError(f"Could not open '{name}': {exc}") from None
    return name, {}


@asynccontextmanager
async def closing(node: Node) -> AsyncIterator[Node]:
    """Close ``node`` behind a block. If the block fails, why is what counts: that
    closing failed, too (a disk that is full still is), is not said."""
    try:
        yield node
    except BaseException:
        with suppress(NbdQcowError, OSError):
            await node.close()
        raise
    await node.close()


async def close_nodes(nodes: Sequence[Node]) -> None:
    """Close all of ``nodes``, whatever the closing of some may raise."""
    failure: Exception | None = None
    for node in nodes:
        try:
            await node.close()
        except Exception as exc:
            failure = failure or exc
    if failure is not None:
        raise failure

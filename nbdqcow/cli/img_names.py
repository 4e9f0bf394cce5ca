"""What a command line of ``nbdqcow-img`` says of an image and its secrets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbdqcow.block.tools import Secrets, no_secrets
from nbdqcow.errors import ImageError, UsageError


def take_secrets(objects: Sequence[str]) -> Secrets:
    """Return the secrets among the ``--object`` arguments.

    Raises `ImageError`, and `CredentialsError` for other objects.
    """
    if not objects:
        return no_secrets
    from nbdqcow.cli.objects import Objects

    try:
        found = Objects(objects)
    except UsageError as exc:
        # Without the hint at --help: the options are right.
        raise ImageError(str(exc)) from None

    def look_up(name: str) -> bytes:
        try:
            return found.secret(name).encode()
        except UsageError as exc:
            raise ImageError(str(exc)) from None

    return look_up


@dataclass(frozen=True, slots=True)
class ImageName:
    """An image as a command line names it.

    Attributes:
        text: the argument as it was given, for messages.
        key_id: the id of the secret that opens it, or None.
        shown: what ``info`` calls it, if not by its file name.
    """

    text: str
    filename: str
    format: str | None
    key_id: str | None = None
    shown: str | None = None


def image_name(text: str, format_: str | None, *, image_opts: bool) -> ImageName:
    """Return what an argument means: a file name, or with ``image_opts`` a set
    of options. Raises `UsageError` and `ImageError`."""
    if not image_opts:
        return ImageName(text, text, format_)
    if format_ is not None:
        raise ImageError("--image-opts and --format are mutually exclusive")
    from nbdqcow.cli.image_opts import parse_image_opts, parse_keyval

    try:
        filename, options = parse_image_opts(text)
    except UsageError as exc:
        # Without the hint at --help.
        reason = str(exc).removeprefix(f"'{text}': ")
        raise ImageError(f"Could not open '{text}': {reason}") from None
    return ImageName(
        text,
        filename,
        options.get("format"),
        options.get("key_secret"),
        _as_json(filename, parse_keyval(text)),
    )


def _as_json(filename: str, pairs: Mapping[str, str]) -> str | None:
    """Return the ``json:`` name that QEMU gives an image with options beside
    its format and its file; None for one without."""
    others: dict[str, Any] = {
        key: value
        for key, value in pairs.items()
        if key not in ("driver", "filename") and not key.startswith("file.")
    }
    behind = {"key-secret": others.pop("key-secret")} if "key-secret" in others else {}
    if not (others or behind):
        return None
    import json

    named = others | {
        "driver": pairs.get("driver", "raw"),
        "file": {"driver": "file", "filename": filename},
        **behind,
    }
    return "json:" + json.dumps(named)

"""What a command line of ``nbdqcow-img`` says of an image and its secrets."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from nbdqcow.block.image_options import JSON_PREFIX, json_pairs, parse_pairs
from nbdqcow.block.tools import Secrets, no_secrets
from nbdqcow.errors import CredentialsError, ImageError, UsageError

_IDENTIFYING: Final = ("encrypt.key-secret", "key-secret", "offset", "size")
"""Options without which an image would read otherwise; the others are about how
it is opened."""
_NUMBERS: Final = frozenset(("offset", "size"))
_ORDER: Final = (
    *("encrypt.key-secret", "offset", "driver", "size", "file", "key-secret"),
)


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


def with_credentials(named: "ImageName", objects: Sequence[str]) -> "ImageName":
    """Return an image's name with the certificates that it says by an object's id.

    ``objects`` are the ``--object`` arguments. Raises `ImageError`.
    """
    if "tls-creds=" not in named.filename:
        return named
    from nbdqcow.cli import image_tls
    from nbdqcow.cli.objects import Objects

    try:
        filename = image_tls.with_credentials(named.filename, Objects(objects))
    except (ImageError, CredentialsError) as exc:
        raise ImageError(f"Could not open '{named.text}': {exc}") from None
    return replace(named, filename=filename)


@dataclass(frozen=True, slots=True)
class ImageName:
    """An image as a command line names it.

    Attributes:
        text: the argument as it was given, for messages.
        key_id: the id of the secret that opens it, or None.
        pairs: the options that it is a set of.
    """

    text: str
    filename: str
    format: str | None
    key_id: str | None = None
    pairs: Mapping[str, str] = field(default_factory=dict)

    def as_json(self, format_: str) -> str | None:
        """Return the ``json:`` name that QEMU gives an image of that format if
        options make it another one than its file alone; None without any."""
        if self.pairs.keys().isdisjoint(_IDENTIFYING):
            return None
        import json

        pairs: dict[str, Any] = dict(self.pairs)
        if self.text.startswith(JSON_PREFIX):
            for key in pairs.keys() & _NUMBERS:
                with contextlib.suppress(ValueError):
                    pairs[key] = int(pairs[key])
        values: dict[str, Any] = {
            "driver": format_,
            **pairs,
            "file": {"driver": "file", "filename": self.filename},
        }
        return "json:" + json.dumps({k: values[k] for k in _ORDER if k in values})


def image_name(text: str, format_: str | None, *, image_opts: bool) -> ImageName:
    """Return what an argument means: a file name, or with ``image_opts`` a set
    of options. Raises `UsageError` and `ImageError`."""
    if not image_opts and text.startswith(JSON_PREFIX):
        try:
            pairs = json_pairs(text)
            filename, options = parse_pairs(pairs)
        except ImageError as exc:
            raise ImageError(f"Could not open '{text}': {exc}") from None
        return ImageName(
            text,
            filename,
            format_ or options.get("format"),
            options.get("key_secret"),
            {key: value for key, value in pairs.items() if value is not None},
        )
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
        parse_keyval(text),
    )

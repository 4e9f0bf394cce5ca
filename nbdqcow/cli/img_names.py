"""What a command line of ``nbdqcow-img`` says of an image and its secrets."""

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from nbdqcow.block.image_options import (
    FILE_DRIVERS,
    NO_OPTIONS,
    NULL_DRIVERS,
    check_node_names,
    parse_pairs,
)
from nbdqcow.block.json_options import JSON_PREFIX, Pairs, json_pairs
from nbdqcow.block.registry import is_remote
from nbdqcow.block.tools import no_secrets
from nbdqcow.cli.messages import error
from nbdqcow.errors import CredentialsError, ImageError, UsageError
from nbdqcow.units import BOOLEANS

if TYPE_CHECKING:
    from nbdqcow.cli.objects import Objects

_IDENTIFYING: Final = ("encrypt.key-secret", "key-secret", "offset", "size")
"""Options without which an image would read otherwise; the others are about how
it is opened."""
_IDENTIFYING_NULL: Final = ("size", "read-zeroes")
_NUMBERS: Final = frozenset(("offset", "size"))
_ORDER: Final = (
    *("read-zeroes", "encrypt.key-secret", "offset", "driver", "size"),
    *("file", "filename", "key-secret"),
)
_PROTOCOLS: Final = (*FILE_DRIVERS, *NULL_DRIVERS, "nbd")


READ_ONLY: Final = "Block node is read-only"
"""Of an image that is to be written to although its options forbid it."""


class GivenObjects:
    """The ``--object`` arguments of a command line, made as they come."""

    def __init__(self) -> None:
        self._made: Objects | None = None
        self.node_names: set[str] = set()
        """Those that the images of the command line have."""

    def add(self, text: str) -> None:
        """Make one. Raises `ImageError`, and `CredentialsError`."""
        if self._made is None:
            from nbdqcow.cli.objects import Objects

            self._made = Objects()
        try:
            self._made.add(text)
        except UsageError as exc:
            # Without the hint at --help: the options are right.
            raise ImageError(str(exc)) from None

    def secret(self, name: str) -> bytes:
        """Return the passphrase of that id. Raises `ImageError`."""
        if self._made is None:
            return no_secrets(name)
        try:
            return self._made.secret(name).encode()
        except UsageError as exc:
            raise ImageError(str(exc)) from None

    def image_name(
        self,
        text: str,
        format_: str | None,
        *,
        image_opts: bool,
        force_share: bool = False,
    ) -> "ImageName":
        """Return what an argument means, see `image_name`, with the credentials among
        these objects that it names. Raises `UsageError` and `ImageError`."""
        named = image_name(
            text, format_, image_opts=image_opts, force_share=force_share
        )
        filename = self.with_credentials(named.filename, text)
        return named._replace(filename=filename)

    def with_credentials(self, filename: str, shown: str) -> str:
        """See `nbdqcow.cli.image_tls.with_credentials`; ``shown`` is what messages
        call the image. Raises `ImageError`."""
        if "tls-creds=" not in filename:
            return filename
        from nbdqcow.cli import image_tls
        from nbdqcow.cli.objects import Objects

        try:
            return image_tls.with_credentials(filename, self._made or Objects())
        except (ImageError, CredentialsError) as exc:
            raise ImageError(f"Could not open '{shown}': {exc}") from None


class ImageName(NamedTuple):
    """An image as a command line names it.

    Attributes:
        text: the argument as it was given, for messages.
        key_id: the id of the secret that opens it, or None.
        pairs: the options that it is a set of.
        force_share: whether they open it beside a writer.
        read_only: whether they forbid to write to it.
    """

    text: str
    filename: str
    format: str | None
    key_id: str | None = None
    pairs: Mapping[str, str] = NO_OPTIONS
    force_share: bool = False
    read_only: bool = False

    def as_json(self, format_: str) -> str | None:
        """Return the ``json:`` name that QEMU gives an image of that format if
        options make it another one than its file alone; None without any."""
        below = {
            key.removeprefix("file."): value
            for key, value in self.pairs.items()
            if key.startswith("file.")
        }
        if self.pairs.get("driver") in NULL_DRIVERS:
            values = self._typed(self.pairs)
            is_other = not values.keys().isdisjoint(_IDENTIFYING_NULL)
        elif below.get("driver") in NULL_DRIVERS:
            file = _ordered(self._typed(below))
            values = {**self._typed(self.pairs), "driver": format_, "file": file}
            is_other = not below.keys().isdisjoint(_IDENTIFYING_NULL)
        elif is_remote(self.filename):
            # It has a name that says all.
            return None
        else:
            file = {"driver": "file", "filename": self.filename}
            values = {"driver": format_, **self._typed(self.pairs), "file": file}
            is_other = False
        if not is_other and self.pairs.keys().isdisjoint(_IDENTIFYING):
            return None
        import json

        return JSON_PREFIX + json.dumps(_ordered(values))

    def _typed(self, pairs: Mapping[str, str]) -> dict[str, Any]:
        """Return options with the types that they have where they come from."""
        values: dict[str, Any] = dict(pairs)
        if self.text.startswith(JSON_PREFIX):
            for key in values.keys() & _NUMBERS:
                with contextlib.suppress(ValueError):
                    values[key] = int(values[key])
            if (flag := values.get("read-zeroes")) in BOOLEANS:
                values["read-zeroes"] = BOOLEANS[flag]
        return values

    def shown_format(self, format_: str) -> str:
        """See `shown_format`."""
        return shown_format(format_, self.format, self.pairs.get("driver"))


def check_force_share(options: Mapping[str, Any]) -> None:
    """See that what ``--image-opts`` became does not contradict ``-U``.

    Raises `ImageError`.
    """
    if not options.get("force_share", True):
        raise ImageError("--force-share/-U conflicts with image options")


def _ordered(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return options in the order in which QEMU shows them, but those that it does
    not show."""
    return {key: values[key] for key in _ORDER if key in values}


def shown_format(format_: str, *given: str | None) -> str:
    """Return what QEMU calls the format of an image whose format is ``format_``: a file
    or an export that was not ``given`` one is its own."""
    return next((one for one in given if one in _PROTOCOLS), None) or format_


def pairs_of(text: str, *, image_opts: bool, warns: bool = True) -> Pairs | None:
    """Return the options that an argument is, None for a name. ``warns`` of what is
    deprecated. Raises `UsageError` and `ImageError`."""
    pairs: Pairs | None = None
    if image_opts:
        from nbdqcow.cli.option_text import parse_keyval

        pairs = parse_keyval(text, warns=warns)
    elif text.startswith(JSON_PREFIX):
        pairs = json_pairs(text)
    if warns and pairs is not None and pairs.get("backing") == "":
        error(
            'warning: Use of "backing": "" is deprecated; use "backing": null instead'
        )
    return pairs


def image_name(
    text: str, format_: str | None, *, image_opts: bool, force_share: bool = False
) -> ImageName:
    """Return what an argument means: a file name, or with ``image_opts`` a set
    of options. ``force_share`` is ``-U``. Raises `ImageError`."""
    if image_opts and format_ is not None:
        raise ImageError("--image-opts and --format are mutually exclusive")
    try:
        pairs = pairs_of(text, image_opts=image_opts)
        if pairs is None:
            return ImageName(text, text, format_, force_share=force_share)
        filename, options = parse_pairs(pairs)
        check_node_names(pairs, set(), below=False)
    except (ImageError, UsageError) as exc:
        # Without the hint at --help. The import goes the other way.
        from nbdqcow.cli.img_open import reason_of_refusal

        reason = reason_of_refusal(exc)
        raise ImageError(f"Could not open '{text}': {reason}") from None
    if image_opts and force_share:
        check_force_share(options)
    return ImageName(
        text,
        filename,
        format_ or options.get("format"),
        options.get("key_secret"),
        {key: value for key, value in pairs.items() if value is not None},
        force_share or options.get("force_share", False),
        options.get("read_only", False),
    )

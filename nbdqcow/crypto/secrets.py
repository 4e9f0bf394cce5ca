"""Passphrases: where they come from, and that they show nowhere.

A file's bytes are the passphrase as they are, a newline at its end included,
as QEMU has it: ``printf %s`` writes a file without one.
"""

import os
from typing import Final

from nbdqcow.errors import ImageError, UsageError

MAX_LENGTH: Final = 1 << 20
"""Bytes of a passphrase, far more than anyone has; a device has no end."""


class PassphraseRequired(ImageError):
    """An encrypted image was opened without a passphrase."""


def check_method(found: str | None, wanted: str | None) -> None:
    """See that an image is encrypted by the method that its options name, if any.

    ``found`` is None for one that is not encrypted. Raises `ImageError`.
    """
    if wanted in (None, found):
        return
    if found is None:
        raise ImageError(
            f"No encryption in image header, but options specified format '{wanted}'"
        )
    raise ImageError(
        f"Header reported '{found}' encryption format but options specify '{wanted}'"
    )


class Secret:
    """Bytes that neither ``repr`` nor a traceback's text shows."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def reveal(self) -> bytes:
        """Return the bytes: for the key derivation alone."""
        return self._data

    def __repr__(self) -> str:
        return "Secret(...)"


def reveal(secret: Secret | bytes) -> bytes:
    """Return the bytes of a passphrase, however a driver was given it."""
    return secret if isinstance(secret, bytes) else secret.reveal()


def from_file(path: str) -> Secret:
    """Return what a file holds. Raises `UsageError` with the reason."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_LENGTH + 1)
    except (OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"Unable to read {path}: {text}") from None
    if len(data) > MAX_LENGTH:
        raise UsageError(f"{path} is too long for a secret")
    return Secret(data)


def from_environment(name: str) -> Secret:
    """Return an environment variable's value. Raises `UsageError`."""
    value = os.environb.get(os.fsencode(name))
    if value is None:
        raise UsageError(f"there is no environment variable {name}")
    return Secret(value)

"""The exceptions of the project. Whatever else escapes a request is a bug.

::

    NbdQcowError
    +-- BlockError (also an OSError)   a request failed; carries an errno
    |   +-- NotSupported               ENOTSUP: the caller may fall back
    |   +-- CorruptImage               EIO: metadata of the image can't be right
    +-- ImageError                     the file is not an image we can use
    |   +-- UnsupportedFeature         a valid image, but with a feature we lack
    |   +-- ImageInUse                 another program holds the image's lock
    +-- ProtocolError                  the peer broke the protocol: close
    +-- OptionError                    an option failed: haggling goes on
    +-- CredentialsError               TLS certificates or keys can't be used
    +-- TlsError (also an OSError)     the peer is refused, or breaks TLS: close
    +-- UsageError                     a wrong command line
"""

import contextlib as _contextlib
import errno as _errno
import os as _os
from collections.abc import Iterator
from typing import Final, Self


class NbdQcowError(Exception):
    """Base class of all errors that the project raises on purpose."""


class BlockError(NbdQcowError, OSError):
    """A block request failed. ``errno`` says how, ``strerror`` says why.

    Storage drivers raise plain `OSError` too; both reach the client through
    one table (`nbdqcow.nbd.errno_map`).
    """

    def __init__(self, errno: int, text: str) -> None:
        OSError.__init__(self, errno, text)

    def __str__(self) -> str:
        return str(self.strerror)


class NotSupported(BlockError):
    """The driver can't do this efficiently; the block layer may fall back."""

    def __init__(self, text: str) -> None:
        super().__init__(_errno.ENOTSUP, text)


class CorruptImage(BlockError):
    """Metadata found while serving can't be right; the request fails (EIO)."""

    def __init__(self, text: str) -> None:
        super().__init__(_errno.EIO, text)


@_contextlib.contextmanager
def explained(text: str) -> Iterator[None]:
    """Let an `OSError` that says nothing but the system's words for its number say
    in those of ``text`` what could not be done."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.strerror != _os.strerror(error.errno):
            raise
        raise BlockError(error.errno, f"{text}: {error.strerror}") from error


class ImageError(NbdQcowError):
    """The image can't be opened: not of this format, damaged, or refused."""

    def with_text(self, text: str) -> Self:
        """Return the same error with other words."""
        return type(self)(text)


class UnsupportedFeature(ImageError):
    """The image is valid but uses a feature that is not implemented."""


HELD_BY: Final = " Held by "
"""In what `ImageInUse` says, what is between QEMU's words and the names of those who
have the image."""


class ImageInUse(ImageError):
    """Another process holds a conflicting lock on the image.

    ``is_of_raw``: on a file without metadata. QEMU finds that when the whole chain is
    open, so names no backing file before it.
    """

    is_of_raw = False

    def with_text(self, text: str) -> Self:
        """Return the same error with other words."""
        error = type(self)(text)
        error.is_of_raw = self.is_of_raw
        return error


class ProtocolError(NbdQcowError):
    """The peer broke the NBD protocol; the connection must be closed."""


class OptionError(NbdQcowError):
    """An NBD option failed. ``reply`` is the ``NBD_REP_ERR_*`` to send."""

    def __init__(self, reply: int, text: str) -> None:
        super().__init__(text)
        self.reply = reply
        self.text = text


class CredentialsError(NbdQcowError):
    """TLS certificates or keys can't be used; the message names the file."""


class TlsError(NbdQcowError, OSError):
    """A TLS connection that can't be, or can't go on."""


class UsageError(NbdQcowError):
    """The command line is wrong; the message says what to write instead."""

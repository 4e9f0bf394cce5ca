"""What of two answers to a random command line may differ (docs/divergences.md)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tests.interop.img_versions import is_newer


@dataclass(frozen=True)
class Difference:
    """One thing that differs: ``status``, ``out``, ``err``, or which file."""

    what: str
    theirs: object
    ours: object


_MODULE: Final = re.compile(rb"qemu: module \S+ not found.*\n")
"""What a QEMU says from which the distribution has split drivers."""
_STEPS: Final = re.compile(rb"( +\([0-9.]+/100%\)\r)+")
_BY_CHANCE: Final = re.compile(rb"(uuid|iters|actual-size|disk size)(\"?): .*")
_OUR_CHOICE: Final = (
    # Formats and protocols that only QEMU has, and ours has in another place.
    *("Unknown driver", "Unknown protocol", "Unknown file format", "must start with"),
    *("vvfat", "null-co", "regular file"),
    # Options of QEMU's that are refused by name, or in other words.
    *("does not support the option", "does not accept value"),
    *("is not supported", "invalid size"),
    *(
        "Must specify either",
        "A block device must be specified",
        "aio=native",
        "is deprecated",
        "Invalid parameter",
    ),
    *("Amend options", "No secret with id"),
    # Newer QEMUs have more long options; so an abbreviation may mean several.
    "unrecognized option",
    # It lists all kinds of objects that QEMU has.
    "List of user creatable objects",
    # A passphrase is asked for before there is a look at the file, or at its tables.
    "is required for cipher",
    # Where the reason is GLib's, or the parser's of JSON.
    *("Unable to read", "JSON"),
    # Sizes that are no multiple of a block.
    *("without 'resize'", "containing file"),
    "backing format must be specified",
    # An image that shall be its own backing file, as a raw one.
    'Failed to get shared "write" lock',
)

_CHANGED_SINCE: Final = (
    # `snapshot FILE` lists; numbers of `dd` have no suffix; another order.
    *("Snapshot list:", "Invalid skip specified", "Invalid count specified"),
    "Backing file specified without backing format",
)
"""What is not the same where QEMU is newer than the one that we follow."""


def unintended(found: Sequence[Difference]) -> Sequence[Difference]:
    """Return those of the differences of a line that no rule allows."""
    if any(isinstance(one.theirs, int) and one.theirs < 0 for one in found):
        # QEMU's crashed or never ended.
        return ()
    choices = _OUR_CHOICE + (_CHANGED_SINCE if is_newer() else ())
    left = []
    for one in found:
        if one.what in ("out", "err"):
            theirs, ours = _settle(one.theirs), _settle(one.ours)
            if theirs == ours:
                continue
            text = (theirs + ours).decode(errors="replace")
            if any(choice in text for choice in choices):
                return ()
        elif one.what.startswith("file ") and _settle(one.theirs) == _settle(one.ours):
            continue
        left.append(one)
    return left


def _settle(value: object) -> bytes:
    text = value if isinstance(value, bytes) else repr(value).encode()
    text = _BY_CHANCE.sub(b"", text.replace(b"\\n", b"\n"))
    # A name with a colon is made a path.
    text = text.replace(b"'./", b"'")
    return _STEPS.sub(b"(steps)", _MODULE.sub(b"", text))

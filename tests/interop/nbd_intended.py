"""What of two answers to a line of qemu-nbd's may differ (docs/divergences.md)."""

import re
from collections.abc import Sequence
from typing import Final

from nbdqcow.units import SECTOR_SIZE
from tests.interop import img_intended
from tests.interop.img_intended import Difference

_LOGGED: Final = re.compile(rb"qemu-nbd: (option negotiation|write) failed: .*(\n|$)")
"""What QEMU's server says of clients that leave early."""
_REPAIR: Final = re.compile(rb"(?m)^qemu-nbd: [^:]+: (?=ERROR|Rebuilding|Repairing)")
"""Ours names the image: there may be several."""
_SIZE: Final = re.compile(rb'export-size": ([0-9]+)')
_LEAST: Final = re.compile(rb'(block_size_minimum": |min block: )(1|512)\b')
_OUR_CHOICE: Final = (
    # What QEMU would unlink; names of unknown encoding; hints.
    *(
        "Address already in use",
        "Failed to unlink socket",
        "\\xff",
        "modprobe nbd",
        "Inappropriate ioctl",
    ),
    # Why a URI is none, and who can't be written to.
    *("No valid URL specified", "server address missing", "error parsing address"),
    *("the export is read-only", "Could not open backing file"),
    # Raw images are not read beside a writer.
    'Failed to get shared "resize" lock',
    # Who may not use an export is told so, and what can't be is refused at once.
    *("server policy", "authorization object", "is not for authorization"),
    # A pipe, and what only QEMU has.
    *("regular file", "is not supported", "invalid object type"),
    # A window of a snapshot; the first of several things that are wrong.
    *("does not support temporarily loading", "has no value"),
)


def unintended(found: Sequence[Difference]) -> Sequence[Difference]:
    """Return those of the differences of a line that no rule allows."""
    theirs = {one.what: one.theirs for one in found}
    if "no answer" in str(theirs) or theirs.get("server status") == "killed":
        # QEMU's hung.
        return ()
    size = _SIZE.search(
        b"".join(_text(one.ours) for one in found if one.what == "info")
    )
    if size is not None and int(size[1]) % SECTOR_SIZE:
        # QEMU's disk is longer, or shorter if it is a window.
        return ()
    left = [one for one in found if not _is_same(one)]
    if [(one.what, one.theirs, one.ours) for one in left] == [("status", 1, 0)]:
        # Forked off, with a warning: the server is there all the same.
        return ()
    text = " ".join(
        value.decode(errors="replace") if isinstance(value, bytes) else repr(value)
        for one in left
        for value in (one.theirs, one.ours)
    )
    if any(choice in text for choice in _OUR_CHOICE):
        return ()
    return img_intended.unintended(left)


def _is_same(one: Difference) -> bool:
    if one.what == "new files":
        # QEMU's socket is there first, and stays when the image can't be opened.
        return isinstance(one.ours, list) and not one.ours
    if one.what in ("info", "list") and one.theirs and one.ours:
        theirs, ours = (_LEAST.sub(b"", _text(side)) for side in (one.theirs, one.ours))
        return theirs == ours
    if one.what == "err":
        ours = _REPAIR.sub(b"", _text(one.ours))
        return _LOGGED.sub(b"", _text(one.theirs)).rstrip() == ours
    if one.what == "map base:allocation" and one.theirs and one.ours:
        # Of a window QEMU tells what the image itself has; below it all is holes.
        return "'1'" in str(one.theirs)
    return False


def _text(value: object) -> bytes:
    if isinstance(value, tuple):
        return bytes(value[1])
    return value if isinstance(value, bytes) else b""

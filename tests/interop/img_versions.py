"""What a newer qemu-img says, in the words of 7.2, which are ours.

Ours follows qemu-img 7.2 (docs/divergences.md, "The image tool"). Where the
distribution has a newer one, what is known to have changed since is turned back
before the two are compared; with 7.2 itself nothing is.
"""

import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from typing import Final

from tests.conftest import find_tool

Outcome = tuple[int, bytes, bytes]

FOLLOWED: Final = (7, 2)


@cache
def qemu_version() -> tuple[int, int]:
    """Return the version of the distribution's QEMU, such as (10, 0)."""
    done = subprocess.run(
        [find_tool("qemu-img"), "--version"], capture_output=True, text=True, check=True
    )
    found = re.match(r"qemu-img version (\d+)\.(\d+)", done.stdout)
    assert found is not None, done.stdout
    return int(found[1]), int(found[2])


def is_newer() -> bool:
    """Whether the distribution's QEMU is newer than the one that ours follows."""
    return qemu_version() > FOLLOWED


def as_7_2_says(words: Sequence[str], outcome: Outcome) -> Outcome:
    """Return what 7.2 would have said where qemu-img said ``outcome`` to ``words``."""
    return turn_back(words, outcome) if is_newer() else outcome


def turn_back(words: Sequence[str], outcome: Outcome) -> Outcome:
    """Return what 7.2 says where a newer qemu-img says ``outcome`` to ``words``."""
    recorded = _RECORDED.get(" ".join(words))
    if recorded is not None:
        return recorded
    status, out, err = outcome
    if any(re.search(r"(^|=)-\d", word) for word in words):
        err = re.sub(_TOO_LARGE, rb"\1: 'negative'.", err)
    for pattern, replacement in _OUTPUT:
        out = re.sub(pattern, replacement, out)
    for pattern, replacement in _ERRORS:
        err = re.sub(pattern, replacement, err)
    for word in words:
        name = word.partition("=")[0].encode()
        err = err.replace(
            b"qemu-img: option '" + name + b"' doesn't allow an argument",
            b"qemu-img: unrecognized option '" + word.encode() + b"'",
        )
    return status, out, err


def text_as_7_2_says(text: str) -> str:
    """Return what 7.2 would have printed where qemu-img printed ``text``."""
    return as_7_2_says([], (0, text.encode(), b""))[1].decode()


def errors_as_7_2_says(text: str) -> str:
    """Return what 7.2 would have written on standard error."""
    return as_7_2_says([], (1, b"", text.encode()))[2].decode()


def words_for(line: str) -> list[str]:
    """Return the words that say to the distribution's qemu-img what ``line`` does
    to 7.2's."""
    return shlex.split(_ANOTHER_LINE.get(line, line) if is_newer() else line)


# -- what is printed -------------------------------------------------------------


def _snapshot_row(row: re.Match[bytes]) -> bytes:
    number, name, size, date, hours, rest, icount = row.groups()
    return b"%-9s %-16s %8s%20s%13s%11s" % (
        number,
        name,
        size,
        date,
        b"%02d" % int(hours) + rest,
        icount if icount and icount != b"--" else b"",
    )


_Replacement = bytes | Callable[[re.Match[bytes]], bytes]
_OUTPUT: Final[Sequence[tuple[bytes, _Replacement]]] = (
    # Since 8.0 `info` shows the files below an image.
    (rb"(?m)^ *Child node '.*':\n(?: {4,}.*\n)*", b""),
    (rb'(?m)^( *)"children": \[\n(?:\1 .*\n)*\1\],\n', b""),
    # And the kind of a file, as if it were something of the format's.
    (
        rb'(?m)^( *)"format-specific": \{\n\1    "type": "file",\n'
        rb'\1    "data": \{\n\1    \}\n\1\},\n',
        b"",
    ),
    # Since 9.0.
    (rb"(?m)^ *detached header: false\n", b""),
    (rb'(?m)^ *"detached-header": false,\n', b""),
    (rb"(?m)^  detached-header=<.*\n", b""),
    # Since 8.2.
    (rb', "compressed": (?:true|false)(?=[,}])', b""),
    # Since 9.1 the columns of a list of snapshots are others.
    (
        rb"(?m)^ID +TAG +VM_SIZE +DATE +VM_CLOCK +ICOUNT$",
        b"ID        TAG               VM SIZE                DATE     VM CLOCK"
        b"     ICOUNT",
    ),
    (
        rb"(?m)^(\S*) +(.*?) +([0-9.]+ [KMGTP]?i?B) +(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)"
        rb" +(\d+)(:\d\d:\d\d\.\d{3})(?: +(\d+|--)?)?$",
        _snapshot_row,
    ),
)

# -- what is wrong -----------------------------------------------------------------

_NO_SIZE: Final = (
    rb"\1. You may use k, M, G, T, P or E suffixes for\n"
    rb"qemu-img: kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."
)
# So they call a negative number, too, which to 7.2 is none.
_TOO_LARGE: Final = rb"(Invalid [a-z _]+ specified)\. Must be .*\."
_ERRORS: Final[Sequence[tuple[bytes, bytes]]] = (
    (
        rb"Try 'qemu-img(?: [a-z]+)? --help' for more info$",
        b"Try 'qemu-img --help' for more information",
    ),
    (
        rb"qemu-img(?: [a-z]+)?: invalid option -- '(.)'",
        rb"qemu-img: unrecognized option '-\1'",
    ),
    (
        rb"qemu-img [a-z]+: unrecognized option ",
        rb"qemu-img: unrecognized option ",
    ),
    (
        rb"qemu-img [a-z]+: option '(\S+)' is ambiguous; possibilities: .*",
        rb"qemu-img: unrecognized option '\1'",
    ),
    (rb"qemu-img [a-z]+: (option '\S+' doesn't allow)", rb"qemu-img: \1"),
    (
        rb"qemu-img(?: [a-z]+)?: option requires an argument -- '(.)'",
        rb"qemu-img: missing argument for option '-\1'",
    ),
    (
        rb"qemu-img(?: [a-z]+)?: option '(\S+)' requires an argument",
        rb"qemu-img: missing argument for option '\1'",
    ),
    (
        rb"--output expects 'human' or 'json' not '.*'\n.*",
        rb"--output must be used with human or json as argument.",
    ),
    (
        rb"--repair \(-r\) expects 'leaks' or 'all' not '(.*)'",
        rb"Unknown option value for -r (expecting 'leaks' or 'all'): \1",
    ),
    (
        rb"(Invalid (?:queue depth|request count|pattern byte) specified)"
        rb"(?:: '.*'|\. Must be .*)\.",
        rb"\1",
    ),
    (rb"Invalid step size specified", rb"Invalid step_size specified"),
    (rb"(Invalid [a-z _]+ specified): '.*'\.", _NO_SIZE),
    (
        rb"does not support creating new images, so an existing image must be "
        rb"selected as the target; however, opening the given target as an existing "
        rb"image failed",
        rb"does not support image creation, and opening the image failed",
    ),
    (
        rb"(Could not create snapshot '.*'): Operation not supported",
        rb"\1: -95 (Operation not supported)",
    ),
    (
        rb"(Could not create snapshot '.*'): No space left on device",
        rb"\1: -28 (No space left on device)",
    ),
    (
        rb"Value '-.*' is out of range for parameter '(.*)'",
        rb"Parameter '\1' expects a non-negative number below 2^64\n"
        rb"Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
        rb"and exabytes, respectively.",
    ),
)

# -- what is done ------------------------------------------------------------------

_TRY: Final = b"\nTry 'qemu-img --help' for more information"
_NO_ARGUMENTS: Final = 1, b"", b"qemu-img: Not enough arguments" + _TRY
_PROBED: Final = (
    b"WARNING: Image format was not specified for 'x.raw' and probing guessed raw.\n"
    b"         Automatically detecting the format is dangerous for raw images, write "
    b"operations on block 0 will be restricted.\n"
    b"         Specify the 'raw' format explicitly to remove the restrictions."
)
# What 7.2 said of lines to which newer ones give an answer of another kind.
_RECORDED: Final[dict[str, Outcome]] = {
    # Newer ones list.
    "snapshot snap.qcow2": (0, b"", b""),
    "snapshot --image-opts driver=qcow2,file.filename=snap.qcow2": (0, b"", b""),
    "snapshot x.raw": (0, b"", _PROBED),
    "snapshot -U snap.qcow2": (
        1,
        b"",
        b"qemu-img: Could not open 'snap.qcow2': force-share=on can only be used with "
        b"read-only images",
    ),
    # One text for too few and too many, and one that says so.
    "resize": _NO_ARGUMENTS,
    "resize base.qcow2": _NO_ARGUMENTS,
    "resize 16M": _NO_ARGUMENTS,
    "resize a b c": (1, b"", b"qemu-img: Expecting image file name and size" + _TRY),
    # Newer ones look at this option first.
    "info --output base.qcow2": (
        1,
        b"",
        b"qemu-img: Expecting one image file name" + _TRY,
    ),
    # No negative numbers; all of an option's values are looked at.
    "bench -s 3G -c 3 base.qcow2": (
        1,
        b"",
        b"qemu-img: Invalid buffer size specified. Must be between 0 and 2147483647.",
    ),
    "bench -c 0 -c 3 base.qcow2": (
        0,
        b"Sending 3 read requests, 4096 bytes each, 64 in parallel "
        b"(starting at offset 0, step size 4096)\nRun completed in 0.000 seconds.\n",
        b"",
    ),
    # 512 MiB to newer ones.
    "create -f qcow2 new.img .5G": (
        1,
        b"",
        b"qemu-img: Invalid image size specified. You may use k, M, G, T, P or E "
        b"suffixes for\nqemu-img: kilobytes, megabytes, gigabytes, terabytes, "
        b"petabytes and exabytes.",
    ),
}

_ANOTHER_LINE: Final = {
    # Newer ones take no suffix there.
    "dd count=1k if=base.qcow2 of=out": "dd count=1024 if=base.qcow2 of=out",
}

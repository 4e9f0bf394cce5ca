"""Options and operands of a command line, found in getopt_long's way.

Unlike the standard library's it gives what it found before an error, for commands
that act on each option as it comes.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto


class Fault(Enum):
    """Why a scan ended early."""

    UNKNOWN = auto()
    """No such option, an ambiguous beginning of one, or a value it doesn't take."""
    NO_ARGUMENT = auto()
    """The command line ended where an option's argument should be."""


@dataclass(slots=True)
class Scan:
    """What was found.

    Attributes:
        options: pairs of name and argument; a long name is what it stands for.
        operands: all else, in order; incomplete with a ``fault``.
        fault: what ended the scan, or None.
        at: the word that is wrong, or the letter with its minus.
    """

    options: list[tuple[str, str]] = field(default_factory=list)
    operands: list[str] = field(default_factory=list)
    fault: Fault | None = None
    at: str = ""


def scan(arguments: Sequence[str], short: str, long: Mapping[str, str]) -> Scan:
    """Scan a command line.

    ``short`` is getopt's string, ``long`` maps a long name, with ``=`` if it takes
    an argument, to what is returned for it. Operands stand anywhere unless
    POSIXLY_CORRECT is in the environment.
    """
    found = Scan()
    words = list(arguments)
    only_in_front = "POSIXLY_CORRECT" in os.environ
    while words and found.fault is None:
        word = words.pop(0)
        if word == "--":
            break
        if word.startswith("--"):
            _take_long(found, word, words, long)
        elif word.startswith("-") and word != "-":
            _take_short(found, word, words, short)
        else:
            found.operands.append(word)
            if only_in_front:
                break
            continue
    found.operands += words
    return found


def _take_long(
    found: Scan, word: str, words: list[str], long: Mapping[str, str]
) -> None:
    given, equals, value = word[2:].partition("=")
    exact = [name for name in long if name.rstrip("=") == given]
    names = exact or [name for name in long if name.startswith(given)]
    # Several names of one option are no ambiguity.
    if len({(long[name], name.endswith("=")) for name in names}) != 1:
        found.fault, found.at = Fault.UNKNOWN, word
        return
    name = names[0]
    if not name.endswith("="):
        if equals:
            found.fault, found.at = Fault.UNKNOWN, word
            return
    elif not equals:
        if not words:
            found.fault, found.at = Fault.NO_ARGUMENT, word
            return
        value = words.pop(0)
    found.options.append((long[name], value))


def _take_short(found: Scan, word: str, words: list[str], short: str) -> None:
    for index, letter in enumerate(word[1:], 1):
        place = -1 if letter == ":" else short.find(letter)
        if place < 0:
            found.fault, found.at = Fault.UNKNOWN, f"-{letter}"
            return
        if short[place + 1 : place + 2] != ":":
            found.options.append((f"-{letter}", ""))
            continue
        value = word[index + 1 :]
        if not value:
            if not words:
                found.fault, found.at = Fault.NO_ARGUMENT, word
                return
            value = words.pop(0)
        found.options.append((f"-{letter}", value))
        return

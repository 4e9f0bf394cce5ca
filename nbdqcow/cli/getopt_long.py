"""Command lines as C's getopt_long reads them, its messages included."""

import getopt
from collections.abc import Mapping, Sequence

from nbdqcow.errors import UsageError


def getopt_long(
    arguments: Sequence[str], short: str, long: Mapping[str, str]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the options, in their order, and the operands.

    ``short`` is getopt's string (``p:t``). ``long`` maps each long option to
    what is returned for it: the name it has in ``short``, or its own; with an
    argument if the name ends in ``=``, which is not part of what is returned.
    Long options can be abbreviated, and operands stand anywhere unless
    POSIXLY_CORRECT is in the environment. Raises `UsageError`.
    """
    try:
        parsed, operands = getopt.gnu_getopt(list(arguments), short, list(long))
    except getopt.GetoptError as exc:
        raise UsageError(_reason(arguments, exc.opt, short, list(long))) from None
    by_name = {f"--{name.rstrip('=')}": short_name for name, short_name in long.items()}
    return (
        [(by_name.get(name) or name.lstrip("-"), value) for name, value in parsed],
        operands,
    )


def _reason(arguments: Sequence[str], opt: str, short: str, long: list[str]) -> str:
    """Say, in the words of glibc, why gnu_getopt stopped at ``opt``."""
    if len(opt) == 1 and not any(a.partition("=")[0] == f"--{opt}" for a in arguments):
        if f"{opt}:" in short:
            return f"option requires an argument -- '{opt}'"
        return f"invalid option -- '{opt}'"
    # Of an ambiguous or unknown option the argument is shown too.
    given = next(
        (a for a in arguments if a.partition("=")[0] == f"--{opt}"), f"--{opt}"
    )
    names = [name for name in long if name.rstrip("=") == opt] or [
        name for name in long if name.startswith(opt)
    ]
    if not names:
        return f"unrecognized option '{given}'"
    if len(names) > 1:
        possible = " ".join(f"'--{name.rstrip('=')}'" for name in names)
        return f"option '{given}' is ambiguous; possibilities: {possible}"
    if names[0].endswith("="):
        return f"option '--{names[0][:-1]}' requires an argument"
    return f"option '--{names[0]}' doesn't allow an argument"

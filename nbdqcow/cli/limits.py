"""The options of ``nbdqcow serve`` that bound what clients may take."""

from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from nbdqcow.server.options import ServerOptions
from nbdqcow.units import MiB, format_size, parse_size

_DEFAULTS: Final = ServerOptions()
_MIN_BYTES: Final = 1 * MiB
_MAX_PAYLOAD: Final = 256 * MiB

F = TypeVar("F", bound=Callable[..., Any])


def size(text: str) -> int:
    """Return the bytes that an option's ``64M`` means."""
    try:
        return parse_size(text)
    except ValueError as exc:
        raise click.BadParameter(str(exc)) from None


def _bytes(text: str) -> int:
    value = size(text)
    if value < _MIN_BYTES:
        raise click.BadParameter(f"at least {format_size(_MIN_BYTES)}")
    return value


def _payload(text: str) -> int:
    value = _bytes(text)
    # A payload is received into one piece of memory.
    if value > _MAX_PAYLOAD:
        raise click.BadParameter(f"at most {format_size(_MAX_PAYLOAD)}")
    return value


def _option_bytes(text: str) -> int:
    value = size(text)
    # A name of 4096 bytes, and what INFO has besides.
    if value < 8192:
        raise click.BadParameter("at least 8K, for the longest name")
    return value


class _Seconds(click.FloatRange):
    """A time that timers can take: not "nan", which no comparison refuses."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Return the number, or say what is wrong with it."""
        seconds = float(super().convert(value, param, ctx))
        if not seconds <= _MAX_SECONDS:
            self.fail(f"'{value}' is no number of seconds up to {_MAX_SECONDS}.")
        return seconds


_MAX_SECONDS: Final = 10**9
_COUNT: Final = click.IntRange(min=1)
_COUNT_OR_NONE: Final = click.IntRange(min=0)
_SECONDS: Final = _Seconds(min=0, min_open=True)
_SECONDS_OR_NONE: Final = _Seconds(min=0)

# Field of ServerOptions: its type, what stands for a value, the help text.
_LIMITS: Final[dict[str, tuple[Any, str, str]]] = {
    "max_connections": (_COUNT, "N", "Clients at a time; more are turned away."),
    "max_export_connections": (
        _COUNT_OR_NONE, "N", "Clients of one export at a time; 0 for any number.",
    ),
    "max_requests": (_COUNT, "N", "Requests of one client in flight."),
    "max_payload": (
        _payload, "SIZE", "Data of one request. More than 32M helps clients that "
        "don't ask what they may send.",
    ),
    "max_bytes": (_bytes, "SIZE", "Data of one client in flight."),
    "max_total_bytes": (_bytes, "SIZE", "Data of all clients in flight."),
    "max_option_length": (
        _option_bytes, "SIZE", "Data of one option in the handshake.",
    ),
    "handshake_timeout": (
        _SECONDS, "SECONDS", "How long a client may take to choose an export.",
    ),
    "idle_timeout": (
        _SECONDS_OR_NONE, "SECONDS", "Close clients that ask for nothing for so "
        "long; 0 for never.",
    ),
    "reply_timeout": (
        _SECONDS_OR_NONE, "SECONDS", "Close clients that take nothing of their "
        "replies for so long; 0 for never.",
    ),
    "poll_time": (
        _COUNT_OR_NONE, "MICROSECONDS", "How long to look for the next request "
        "before sleeping, where they follow one another closely; 0 for not at all.",
    ),
}  # fmt: skip


def limit_options(command: F) -> F:
    """Give a click command the options that `take_limits` reads."""
    for name, (kind, metavar, text) in reversed(_LIMITS.items()):
        default = getattr(_DEFAULTS, name)
        if metavar == "SIZE":
            default = format_size(default).replace(" ", "").removesuffix("iB")
        command = click.option(
            "--" + name.replace("_", "-"),
            type=kind,
            default=default,
            show_default=True,
            metavar=metavar,
            help=text,
        )(command)
    return command


def take_limits(options: dict[str, Any]) -> ServerOptions:
    """Take the options of `limit_options` out of ``options``."""
    return ServerOptions(**{name: options.pop(name) for name in _LIMITS})

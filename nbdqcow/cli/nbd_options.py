"""The command line of ``nbdqcow-nbd``: the options of qemu-nbd."""

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from nbdqcow.cli.getopt_long import getopt_long
from nbdqcow.cli.messages import program_name
from nbdqcow.errors import UsageError
from nbdqcow.units import size_expected

if TYPE_CHECKING:
    from nbdqcow.cli.objects import Objects

_MAX_STRING_LENGTH: Final = 4096
_SOCKET_OF_DEVICE: Final = "/var/lock/{program}-{device}"
"""Where other clients find the server of a device."""
NO_LIMIT: Final = 1 << 31
_OFFSET_LIMIT: Final = 1 << 63
_C_INTEGER: Final = re.compile(r"\s*[+-]?(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)")
_SHORT: Final = "hVb:o:p:rsnc:dvk:e:f:tl:x:T:D:AB:L"
# Long options: what has a short form returns that. In qemu-nbd's order, which is
# that of its message about an abbreviation of several.
_LONG: Final = {
    "help": "h",
    "version": "V",
    "bind=": "b",
    "port=": "p",
    "socket=": "k",
    "offset=": "o",
    "read-only": "r",
    "allocation-depth": "A",
    "bitmap=": "B",
    "connect=": "c",
    "disconnect": "d",
    "list": "L",
    "snapshot": "s",
    "load-snapshot=": "l",
    "nocache": "n",
    "cache=": "",
    "aio=": "",
    "discard=": "",
    "detect-zeroes=": "",
    "shared=": "e",
    "format=": "f",
    "persistent": "t",
    "verbose": "v",
    "object=": "",
    "export-name=": "x",
    "description=": "D",
    "tls-creds=": "",
    "tls-hostname=": "",
    "tls-authz=": "",
    "image-opts": "",
    "trace=": "T",
    "fork": "",
    "pid-file=": "",
    "selinux-label=": "",
    "handshake-limit=": "",
}
# Options of qemu-nbd that are known and refused: what messages call them.
_REFUSED: Final = {
    "T": "--trace is not supported: there are no trace points",
}
_PER_DEVICE: Final = frozenset(
    ("x", "D", "o", "A", "B", "f", "l", "n", "cache", "aio", "discard", "c", "d")
)
_SOCKET_OPTIONS: Final = {
    "c": "NBD device",
    "k": "Unix socket",
    "b": "The interface",
    "p": "TCP port number",
    "selinux-label": "SELinux label",
}
_CACHE_MODES: Final = {
    "none": "none",
    "off": "none",
    "directsync": "directsync",
    "writeback": "writeback",
    "unsafe": "unsafe",
    "writethrough": "writethrough",
}
_DISCARD_MODES: Final = {
    "ignore": "ignore",
    "off": "ignore",
    "unmap": "unmap",
    "on": "unmap",
}
_AIO_MODES: Final = ("threads", "native", "io_uring")
_DETECT_ZEROES_MODES: Final = ("off", "on", "unmap")

HELP: Final = """\
Usage: {program} [OPTION]... FILE
  or:  {program} -L [OPTION]...
  or:  {program} -d DEVICE
Serve a disk image over NBD, with the options of qemu-nbd.

  -h, --help                 show this text
  -V, --version              show the version

The server:
  -p, --port=PORT            TCP port (default: 10809)
  -b, --bind=ADDRESS         address to listen on (default: 0.0.0.0)
  -k, --socket=PATH          listen on a unix socket instead
      --selinux-label=LABEL  what SELinux knows that socket by
  -e, --shared=NUM           clients at a time, 0 for any number (default: 1)
  -t, --persistent           go on after the last client has left
      --handshake-limit=SECS seconds that a client's handshake may take, 0 for
                             any (default: 10)
  -x, --export-name=NAME     name of the export (default: the empty name)
  -D, --description=TEXT     description of the export
      --fork                 return when the server is ready; it runs on
      --pid-file=PATH        write the server's process ID to a file
  -v, --verbose              log what clients do

The kernel:
  -c, --connect=DEVICE       attach the export to DEVICE, /dev/nbdN, and return
                             (run in the foreground with -v)
  -d, --disconnect           detach the device that FILE names

The image:
  -o, --offset=BYTES         where in a raw image the disk begins
  -A, --allocation-depth     offer the metadata context qemu:allocation-depth
  -B, --bitmap=NAME          offer the dirty bitmap NAME of the image or of its
                             backing file; may be given several times
  -l, --load-snapshot=NAME   serve an internal snapshot, by ID or name or as
                             snapshot.id=ID,snapshot.name=NAME; read-only
  -s, --snapshot             keep what is written in a temporary file, which
                             goes with the server: FILE stays as it is
  -f, --format=FORMAT        raw, qcow, qcow2 or luks (default: guessed)
  -r, --read-only            refuse all writes
  -n, --nocache              the same as --cache=none
      --cache=MODE           none, writeback (default), writethrough,
                             directsync or unsafe
      --aio=MODE             threads, native or io_uring: accepted, no effect
      --discard=MODE         ignore (default) or unmap
      --detect-zeroes=MODE   off (default), on or unmap
      --image-opts           FILE is driver=FORMAT,file.filename=NAME,...

TLS:
      --object=TYPE,id=ID,.. credentials: tls-creds-x509 or tls-creds-psk, with
                             dir=, endpoint=server|client, verify-peer=;
                             authz-simple, authz-list or authz-listfile; secret
      --tls-creds=ID         require TLS, with these credentials
      --tls-authz=ID         serve only clients whose certificates it allows

The client:
  -L, --list                 list the exports of the server that -b, -p or -k
                             names
      --tls-creds=ID         use TLS, with these credentials
      --tls-hostname=NAME    expect this name in the server's certificate

Without -p, -b and -k, sockets that systemd has opened for the server are used.
"""


@dataclass(slots=True)
class Settings:
    """What the command line asks for.

    Attributes:
        host, port: TCP address; the port may be a service's name.
        socket: path of a unix socket, which takes the place of TCP.
        socket_label: its SELinux label; None leaves it to the kernel.
        shared: clients at a time; 0 is any number.
        handshake_limit: seconds; 0 is none.
        objects: what --object made; None for nothing.
        tls_creds, tls_authz: ids of objects.
        tls_hostname: what a client finds in the server's certificate.
        open_options: of `nbdqcow.block.open.open_image`, where given.
        native_aio: what can't be had without O_DIRECT is asked for.
        device: the kernel's device to attach the export to; None for none.
        disconnect: detach the device ``filename``, and no more.
        throwaway: keep nothing of what is written.
        allocation_depth: offer the metadata context of that name.
        bitmaps: the dirty bitmaps to offer.
        snapshot: the internal snapshot to serve: its ID or name, or its ID
            and its name; None serves the disk.
        given: options that were given, by the name getopt_long returns.
        activated: descriptor and name of sockets to listen on, in the place of
            TCP.
    """

    host: str = "0.0.0.0"
    port: str = "10809"
    socket: str | None = None
    socket_label: str | None = None
    shared: int = 1
    handshake_limit: int = 10
    persistent: bool = False
    verbose: bool = False
    export_name: str = ""
    description: str = ""
    list: bool = False
    fork: bool = False
    pid_file: str | None = None
    image_opts: bool = False
    device: str | None = None
    disconnect: bool = False
    throwaway: bool = False
    allocation_depth: bool = False
    bitmaps: tuple[str, ...] = ()
    snapshot: str | tuple[str | None, str | None] | None = None
    filename: str = ""
    objects: "Objects | None" = None
    tls_creds: str | None = None
    tls_authz: str | None = None
    tls_hostname: str | None = None
    open_options: dict[str, Any] = field(default_factory=dict)
    native_aio: bool = False
    given: set[str] = field(default_factory=set)
    activated: Sequence[tuple[int, str]] = ()


class TryHelp(UsageError):
    """A wrong command line, after which --help is pointed at."""


def parse_arguments(
    arguments: list[str], activated: Sequence[tuple[int, str]] = ()
) -> Settings:
    """Return what ``arguments`` ask for; ``activated`` are the sockets that the
    service manager has opened for us. Raises `UsageError`, `CredentialsError` for
    an ``--object``, and `Answered` if one asked which there are."""
    long = {k: v or k.rstrip("=") for k, v in _LONG.items()}
    fault: UsageError | None = None
    operands: list[str] = []
    try:
        options, operands = getopt_long(arguments, _SHORT, long)
    except UsageError as exc:
        # What is wrong with an option before that one is told first.
        fault, options = TryHelp(str(exc)), _options_before_fault(arguments, long)
    settings = Settings(activated=activated)
    for name, value in options:
        if name in _REFUSED:
            raise UsageError(_REFUSED[name])
        if name in ("h", "V"):
            settings.given = {name}
            return settings
        _apply(settings, name, value)
        settings.given.add(name)
    if fault is not None:
        raise fault
    _check(settings, operands)
    return settings


def _options_before_fault(
    arguments: list[str], long: Mapping[str, str]
) -> list[tuple[str, str]]:
    for end in range(len(arguments) - 1, 0, -1):
        with contextlib.suppress(UsageError):
            return getopt_long(arguments[:end], _SHORT, long)[0]
    return []


def _apply(settings: Settings, name: str, value: str) -> None:
    """Take one option into ``settings``."""
    match name:
        case "p":
            settings.port = value
        case "b":
            settings.host = value
        case "k":
            if not value.startswith("/"):
                raise UsageError("socket path must be absolute")
            settings.socket = value
        case "selinux-label":
            settings.socket_label = value
        case "e":
            settings.shared = _parse_number(value, "shared device number")
        case "handshake-limit":
            settings.handshake_limit = _parse_number(value, "handshake limit")
        case "t":
            settings.persistent = True
        case "v":
            settings.verbose = True
        case "x":
            settings.export_name = _string("export name", value)
        case "D":
            settings.description = _string("export description", value)
        case "A":
            settings.allocation_depth = True
        case "B":
            if value not in settings.bitmaps:
                # QEMU's order: which one is missed first, and listed first.
                settings.bitmaps = (value, *settings.bitmaps)
        case "l":
            settings.snapshot = _parse_snapshot(value)
        case "L":
            settings.list = True
        case "fork":
            settings.fork = True
        case "c":
            settings.device = value
        case "d":
            settings.disconnect = True
        case "s":
            settings.throwaway = True
        case "pid-file":
            settings.pid_file = value
        case "image-opts":
            settings.image_opts = True
        case "object":
            from nbdqcow.cli.objects import Objects

            # Made at once: QEMU's errors come in the order of the options.
            settings.objects = settings.objects or Objects()
            settings.objects.add(value)
        case "tls-creds":
            settings.tls_creds = value
        case "tls-authz":
            settings.tls_authz = value
        case "tls-hostname":
            settings.tls_hostname = value
        case _:
            _apply_image_option(settings, name, value)


def _apply_image_option(settings: Settings, name: str, value: str) -> None:
    """Take an option about how the image is opened into ``settings``."""
    options = settings.open_options
    match name:
        case "f":
            options["format"] = value
        case "o":
            options["driver_options"] = {"offset": _parse_offset(value)}
        case "r":
            options["read_only"] = True
        case "n" | "cache":
            if settings.given & {"n", "cache"}:
                raise UsageError("-n and --cache can only be specified once")
            mode = "none" if name == "n" else value
            if mode not in _CACHE_MODES:
                raise UsageError(f"Invalid cache mode `{mode}'")
            options["cache"] = _CACHE_MODES[mode]
        case "aio":
            if "aio" in settings.given:
                raise UsageError("--aio can only be specified once")
            if value not in _AIO_MODES:
                raise UsageError(f"Invalid aio mode '{value}'")
            settings.native_aio = value == "native"
        case "discard":
            if "discard" in settings.given:
                raise UsageError("--discard can only be specified once")
            if value not in _DISCARD_MODES:
                raise UsageError(f"Invalid discard mode `{value}'")
            options["discard"] = _DISCARD_MODES[value]
        case "detect-zeroes":
            if value not in _DETECT_ZEROES_MODES:
                raise UsageError(
                    "Failed to parse detect_zeroes mode: "
                    f"invalid parameter value: {value}"
                )
            if value == "unmap" and options.get("discard") != "unmap":
                raise UsageError(
                    "setting detect-zeroes to unmap is not allowed without setting "
                    "discard operation to unmap"
                )
            options["detect_zeroes"] = value
        case _:
            raise AssertionError(f"no such option: {name}")


def _check(settings: Settings, operands: list[str]) -> None:
    """Judge the options together, and take the image's name."""
    if settings.list:
        if operands:
            raise UsageError("List mode is incompatible with a file name")
        if settings.given & _PER_DEVICE:
            raise UsageError("List mode is incompatible with per-device settings")
        if settings.fork:
            raise UsageError("List mode is incompatible with forking")
        _check_tls(settings)
        _check_label(settings)
        return
    if len(operands) != 1:
        raise UsageError(
            "Invalid number of arguments\n"
            f"Try `{program_name()} --help' for more information."
        )
    _check_tls(settings)
    _check_label(settings)
    (settings.filename,) = operands
    offset = settings.open_options.get("driver_options", {}).get("offset", 0)
    if offset >= _OFFSET_LIMIT:
        raise UsageError(size_expected("offset"))
    if settings.activated:
        _check_activation(settings)
    elif settings.device is not None and settings.socket is None:
        settings.socket = _SOCKET_OF_DEVICE.format(
            program=program_name(), device=os.path.basename(settings.device)
        )
    if settings.image_opts and "f" in settings.given:
        raise UsageError("--image-opts and -f are mutually exclusive")


def _check_tls(settings: Settings) -> None:
    if settings.tls_creds is None:
        for name in ("tls-hostname", "tls-authz"):
            if name in settings.given:
                raise UsageError(f"--{name} is not permitted without --tls-creds")
    elif settings.device is not None:
        raise UsageError("TLS is not supported with a host device")
    elif settings.list and settings.tls_authz is not None:
        raise UsageError("TLS authorization is incompatible with export list")
    elif settings.tls_hostname is not None and not settings.list:
        raise UsageError("TLS hostname is only supported with export list")


def _check_label(settings: Settings) -> None:
    has_socket = settings.socket is not None or settings.device is not None
    if settings.socket_label is not None and not has_socket and not settings.activated:
        raise UsageError("--selinux-label is not permitted without --socket")


def _check_activation(settings: Settings) -> None:
    """Refuse what would listen besides the sockets that were opened for us."""
    for option, text in _SOCKET_OPTIONS.items():
        if option in settings.given:
            raise UsageError(f"{text} can't be set when using socket activation")


def _parse_number(text: str, what: str) -> int:
    number = _parse_integer(text)
    if number is None or not 0 <= number < NO_LIMIT:
        raise UsageError(f"Invalid {what} '{text}'")
    return number


def _parse_snapshot(text: str) -> str | tuple[str | None, str | None]:
    """Return what ``--load-snapshot`` names."""
    from nbdqcow.cli.option_text import parse_snapshot

    try:
        return parse_snapshot(text)
    except UsageError as exc:
        raise UsageError(
            f"{exc}\n{program_name()}: Failed in parsing snapshot param `{text}'"
        ) from None


def _parse_offset(text: str) -> int:
    offset = _parse_integer(text)
    if offset is None or abs(offset) >= 1 << 64:
        raise UsageError(f"Invalid offset '{text}'")
    # A number below zero is one that is too large, as in C.
    return offset % (1 << 64)


def _parse_integer(text: str) -> int | None:
    """Return a number in the notation of C, None if it is none."""
    if _C_INTEGER.fullmatch(text) is None:
        return None
    digits = text.strip().lstrip("+-").lower()
    base = 16 if digits.startswith("0x") else 8 if digits.startswith("0") else 10
    number = int(digits, base)
    return -number if "-" in text else number


def _string(what: str, text: str) -> str:
    if len(os.fsencode(text)) > _MAX_STRING_LENGTH:
        raise UsageError(f"{what} '{text}' too long")
    return text

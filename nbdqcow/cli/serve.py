"""``nbdqcow serve``: images as NBD exports, until it is told to stop."""

import contextlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from nbdqcow.cli.messages import printable, program_name
from nbdqcow.cli.tls_options import TlsSettings, take_tls, tls_options
from nbdqcow.errors import ImageError, UsageError
from nbdqcow.nbd.constants import DEFAULT_PORT
from nbdqcow.nbd.uri import NbdUri
from nbdqcow.units import format_size, parse_size

DEFAULT_LISTEN = f"127.0.0.1:{DEFAULT_PORT}"
CACHE_MODES = ("writeback", "none", "writethrough", "directsync", "unsafe")
_ANY_ADDRESS = ("", "0.0.0.0", "::")


def size(text: str) -> int:
    """Return the bytes that an option's ``64M`` means."""
    try:
        return parse_size(text)
    except ValueError as exc:
        raise click.BadParameter(str(exc)) from None


def address(text: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``; "" is every address."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(DEFAULT_PORT)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise click.BadParameter(f"'{text}': write an IPv6 address in brackets")
    if not (port.isascii() and port.isdigit()) or int(port[:6]) > 65535:
        raise click.BadParameter(f"'{text}': a port is a number up to 65535")
    return ("" if host == "*" else host), int(port)


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """What the command line asks for.

    Attributes:
        images: export name and file name of each.
        listen: host ("" for every address) and port of TCP listeners.
        unix: paths of unix listeners.
        read_only: of every export.
        open_options: of `nbdqcow.block.open.open_image`.
        max_connections: clients at a time.
        handshake_timeout: seconds.
        pid_file: where to write the process ID, or None.
        tls: of the server and of each export.
    """

    images: Sequence[tuple[str, str]]
    listen: Sequence[tuple[str, int]]
    unix: Sequence[str]
    read_only: bool
    open_options: dict[str, Any]
    max_connections: int
    handshake_timeout: float
    pid_file: str | None
    tls: TlsSettings


@click.command()
@click.argument("images", metavar="[NAME=]IMAGE...", nargs=-1, required=True)
@click.option(
    "--listen",
    type=address,
    multiple=True,
    metavar="HOST:PORT",
    help=f"Listen on a TCP address; * for HOST is all of them. May be given "
    f"several times. [default: {DEFAULT_LISTEN}, without --unix]",
)
@click.option(
    "--unix",
    multiple=True,
    metavar="PATH",
    help="Listen on a unix socket. May be given several times.",
)
@click.option("-r", "--read-only", is_flag=True, help="Refuse all writes.")
@click.option(
    "-f",
    "--format",
    metavar="FORMAT",
    help="The format of the images (raw, qcow2). Without it, it is guessed.",
)
@click.option(
    "--cache",
    type=click.Choice(CACHE_MODES),
    default="writeback",
    show_default=True,
    help="How the host's page cache is used.",
)
@click.option(
    "--l2-cache-size",
    type=size,
    metavar="SIZE",
    help="Memory for the tables of each image.",
)
@click.option(
    "--discard",
    type=click.Choice(("unmap", "ignore")),
    default="unmap",
    show_default=True,
    help="Whether trimmed space is given back.",
)
@click.option(
    "--detect-zeroes",
    type=click.Choice(("off", "on", "unmap")),
    default="off",
    show_default=True,
    help="Whether written zeroes become zero clusters, or are unmapped.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    metavar="N",
    help="Clients at a time; more are turned away.",
)
@click.option(
    "--handshake-timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a client may take to choose an export.",
)
@tls_options
@click.option("--pid-file", metavar="PATH", help="Write the process ID to a file.")
@click.option("-v", "--verbose", is_flag=True, help="Log what clients do.")
def serve(
    images: tuple[str, ...],
    listen: tuple[tuple[str, int], ...],
    unix: tuple[str, ...],
    read_only: bool,
    format: str | None,
    cache: str,
    l2_cache_size: int | None,
    discard: str,
    detect_zeroes: str,
    max_connections: int,
    handshake_timeout: float,
    pid_file: str | None,
    verbose: bool,
    **others: Any,
) -> int:
    """Serve images over NBD until SIGTERM or SIGINT.

    A sole IMAGE is the default export. Of several, each has its NAME, or else
    the name of its file.
    """
    if detect_zeroes == "unmap" and discard != "unmap":
        raise click.UsageError("--detect-zeroes=unmap needs --discard=unmap")
    if not listen and not unix:
        listen = (address(DEFAULT_LISTEN),)
    settings = ServeSettings(
        images=export_names(images),
        listen=listen,
        unix=unix,
        read_only=read_only,
        open_options={
            "format": format,
            "read_only": read_only,
            "cache": cache,
            "discard": discard,
            "detect_zeroes": detect_zeroes,
            "l2_cache_size": l2_cache_size,
        },
        max_connections=max_connections,
        handshake_timeout=handshake_timeout,
        pid_file=pid_file,
        tls=take_tls(others),
    )
    from nbdqcow.cli.runner import run

    return run(lambda: _serve(settings), verbose=verbose)


def export_names(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Return export name and file name of each ``[NAME=]IMAGE``.

    What comes before the first ``=`` is a name, unless it has a slash: that
    is a path. Raises `UsageError` for a name that is used twice.
    """
    images: list[tuple[str, str]] = []
    for argument in arguments:
        name, equals, filename = argument.partition("=")
        if not equals or "/" in name:
            filename = argument
            name = os.path.basename(filename) if len(arguments) > 1 else ""
        if not filename:
            raise UsageError(f"'{argument}' names no image")
        if any(name == other for other, _ in images):
            raise UsageError(f"there are two exports named '{name}': use NAME=IMAGE")
        images.append((name, filename))
    return images


async def _serve(settings: ServeSettings) -> None:
    from nbdqcow.cli.images import open_node
    from nbdqcow.cli.listening import listen_tcp, listen_unix, run_server
    from nbdqcow.cli.pid_file import write_pid_file
    from nbdqcow.server.options import ServerOptions
    from nbdqcow.server.server import Server

    tls = settings.tls
    tls.check_exports([name for name, _ in settings.images])
    server = Server(
        ServerOptions(
            max_connections=settings.max_connections,
            handshake_timeout=settings.handshake_timeout,
        ),
        tls.server_tls(),
    )
    async with contextlib.AsyncExitStack() as stack:
        sizes = []
        for name, filename in settings.images:
            try:
                node = await open_node(filename, **settings.open_options)
            except ImageError as exc:
                raise type(exc)(str(exc).replace("\n", "; ")) from None
            stack.push_async_callback(node.close)
            sizes.append(node.size)
            try:
                server.add_export(
                    name,
                    node,
                    read_only=settings.read_only,
                    multi_conn=True,
                    tls_only=tls.needs_tls(name),
                    may_use=tls.may_use(name),
                )
            except ValueError as exc:
                raise UsageError(str(exc)) from None

        async def set_up() -> None:
            places: list[tuple[str, NbdUri]] = []
            for host, port in settings.listen:
                places += [
                    _tcp_place(*found) for found in await listen_tcp(server, host, port)
                ]
            for path in settings.unix:
                await listen_unix(server, path)
                places.append((path, _unix_uri(path)))
            if settings.pid_file is not None:
                write_pid_file(settings.pid_file)
                stack.callback(_remove, settings.pid_file)
            print(_announcement(settings, sizes, places), flush=True)

        await run_server(server, set_up)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _unix_uri(path: str) -> NbdUri:
    return NbdUri("unix", socket=os.path.abspath(path))


def _tcp_place(host: str, port: int) -> tuple[str, NbdUri]:
    """Return what to call a TCP listener, and where this machine finds it."""
    text = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if host in _ANY_ADDRESS:
        host = "::1" if host == "::" else "127.0.0.1"
    return text, NbdUri(host=host, port=port)


def _announcement(
    settings: ServeSettings,
    sizes: Sequence[int],
    places: Sequence[tuple[str, NbdUri]],
) -> str:
    """Return a ready line for each listener, and how to attach to it."""
    mode = ", read-only" if settings.read_only else ""
    lines = []
    for text, place in places:
        lines.append(f"{program_name()}: ready on {text}")
        for (name, filename), size in zip(settings.images, sizes, strict=True):
            uri = settings.tls.uri(place, name)
            lines.append(f"    {uri}  {filename}, {format_size(size)}{mode}")
    uri = settings.tls.uri(places[0][1], settings.images[0][0])
    lines += ["attach with, for example:", f"    nbdinfo {shlex.quote(str(uri))}"]
    if not uri.tls:
        lines += [
            f"    qemu-io -f raw {shlex.quote(str(uri))}",
            f"    {_nbd_client_command(uri)}",
        ]
    return printable("\n".join(lines))


def _nbd_client_command(uri: NbdUri) -> str:
    words = ["nbd-client"]
    words += ["-unix", uri.socket] if uri.transport == "unix" else [uri.host]
    words += [] if uri.transport == "unix" else [str(uri.port)]
    words += ["/dev/nbd0"]
    words += ["-name", uri.export] if uri.export else []
    return shlex.join(words)

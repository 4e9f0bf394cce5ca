"""``nbdqcow serve``: images as NBD exports, until it is told to stop."""

import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import click

from nbdqcow.cli.limits import limit_options, size, take_limits
from nbdqcow.cli.messages import printable, program_name
from nbdqcow.cli.places import (
    Places,
    listen,
    place_options,
    raise_fd_limit,
    take_places,
)
from nbdqcow.cli.tls_options import TlsSettings, take_tls, tls_options
from nbdqcow.errors import ImageError, UsageError
from nbdqcow.nbd.uri import NbdUri
from nbdqcow.server.options import ServerOptions
from nbdqcow.server.systemd import take_activation
from nbdqcow.units import format_size

CACHE_MODES = ("writeback", "none", "writethrough", "directsync", "unsafe")


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """What the command line asks for.

    Attributes:
        images: export name and file name of each.
        places: where to listen.
        read_only: of every export.
        open_options: of `nbdqcow.block.open.open_image`.
        limits: of the server.
        pid_file: where to write the process ID, or None.
        tls: of the server and of each export.
    """

    images: Sequence[tuple[str, str]]
    places: Places
    read_only: bool
    open_options: dict[str, Any]
    limits: ServerOptions
    pid_file: str | None
    tls: TlsSettings


@click.command()
@click.argument("images", metavar="[NAME=]IMAGE...", nargs=-1)
@click.option(
    "--export",
    "exports",
    multiple=True,
    nargs=2,
    metavar="NAME IMAGE",
    help="One more export, whatever characters NAME and IMAGE have. May be given "
    "several times.",
)
@place_options
@click.option("-r", "--read-only", is_flag=True, help="Refuse all writes.")
@click.option(
    "-f",
    "--format",
    metavar="FORMAT",
    help="The format of the images (raw, qcow, qcow2, luks). Without it, it is "
    "guessed.",
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
    help="Memory for the tables of each image.  [default: 32M]",
)
@click.option(
    "--compressed-cache-size",
    type=size,
    metavar="SIZE",
    help="Memory for what was decompressed of each image.  [default: an equal share"
    " of a 64th of the memory, at most 256M]",
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
    "--key-file",
    metavar="FILE",
    help="The passphrase of encrypted images: all bytes of FILE, a newline at its "
    "end included.",
)
@click.option(
    "--key-env",
    metavar="NAME",
    help="The passphrase of encrypted images, in an environment variable.",
)
@limit_options
@click.option(
    "--no-structured-replies",
    is_flag=True,
    help="Give clients simple replies only: no sparse reads, no block status.",
)
@tls_options
@click.option("--pid-file", metavar="PATH", help="Write the process ID to a file.")
@click.option("-v", "--verbose", is_flag=True, help="Log what clients do.")
def serve(
    images: tuple[str, ...],
    exports: tuple[tuple[str, str], ...],
    read_only: bool,
    format: str | None,
    cache: str,
    l2_cache_size: int | None,
    compressed_cache_size: int | None,
    discard: str,
    detect_zeroes: str,
    key_file: str | None,
    key_env: str | None,
    no_structured_replies: bool,
    pid_file: str | None,
    verbose: bool,
    **others: Any,
) -> int:
    """Serve images over NBD until SIGTERM, SIGINT or SIGHUP.

    A sole IMAGE is the default export. Of several, each has its NAME, or else
    the name of its file. A NAME with a slash needs --export.
    """
    if not images and not exports:
        raise click.UsageError("Missing argument: [NAME=]IMAGE or --export NAME IMAGE")
    if detect_zeroes == "unmap" and discard != "unmap":
        raise click.UsageError("--detect-zeroes=unmap needs --discard=unmap")
    kept = {}
    if compressed_cache_size is not None:
        kept["compressed_cache_size"] = compressed_cache_size
    settings = ServeSettings(
        images=export_names(images, exports),
        places=take_places(others, take_activation(os.environ)),
        read_only=read_only,
        open_options={
            "format": format,
            "read_only": read_only,
            "cache": cache,
            "discard": discard,
            "detect_zeroes": detect_zeroes,
            "l2_cache_size": l2_cache_size,
            "driver_options": {**kept, **_take_key(key_file, key_env)},
        },
        limits=replace(
            take_limits(others), structured_replies=not no_structured_replies
        ),
        pid_file=pid_file,
        tls=take_tls(others),
    )
    raise_fd_limit(settings.limits.max_connections)
    from nbdqcow.cli.runner import run

    return run(lambda: _serve(settings), verbose=verbose)


def _take_key(key_file: str | None, key_env: str | None) -> dict[str, Any]:
    """Return the passphrase as the format drivers take it.

    Raises `UsageError` if it can't be had.
    """
    from nbdqcow.crypto import secrets

    if key_file is not None and key_env is not None:
        raise click.UsageError("--key-file and --key-env are mutually exclusive")
    if key_file is not None:
        return {"secret": secrets.from_file(key_file)}
    if key_env is not None:
        return {"secret": secrets.from_environment(key_env)}
    return {}


def export_names(
    arguments: Sequence[str], exports: Sequence[tuple[str, str]] = ()
) -> list[tuple[str, str]]:
    """Return export name and file name of each ``[NAME=]IMAGE``, then ``exports``.

    What comes before the first ``=`` is a name, unless it has a slash: that
    is a path. ``exports`` have both as they are. Raises `UsageError` for a name
    that is used twice.
    """
    images: list[tuple[str, str]] = []
    alone = len(arguments) + len(exports) == 1
    for argument in arguments:
        name, equals, filename = argument.partition("=")
        if not equals or "/" in name:
            filename = argument
            name = "" if alone else os.path.basename(filename)
        if not filename:
            raise UsageError(f"'{argument}' names no image")
        images.append((name, filename))
    for name, filename in exports:
        if not filename:
            raise UsageError(f"--export '{name}' names no image")
        images.append((name, filename))
    names: set[str] = set()
    for name, _ in images:
        if name in names:
            raise UsageError(f"there are two exports named '{name}': use NAME=IMAGE")
        names.add(name)
    return images


async def _serve(settings: ServeSettings) -> None:
    from nbdqcow.cli.images import open_node
    from nbdqcow.cli.listening import run_server
    from nbdqcow.cli.pid_file import write_pid_file
    from nbdqcow.server.server import Server
    from nbdqcow.server.stdio import Stdio
    from nbdqcow.server.systemd import notify

    tls = settings.tls
    tls.check_exports([name for name, _ in settings.images])
    server = Server(settings.limits, tls.server_tls())
    server.on_stopping = lambda: notify("STOPPING=1")
    stdio = None
    async with contextlib.AsyncExitStack() as stack:
        if settings.places.stdio:
            if sys.__stdin__ is None or sys.__stdout__ is None:
                raise UsageError("--stdio: standard input or output is closed")
            stdio = Stdio()
            stack.callback(stdio.finish)
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
            places = await listen(server, settings.places)
            if settings.pid_file is not None:
                write_pid_file(settings.pid_file)
                stack.callback(_remove, settings.pid_file)
            if stdio is not None:
                await server.serve_socket(stdio.socket)
            elif places:
                print(_announcement(settings, sizes, places), flush=True)
            texts = ", ".join(text for text, _ in places)
            notify("READY=1", printable(f"STATUS=Ready on {texts or 'a connection'}"))

        await run_server(server, set_up)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _announcement(
    settings: ServeSettings,
    sizes: Sequence[int],
    places: Sequence[tuple[str, NbdUri | None]],
) -> str:
    """Return a ready line for each listener, and how to attach to it."""
    mode = ", read-only" if settings.read_only else ""
    lines = []
    for text, place in places:
        lines.append(f"{program_name()}: ready on {text}")
        if place is None:
            continue
        for (name, filename), length in zip(settings.images, sizes, strict=True):
            uri = settings.tls.uri(place, name)
            lines.append(f"    {uri}  {filename}, {format_size(length)}{mode}")
    known = [place for _, place in places if place is not None]
    if known:
        uri = settings.tls.uri(known[0], settings.images[0][0])
        lines += ["attach with, for example:", f"    nbdinfo {shlex.quote(str(uri))}"]
        if not uri.tls:
            lines.append(f"    qemu-io -f raw {shlex.quote(str(uri))}")
            if uri.transport != "vsock" and not uri.socket.startswith("\0"):
                lines.append(f"    {_nbd_client_command(uri)}")
    return printable("\n".join(lines))


def _nbd_client_command(uri: NbdUri) -> str:
    words = ["nbd-client"]
    words += ["-unix", uri.socket] if uri.transport == "unix" else [uri.host]
    words += [] if uri.transport == "unix" else [str(uri.port)]
    words += ["/dev/nbd0"]
    words += ["-name", uri.export] if uri.export else []
    return shlex.join(words)

"""``nbdqcow-nbd``: one image as an NBD export, with the options of qemu-nbd."""

import errno
import math
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from nbdqcow.cli.messages import (
    describe,
    error,
    printable,
    program_name,
    version,
    warning,
)
from nbdqcow.cli.nbd_options import HELP, NO_LIMIT, Settings, TryHelp, parse_arguments
from nbdqcow.cli.program import run_program
from nbdqcow.errors import CredentialsError, ImageError, NbdQcowError, UsageError
from nbdqcow.server.systemd import take_activation

if TYPE_CHECKING:
    from nbdqcow.block.node import Node
    from nbdqcow.server.kernel_device import Attachment
    from nbdqcow.server.server import Server


def main() -> int:
    """Run the command; return its exit status."""
    return run_program(_main, print_failures_last=True)


def _main() -> int:
    try:
        settings = parse_arguments(sys.argv[1:], take_activation(os.environ))
    except TryHelp as exc:
        error(str(exc))
        error(f"Try `{program_name()} --help' for more information.")
        return 1
    except (UsageError, CredentialsError) as exc:
        error(str(exc))
        return 1
    if "h" in settings.given:
        print(HELP.format(program=program_name()), end="")
        return 0
    if "V" in settings.given:
        print(f"{program_name()} {version()}")
        return 0
    if settings.list:
        return _list(settings)
    if settings.disconnect:
        return _disconnect(settings.filename)
    if settings.fork or (settings.device is not None and not settings.verbose):
        return _serve_in_background(settings)
    return _serve(settings, -1)


# -- the client --------------------------------------------------------------


def _list(settings: Settings) -> int:
    import socket

    from nbdqcow.cli.objects import Objects
    from nbdqcow.cli.remote import ClientTls, connect, format_exports, list_exports

    tls = None
    try:
        if settings.tls_creds is not None:
            objects = settings.objects or Objects()
            credentials = objects.credentials(settings.tls_creds, is_server=False)
            hostname = settings.tls_hostname
            if hostname is None and settings.socket is None:
                hostname = settings.host
            tls = ClientTls(credentials, hostname)
    except NbdQcowError as exc:
        error(describe(exc))
        return 1
    place = settings.socket or f"{settings.host}:{settings.port}"
    try:
        sock = connect(settings.host, settings.port, settings.socket)
    except socket.gaierror as exc:
        error(f"address resolution failed for {place}: {exc.strerror}")
        return 1
    except (OSError, UnicodeError) as exc:
        error(f"Failed to connect to '{place}': {describe(exc)}")
        return 1
    with sock:
        try:
            exports = list_exports(sock, tls)
        except (NbdQcowError, OSError) as exc:
            error(describe(exc))
            return 1
    print(printable(format_exports(exports)))
    return 0


def _disconnect(path: str) -> int:
    from nbdqcow.server.kernel_device import disconnect_blocking

    try:
        disconnect_blocking(path)
    except UsageError as exc:
        error(str(exc))
        return 1
    except OSError as exc:
        error(f"{path}: {describe(exc)}")
        return 1
    print(f"{path} disconnected")
    return 0


# -- the server --------------------------------------------------------------


def _serve_in_background(settings: Settings) -> int:
    """Serve in a child; return once it is ready, or has failed and said why."""
    ready, ready_for_child = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ready)
        os.setsid()
        status = _serve(settings, ready_for_child)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    os.close(ready_for_child)
    if os.read(ready, 1):
        return 0
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) or 1


def _tell_parent(ready_fd: int) -> None:
    """Let the parent of a `_serve_in_background` go, and its terminal too.

    Standard error with -v as well: whoever reads it to its end waits for us.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    os.write(ready_fd, b"\0")
    os.close(ready_fd)


def _serve(settings: Settings, ready_fd: int) -> int:
    """Serve until the end; ``ready_fd`` is the parent's pipe, or -1."""
    from nbdqcow.cli.runner import run

    return run(lambda: _serve_image(settings, ready_fd), verbose=settings.verbose)


async def _serve_image(settings: Settings, ready_fd: int) -> None:
    from nbdqcow.cli.listening import run_server
    from nbdqcow.cli.nbd_image import open_served
    from nbdqcow.cli.objects import Objects
    from nbdqcow.cli.pid_file import write_pid_file
    from nbdqcow.server.options import ServerOptions
    from nbdqcow.server.server import Server
    from nbdqcow.server.systemd import notify

    objects = settings.objects or Objects()
    tls, may_use = objects.server_tls(settings.tls_creds, settings.tls_authz)
    node = await open_served(settings, objects)
    server = Server(
        ServerOptions(
            max_connections=settings.shared or NO_LIMIT,
            handshake_timeout=settings.handshake_limit or math.inf,
            wait_when_full=True,
            sole_is_default=False,
        ),
        tls,
    )
    attachment = None
    try:
        if settings.device is not None:
            from nbdqcow.server.kernel_device import Attachment

            attachment = Attachment(server, settings.device)
        _add_export(server, node, settings, may_use)
        server.on_stopping = lambda: notify("STOPPING=1")
        if not settings.persistent:
            server.on_last_disconnect = server.stop

        async def set_up() -> None:
            await _listen(server, settings)
            if attachment is not None:
                await _attach(attachment, settings)
            if settings.pid_file is not None:
                write_pid_file(settings.pid_file, mode=0o600)
            notify("READY=1")
            if ready_fd >= 0:
                _tell_parent(ready_fd)

        await run_server(server, set_up)
    finally:
        if attachment is not None:
            await attachment.close()
        await node.close()


def _add_export(
    server: "Server",
    node: "Node",
    settings: Settings,
    may_use: Callable[[bytes | None], bool],
) -> None:
    """Export the image as it is asked for. Raises `UsageError` and `ImageError`."""
    try:
        server.add_export(
            settings.export_name,
            node,
            read_only=node.read_only,
            description=settings.description,
            multi_conn=settings.shared != 1,
            meta_contexts=_meta_contexts(settings, node),
            minimum_block_size=node.minimum_block_size,
            may_use=may_use,
        )
    except ValueError as exc:
        raise UsageError(str(exc)) from None


async def _listen(server: "Server", settings: Settings) -> None:
    """Listen where it is asked for. Raises `UsageError`."""
    from nbdqcow.cli.listening import listen_fd, listen_unix

    if settings.activated:
        for fd, _ in settings.activated:
            await listen_fd(server, fd)
    elif settings.socket is not None:
        await listen_unix(server, settings.socket, label=settings.socket_label)
    else:
        await _listen_tcp(server, settings)


async def _attach(attachment: "Attachment", settings: Settings) -> None:
    """Attach the kernel's device, and tell what is to be known of it."""
    await attachment.attach(settings.export_name)
    if settings.verbose:
        print(
            f"NBD device {settings.device} is now connected to {settings.filename}",
            file=sys.stderr,
        )
    if attachment.device.nb_left_out:
        warning(
            f"{settings.device} does not show the last"
            f" {attachment.device.nb_left_out} bytes of the image,"
            " which are no whole sector"
        )


async def _listen_tcp(server: "Server", settings: Settings) -> None:
    """Listen on a TCP port. Raises `UsageError`, in qemu-nbd's words."""
    from nbdqcow.cli.listening import listen_tcp

    try:
        await listen_tcp(server, settings.host, settings.port)
    except UsageError as exc:
        if not isinstance(exc.__cause__, OSError):
            raise
        errno_ = exc.__cause__.errno or 0
        in_use = errno_ == errno.EADDRINUSE
        what = "Failed to find an available port" if in_use else "Failed to bind socket"
        raise UsageError(f"{what}: {os.strerror(errno_)}") from None


def _meta_contexts(settings: Settings, node: "Node") -> list[str]:
    """Return the metadata contexts that the command line asks for."""
    from nbdqcow.server.export import ALLOCATION, ALLOCATION_DEPTH, DIRTY_BITMAP

    contexts = [ALLOCATION]
    if settings.allocation_depth:
        contexts.append(ALLOCATION_DEPTH)
    for bitmap in settings.bitmaps:
        if node.find_bitmap(bitmap) is None:
            if _is_inconsistent(node, bitmap):
                reason = "is inconsistent and cannot be used"
            else:
                reason = "is not found"
            raise ImageError(f"Bitmap '{bitmap}' {reason}")
        contexts.append(DIRTY_BITMAP + bitmap)
    return contexts


def _is_inconsistent(node: "Node", bitmap: str) -> bool:
    """Whether an image or one below it has that bitmap, but nobody knows what it
    has missed."""
    from nbdqcow.jobs.bitmaps import inconsistent_bitmaps
    from nbdqcow.jobs.status import chain_of

    return any(bitmap in inconsistent_bitmaps(image) for image in chain_of(node))

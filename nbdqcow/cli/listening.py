"""A server's listeners, with errors that say which one failed and why."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from nbdqcow.errors import UsageError
from nbdqcow.server.server import Server
from nbdqcow.server.sockets import SocketLabelError, inherited_socket

_MAX_PATH_LENGTH = 107
"""Bytes of a unix socket's path on Linux, without its NUL."""


async def run_server(server: Server, set_up: Callable[[], Awaitable[None]]) -> None:
    """Run ``server`` until it is told to stop.

    ``set_up`` makes its listeners and says that it is ready: by then SIGTERM
    already means an orderly end. If that raises, the listeners go away. What is
    left to do then, closing the images, is not cut short by SIGINT any more.
    """
    running = asyncio.create_task(server.run_until_stopped(last=True))
    # The task takes the signals over before it first waits.
    await asyncio.sleep(0)
    try:
        await set_up()
    except BaseException:
        server.stop()
        await running
        raise
    await running


async def listen_tcp(
    server: Server, host: str, port: int | str
) -> list[tuple[str, int]]:
    """Listen on ``host`` ("" is every address); ``port`` may be a service.

    Returns the addresses. Raises `UsageError`.
    """
    try:
        # Not the loop's: uvloop reads a port as Python's int() does.
        found = await asyncio.to_thread(
            socket.getaddrinfo,
            host or None,
            port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )
    except (socket.gaierror, UnicodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "Name is not valid"
        raise UsageError(
            f"address resolution failed for {host}:{port}: {reason}"
        ) from None
    number = int(found[0][4][1])
    try:
        return await server.listen_tcp(host or None, number)
    except OSError as exc:
        raise UsageError(
            f"Failed to listen on {host or '*'}:{port}: {_reason(exc)}"
        ) from exc


async def listen_unix(
    server: Server,
    path: str,
    mode: int | None = None,
    owner: tuple[int, int] | None = None,
    label: str | None = None,
) -> None:
    """Listen on a unix socket (`Server.listen_unix`). Raises `UsageError`."""
    if len(os.fsencode(path)) > _MAX_PATH_LENGTH:
        raise UsageError(
            f"UNIX socket path '{path}' is too long\n"
            f"Path must be less than {_MAX_PATH_LENGTH + 1} bytes"
        )
    try:
        await server.listen_unix(path, mode=mode, owner=owner, label=label)
    except SocketLabelError as exc:
        raise UsageError(
            f"Cannot set SELinux socket create context to {label}: {_reason(exc)}"
        ) from None
    except OSError as exc:
        name = "@" + path[1:] if path.startswith("\0") else path
        raise UsageError(f"Failed to bind socket to {name}: {_reason(exc)}") from None


async def listen_vsock(server: Server, cid: int, port: int) -> tuple[int, int]:
    """Listen on a vsock port; returns CID and port. Raises `UsageError`."""
    try:
        return await server.listen_vsock(cid, port)
    except OSError as exc:
        raise UsageError(
            f"Failed to listen on vsock port {port} of CID {cid}: {_reason(exc)}"
        ) from None


async def listen_fd(server: Server, fd: int) -> tuple[int, Any] | None:
    """Take over an inherited socket.

    Returns its family and its own name if it listens; None for one that is
    connected to a client. Raises `UsageError`.
    """
    try:
        sock, listens = inherited_socket(fd)
        if not listens:
            await server.serve_socket(sock)
            return None
        name = sock.family, sock.getsockname()
        await server.listen_socket(sock)
        return name
    except OSError as exc:
        raise UsageError(
            f"Descriptor {fd} is no stream socket that listens or is connected: "
            f"{_reason(exc)}"
        ) from None


def _reason(exc: OSError) -> str:
    # asyncio puts a sentence of its own in strerror.
    return os.strerror(exc.errno) if exc.errno else str(exc)

"""Where ``nbdqcow serve`` listens: its options, and the sockets they mean."""

import grp
import os
import pwd
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from nbdqcow.errors import UsageError
from nbdqcow.nbd.constants import DEFAULT_PORT
from nbdqcow.nbd.uri import NbdUri

if TYPE_CHECKING:
    from nbdqcow.server.server import Server

DEFAULT_LISTEN: Final = f"127.0.0.1:{DEFAULT_PORT}"
_ANY_ADDRESS: Final = ("", "0.0.0.0", "::")
_ANY_CID: Final = 0xFFFFFFFF
_LOCAL_CID: Final = 1
_MAX_MODE: Final = 0o777

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Places:
    """Where to listen.

    Attributes:
        tcp: host ("" for every address) and port of TCP listeners.
        unix: paths of unix listeners; an abstract one begins with NUL.
        unix_mode, unix_owner: of the sockets among them that are files.
        vsock: address and port of vsock listeners.
        fds: descriptors of inherited sockets, and what to call them.
        stdio: serve one client on standard input and output.
    """

    tcp: Sequence[tuple[str, int]] = ()
    unix: Sequence[str] = ()
    unix_mode: int | None = None
    unix_owner: tuple[int, int] | None = None
    vsock: Sequence[tuple[int, int]] = ()
    fds: Sequence[tuple[int, str]] = ()
    stdio: bool = False


# -- options -----------------------------------------------------------------


def address(text: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``; "" is every address.

    Nothing at all is a variable that was not set, and no wish to be reached from
    everywhere.
    """
    if text in ("", "[]"):
        raise click.BadParameter("give HOST:PORT, with * for all addresses")
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


def vsock_address(text: str) -> tuple[int, int]:
    """Return the CID and port of ``[CID:]PORT``; without one, any CID."""
    cid, _, port = text.rpartition(":")
    numbers = [
        int(word[:11]) if word.isascii() and word.isdigit() else -1
        for word in (cid or str(_ANY_CID), port)
    ]
    if not all(0 <= number <= _ANY_CID for number in numbers):
        raise click.BadParameter(f"'{text}': give a vsock address as [CID:]PORT")
    return numbers[0], numbers[1]


def unix_path(text: str) -> str:
    """Return a socket's path; ``@name`` is an abstract one."""
    if not text or text == "@":
        raise click.BadParameter("a socket needs a name")
    return "\0" + text[1:] if text.startswith("@") else text


def file_mode(text: str) -> int:
    """Return the permissions that an octal number means."""
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= _MAX_MODE:
        raise click.BadParameter(f"'{text}': give an octal number such as 660")
    return mode


def file_owner(text: str) -> tuple[int, int]:
    """Return user and group of ``USER[:GROUP]``, names or numbers; -1 for one
    that is left as it is."""
    user, _, group = text.partition(":")
    if not user and not group:
        raise click.BadParameter("give USER, USER:GROUP or :GROUP")
    return (
        _identity(user, "user", lambda name: pwd.getpwnam(name).pw_uid),
        _identity(group, "group", lambda name: grp.getgrnam(name).gr_gid),
    )


def _identity(name: str, what: str, find: Callable[[str], int]) -> int:
    if not name:
        return -1
    try:
        return find(name)
    except KeyError:
        if name.isascii() and name.isdigit() and int(name[:11]) < _ANY_CID:
            return int(name)
        raise click.BadParameter(f"there is no {what} '{name}'") from None


def place_options(command: F) -> F:
    """Give a click command the options that `take_places` reads."""
    for option in reversed(
        (
            click.option(
                "--listen", type=address, multiple=True, metavar="HOST:PORT",
                help=f"Listen on a TCP address; * for HOST is all of them. May be "
                f"given several times. [default: {DEFAULT_LISTEN}, if nothing "
                f"else is given]",
            ),
            click.option(
                "--unix", type=unix_path, multiple=True, metavar="PATH",
                help="Listen on a unix socket, @NAME for an abstract one. May be "
                "given several times.",
            ),
            click.option(
                "--unix-mode", type=file_mode, metavar="MODE",
                help="Permissions of unix sockets, such as 660. "
                "[default: as umask says]",
            ),
            click.option(
                "--unix-owner", type=file_owner, metavar="USER[:GROUP]",
                help="Owner of unix sockets.",
            ),
            click.option(
                "--vsock", type=vsock_address, multiple=True, metavar="[CID:]PORT",
                help="Listen on a vsock port, for virtual machines of this host. "
                "May be given several times.",
            ),
            click.option(
                "--fd", type=click.IntRange(min=0), multiple=True, metavar="N",
                help="Take over an inherited socket that listens or is connected. "
                "May be given several times.",
            ),
            click.option(
                "--stdio", is_flag=True,
                help="Serve one client on standard input and output.",
            ),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def take_places(options: dict[str, Any], activated: list[tuple[int, str]]) -> Places:
    """Take the options of `place_options` out of ``options``.

    ``activated`` are sockets that the service manager has opened. Raises
    `click.UsageError`.
    """
    fds = [(fd, f"fd {fd}") for fd in options.pop("fd")]
    fds += [(fd, f"fd {fd} ({name})" if name else f"fd {fd}") for fd, name in activated]
    places = Places(
        tcp=options.pop("listen"),
        unix=options.pop("unix"),
        unix_mode=options.pop("unix_mode"),
        unix_owner=options.pop("unix_owner"),
        vsock=options.pop("vsock"),
        fds=fds,
        stdio=options.pop("stdio"),
    )
    listens = bool(places.tcp or places.unix or places.vsock or places.fds)
    if places.stdio and listens:
        raise click.UsageError("--stdio serves one client: listen nowhere else")
    has_files = any(not path.startswith("\0") for path in places.unix)
    if not has_files and (places.unix_mode is not None or places.unix_owner):
        raise click.UsageError("--unix-mode and --unix-owner need --unix=PATH")
    if not (listens or places.stdio):
        return Places(tcp=(address(DEFAULT_LISTEN),))
    return places


# -- listening ---------------------------------------------------------------


async def listen(server: "Server", places: Places) -> list[tuple[str, NbdUri | None]]:
    """Listen everywhere. Standard input and output are the caller's affair.

    Returns what to call each place, and where this machine finds it if it can
    tell. Raises `UsageError`.
    """
    from nbdqcow.cli.listening import listen_fd, listen_tcp, listen_unix, listen_vsock

    found: list[tuple[str, NbdUri | None]] = []
    for host, port in places.tcp:
        found += [tcp_place(*each) for each in await listen_tcp(server, host, port)]
    for path in places.unix:
        await listen_unix(server, path, places.unix_mode, places.unix_owner)
        found.append(unix_place(path))
    for cid, port in places.vsock:
        found.append(vsock_place(*await listen_vsock(server, cid, port)))
    for fd, name in places.fds:
        name_of_socket = await listen_fd(server, fd)
        if name_of_socket is not None:
            text, uri = socket_place(*name_of_socket)
            found.append((f"{name}, {text}" if text else name, uri))
    return found


def tcp_place(host: str, port: int) -> tuple[str, NbdUri]:
    """Return what to call a TCP listener, and where this machine finds it."""
    text = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if host in _ANY_ADDRESS:
        host = "::1" if host == "::" else "127.0.0.1"
    return text, NbdUri(host=host, port=port)


def unix_place(path: str) -> tuple[str, NbdUri]:
    """Return the same of a unix listener."""
    if path.startswith("\0"):
        return "@" + path[1:], NbdUri("unix", socket=path)
    return path, NbdUri("unix", socket=os.path.abspath(path))


def vsock_place(cid: int, port: int) -> tuple[str, NbdUri]:
    """Return the same of a vsock listener. Its clients are other machines."""
    local = str(_LOCAL_CID if cid == _ANY_CID else cid)
    return f"vsock {'*' if cid == _ANY_CID else cid}:{port}", NbdUri(
        "vsock", local, port
    )


def socket_place(family: int, name: Any) -> tuple[str, NbdUri | None]:
    """Return the same of a socket with that name (`socket.getsockname`)."""
    if family in (socket.AF_INET, socket.AF_INET6):
        return tcp_place(*name[:2])
    if family == socket.AF_VSOCK:
        return vsock_place(*name)
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    return unix_place(name) if name else ("", None)


def raise_fd_limit(nb_clients: int) -> None:
    """Allow as many open files as that many clients need, if we may.

    Raises `UsageError` if the limit of this process is too low for them.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A client on a unix socket has two descriptors.
    wanted = 2 * nb_clients + 256
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise UsageError(
            f"{nb_clients} clients need more open files than the limit of {hard}: "
            f"raise it (ulimit -n, LimitNOFILE=) or lower --max-connections"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

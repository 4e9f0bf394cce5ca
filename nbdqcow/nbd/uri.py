"""NBD URIs, read and written as uri.md (the NBD URI format) says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from nbdqcow.errors import UsageError
from nbdqcow.nbd import constants as nbd

_SCHEMES: Final = {
    "nbd": ("tcp", False),
    "nbds": ("tcp", True),
    "nbd+tcp": ("tcp", False),
    "nbds+tcp": ("tcp", True),
    "nbd+unix": ("unix", False),
    "nbds+unix": ("unix", True),
    "nbd+vsock": ("vsock", False),
    "nbds+vsock": ("vsock", True),
}
_VSOCK_HOST_CID: Final = "2"
_PARAMETERS: Final = {
    "socket": None,
    "tls-type": ("anon", "x509", "psk"),
    "tls-hostname": None,
    "tls-verify-peer": ("0", "1"),
    "tls-certificates": None,
    "tls-psk-file": None,
    "tls-creds": None,
}
"""Query parameters, and their values if those are limited. ``tls-creds`` is ours:
an object's id, which a command line turns into the others."""


@dataclass(frozen=True, slots=True)
class NbdUri:
    """Where an export is.

    Attributes:
        transport: ``tcp``, ``unix`` or ``vsock``.
        host: host name or address, or the vsock CID in decimal.
        port: TCP or vsock port.
        socket: path of the unix socket; an abstract one begins with NUL.
        export: the export's name.
        tls: True if the connection must be encrypted.
        username: for TLS with a pre-shared key.
        parameters: the other query parameters.
    """

    transport: str = "tcp"
    host: str = "localhost"
    port: int = nbd.DEFAULT_PORT
    socket: str = ""
    export: str = ""
    tls: bool = False
    username: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Where the server is, without the export: for messages."""
        return self.socket if self.transport == "unix" else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        scheme = "nbds" if self.tls else "nbd"
        query = dict(self.parameters)
        authority = f"{_quote(self.username, safe='')}@" if self.username else ""
        if self.transport == "unix":
            scheme += "+unix"
            query = {"socket": self.socket} | query
        else:
            scheme += "+vsock" if self.transport == "vsock" else ""
            if ":" in self.host:
                # The % before a zone is written %25 (RFC 6874).
                authority += f"[{_quote(self.host, safe=':')}]"
            else:
                authority += _quote(self.host, safe="")
            if self.port != nbd.DEFAULT_PORT:
                authority += f":{self.port}"
        text = f"{scheme}://{authority}/{_quote(self.export)}"
        if query:
            text += "?" + "&".join(f"{k}={_quote(v)}" for k, v in query.items())
        return text


def parse_uri(text: str) -> NbdUri:
    """Return what an NBD URI names. Raises `UsageError` if it is none."""
    scheme, colon, rest = text.partition(":")
    if not colon or not rest.startswith("//"):
        raise UsageError(f"'{text}' is not an NBD URI")
    if scheme.lower() not in _SCHEMES:
        raise UsageError(f"'{text}': unknown scheme '{scheme}'")
    transport, tls = _SCHEMES[scheme.lower()]
    rest, _, fragment = rest[2:].partition("#")
    if fragment:
        raise UsageError(f"'{text}': an NBD URI has no fragment")
    location, _, query = rest.partition("?")
    authority, _, path = location.partition("/")
    parameters = _parse_query(text, query)
    socket = parameters.pop("socket", "")
    if (transport == "unix") != bool(socket):
        wanted = "needs" if transport == "unix" else "can't have"
        raise UsageError(f"'{text}': {scheme} {wanted} a socket=PATH parameter")
    username, at, host_port = authority.rpartition("@")
    host, port = _parse_host_port(text, host_port)
    if port >> (32 if transport == "vsock" else 16):
        raise UsageError(f"'{text}': bad port '{port}'")
    if transport == "vsock":
        host = host or _VSOCK_HOST_CID
        if not (host.isascii() and host.isdigit()):
            raise UsageError(f"'{text}': a vsock address is a number")
    elif transport == "unix" and host_port:
        raise UsageError(f"'{text}': {scheme} has no host")
    return NbdUri(
        transport=transport,
        host=host or "localhost",
        port=port,
        socket=socket,
        export=_unquote(text, path, "strict"),
        tls=tls,
        username=_unquote(text, username, "strict") if at else "",
        parameters=parameters,
    )


def parse_place(text: str) -> NbdUri:
    """Return what an NBD URI, or a name in QEMU's older form, means.

    That is ``nbd:HOST:PORT`` or ``nbd:unix:PATH``, both perhaps followed by
    ``:exportname=NAME``. Raises `UsageError`.
    """
    scheme, _, rest = text.partition(":")
    if scheme != "nbd" or rest.startswith("//"):
        return parse_uri(text)
    place, _, export = rest.partition(":exportname=")
    if place.startswith("unix:"):
        path = place.removeprefix("unix:")
        if not path:
            raise UsageError(f"'{text}': a unix socket needs a path")
        return NbdUri("unix", socket=path, export=export)
    if not place:
        raise UsageError("NBD server address missing")
    host, port = _parse_host_port(text, place)
    if not host or port >> 16:
        raise UsageError(f"'{text}' is not nbd:HOST:PORT")
    return NbdUri(host=host, port=port, export=export)


def _parse_query(uri: str, query: str) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for item in filter(None, query.split("&")):
        name, _, value = item.partition("=")
        # A socket is a file name, and those are any bytes.
        value = _unquote(uri, value, "surrogateescape")
        if name not in _PARAMETERS and not name.startswith("x-"):
            raise UsageError(f"'{uri}': unknown parameter '{name}'")
        values = _PARAMETERS.get(name)
        if values and value not in values:
            raise UsageError(f"'{uri}': {name} is one of {', '.join(values)}")
        if name in parameters:
            raise UsageError(f"'{uri}': {name} is given twice")
        parameters[name] = value
    return parameters


def _parse_host_port(uri: str, text: str) -> tuple[str, int]:
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise UsageError(f"'{uri}': bad IPv6 address")
        port = rest[1:]
    else:
        host, _, port = text.partition(":")
    if not port:
        return _unquote(uri, host, "strict"), nbd.DEFAULT_PORT
    if not (port.isascii() and port.isdigit()) or len(port) > 10:
        raise UsageError(f"'{uri}': bad port '{port}'")
    return _unquote(uri, host, "strict"), int(port)


def _quote(text: str, safe: str = "/") -> str:
    return quote(text.encode(errors="surrogateescape"), safe=safe)


def _unquote(uri: str, text: str, errors: str) -> str:
    try:
        return unquote_to_bytes(text).decode(errors=errors)
    except UnicodeError:
        raise UsageError(f"'{uri}' is not UTF-8") from None

"""What a server offers: ``nbdqcow-nbd --list``."""

import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from nbdqcow.errors import NbdQcowError, ProtocolError
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.client import (
    ClientHandshake,
    OptionResult,
    RemoteExport,
)
from nbdqcow.tls import TlsCredentials, describe_tls_error

_TIMEOUT: Final = 30.0
"""Seconds without a byte from the server."""
_NAME_MISMATCHES: Final = (62, 64)
"""OpenSSL's ``X509_V_ERR_HOSTNAME_MISMATCH`` and ``_IP_ADDRESS_MISMATCH``."""
_ALL_INFOS: Final = (nbd.INFO_NAME, nbd.INFO_DESCRIPTION, nbd.INFO_BLOCK_SIZE)
# What qemu-nbd calls the transmission flags.
_FLAG_WORDS: Final = {
    nbd.FLAG_READ_ONLY: "readonly",
    nbd.FLAG_SEND_FLUSH: "flush",
    nbd.FLAG_SEND_FUA: "fua",
    nbd.FLAG_ROTATIONAL: "rotational",
    nbd.FLAG_SEND_TRIM: "trim",
    nbd.FLAG_SEND_WRITE_ZEROES: "zeroes",
    nbd.FLAG_SEND_DF: "df",
    nbd.FLAG_CAN_MULTI_CONN: "multi",
    nbd.FLAG_SEND_RESIZE: "resize",
    nbd.FLAG_SEND_CACHE: "cache",
    nbd.FLAG_SEND_FAST_ZERO: "fast-zero",
}


@dataclass(frozen=True, slots=True)
class ClientTls:
    """TLS to a server, which must have a certificate for ``hostname``; with
    None, for any."""

    credentials: TlsCredentials[ssl.SSLContext]
    hostname: str | None


@dataclass(slots=True)
class ListedExport:
    """One export of a server.

    Attributes:
        name, description: as LIST says.
        details: what INFO says, if the server knows that option.
        contexts: the metadata contexts that it offers.
    """

    name: str
    description: str
    details: RemoteExport | None
    contexts: list[str]


def connect(host: str, port: str, path: str | None) -> socket.socket:
    """Connect to a unix socket, or else to a TCP port. Raises `OSError`."""
    if path is None:
        sock = socket.create_connection((host, port), timeout=_TIMEOUT)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(_TIMEOUT)
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


def list_exports(
    sock: socket.socket, tls: ClientTls | None = None
) -> list[ListedExport]:
    """Ask a server for its exports, and all about each of them. With ``tls``
    nothing else is said before the connection is encrypted.

    Raises `NbdQcowError` if it refuses or breaks the protocol, and `OSError`.
    """
    client = ClientHandshake()
    client.exchange(sock.sendall, sock.recv)
    if not client.server_flags & nbd.FLAG_FIXED_NEWSTYLE:
        raise ProtocolError("the server is too old to list its exports")
    if tls is not None:
        with _start_tls(sock, client, tls) as encrypted:
            return _list(encrypted, client)
    return _list(sock, client)


def _start_tls(
    sock: socket.socket, client: ClientHandshake, tls: ClientTls
) -> ssl.SSLSocket:
    client.starttls()
    answer = _answer(sock, client)
    if answer.error:
        raise NbdQcowError(answer.refusal)
    context = tls.credentials.context_blocking()
    verifies = context.verify_mode is not ssl.CERT_NONE
    if verifies and tls.hostname is None:
        # Any server with a certificate of the authority could be the one.
        raise NbdQcowError("No hostname for certificate validation")
    context.check_hostname = verifies
    try:
        return context.wrap_socket(sock, server_hostname=tls.hostname)
    except ssl.SSLCertVerificationError as exc:
        if exc.verify_code not in _NAME_MISMATCHES:
            raise NbdQcowError(f"TLS: {describe_tls_error(exc)}") from None
        raise NbdQcowError(
            f"Certificate does not match the hostname {tls.hostname}"
        ) from None
    except (OSError, ValueError) as exc:
        raise NbdQcowError(f"TLS: {describe_tls_error(exc)}") from None


def _list(sock: socket.socket, client: ClientHandshake) -> list[ListedExport]:
    client.structured_reply()
    structured = not _answer(sock, client).error
    client.list_exports()
    listed = _answer(sock, client)
    if listed.error:
        raise NbdQcowError(listed.refusal)
    exports = []
    for name, description in listed.exports:
        client.info(name, _ALL_INFOS)
        details = _answer(sock, client).export
        contexts: list[str] = []
        if structured and details is not None:
            client.list_meta_contexts(name)
            contexts = _answer(sock, client).contexts
        exports.append(ListedExport(name, description, details, contexts))
    client.abort()
    # It may be gone: all that was to be asked is answered.
    with suppress(OSError):
        sock.sendall(client.data_to_send())
    return exports


def _answer(sock: socket.socket, client: ClientHandshake) -> OptionResult:
    client.exchange(sock.sendall, sock.recv)
    assert client.result is not None
    return client.result


def format_exports(exports: list[ListedExport]) -> str:
    """Return the list as ``qemu-nbd --list`` prints it."""
    lines = [f"exports available: {len(exports)}"]
    for export in exports:
        lines.append(f" export: '{export.name}'")
        details = export.details
        description = export.description or (details and details.description)
        if description:
            lines.append(f"  description: {description}")
        if details is not None:
            words = [w for flag, w in _FLAG_WORDS.items() if details.flags & flag]
            lines.append(f"  size:  {details.size}")
            lines.append(f"  flags: {details.flags:#x} ( {' '.join((*words, ')'))}")
            if details.block_sizes is not None:
                minimum, preferred, maximum = details.block_sizes
                lines.append(f"  min block: {minimum}")
                lines.append(f"  opt block: {preferred}")
                lines.append(f"  max block: {maximum}")
        if export.contexts:
            lines.append(f"  available meta contexts: {len(export.contexts)}")
            lines += [f"   {context}" for context in export.contexts]
    return "\n".join(lines)

"""TLS to an NBD server, as a URI's parameters describe it."""

import getpass
import os
import ssl
from typing import Final

from nbdqcow.errors import CredentialsError
from nbdqcow.nbd.uri import NbdUri
from nbdqcow.tls import (
    PskCredentials,
    TlsCredentials,
    VerifyPeer,
    X509ClientCredentials,
)

# Where libnbd looks, too.
_DIRECTORIES: Final = (
    "~/.pki/libnbd",
    "~/.config/pki/libnbd",
    "/etc/pki/libnbd",
)


def client_context_blocking(uri: NbdUri) -> tuple[ssl.SSLContext, str | None]:
    """Return the context of a connection to ``uri``, and the name that the
    server's certificate must have; None for any.

    Raises `CredentialsError`.
    """
    if (name := uri.parameters.get("tls-creds")) is not None:
        raise CredentialsError(f"No TLS credentials with id '{name}'")
    kind = uri.parameters.get("tls-type")
    psk_file = uri.parameters.get("tls-psk-file")
    if kind == "anon":
        raise CredentialsError("anonymous TLS keeps nobody out: use x509 or psk")
    if kind == "psk" or (kind is None and psk_file):
        if not psk_file:
            raise CredentialsError("tls-type=psk needs tls-psk-file=FILE")
        credentials: TlsCredentials[ssl.SSLContext] = PskCredentials(
            psk_file, is_server=False, username=uri.username or getpass.getuser()
        )
        return credentials.context_blocking(), None
    verify = uri.parameters.get("tls-verify-peer") != "0"
    credentials = X509ClientCredentials(
        uri.parameters.get("tls-certificates") or _default_directory(),
        verify_peer=VerifyPeer.ON if verify else VerifyPeer.OFF,
    )
    hostname = uri.parameters.get("tls-hostname")
    if hostname is None and uri.transport == "tcp":
        hostname = uri.host
    context = credentials.context_blocking()
    context.check_hostname = verify and hostname is not None
    return context, hostname


def _default_directory() -> str:
    for directory in map(os.path.expanduser, _DIRECTORIES):
        if os.path.isdir(directory):
            return directory
    raise CredentialsError("which certificates? Give tls-certificates=DIR")

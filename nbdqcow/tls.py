"""TLS credentials: directories as QEMU and libnbd lay them out.

A directory has ``ca-cert.pem`` and perhaps ``ca-crl.pem``; for a server
``server-cert.pem`` and ``server-key.pem``, for a client perhaps
``client-cert.pem`` and ``client-key.pem``. One for pre-shared keys has
`PSK_KEYS`. Diffie-Hellman parameters (``dh-params.pem``) are not needed.

The files are looked at for every connection, so new ones are used without a
restart. A new set that can't be used is reported once, and the old one stays.
"""

import enum
import logging
import os
import ssl
import sys
import threading
from abc import ABC, abstractmethod
from typing import ClassVar, Final, Generic, TypeVar

from nbdqcow.errors import CredentialsError

logger = logging.getLogger(__name__)

CA_CERT: Final = "ca-cert.pem"
CA_CRL: Final = "ca-crl.pem"
PSK_KEYS: Final = "keys.psk"
PSK_NEEDS: Final = "TLS-PSK needs Python 3.13"

_MAX_PSK_FILE: Final = 1 << 20
_MAX_PSK_KEY: Final = 256
"""Bytes: more than OpenSSL takes."""

_PSK_CIPHERS: Final = "ECDHE+PSK:PSK+AESGCM:PSK:!eNULL"
"""Some that encrypt nothing are of PSK, and only the level of security is in the
way of them, which a machine's ``openssl.cnf`` can lower."""

_VERSIONS: Final = {
    "TLS1.2": ssl.TLSVersion.TLSv1_2,
    "TLS1.3": ssl.TLSVersion.TLSv1_3,
}
_ALL_VERSIONS: Final = frozenset(_VERSIONS.values())
_OLD_VERSIONS: Final = ("SSL3.0", "TLS1.0", "TLS1.1", "DTLS1.0", "DTLS1.2")
_BASE_PRIORITIES: Final = ("NORMAL", "SECURE128", "SYSTEM", "@SYSTEM")


class VerifyPeer(enum.Enum):
    """Whether a server wants certificates of its clients."""

    OFF = "off"
    OPTIONAL = "optional"
    """One that is shown must be good."""
    ON = "on"


ContextT = TypeVar("ContextT")


class TlsCredentials(ABC, Generic[ContextT]):
    """Files, and the context made of them, from which a library of TLS makes
    connections.

    Attributes:
        is_server: which end of the connection this is.
        verifies_peer: whether the peer's certificate is asked for and checked.
    """

    verifies_peer = False

    def __init__(
        self, directory: str, *, is_server: bool, priority: str | None = None
    ) -> None:
        """Load the files for the first time. Raises `CredentialsError`."""
        self.is_server = is_server
        self._directory = directory
        self._priority = priority
        self._versions = parse_priority(priority or "NORMAL")
        self._lock = threading.Lock()
        self._files = self._look()
        self._context = self._load()
        self._loaded_files = self._files

    @abstractmethod
    def as_parameters(self) -> dict[str, str]:
        """Return what says the same in an NBD URI: query parameters, and
        ``username``. Raises `CredentialsError` for what none can say."""

    @staticmethod
    def _refuse(**given: str | None) -> None:
        for name, value in given.items():
            if value is not None:
                raise CredentialsError(f"{name}= is not supported for an image")

    def context_blocking(self) -> ContextT:
        """Return the context for a new connection. Thread-safe."""
        with self._lock:
            files = self._look()
            if files == self._files:
                return self._context
            self._files = files
            try:
                for name, loaded in self._loaded_files.items():
                    # Without its revocation list a server would let in those
                    # that were locked out.
                    if loaded is not None and files[name] is None:
                        raise _missing(self._path(name))
                self._context = self._load()
                self._loaded_files = files
            except CredentialsError as exc:
                logger.warning("the TLS credentials stay as they were: %s", exc)
            else:
                logger.info("the TLS credentials in %s are new", self._directory)
            return self._context

    @property
    @abstractmethod
    def _names(self) -> tuple[str, ...]:
        """The files that matter."""

    @abstractmethod
    def _load(self) -> ContextT:
        """Make a context of the files. Raises `CredentialsError`."""

    def _look(self) -> dict[str, tuple[int, int, int] | None]:
        """Return what changes when a file does; None for one that is not there."""
        found: dict[str, tuple[int, int, int] | None] = {}
        for name in self._names:
            try:
                status = os.stat(self._path(name))
            except OSError:
                found[name] = None
            else:
                found[name] = status.st_mtime_ns, status.st_ino, status.st_size
        return found

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)


class X509Credentials(TlsCredentials[ContextT]):
    """Certificates: what both ends have in common.

    The certificate authority is trusted whether or not it is a root. With a
    revocation list, the peer's certificate must not be on it, and the list
    must be of the peer's issuer and not out of date.
    """

    _serves: ClassVar[bool]
    """Which end's they are."""

    def __init__(
        self,
        directory: str,
        *,
        verify_peer: VerifyPeer = VerifyPeer.ON,
        priority: str | None = None,
        password: str | None = None,
    ) -> None:
        """``password`` is that of the key file."""
        self.verifies_peer = verify_peer is not VerifyPeer.OFF
        self._verify_peer = verify_peer
        self._password = password
        end = "server" if self._serves else "client"
        self._cert_name = f"{end}-cert.pem"
        self._key_name = f"{end}-key.pem"
        super().__init__(directory, is_server=self._serves, priority=priority)

    def as_parameters(self) -> dict[str, str]:
        """See `TlsCredentials.as_parameters`."""
        self._refuse(priority=self._priority, passwordid=self._password)
        return {
            "tls-certificates": os.path.abspath(self._directory),
            "tls-verify-peer": "1" if self.verifies_peer else "0",
        }

    @property
    def _names(self) -> tuple[str, ...]:
        return CA_CERT, CA_CRL, self._cert_name, self._key_name

    def _own_paths(self) -> tuple[str, str]:
        """Return where this end's certificate and its key are.

        Raises `CredentialsError` if one can't be read: OpenSSL's errors don't say
        which of the two files they are about.
        """
        paths = self._path(self._cert_name), self._path(self._key_name)
        for path in paths:
            check_readable(path)
        return paths


class X509ClientCredentials(X509Credentials[ssl.SSLContext]):
    """Certificates of a client; it checks its peer's host name too, where it
    knows one. A server has `nbdqcow.server.tls_openssl.X509ServerCredentials`."""

    _serves: ClassVar[bool] = False

    def _load(self) -> ssl.SSLContext:
        context = _new_context(self._versions, is_server=False)
        context.check_hostname = False
        if self._verify_peer is VerifyPeer.OFF:
            context.verify_mode = ssl.CERT_NONE
        else:
            self._load_authority(context)
            context.verify_mode = ssl.CERT_REQUIRED
        if self._files[self._cert_name] is not None:
            self._load_own(context)
        return context

    def _load_authority(self, context: ssl.SSLContext) -> None:
        self._load_trusted(context, CA_CERT)
        context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
        # One that has vanished since the look is an error.
        if self._files[CA_CRL] is not None:
            self._load_trusted(context, CA_CRL)
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF

    def _load_trusted(self, context: ssl.SSLContext, name: str) -> None:
        path = self._path(name)
        try:
            context.load_verify_locations(path)
        except ssl.SSLError as exc:
            raise unusable(path, exc.reason) from None
        except OSError as exc:
            raise _unreadable(path, exc) from None

    def _load_own(self, context: ssl.SSLContext) -> None:
        cert, key = self._own_paths()
        try:
            # With no password given OpenSSL asks for it on the terminal.
            context.load_cert_chain(cert, key, password=self._password or "")
        except ssl.SSLError as exc:
            if exc.reason == "KEY_VALUES_MISMATCH":
                raise mismatched(cert, key) from None
            raise unusable(f"{cert} or {key}", exc.reason) from None
        except (OSError, ValueError) as exc:
            raise CredentialsError(f"Unable to use {cert} and {key}: {exc}") from None


def has_psk() -> bool:
    """Return whether this Python's ``ssl`` knows pre-shared keys."""
    return getattr(ssl, "HAS_PSK", False)


class PskCredentials(TlsCredentials[ssl.SSLContext]):
    """Pre-shared keys: a file has lines ``USER:KEY``, the key in hex, as
    GnuTLS's psktool writes them. A client uses the key of ``username``."""

    def __init__(
        self,
        path: str,
        *,
        is_server: bool,
        username: str = "qemu",
        priority: str | None = None,
    ) -> None:
        if not has_psk():
            raise CredentialsError(PSK_NEEDS)
        directory, self._name = os.path.split(path)
        self._username = username
        super().__init__(directory, is_server=is_server, priority=priority)

    def as_parameters(self) -> dict[str, str]:
        """See `TlsCredentials.as_parameters`."""
        self._refuse(priority=self._priority)
        path = os.path.abspath(os.path.join(self._directory, self._name))
        return {"tls-psk-file": path, "username": self._username}

    @property
    def _names(self) -> tuple[str, ...]:
        return (self._name,)

    def _load(self) -> ssl.SSLContext:
        path = self._path(self._name)
        keys = load_psk_file(path)
        context = _new_context(self._versions, is_server=self.is_server)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_ciphers(_PSK_CIPHERS)
        if sys.version_info >= (3, 13):
            if self.is_server:
                context.set_psk_server_callback(
                    lambda identity: keys.get(identity or "", b"")
                )
            else:
                if self._username not in keys:
                    raise CredentialsError(f"{path} has no key of '{self._username}'")
                answer = self._username, keys[self._username]
                context.set_psk_client_callback(lambda hint: answer)
        return context


def load_psk_file(path: str) -> dict[str, bytes]:
    """Return the key of each user. Raises `CredentialsError`."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_PSK_FILE + 1)
    except OSError as exc:
        raise _unreadable(path, exc) from None
    if len(content) > _MAX_PSK_FILE:
        raise CredentialsError(f"{path} is larger than {_MAX_PSK_FILE} bytes")
    keys: dict[str, bytes] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip() or line.startswith(b"#"):
            continue
        user, colon, digits = line.rpartition(b":")
        try:
            name, key = user.decode(), bytes.fromhex(digits.decode())
        except ValueError:
            name, key = "", b""
        if not (colon and name and 0 < len(key) <= _MAX_PSK_KEY):
            raise CredentialsError(f"{path}: line {number} is not USER:HEXKEY")
        keys[name] = key
    return keys


def parse_priority(text: str) -> frozenset[ssl.TLSVersion]:
    """Return the versions of TLS that a GnuTLS priority string allows.

    Of those strings we have the base (``NORMAL``) and the versions
    (``-VERS-TLS1.3``); ciphers are OpenSSL's default. Raises
    `CredentialsError` for all else.
    """
    base, *modifiers = text.split(":")
    versions = set(_ALL_VERSIONS)
    if base not in _BASE_PRIORITIES:
        raise CredentialsError(
            f"priority '{text}' must begin with one of {', '.join(_BASE_PRIORITIES)}"
        )
    for modifier in modifiers:
        sign, name = modifier[:1], modifier[1:].removeprefix("VERS-")
        if sign not in ("+", "-", "!") or not modifier[1:].startswith("VERS-"):
            raise CredentialsError(
                f"'{modifier}' in priority '{text}' is not supported: only "
                "versions can be chosen, as in NORMAL:-VERS-TLS1.3"
            )
        if name in ("ALL", "TLS-ALL"):
            chosen = set(_ALL_VERSIONS)
        elif name in _VERSIONS:
            chosen = {_VERSIONS[name]}
        elif name in _OLD_VERSIONS and sign != "+":
            continue
        else:
            raise CredentialsError(f"'{name}' in priority '{text}' is not supported")
        versions = versions | chosen if sign == "+" else versions - chosen
    if not versions:
        raise CredentialsError(f"priority '{text}' leaves no version of TLS")
    return frozenset(versions)


def refused_certificate(reason: str) -> str:
    """Return OpenSSL's reason to refuse a certificate in a sentence."""
    return f"the peer's certificate is refused: {reason}"


def describe_tls_error(exc: BaseException) -> str:
    """Return a TLS failure in words, without the place in Python's source."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return refused_certificate(exc.verify_message)
    if isinstance(exc, ssl.SSLError) and exc.reason:
        return str(exc.reason).replace("_", " ").lower()
    if isinstance(exc, ConnectionError) or not str(exc):
        return "the connection was closed"
    return str(exc)


def _new_context(
    versions: frozenset[ssl.TLSVersion], *, is_server: bool
) -> ssl.SSLContext:
    context = ssl.SSLContext(
        ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT
    )
    context.minimum_version = min(versions)
    context.maximum_version = max(versions)
    # A client that renegotiates could have a reply wait for it, and a
    # resumed session was not checked against a new revocation list.
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    if is_server:
        context.num_tickets = 0
    return context


def _missing(path: str) -> CredentialsError:
    return CredentialsError(
        f"Unable to access credentials {path}: No such file or directory"
    )


def check_readable(path: str) -> None:
    """Raise `CredentialsError` for a file that can't be opened."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as exc:
        raise _unreadable(path, exc) from None


def _unreadable(path: str, exc: OSError) -> CredentialsError:
    return CredentialsError(f"Unable to access credentials {path}: {exc.strerror}")


def unusable(what: str, reason: str | None) -> CredentialsError:
    """Return the error of files that are not what they should be; ``reason`` is
    OpenSSL's, which has none for what is no PEM at all."""
    reason = reason or "no PEM file, or a key whose password is not known"
    return CredentialsError(
        f"Unable to use credentials {what}: {reason.replace('_', ' ')}"
    )


def mismatched(cert: str, key: str) -> CredentialsError:
    """Return the error of a key that is another certificate's."""
    return CredentialsError(f"{key} is not the key of {cert}")

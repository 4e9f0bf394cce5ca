"""X.509 on the server's side, by the OpenSSL that ``cryptography`` brings.

It is newer than what distributions link Python's ``ssl`` with, and encrypts more
than twice as fast as OpenSSL 3.0 where the processor has VAES. pyOpenSSL makes
and checks everything; only the two calls that move data go past it, because its
own copy what they move once or twice more.
"""

import contextlib
from typing import Any, ClassVar, Final

from cryptography.hazmat.bindings.openssl.binding import Binding
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL, crypto

from nbdqcow.errors import CredentialsError, TlsError
from nbdqcow.server.tls_engine import TlsEngine
from nbdqcow.tls import (
    CA_CERT,
    CA_CRL,
    VerifyPeer,
    X509Credentials,
    check_readable,
    mismatched,
    refused_certificate,
    unusable,
)
from nbdqcow.types import Buffer

_ffi: Final[Any] = Binding.ffi
_lib: Final[Any] = Binding().lib

# A thread has one queue of errors. What somebody else has left in it would be taken
# for the reason why a connection waits.
_forget_errors: Final[Any] = _lib.ERR_clear_error


def _reason(exc: SSL.Error | crypto.Error) -> str | None:
    """Return OpenSSL's reason: the first of its errors, as Python's ``ssl`` has it."""
    errors = exc.args[0] if exc.args else ()
    return str(errors[0][2]) or None if errors else None


class X509ServerCredentials(X509Credentials[SSL.Context]):
    """Certificates of a server."""

    _serves: ClassVar[bool] = True

    def _load(self) -> SSL.Context:
        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        context.set_min_proto_version(min(self._versions))
        context.set_max_proto_version(max(self._versions))
        # A client that renegotiates could have a reply wait for it, and a
        # resumed session was not checked against a new revocation list.
        context.set_options(SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_TICKET)
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        # Connections that wait for something keep no buffers.
        context.set_mode(SSL.MODE_RELEASE_BUFFERS)
        if self._verify_peer is not VerifyPeer.OFF:
            self._load_authority(context)
            optional = self._verify_peer is VerifyPeer.OPTIONAL
            context.set_verify(
                SSL.VERIFY_PEER | (0 if optional else SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
            )
        self._load_own(context)
        return context

    def _load_authority(self, context: SSL.Context) -> None:
        store = context.get_cert_store()
        assert store is not None
        self._load_trusted(store, CA_CERT)
        flags = crypto.X509StoreFlags.PARTIAL_CHAIN
        # One that has vanished since the look is an error.
        if self._files[CA_CRL] is not None:
            self._load_trusted(store, CA_CRL)
            flags |= crypto.X509StoreFlags.CRL_CHECK
        store.set_flags(flags)

    def _load_trusted(self, store: crypto.X509Store, name: str) -> None:
        path = self._path(name)
        check_readable(path)
        try:
            store.load_locations(path)
        except crypto.Error as exc:
            raise unusable(path, _reason(exc)) from None

    def _load_own(self, context: SSL.Context) -> None:
        cert, key = self._own_paths()
        try:
            context.use_certificate_chain_file(cert)
            with open(key, "rb") as file:
                # With no password given OpenSSL asks for it on the terminal.
                loaded = crypto.load_privatekey(
                    crypto.FILETYPE_PEM, file.read(), (self._password or "").encode()
                )
            # Past `Context.use_privatekey`: cryptography's own reader refuses what
            # GnuTLS's certtool writes, and takes a key of RSA-PSS for one of RSA.
            if _lib.SSL_CTX_use_PrivateKey(context._context, loaded._pkey) != 1:
                SSL._raise_current_error()
            context.check_privatekey()
        except (SSL.Error, crypto.Error) as exc:
            reason = _reason(exc)
            if reason == "key values mismatch":
                raise mismatched(cert, key) from None
            raise unusable(f"{cert} or {key}", reason) from None
        except (OSError, ValueError, TypeError) as exc:
            raise CredentialsError(f"Unable to use {cert} and {key}: {exc}") from None


class OpenSslEngine(TlsEngine):
    """TLS by pyOpenSSL."""

    def __init__(self, context: SSL.Context) -> None:
        self._tls = SSL.Connection(context)
        self._tls.set_accept_state()
        self._ssl: Any = self._tls._ssl
        self._outgoing: Any = self._tls._from_ssl

    def receive(self, data: memoryview) -> None:
        """See `TlsEngine`."""
        self._tls.bio_write(data)

    def handshake(self) -> bool:
        """See `TlsEngine`."""
        _forget_errors()
        try:
            self._tls.do_handshake()
        except SSL.WantReadError:
            return False
        except SSL.Error as exc:
            raise self._described(exc) from exc
        return True

    def read_into(self, buffer: memoryview) -> int:
        """See `TlsEngine`."""
        # pyOpenSSL's `recv_into` has a buffer of its own that it copies from.
        _forget_errors()
        tls, read = self._ssl, _lib.SSL_read
        nb_read, size = 0, len(buffer)
        with _ffi.from_buffer(buffer, require_writable=True) as memory:
            while nb_read < size:
                result = read(tls, memory + nb_read, size - nb_read)
                if result <= 0:
                    break
                nb_read += result
            else:
                return nb_read
        if _lib.SSL_get_error(tls, result) != _lib.SSL_ERROR_WANT_READ:
            self._end_reading(result)
        return nb_read

    def _end_reading(self, result: int) -> None:
        try:
            self._tls._raise_ssl_error(self._ssl, result)
        except SSL.ZeroReturnError:
            self.at_end = True
        except SSL.Error as exc:
            raise self._described(exc) from exc

    def write(self, data: Buffer) -> None:
        """See `TlsEngine`."""
        try:
            self._tls.sendall(data)
        except SSL.Error as exc:
            raise self._described(exc) from exc

    def take(self, buffer: memoryview) -> int:
        """See `TlsEngine`."""
        # pyOpenSSL's `bio_read` copies twice.
        with _ffi.from_buffer(buffer, require_writable=True) as memory:
            return max(int(_lib.BIO_read(self._outgoing, memory, len(memory))), 0)

    def end(self) -> None:
        """See `TlsEngine`."""
        # Before the end of the handshake there is nobody to tell.
        with contextlib.suppress(SSL.Error):
            self._tls.shutdown()

    def peer_certificate(self) -> bytes | None:
        """See `TlsEngine`."""
        certificate = self._tls.get_peer_certificate(as_cryptography=True)
        return None if certificate is None else certificate.public_bytes(Encoding.DER)

    def _described(self, exc: SSL.Error) -> TlsError:
        verified = _lib.SSL_get_verify_result(self._ssl)
        if verified != _lib.X509_V_OK:
            words = _ffi.string(_lib.X509_verify_cert_error_string(verified)).decode()
            return TlsError(refused_certificate(words))
        return TlsError(_reason(exc) or "the connection was closed")

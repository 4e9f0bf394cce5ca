"""``--object``: credentials, secrets and rules, with the properties of QEMU."""

import base64
import json
import os
import re
import string
from collections.abc import Callable, Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from nbdqcow.block.json_options import DuplicateKeyError, load_json
from nbdqcow.cli.option_text import parse_properties
from nbdqcow.cli.program import Answered
from nbdqcow.errors import UsageError
from nbdqcow.units import BOOLEANS, boolean_expected

if TYPE_CHECKING:
    from nbdqcow.server.authz import Rules
    from nbdqcow.server.tls import ServerTls
    from nbdqcow.tls import TlsCredentials

_IDENTIFIER: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_HELP: Final = frozenset(("help", "?"))
_BASE64_DIGITS: Final = f"{string.ascii_letters}{string.digits}+/=".encode()
_PADDING: Final = ord("=")
_KEY_LENGTH: Final = 32
_BLOCK_LENGTH: Final = 16
_CREDENTIALS: Final = {
    "dir": "string",
    "endpoint": "QCryptoTLSCredsEndpoint",
    "priority": "string",
    "verify-peer": "bool",
}
_PROPERTIES: Final[Mapping[str, Mapping[str, str]]] = {
    "authz-list": {"policy": "QAuthZListPolicy", "rules": "QAuthZListRule"},
    "authz-list-file": {"filename": "string", "refresh": "bool"},
    "authz-simple": {"identity": "string"},
    "secret": {
        "data": "string",
        "file": "string",
        "format": "QCryptoSecretFormat",
        "iv": "string",
        "keyid": "string",
    },
    "tls-creds-psk": {**_CREDENTIALS, "username": "string"},
    "tls-creds-x509": {
        **_CREDENTIALS,
        "passwordid": "string",
        "sanity-check": "bool",
    },
}
"""What objects there are, and their properties with QEMU's names of the types."""
_RULES: Final = "rules"
"""The property that has parts."""
_ALIASES: Final = {"authz-listfile": "authz-list-file"}


class Objects:
    """The objects of a command line, by their ids."""

    def __init__(self, texts: Sequence[str] = ()) -> None:
        """Make the objects in their order. Raises `UsageError` and
        `CredentialsError`."""
        self._objects: dict[str, object] = {}
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Make one object. Raises `UsageError` and `CredentialsError`, and
        `Answered` if ``text`` asked which there are."""
        answer_help(text)
        properties = parse_object(text)
        kind = properties.take("qom-type")
        maker = _MAKERS.get(kind)
        if maker is None:
            raise UsageError(
                _UNSUPPORTED.get(kind)
                or f"Parameter 'qom-type' does not accept value '{kind}'"
            )
        name = properties.take("id")
        if _IDENTIFIER.fullmatch(name) is None:
            raise UsageError(
                "Parameter 'id' expects an identifier\nIdentifiers consist of"
                " letters, digits, '-', '.', '_', starting with a letter."
            )
        if name in self._objects:
            raise UsageError(
                f"attempt to add duplicate property '{name}' to object (type "
                "'container')"
            )
        properties.check(_PROPERTIES[_ALIASES.get(kind, kind)])
        self._objects[name] = maker(self, properties)

    def credentials(self, name: str, *, is_server: bool) -> "TlsCredentials[Any]":
        """Return the credentials of that id. Raises `UsageError`."""
        from nbdqcow.tls import TlsCredentials

        prefix = "Failed to get TLS creds: "
        found = self._objects.get(name)
        if found is None:
            raise UsageError(f"{prefix}No TLS credentials with id '{name}'")
        if not isinstance(found, TlsCredentials):
            raise UsageError(f"{prefix}Object with id '{name}' is not TLS credentials")
        if found.is_server != is_server:
            end = "server" if is_server else "client"
            raise UsageError(f"{prefix}Expected TLS credentials for a {end} endpoint")
        return found

    def server_tls(
        self, credentials_id: str | None, rules_id: str | None
    ) -> tuple["ServerTls | None", Callable[[bytes | None], bool]]:
        """Return a server's TLS, and which clients' certificates it lets in.

        Raises `UsageError`.
        """
        if credentials_id is None:
            return None, lambda certificate: True
        from nbdqcow.server.tls import ServerTls

        credentials = self.credentials(credentials_id, is_server=True)
        if rules_id is None:
            return ServerTls(credentials), lambda certificate: True
        from nbdqcow.server.authz import by_certificate

        if not credentials.verifies_peer:
            raise UsageError("--tls-authz needs credentials with verify-peer=on")
        return ServerTls(credentials), by_certificate(self.rules(rules_id))

    def rules(self, name: str) -> "Rules":
        """Return the rules of that id. Raises `UsageError`."""
        found = self._objects.get(name)
        if found is None:
            raise UsageError(f"No authorization object with id '{name}'")
        if not hasattr(found, "allow"):
            raise UsageError(f"Object with id '{name}' is not for authorization")
        rules: Rules = found
        return rules

    def secret(self, name: str) -> str:
        """Return the text of a secret. Raises `UsageError`."""
        try:
            return self.secret_bytes(name).decode()
        except UnicodeDecodeError:
            raise UsageError(f"Data from secret {name} is not valid UTF-8") from None

    def secret_bytes(self, name: str) -> bytes:
        """Return the bytes of a secret. Raises `UsageError`."""
        found = self._objects.get(name)
        if not isinstance(found, bytes):
            raise UsageError(f"No secret with id '{name}'")
        return found


class Properties:
    """An object's properties, each to be taken once."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = dict(given)

    def take(self, key: str) -> str:
        """Return a text that must be there. Raises `UsageError`."""
        value = self.take_optional(key)
        if value is None:
            raise UsageError(f"Parameter '{key}' is missing")
        return value

    def take_optional(self, key: str) -> str | None:
        """Return a text or None. Raises `UsageError` for anything else."""
        value = self._given.pop(key, None)
        if value is not None and not isinstance(value, str):
            raise UsageError(f"Invalid parameter type for '{key}', expected: string")
        return value

    def take_boolean(self, key: str, default: bool) -> bool:
        """Return a truth value. Raises `UsageError`."""
        value = self._given.pop(key, default)
        if isinstance(value, str):
            value = BOOLEANS.get(value)
        if not isinstance(value, bool):
            raise UsageError(boolean_expected(key))
        return value

    def take_choice(self, key: str, choices: Sequence[str], default: str) -> str:
        """Return one of a few words. Raises `UsageError`."""
        value = self.take_optional(key)
        if value is None:
            return default
        if value not in choices:
            raise UsageError(f"Parameter '{key}' does not accept value '{value}'")
        return value

    def take_rest(self) -> dict[str, Any]:
        """Return all that was not taken."""
        rest, self._given = self._given, {}
        return rest

    def check(self, known: Container[str]) -> None:
        """Raise `UsageError` for a property that is not ``known``."""
        for key in self._given:
            first, dot, _ = key.partition(".")
            if first not in known:
                _unexpected(first)
            if dot and first != _RULES:
                used = first in self._given
                what = "used inconsistently" if used else "are unexpected"
                raise UsageError(f"Parameters '{first}.*' {what}")


def answer_help(text: str) -> None:
    """Print which objects there are, or which properties one has, if an
    ``--object`` asks for that; raise `Answered` then."""
    if text.startswith("{"):
        return
    kind, *rest = text.split(",")
    kind = kind.removeprefix("qom-type=")
    if kind in _HELP or not _HELP.isdisjoint(rest):
        if kind in _PROPERTIES:
            print(f"{kind} options:")
            for name, value in sorted(_PROPERTIES[kind].items()):
                print(f"  {name}=<{value}>")
        else:
            print("List of user creatable objects:")
            for name in sorted(_PROPERTIES):
                print(f"  {name}")
        raise Answered


def parse_object(text: str) -> Properties:
    """Return the properties of ``TYPE,id=ID,...`` or of a JSON object.

    Raises `UsageError`.
    """
    if text.startswith("{"):
        return Properties(_parse_json(text))
    kind, _, rest = text.partition(",")
    if "=" in kind or text.startswith(","):
        return Properties(parse_properties(text))
    given = parse_properties(rest)
    return Properties(({"qom-type": kind} if kind else {}) | given)


def _parse_json(text: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = load_json(text)
    except json.JSONDecodeError as exc:
        if exc.pos >= len(exc.doc):
            raise UsageError("JSON parse error, premature EOI") from None
        if exc.msg == "Extra data":
            raise UsageError("Expecting at most one JSON value") from None
        raise UsageError(
            f"JSON parse error, {exc.msg.lower()} (character {exc.pos + 1})"
        ) from None
    except DuplicateKeyError as exc:
        raise UsageError(str(exc)) from None
    except (ValueError, RecursionError) as exc:
        # A number of thousands of digits, or as many brackets.
        raise UsageError(f"JSON parse error, {exc}") from None
    return found


def _secret(objects: Objects, properties: Properties) -> bytes:
    """Return the bytes: whether they are a text matters to who uses them."""
    data, path = properties.take_optional("data"), properties.take_optional("file")
    encoding = properties.take_choice("format", ("raw", "base64"), "raw")
    if (data is None) == (path is None):
        if data is None:
            raise UsageError("Either 'file' or 'data' must be provided")
        raise UsageError("'file' and 'data' are mutually exclusive")
    if path is not None:
        try:
            # Line ends stay as they are: they may be part of a passphrase.
            with open(path, "rb") as file:
                content = file.read(1 << 20)
        except OSError as exc:
            raise UsageError(f"Unable to read {path}: {exc.strerror}") from None
        except ValueError:
            raise UsageError(f"Unable to read {path}: Invalid argument") from None
    else:
        assert data is not None
        # An argument that is no UTF-8 has surrogates, and is none as bytes, too.
        content = data.encode("utf-8", "surrogatepass")
    key_id, iv = properties.take_optional("keyid"), properties.take_optional("iv")
    if key_id is not None:
        return _decrypt(content, encoding, objects.secret_bytes(key_id), iv)
    return _decode_base64(content) if encoding == "base64" else content


def _decode_base64(content: bytes) -> bytes:
    """Return what QEMU takes for it: lines may have any length, digits that are
    no whole group of four are dropped, and padding may be anywhere."""
    digits = content.replace(b"\n", b"")
    if digits.translate(None, _BASE64_DIGITS):
        raise UsageError("Base64 data contains invalid characters")
    decoded = bytearray()
    for index in range(0, len(digits) - 3, 4):
        group = digits[index : index + 4]
        first, second, third = base64.b64decode(group.replace(b"=", b"A"))
        decoded.append(first)
        decoded += bytes(
            byte
            for byte, digit in ((second, group[2]), (third, group[3]))
            if digit != _PADDING
        )
    return bytes(decoded)


def _decrypt(content: bytes, encoding: str, key: bytes, iv: str | None) -> bytes:
    """Return what another secret, the key of AES-256-CBC, has encrypted."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    if len(key) != _KEY_LENGTH:
        raise UsageError(f"Key should be {_KEY_LENGTH} bytes in length")
    if iv is None:
        raise UsageError("IV is required to decrypt secret")
    vector = _decode_base64(iv.encode("utf-8", "surrogateescape"))
    if len(vector) != _BLOCK_LENGTH:
        raise UsageError(
            f"IV should be {_BLOCK_LENGTH} bytes in length not {len(vector)}"
        )
    if encoding == "base64":
        content = _decode_base64(content)
    if not content or len(content) % _BLOCK_LENGTH:
        raise UsageError(
            f"Length {len(content)} must be a multiple of block size {_BLOCK_LENGTH}"
        )
    decryptor = Cipher(algorithms.AES(key), modes.CBC(vector)).decryptor()
    plain = decryptor.update(content) + decryptor.finalize()
    padding = plain[-1]
    if not 1 <= padding <= _BLOCK_LENGTH:
        raise UsageError(
            f"Incorrect number of padding bytes ({padding}) found on decrypted data"
        )
    return plain[:-padding]


def _tls_creds_x509(objects: Objects, properties: Properties) -> "TlsCredentials[Any]":
    from nbdqcow.tls import VerifyPeer, X509ClientCredentials

    password = properties.take_optional("passwordid")
    # What QEMU checks when it starts, OpenSSL checks in each handshake.
    properties.take_boolean("sanity-check", True)
    verify = properties.take_boolean("verify-peer", True)
    make: Callable[..., TlsCredentials[Any]] = X509ClientCredentials
    if _is_server(properties):
        from nbdqcow.server.tls_openssl import X509ServerCredentials

        make = X509ServerCredentials
    return make(
        _directory(properties),
        verify_peer=VerifyPeer.ON if verify else VerifyPeer.OFF,
        priority=properties.take_optional("priority"),
        password=None if password is None else objects.secret(password),
    )


def _tls_creds_psk(objects: Objects, properties: Properties) -> "TlsCredentials[Any]":
    from nbdqcow.tls import PSK_KEYS, PSK_NEEDS, PskCredentials, has_psk

    if not has_psk():
        # Test suites (nbdkit's, libnbd's) skip what needs it if they read these words,
        # an older QEMU's.
        raise UsageError(f"invalid object type: tls-creds-psk ({PSK_NEEDS})")
    properties.take_boolean("verify-peer", True)
    return PskCredentials(
        os.path.join(_directory(properties), PSK_KEYS),
        is_server=_is_server(properties),
        username=properties.take_optional("username") or "qemu",
        priority=properties.take_optional("priority"),
    )


def _directory(properties: Properties) -> str:
    directory = properties.take_optional("dir")
    if directory is None:
        raise UsageError("Missing 'dir' property value")
    return directory


def _is_server(properties: Properties) -> bool:
    ends = ("client", "server")
    return properties.take_choice("endpoint", ends, "client") == "server"


def _authz_simple(objects: Objects, properties: Properties) -> "Rules":
    from nbdqcow.server.authz import Rule, RuleList

    return RuleList([Rule(properties.take("identity"), True)])


def _authz_list(objects: Objects, properties: Properties) -> "Rules":
    from nbdqcow.server.authz import parse_rules

    return parse_rules(_nest_rules(properties.take_rest()))


def _authz_list_file(objects: Objects, properties: Properties) -> "Rules":
    from nbdqcow.server.authz import RuleFile

    refresh = properties.take_boolean("refresh", True)
    return RuleFile(properties.take("filename"), refresh=refresh)


def _nest_rules(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``rules.0.match=...`` as a list ``rules``. Raises `UsageError`."""
    nested: dict[str, Any] = {}
    rules: dict[int, dict[str, Any]] = {}
    for key, value in flat.items():
        first, _, rest = key.partition(".")
        index, _, name = rest.partition(".")
        if first != _RULES or not rest:
            nested[key] = value
        elif not (index.isascii() and index.isdigit() and len(index) < 7):
            _wrong_type(_RULES, "array")
        elif not name:
            _wrong_type(f"rules.{index}", "object")
        else:
            rules.setdefault(int(index), {})[name] = value
    if rules:
        if _RULES in nested:
            raise UsageError(f"Parameters '{_RULES}.*' used inconsistently")
        for number in range(len(rules)):
            if number not in rules:
                raise UsageError(f"Parameter 'rules.{number}' missing")
        nested[_RULES] = [rules[index] for index in range(len(rules))]
    return nested


def _wrong_type(key: str, expected: str) -> NoReturn:
    raise UsageError(f"Invalid parameter type for '{key}', expected: {expected}")


def _unexpected(key: str) -> NoReturn:
    raise UsageError(f"Parameter '{key}' is unexpected")


_MAKERS: Final[dict[str, Callable[[Objects, Properties], object]]] = {
    "secret": _secret,
    "tls-creds-x509": _tls_creds_x509,
    "tls-creds-psk": _tls_creds_psk,
    "authz-simple": _authz_simple,
    "authz-list": _authz_list,
    "authz-listfile": _authz_list_file,
    "authz-list-file": _authz_list_file,
}
_UNSUPPORTED: Final = {
    "tls-creds-anon": (
        "tls-creds-anon is not supported: without certificates or keys nobody "
        "knows who is at the other end; use tls-creds-x509 or tls-creds-psk"
    ),
    "authz-pam": "authz-pam is not supported: use authz-list or authz-listfile",
    "secret_keyring": "secret_keyring is not supported: use secret",
}

"""Which clients may use an export, by the names in their certificates.

A name is the subject as QEMU and GnuTLS write it, in the certificate's own
order: ``C=GB,O=Example,CN=laptop``. The rules are those of QEMU's objects
``authz-simple``, ``authz-list`` and ``authz-listfile``.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from cryptography import x509
from cryptography.x509.oid import NameOID

from nbdqcow.errors import UsageError

logger = logging.getLogger(__name__)

_MAX_FILE: Final = 1 << 20

_ATTRIBUTES: Final = {
    NameOID.COMMON_NAME: "CN",
    NameOID.COUNTRY_NAME: "C",
    NameOID.LOCALITY_NAME: "L",
    NameOID.STATE_OR_PROVINCE_NAME: "ST",
    NameOID.ORGANIZATION_NAME: "O",
    NameOID.ORGANIZATIONAL_UNIT_NAME: "OU",
    NameOID.STREET_ADDRESS: "street",
    NameOID.EMAIL_ADDRESS: "EMAIL",
    NameOID.DOMAIN_COMPONENT: "DC",
    NameOID.USER_ID: "UID",
    NameOID.SERIAL_NUMBER: "serialNumber",
    NameOID.TITLE: "title",
    NameOID.SURNAME: "surName",
    NameOID.GIVEN_NAME: "givenName",
    NameOID.INITIALS: "initials",
    NameOID.GENERATION_QUALIFIER: "generationQualifier",
    NameOID.DN_QUALIFIER: "dnQualifier",
    NameOID.PSEUDONYM: "pseudonym",
    NameOID.POSTAL_CODE: "postalCode",
    NameOID.BUSINESS_CATEGORY: "businessCategory",
    NameOID.JURISDICTION_COUNTRY_NAME: "jurisdictionOfIncorporationCountryName",
    NameOID.JURISDICTION_LOCALITY_NAME: "jurisdictionOfIncorporationLocalityName",
    NameOID.JURISDICTION_STATE_OR_PROVINCE_NAME: (
        "jurisdictionOfIncorporationStateOrProvinceName"
    ),
}
"""What GnuTLS calls them; of all others it writes the number."""
_ESCAPED: Final = frozenset(',+"\\<>;')


@dataclass(frozen=True, slots=True)
class PeerNames:
    """What a certificate calls its owner.

    Attributes:
        subject: the distinguished name.
        alternatives: the names besides, with their kind: ``DNS:host``,
            ``email:user@host``, ``URI:...``, ``IP:address``.
    """

    subject: str
    alternatives: Sequence[str]


def peer_names(certificate: bytes) -> PeerNames:
    """Return the names in a certificate (DER). Raises `ValueError`."""
    parsed = x509.load_der_x509_certificate(certificate)
    try:
        found = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        alternatives: list[str] = []
    else:
        alternatives = [
            f"{_KINDS[type(name)]}:{name.value}"
            for name in found.value
            if type(name) in _KINDS
        ]
    return PeerNames(format_name(parsed.subject), alternatives)


_KINDS: Final[dict[type[x509.GeneralName], str]] = {
    x509.DNSName: "DNS",
    x509.RFC822Name: "email",
    x509.UniformResourceIdentifier: "URI",
    x509.IPAddress: "IP",
}


def format_name(name: x509.Name) -> str:
    """Return a distinguished name as GnuTLS writes it."""
    return ",".join("+".join(_format_attribute(a) for a in rdn) for rdn in name.rdns)


def _format_attribute(attribute: x509.NameAttribute[str | bytes]) -> str:
    value = attribute.value
    key = _ATTRIBUTES.get(attribute.oid)
    if key is None or not isinstance(value, str) or "\0" in value:
        encoded = _encoded_value(attribute).hex()
        return f"{key or attribute.oid.dotted_string}=#{encoded}"
    text = "".join(f"\\{c}" if c in _ESCAPED else c for c in value)
    if value.endswith(" ") and len(value) > 1:
        text = text[:-1] + "\\ "
    if value.startswith(("#", " ")):
        text = "\\" + text
    return f"{key}={text}"


def _encoded_value(attribute: x509.NameAttribute[str | bytes]) -> bytes:
    """Return an attribute's value as DER: what comes last in a name's
    SEQUENCE of SET of SEQUENCE of type and value."""
    data = x509.Name([attribute]).public_bytes()
    for _ in range(3):
        data = data[_header_length(data) :]
    return data[_header_length(data) + data[1] :]


def _header_length(data: bytes) -> int:
    return 2 + (data[1] & 0x7F if data[1] & 0x80 else 0)


# -- rules -------------------------------------------------------------------------


class Rules(Protocol):
    """Decides by a client's names."""

    def allow(self, names: PeerNames) -> bool:
        """Tell whether this client may use the export."""


@dataclass(frozen=True, slots=True)
class AllowNames:
    """Allows a fixed set of names: subjects or alternative names."""

    names: frozenset[str]

    def allow(self, names: PeerNames) -> bool:
        """Tell whether one of the client's names is in the set."""
        return names.subject in self.names or any(
            name in self.names for name in names.alternatives
        )


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of a list: what a subject that matches is told. With ``glob``,
    ``*`` and ``?`` in ``match`` stand for anything."""

    match: str
    allow: bool
    glob: bool = False

    def matches(self, subject: str) -> bool:
        """Tell whether the rule is about this subject."""
        if self.glob:
            wild = {"*": ".*", "?": "."}
            pattern = "".join(wild.get(c) or re.escape(c) for c in self.match)
            return re.fullmatch(pattern, subject, re.DOTALL) is not None
        return subject == self.match


@dataclass(frozen=True, slots=True)
class RuleList:
    """The first rule that matches decides, else ``default``."""

    rules: Sequence[Rule]
    default: bool = False

    def allow(self, names: PeerNames) -> bool:
        """Apply the rules to the subject."""
        for rule in self.rules:
            if rule.matches(names.subject):
                return rule.allow
        return self.default


class RuleFile:
    """A list in a JSON file, which is read again when it has changed. One that
    can't be read allows nobody."""

    def __init__(self, path: str, *, refresh: bool = True) -> None:
        """Raises `UsageError` if the file is no list of rules."""
        self._path = path
        self._refresh = refresh
        self._stamp = self._look()
        self._rules = _read_rules(path)

    def allow(self, names: PeerNames) -> bool:
        """Apply the rules to the subject."""
        stamp = self._look() if self._refresh else self._stamp
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._rules = _read_rules(self._path)
            except UsageError as exc:
                logger.error("no client is allowed any more: %s", exc)
                self._rules = RuleList(())
        return self._rules.allow(names)

    def _look(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size


def _read_rules(path: str) -> RuleList:
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_FILE + 1)
        if len(content) > _MAX_FILE:
            raise UsageError(f"{path} is larger than {_MAX_FILE} bytes")
        return parse_rules(json.loads(content))
    except OSError as exc:
        raise UsageError(f"Unable to read {path}: {exc.strerror}") from None
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"{path} is not JSON: {exc}") from None
    except UsageError as exc:
        raise UsageError(f"{path}: {exc}") from None


def parse_rules(given: Any) -> RuleList:
    """Return the list that ``{"rules": [{"match", "policy", "format"}, ...],
    "policy"}`` describes. Raises `UsageError`."""
    _check_keys("the list", given, {"rules", "policy"})
    rules = []
    items = given.get("rules", [])
    if not isinstance(items, list):
        raise UsageError("Invalid parameter type for 'rules', expected: array")
    for index, item in enumerate(items):
        place = f"rules.{index}."
        _check_keys("a rule", item, {"match", "policy", "format"}, place)
        match = item.get("match")
        if not isinstance(match, str):
            raise UsageError(f"Parameter '{place}match' is missing")
        if "policy" not in item:
            raise UsageError(f"Parameter '{place}policy' is missing")
        glob = _choice("format", item.get("format", "exact"), ("exact", "glob"))
        rules.append(Rule(match, _policy(item["policy"]), glob == "glob"))
    return RuleList(rules, _policy(given.get("policy", "deny")))


def _check_keys(what: str, given: Any, keys: set[str], place: str = "") -> None:
    if not isinstance(given, dict):
        raise UsageError(f"{what} is not an object")
    for key in given.keys() - keys:
        raise UsageError(f"Parameter '{place}{key}' is unexpected")


def _policy(value: Any) -> bool:
    return _choice("policy", value, ("allow", "deny")) == "allow"


def _choice(key: str, value: Any, choices: tuple[str, str]) -> str:
    if value not in choices:
        raise UsageError(f"Parameter '{key}' does not accept value '{value}'")
    return str(value)


# -- certificates ------------------------------------------------------------------


def by_certificate(rules: Rules) -> Callable[[bytes | None], bool]:
    """Return what an export asks: whether the client with this certificate
    (DER, or None without one) may use it."""

    def may_use(certificate: bytes | None) -> bool:
        if certificate is None:
            logger.info("a client without a certificate is not allowed")
            return False
        try:
            names = peer_names(certificate)
        except ValueError as exc:
            logger.info("a client's certificate can't be read: %s", exc)
            return False
        allowed = rules.allow(names)
        logger.info("%r is %s", names.subject, "allowed" if allowed else "not allowed")
        return allowed

    return may_use

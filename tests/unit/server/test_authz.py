"""Names in certificates, and the rules about them."""

import ctypes
import ipaddress
import json

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdqcow.errors import UsageError
from nbdqcow.server.authz import (
    AllowNames,
    PeerNames,
    Rule,
    RuleFile,
    RuleList,
    by_certificate,
    format_name,
    parse_rules,
    peer_names,
)
from tests.certificates import Authority, make, subject

OIDS = [
    oid
    for oid in vars(NameOID).values()
    if isinstance(oid, x509.ObjectIdentifier)
    # These have a type of their own in cryptography.
    and oid not in (NameOID.X500_UNIQUE_IDENTIFIER, NameOID.COUNTRY_NAME)
    and oid != NameOID.JURISDICTION_COUNTRY_NAME
    # GnuTLS has names for these Russian ones, and writes their values in hex.
    and oid not in (NameOID.INN, NameOID.OGRN, NameOID.SNILS)
]


def named(*attributes):
    return x509.Name([x509.NameAttribute(oid, text) for oid, text in attributes])


# -- names -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (subject("laptop"), "O=Example,CN=laptop"),
        (
            named(
                (NameOID.COUNTRY_NAME, "GB"),
                (NameOID.STATE_OR_PROVINCE_NAME, "London"),
                (NameOID.EMAIL_ADDRESS, "a@b"),
            ),
            "C=GB,ST=London,EMAIL=a@b",
        ),
        (named((NameOID.COMMON_NAME, "a, b+c")), "CN=a\\, b\\+c"),
        (named((NameOID.COMMON_NAME, "#a")), "CN=\\#a"),
        (named((NameOID.COMMON_NAME, " a ")), "CN=\\ a\\ "),
        (named((NameOID.COMMON_NAME, "a\0b")), "CN=#0c03610062"),
        (
            named((x509.ObjectIdentifier("1.2.3.4"), "abc")),
            "1.2.3.4=#0c03616263",
        ),
        (
            x509.Name(
                [
                    x509.RelativeDistinguishedName(
                        [
                            x509.NameAttribute(NameOID.COMMON_NAME, "a"),
                            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "b"),
                        ]
                    ),
                    x509.RelativeDistinguishedName(
                        [x509.NameAttribute(NameOID.LOCALITY_NAME, "c")]
                    ),
                ]
            ),
            "CN=a+O=b,L=c",
        ),
        (x509.Name([]), ""),
    ],
)
def test_format_name(name, text):
    assert format_name(name) == text


class _Datum(ctypes.Structure):
    _fields_ = [("data", ctypes.c_char_p), ("size", ctypes.c_uint)]


@pytest.fixture(scope="module")
def gnutls_name():
    """What GnuTLS, and so QEMU, calls a certificate's subject."""
    try:
        gnutls = ctypes.CDLL("libgnutls.so.30")
    except OSError:
        pytest.skip("GnuTLS is not installed (tools/setup-system.sh test)")

    def name_of(der):
        certificate = ctypes.c_void_p()
        assert not gnutls.gnutls_x509_crt_init(ctypes.byref(certificate))
        try:
            datum = _Datum(der, len(der))
            assert not gnutls.gnutls_x509_crt_import(
                certificate, ctypes.byref(datum), 0
            )
            buffer = ctypes.create_string_buffer(1 << 16)
            length = ctypes.c_size_t(len(buffer))
            assert not gnutls.gnutls_x509_crt_get_dn(
                certificate, buffer, ctypes.byref(length)
            )
            return buffer.raw[: length.value].decode()
        finally:
            gnutls.gnutls_x509_crt_deinit(certificate)

    return name_of


@settings(max_examples=100, deadline=None)
@given(
    attributes=st.lists(
        st.tuples(
            st.sampled_from(OIDS),
            st.one_of(
                st.text(' #,+"\\<>;=a\té\x7f', min_size=1, max_size=12),
                st.text(
                    st.characters(codec="utf-8"),
                    min_size=1,
                    max_size=60,
                ),
            ),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_names_are_those_of_gnutls(gnutls_name, attributes):
    try:
        name = named(*attributes)
        certificate = make(name)
    except ValueError:
        # Too long, or not a character of this attribute's alphabet.
        return
    assert format_name(name) == gnutls_name(certificate.der)


def test_peer_names():
    certificate = Authority().client(
        "laptop",
        [
            x509.DNSName("laptop.example"),
            x509.RFC822Name("a@example"),
            x509.UniformResourceIdentifier("urn:x"),
            x509.IPAddress(ipaddress.ip_address("::1")),
            x509.RegisteredID(x509.ObjectIdentifier("1.2.3")),
        ],
    )
    assert peer_names(certificate.der) == PeerNames(
        "O=Example,CN=laptop",
        ["DNS:laptop.example", "email:a@example", "URI:urn:x", "IP:::1"],
    )


# -- rules -------------------------------------------------------------------------


def test_allowed_names():
    rules = AllowNames(frozenset(("CN=a", "DNS:b")))
    assert rules.allow(PeerNames("CN=a", []))
    assert rules.allow(PeerNames("CN=c", ["DNS:a", "DNS:b"]))
    assert not rules.allow(PeerNames("CN=b", ["DNS:a", "email:b"]))
    assert not rules.allow(PeerNames("", []))


@pytest.mark.parametrize("default", [False, True])
def test_first_rule_that_matches_decides(default):
    rules = RuleList(
        [Rule("CN=a", True), Rule("CN=a*", False, True), Rule("CN=*", True, True)],
        default,
    )
    answers = {"CN=a": True, "CN=ab": False, "CN=b": True, "O=b": default}
    for name, answer in answers.items():
        assert rules.allow(PeerNames(name, [])) == answer


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("*", "", True),
        ("CN=?", "CN=\n", True),
        ("CN=?", "CN=", False),
        ("CN=[ab]", "CN=a", False),
        ("CN=[ab]", "CN=[ab]", True),
        ("a.c", "abc", False),
        ("A", "a", False),
    ],
)
def test_glob(pattern, name, matches):
    assert Rule(pattern, True, True).matches(name) == matches


def test_exact_rule_has_no_wildcards():
    assert not Rule("*", True).matches("a")
    assert Rule("*", True).matches("*")


def test_parse_rules():
    text = """{"rules": [
        {"match": "CN=fred", "policy": "allow"},
        {"match": "CN=bob*", "policy": "deny", "format": "glob"},
        {"match": "CN=*", "policy": "allow", "format": "exact"}],
        "policy": "allow"}"""
    assert parse_rules(json.loads(text)) == RuleList(
        [Rule("CN=fred", True), Rule("CN=bob*", False, True), Rule("CN=*", True)],
        True,
    )
    assert parse_rules({}) == RuleList([], False)


@pytest.mark.parametrize(
    "given",
    [
        [],
        None,
        "allow",
        {"policy": "x"},
        {"policy": True},
        {"policy": ["allow"]},
        {"rules": {}},
        {"rules": ["x"]},
        {"rules": [{"policy": "allow"}]},
        {"rules": [{"match": 1, "policy": "allow"}]},
        {"rules": [{"match": "x"}]},
        {"rules": [{"match": "x", "policy": "allow", "format": "regex"}]},
        {"rules": [{"match": "x", "policy": "allow", "other": 1}]},
        {"other": 1},
    ],
)
def test_bad_rules(given):
    with pytest.raises(UsageError):
        parse_rules(given)


FRED = PeerNames("CN=fred", [])
ALLOW_FRED = '{"rules": [{"match": "CN=fred", "policy": "allow"}]}'


def test_rule_file_is_read_again(tmp_path, caplog):
    path = tmp_path / "rules"
    path.write_text("{}")
    rules = RuleFile(str(path))
    fixed = RuleFile(str(path), refresh=False)
    assert not rules.allow(FRED)
    path.write_text(ALLOW_FRED)
    assert rules.allow(FRED)
    assert not fixed.allow(FRED)
    path.write_text("{")
    assert not rules.allow(FRED)
    assert not rules.allow(FRED)
    assert len(caplog.records) == 1
    path.write_text(ALLOW_FRED)
    assert rules.allow(FRED)
    path.unlink()
    assert not rules.allow(FRED)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100000, b'{"policy": "x"}', b" " * ((1 << 20) + 1)],
    ids=["empty", "cut", "not-text", "deep", "policy", "large"],
)
def test_bad_rule_file(tmp_path, content):
    path = tmp_path / "rules"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="rules"):
        RuleFile(str(path))


def test_missing_rule_file(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        RuleFile(str(tmp_path / "none"))


def test_by_certificate():
    authority = Authority()
    may_use = by_certificate(AllowNames(frozenset(("O=Example,CN=fred",))))
    assert may_use(authority.client("fred").der)
    assert not may_use(authority.client("bob").der)
    assert not may_use(None)
    assert not may_use(b"")
    assert not may_use(authority.client("fred").der[:-1])

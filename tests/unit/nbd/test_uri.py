import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdqcow.errors import UsageError
from nbdqcow.nbd.uri import NbdUri, parse_place, parse_uri

# A URI in the form that we write, and what it means.
EXACT = [
    ("nbd://example.com/disk", NbdUri(host="example.com", export="disk")),
    ("nbd://example.com/", NbdUri(host="example.com")),
    ("nbd://example.com//disk", NbdUri(host="example.com", export="/disk")),
    ("nbd://localhost/hello%20world", NbdUri(export="hello world")),
    ("nbd://localhost/%C3%A9%25%3F%23", NbdUri(export="é%?#")),
    ("nbd://localhost:10810/", NbdUri(port=10810)),
    ("nbd://[::1]/", NbdUri(host="::1")),
    ("nbd://[fe80::1%25eth0]:99/x", NbdUri(host="fe80::1%eth0", port=99, export="x")),
    ("nbds://alice@h/", NbdUri(host="h", tls=True, username="alice")),
    ("nbd+vsock://2/", NbdUri("vsock", host="2")),
    ("nbd+vsock://3:4000000000/x", NbdUri("vsock", "3", 4000000000, export="x")),
    ("nbds+vsock://3/", NbdUri("vsock", "3", tls=True)),
    ("nbd+unix:///?socket=/tmp/s", NbdUri("unix", socket="/tmp/s")),
    ("nbd+unix:///a/b?socket=s%20%26", NbdUri("unix", socket="s &", export="a/b")),
    ("nbd+unix:///?socket=%00/abstract", NbdUri("unix", socket="\0/abstract")),
    ("nbd+unix:///?socket=/%FF", NbdUri("unix", socket="/\udcff")),
    (
        "nbds+unix:///?socket=s&tls-hostname=h&tls-type=x509&tls-verify-peer=0",
        NbdUri(
            "unix",
            socket="s",
            tls=True,
            parameters={
                "tls-hostname": "h",
                "tls-type": "x509",
                "tls-verify-peer": "0",
            },
        ),
    ),
    ("nbd://localhost/?x-mine=1", NbdUri(parameters={"x-mine": "1"})),
]


@pytest.mark.parametrize(("text", "uri"), EXACT, ids=[e[0] for e in EXACT])
def test_both_ways(text, uri):
    assert parse_uri(text) == uri
    assert str(uri) == text


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("nbd://example.com", NbdUri(host="example.com")),
        ("nbd://", NbdUri()),
        ("nbd:///disk", NbdUri(export="disk")),
        ("NBD://h:10809/", NbdUri(host="h")),
        ("nbd+tcp://h/", NbdUri(host="h")),
        ("nbd://h:/", NbdUri(host="h")),
        ("nbd+vsock:///", NbdUri("vsock", "2")),
        ("nbd+unix://?socket=s", NbdUri("unix", socket="s")),
        ("nbd+unix:///?&socket=s&", NbdUri("unix", socket="s")),
    ],
    ids=str,
)
def test_other_spellings(text, uri):
    assert parse_uri(text) == uri
    assert parse_uri(str(uri)) == uri


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not an NBD URI"),
        ("nbd", "not an NBD URI"),
        ("nbd:localhost:10809", "not an NBD URI"),
        ("/dev/sda", "not an NBD URI"),
        ("http://h/", "unknown scheme"),
        ("nbd+ssh://h/", "unknown scheme"),
        ("nbd://h/#x", "fragment"),
        ("nbd+unix:///x", "socket"),
        ("nbd+unix:///x?socket=", "socket"),
        ("nbd://h/?socket=s", "socket"),
        ("nbd+unix://host/?socket=s", "no host"),
        ("nbd://h:0x10/", "bad port"),
        ("nbd://h:65536/", "bad port"),
        ("nbd://h:99999999999999999999/", "bad port"),
        ("nbd+vsock://2:4294967296/", "bad port"),
        ("nbd+vsock://host/", "vsock"),
        ("nbd://[::1/", "IPv6"),
        ("nbd://[::1]x/", "IPv6"),
        ("nbd://h/?tls-type=rot13", "tls-type"),
        ("nbd://h/?tls-verify-peer=yes", "tls-verify-peer"),
        ("nbd://h/?unknown=1", "unknown parameter"),
        ("nbd://h/?x-a=1&x-a=2", "twice"),
        ("nbd://h/%FF", "UTF-8"),
        ("nbd://h/\udcff", "UTF-8"),
    ],
)
def test_bad_uris(text, reason):
    with pytest.raises(UsageError, match=reason):
        parse_uri(text)


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("nbd:h:1", NbdUri(host="h", port=1)),
        ("nbd:h", NbdUri(host="h")),
        ("nbd:[::1]:1", NbdUri(host="::1", port=1)),
        ("nbd:h:1:exportname=", NbdUri(host="h", port=1)),
        ("nbd:h:1:exportname=a:b/c%20", NbdUri(host="h", port=1, export="a:b/c%20")),
        ("nbd:unix:/s", NbdUri("unix", socket="/s")),
        ("nbd:unix:/a:b:exportname=x", NbdUri("unix", socket="/a:b", export="x")),
        ("nbd://h/x", NbdUri(host="h", export="x")),
        ("nbd+unix:///?socket=s", NbdUri("unix", socket="s")),
    ],
    ids=str,
)
def test_older_names(text, uri):
    assert parse_place(text) == uri


@pytest.mark.parametrize(
    "text", ["nbd:", "nbd::1", "nbd:h:x", "nbd:h:65536", "nbd:unix:", "file:x", "x"]
)
def test_bad_older_names(text):
    with pytest.raises(UsageError):
        parse_place(text)


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(export=NAMES, socket=NAMES.filter(bool))
def test_any_name_survives(export, socket):
    uri = NbdUri("unix", socket=socket, export=export)
    assert str(uri).isascii()
    assert parse_uri(str(uri)) == uri
    tcp = NbdUri(host="::1", port=1, export=export)
    assert parse_uri(str(tcp)) == tcp


@given(st.text())
def test_only_usage_errors(text):
    for start in ("", "nbd://", "nbd+unix:///?socket=s&"):
        try:
            uri = parse_uri(start + text)
        except UsageError:
            continue
        assert parse_uri(str(uri)) == uri


@pytest.mark.parametrize("host", ["/a/b", "a@b", "%41", "fe80::1%eth/0"])
def test_any_host_survives_printing(host):
    uri = NbdUri(host=host, username="a@b/c", export="e")
    assert parse_uri(str(uri)) == uri

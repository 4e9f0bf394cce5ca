"""The command line of nbdqcow serve, and the words of its announcement."""

import click
import pytest

from nbdqcow.cli import places as places_module
from nbdqcow.cli import serve
from nbdqcow.cli.main import main
from nbdqcow.cli.places import Places
from nbdqcow.cli.tls_options import TlsSettings, take_tls
from nbdqcow.errors import UsageError
from nbdqcow.nbd.uri import NbdUri
from nbdqcow.server.options import ServerOptions


@pytest.mark.parametrize(
    ("arguments", "images"),
    [
        (["a.qcow2"], [("", "a.qcow2")]),
        (["/d/a.qcow2"], [("", "/d/a.qcow2")]),
        (["disk=/d/a"], [("disk", "/d/a")]),
        (["disk=a=b"], [("disk", "a=b")]),
        (["/d/a=b"], [("", "/d/a=b")]),
        (["./a=b"], [("", "./a=b")]),
        (["/d/a", "b"], [("a", "/d/a"), ("b", "b")]),
        (["=a", "b"], [("", "a"), ("b", "b")]),
    ],
)
def test_export_names(arguments, images):
    assert serve.export_names(arguments) == images


@pytest.mark.parametrize(
    ("arguments", "exports", "images"),
    [
        ([], [("vm/a=b", "/d/a=b")], [("vm/a=b", "/d/a=b")]),
        ([], [("", "a"), ("/b", "b")], [("", "a"), ("/b", "b")]),
        (["/d/a"], [("/b", "b")], [("a", "/d/a"), ("/b", "b")]),
    ],
)
def test_export_names_of_options(arguments, exports, images):
    assert serve.export_names(arguments, exports) == images


@pytest.mark.parametrize(
    ("arguments", "exports"),
    [
        (["a", "/d/a"], []),
        (["x=a", "x=b"], []),
        (["x="], []),
        (["a"], [("a", "b")]),
        ([], [("a/b", "a"), ("a/b", "b")]),
        ([], [("a/b", "")]),
    ],
)
def test_bad_export_names(arguments, exports):
    with pytest.raises(UsageError):
        serve.export_names(arguments, exports)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:1", ("127.0.0.1", 1)),
        ("host", ("host", 10809)),
        ("host:0", ("host", 0)),
        ("[::1]:65535", ("::1", 65535)),
        ("[::1]", ("::1", 10809)),
        ("*:5", ("", 5)),
        (":5", ("", 5)),
    ],
)
def test_addresses(text, address):
    assert places_module.address(text) == address


@pytest.mark.parametrize(
    "text",
    ["", "[]", "::1", "::1:99", "h:", "h:x", "h:65536", "h:-1", "h:" + "9" * 9999],
)
def test_bad_addresses(text):
    with pytest.raises(click.BadParameter):
        places_module.address(text)


def test_announcement(monkeypatch):
    monkeypatch.setattr("sys.argv", ["nbdqcow"])
    settings = serve.ServeSettings(
        images=[("my disk", "a.qcow2"), ("b", "b\udcff.raw")],
        places=Places(), read_only=True, open_options={},
        limits=ServerOptions(), pid_file=None,
        tls=TlsSettings(),
    )  # fmt: skip
    places = [
        places_module.tcp_place("::", 10809),
        places_module.tcp_place("0.0.0.0", 99),
        ("s", NbdUri("unix", socket="/s")),
    ]
    assert serve._announcement(settings, [1 << 30, 5], places).splitlines() == [
        "nbdqcow: ready on [::]:10809",
        "    nbd://[::1]/my%20disk  a.qcow2, 1 GiB, read-only",
        "    nbd://[::1]/b  b\\xff.raw, 5 B, read-only",
        "nbdqcow: ready on 0.0.0.0:99",
        "    nbd://127.0.0.1:99/my%20disk  a.qcow2, 1 GiB, read-only",
        "    nbd://127.0.0.1:99/b  b\\xff.raw, 5 B, read-only",
        "nbdqcow: ready on s",
        "    nbd+unix:///my%20disk?socket=/s  a.qcow2, 1 GiB, read-only",
        "    nbd+unix:///b?socket=/s  b\\xff.raw, 5 B, read-only",
        "attach with, for example:",
        "    nbdinfo 'nbd://[::1]/my%20disk'",
        "    qemu-io -f raw 'nbd://[::1]/my%20disk'",
        "    nbd-client ::1 10809 /dev/nbd0 -name 'my disk'",
    ]


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--version"], 0, "nbdqcow 0."),
        (["--help"], 0, "serve"),
        (["serve", "--help"], 0, "--listen"),
        ([], 2, "Usage: nbdqcow"),
        (["bogus"], 2, "nbdqcow: No such command 'bogus'"),
        (["serve"], 2, "nbdqcow: Missing argument"),
        (["serve", "--export", "a"], 2, "'--export' requires 2 arguments"),
        (["serve", "--bogus", "a"], 2, "nbdqcow: No such option"),
        (["serve", "--listen", "h:x", "a"], 2, "a port is a number"),
        (["serve", "--listen", "", "a"], 2, "'--listen': give HOST:PORT"),
        (["serve", "--l2-cache-size", "x", "a"], 2, "invalid size 'x'"),
        (["serve", "--max-connections", "0", "a"], 2, "max-connections"),
        (["serve", "--idle-timeout", "nan", "a"], 2, "no number of seconds"),
        (["serve", "--reply-timeout", "inf", "a"], 2, "no number of seconds"),
        (["serve", "--detect-zeroes=unmap", "--discard=ignore", "a"], 2, "needs"),
        (["serve", "a", "a"], 1, "nbdqcow: there are two exports named 'a'"),
    ],
    ids=str,
)
def test_main(monkeypatch, capsys, arguments, status, text):
    monkeypatch.setattr("sys.argv", ["/x/nbdqcow", *arguments])
    assert main() == status
    captured = capsys.readouterr()
    assert text in (captured.out if status == 0 else captured.err)
    assert "Traceback" not in captured.err


def test_nbd_is_passed_on(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["nbdqcow", "nbd", "--version"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("nbdqcow-nbd 0.")


# -- TLS ---------------------------------------------------------------------------

NO_TLS = {
    "tls": None, "tls_certificates": None, "tls_psk": None, "tls_verify_peer": None,
    "tls_allow_dn": (), "tls_export_allow_dn": (), "tls_only": (),
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "mode", "verify_peer"),
    [
        ({}, "off", "off"),
        ({"tls_certificates": "d"}, "require", "off"),
        ({"tls_psk": "f"}, "require", "off"),
        ({"tls_certificates": "d", "tls": "on"}, "on", "off"),
        ({"tls_certificates": "d", "tls": "off"}, "off", "off"),
        ({"tls_certificates": "d", "tls_verify_peer": "on"}, "require", "on"),
        ({"tls_certificates": "d", "tls_allow_dn": ("a",)}, "require", "on"),
        (
            {
                "tls_certificates": "d",
                "tls_export_allow_dn": (("x", "a"),),
                "tls_verify_peer": "optional",
            },
            "require",
            "optional",
        ),
    ],
)
def test_tls_settings(options, mode, verify_peer):
    given = NO_TLS | options
    settings = take_tls(given)
    assert given == {}
    assert (settings.mode, settings.verify_peer) == (mode, verify_peer)


def test_exports_that_need_tls():
    settings = TlsSettings(mode="on", export_allow=(("a", "x"),), only=("b",))
    assert [settings.needs_tls(name) for name in ("a", "b", "c")] == [True, True, False]
    assert TlsSettings(mode="require").needs_tls("c")
    assert not TlsSettings().needs_tls("c")
    settings.check_exports(["a", "b"])
    for names in (["a"], ["b"]):
        with pytest.raises(UsageError):
            settings.check_exports(names)


def test_uris_of_exports_that_need_tls():
    place = NbdUri("unix", socket="/s")
    settings = TlsSettings(mode="on", certificates="d", only=("b",))
    assert str(settings.uri(place, "a")) == "nbd+unix:///a?socket=/s"
    assert (
        str(settings.uri(place, "b")) == "nbds+unix:///b?socket=/s&tls-certificates=DIR"
    )
    settings = TlsSettings(mode="require", psk="f")
    assert (
        str(settings.uri(place, "a"))
        == "nbds+unix://USER@/a?socket=/s&tls-psk-file=FILE"
    )

"""Where nbdqcow serve listens: what its options mean."""

import os
import resource

import click
import pytest

from nbdqcow.cli import places
from nbdqcow.cli.places import Places
from nbdqcow.errors import UsageError
from nbdqcow.nbd.uri import NbdUri

NOTHING = {
    "listen": (), "unix": (), "unix_mode": None, "unix_owner": None, "vsock": (),
    "fd": (), "stdio": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10809", (0xFFFFFFFF, 10809)),
        ("2:10809", (2, 10809)),
        ("1:4294967295", (1, 0xFFFFFFFF)),
        (":5", (0xFFFFFFFF, 5)),
    ],
)
def test_vsock_addresses(text, address):
    assert places.vsock_address(text) == address


@pytest.mark.parametrize("text", ["", "x", "1:", "a:1", "1:4294967296", "-1", "9" * 99])
def test_bad_vsock_addresses(text):
    with pytest.raises(click.BadParameter):
        places.vsock_address(text)


def test_unix_paths():
    assert places.unix_path("/a/b") == "/a/b"
    assert places.unix_path("./@b") == "./@b"
    assert places.unix_path("@b") == "\0b"
    for text in ("", "@"):
        with pytest.raises(click.BadParameter):
            places.unix_path(text)


def test_file_modes():
    assert places.file_mode("660") == 0o660
    assert places.file_mode("0") == 0
    for text in ("", "8", "1777", "-1", "rw"):
        with pytest.raises(click.BadParameter):
            places.file_mode(text)


@pytest.mark.parametrize(
    ("text", "owner"),
    [
        ("root", (0, -1)),
        ("root:root", (0, 0)),
        (":root", (-1, 0)),
        ("12345:54321", (12345, 54321)),
    ],
)
def test_file_owners(text, owner):
    assert places.file_owner(text) == owner


@pytest.mark.parametrize("text", ["", ":", "no-such-user", "root:no-such-group", "-5"])
def test_bad_file_owners(text):
    with pytest.raises(click.BadParameter):
        places.file_owner(text)


def test_defaults():
    assert places.take_places(dict(NOTHING), []) == Places(tcp=(("127.0.0.1", 10809),))
    assert places.take_places({**NOTHING, "stdio": True}, []).tcp == ()
    # A socket of the service manager's is enough.
    activated = places.take_places(dict(NOTHING), [(3, ""), (4, "name")])
    assert activated == Places(tcp=(), fds=[(3, "fd 3"), (4, "fd 4 (name)")])


def test_what_listeners_are_called():
    assert places.tcp_place("0.0.0.0", 1) == (
        "0.0.0.0:1", NbdUri(host="127.0.0.1", port=1)
    )  # fmt: skip
    assert places.unix_place("\0x") == ("@x", NbdUri("unix", socket="\0x"))
    assert places.unix_place("x") == ("x", NbdUri("unix", socket=os.path.abspath("x")))
    assert places.vsock_place(0xFFFFFFFF, 9) == ("vsock *:9", NbdUri("vsock", "1", 9))
    assert places.vsock_place(3, 9) == ("vsock 3:9", NbdUri("vsock", "3", 9))


@pytest.mark.parametrize(
    ("limits", "wanted"), [((100, 9999), 456), ((1000, 9999), None), ((9, -1), 456)]
)
def test_limit_of_open_files(monkeypatch, limits, wanted):
    changes = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, new: changes.append(new))
    places.raise_fd_limit(100)
    assert changes == ([(wanted, limits[1])] if wanted else [])
    monkeypatch.setattr(resource, "getrlimit", lambda which: (100, 200))
    with pytest.raises(UsageError, match="limit of 200"):
        places.raise_fd_limit(100)

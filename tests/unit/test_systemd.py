import os

import pytest

from nbdqcow.server.systemd import notify, take_activation


@pytest.mark.parametrize(
    ("count", "names", "fds"),
    [
        ("1", None, [(3, "")]),
        ("2", "a:b", [(3, "a"), (4, "b")]),
        ("3", "a", [(3, "a"), (4, ""), (5, "")]),
        ("1", "a:b:c", [(3, "a")]),
        ("0", None, []),
        ("", None, []),
        ("-1", None, []),
        ("x", None, []),
    ],
)
def test_activation(count, names, fds):
    environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count, "OTHER": "1"}
    if names is not None:
        environment["LISTEN_FDNAMES"] = names
    assert take_activation(environment) == fds
    assert environment == {"OTHER": "1"}


def test_activation_of_another_process():
    environment = {"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1"}
    assert take_activation(environment) == []
    assert take_activation({}) == []


def test_absurd_number_of_sockets():
    environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "9" * 500}
    assert len(take_activation(environment)) == 4096


@pytest.mark.parametrize("address", ["", "relative", "/none/at/all", "@nobody-there"])
def test_nobody_to_notify(monkeypatch, address):
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify("READY=1")

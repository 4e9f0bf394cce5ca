"""The command line of nbdqcow-nbd."""

import re

import pytest

from nbdqcow.cli import nbd, nbd_options
from nbdqcow.cli.nbd_options import Settings, parse_arguments
from nbdqcow.errors import UsageError

DEFAULTS = Settings(filename="f")


def parsed(*arguments, **expected):
    """Check that ``arguments`` change the defaults to ``expected`` only."""
    settings = parse_arguments([*arguments, "f"])
    settings.given = set()
    wanted = Settings(filename="f")
    for name, value in expected.items():
        setattr(wanted, name, value)
    return settings == wanted


def test_defaults_are_those_of_qemu_nbd():
    assert parsed()
    assert (DEFAULTS.host, DEFAULTS.port, DEFAULTS.shared) == ("0.0.0.0", "10809", 1)
    assert not DEFAULTS.persistent
    assert DEFAULTS.export_name == ""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-p", "1"], {"port": "1"}),
        (["--bind=::1"], {"host": "::1"}),
        (["-k", "/s"], {"socket": "/s"}),
        (["-k", "/s", "--selinux-label=l"], {"socket": "/s", "socket_label": "l"}),
        (["-e", "5"], {"shared": 5}),
        (["--shared=0"], {"shared": 0}),
        (["-e0x10"], {"shared": 16}),
        (["--handshake-limit=0"], {"handshake_limit": 0}),
        (["--handshake-limit", "0x20"], {"handshake_limit": 32}),
        (["-t"], {"persistent": True}),
        (["-v"], {"verbose": True}),
        (["-x", "n", "-D", "d"], {"export_name": "n", "description": "d"}),
        (["--fork", "--pid-file", "p"], {"fork": True, "pid_file": "p"}),
        (["-f", "raw"], {"open_options": {"format": "raw"}}),
        (["-r"], {"open_options": {"read_only": True}}),
        (["-n"], {"open_options": {"cache": "none"}}),
        (["--cache=off"], {"open_options": {"cache": "none"}}),
        (["--cache=directsync"], {"open_options": {"cache": "directsync"}}),
        (["--aio=threads"], {}),
        (["--aio=io_uring"], {}),
        (["--discard=on"], {"open_options": {"discard": "unmap"}}),
        (["--discard=off"], {"open_options": {"discard": "ignore"}}),
        (
            ["--discard=unmap", "--detect-zeroes=unmap"],
            {"open_options": {"discard": "unmap", "detect_zeroes": "unmap"}},
        ),
        (["--image-opts"], {"image_opts": True}),
        (["-s"], {"throwaway": True}),
        (["--disconnect"], {"disconnect": True}),
        (["-c", "/dev/nbd1", "-k", "/s"], {"device": "/dev/nbd1", "socket": "/s"}),
        (["--pers", "--desc=x"], {"persistent": True, "description": "x"}),
    ],
    ids=str,
)
def test_options(arguments, expected):
    assert parsed(*arguments, **expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Invalid number of arguments"),
        (["a", "b"], "Invalid number of arguments"),
        (["-k", "s", "f"], "socket path must be absolute"),
        (["-e", "-1", "f"], "Invalid shared device number '-1'"),
        (["-e", "x", "f"], "Invalid shared device number 'x'"),
        (["-e", "9999999999", "f"], "Invalid shared device number"),
        (["--handshake-limit=-1", "f"], "Invalid handshake limit '-1'"),
        (["--handshake-limit=1s", "f"], "Invalid handshake limit '1s'"),
        (["--cache=x", "f"], "Invalid cache mode `x'"),
        (["-n", "--cache=none", "f"], "-n and --cache can only be specified once"),
        (["--aio=x", "f"], "Invalid aio mode 'x'"),
        (["--aio=native", "--aio=native", "f"], "--aio can only be specified once"),
        (["--discard=x", "f"], "Invalid discard mode `x'"),
        (["--discard=on", "--discard=on", "f"], "--discard can only be"),
        (["--detect-zeroes=x", "f"], "invalid parameter value: x"),
        (["--detect-zeroes=unmap", "f"], "not allowed without setting discard"),
        (["-x", "x" * 4097, "f"], "export name .* too long"),
        (["-D", "é" * 2049, "f"], "export description .* too long"),
        (["--image-opts", "-f", "raw", "f"], "mutually exclusive"),
        (["-L", "f"], "incompatible with a file name"),
        (["-L", "-x", "n"], "incompatible with per-device settings"),
        (["-L", "--fork"], "incompatible with forking"),
        (["--bogus"], "unrecognized option '--bogus'"),
    ],
    ids=lambda v: str(v)[:60],
)
def test_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        parse_arguments(arguments)


def test_a_device_has_a_socket_of_its_name(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/qemu-nbd"])
    settings = parse_arguments(["-c", "/dev/nbd1", "-p", "1", "f"])
    assert settings.socket == "/var/lock/qemu-nbd-nbd1"


def test_a_device_and_what_does_not_go_with_it():
    with pytest.raises(UsageError, match="TLS is not supported with a host device"):
        parse_arguments(["-c", "/dev/nbd1", "--tls-creds=t", "f"])
    with pytest.raises(UsageError, match="NBD device can't be set when using socket"):
        parse_arguments(["-c", "/dev/nbd1", "f"], [(3, "")])


@pytest.mark.parametrize("name", nbd_options._REFUSED)
def test_not_supported_is_said_by_name(name):
    (long,) = (k for k, v in nbd_options._LONG.items() if (v or k.rstrip("=")) == name)
    argument = f"--{long}x" if long.endswith("=") else f"--{long}"
    with pytest.raises(UsageError, match="not supported") as caught:
        parse_arguments([argument, "f"])
    assert str(caught.value).startswith(f"--{long.rstrip('=')} ")


def test_short_and_long_options_agree():
    shorts = {value for value in nbd_options._LONG.values() if value}
    assert shorts == set(nbd_options._SHORT.replace(":", ""))
    for long, short in nbd_options._LONG.items():
        if short:
            assert (f"{short}:" in nbd_options._SHORT) == long.endswith("="), long


def run(monkeypatch, capsys, *arguments, name="/usr/bin/qemu-nbd"):
    monkeypatch.setattr("sys.argv", [name, *arguments])
    status = nbd.main()
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_messages_have_the_name_of_the_link(monkeypatch, capsys):
    status, out, err = run(monkeypatch, capsys, "--bogus")
    assert (status, out) == (1, "")
    assert err == (
        "qemu-nbd: unrecognized option '--bogus'\n"
        "qemu-nbd: Try `qemu-nbd --help' for more information.\n"
    )
    status, _, err = run(monkeypatch, capsys, name="nbdqcow-nbd")
    assert err.startswith("nbdqcow-nbd: Invalid number of arguments\n")
    assert status == 1


def test_help_and_version(monkeypatch, capsys):
    # As with QEMU: options are looked at one after the other.
    assert run(monkeypatch, capsys, "--help", "--bogus-is-not-reached")[0] == 0
    assert run(monkeypatch, capsys, "--bogus", "--help")[0] == 1
    status, out, err = run(monkeypatch, capsys, "-h")
    assert (status, err) == (0, "")
    assert out.startswith("Usage: qemu-nbd ")
    assert max(len(line) for line in out.splitlines()) < 80
    for long in nbd_options._LONG:
        name = long.rstrip("=")
        if (nbd_options._LONG[long] or name) not in nbd_options._REFUSED:
            assert f"--{name}" in out
    status, out, err = run(monkeypatch, capsys, "-V")
    assert (status, err) == (0, "")
    assert re.match(r"qemu-nbd 7\.2\.\d+ \(nbdqcow 0\.", out)


def test_help_wins_over_what_follows(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "--version", "-c", "/dev/nbd0")[0] == 0
    assert run(monkeypatch, capsys, "-e", "x", "--version")[0] == 1

"""Credentials: directories of files, and what is wrong with them."""

import logging
import os
import ssl
import time

import pytest

from nbdqcow.errors import CredentialsError
from nbdqcow.server.tls_openssl import X509ServerCredentials
from nbdqcow.tls import (
    PskCredentials,
    TlsCredentials,
    VerifyPeer,
    X509ClientCredentials,
    load_psk_file,
    parse_priority,
)
from tests.certificates import Authority, replace

TLS12, TLS13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture
def server(tmp_path, authority):
    return authority.write_server(tmp_path / "server")


def load(directory, verify=VerifyPeer.ON, *, is_server=True, **arguments):
    kind = X509ServerCredentials if is_server else X509ClientCredentials
    return kind(str(directory), verify_peer=verify, **arguments)


# -- certificates ------------------------------------------------------------------


# What the contexts do is in tests/unit/server/test_tls_engine.py.
@pytest.mark.parametrize("verify", list(VerifyPeer))
def test_server(server, verify):
    credentials = load(server, verify)
    assert credentials.is_server
    assert credentials.verifies_peer == (verify is not VerifyPeer.OFF)


@pytest.mark.parametrize("verify", [VerifyPeer.OFF, VerifyPeer.ON])
def test_context_of_a_client(tmp_path, authority, verify):
    directory = authority.write_client(tmp_path / "client")
    credentials = load(directory, verify, is_server=False)
    mode = ssl.CERT_REQUIRED if credentials.verifies_peer else ssl.CERT_NONE
    context = credentials.context_blocking()
    assert context.verify_mode == mode
    assert context.minimum_version == TLS12
    assert context.maximum_version == TLS13
    assert not context.verify_flags & ssl.VERIFY_CRL_CHECK_LEAF


def test_revocation_list_is_used(tmp_path, authority):
    directory = authority.write_client(tmp_path / "client")
    authority.revoke(directory)
    context = load(directory, is_server=False).context_blocking()
    assert context.verify_flags & ssl.VERIFY_CRL_CHECK_LEAF


def test_client(tmp_path, authority):
    bare = authority.write_client(tmp_path / "bare")
    assert not load(bare, is_server=False).is_server
    full = authority.write_client(tmp_path / "full", authority.client("x"))
    load(full, is_server=False)
    (full / "client-key.pem").unlink()
    with pytest.raises(CredentialsError, match=r"client-key\.pem: No such file"):
        load(full, is_server=False)


def test_server_that_verifies_nobody_needs_no_authority(server):
    (server / "ca-cert.pem").unlink()
    load(server, VerifyPeer.OFF)
    with pytest.raises(CredentialsError, match=r"ca-cert\.pem: No such file"):
        load(server)


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
def test_missing_file(server, name):
    (server / name).unlink()
    with pytest.raises(CredentialsError, match=f"{name}: No such file"):
        load(server)


@pytest.mark.parametrize("is_server", [True, False], ids=["server", "client"])
@pytest.mark.parametrize("name", ["ca-cert.pem", "ca-crl.pem", "cert.pem", "key.pem"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"-----BEGIN CERTIFICATE-----"])
def test_broken_file(tmp_path, authority, is_server, name, content):
    directory = tmp_path / "pki"
    if is_server:
        authority.write_server(directory)
    else:
        authority.write_client(directory, authority.client("x"))
    if not name.startswith("ca"):
        name = f"{'server' if is_server else 'client'}-{name}"
    (directory / name).write_bytes(content)
    with pytest.raises(CredentialsError, match=name):
        load(directory, is_server=is_server)


def test_directory_in_the_place_of_a_file(server):
    (server / "ca-cert.pem").unlink()
    (server / "ca-cert.pem").mkdir()
    with pytest.raises(CredentialsError, match=r"ca-cert\.pem"):
        load(server)


def test_key_of_another_certificate(tmp_path, server, authority):
    other = authority.write_server(tmp_path / "other")
    os.replace(other / "server-key.pem", server / "server-key.pem")
    with pytest.raises(CredentialsError, match="is not the key of"):
        load(server)


def test_encrypted_key(tmp_path, authority):
    directory = authority.write_server(tmp_path / "server", password="secret")
    load(directory, password="secret")
    # Without a password nobody is asked for one.
    for password in (None, "", "wrong", "x" * 2000):
        with pytest.raises(CredentialsError, match=r"server-key\.pem"):
            load(directory, password=password)


# -- new files ---------------------------------------------------------------------


def test_new_files_are_used(server, authority):
    credentials = load(server)
    first = credentials.context_blocking()
    assert credentials.context_blocking() is first
    authority.write_server(server)
    second = credentials.context_blocking()
    assert second is not first
    assert credentials.context_blocking() is second


def test_broken_new_files_are_not_used(server, authority, caplog):
    credentials = load(server)
    first = credentials.context_blocking()
    new = authority.server()
    # The certificate without its key, as while the two are being copied.
    replace(server / "server-cert.pem", new.pem)
    for _ in range(3):
        assert credentials.context_blocking() is first
    assert len(caplog.records) == 1
    assert "is not the key of" in caplog.text
    replace(server / "server-key.pem", new.key_pem())
    assert credentials.context_blocking() is not first
    assert len(caplog.records) == 1


def test_revocation_list_that_vanishes_stays_in_force(server, authority, caplog):
    authority.revoke(server)
    credentials = load(server)
    first = credentials.context_blocking()
    (server / "ca-crl.pem").unlink()
    for _ in range(2):
        assert credentials.context_blocking() is first
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING
    authority.revoke(server)
    assert credentials.context_blocking() is not first


def test_revocation_list_that_comes_later(server, authority):
    credentials = load(server)
    first = credentials.context_blocking()
    authority.revoke(server)
    assert credentials.context_blocking() is not first


def test_revocation_list_that_came_later_and_vanishes_stays_in_force(server, authority):
    credentials = load(server)
    authority.revoke(server)
    context = credentials.context_blocking()
    (server / "ca-crl.pem").unlink()
    assert credentials.context_blocking() is context


def test_revocation_list_that_vanishes_while_it_is_loaded(
    server, authority, monkeypatch
):
    look = TlsCredentials._look

    def look_then_delete(credentials):
        found = look(credentials)
        (server / "ca-crl.pem").unlink(missing_ok=True)
        return found

    credentials = load(server)
    first = credentials.context_blocking()
    authority.revoke(server)
    monkeypatch.setattr(TlsCredentials, "_look", look_then_delete)
    assert credentials.context_blocking() is first
    monkeypatch.undo()
    # Nobody was let in by a list that was never read.
    authority.revoke(server)
    assert credentials.context_blocking() is not first


def test_same_length_at_another_time(server, authority):
    credentials = load(server)
    first = credentials.context_blocking()
    later = time.time() + 10
    os.utime(server / "server-cert.pem", (later, later))
    assert credentials.context_blocking() is not first


# -- priorities --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("priority", "versions"),
    [
        ("NORMAL", {TLS12, TLS13}),
        ("@SYSTEM", {TLS12, TLS13}),
        ("SECURE128:-VERS-TLS1.0:-VERS-TLS1.1", {TLS12, TLS13}),
        ("NORMAL:-VERS-TLS1.3", {TLS12}),
        ("NORMAL:!VERS-TLS1.2", {TLS13}),
        ("NORMAL:-VERS-ALL:+VERS-TLS1.3", {TLS13}),
        ("NORMAL:-VERS-TLS-ALL:+VERS-TLS1.2", {TLS12}),
    ],
)
def test_priority(priority, versions):
    assert parse_priority(priority) == versions


@pytest.mark.parametrize(
    "priority",
    [
        "",
        "none",
        "NORMAL:",
        "NORMAL:+ECDHE-PSK",
        "NORMAL:VERS-TLS1.2",
        "NORMAL:+VERS-TLS1.1",
        "NORMAL:-VERS-TLS9",
        "NORMAL:-VERS-ALL",
        "NORMAL:%SERVER_PRECEDENCE",
    ],
)
def test_bad_priority(priority):
    with pytest.raises(CredentialsError, match="priority"):
        parse_priority(priority)


def test_priority_of_a_client(tmp_path, authority):
    directory = authority.write_client(tmp_path / "client")
    credentials = load(directory, is_server=False, priority="NORMAL:-VERS-TLS1.2")
    assert credentials.context_blocking().minimum_version == TLS13


# -- pre-shared keys ---------------------------------------------------------------


def test_psk_file(tmp_path):
    path = tmp_path / "keys.psk"
    path.write_text("# made by psktool\n\nalice:00ff\nbob:with:colon:A0\né:01\n")
    assert load_psk_file(str(path)) == {
        "alice": b"\x00\xff",
        "bob:with:colon": b"\xa0",
        "é": b"\x01",
    }


@pytest.mark.parametrize(
    "line",
    ["alice", "alice:", ":00", "alice:0", "alice:xy", "alice:" + "00" * 257, "\xff"],
)
def test_bad_psk_file(tmp_path, line):
    path = tmp_path / "keys.psk"
    path.write_text(f"good:00\n{line}\n", encoding="latin-1")
    with pytest.raises(CredentialsError, match="line 2"):
        load_psk_file(str(path))


def test_unreadable_psk_file(tmp_path):
    with pytest.raises(CredentialsError, match="No such file"):
        load_psk_file(str(tmp_path / "none"))
    path = tmp_path / "large"
    path.write_bytes(b"\n" * ((1 << 20) + 1))
    with pytest.raises(CredentialsError, match="larger"):
        load_psk_file(str(path))


def test_psk_credentials(tmp_path):
    path = tmp_path / "keys.psk"
    path.write_text("alice:00ff\n")
    if not getattr(ssl, "HAS_PSK", False):
        with pytest.raises(CredentialsError, match=r"TLS-PSK needs Python 3\.13"):
            PskCredentials(str(path), is_server=True)
        return
    server = PskCredentials(str(path), is_server=True)
    assert not server.verifies_peer
    PskCredentials(str(path), is_server=False, username="alice")
    with pytest.raises(CredentialsError, match="no key of 'qemu'"):
        PskCredentials(str(path), is_server=False)
    first = server.context_blocking()
    assert not [c["name"] for c in first.get_ciphers() if "NULL" in c["name"]]
    path.write_text("alice:00ff00\n")
    assert server.context_blocking() is not first

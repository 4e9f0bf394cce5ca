"""TLS without a socket: the server's end beside Python's client."""

import base64
import random
import ssl

import pytest
from cryptography.hazmat.bindings.openssl.binding import Binding
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from nbdqcow.errors import TlsError
from nbdqcow.server.tls_engine import PythonEngine
from nbdqcow.server.tls_openssl import OpenSslEngine, X509ServerCredentials
from nbdqcow.tls import VerifyPeer
from tests.certificates import Authority

TLS12, TLS13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture
def pki(tmp_path, authority):
    authority.write_server(tmp_path)
    return tmp_path


def python_engine(directory):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server-cert.pem", directory / "server-key.pem")
    return PythonEngine(context)


def openssl_engine(directory, verify=VerifyPeer.OFF, **arguments):
    credentials = X509ServerCredentials(str(directory), verify_peer=verify, **arguments)
    return OpenSslEngine(credentials.context_blocking())


ENGINES = pytest.mark.parametrize("make", [python_engine, openssl_engine])


class StuckError(Exception):
    """Both ends wait for something: bytes were left out."""


class Client:
    """Python's own end, and what is on its way to and from it."""

    def __init__(self, authority, certificate=None, tmp_path=None):
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.load_verify_locations(cadata=authority.own.pem.decode())
        if certificate is not None:
            directory = tmp_path / "client"
            authority.write_client(directory, certificate)
            self.context.load_cert_chain(
                directory / "client-cert.pem", directory / "client-key.pem"
            )
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = None

    def connect(self, session=None):
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = self.context.wrap_bio(
            self.incoming, self.outgoing, server_hostname="localhost", session=session
        )

    def move(self, engine, piece=1 << 20):
        """Carry bytes both ways; return how many."""
        nb_moved = 0
        while data := self.outgoing.read(piece):
            engine.receive(memoryview(data))
            nb_moved += len(data)
        memory = memoryview(bytearray(piece))
        while nb_bytes := engine.take(memory):
            self.incoming.write(memory[:nb_bytes])
            nb_moved += nb_bytes
        return nb_moved

    def handshake(self, engine, piece=1 << 20, session=None):
        """Both ends' handshake, a few bytes at a time."""
        self.connect(session)
        done = False
        client_done = False
        for _ in range(50):
            if not client_done:
                try:
                    self.tls.do_handshake()
                    client_done = True
                except ssl.SSLWantReadError:
                    pass
            self.move(engine, piece)
            if not done:
                try:
                    done = engine.handshake()
                finally:
                    self.move(engine, piece)
            if done and client_done:
                return
        raise StuckError

    def read(self, nb_bytes):
        data = b""
        while len(data) < nb_bytes:
            data += self.tls.read(nb_bytes - len(data))
        return data


@ENGINES
@pytest.mark.parametrize("version", [TLS12, TLS13], ids=["1.2", "1.3"])
@pytest.mark.parametrize("piece", [1, 100, 1 << 20])
def test_data_goes_both_ways(pki, authority, make, version, piece):
    rng = random.Random(f"{version} {piece}")
    client, engine = Client(authority), make(pki)
    client.context.minimum_version = client.context.maximum_version = version
    client.handshake(engine, piece)
    assert client.tls.version() == f"TLSv1.{version - 0x0301}"
    buffer = memoryview(bytearray(1 << 17))
    assert engine.read_into(buffer) == 0
    for length in (1, 28, 16383, 16384, 16385, 65536, 100000):
        data = rng.randbytes(length)
        engine.write(memoryview(data))
        client.move(engine, piece)
        assert client.read(length) == data
        # The other way, to buffers of any size, of which nothing else changes.
        client.tls.write(data)
        client.move(engine, piece)
        got = bytearray()
        while len(got) < length:
            room = rng.randrange(1, 70000)
            buffer[room : room + 1] = b"x"
            nb_read = engine.read_into(buffer[:room])
            assert 0 < nb_read <= room
            assert buffer[room] == ord("x")
            got += buffer[:nb_read]
        assert bytes(got) == data
        assert engine.read_into(buffer) == 0
        assert not engine.at_end


@ENGINES
def test_part_of_a_record_is_not_read(pki, authority, make):
    client, engine = Client(authority), make(pki)
    client.handshake(engine)
    client.tls.write(b"together")
    data = client.outgoing.read()
    engine.receive(memoryview(data[:-1]))
    buffer = memoryview(bytearray(100))
    assert engine.read_into(buffer) == 0
    engine.receive(memoryview(data[-1:]))
    assert engine.read_into(buffer) == 8
    assert bytes(buffer[:8]) == b"together"


@ENGINES
def test_end_of_the_peer(pki, authority, make):
    client, engine = Client(authority), make(pki)
    client.handshake(engine)
    client.tls.write(b"last")
    with pytest.raises(ssl.SSLWantReadError):
        client.tls.unwrap()
    client.move(engine)
    buffer = memoryview(bytearray(100))
    nb_read = engine.read_into(buffer)
    assert bytes(buffer[:nb_read]) == b"last"
    assert engine.read_into(buffer) == 0
    assert engine.at_end
    # This direction goes on.
    engine.write(b"reply")
    client.move(engine)
    assert client.tls.read(100) == b"reply"


@ENGINES
def test_own_end(pki, authority, make):
    client, engine = Client(authority), make(pki)
    client.handshake(engine)
    engine.end()
    client.move(engine)
    assert client.tls.read(10) == b""


@ENGINES
def test_own_end_before_the_handshake(pki, authority, make):
    engine = make(pki)
    engine.end()
    assert engine.take(memoryview(bytearray(100))) == 0


@ENGINES
@pytest.mark.parametrize("place", [0, 3, 5, 20, -1])
def test_record_that_was_changed(pki, authority, make, place):
    client, engine = Client(authority), make(pki)
    client.handshake(engine)
    client.tls.write(b"x" * 100)
    data = bytearray(client.outgoing.read())
    data[place] ^= 1
    engine.receive(memoryview(data))
    if place == 3:
        # A longer record: what follows is taken for its end.
        engine.receive(memoryview(bytes(1 << 15)))
    buffer = memoryview(bytearray(1000))
    with pytest.raises(TlsError, match=r"^[a-z ]+$"):
        engine.read_into(buffer)
    assert bytes(buffer) == bytes(1000)
    # The client is told.
    client.move(engine)
    with pytest.raises(ssl.SSLError):
        client.tls.read(10)


@ENGINES
@pytest.mark.parametrize(
    "data", [b"\0" * 100, b"NBDMAGIC" * 20, b"\x16\x03\x01\xff\xff" + bytes(9)]
)
def test_no_handshake(pki, make, data):
    engine = make(pki)
    engine.receive(memoryview(data))
    with pytest.raises(TlsError, match=r"^[a-z0-9 ]+$"):
        engine.handshake()


@ENGINES
@pytest.mark.parametrize("seed", range(40))
def test_bytes_that_were_changed_anywhere(pki, authority, make, seed):
    print(f"seed {seed}")
    rng = random.Random(seed)
    client, engine = Client(authority), make(pki)
    sent = []

    def change_and_receive(data):
        changed = bytearray(data)
        if rng.random() < 0.3:
            place = rng.randrange(len(changed))
            changed[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        if changed:
            receive(memoryview(changed))

    receive, engine.receive = engine.receive, change_and_receive
    buffer = memoryview(bytearray(1 << 15))
    try:
        client.handshake(engine, rng.choice((50, 1000, 1 << 20)))
        for _ in range(20):
            sent.append(rng.randbytes(rng.randrange(1, 20000)))
            client.tls.write(sent[-1])
            client.move(engine, rng.choice((1000, 1 << 20)))
            while nb_read := engine.read_into(buffer):
                # Nothing but what was sent is ever let through.
                assert b"".join(sent).startswith(buffer[:nb_read])
                sent = [b"".join(sent)[nb_read:]]
    except (TlsError, ssl.SSLError, StuckError):
        pass


def test_errors_that_others_left(pki, authority):
    # Each thread has one queue of errors, for whoever uses this OpenSSL in it.
    def leave_an_error():
        assert lib.SSL_CTX_use_certificate_chain_file(context, b"/nonexistent") != 1
        assert lib.ERR_peek_error()

    lib = Binding().lib
    context = lib.SSL_CTX_new(lib.TLS_server_method())
    client, engine = Client(authority), openssl_engine(pki)
    leave_an_error()
    assert not engine.handshake()
    client.handshake(engine)
    leave_an_error()
    assert engine.read_into(memoryview(bytearray(10))) == 0
    client.tls.write(b"data")
    client.move(engine)
    leave_an_error()
    assert engine.read_into(memoryview(bytearray(10))) == 4
    lib.SSL_CTX_free(context)
    lib.ERR_clear_error()


def test_no_session_is_taken_up_again(pki, authority):
    # It was not checked against a new revocation list.
    credentials = X509ServerCredentials(str(pki), verify_peer=VerifyPeer.OFF)
    for version in (TLS12, TLS13):
        client = Client(authority)
        client.context.minimum_version = client.context.maximum_version = version
        session = None
        for _ in range(3):
            engine = OpenSslEngine(credentials.context_blocking())
            client.handshake(engine, session=session)
            # With TLS 1.3 tickets come with what follows.
            engine.write(b"x")
            client.move(engine)
            client.tls.read(1)
            assert not client.tls.session_reused
            session = client.tls.session


# -- certificates ------------------------------------------------------------------


def test_priority(pki, authority):
    for priority, version in (
        ("NORMAL:-VERS-TLS1.3", TLS12),
        ("NORMAL:-VERS-TLS1.2", TLS13),
    ):
        client = Client(authority)
        client.handshake(openssl_engine(pki, priority=priority))
        assert client.tls.version() == f"TLSv1.{version - 0x0301}"
        client.context.minimum_version = client.context.maximum_version = (
            TLS12 if version is TLS13 else TLS13
        )
        with pytest.raises((TlsError, ssl.SSLError)):
            client.handshake(openssl_engine(pki, priority=priority))


def test_certificate_of_a_client(pki, authority):
    alice = authority.client("alice")
    for verify in VerifyPeer:
        engine = openssl_engine(pki, verify)
        Client(authority, alice, pki).handshake(engine)
        shown = None if verify is VerifyPeer.OFF else alice.der
        assert engine.peer_certificate() == shown


def test_no_certificate_of_a_client(pki, authority):
    engine = openssl_engine(pki, VerifyPeer.OPTIONAL)
    Client(authority).handshake(engine)
    assert engine.peer_certificate() is None
    with pytest.raises(TlsError, match="peer did not return a certificate"):
        Client(authority).handshake(openssl_engine(pki, VerifyPeer.ON))


@pytest.mark.parametrize("verify", [VerifyPeer.OPTIONAL, VerifyPeer.ON])
def test_revoked_certificate(pki, authority, verify):
    alice, bob = authority.client("alice"), authority.client("bob")
    authority.revoke(pki, bob)
    Client(authority, alice, pki).handshake(openssl_engine(pki, verify))
    with pytest.raises(TlsError, match="certificate is refused: certificate revoked"):
        Client(authority, bob, pki).handshake(openssl_engine(pki, verify))


def test_revocation_list_that_comes_later(pki, authority):
    bob = authority.client("bob")
    credentials = X509ServerCredentials(str(pki))
    Client(authority, bob, pki).handshake(OpenSslEngine(credentials.context_blocking()))
    authority.revoke(pki, bob)
    with pytest.raises(TlsError, match="certificate revoked"):
        Client(authority, bob, pki).handshake(
            OpenSslEngine(credentials.context_blocking())
        )


def test_revocation_list_of_another_authority(pki, authority):
    Authority("other").revoke(pki)
    with pytest.raises(TlsError, match="unable to get certificate CRL"):
        Client(authority, authority.client("alice"), pki).handshake(
            openssl_engine(pki, VerifyPeer.ON)
        )


def test_certificate_for_another_use(pki, authority):
    with pytest.raises(TlsError, match="certificate is refused: unsuitable"):
        Client(authority, authority.server("alice"), pki).handshake(
            openssl_engine(pki, VerifyPeer.ON)
        )


def test_key_of_certtool(tmp_path, authority):
    # GnuTLS writes text before a key, and its number as one that may be negative.
    certificate = authority.server()
    while not certificate.key.private_numbers().private_value >> 255:
        certificate = authority.server()
    directory = authority.write_server(tmp_path, certificate)
    number = certificate.key.private_numbers().private_value.to_bytes(33)
    point = certificate.key.public_key().public_bytes(
        Encoding.X962, PublicFormat.UncompressedPoint
    )
    der = (
        bytes.fromhex("3078 020101 0421") + number
        + bytes.fromhex("a00a 06082a8648ce3d030107 a144 034200") + point
    )  # fmt: skip
    text = base64.encodebytes(der).decode()
    (directory / "server-key.pem").write_text(
        "Public Key Info:\n\tPublic Key Algorithm: EC/ECDSA\n\n"
        f"-----BEGIN EC PRIVATE KEY-----\n{text}-----END EC PRIVATE KEY-----\n"
    )
    Client(authority).handshake(openssl_engine(directory))


def test_key_behind_its_parameters(pki, authority):
    # As `openssl ecparam -genkey` writes it.
    key = pki / "server-key.pem"
    key.write_text(
        "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n"
        f"-----END EC PARAMETERS-----\n{key.read_text()}"
    )
    Client(authority).handshake(openssl_engine(pki))

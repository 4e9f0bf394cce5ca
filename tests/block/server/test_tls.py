"""TLS on the server's connections, on both event loops."""

import asyncio
import hmac
import socket
import ssl
from contextlib import asynccontextmanager, suppress

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from OpenSSL import SSL

from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.handshake import TlsMode
from nbdqcow.server.authz import AllowNames, by_certificate
from nbdqcow.server.options import ServerOptions
from nbdqcow.server.server import Server
from nbdqcow.server.tls import ServerTls
from nbdqcow.server.tls_engine import PythonEngine
from nbdqcow.server.tls_openssl import OpenSslEngine, X509ServerCredentials
from nbdqcow.tls import VerifyPeer, X509Credentials
from tests.block.server.support import Client, FakeNode, Served, settle
from tests.certificates import Authority

pytestmark = pytest.mark.asyncio

ALICE = "O=Example,CN=alice"


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """A directory with an authority, a server and three clients."""
    directory = tmp_path_factory.mktemp("pki")
    authority = Authority()
    authority.write_server(directory / "server")
    for name in ("alice", "bob"):
        authority.write_client(directory / name, authority.client(name))
    authority.write_client(directory / "nobody")
    return directory


@asynccontextmanager
async def serving_tls(
    path, pki, *nodes, mode=TlsMode.REQUIRED, verify=VerifyPeer.OFF, options=None,
    exports=(), directory="server", make=X509ServerCredentials,
):  # fmt: skip
    """Serve nodes over TLS as "", "1", "2"...; ``exports`` has arguments of
    `Server.add_export` for each."""
    credentials = make(str(pki / directory), verify_peer=verify)
    server = Server(options, ServerTls(credentials, mode))
    for index, node in enumerate(nodes):
        arguments = exports[index] if index < len(exports) else {}
        server.add_export(str(index or ""), node, **arguments)
    await server.listen_unix(str(path / "socket"))
    served = Served(server, path / "socket")
    served.running = asyncio.create_task(server.run_until_stopped())
    try:
        yield served
    finally:
        for node in nodes:
            node.gate.set()
        for client in served.clients:
            # One that is closed already has nothing to abort in Python 3.11.2.
            if not client.writer.transport.is_closing():
                client.writer.transport.abort()
        await served.stop()
        await asyncio.sleep(0.01)
        for node in nodes:
            assert not node.tokens


class PythonCredentials(X509Credentials):
    """What Python's own TLS is served with, as it is with pre-shared keys, which
    few versions of Python have."""

    _serves = True

    def _load(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self._own_paths())
        return context


ENGINES = pytest.mark.parametrize("make", [X509ServerCredentials, PythonCredentials])


def client_context(pki, name="nobody"):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(str(pki / name / "ca-cert.pem"))
    if name != "nobody":
        context.load_cert_chain(
            str(pki / name / "client-cert.pem"), str(pki / name / "client-key.pem")
        )
    return context


class TlsClient(Client):
    async def option(self, option, data=b""):
        """Return the type and the data of the last reply to an option."""
        self.writer.write(codec.option_request(option, data))
        while True:
            head = await self.reader.readexactly(codec.OPTION_REPLY.size)
            _, _, reply, length = codec.OPTION_REPLY.unpack(head)
            body = await self.reader.readexactly(length)
            if reply == nbd.REP_ACK or reply & nbd.REP_FLAG_ERROR:
                return reply, body

    async def starttls(self):
        await self.greet()
        return (await self.option(nbd.OPT_STARTTLS))[0]

    async def upgrade(self, context):
        await self.writer.start_tls(context, server_hostname="localhost")


async def connect(served, pki, name="nobody", context=None):
    """Return a client that has begun TLS."""
    plain = await served.connect_raw()
    client = TlsClient(plain.reader, plain.writer)
    served.clients[-1] = client
    assert await client.starttls() == nbd.REP_ACK
    await client.upgrade(context or client_context(pki, name))
    return client


async def gone(client):
    """Whether the server has closed, however it did."""
    try:
        return await asyncio.wait_for(client.reader.read(1 << 20), 20) == b""
    except OSError:
        return True


# -- it works ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"]
)
@ENGINES
async def test_requests_over_tls(tmp_path, pki, version, make):
    node = FakeNode(4 << 20)
    expected = bytes(node.data)
    async with serving_tls(tmp_path, pki, node, make=make) as served:
        context = client_context(pki)
        context.minimum_version = context.maximum_version = version
        client = await connect(served, pki, context=context)
        await client.go("")
        assert client.size == node.size
        for offset, length in [(0, 1), (5, 4096), (100, 70000), (0, 4 << 20)]:
            assert await client.read(offset, length) == expected[offset:][:length]
        for length in (1, 4096, 65536, 65537, 3 << 20):
            data = bytes(reversed(expected[:length]))
            assert await client.write(7, data) == 0
            assert node.data[7 : 7 + length] == data
        await client.disconnect()
    # What is encrypted is read in this process, so it must not be a mapped file.
    assert not node.nb_tokens


async def test_reads_that_are_encrypted_with_their_replies(tmp_path, pki):
    node = FakeNode(4 << 20)
    expected = bytes(node.data)
    node.not_staged = frozenset((20001,))
    lengths = [16384, 65536, 20000, 20001, 4096, 65535, 65536, 16385]
    async with serving_tls(tmp_path, pki, node) as served:
        client = await connect(served, pki)
        await client.go("")
        for rounds in range(8):
            wanted = [(rounds * 7 + i * 65537, n) for i, n in enumerate(lengths)]
            first = client.nb_cookies + 1
            client.writer.write(
                b"".join(client.request(nbd.CMD_READ, *each) for each in wanted)
            )
            for _ in wanted:
                # Their lengths differ, so the answer says whose it is.
                cookie, error, _ = await client.reply()
                offset, length = wanted[cookie - first]
                data = await client.reader.readexactly(length)
                assert not error
                assert data == expected[offset : offset + length]
        # Behind the end, and nothing at all.
        client.writer.write(client.request(nbd.CMD_READ, node.size - 5, 65536))
        client.writer.write(client.request(nbd.CMD_READ, 0, 0))
        assert (await client.reply(0))[1] == nbd.EINVAL
        assert (await client.reply(0))[1] == 0


async def test_replies_wait_for_a_client_that_reads_late(tmp_path, pki):
    # The memory they were put together in must not change meanwhile.
    node = FakeNode(32 << 20)
    expected = bytes(node.data)
    async with serving_tls(tmp_path, pki, node) as served:
        client, other = await connect(served, pki), await connect(served, pki)
        await client.go("")
        await other.go("")
        offsets = [i * 65543 for i in range(400)]
        for start in range(0, len(offsets), 50):
            client.writer.write(
                b"".join(
                    client.request(nbd.CMD_READ, o, 65536)
                    for o in offsets[start : start + 50]
                )
            )
            await asyncio.sleep(0.02)
            assert await other.read(start, 65536) == expected[start:][:65536]
        for cookie, offset in enumerate(offsets, 1):
            assert await client.reply(65536) == (
                cookie,
                0,
                expected[offset : offset + 65536],
            )


async def test_many_requests_at_once(tmp_path, pki):
    node = FakeNode()
    expected = bytes(node.data)
    async with serving_tls(tmp_path, pki, node) as served:
        client = await connect(served, pki)
        await client.go("")
        for node.inline in (True, False):
            offsets = range(0, 900000, 5000)
            first = client.nb_cookies + 1
            client.writer.write(
                b"".join(client.request(nbd.CMD_READ, o, 5000) for o in offsets)
            )
            answers = {}
            for _ in offsets:
                cookie, error, data = await client.reply(5000)
                assert not error
                answers[cookie] = data
            for cookie, offset in enumerate(offsets, first):
                assert answers[cookie] == expected[offset : offset + 5000]


@ENGINES
async def test_client_that_does_not_read(tmp_path, pki, make):
    node = FakeNode(8 << 20)
    expected = bytes(node.data)
    async with serving_tls(tmp_path, pki, node, make=make) as served:
        client = await connect(served, pki)
        await client.go("")
        nb_requests = 64
        client.writer.write(
            b"".join(
                client.request(nbd.CMD_READ, i, 1 << 20) for i in range(nb_requests)
            )
        )
        await asyncio.sleep(0.3)
        nb_served = len(node.log)
        # Each in pieces of 64 KiB.
        assert nb_served < nb_requests * 16
        await asyncio.sleep(0.1)
        assert len(node.log) == nb_served
        for i in range(nb_requests):
            cookie, error, data = await client.reply(1 << 20)
            assert (cookie, error) == (i + 1, 0)
            assert data == expected[i : i + (1 << 20)]


async def test_requests_right_behind_the_handshake(tmp_path, pki):
    # They may be decrypted before the server has its new transport.
    node = FakeNode()
    async with serving_tls(tmp_path, pki, node) as served:
        for _ in range(20):
            client = await connect(served, pki)
            request = client.request(nbd.CMD_READ, 3, 1000)
            await client.go("", trailing=request)
            assert await client.reply(1000) == (1, 0, bytes(node.data[3:1003]))
            client.close()


async def test_disconnect_without_a_word(tmp_path, pki):
    node = FakeNode()
    async with serving_tls(tmp_path, pki, node) as served:
        for _ in range(3):
            client = await connect(served, pki)
            await client.go("")
            assert await client.write(0, b"x" * 100) == 0
            client.writer.transport.abort()
        other = await connect(served, pki)
        await other.go("")
        assert await other.read(0, 4) == b"xxxx"


class Records:
    """A client whose records are made and sent by the test, with a plain socket."""

    def __init__(self, client, pki, keylog=None):
        self.client = client
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = client_context(pki)
        if keylog is not None:
            context.keylog_filename = str(keylog)
        self.tls = context.wrap_bio(
            self.incoming, self.outgoing, server_hostname="localhost"
        )

    async def call(self, function, *arguments):
        """Call what may have to wait for the server."""
        while True:
            waits = False
            try:
                result = function(*arguments)
            except ssl.SSLWantReadError:
                waits = True
            if self.outgoing.pending:
                self.client.writer.write(self.outgoing.read())
            if not waits:
                return result
            data = await self.client.reader.read(1 << 16)
            if not data:
                raise ConnectionError("cut off")
            self.incoming.write(data)

    async def read(self, nb_bytes):
        """Raises `EOFError` where the server has said that nothing more comes."""
        data = b""
        while len(data) < nb_bytes:
            try:
                more = await self.call(self.tls.read, nb_bytes - len(data))
            except ssl.SSLZeroReturnError:
                more = b""
            if not more:
                raise EOFError
            data += more
        return data


async def connect_records(served, pki, keylog=None):
    """Return a client in the transmission phase."""
    plain = await served.connect_raw()
    client = TlsClient(plain.reader, plain.writer)
    served.clients[-1] = client
    assert await client.starttls() == nbd.REP_ACK
    records = Records(client, pki, keylog)
    await records.call(records.tls.do_handshake)
    request = codec.option_request(nbd.OPT_EXPORT_NAME, b"")
    await records.call(records.tls.write, request)
    await records.read(10)
    return records


@ENGINES
@pytest.mark.parametrize("end", ["word", "shutdown", "both"])
async def test_client_that_ends_its_direction_gets_its_replies(
    tmp_path, pki, make, end
):
    node = FakeNode()
    node.inline = False
    node.gate.clear()
    expected = bytes(node.data)
    async with serving_tls(tmp_path, pki, node, make=make) as served:
        records = await connect_records(served, pki)
        client = records.client
        for offset in (5, 100000):
            records.tls.write(client.request(nbd.CMD_READ, offset, 70000))
        if end != "shutdown":
            with pytest.raises(ssl.SSLWantReadError):
                records.tls.unwrap()
        client.writer.write(records.outgoing.read())
        if end != "word":
            client.writer.write_eof()
        await settle(lambda: node.nb_waiting == 2)
        node.gate.set()
        for offset in (5, 100000):
            assert (await records.read(16))[:8] == bytes.fromhex("6744669800000000")
            assert await records.read(70000) == expected[offset:][:70000]
        # It is not cut off.
        with pytest.raises(EOFError):
            await records.read(1)


@ENGINES
@pytest.mark.parametrize("phase", ["haggling", "transmission"])
async def test_record_that_was_changed(tmp_path, pki, make, phase, caplog):
    node = FakeNode()
    async with serving_tls(tmp_path, pki, node, make=make) as served:
        other = await connect(served, pki)
        await other.go("")
        records = await connect_records(served, pki)
        if phase == "haggling":
            plain = await served.connect_raw()
            client = TlsClient(plain.reader, plain.writer)
            assert await client.starttls() == nbd.REP_ACK
            records = Records(client, pki)
            await records.call(records.tls.do_handshake)
        records.tls.write(records.client.request(nbd.CMD_WRITE, 0, 5) + b"12345")
        data = bytearray(records.outgoing.read())
        data[-1] ^= 1
        records.client.writer.write(data)
        # It is told why, and nothing of it was believed.
        with pytest.raises(ssl.SSLError, match=r"(?i:bad record mac)"):
            await records.read(1)
        assert await gone(records.client)
        assert [r for r in caplog.records if "closed: TLS: " in r.message]
        assert await other.read(0, 5) == bytes(node.data[:5])
    assert ("try_pwrite", 0, 5) not in node.log


async def test_broken_record_of_a_client_that_does_not_read(tmp_path, pki):
    node = FakeNode()
    options = ServerOptions(close_timeout=0.3)
    async with serving_tls(tmp_path, pki, node, options=options) as served:
        records = await connect_records(served, pki)
        client = records.client
        client.writer.transport.pause_reading()
        for _ in range(20):
            records.tls.write(client.request(nbd.CMD_READ, 0, 1 << 20))
        client.writer.write(records.outgoing.read())
        await settle(lambda: len(node.log) > 10)
        client.writer.write(bytes(100))
        await settle(lambda: not served.server._connections)


@ENGINES
async def test_bytes_come_one_by_one(tmp_path, pki, make):
    node = FakeNode()
    async with serving_tls(tmp_path, pki, node, make=make) as served:
        records = await connect_records(served, pki)
        records.tls.write(records.client.request(nbd.CMD_WRITE, 7, 20) + b"x" * 20)
        records.tls.write(records.client.request(nbd.CMD_READ, 7, 20))
        for byte in records.outgoing.read():
            records.client.writer.write(bytes([byte]))
            await asyncio.sleep(0)
        await records.read(16)
        assert (await records.read(36))[16:] == b"x" * 20


HANDSHAKE, DATA = 22, 23
NEW_KEYS = bytes([24, 0, 0, 1])
"""A KeyUpdate, but for its last byte: whether the peer is to do the same."""


class Direction:
    """One direction of TLS 1.3 with AES-256-GCM and SHA-384 (RFC 8446, 5.2, 7.2, 7.3),
    for what Python's ssl never sends."""

    def __init__(self, keylog, whose, nb_records):
        """``nb_records`` have gone this way since the handshake."""
        lines = [line.split() for line in keylog.read_text().splitlines()]
        (words,) = (w for w in lines if w[0] == f"{whose}_TRAFFIC_SECRET_0")
        self._use(bytes.fromhex(words[2]))
        self.nb_records = nb_records

    def _use(self, secret):
        self.secret = secret
        self.aes = AESGCM(self._derive(b"key", 32))
        self.iv = self._derive(b"iv", 12)
        self.nb_records = 0

    def _derive(self, label, length):
        label = b"tls13 " + label
        info = length.to_bytes(2) + bytes([len(label)]) + label + b"\0\1"
        return hmac.digest(self.secret, info, "sha384")[:length]

    def _nonce(self):
        number = int.from_bytes(self.iv) ^ self.nb_records
        self.nb_records += 1
        return number.to_bytes(12)

    def renew(self):
        self._use(self._derive(b"traffic upd", 48))

    def seal(self, kind, content):
        head = bytes([DATA, 3, 3]) + (len(content) + 17).to_bytes(2)
        return head + self.aes.encrypt(self._nonce(), content + bytes([kind]), head)

    def seal_new_keys(self):
        record = self.seal(HANDSHAKE, NEW_KEYS + b"\1")
        self.renew()
        return record

    async def open(self, reader):
        """Return the kind of the next record, and what is in it."""
        head = await asyncio.wait_for(reader.readexactly(5), 20)
        data = await reader.readexactly(int.from_bytes(head[3:]))
        content = self.aes.decrypt(self._nonce(), data, head)
        return content[-1], content[:-1]


@ENGINES
async def test_new_keys_without_end(tmp_path, pki, make, monkeypatch):
    monkeypatch.setattr("nbdqcow.server.connection._SEND_BUFFER", 4096)
    node = FakeNode()
    keylog = tmp_path / "keys"
    nb_updates = 8000
    async with serving_tls(tmp_path, pki, node, make=make) as served:
        records = await connect_records(served, pki, keylog)
        client = records.client
        transport = client.writer.transport
        ours = Direction(keylog, "CLIENT", 1)
        # Two tickets, which nobody will take, and the export.
        theirs = Direction(keylog, "SERVER", 3)
        client.writer.write(ours.seal_new_keys() + ours.seal_new_keys())
        # OpenSSL answers one when it sees the next.
        assert await theirs.open(client.reader) == (HANDSHAKE, NEW_KEYS + b"\0")
        theirs.renew()
        transport.pause_reading()
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.writer.write(b"".join(ours.seal_new_keys() for _ in range(nb_updates)))
        client.writer.write(ours.seal(DATA, client.request(nbd.CMD_READ, 5, 1000)))
        # No more is taken of a client that takes no answer.
        left = -1
        while left != transport.get_write_buffer_size():
            left = transport.get_write_buffer_size()
            await asyncio.sleep(0.3)
        assert left
        assert not node.log
        transport.resume_reading()
        for _ in range(nb_updates + 1):
            assert await theirs.open(client.reader) == (HANDSHAKE, NEW_KEYS + b"\0")
            theirs.renew()
        kind, content = await theirs.open(client.reader)
        assert kind == DATA
        assert content[16:] == bytes(node.data[5:1005])


async def test_handshake_of_a_client_that_has_had_one(tmp_path, pki):
    node = FakeNode()
    async with serving_tls(tmp_path, pki, node) as served:
        plain = await served.connect_raw()
        client = TlsClient(plain.reader, plain.writer)
        assert await client.starttls() == nbd.REP_ACK
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_max_proto_version(SSL.TLS1_2_VERSION)
        tls = SSL.Connection(context)
        tls.set_connect_state()

        async def shake():
            while True:
                waits = False
                try:
                    tls.do_handshake()
                except SSL.WantReadError:
                    waits = True
                with suppress(SSL.WantReadError):
                    client.writer.write(tls.bio_read(1 << 16))
                if not waits:
                    return
                tls.bio_write(await asyncio.wait_for(client.reader.read(1 << 16), 20))

        await shake()
        assert tls.renegotiate()
        # It is told, and does not wait for ever.
        with pytest.raises(SSL.Error, match="no renegotiation"):
            await shake()


@ENGINES
async def test_bytes_behind_the_end_of_tls(tmp_path, pki, make, monkeypatch):
    node = FakeNode()
    node.inline = False
    node.gate.clear()
    received = []
    async with serving_tls(tmp_path, pki, node, make=make) as served:
        records = await connect_records(served, pki)
        client = records.client
        records.tls.write(client.request(nbd.CMD_READ, 5, 1000))
        with pytest.raises(ssl.SSLWantReadError):
            records.tls.unwrap()
        client.writer.write(records.outgoing.read())
        await settle(lambda: node.nb_waiting == 1)
        for engine in (PythonEngine, OpenSslEngine):
            monkeypatch.setattr(
                engine, "receive", lambda self, data: received.append(1)
            )
        # While the reply is waited for nothing of this is kept.
        client.writer.write(bytes(4 << 20))
        await client.writer.drain()
        await settle(lambda: not client.writer.transport.get_write_buffer_size())
        node.gate.set()
        assert (await records.read(1016))[16:] == bytes(node.data[5:1005])
    assert not received


async def test_stop_while_clients_are_there(tmp_path, pki):
    node = FakeNode()
    async with serving_tls(tmp_path, pki, node) as served:
        idle = await connect(served, pki)
        await idle.go("")
        haggling = await connect(served, pki)
        await served.stop()
        assert await gone(idle)
        assert await gone(haggling)
    assert ("flush",) in node.log


# -- modes -------------------------------------------------------------------------


async def test_tls_is_required(tmp_path, pki):
    async with serving_tls(tmp_path, pki, FakeNode()) as served:
        plain = await served.connect_raw()
        client = TlsClient(plain.reader, plain.writer)
        await client.greet()
        for option in (nbd.OPT_LIST, nbd.OPT_STRUCTURED_REPLY):
            assert (await client.option(option))[0] == nbd.REP_ERR_TLS_REQD
        data = codec.info_request("")
        assert (await client.option(nbd.OPT_GO, data))[0] == nbd.REP_ERR_TLS_REQD
        # And it still can begin.
        assert (await client.option(nbd.OPT_STARTTLS))[0] == nbd.REP_ACK
        await client.upgrade(client_context(pki))
        await client.go("")


async def test_tls_for_one_export(tmp_path, pki):
    nodes = FakeNode(), FakeNode()
    async with serving_tls(
        tmp_path, pki, *nodes, mode=TlsMode.ON, exports=({}, {"tls_only": True})
    ) as served:
        data = codec.info_request("1")
        plain = await served.connect_raw()
        client = TlsClient(plain.reader, plain.writer)
        await client.greet()
        assert (await client.option(nbd.OPT_GO, data))[0] == nbd.REP_ERR_TLS_REQD
        await client.go("")
        assert len(await client.read(0, 10)) == 10
        encrypted = await connect(served, pki)
        await encrypted.go("1")
        assert len(await encrypted.read(0, 10)) == 10


# -- certificates ------------------------------------------------------------------


async def test_client_certificate_is_required(tmp_path, pki):
    async with serving_tls(tmp_path, pki, FakeNode(), verify=VerifyPeer.ON) as served:
        client = await connect(served, pki, "alice")
        await client.go("")
        with pytest.raises((OSError, asyncio.IncompleteReadError)):
            # With TLS 1.3 the client learns of it after the handshake.
            client = await connect(served, pki, "nobody")
            await client.go("")


async def test_client_certificate_is_optional(tmp_path, pki):
    allowed = by_certificate(AllowNames(frozenset((ALICE,))))
    nodes = FakeNode(), FakeNode()
    async with serving_tls(
        tmp_path,
        pki,
        *nodes,
        verify=VerifyPeer.OPTIONAL,
        exports=({}, {"may_use": allowed}),
    ) as served:
        data = codec.info_request("1")
        for name, answer in {
            "alice": nbd.REP_ACK,
            "bob": nbd.REP_ERR_POLICY,
            "nobody": nbd.REP_ERR_POLICY,
        }.items():
            client = await connect(served, pki, name)
            reply, text = await client.option(nbd.OPT_INFO, data)
            assert reply == answer
            if reply != nbd.REP_ACK:
                assert b"not allowed" in text
            await client.go("")


async def test_certificate_of_another_authority(tmp_path, pki):
    stranger = Authority("stranger")
    directory = tmp_path / "stranger"
    stranger.write_client(directory, stranger.client("alice"))
    for verify in (VerifyPeer.ON, VerifyPeer.OPTIONAL):
        async with serving_tls(tmp_path, pki, FakeNode(), verify=verify) as served:
            context = client_context(pki)
            context.load_cert_chain(
                str(directory / "client-cert.pem"), str(directory / "client-key.pem")
            )
            with pytest.raises((OSError, asyncio.IncompleteReadError)):
                client = await connect(served, pki, context=context)
                await client.go("")


async def test_new_certificates_without_a_restart(tmp_path, pki, caplog):
    old, new = Authority("old"), Authority("new")
    directory = old.write_server(tmp_path / "server")
    old.write_client(tmp_path / "old")
    new.write_client(tmp_path / "new")
    # The socket's directory is one of its own.
    path = tmp_path / "run"
    path.mkdir()
    async with serving_tls(path, tmp_path, FakeNode(), directory="server") as served:

        async def trusted_by(name):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(str(tmp_path / name / "ca-cert.pem"))
            try:
                client = await connect(served, tmp_path, context=context)
            except ssl.SSLCertVerificationError:
                return False
            await client.go("")
            return True

        assert await trusted_by("old")
        (directory / "server-key.pem").write_bytes(b"broken")
        for _ in range(3):
            assert await trusted_by("old")
        complaints = [r for r in caplog.records if "stay as they were" in r.message]
        assert len(complaints) == 1
        new.write_server(directory)
        assert await trusted_by("new")
        assert not await trusted_by("old")


# -- handshakes that fail ----------------------------------------------------------


@pytest.mark.parametrize("injected", [b"\0", codec.option_request(nbd.OPT_LIST)])
async def test_bytes_with_starttls(tmp_path, pki, injected):
    async with serving_tls(tmp_path, pki, FakeNode()) as served:
        client = await served.connect_raw()
        await client.greet()
        client.writer.write(codec.option_request(nbd.OPT_STARTTLS) + injected)
        assert await gone(client)
        await (await connect(served, pki)).go("")


async def test_plain_bytes_instead_of_tls(tmp_path, pki):
    async with serving_tls(tmp_path, pki, FakeNode()) as served:
        plain = await served.connect_raw()
        client = TlsClient(plain.reader, plain.writer)
        assert await client.starttls() == nbd.REP_ACK
        client.writer.write(
            codec.option_request(nbd.OPT_GO, codec.info_request("")) * 3
        )
        assert await gone(client)
        await (await connect(served, pki)).go("")


async def test_closing_instead_of_tls(tmp_path, pki):
    async with serving_tls(tmp_path, pki, FakeNode()) as served:
        for end in ("close", "abort", "eof"):
            plain = await served.connect_raw()
            client = TlsClient(plain.reader, plain.writer)
            assert await client.starttls() == nbd.REP_ACK
            if end == "close":
                client.close()
            elif end == "abort":
                client.writer.transport.abort()
            else:
                client.writer.write_eof()
                assert await gone(client)
        await (await connect(served, pki)).go("")
        # Each has left its place.
        await asyncio.sleep(0.1)
        assert len(served.server._connections) == 1


async def test_silence_instead_of_tls(tmp_path, pki, caplog):
    options = ServerOptions(handshake_timeout=0.3)
    async with serving_tls(tmp_path, pki, FakeNode(), options=options) as served:
        plain = await served.connect_raw()
        client = TlsClient(plain.reader, plain.writer)
        assert await client.starttls() == nbd.REP_ACK
        assert await gone(client)
        encrypted = await connect(served, pki)
        assert await gone(encrypted)
    closed = [r for r in caplog.records if "no handshake in time" in r.message]
    assert len(closed) == 2
    assert len(caplog.records) == 2


async def test_stop_in_the_middle_of_the_handshake(tmp_path, pki):
    async with serving_tls(tmp_path, pki, FakeNode()) as served:
        plain = await served.connect_raw()
        client = TlsClient(plain.reader, plain.writer)
        assert await client.starttls() == nbd.REP_ACK
        await served.stop()
        assert await gone(client)


async def test_client_that_wants_old_tls(tmp_path, pki):
    async with serving_tls(tmp_path, pki, FakeNode()) as served:
        context = client_context(pki)
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1"):
            context.minimum_version = ssl.TLSVersion.TLSv1
        with pytest.warns(DeprecationWarning, match="TLSv1"):
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(OSError):
            await connect(served, pki, context=context)

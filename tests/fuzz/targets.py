"""What is fuzzed: each target takes bytes, and lets nothing out but bugs.

The exceptions that a parser documents are caught here; memory that it takes
and bytes that it reads are bounded by assertions.
"""

import asyncio
import contextlib
import struct
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from nbdqcow.block.driver import FormatDriver
from nbdqcow.block.filter_names import innermost, shown_name
from nbdqcow.block.image_options import parse_pairs
from nbdqcow.block.node import Node
from nbdqcow.block.tools import REPAIR_ALL, REPAIR_NONE
from nbdqcow.buffers import BufferPool
from nbdqcow.cli.option_text import parse_keyval
from nbdqcow.crypto.luks import LuksHeader
from nbdqcow.errors import ImageError, ProtocolError, UsageError
from nbdqcow.filters.rules import Rules, parse_config
from nbdqcow.formats.qcow1.create import CreateOptions
from nbdqcow.formats.qcow1.create import create as create_qcow1
from nbdqcow.formats.qcow1.driver import Qcow1Driver
from nbdqcow.formats.qcow1.header import Header as Qcow1Header
from nbdqcow.formats.qcow1.tool import Qcow1Tool
from nbdqcow.formats.qcow2.codec import inflate_blocking, unzstd_blocking
from nbdqcow.formats.qcow2.driver import Qcow2Driver
from nbdqcow.formats.qcow2.header import Header, needed
from nbdqcow.formats.qcow2.tool import Qcow2Tool
from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.client import ClientHandshake, ClientState
from nbdqcow.nbd.client_transmission import Call, ClientTransmission
from nbdqcow.nbd.handshake import (
    ExportInfo,
    HandshakeState,
    ServerHandshake,
    TlsMode,
)
from nbdqcow.nbd.requests import (
    COMPACT,
    EXTENDED,
    RequestReader,
    context_ids,
    expand_status,
)
from nbdqcow.nbd.uri import parse_place, parse_uri
from nbdqcow.storage.memory import MemoryStorage
from nbdqcow.units import parse_size
from tests.builder import BytesFile, ImageBuilder
from tests.crash.histories import compressed, filled

D = TypeVar("D", bound=FormatDriver)
Requests = list[Callable[[], Awaitable[Any]]]

MiB: Final = 1 << 20
MAX_READ: Final = 512 * MiB
"""Bytes of a small image that a command may read, again and again."""


class Exports:
    """Two exports for a handshake."""

    infos = (
        ExportInfo("", MiB, nbd.FLAG_HAS_FLAGS, meta_contexts=("base:allocation",)),
        ExportInfo("secret", MiB, nbd.FLAG_HAS_FLAGS, "a text", tls_only=True),
    )

    def list_exports(self) -> tuple[ExportInfo, ...]:
        return self.infos

    def find_export(self, name: str) -> ExportInfo | None:
        return next((info for info in self.infos if info.name == name), None)


def pieces(data: bytes) -> list[bytes]:
    """Cut input at places that it says itself, in its first byte."""
    step = data[0] if data else 0
    body = data[1:]
    if not step:
        return [body]
    return [body[i : i + step] for i in range(0, len(body), step)]


def server_handshake(data: bytes) -> None:
    """The server's handshake, in all three modes of TLS."""
    for mode in TlsMode:
        handshake = ServerHandshake(Exports(), tls=mode)
        nb_sent = len(handshake.data_to_send())
        for piece in pieces(data):
            handshake.receive_data(piece)
            nb_sent += len(handshake.data_to_send())
            if handshake.state is HandshakeState.STARTTLS:
                handshake.tls_started()
        assert nb_sent <= 4096 + 64 * len(data) * 70
        if handshake.state is HandshakeState.TRANSMISSION:
            assert handshake.export is not None


def request_reader(data: bytes) -> None:
    """The requests of the transmission phase, in both layouts."""
    for layout in (COMPACT, EXTENDED):
        reader = RequestReader(BufferPool(), MiB, layout)
        rest = memoryview(data)
        try:
            while rest:
                buffer = reader.get_buffer()
                nb = min(len(buffer), len(rest), 1 + data[0])
                buffer[:nb] = rest[:nb]
                rest = rest[nb:]
                reader.received(nb)
                while (request := reader.next_request()) is not None:
                    assert len(request.payload or b"") <= MiB
                    if request.command == nbd.CMD_BLOCK_STATUS:
                        request = expand_status(request)
                        context_ids(request.payload or b"")
        except ProtocolError:
            pass
        reader.close()


def client_handshake(data: bytes) -> None:
    """The client's handshake against any server."""
    client = ClientHandshake()
    questions = [
        client.structured_reply,
        client.extended_headers,
        client.list_exports,
        lambda: client.list_meta_contexts("a"),
        lambda: client.set_meta_contexts("a", ["base:allocation"]),
        lambda: client.info("a", (1, 2, 3)),
        lambda: client.go("a"),
    ]
    try:
        for piece in pieces(data):
            client.receive_data(piece)
            if client.state is ClientState.IDLE and questions:
                questions.pop(0)()
                client.data_to_send()
    except ProtocolError:
        pass


def client_transmission(data: bytes) -> None:
    """A server's replies, of all three styles."""
    for options in ({}, {"structured": True}, {"extended": True}):
        client = ClientTransmission(contexts={0: "base:allocation"}, **options)
        for command in (nbd.CMD_READ, nbd.CMD_BLOCK_STATUS, nbd.CMD_WRITE) * 2:
            client.request(Call(command, 0, 4096))
        rest = memoryview(data)
        try:
            while rest:
                buffer = client.get_buffer()
                nb = min(len(buffer), len(rest))
                buffer[:nb] = rest[:nb]
                rest = rest[nb:]
                for call in client.received(nb):
                    assert len(call.data) <= 4096
        except ProtocolError:
            pass


def qcow2_header(data: bytes) -> None:
    """A qcow2 header, and packing what was parsed."""
    for for_check in (False, True):
        try:
            header = Header.parse(data[: max(needed(data), 24)], for_check=for_check)
            header.check_supported(read_only=True)
            header.check_layout(len(data))
            packed = header.pack()
        except ImageError:
            continue
        packed = packed.ljust(header.cluster_size, b"\0")
        again = Header.parse(packed, for_check=for_check)
        assert again.size == header.size
        assert again.extensions == header.extensions


def qcow2_image(data: bytes) -> None:
    """All that is done to an image: describe, check, repair, read, write."""
    tool = Qcow2Tool()
    file = BytesFile(data)
    for work in (
        lambda: tool.describe(file),
        lambda: tool.describe_for_check(file),
        lambda: tool.check(file, REPAIR_NONE, lambda line: None),
        lambda: tool.check(file, REPAIR_ALL, lambda line: None),
        lambda: tool.check(file, REPAIR_NONE, lambda line: None),
    ):
        try:
            work()
        except (ImageError, OSError):
            continue
    assert file.nb_read <= MAX_READ, file.nb_read
    asyncio.run(_use_image(data, Qcow2Driver, _use_qcow2))


async def _use_image(
    data: bytes,
    driver_class: type[D],
    use: Callable[[Node, D], Requests],
    **options: Any,
) -> None:
    """Open an image both ways; do what ``use`` says, each as far as it goes."""
    for read_only in (True, False):
        storage = MemoryStorage(data, max_length=64 * MiB)
        with contextlib.suppress(ImageError, OSError):
            driver = await driver_class.open(
                storage, read_only=read_only, options=options
            )
            node = Node(driver, filename="fuzz")
            for request in use(node, driver) if node.size else ():
                with contextlib.suppress(OSError):
                    await request()
            await node.close()


def _read(node: Node, length: int) -> Requests:
    """Return what can be done to an image of any format."""
    return [
        lambda: node.pread(0, length),
        lambda: node.pread(node.size - length, length),
        lambda: node.block_status(0, node.size, 1000),
    ]


def _use_qcow2(node: Node, driver: Qcow2Driver) -> Requests:
    length = min(node.size, 64 << 10)
    requests = [*_read(node, length), lambda: driver.snapshot_list()]
    if not node.read_only:
        requests += [
            lambda: node.pwrite(0, b"w" * min(700, length)),
            lambda: node.discard(0, length),
            lambda: node.write_zeroes(0, length),
            lambda: node.flush(),
            lambda: driver.snapshot_create("new"),
            lambda: driver.snapshot_delete("1"),
            lambda: driver.snapshot_apply("new"),
        ]
    return requests


def qcow1_header(data: bytes) -> None:
    """A header of version 1, and packing what was parsed."""
    try:
        header = Qcow1Header.parse(data)
    except ImageError:
        return
    assert header.l1_bytes <= 2048 * MiB
    assert Qcow1Header.parse(header.pack()) == header


def qcow1_image(data: bytes) -> None:
    """All that is done to an image of version 1: describe, read, write."""
    file = BytesFile(data)
    with contextlib.suppress(ImageError, OSError):
        Qcow1Tool().describe(file)
    assert file.nb_read <= MAX_READ, file.nb_read
    asyncio.run(_use_image(data, Qcow1Driver, _use_qcow1, secret=b"secret"))


def _use_qcow1(node: Node, driver: Qcow1Driver) -> Requests:
    length = min(node.size, 64 << 10)
    requests = _read(node, length)
    if not node.read_only:
        clusters = node.size - node.size % driver.cluster_size
        requests += [
            lambda: node.pwrite(0, b"w" * min(700, length)),
            lambda: node.pwrite(node.size - length, b"w" * min(700, length)),
            lambda: node.write_zeroes(0, length),
            lambda: node.pwrite_compressed(0, bytes(min(clusters, 1 << 16))),
            lambda: node.flush(),
            lambda: driver.make_empty(),
        ]
    return requests


def luks_header(data: bytes) -> None:
    """A LUKS header, and packing what was parsed. Version 2 is refused."""
    try:
        header = LuksHeader.parse(data)
    except ImageError:
        return
    assert data[6:8] == b"\0\1"
    assert header.area_length <= 64 * MiB
    assert LuksHeader.parse(header.pack()) == header


def uris(data: bytes) -> None:
    """NBD URIs and places, and printing what was parsed."""
    text = data.decode("utf-8", "surrogateescape")
    for parse in (parse_uri, parse_place):
        try:
            uri = parse(text)
            printed = str(uri)
        except UsageError:
            continue
        assert parse_uri(printed) == uri, printed


def image_options(data: bytes) -> None:
    """``--image-opts``, and sizes."""
    text = data.decode("utf-8", "surrogateescape")
    with contextlib.suppress(ImageError, UsageError):
        name, _ = parse_pairs(parse_keyval(text))
        with contextlib.suppress(ImageError):
            shown_name(name, innermost(name))
    try:
        size = parse_size(text)
    except ValueError:
        return
    assert 0 <= size < 1 << 63


def filter_config(data: bytes) -> None:
    """Rules of `blkdebug`, and names of files with filters."""
    with contextlib.suppress(ImageError):
        rules = Rules(parse_config(data))
        for event in ("none", "read_aio", "write_aio"):
            rules.announce(event)
            assert 0 <= rules.error_for("read", 0, 512) < 4096
    name = data.decode("utf-8", "surrogateescape")
    with contextlib.suppress(ImageError):
        shown_name(name, innermost(name))


def streams(data: bytes) -> None:
    """Compressed clusters."""
    for decompress in (inflate_blocking, unzstd_blocking):
        try:
            assert len(decompress(data, 4096)) == 4096
        except OSError:
            continue


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        server_handshake, request_reader, client_handshake, client_transmission,
        qcow2_header, qcow2_image, qcow1_header, qcow1_image, luks_header,
        uris, image_options, filter_config, streams,
    )
}  # fmt: skip


# -- where a corpus begins -----------------------------------------------------------


def luks2_header() -> bytes:
    """Return a binary header of LUKS 2, as cryptsetup writes it.

    Source: LUKS2 On-Disk Format Specification, 2.1, "Binary Header".
    """
    head = struct.pack(
        ">6sHQQ48s32s64s40s48sQ184s64s",
        b"LUKS\xba\xbe", 2, 16384, 3, b"label", b"sha256", b"s" * 64,
        b"12345678-1234-1234-1234-123456789abc", b"subsystem", 0, b"", b"c" * 64,
    )  # fmt: skip
    return head + b'{"keyslots":{},"tokens":{},"segments":{},"digests":{}}'


async def make_qcow1_images() -> dict[str, bytes]:
    """Return images of version 1 with data, compressed and not, and a hole."""
    images = {}
    for name, options in (
        ("plain", CreateOptions(size=128 << 10)),
        ("backing", CreateOptions(size=128 << 10, backing_file="base")),
        ("encrypted", CreateOptions(size=64 << 10, encrypted=True)),
    ):
        storage = MemoryStorage(b"")
        await create_qcow1(storage, options)
        driver = await Qcow1Driver.open(
            storage, read_only=False, options={"secret": b"secret"}
        )
        node = Node(driver, filename=name)
        await node.pwrite(0, b"some data" * 1000)
        await node.pwrite(60_000, b"more data")
        if name == "plain":
            await node.pwrite_compressed(65536, b"compressed".ljust(16384, b"."))
        await node.close()
        images[name] = bytes(storage.data)
    return images


def seeds() -> dict[str, dict[str, bytes]]:
    """Return well-formed input for each target; ``tests/fuzz/corpus`` was made
    of it, and has more."""
    option = codec.option_request
    flags = codec.CLIENT_FLAGS.pack(3)
    contexts = codec.meta_context_request("", ["base:", "base:allocation"])
    haggling = b"".join(
        [
            flags, option(nbd.OPT_LIST), option(nbd.OPT_STRUCTURED_REPLY),
            option(nbd.OPT_LIST_META_CONTEXT, codec.meta_context_request("")),
            option(nbd.OPT_SET_META_CONTEXT, contexts),
            option(nbd.OPT_INFO, codec.info_request("secret", (1, 2, 3))),
            option(nbd.OPT_GO, codec.info_request("")), b"after",
        ]
    )  # fmt: skip
    tls = flags + option(nbd.OPT_STARTTLS) + option(nbd.OPT_EXPORT_NAME, b"secret")
    compact = b"".join(
        codec.request(command, 7, 512, 16, 0) + b"p" * (16 * (command == nbd.CMD_WRITE))
        for command in range(8)
    )
    extended = b"".join(
        codec.extended_request(command, 7, 512, 16, nbd.CMD_FLAG_PAYLOAD_LEN)
        + b"\0" * 16
        for command in range(8)
    )
    reply = codec.option_reply
    greeting = codec.greeting(3)
    answers = greeting + b"".join(
        [
            reply(nbd.OPT_STRUCTURED_REPLY, nbd.REP_ACK),
            reply(nbd.OPT_EXTENDED_HEADERS, nbd.REP_ERR_UNSUP, b"no"),
            reply(nbd.OPT_LIST, nbd.REP_SERVER, codec.server_description("a", "b")),
            reply(nbd.OPT_LIST, nbd.REP_ACK),
            reply(nbd.OPT_LIST_META_CONTEXT, nbd.REP_ACK),
            reply(nbd.OPT_SET_META_CONTEXT, nbd.REP_META_CONTEXT,
                  codec.meta_context(1, "base:allocation")),
            reply(nbd.OPT_SET_META_CONTEXT, nbd.REP_ACK),
            reply(nbd.OPT_INFO, nbd.REP_INFO, codec.info_export(MiB, 1)),
            reply(nbd.OPT_INFO, nbd.REP_INFO, codec.info_block_size(1, 512, MiB)),
            reply(nbd.OPT_INFO, nbd.REP_ACK),
        ]
    )  # fmt: skip
    simple = codec.simple_reply(1) + bytes(4096) + codec.simple_reply(3, 5)
    chunk = struct.Struct(">IHHQI").pack
    structured = (
        chunk(nbd.STRUCTURED_REPLY_MAGIC, 0, 1, 1, 8 + 96)
        + bytes(8 + 96)
        + chunk(nbd.STRUCTURED_REPLY_MAGIC, 1, 2, 1, 12)
        + struct.pack(">QI", 96, 4000)
        + chunk(nbd.STRUCTURED_REPLY_MAGIC, 1, 5, 2, 12)
        + struct.pack(">III", 0, 4096, 3)
        + chunk(nbd.STRUCTURED_REPLY_MAGIC, 1, 0x8001, 3, 8)
        + struct.pack(">IH", 5, 2)
        + b"no"
    )
    head = struct.Struct(">IHHQQQ").pack
    long = (
        head(nbd.EXTENDED_REPLY_MAGIC, 1, 6, 2, 0, 24)
        + struct.pack(">IIQQ", 0, 1, 4096, 3)
        + head(nbd.EXTENDED_REPLY_MAGIC, 1, 0, 3, 0, 0)
    )
    luks = bytearray(592)
    struct.pack_into(
        ">6sH32s32s32sII20s32sI40s", luks, 0, b"LUKS\xba\xbe", 1, b"aes",
        b"xts-plain64", b"sha256", 8192, 64, b"d" * 20, b"s" * 32, 1000, b"uuid",
    )  # fmt: skip
    for slot in range(8):
        struct.pack_into(
            ">II32sII", luks, 208 + 48 * slot, 0x00AC71F3 if slot < 2 else 0xDEAD,
            1000, b"salt", 8 + slot * 504, 4000,
        )  # fmt: skip
    qcow1_images = asyncio.run(make_qcow1_images())
    with_all = ImageBuilder(128 << 10)
    for index in range(4):
        with_all.add_data(index, b"%d" % index)
    with_all.add_zero(5, allocated=True)
    with_all.add_compressed(6, b"six")
    with_all.add_snapshot("one")
    with_all.add_snapshot("two", vm_state=3)
    entry = struct.pack(">QIIBBHI", with_all.allocate(8), 1, 2, 1, 9, 1, 0) + b"b"
    entry = entry.ljust(32, b"\0")
    offset = with_all.allocate(len(entry), entry)
    with_all.header.autoclear_features = 1
    with_all.header.set_extension(
        0x23852875, struct.pack(">IIQQ", 1, 0, len(entry), offset)
    )
    image = with_all.build()
    return {
        "server_handshake": {"haggling": b"\0" + haggling, "tls": b"\5" + tls},
        "request_reader": {"compact": compact, "extended": extended},
        "client_handshake": {
            "answers": b"\x12" + answers, "whole": b"\0" + answers,
        },
        "client_transmission": {
            "simple": simple, "structured": structured, "extended": long,
        },
        "qcow2_header": {"all": image[:512], "version-2": filled(1, version=2)[:512]},
        "qcow2_image": {
            "all": image, "version-2": filled(3, version=2),
            "wide-counts": filled(3, refcount_order=6), "compressed": compressed(),
        },
        "qcow1_header": {"plain": qcow1_images["plain"][:64],
                         "backing": qcow1_images["backing"][:64]},
        "qcow1_image": qcow1_images,
        "luks_header": {"aes": bytes(luks), "version-2": luks2_header(),
                        "claims-version-2": bytes(luks[:7]) + b"\2" + bytes(luks[8:])},
        "uris": {
            "tcp": b"nbd://host:10809/export", "tls": b"nbds://user@[::1]/a%20b",
            "unix": b"nbd+unix:///name?socket=/tmp/sock",
            "vsock": b"nbd+vsock://3:10809/?tls-verify-peer=0",
        },
        "image_options": {
            "all": b"driver=qcow2,file.driver=file,file.filename=a,,b,discard=unmap",
            "json": b'json:{"driver":"qcow2","file":{"driver":"file","filename":"a"}}',
            "size": b"1.5G",
        },
        "filter_config": {
            "rules": b'[inject-error]\nevent = "none"\nerrno = "5"\nonce = "on"\n'
                     b'[set-state]\nevent = "none"\nstate = "1"\nnew_state = "2"\n',
            "name": b"blkdebug:config:file",
            "options": b'blkdebug:json:{"image.filename":"a","align":"512"}',
        },
        "streams": {
            "deflate": bytes.fromhex("edc1010d000000c2a0f74f6d0e37a00000000000000000"),
            "zstd": bytes.fromhex("28b52ffd60000f4d0000100000010043fcd7021002"),
        },
    }  # fmt: skip

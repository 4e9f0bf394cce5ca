"""The fixed layouts of the NBD protocol, big-endian, and what builds them."""

from collections.abc import Iterable
from struct import Struct
from typing import Final

from nbdqcow.nbd import constants as nbd

GREETING: Final = Struct(">QQH")
"""INIT_PASSWD, IHAVEOPT_MAGIC, handshake flags."""
CLIENT_FLAGS: Final = Struct(">I")
OPTION: Final = Struct(">QII")
"""IHAVEOPT_MAGIC, option, length of the data that follows."""
OPTION_REPLY: Final = Struct(">QIII")
"""OPTION_REPLY_MAGIC, option, reply type, length of the data that follows."""
EXPORT: Final = Struct(">QH")
"""Size of the export in bytes, transmission flags: the answer to EXPORT_NAME."""
INFO_EXPORT: Final = Struct(">HQH")
"""INFO_EXPORT, size in bytes, transmission flags."""
INFO_BLOCK_SIZE: Final = Struct(">HIII")
"""INFO_BLOCK_SIZE, minimum and preferred block size, maximum payload: bytes."""
REQUEST: Final = Struct(">IHHQQI")
"""REQUEST_MAGIC, command flags, type, cookie, offset, length."""
EXTENDED_REQUEST: Final = Struct(">IHHQQQ")
"""EXTENDED_REQUEST_MAGIC, command flags, type, cookie, offset, length."""
SIMPLE_REPLY: Final = Struct(">IIQ")
"""SIMPLE_REPLY_MAGIC, error, cookie."""
STRUCTURED_REPLY: Final = Struct(">IHHQI")
"""STRUCTURED_REPLY_MAGIC, reply flags, type, cookie, length of the payload."""
EXTENDED_REPLY: Final = Struct(">IHHQQQ")
"""EXTENDED_REPLY_MAGIC, reply flags, type, cookie, offset of the request,
length of the payload."""
HOLE: Final = Struct(">QI")
"""The payload of OFFSET_HOLE: offset, length."""
ERROR: Final = Struct(">IH")
"""What the payload of an error chunk begins with: error, length of its text."""

U16: Final = Struct(">H")
U32: Final = Struct(">I")
U64: Final = Struct(">Q")

EXPORT_PADDING: Final = bytes(124)
"""What follows EXPORT unless FLAG_C_NO_ZEROES was negotiated."""


def greeting(flags: int) -> bytes:
    """Return what the server sends first (proto.md "Newstyle negotiation")."""
    return GREETING.pack(nbd.INIT_PASSWD, nbd.IHAVEOPT_MAGIC, flags)


def option_request(option: int, data: bytes = b"") -> bytes:
    """Return an option as the client sends it."""
    return OPTION.pack(nbd.IHAVEOPT_MAGIC, option, len(data)) + data


def option_reply(option: int, reply: int, data: bytes = b"") -> bytes:
    """Return a reply to ``option`` (proto.md "Fixed newstyle negotiation")."""
    return OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def server_description(name: str, description: str) -> bytes:
    """Return the data of REP_SERVER: one export of a LIST."""
    encoded = name.encode()
    return U32.pack(len(encoded)) + encoded + description.encode()


def info_export(size: int, flags: int) -> bytes:
    """Return the data of REP_INFO with INFO_EXPORT; ``size`` in bytes."""
    return INFO_EXPORT.pack(nbd.INFO_EXPORT, size, flags)


def info_text(info: int, text: str) -> bytes:
    """Return the data of REP_INFO with INFO_NAME or INFO_DESCRIPTION."""
    return U16.pack(info) + text.encode()


def info_block_size(minimum: int, preferred: int, maximum_payload: int) -> bytes:
    """Return the data of REP_INFO with INFO_BLOCK_SIZE; all in bytes."""
    return INFO_BLOCK_SIZE.pack(
        nbd.INFO_BLOCK_SIZE, minimum, preferred, maximum_payload
    )


def info_request(name: str, infos: tuple[int, ...] = ()) -> bytes:
    """Return the data of an INFO or GO option that asks for ``infos``."""
    encoded = name.encode()
    return b"".join(
        (
            U32.pack(len(encoded)),
            encoded,
            U16.pack(len(infos)),
            *(U16.pack(info) for info in infos),
        )
    )


def meta_context(context_id: int, name: str) -> bytes:
    """Return the data of REP_META_CONTEXT."""
    return U32.pack(context_id) + name.encode()


def meta_context_request(name: str, queries: Iterable[str] = ()) -> bytes:
    """Return the data of LIST_META_CONTEXT or SET_META_CONTEXT."""
    encoded = [query.encode() for query in queries]
    return b"".join(
        (
            U32.pack(len(name.encode())),
            name.encode(),
            U32.pack(len(encoded)),
            *(U32.pack(len(query)) + query for query in encoded),
        )
    )


def request(
    command: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0
) -> bytes:
    """Return the header of a transmission request; WRITE's data follows it."""
    return REQUEST.pack(nbd.REQUEST_MAGIC, flags, command, cookie, offset, length)


def extended_request(
    command: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0
) -> bytes:
    """Return a request's header after EXTENDED_HEADERS."""
    return EXTENDED_REQUEST.pack(
        nbd.EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length
    )


def simple_reply(cookie: int, error: int = 0) -> bytes:
    """Return the header of a simple reply; a successful READ's data follows."""
    return SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, error, cookie)

"""The data of options, and the strings in them: parsed, or refused.

Raises `OptionError` for what a client may not send. Source: proto.md "Option
types" and "Conventions".
"""

from typing import Final

from nbdqcow.errors import OptionError
from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd

_MAX_QUERIES: Final = 1024
"""Queries in one LIST_META_CONTEXT or SET_META_CONTEXT."""
_WILDCARDS: Final = frozenset(("base:", "qemu:", "qemu:dirty-bitmap:"))
"""Queries of LIST_META_CONTEXT that stand for all contexts that begin so
(proto.md "The `base:` metadata namespace"; QEMU's interop/nbd.rst)."""


def parse_info_request(data: bytes) -> tuple[bytes, set[int]]:
    """Return the name and the information types that INFO or GO asks for.

    Raises `OptionError` unless the lengths fit the data exactly.
    """
    name, offset = _take_name(data, codec.U16.size)
    (nb_infos,) = codec.U16.unpack_from(data, offset)
    infos_offset = offset + codec.U16.size
    if len(data) != infos_offset + 2 * nb_infos:
        raise OptionError(
            nbd.REP_ERR_INVALID,
            f"{nb_infos} information requests do not fill the option's data",
        )
    infos = {
        codec.U16.unpack_from(data, infos_offset + 2 * i)[0] for i in range(nb_infos)
    }
    return name, infos


def parse_meta_queries(data: bytes) -> tuple[bytes, set[str]]:
    """Return the export's name and the queries of a *_META_CONTEXT option.

    Raises `OptionError` unless the lengths fit the data exactly, and for a
    query that is no string or has no namespace.
    """
    name, offset = _take_name(data, codec.U32.size)
    (nb_queries,) = codec.U32.unpack_from(data, offset)
    offset += codec.U32.size
    if nb_queries > _MAX_QUERIES:
        raise OptionError(
            nbd.REP_ERR_TOO_BIG, f"{nb_queries} queries; {_MAX_QUERIES} are allowed"
        )
    queries = set()
    for _ in range(nb_queries):
        if len(data) - offset < 4:
            raise OptionError(nbd.REP_ERR_INVALID, "a query is missing")
        (length,) = codec.U32.unpack_from(data, offset)
        offset += 4
        if length > len(data) - offset:
            raise OptionError(nbd.REP_ERR_INVALID, "a query is longer than the option")
        queries.add(_decode_query(data[offset : offset + length]))
        offset += length
    if offset != len(data):
        raise OptionError(
            nbd.REP_ERR_INVALID, f"{nb_queries} queries do not fill the option's data"
        )
    return name, queries


def _take_name(data: bytes, nb_behind: int) -> tuple[bytes, int]:
    """Return the export's name that an option's data begins with, and the offset
    behind it, where there are ``nb_behind`` bytes at least."""
    start = codec.U32.size
    if len(data) < start + nb_behind:
        raise OptionError(nbd.REP_ERR_INVALID, "the option's data is too short")
    (length,) = codec.U32.unpack_from(data)
    if length > len(data) - start - nb_behind:
        raise OptionError(nbd.REP_ERR_INVALID, "the name is longer than the option")
    return data[start : start + length], start + length


def _decode_query(data: bytes) -> str:
    query = decode_string("query", data)
    if not query.partition(":")[1]:
        raise OptionError(
            nbd.REP_ERR_INVALID, f"the query {quote(query)} has no namespace"
        )
    return query


def lists_context(query: str, name: str) -> bool:
    """Tell whether a query of LIST_META_CONTEXT finds the context ``name``."""
    return query == name or (query in _WILDCARDS and name.startswith(query))


def decode_string(what: str, data: bytes) -> str:
    """Return a client's string as text (proto.md "Conventions"). Raises
    `OptionError`, which calls it ``what``."""
    if len(data) > nbd.MAX_STRING_LENGTH:
        raise OptionError(
            nbd.REP_ERR_TOO_BIG,
            f"the {what} has {len(data)} bytes; {nbd.MAX_STRING_LENGTH} are allowed",
        )
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise OptionError(nbd.REP_ERR_INVALID, f"the {what} is not UTF-8") from None
    if "\0" in text:
        raise OptionError(nbd.REP_ERR_INVALID, f"the {what} contains a NUL")
    return text


def check_string(what: str, text: str) -> None:
    """Raise `ValueError` for a text of ours that can't be sent."""
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError(f"the {what} {text!a} is not UTF-8") from None
    if length > nbd.MAX_STRING_LENGTH:
        raise ValueError(f"the {what} is longer than {nbd.MAX_STRING_LENGTH} bytes")
    if "\0" in text:
        raise ValueError(f"the {what} {text!a} contains a NUL")


def quote(name: str) -> str:
    """Return a client's name for a message: short, and safe in a log."""
    if len(name) > 100:
        name = name[:100] + "..."
    return repr(name)

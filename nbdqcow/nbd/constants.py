"""Numbers of the NBD protocol, named as in proto.md without their ``NBD_``.

Plain ints, not enums: the transmission phase compares them for every request.
Sections of proto.md are named above each group.
"""

from typing import Final

DEFAULT_PORT: Final = 10809
"""The TCP port that IANA assigned to NBD."""

# "Newstyle negotiation", "Request message" and the reply messages

INIT_PASSWD: Final = 0x4E42444D41474943
IHAVEOPT_MAGIC: Final = 0x49484156454F5054
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

# "Conventions"

MAX_STRING_LENGTH: Final = 4096
"""Bytes in any string: export names, descriptions, error messages."""

# "Size constraints": what holds where nothing was advertised

DEFAULT_MINIMUM_BLOCK_SIZE: Final = 1
DEFAULT_PREFERRED_BLOCK_SIZE: Final = 4096
DEFAULT_MAXIMUM_PAYLOAD: Final = 32 << 20

# "Handshake flags" (server, 16 bits) and "Client flags" (32 bits)

FLAG_FIXED_NEWSTYLE: Final = 1 << 0
FLAG_NO_ZEROES: Final = 1 << 1

FLAG_C_FIXED_NEWSTYLE: Final = 1 << 0
FLAG_C_NO_ZEROES: Final = 1 << 1

# "Transmission flags"

FLAG_HAS_FLAGS: Final = 1 << 0
FLAG_READ_ONLY: Final = 1 << 1
FLAG_SEND_FLUSH: Final = 1 << 2
FLAG_SEND_FUA: Final = 1 << 3
FLAG_ROTATIONAL: Final = 1 << 4
FLAG_SEND_TRIM: Final = 1 << 5
FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
FLAG_SEND_DF: Final = 1 << 7
FLAG_CAN_MULTI_CONN: Final = 1 << 8
FLAG_SEND_RESIZE: Final = 1 << 9
FLAG_SEND_CACHE: Final = 1 << 10
FLAG_SEND_FAST_ZERO: Final = 1 << 11
FLAG_BLOCK_STATUS_PAYLOAD: Final = 1 << 12

# "Option types"

OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_PEEK_EXPORT: Final = 4
OPT_STARTTLS: Final = 5
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10
OPT_EXTENDED_HEADERS: Final = 11

# "Option reply types"

REP_FLAG_ERROR: Final = 1 << 31

REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4

REP_ERR_UNSUP: Final = REP_FLAG_ERROR + 1
REP_ERR_POLICY: Final = REP_FLAG_ERROR + 2
REP_ERR_INVALID: Final = REP_FLAG_ERROR + 3
REP_ERR_PLATFORM: Final = REP_FLAG_ERROR + 4
REP_ERR_TLS_REQD: Final = REP_FLAG_ERROR + 5
REP_ERR_UNKNOWN: Final = REP_FLAG_ERROR + 6
REP_ERR_SHUTDOWN: Final = REP_FLAG_ERROR + 7
REP_ERR_BLOCK_SIZE_REQD: Final = REP_FLAG_ERROR + 8
REP_ERR_TOO_BIG: Final = REP_FLAG_ERROR + 9
REP_ERR_EXT_HEADER_REQD: Final = REP_FLAG_ERROR + 10

# Information types of REP_INFO

INFO_EXPORT: Final = 0
INFO_NAME: Final = 1
INFO_DESCRIPTION: Final = 2
INFO_BLOCK_SIZE: Final = 3

# "Request types" and "Command flags"

CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_CACHE: Final = 5
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7
CMD_RESIZE: Final = 8

CMD_FLAG_FUA: Final = 1 << 0
CMD_FLAG_NO_HOLE: Final = 1 << 1
CMD_FLAG_DF: Final = 1 << 2
CMD_FLAG_REQ_ONE: Final = 1 << 3
CMD_FLAG_FAST_ZERO: Final = 1 << 4
CMD_FLAG_PAYLOAD_LEN: Final = 1 << 5

# "Structured reply flags" and "Structured reply types"

REPLY_FLAG_DONE: Final = 1 << 0

REPLY_TYPE_FLAG_ERROR: Final = 1 << 15

REPLY_TYPE_NONE: Final = 0
REPLY_TYPE_OFFSET_DATA: Final = 1
REPLY_TYPE_OFFSET_HOLE: Final = 2
REPLY_TYPE_BLOCK_STATUS: Final = 5
REPLY_TYPE_BLOCK_STATUS_EXT: Final = 6
REPLY_TYPE_ERROR: Final = REPLY_TYPE_FLAG_ERROR + 1
REPLY_TYPE_ERROR_OFFSET: Final = REPLY_TYPE_FLAG_ERROR + 2

# "`base:allocation` metadata context"

STATE_HOLE: Final = 1 << 0
STATE_ZERO: Final = 1 << 1

# "Error values"

EPERM: Final = 1
EIO: Final = 5
ENOMEM: Final = 12
EINVAL: Final = 22
ENOSPC: Final = 28
EOVERFLOW: Final = 75
ENOTSUP: Final = 95
ESHUTDOWN: Final = 108

# Names for messages

OPTION_NAMES: Final = {
    OPT_EXPORT_NAME: "EXPORT_NAME",
    OPT_ABORT: "ABORT",
    OPT_LIST: "LIST",
    OPT_PEEK_EXPORT: "PEEK_EXPORT",
    OPT_STARTTLS: "STARTTLS",
    OPT_INFO: "INFO",
    OPT_GO: "GO",
    OPT_STRUCTURED_REPLY: "STRUCTURED_REPLY",
    OPT_LIST_META_CONTEXT: "LIST_META_CONTEXT",
    OPT_SET_META_CONTEXT: "SET_META_CONTEXT",
    OPT_EXTENDED_HEADERS: "EXTENDED_HEADERS",
}

REPLY_NAMES: Final = {
    REP_ACK: "ACK",
    REP_SERVER: "SERVER",
    REP_INFO: "INFO",
    REP_META_CONTEXT: "META_CONTEXT",
    REP_ERR_UNSUP: "ERR_UNSUP",
    REP_ERR_POLICY: "ERR_POLICY",
    REP_ERR_INVALID: "ERR_INVALID",
    REP_ERR_PLATFORM: "ERR_PLATFORM",
    REP_ERR_TLS_REQD: "ERR_TLS_REQD",
    REP_ERR_UNKNOWN: "ERR_UNKNOWN",
    REP_ERR_SHUTDOWN: "ERR_SHUTDOWN",
    REP_ERR_BLOCK_SIZE_REQD: "ERR_BLOCK_SIZE_REQD",
    REP_ERR_TOO_BIG: "ERR_TOO_BIG",
    REP_ERR_EXT_HEADER_REQD: "ERR_EXT_HEADER_REQD",
}

COMMAND_NAMES: Final = {
    CMD_READ: "READ",
    CMD_WRITE: "WRITE",
    CMD_DISC: "DISC",
    CMD_FLUSH: "FLUSH",
    CMD_TRIM: "TRIM",
    CMD_CACHE: "CACHE",
    CMD_WRITE_ZEROES: "WRITE_ZEROES",
    CMD_BLOCK_STATUS: "BLOCK_STATUS",
    CMD_RESIZE: "RESIZE",
}


def option_name(option: int) -> str:
    """Return the name of an option for a message; its number if unknown."""
    return OPTION_NAMES.get(option) or f"option {option}"


def reply_name(reply: int) -> str:
    """Return the name of an option reply type; its number if unknown."""
    return REPLY_NAMES.get(reply) or f"reply {reply:#x}"

"""The client's half of the fixed newstyle handshake, without input or output.

One option at a time: the shell waits for IDLE, asks, and feeds bytes in until
``state`` is no longer WAITING; then ``result`` holds the answer::

    client = ClientHandshake()
    ... receive_data(...)                   until state is IDLE
    client.list_exports()
    ... send data_to_send(), receive_data   until state is IDLE
    client.result.exports

`ClientHandshake.receive_data` raises `ProtocolError` if the server breaks the
protocol or answers with more than ``_MAX_ANSWER`` bytes. An option that the
server refuses is no exception: the answer is in ``result.error``.
"""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from nbdqcow.errors import ProtocolError
from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd
from nbdqcow.types import Buffer

_CONTEXT_OPTIONS: Final = (nbd.OPT_LIST_META_CONTEXT, nbd.OPT_SET_META_CONTEXT)
_MAX_ANSWER: Final = 32 << 20
"""Bytes of all replies to one option, headers included."""
_RECEIVE_LENGTH: Final = 64 << 10
# In the words of QEMU's client, up to the option.
_REFUSALS: Final = {
    nbd.REP_ERR_POLICY: "Denied by server for",
    nbd.REP_ERR_INVALID: "Invalid parameters for",
    nbd.REP_ERR_PLATFORM: "Server lacks support for",
    nbd.REP_ERR_TLS_REQD: "TLS negotiation required before",
    nbd.REP_ERR_SHUTDOWN: "Server shutting down before",
    nbd.REP_ERR_BLOCK_SIZE_REQD: "Server requires INFO_BLOCK_SIZE for",
}


class ClientState(enum.Enum):
    """Where the connection is."""

    GREETING = enum.auto()
    IDLE = enum.auto()
    WAITING = enum.auto()
    TRANSMISSION = enum.auto()


@dataclass(slots=True)
class RemoteExport:
    """What a server says of an export; None where it said nothing.

    Attributes:
        size: bytes.
        flags: transmission flags.
        name: the server's canonical name.
        description: text for people.
        block_sizes: minimum and preferred block size and maximum payload.
    """

    size: int = 0
    flags: int = 0
    name: str | None = None
    description: str | None = None
    block_sizes: tuple[int, int, int] | None = None


@dataclass(slots=True)
class OptionResult:
    """A server's complete answer to one option.

    Attributes:
        option: what it answers.
        error: ``REP_ERR_*``, or 0 for an ACK.
        text: what the server said to its error; may be empty.
        exports: name and description of each export (LIST).
        export: the export asked for (INFO, GO, EXPORT_NAME).
        contexts: names of metadata contexts (LIST_META_CONTEXT).
        context_ids: the name of each context chosen, by its number
            (SET_META_CONTEXT).
    """

    option: int
    error: int = 0
    text: str = ""
    exports: list[tuple[str, str]] = field(default_factory=list)
    export: RemoteExport | None = None
    contexts: list[str] = field(default_factory=list)
    context_ids: dict[int, str] = field(default_factory=dict)

    @property
    def refusal(self) -> str:
        """What ``error`` and ``text`` mean, as QEMU's client says it: in lines."""
        name = nbd.option_name(self.option)
        if self.error == nbd.REP_ERR_UNKNOWN:
            lines = ["Requested export not available"]
        elif self.error == nbd.REP_ERR_UNSUP:
            return f"Server don't support {name} option"
        else:
            what = _REFUSALS.get(
                self.error, f"Server says {nbd.reply_name(self.error)} to"
            )
            name = name.lower().replace("_", " ")
            lines = [f"{what} option {self.option} ({name})"]
        if self.error == nbd.REP_ERR_TLS_REQD:
            lines.append("Did you forget a valid tls-creds?")
        if self.text:
            lines.append(f"server reported: {self.text}")
        return "\n".join(lines)


class ClientHandshake:
    """The handshake of one connection, seen from the client.

    Attributes:
        state: see `ClientState`.
        server_flags: the handshake flags of the greeting.
        result: the answer to the last option, once it is complete.
        trailing: bytes that came after the handshake's last reply.
    """

    def __init__(self, *, fixed_newstyle: bool = True, no_zeroes: bool = True) -> None:
        self.state = ClientState.GREETING
        self.server_flags = 0
        self.result: OptionResult | None = None
        self.trailing = b""
        self._offered_flags = (nbd.FLAG_C_FIXED_NEWSTYLE if fixed_newstyle else 0) | (
            nbd.FLAG_C_NO_ZEROES if no_zeroes else 0
        )
        self._flags = 0
        self._in = bytearray()
        self._out = b""
        self._answer = OptionResult(0)
        self._answer_length = 0

    def data_to_send(self) -> bytes:
        """Return the bytes queued for the server, and forget them."""
        data, self._out = self._out, b""
        return data

    def receive_data(self, data: Buffer) -> None:
        """Take bytes from the server. Look at ``state`` afterwards."""
        self._in += data
        while self._step():
            pass
        if self.state is ClientState.TRANSMISSION:
            self.trailing += bytes(self._in)
            self._in.clear()

    def exchange(
        self, send: Callable[[bytes], object], receive: Callable[[int], bytes]
    ) -> None:
        """Talk to the server until it has answered: for callers that may wait.

        ``send`` sends all that it is given; ``receive`` returns at most as many
        bytes as it is told, none at the end. Raises `ProtocolError`, and what
        these raise.
        """
        send(self.data_to_send())
        while self.state in (ClientState.GREETING, ClientState.WAITING):
            data = receive(_RECEIVE_LENGTH)
            if not data:
                raise ProtocolError("the server closed the connection")
            self.receive_data(data)
        send(self.data_to_send())

    # -- options -----------------------------------------------------------

    def list_exports(self) -> None:
        """Ask for the names of all exports: ``result.exports``."""
        self._ask(nbd.OPT_LIST)

    def info(self, name: str, infos: tuple[int, ...] = ()) -> None:
        """Ask about an export, for ``infos`` too: ``result.export``."""
        self._ask(nbd.OPT_INFO, codec.info_request(name, infos))

    def go(self, name: str, infos: tuple[int, ...] = ()) -> None:
        """As `info`; with success the transmission phase begins."""
        self._ask(nbd.OPT_GO, codec.info_request(name, infos))

    def export_name(self, name: str) -> None:
        """Begin the transmission phase; a server refuses by disconnecting."""
        self._ask(nbd.OPT_EXPORT_NAME, name.encode())

    def starttls(self) -> None:
        """Ask for TLS. Unless the answer is an error, the shell must upgrade
        the connection before it asks anything else."""
        self._ask(nbd.OPT_STARTTLS)

    def structured_reply(self) -> None:
        """Ask for structured replies."""
        self._ask(nbd.OPT_STRUCTURED_REPLY)

    def extended_headers(self) -> None:
        """Ask for extended headers, which bring structured replies along."""
        self._ask(nbd.OPT_EXTENDED_HEADERS)

    def set_meta_contexts(self, name: str, queries: Sequence[str]) -> None:
        """Choose metadata contexts of an export: ``result.context_ids``."""
        self._ask(nbd.OPT_SET_META_CONTEXT, codec.meta_context_request(name, queries))

    def list_meta_contexts(self, name: str) -> None:
        """Ask for an export's metadata contexts: ``result.contexts``."""
        self._ask(nbd.OPT_LIST_META_CONTEXT, codec.meta_context_request(name))

    def abort(self) -> None:
        """Say goodbye. The shell may close without waiting for the ACK."""
        self._ask(nbd.OPT_ABORT)

    def _ask(self, option: int, data: bytes = b"") -> None:
        assert self.state is ClientState.IDLE
        self._out += codec.option_request(option, data)
        self._answer = OptionResult(option)
        self._answer_length = 0
        self.result = None
        self.state = ClientState.WAITING

    # -- replies -----------------------------------------------------------

    def _step(self) -> bool:
        """Take one message from the input; False if it is not complete."""
        if self.state is ClientState.GREETING:
            return self._take_greeting()
        if self.state is ClientState.WAITING:
            if self._answer.option == nbd.OPT_EXPORT_NAME:
                return self._take_export()
            return self._take_reply()
        if self.state is ClientState.IDLE and self._in:
            raise ProtocolError("the server speaks without being asked")
        return False

    def _take(self, length: int) -> bytes:
        data = bytes(self._in[:length])
        del self._in[:length]
        return data

    def _take_greeting(self) -> bool:
        if len(self._in) < codec.GREETING.size:
            return False
        passwd, magic, flags = codec.GREETING.unpack(self._take(codec.GREETING.size))
        if passwd != nbd.INIT_PASSWD:
            raise ProtocolError("this is not an NBD server")
        if magic != nbd.IHAVEOPT_MAGIC:
            raise ProtocolError("the server does not speak newstyle NBD")
        self.server_flags = flags
        # FLAG_C_* have the values of the server's flags that allow them.
        self._flags = flags & self._offered_flags
        self._out += codec.CLIENT_FLAGS.pack(self._flags)
        self.state = ClientState.IDLE
        return True

    def _take_export(self) -> bool:
        padding = 0 if self._flags & nbd.FLAG_C_NO_ZEROES else len(codec.EXPORT_PADDING)
        if len(self._in) < codec.EXPORT.size + padding:
            return False
        size, flags = codec.EXPORT.unpack(self._take(codec.EXPORT.size))
        self._take(padding)
        self._answer.export = RemoteExport(size, flags)
        self._finish(ClientState.TRANSMISSION)
        return True

    def _take_reply(self) -> bool:
        if len(self._in) < codec.OPTION_REPLY.size:
            return False
        magic, option, reply, length = codec.OPTION_REPLY.unpack_from(self._in)
        answer = self._answer
        if magic != nbd.OPTION_REPLY_MAGIC:
            raise ProtocolError(f"bad option reply magic {magic:#018x}")
        if option != answer.option:
            raise ProtocolError(
                f"a reply to {nbd.option_name(option)} where "
                f"{nbd.option_name(answer.option)} was asked"
            )
        message_length = codec.OPTION_REPLY.size + length
        if self._answer_length + message_length > _MAX_ANSWER:
            raise ProtocolError(f"too long an answer to {nbd.option_name(option)}")
        if len(self._in) < message_length:
            return False
        self._answer_length += message_length
        data = self._take(message_length)[codec.OPTION_REPLY.size :]
        if reply & nbd.REP_FLAG_ERROR:
            answer.error = reply
            answer.text = _text(data, "error message")
            self._finish(ClientState.IDLE)
        elif reply == nbd.REP_ACK:
            self._acknowledge(data)
        elif reply == nbd.REP_SERVER and option == nbd.OPT_LIST:
            answer.exports.append(_parse_server(data))
        elif reply == nbd.REP_INFO and option in (nbd.OPT_INFO, nbd.OPT_GO):
            answer.export = answer.export or RemoteExport()
            _parse_info(data, answer.export)
        elif reply == nbd.REP_META_CONTEXT and option in _CONTEXT_OPTIONS:
            if len(data) < 4:
                raise ProtocolError("a REP_META_CONTEXT without a context")
            name = _text(data[4:], "metadata context")
            answer.contexts.append(name)
            answer.context_ids[codec.U32.unpack_from(data)[0]] = name
        else:
            raise ProtocolError(
                f"{nbd.reply_name(reply)} is no reply to {nbd.option_name(option)}"
            )
        return True

    def _acknowledge(self, data: bytes) -> None:
        answer = self._answer
        if data:
            raise ProtocolError("an ACK with data")
        if answer.option in (nbd.OPT_INFO, nbd.OPT_GO) and (
            answer.export is None or not answer.export.flags
        ):
            raise ProtocolError("an ACK without INFO_EXPORT")
        begun = answer.option == nbd.OPT_GO
        self._finish(ClientState.TRANSMISSION if begun else ClientState.IDLE)

    def _finish(self, state: ClientState) -> None:
        self.result = self._answer
        self.state = state


def _text(data: bytes, what: str) -> str:
    if len(data) > nbd.MAX_STRING_LENGTH:
        raise ProtocolError(f"an {what} of {len(data)} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ProtocolError(f"the {what} is not UTF-8") from None


def _parse_server(data: bytes) -> tuple[str, str]:
    """Return name and description of a REP_SERVER."""
    if len(data) < 4:
        raise ProtocolError("a REP_SERVER without a name")
    (name_length,) = codec.U32.unpack_from(data)
    if name_length > len(data) - 4:
        raise ProtocolError("a REP_SERVER whose name is longer than the reply")
    name = _text(data[4 : 4 + name_length], "export name")
    return name, _text(data[4 + name_length :], "export description")


def _parse_info(data: bytes, export: RemoteExport) -> None:
    """Add one REP_INFO to ``export``; unknown information is ignored."""
    if len(data) < 2:
        raise ProtocolError("a REP_INFO without a type")
    (info,) = codec.U16.unpack_from(data)
    if info == nbd.INFO_EXPORT:
        if len(data) != codec.INFO_EXPORT.size:
            raise ProtocolError(f"an INFO_EXPORT of {len(data)} bytes")
        _, export.size, export.flags = codec.INFO_EXPORT.unpack(data)
        if not export.flags & nbd.FLAG_HAS_FLAGS:
            raise ProtocolError("an INFO_EXPORT without HAS_FLAGS")
    elif info == nbd.INFO_NAME:
        export.name = _text(data[2:], "export name")
    elif info == nbd.INFO_DESCRIPTION:
        export.description = _text(data[2:], "export description")
    elif info == nbd.INFO_BLOCK_SIZE:
        if len(data) != codec.INFO_BLOCK_SIZE.size:
            raise ProtocolError(f"an INFO_BLOCK_SIZE of {len(data)} bytes")
        _, minimum, preferred, maximum = codec.INFO_BLOCK_SIZE.unpack(data)
        export.block_sizes = minimum, preferred, maximum

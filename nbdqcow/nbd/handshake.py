"""The server's half of the fixed newstyle handshake, without input or output.

The shell that owns the connection feeds bytes in and sends bytes out::

    handshake = ServerHandshake(exports)
    transport.write(handshake.data_to_send())         # the greeting
    while handshake.state is HandshakeState.HANDSHAKING:
        handshake.receive_data(...)                    # whatever arrived
        transport.write(handshake.data_to_send())

It ends in TRANSMISSION, with ``export`` chosen and the first bytes of that
phase in ``trailing``, or in CLOSED, with the reason in ``error``. In STARTTLS
the shell sends what is queued, upgrades the connection, calls
`ServerHandshake.tls_started`, and goes on with the decrypted bytes. Bad input
never raises: an option that is wrong gets an error reply and the haggling goes
on; a client that broke the protocol is sent what is due to it and CLOSED. The
shell sends what is queued, then closes.

An option is a row of `_HANDLERS`. A handler gets the option's complete data,
queues its replies, and raises `OptionError` to refuse it or `ProtocolError` to
end the connection.

What a client can make this hold: one option's data (``max_option_length``),
one chunk of input, and ``_MAX_QUEUED`` plus one option's replies of output.
"""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from nbdqcow.errors import OptionError, ProtocolError
from nbdqcow.nbd import codec
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.option_data import (
    check_string,
    decode_string,
    lists_context,
    parse_info_request,
    parse_meta_queries,
    quote,
)
from nbdqcow.nbd.replies import ReplyStyle
from nbdqcow.types import Buffer

_MAX_QUEUED: Final = 1 << 20
"""Bytes of replies that may wait while the client already sends more."""
_MAX_SKIPPED: Final = 32 << 20
"""Bytes of data that a refused option may have; beyond, the client is closed."""
_PLAIN_AFTER_STARTTLS: Final = "unencrypted bytes after STARTTLS"
_MAY_ASK_FOR_TLS: Final = frozenset((nbd.OPT_EXPORT_NAME, nbd.OPT_INFO, nbd.OPT_GO))
"""The options that may be answered with ERR_TLS_REQD where TLS is optional."""
_KNOWN_CLIENT_FLAGS: Final = nbd.FLAG_C_FIXED_NEWSTYLE | nbd.FLAG_C_NO_ZEROES


class HandshakeState(enum.Enum):
    """Where a connection is."""

    HANDSHAKING = enum.auto()
    STARTTLS = enum.auto()
    TRANSMISSION = enum.auto()
    CLOSED = enum.auto()


class TlsMode(enum.Enum):
    """How a server uses TLS: the modes of proto.md "TLS support".

    OFF is NOTLS. ON is SELECTIVETLS: the client may begin TLS, and must for
    the exports that are ``tls_only``. REQUIRED is FORCEDTLS.
    """

    OFF = enum.auto()
    ON = enum.auto()
    REQUIRED = enum.auto()


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a client learns of an export.

    Attributes:
        name: what clients ask for, and what LIST shows.
        size: bytes.
        flags: transmission flags (``FLAG_*``); HAS_FLAGS is added.
        description: text for people; may be empty.
        minimum_block_size, preferred_block_size, maximum_payload: bytes
            (proto.md "Size constraints").
        canonical_name: the answer to INFO_NAME if that is not ``name``.
        meta_contexts: names of the metadata contexts that a client may select.
        tls_only: whether it can't be seen or chosen without TLS.

    Raises `ValueError` for a text that can't be sent (proto.md "Conventions").
    """

    name: str
    size: int
    flags: int
    description: str = ""
    minimum_block_size: int = nbd.DEFAULT_MINIMUM_BLOCK_SIZE
    preferred_block_size: int = nbd.DEFAULT_PREFERRED_BLOCK_SIZE
    maximum_payload: int = nbd.DEFAULT_MAXIMUM_PAYLOAD
    canonical_name: str | None = None
    meta_contexts: Sequence[str] = ()
    tls_only: bool = False

    def __post_init__(self) -> None:
        check_string("export name", self.name)
        check_string("export name", self.canonical_name or "")
        check_string("export description", self.description)
        for context in self.meta_contexts:
            check_string("metadata context", context)


@dataclass(frozen=True, slots=True)
class Terms:
    """What client and server have agreed on beside the export.

    Attributes:
        style: the layout of requests and replies.
        meta_contexts: names of the selected metadata contexts; the ID of each
            is its index.
        contexts_export: the name of the export that they are of.
    """

    style: ReplyStyle = ReplyStyle.SIMPLE
    meta_contexts: Sequence[str] = ()
    contexts_export: str | None = None


class ExportSource(Protocol):
    """Where the handshake finds exports."""

    def list_exports(self) -> Sequence[ExportInfo]:
        """Return the exports that LIST shows."""

    def find_export(self, name: str) -> ExportInfo | None:
        """Return the export of that name ("" is the default one), or None."""


class ServerHandshake:
    """The handshake of one connection.

    Attributes:
        state: see `HandshakeState`.
        export: the export chosen, once in TRANSMISSION.
        terms: what else holds in TRANSMISSION.
        trailing: bytes that came after the handshake's last option.
        error: why the connection is CLOSED; None after an ABORT.
        refused: what the client was told when an option was refused last.
        encrypted: whether TLS has begun.
        shutting_down: set by the shell: every option but ABORT is refused.
        refusal: set by the shell: the same, for a reason of its own.
    """

    def __init__(
        self,
        exports: ExportSource,
        *,
        tls: TlsMode = TlsMode.OFF,
        may_use: Callable[[ExportInfo], bool] = lambda export: True,
        max_options: int = 4096,
        max_option_length: int = 64 << 10,
        admit: Callable[[ExportInfo], None] | None = None,
        structured_replies: bool = True,
    ) -> None:
        """``may_use`` says whether this client may use an export; it is asked
        anew each time, so the answer may change when TLS has begun. ``admit``
        may raise `OptionError` to keep the client from one that it chooses.
        Without ``structured_replies`` clients get simple ones, and none of
        what builds on the others."""
        self.state = HandshakeState.HANDSHAKING
        self.export: ExportInfo | None = None
        self.terms = Terms()
        self.trailing = b""
        self.error: str | None = None
        self.refused: str | None = None
        self.shutting_down = False
        self.encrypted = False
        self.refusal: OptionError | None = None
        self._admit = admit
        self._structured_replies = structured_replies
        self._exports = exports
        self._tls = tls
        self._may_use = may_use
        self._options_left = max_options
        self._max_option_length = max_option_length
        self._greeted = False
        self._fixed = False
        self._no_zeroes = False
        self._in = bytearray()
        self._out: list[bytes] = []
        self._queued_length = 0
        # A refused option whose data is still arriving: the reply that is due
        # after it, and how many bytes are still to come.
        self._skipping: OptionError | None = None
        self._skipping_option = 0
        self._skip_length = 0
        self._queue(codec.greeting(nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES))

    def data_to_send(self) -> bytes:
        """Return the bytes queued for the client, and forget them."""
        data = b"".join(self._out)
        self._out.clear()
        self._queued_length = 0
        return data

    def receive_data(self, data: Buffer) -> None:
        """Take bytes from the client. Look at ``state`` afterwards."""
        if self.state is HandshakeState.CLOSED:
            return
        self._in += data
        try:
            if self.state is HandshakeState.STARTTLS:
                raise ProtocolError(_PLAIN_AFTER_STARTTLS)
            while self.state is HandshakeState.HANDSHAKING and self._step():
                pass
        except ProtocolError as exc:
            self.state = HandshakeState.CLOSED
            self.error = str(exc)
        if self.state is HandshakeState.TRANSMISSION:
            self.trailing += bytes(self._in)
        if self.state is not HandshakeState.HANDSHAKING:
            self._in.clear()

    def tls_started(self) -> None:
        """Go on in a connection that is encrypted now. Nothing of what was
        negotiated before remains (proto.md "Option types", STARTTLS)."""
        assert self.state is HandshakeState.STARTTLS
        self.encrypted = True
        self.terms = Terms()
        self.state = HandshakeState.HANDSHAKING

    def _step(self) -> bool:
        """Take one message from the input; False if it is not complete."""
        if not self._greeted:
            return self._take_client_flags()
        if self._skipping is not None:
            return self._skip(self._skipping)
        return self._take_option()

    def _take_client_flags(self) -> bool:
        if len(self._in) < codec.CLIENT_FLAGS.size:
            return False
        (flags,) = codec.CLIENT_FLAGS.unpack_from(self._in)
        del self._in[: codec.CLIENT_FLAGS.size]
        if flags & ~_KNOWN_CLIENT_FLAGS:
            raise ProtocolError(f"unknown client flags {flags:#x}")
        self._greeted = True
        self._fixed = bool(flags & nbd.FLAG_C_FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & nbd.FLAG_C_NO_ZEROES)
        return True

    def _skip(self, refusal: OptionError) -> bool:
        length = min(self._skip_length, len(self._in))
        del self._in[:length]
        self._skip_length -= length
        if self._skip_length:
            return False
        self._skipping = None
        self._refuse(self._skipping_option, refusal)
        return True

    def _take_option(self) -> bool:
        if len(self._in) < codec.OPTION.size:
            return False
        magic, option, length = codec.OPTION.unpack_from(self._in)
        if magic != nbd.IHAVEOPT_MAGIC:
            raise ProtocolError(f"bad option magic {magic:#018x}")
        if self._queued_length > _MAX_QUEUED:
            # "The client MUST NOT send any option until it has received a
            # final reply": only one that ignores its replies gets here.
            raise ProtocolError("the client sends options but reads no replies")
        if option == nbd.OPT_ABORT and self._fixed:
            # "A server SHOULD ignore any data", so there is no need for it.
            self._reply(option, nbd.REP_ACK)
            self.state = HandshakeState.CLOSED
            return False
        refusal = self._check(option, length)
        end = codec.OPTION.size + length
        if refusal is None and len(self._in) < end:
            return False
        if not self._options_left:
            raise ProtocolError("too many options")
        self._options_left -= 1
        if refusal is not None:
            del self._in[: codec.OPTION.size]
            self._skipping = refusal
            self._skipping_option = option
            self._skip_length = length
            return True
        data = bytes(self._in[codec.OPTION.size : end])
        del self._in[:end]
        try:
            _HANDLERS[option](self, option, data)
        except OptionError as exc:
            self._refuse(option, exc)
        return True

    def _check(self, option: int, length: int) -> OptionError | None:
        """Judge an option by its header: None if its data is to be read.

        Raises `ProtocolError` where the connection can't go on.
        """
        name = nbd.option_name(option)
        if option == nbd.OPT_EXPORT_NAME:
            if length > nbd.MAX_STRING_LENGTH:
                raise ProtocolError(f"an export name of {length} bytes")
            if self._tls is TlsMode.REQUIRED and not self.encrypted:
                raise ProtocolError("EXPORT_NAME without TLS, which is required")
            return None
        if not self._fixed:
            raise ProtocolError(f"{name} from a client without fixed newstyle")
        if length > _MAX_SKIPPED:
            text = f"{length} bytes of data for {name} are too many"
            self._refuse(option, OptionError(nbd.REP_ERR_TOO_BIG, text))
            raise ProtocolError(text)
        if self.shutting_down:
            return OptionError(nbd.REP_ERR_SHUTDOWN, "the server is shutting down")
        if self.refusal is not None:
            return self.refusal
        if (
            self._tls is TlsMode.REQUIRED
            and not self.encrypted
            and option != nbd.OPT_STARTTLS
        ):
            return OptionError(
                nbd.REP_ERR_TLS_REQD, f"Option {option:#x} not permitted before TLS"
            )
        if option not in _HANDLERS:
            return OptionError(nbd.REP_ERR_UNSUP, f"{name} is not supported")
        if length > self._max_option_length:
            return OptionError(
                nbd.REP_ERR_TOO_BIG, f"{length} bytes of data for {name} are too many"
            )
        return None

    # -- replies -----------------------------------------------------------

    def _queue(self, data: bytes) -> None:
        self._out.append(data)
        self._queued_length += len(data)

    def _reply(self, option: int, reply: int, data: bytes = b"") -> None:
        self._queue(codec.option_reply(option, reply, data))

    def _refuse(self, option: int, refusal: OptionError) -> None:
        self.refused = refusal.text
        self._reply(option, refusal.reply, refusal.text.encode())

    # -- options -----------------------------------------------------------

    def _export_name(self, option: int, data: bytes) -> None:
        try:
            export = self._find_export(option, data)
            self._check_admission(export)
        except OptionError as exc:
            # No error reply exists: "it MUST terminate the session".
            raise ProtocolError(exc.text) from None
        if self.shutting_down:
            raise ProtocolError("the server is shutting down")
        if self.terms.style is ReplyStyle.EXTENDED:
            raise ProtocolError("EXPORT_NAME after EXTENDED_HEADERS")
        flags = self._transmission_flags(option, export)
        self._queue(codec.EXPORT.pack(export.size, flags))
        if not self._no_zeroes:
            self._queue(codec.EXPORT_PADDING)
        self._enter_transmission(export)

    def _list(self, option: int, data: bytes) -> None:
        if data:
            raise OptionError(nbd.REP_ERR_INVALID, "LIST takes no data")
        for export in self._exports.list_exports():
            if self._must_start_tls(export) or not self._may_use(export):
                continue
            self._reply(
                option,
                nbd.REP_SERVER,
                codec.server_description(export.name, export.description),
            )
        self._reply(option, nbd.REP_ACK)

    def _starttls(self, option: int, data: bytes) -> None:
        if data:
            raise OptionError(nbd.REP_ERR_INVALID, "STARTTLS takes no data")
        if self.encrypted:
            raise OptionError(nbd.REP_ERR_INVALID, "TLS has begun already")
        if self._tls is TlsMode.OFF:
            raise OptionError(nbd.REP_ERR_POLICY, "TLS not configured")
        if self._in:
            # Somebody between us and the client may have put it there, to have
            # it taken for the client's own once the connection is secure.
            raise ProtocolError(_PLAIN_AFTER_STARTTLS)
        self._reply(option, nbd.REP_ACK)
        self.state = HandshakeState.STARTTLS

    def _info(self, option: int, data: bytes) -> None:
        name, infos = parse_info_request(data)
        export = self._find_export(option, name)
        if option == nbd.OPT_GO:
            self._check_admission(export)
        self._reply(
            option,
            nbd.REP_INFO,
            codec.info_export(export.size, self._transmission_flags(option, export)),
        )
        told = export
        if nbd.INFO_BLOCK_SIZE not in infos and option == nbd.OPT_GO:
            # Who does not ask will not keep to blocks, and is served all the same.
            told = replace(export, minimum_block_size=1)
        if told.minimum_block_size == 1:
            infos.add(nbd.INFO_BLOCK_SIZE)
        for info in sorted(infos & _INFO_BUILDERS.keys()):
            built = _INFO_BUILDERS[info](told)
            if built is not None:
                self._reply(option, nbd.REP_INFO, built)
        self._reply(option, nbd.REP_ACK)
        if option == nbd.OPT_GO:
            self._enter_transmission(export)

    def _find_export(self, option: int, name: bytes) -> ExportInfo:
        """Return the export that ``option`` names. Raises `OptionError`."""
        decoded = decode_string("export name", name)
        export = self._exports.find_export(decoded)
        if export is not None and self._must_start_tls(export):
            if option in _MAY_ASK_FOR_TLS:
                raise OptionError(
                    nbd.REP_ERR_TLS_REQD, f"the export {quote(decoded)} requires TLS"
                )
            export = None
        if export is None:
            raise OptionError(nbd.REP_ERR_UNKNOWN, f"no export {quote(decoded)}")
        if not self._may_use(export):
            raise OptionError(
                nbd.REP_ERR_POLICY,
                f"this client is not allowed to use the export {quote(decoded)}",
            )
        return export

    def _check_style_offered(self, option: int) -> None:
        if not self._structured_replies:
            raise OptionError(
                nbd.REP_ERR_UNSUP, f"{nbd.option_name(option)} is switched off here"
            )

    def _structured_reply(self, option: int, data: bytes) -> None:
        self._check_style_offered(option)
        if data:
            raise OptionError(nbd.REP_ERR_INVALID, "STRUCTURED_REPLY takes no data")
        if self.terms.style is ReplyStyle.EXTENDED:
            raise OptionError(
                nbd.REP_ERR_EXT_HEADER_REQD, "extended headers are in use already"
            )
        if self.terms.style is ReplyStyle.STRUCTURED:
            raise OptionError(
                nbd.REP_ERR_INVALID, "structured replies are in use already"
            )
        self.terms = replace(self.terms, style=ReplyStyle.STRUCTURED)
        self._reply(option, nbd.REP_ACK)

    def _extended_headers(self, option: int, data: bytes) -> None:
        self._check_style_offered(option)
        if data:
            raise OptionError(nbd.REP_ERR_INVALID, "EXTENDED_HEADERS takes no data")
        if self.terms.style is ReplyStyle.EXTENDED:
            raise OptionError(
                nbd.REP_ERR_INVALID, "extended headers are in use already"
            )
        self.terms = replace(self.terms, style=ReplyStyle.EXTENDED)
        self._reply(option, nbd.REP_ACK)

    def _list_meta_context(self, option: int, data: bytes) -> None:
        export, queries = self._parse_meta_request(option, data)
        for name in export.meta_contexts:
            if not queries or any(lists_context(query, name) for query in queries):
                self._reply(option, nbd.REP_META_CONTEXT, codec.meta_context(0, name))
        self._reply(option, nbd.REP_ACK)

    def _set_meta_context(self, option: int, data: bytes) -> None:
        # Also where it fails: "replaces all previously-set metadata contexts
        # (including when this command fails)".
        self.terms = Terms(self.terms.style)
        export, queries = self._parse_meta_request(option, data)
        selected = [name for name in export.meta_contexts if name in queries]
        for context_id, name in enumerate(selected):
            self._reply(
                option, nbd.REP_META_CONTEXT, codec.meta_context(context_id, name)
            )
        self._reply(option, nbd.REP_ACK)
        self.terms = Terms(self.terms.style, tuple(selected), export.name)

    def _parse_meta_request(
        self, option: int, data: bytes
    ) -> tuple[ExportInfo, set[str]]:
        """Return the export and the queries of a *_META_CONTEXT option."""
        if self.terms.style is ReplyStyle.SIMPLE:
            raise OptionError(
                nbd.REP_ERR_INVALID,
                f"{nbd.option_name(option)} without structured replies",
            )
        name, queries = parse_meta_queries(data)
        return self._find_export(option, name), queries

    def _transmission_flags(self, option: int, export: ExportInfo) -> int:
        flags = export.flags | nbd.FLAG_HAS_FLAGS
        if self.terms.style is not ReplyStyle.SIMPLE:
            flags |= nbd.FLAG_SEND_DF
        if self.terms.style is ReplyStyle.EXTENDED and (
            # A client that only asks may select contexts later.
            option == nbd.OPT_INFO
            or (self.terms.meta_contexts and self.terms.contexts_export == export.name)
        ):
            flags |= nbd.FLAG_BLOCK_STATUS_PAYLOAD
        return flags

    def _must_start_tls(self, export: ExportInfo) -> bool:
        return export.tls_only and not self.encrypted

    def _check_admission(self, export: ExportInfo) -> None:
        if self.refusal is not None:
            raise self.refusal
        if self._admit is not None:
            self._admit(export)

    def _enter_transmission(self, export: ExportInfo) -> None:
        if self.terms.contexts_export != export.name:
            # They were selected for another export.
            self.terms = Terms(self.terms.style)
        self.export = export
        self.state = HandshakeState.TRANSMISSION


_HANDLERS: Final[dict[int, Callable[[ServerHandshake, int, bytes], None]]] = {
    nbd.OPT_EXPORT_NAME: ServerHandshake._export_name,
    nbd.OPT_LIST: ServerHandshake._list,
    nbd.OPT_STARTTLS: ServerHandshake._starttls,
    nbd.OPT_INFO: ServerHandshake._info,
    nbd.OPT_GO: ServerHandshake._info,
    nbd.OPT_STRUCTURED_REPLY: ServerHandshake._structured_reply,
    nbd.OPT_LIST_META_CONTEXT: ServerHandshake._list_meta_context,
    nbd.OPT_SET_META_CONTEXT: ServerHandshake._set_meta_context,
    nbd.OPT_EXTENDED_HEADERS: ServerHandshake._extended_headers,
}


def _description_info(export: ExportInfo) -> bytes | None:
    if not export.description:
        return None
    return codec.info_text(nbd.INFO_DESCRIPTION, export.description)


def _name_info(export: ExportInfo) -> bytes:
    name = export.name if export.canonical_name is None else export.canonical_name
    return codec.info_text(nbd.INFO_NAME, name)


def _block_size_info(export: ExportInfo) -> bytes:
    return codec.info_block_size(
        export.minimum_block_size, export.preferred_block_size, export.maximum_payload
    )


_INFO_BUILDERS: Final[dict[int, Callable[[ExportInfo], bytes | None]]] = {
    nbd.INFO_NAME: _name_info,
    nbd.INFO_DESCRIPTION: _description_info,
    nbd.INFO_BLOCK_SIZE: _block_size_info,
}
"""What INFO and GO can be asked for; INFO_EXPORT is always sent."""

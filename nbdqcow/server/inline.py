"""The transmission phase of one connection, and its inline path.

This is the hot path of the server. Everything that arrived with one read of
the socket is served in one loop: plain reads and writes that need no waiting
right here, without an object for the request; the rest goes to the
`Dispatcher`. All replies of one callback leave in one write. What the loop
does for each request is measured: see ``bench/micro``.
"""

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Final

from nbdqcow.buffers import is_zeroes
from nbdqcow.errors import ProtocolError
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.handshake import Terms
from nbdqcow.nbd.replies import (
    EXTENDED_DATA,
    EXTENDED_DATA_WORD,
    REPLY_OK,
    STRUCTURED_DATA,
    STRUCTURED_DATA_WORD,
    Replies,
    ReplyStyle,
)
from nbdqcow.nbd.requests import STAGED_PAYLOAD, Request, RequestReader, expand_status
from nbdqcow.server.dispatch import (
    Dispatcher,
    Shared,
    error_text,
    request_error,
)
from nbdqcow.server.export import Export
from nbdqcow.server.large_writes import LargeWrites
from nbdqcow.server.options import ServerOptions
from nbdqcow.server.sendfile import BrokenReplyError, FileSender
from nbdqcow.server.sockets import peer_name
from nbdqcow.server.tls import TlsTransport
from nbdqcow.server.watch import Watch
from nbdqcow.types import Buffer, Buffers
from nbdqcow.units import KiB, MiB

logger = logging.getLogger(__name__)

_VIEW_READ: Final = 64 * KiB
"""Bytes from which a read is sent out of the page cache itself: below, a copy
is cheaper than looking whether all pages are there."""

_MAX_SENDFILE: Final = 256 * KiB
"""Bytes of a read up to which a system call for it alone pays."""

_ALLOWANCE: Final = 2 * MiB
_REQUEST_COST: Final = 4 * KiB
"""One callback serves requests until their data, and this much for each of
them, make up the allowance: about a millisecond, then others have a turn."""
_ENCRYPTED_ALLOWANCE: Final = 256 * KiB
"""The same where data must be encrypted: replies leave before there are so many
that they no longer fit a processor's cache, and while the client has others."""
_STAGED_READ: Final = 16 * KiB
"""Bytes of a read from which its reply is encrypted by itself; shorter ones are
joined to one piece."""
_COPY_PIECE: Final = 64 * KiB
"""Bytes of a large read that are copied at a time, to be encrypted."""


def _is_plain_unix(transport: asyncio.BaseTransport) -> bool:
    """Whether bytes go to a unix socket as they are, without TLS."""
    sock = transport.get_extra_info("socket")
    return (
        sock is not None
        # Not ``family``: see `nbdqcow.server.sockets.as_stream`.
        and sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN) == socket.AF_UNIX
        and not isinstance(transport, TlsTransport)
    )


class Transmission(asyncio.BufferedProtocol):
    """Serves requests from a transport until either side ends it.

    The transport's write limits are 0, so writing is paused as long as any
    reply has not left, and nothing is parsed meanwhile: a client that does
    not read its replies makes us hold those of one callback and of the tasks
    in flight. Reading is paused once the receive buffer is full.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        reader: RequestReader,
        export: Export,
        terms: Terms,
        shared: Shared,
        options: ServerOptions,
        on_closed: Callable[[], None],
    ) -> None:
        """Bytes that came with the handshake are in ``reader`` already.

        ``on_closed`` is called once the connection is lost and none of its
        requests is in flight any more.
        """
        self._transport = transport
        self._encrypted = isinstance(transport, TlsTransport)
        self._simple_read = _VIEW_READ
        self._allowance = _ALLOWANCE
        if self._encrypted:
            self._simple_read = _STAGED_READ
            self._allowance = _ENCRYPTED_ALLOWANCE
        self._reader = reader
        self._export = export
        self._node = export.node
        self._terms = terms
        self._replies = Replies(terms.style)
        self._shared = shared
        self._served = shared.poller.served
        self._on_closed = on_closed
        self._close_timeout = options.close_timeout
        self._loop = asyncio.get_running_loop()
        self._dispatcher = Dispatcher(
            export.node,
            self._replies,
            terms.meta_contexts,
            self._reply,
            shared,
            export.failures,
            max_requests=options.max_requests,
            max_bytes=options.max_bytes,
        )
        node = export.node
        self._defers_reads = node.defers_reads
        self._try_pread = node.try_pread_later if self._defers_reads else node.try_pread
        self._large_writes = LargeWrites(reader, export, terms)
        self._inline_write = -1 if export.read_only else STAGED_PAYLOAD
        self._out: list[Buffer] = []
        # Views that may not have left yet: their tokens.
        self._tokens: list[int] = []
        self._sender: FileSender | None = None
        if _is_plain_unix(transport):
            sock = transport.get_extra_info("socket")
            self._sender = FileSender(sock, export.node)
        self._run_scheduled = False
        self._write_paused = False
        self._reading_paused = False
        self._eof = False
        # No new request is looked at any more.
        self._closing = False
        self._lost = False
        self._abort_timer: asyncio.TimerHandle | None = None
        self._heard = True
        self._watch = Watch(options, self._loop.time())

    # -- the transport's callbacks -------------------------------------------

    def start(self) -> None:
        """Serve what came with the handshake, on a transport that is ours."""
        self._transport.set_write_buffer_limits(high=0, low=0)
        # It may have been paused already, and then it does not say so again.
        self._write_paused = self._transport.get_write_buffer_size() > 0
        self._run()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Say where the next bytes go: `asyncio.BufferedProtocol`."""
        return self._reader.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Serve what has arrived: `asyncio.BufferedProtocol`."""
        self._heard = True
        self._reader.received(nbytes)
        if not self._run_scheduled:
            self._run()
        elif self._reader.full:
            self._reading_paused = True
            self._transport.pause_reading()

    def pause_writing(self) -> None:
        """Stop serving: the client does not keep up with its replies."""
        self._write_paused = True

    def resume_writing(self) -> None:
        """Go on: every reply has left."""
        self._write_paused = False
        self._release_views()
        self._schedule_run()

    def eof_received(self) -> bool:
        """Serve what has arrived, then close."""
        self._eof = True
        self._schedule_run()
        # Keep the other direction: the client may wait for its replies.
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Let requests in flight end without anybody to tell."""
        self._lost = True
        self._out.clear()
        self._release_views()
        if self._sender is not None:
            self._sender.close()
        self._reader.close()
        if self._abort_timer is not None:
            self._abort_timer.cancel()
        if not self._dispatcher.nb_requests:
            self._on_closed()

    # -- ending ----------------------------------------------------------------

    def drain(self) -> None:
        """Close once the requests in flight have ended.

        Those that are not yet begun get no answer: a client that connects again
        repeats them. It would take ESHUTDOWN for an answer, and QEMU's hands it
        to the guest, as a disk that is broken.
        """
        self._stop_reading()
        self._schedule_run()

    def abort(self) -> None:
        """Close now, whatever is in flight."""
        self._transport.abort()

    def check_quiet(self, now: float, *, held_up: bool) -> None:
        """Give back memory that a quiet client does not need, or close one
        that was quiet for too long; called every now and then.

        ``held_up``: this server did not run for a while. What a client sent or
        took in that time is seen only after this call.
        """
        if self._lost:
            return
        if held_up:
            self._watch.excuse(now)
        busy = self._heard or self._dispatcher.nb_requests > 0
        if not busy:
            self._reader.shrink()
        self._heard = False
        reason = self._watch.complaint(
            now, busy=busy, nb_queued=self._transport.get_write_buffer_size()
        )
        if reason:
            logger.warning("%s closed: %s", peer_name(self._transport), reason)
            self._transport.abort()

    def _stop_reading(self) -> None:
        """Look at nothing more from this client: finish, reply, close."""
        self._closing = True
        self._transport.pause_reading()

    def _close(self) -> None:
        """Send what is queued, then close; but do not wait for ever."""
        if self._abort_timer is None:
            self._transport.close()
            self._abort_timer = self._loop.call_later(
                self._close_timeout, self._transport.abort
            )

    # -- serving -----------------------------------------------------------------

    def _schedule_run(self) -> None:
        if not self._run_scheduled:
            self._run_scheduled = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        """Serve what has arrived, send all replies there are."""
        self._run_scheduled = False
        if self._lost:
            return
        if not (self._write_paused or self._closing):
            try:
                self._serve()
            except (ProtocolError, MemoryError) as exc:
                # There is no memory for a write's data, so that the client can't
                # be followed any further either.
                reason = str(exc) or "out of memory"
                logger.warning("%s closed: %s", peer_name(self._transport), reason)
                self._stop_reading()
        if self._out:
            if self._defers_reads:
                self._node.finish_reads()
            self._transport.writelines(self._out)
            self._out.clear()
            if self._tokens and not self._transport.get_write_buffer_size():
                self._release_views()
            self._served()
        if self._sender is not None:
            self._sender.release_read()
        if (self._closing or self._eof) and self._finished:
            self._close()
        elif self._reader.full:
            self._reading_paused = True
            self._transport.pause_reading()
        elif self._reading_paused and not (self._closing or self._eof):
            self._reading_paused = False
            self._transport.resume_reading()

    @property
    def _finished(self) -> bool:
        """Whether an ending connection has nothing left to serve."""
        if self._dispatcher.nb_requests:
            return False
        # At the end of input, what has arrived is still served.
        return self._closing or not (self._run_scheduled or self._write_paused)

    def _serve(self) -> None:
        """Serve the requests in the buffer until the allowance is used up.

        Raises `ProtocolError` where the bytes are no requests.
        """
        reader = self._reader
        dispatcher = self._dispatcher
        buffer = reader.buffer
        unpack = reader.layout.head.unpack_from
        head_length = reader.layout.length
        plain_read = reader.layout.plain_read
        plain_writes = reader.layout.plain_writes
        simple = self._terms.style is ReplyStyle.SIMPLE
        extended = self._terms.style is ReplyStyle.EXTENDED
        pack_structured = STRUCTURED_DATA.pack
        pack_extended = EXTENDED_DATA.pack
        replies = self._replies
        out = self._out
        append = out.append
        simple_read = self._simple_read
        try_pread = self._try_pread
        try_staged = self._try_staged
        try_pwrite = self._node.try_pwrite
        inline_write = self._inline_write
        size = self._export.size
        ok = REPLY_OK
        allowance = self._allowance
        while allowance > 0:
            if reader.at_header:
                start = reader.start
                # The last place where a header may begin.
                last = reader.end - head_length
                try:
                    while start <= last and allowance > 0:
                        word, cookie, offset, length = unpack(buffer, start)
                        if word == plain_read:
                            if not 0 < length < simple_read or offset + length > size:
                                if try_staged(cookie, offset, length):
                                    start += head_length
                                    allowance -= length + _REQUEST_COST
                                    continue
                                if (
                                    not 0 < length < _VIEW_READ
                                    or offset + length > size
                                ):
                                    break
                            data = try_pread(offset, length)
                            if data is None:
                                break
                            if simple:
                                append(ok + cookie)
                                append(data)
                            elif type(data) is not bytes and is_zeroes(data):
                                out += replies.read(cookie, offset, (data,))
                            elif extended:
                                append(
                                    pack_extended(
                                        EXTENDED_DATA_WORD,
                                        cookie,
                                        offset,
                                        length + 8,
                                        offset,
                                    )
                                )
                                append(data)
                            else:
                                append(
                                    pack_structured(
                                        STRUCTURED_DATA_WORD, cookie, length + 8, offset
                                    )
                                )
                                append(data)
                            start += head_length
                        elif word in plain_writes and 0 < length <= inline_write:
                            data_start = start + head_length
                            stop = data_start + length
                            if stop > reader.end:
                                # The rest of it is on its way.
                                reader.start = start
                                return
                            if offset + length > size or not try_pwrite(
                                offset, buffer[data_start:stop]
                            ):
                                break
                            if extended:
                                append(replies.success(cookie, offset))
                            else:
                                append(ok + cookie)
                            start = stop
                        else:
                            break
                        allowance -= length + _REQUEST_COST
                except Exception as exc:
                    self._fail(cookie, offset, exc)
                    start += head_length + (length if word in plain_writes else 0)
                reader.start = start
                if start > last:
                    return
                if allowance <= 0:
                    break
            if dispatcher.full:
                return
            request = reader.next_request()
            if request is None:
                self._large_writes.write_ahead()
                return
            allowance -= _REQUEST_COST
            if request.command <= nbd.CMD_WRITE:
                allowance -= request.length
            self._take(request)
            if self._closing:
                return
        self._schedule_run()

    def _take(self, request: Request) -> None:
        """Serve a request that the inline loop did not."""
        command, flags, cookie, offset, _, _ = request
        if command == nbd.CMD_DISC:
            self._stop_reading()
            return
        if command == nbd.CMD_BLOCK_STATUS and flags & nbd.CMD_FLAG_PAYLOAD_LEN:
            request = expand_status(request)
        refusal = self._export.check(request, self._terms)
        if refusal is not None:
            self._out.append(self._replies.error(cookie, offset, *refusal))
        elif not request.length and command != nbd.CMD_FLUSH:
            self._out.append(self._replies.success(cookie, offset))
        elif not self._try_large(request):
            self._dispatcher.submit(request)
            return
        if request.payload is not None:
            self._shared.pool.release(request.payload)

    def _try_large(self, request: Request) -> bool:
        """Serve a read or write above the inline loop's limits, if that needs
        no waiting. Returns False if it was not served."""
        command, flags, cookie, offset, length, payload = request
        try:
            if command == nbd.CMD_READ and length >= _VIEW_READ:
                if self._encrypted:
                    return self._try_copy(request)
                if length <= _MAX_SENDFILE and self._try_sendfile(
                    cookie, offset, length
                ):
                    return True
                found = self._node.try_pread_views(offset, length)
                if found is None:
                    return False
                views, token = found
                self._tokens.append(token)
                whole = bool(flags & nbd.CMD_FLAG_DF)
                self._out += self._replies.read(cookie, offset, views, whole=whole)
                return True
            if payload is not None and length > STAGED_PAYLOAD and not flags:
                if not self._large_writes.try_write(offset, payload, length):
                    return False
                self._out.append(self._replies.success(cookie, offset))
                return True
        except BrokenReplyError as exc:
            self._break_off(exc)
            return True
        except Exception as exc:
            self._fail(cookie, offset, exc)
            return True
        return False

    def _try_copy(self, request: Request) -> bool:
        """Serve a large read for encryption, which reads the data in this
        process: were it a view, a file cut short would be a fatal signal."""
        _, flags, cookie, offset, length, _ = request
        pieces: list[Buffer] = []
        for start in range(0, length, _COPY_PIECE):
            piece = self._node.try_pread(
                offset + start, min(_COPY_PIECE, length - start)
            )
            if piece is None:
                return False
            pieces.append(piece)
        whole = bool(flags & nbd.CMD_FLAG_DF)
        self._out += self._replies.read(cookie, offset, pieces, whole=whole)
        return True

    def _try_staged(self, cookie: bytes, offset: int, length: int) -> bool:
        """Serve a read of up to 64 KiB for encryption at once: its data is read
        to behind its reply's head, and both are encrypted as one."""
        if not self._encrypted or not 0 < length <= _COPY_PIECE:
            return False
        if offset + length > self._export.size:
            return False
        head = self._replies.data_head(cookie, offset, length)
        reply = self._shared.staging[: len(head) + length]
        if not self._node.try_pread_into(offset, reply[len(head) :]):
            return False
        reply[: len(head)] = head
        self._transport.write(reply)
        self._served()
        return True

    def _try_sendfile(self, cookie: bytes, offset: int, length: int) -> bool:
        """Send a read's reply past the transport, if nothing waits in it."""
        sender = self._sender
        if sender is None:
            return False
        if self._out:
            if self._defers_reads:
                self._node.finish_reads()
            self._transport.writelines(self._out)
            self._out.clear()
        if self._transport.get_write_buffer_size():
            return False
        header = self._replies.data_head(cookie, offset, length)
        nb_sent = sender.try_send(header, offset, length)
        if nb_sent < 0:
            return False
        if nb_sent < len(header):
            self._out.append(header[nb_sent:])
            nb_sent = len(header)
        nb_sent -= len(header)
        if nb_sent < length:
            # The socket is full. What is left was in page cache just now.
            self._queue_rest(offset + nb_sent, length - nb_sent)
        return True

    def _queue_rest(self, offset: int, length: int) -> None:
        """Go on with a reply whose data has begun to leave.

        Raises `BrokenReplyError`: an error reply would be taken for data.
        """
        try:
            found = self._node.try_pread_views(offset, length)
        except OSError as exc:
            raise BrokenReplyError(exc.strerror) from exc
        if found is None:
            raise BrokenReplyError("the data is no longer in page cache")
        self._out += found[0]
        self._tokens.append(found[1])

    def _break_off(self, reason: BrokenReplyError) -> None:
        """Close now: a reply stands half sent."""
        logger.warning("%s closed amid a read: %s", peer_name(self._transport), reason)
        self._stop_reading()
        self._out.clear()
        self._transport.abort()

    def _fail(self, cookie: bytes, offset: int, exc: Exception) -> None:
        """A request that was served at once has failed."""
        if isinstance(exc, OSError | MemoryError):
            what = f"a request at {offset}"
            self._export.failures.note(what, exc, self._loop.time())
        self._out.append(
            self._replies.error(cookie, offset, request_error(exc), error_text(exc))
        )

    def _reply(self, reply: Buffers) -> None:
        """A request of the dispatcher has ended."""
        if self._lost:
            if not self._dispatcher.nb_requests:
                self._on_closed()
            return
        self._out += reply
        # Not at once: others that end in this turn of the loop join it.
        self._schedule_run()

    def _release_views(self) -> None:
        """The transport holds no view any more."""
        release = self._node.release
        for token in self._tokens:
            release(token)
        self._tokens.clear()

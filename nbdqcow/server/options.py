"""The limits of a server."""

from dataclasses import dataclass

from nbdqcow.nbd.constants import DEFAULT_MAXIMUM_PAYLOAD
from nbdqcow.server.poller import DEFAULT_POLL_TIME
from nbdqcow.units import KiB, MiB


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Limits and timeouts.

    Attributes:
        max_connections: clients at a time; more are told so and closed,
        wait_when_full: unless this has them wait until another one leaves.
        max_export_connections: clients of one export at a time; 0 for any
            number.
        max_option_length: bytes of data of one option in the handshake.
        handshake_timeout: seconds from connecting to the transmission phase;
            infinity for no limit.
        idle_timeout: seconds without a request, after which a client is
            closed; 0 for never.
        reply_timeout: seconds in which a client takes nothing of the replies
            that wait for it, after which it is closed; 0 for never.
        close_timeout: seconds that a client has to read its last replies.
        max_requests: requests in flight of one connection.
        max_payload: bytes of data of one request; clients are told.
        max_bytes: bytes of data in flight of one connection; one payload more
            may be being received.
        max_total_bytes: bytes of data in flight of all connections together;
            above it each may still have one request.
        structured_replies: offer them, and all that builds on them, to
            clients.
        sole_is_default: a sole export also answers to the empty name.
        poll_time: microseconds; see `nbdqcow.server.poller`; 0 for not at all.
    """

    max_connections: int = 100
    wait_when_full: bool = False
    max_export_connections: int = 0
    max_option_length: int = 64 * KiB
    handshake_timeout: float = 10.0
    idle_timeout: float = 0.0
    reply_timeout: float = 0.0
    close_timeout: float = 10.0
    max_requests: int = 128
    max_payload: int = DEFAULT_MAXIMUM_PAYLOAD
    max_bytes: int = 64 * MiB
    max_total_bytes: int = 512 * MiB
    structured_replies: bool = True
    sole_is_default: bool = True
    poll_time: int = DEFAULT_POLL_TIME

"""The limits of a server."""

from dataclasses import dataclass

from nbdqcow.units import MiB


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Limits and timeouts.

    Attributes:
        max_connections: clients at a time; more are closed at once,
        wait_when_full: unless this has them wait until another one leaves.
        handshake_timeout: seconds from connecting to the transmission phase.
        close_timeout: seconds that a client has to read its last replies.
        max_requests: requests in flight of one connection.
        max_bytes: bytes of data in flight of one connection; one payload more
            may be being received.
        max_total_bytes: bytes of data in flight of all connections together;
            above it each may still have one request.
        sole_is_default: a sole export also answers to the empty name.
    """

    max_connections: int = 100
    wait_when_full: bool = False
    handshake_timeout: float = 10.0
    close_timeout: float = 10.0
    max_requests: int = 128
    max_bytes: int = 64 * MiB
    max_total_bytes: int = 512 * MiB
    sole_is_default: bool = True

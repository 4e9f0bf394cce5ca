"""Tells which clients have been quiet for too long."""

from nbdqcow.server.options import ServerOptions


class Watch:
    """What one client did lately, looked at every now and then.

    The hot path keeps no times: that something has arrived since the last
    look is a flag, and that replies leave shows in what still waits.
    """

    __slots__ = ("_idle_since", "_idle_timeout", "_nb_queued", "_reply_timeout",
                 "_stuck_since")  # fmt: skip

    def __init__(self, options: ServerOptions, now: float) -> None:
        """``now`` is the loop's time, in seconds."""
        self._idle_timeout = options.idle_timeout
        self._reply_timeout = options.reply_timeout
        self._idle_since = now
        self._stuck_since = now
        self._nb_queued = 0

    def excuse(self, now: float) -> None:
        """Start again: the server itself was held up, and heard nobody."""
        self._idle_since = self._stuck_since = now

    def complaint(self, now: float, *, busy: bool, nb_queued: int) -> str | None:
        """Return why the client should be closed, or None.

        Args:
            now: the loop's time.
            busy: whether anything has arrived since the last look, or is in
                flight.
            nb_queued: bytes of replies that wait for the client.
        """
        # Replies of requests in flight may be added, but only a few times: what
        # does not change in all that time is not being read.
        if nb_queued != self._nb_queued or not nb_queued:
            self._stuck_since = now
        self._nb_queued = nb_queued
        if busy or nb_queued:
            self._idle_since = now
        if self._reply_timeout and now - self._stuck_since >= self._reply_timeout:
            return f"it took no replies for {self._reply_timeout:g} seconds"
        if self._idle_timeout and now - self._idle_since >= self._idle_timeout:
            return f"it sent nothing for {self._idle_timeout:g} seconds"
        return None

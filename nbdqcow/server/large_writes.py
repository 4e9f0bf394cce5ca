"""Large writes, written piece by piece while their data arrives.

A piece is in the processor's cache then, and the whole of it no longer would be.
"""

from typing import Final

from nbdqcow.nbd.handshake import Terms
from nbdqcow.nbd.requests import RequestReader
from nbdqcow.server.export import Export
from nbdqcow.units import KiB

_PIECE: Final = 256 * KiB
"""Bytes that are written at once."""
_MIN_PIECE: Final = 64 * KiB
_ALIGNMENT: Final = 4 * KiB
"""No sector is half written while the rest of it is under way."""
_NOT_AHEAD: Final = -1
"""`RequestReader.nb_ahead` of a write that must wait for something."""


class LargeWrites:
    """Those of one connection that need no waiting."""

    def __init__(self, reader: RequestReader, export: Export, terms: Terms) -> None:
        self._reader = reader
        self._export = export
        self._terms = terms
        self._node = export.node

    def write_ahead(self) -> None:
        """Write what is here of the data that is arriving. If that can't be done
        now, all of it is written once it is here."""
        request = self._reader.arriving
        if request is None or self._reader.nb_ahead < 0:
            return
        _, flags, _, offset, _, payload = request
        assert payload is not None
        if flags or self._export.check(request, self._terms) is not None:
            self._reader.nb_ahead = _NOT_AHEAD
            return
        stop = (offset + len(payload)) // _ALIGNMENT * _ALIGNMENT - offset
        if stop - self._reader.nb_ahead < _MIN_PIECE:
            return
        try:
            self.try_write(offset, payload, stop)
        except Exception:
            # Whoever writes all of it finds the same, and tells the client.
            self._reader.nb_ahead = _NOT_AHEAD

    def try_write(self, offset: int, payload: memoryview, stop: int) -> bool:
        """Write the data of a large write up to ``stop``, from where that was
        left off. Returns False if it has to be written anew, and waited for."""
        reader, try_pwrite = self._reader, self._node.try_pwrite
        start = reader.nb_ahead
        if start < 0:
            return False
        while start < stop:
            end = min(start + _PIECE, stop)
            if not try_pwrite(offset + start, payload[start:end]):
                reader.nb_ahead = _NOT_AHEAD
                return False
            reader.nb_ahead = start = end
        return True

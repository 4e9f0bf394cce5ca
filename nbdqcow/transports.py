"""What asyncio's own transports do wrong in some versions of Python."""

import asyncio
import functools
import sys
from typing import Final

_WRITELINES_IS_BROKEN: Final = (3, 12) <= sys.version_info < (3, 13, 6)


def mend_writelines(transport: asyncio.WriteTransport) -> None:
    """Give a transport a ``writelines`` that is as good as its ``write``.

    Since Python 3.12 that of a plain asyncio socket gathers; up to 3.12.8 and
    3.13.1 without pausing the protocol (CPython's gh-127655), so nothing bounds
    what waits for a client that does not read, and up to 3.13.5 it is not sound
    while the connection closes (gh-136234): `TypeError`, or a closed socket that
    the loop still watches. There it joins and writes again, as up to 3.11. Other
    event loops' transports stay as they are.
    """
    if _WRITELINES_IS_BROKEN and type(transport).__module__ == (
        "asyncio.selector_events"
    ):
        joining = functools.partial(asyncio.WriteTransport.writelines, transport)
        setattr(transport, "writelines", joining)  # noqa: B010

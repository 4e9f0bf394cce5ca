"""What systemd and its like tell a service, and want to hear from it.

sd_listen_fds(3) and sd_notify(3): sockets that were opened for us, and the
state that we are in.
"""

import os
from collections.abc import MutableMapping
from typing import Final

_FIRST_FD: Final = 3
_MAX_FDS: Final = 4096


def take_activation(environment: MutableMapping[str, str]) -> list[tuple[int, str]]:
    """Return descriptor and name of each socket that was opened for us.

    Removes what says so from ``environment``, as it is not meant for the
    programs that we start. Empty if it is meant for another process.
    """
    pid = environment.pop("LISTEN_PID", "")
    count = environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not (count.isascii() and count.isdigit()):
        return []
    nb_fds = min(int(count[:9]), _MAX_FDS)
    names += [""] * (nb_fds - len(names))
    fds = range(_FIRST_FD, _FIRST_FD + nb_fds)
    return list(zip(fds, names[:nb_fds], strict=True))


def notify(*lines: str) -> None:
    """Tell the service manager a state such as ``READY=1``, if there is one.

    A manager that is gone or does not listen is no reason to fail.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    # Not for commands that only look for `take_activation`.
    import socket

    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        try:
            sock.sendto("\n".join(lines).encode(), address)
        except OSError:
            return

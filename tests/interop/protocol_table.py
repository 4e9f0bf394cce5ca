"""The table of docs/protocol.md: what its rows are made of, and what they run on."""

import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest

from nbdqcow.nbd import codec
from tests.serving import Server, check_image, need, run, serving

T = TypeVar("T")

MiB, GiB = 1 << 20, 1 << 30
SIZE = 10 * GiB
OLD, NEW = "libnbd 1.14", "libnbd 1.22"


class Rows(Generic[T]):
    """The rows of a section: a feature, and the clients that prove it."""

    def __init__(self, section: str) -> None:
        self._section = section
        self.cases: list[Any] = []

    def __call__(
        self, feature: str, *clients: str
    ) -> Callable[[Callable[[T, str], None]], Callable[[T, str], None]]:
        """Add a row for each of ``clients``, with the function that is decorated."""

        def add(check: Callable[[T, str], None]) -> Callable[[T, str], None]:
            self.cases.extend(
                pytest.param(check, client, id=f"{self._section} {feature} [{client}]")
                for client in clients
            )
            return check

        return add


@dataclass
class Table:
    """What the rows run on: a server with a writable export without data
    ("disk"), a read-only view of its own ("frozen") and a chain ("chain")."""

    server: Server
    newer: Callable[..., list[str]]
    images: Path

    def uri(self, name: str = "disk") -> str:
        return f"nbd+unix:///{name}?socket={self.server.socket}"

    def nbdsh(self, script: str, client: str, name: str = "disk") -> Any:
        """Run ``script`` with a handle ``h`` that is not connected and the
        export's ``uri``; return what it assigns to ``result``."""
        program = (
            "import errno, json, sys, nbd\n"
            "h, uri = nbd.NBD(), sys.argv[1]\n"
            "def error(call, *arguments):\n"
            "    try:\n"
            "        call(*arguments)\n"
            "    except nbd.Error as exc:\n"
            "        return exc.errno\n"
            "    return None\n"
            f"{script}\n"
            "print(json.dumps(result))\n"
        )
        python = ["/usr/bin/python3"]
        if client == "libnbd 1.22":
            python = self.newer("python3")
        elif subprocess.run(
            [*python, "-c", "import nbd"], capture_output=True, check=False
        ).returncode:
            pytest.skip("/usr/bin/python3 has no module nbd (python3-libnbd)")
        return json.loads(run(*python, "-c", program, self.uri(name)).stdout)

    def raw(self, data: bytes, length: int = 1 << 20) -> bytes:
        """Send bytes behind a client's flags; return what is behind the
        greeting, until the server closes or ``length`` bytes have come."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(str(self.server.socket))
            sock.sendall(codec.CLIENT_FLAGS.pack(3) + data)
            answer = b""
            while len(answer) < 18 + length:
                piece = sock.recv(1 << 16)
                if not piece:
                    break
                answer += piece
        return answer[18:]


@pytest.fixture(scope="module")
def table(
    tmp_path_factory: pytest.TempPathFactory, newer_clients: Callable[..., list[str]]
) -> Iterator[Table]:
    need("qemu-img", "qemu-io")
    images = tmp_path_factory.mktemp("images")
    disk, base, top = (images / f"{n}.qcow2" for n in ("disk", "base", "top"))
    run("qemu-img", "create", "-q", "-f", "qcow2", disk, str(SIZE))
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "16M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 4M", base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    run("qemu-img", "bitmap", "--add", top, "b0")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 2 1M 1M", "-c", "write -z 3M 1M", top)
    run("qemu-img", "bitmap", "--disable", top, "b0")
    with serving(
        Path(f"disk={disk}"), options=(f"chain={top}",), image_format="qcow2"
    ) as server:
        yield Table(server, newer_clients, images)
    check_image(disk)

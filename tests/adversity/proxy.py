"""A proxy between client and server that treats their bytes badly."""

import random
import select
import socket
import threading
from pathlib import Path


class Proxy:
    """Hands bytes on between unix sockets: late, in other pieces, in part.

    Each connection draws how it is treated: pieces of one to many bytes, with
    pauses, or gathered; some are cut off after a number of bytes, in the
    middle of whatever that is.

    Attributes:
        nb_cut: connections that were cut.
        nb_bytes: handed on.
    """

    def __init__(self, listen: Path, target: Path, seed: int, cuts: float) -> None:
        self.nb_cut = 0
        self.nb_bytes = 0
        self._target = target
        self._rnd = random.Random(seed)
        self._cuts = cuts
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(listen))
        self._listener.listen(64)
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            seed = self._rnd.randrange(1 << 32)
            thread = threading.Thread(target=self._serve, args=(client, seed))
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket, seed: int) -> None:
        rnd = random.Random(seed)
        left = rnd.randrange(1, 1 << 20) if rnd.random() < self._cuts else 1 << 62
        largest = rnd.choice((1, 7, 100, 5000, 1 << 20))
        if largest < 100:
            left = min(left, 10_000)
        with client, socket.socket(socket.AF_UNIX) as server:
            server.connect(str(self._target))
            ways = {client: server, server: client}
            try:
                while left > 0:
                    readable, _, _ = select.select(list(ways), [], [], 60)
                    if not readable:
                        return
                    for source in readable:
                        data = source.recv(rnd.randint(1, largest))
                        if not data:
                            return
                        if rnd.random() < 0.1:
                            # Time for more to come, which then goes together.
                            select.select([], [], [], rnd.random() / 500)
                        data = data[:left]
                        ways[source].sendall(data)
                        left -= len(data)
                        self.nb_bytes += len(data)
                self.nb_cut += 1
            except OSError:
                return

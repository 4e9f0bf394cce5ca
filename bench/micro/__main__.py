"""``python -m bench.micro``: what one request costs in each part of the way.

Each figure is the best of several runs, in nanoseconds per operation: other
work on the machine only ever adds. A part that got slower shows in seconds.
"""

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.images import qemu_img
from bench.micro.fake import FakeTransport
from bench.peers import BenchError
from nbdqcow import open_image
from nbdqcow.block.node import Node
from nbdqcow.buffers import BufferPool, keep_freed_memory
from nbdqcow.nbd import constants as nbd
from nbdqcow.nbd.handshake import Terms
from nbdqcow.nbd.replies import ReplyStyle
from nbdqcow.nbd.requests import COMPACT, EXTENDED, Layout, RequestReader
from nbdqcow.server.dispatch import Shared
from nbdqcow.server.export import Export
from nbdqcow.server.inline import Transmission
from nbdqcow.server.options import ServerOptions
from nbdqcow.server.poller import Poller

KiB, MiB = 1 << 10, 1 << 20
_IMAGE_SIZE = 64 * MiB
_BATCH = 16
# Bytes of a reply beside the data.
_REPLY_HEADS = {
    ReplyStyle.SIMPLE: 16,
    ReplyStyle.STRUCTURED: 28,
    ReplyStyle.EXTENDED: 40,
}
_WRITE_REPLIES = {
    ReplyStyle.SIMPLE: 16,
    ReplyStyle.STRUCTURED: 16,
    ReplyStyle.EXTENDED: 32,
}


class NotInline(Exception):
    """The part took the slow way, as it may: there is nothing to measure."""


def measure(name: str, nb_operations: int, operation: Callable[[], object]) -> None:
    """Print the time of one of the ``nb_operations`` that a call makes."""
    best = float("inf")
    deadline = time.perf_counter() + 0.5
    try:
        while time.perf_counter() < deadline:
            start = time.perf_counter_ns()
            for _ in range(20):
                operation()
            elapsed = time.perf_counter_ns() - start
            best = min(best, elapsed / (20 * nb_operations))
    except NotInline:
        if best == float("inf"):
            print(f"{name:44} not inline just now", flush=True)
            return
    print(f"{name:44} {best:10,.0f} ns", flush=True)


def requests(
    layout: Layout, command: int, offsets: Iterable[int], length: int
) -> bytes:
    """Return requests as they arrive; writes with a payload."""
    payload = os.urandom(length) if command == nbd.CMD_WRITE else b""
    word = layout.plain_writes[0] if payload else layout.plain_read
    return b"".join(
        layout.head.pack(word, b"cookie-8", offset, length) + payload
        for offset in offsets
    )


def measure_parser() -> None:
    """Requests off the inline path, one object each."""
    reader = RequestReader(BufferPool(), 32 * MiB)
    arrived = requests(COMPACT, nbd.CMD_READ, range(0, _BATCH * 4096, 4096), 4096)

    def parse() -> None:
        reader.get_buffer()[: len(arrived)] = arrived
        reader.received(len(arrived))
        while reader.next_request() is not None:
            pass

    measure("parser: next_request, 16 reads at once", _BATCH, parse)


def measure_node(node: Node, offsets: list[int]) -> None:
    """The map, the file below and the node over both."""
    driver = node.driver
    storage = driver.data
    for length in (4 * KiB, 64 * KiB, MiB):
        places = [offset // length * length for offset in offsets]
        word = f"{length // KiB} KiB"

        def look_up(places: list[int] = places, length: int = length) -> None:
            for place in places:
                driver.try_map(place, length)

        def read_file(places: list[int] = places, length: int = length) -> None:
            for place in places:
                if storage.try_pread(place, length) is None:
                    raise NotInline

        def read(places: list[int] = places, length: int = length) -> None:
            for place in places:
                if node.try_pread(place, length) is None:
                    raise NotInline

        def read_views(places: list[int] = places, length: int = length) -> None:
            for place in places:
                found = node.try_pread_views(place, length)
                if found is None:
                    raise NotInline
                node.release(found[1])

        measure(f"map: try_map, {word}", len(offsets), look_up)
        measure(f"storage: try_pread, {word}", len(offsets), read_file)
        measure(f"node: try_pread, {word}", len(offsets), read)
        measure(f"node: try_pread_views, {word}", len(offsets), read_views)

    def look_up_write() -> None:
        for offset in offsets:
            driver.try_map_write(offset, 4 * KiB)

    measure("map: try_map_write, 4 KiB", len(offsets), look_up_write)
    for length in (4 * KiB, 64 * KiB):
        data = os.urandom(length)

        def write(data: bytes = data) -> None:
            for offset in offsets:
                if not node.try_pwrite(offset // len(data) * len(data), data):
                    raise NotInline

        measure(f"node: try_pwrite, {length // KiB} KiB", len(offsets), write)


async def measure_inline(node: Node, offsets: list[int]) -> None:
    """A batch of requests from the socket to the one write of its replies."""
    read, write = nbd.CMD_READ, nbd.CMD_WRITE
    for style in ReplyStyle:
        layout = EXTENDED if style is ReplyStyle.EXTENDED else COMPACT
        for name, command, length, nb_requests in (
            ("16 reads of 4 KiB", read, 4 * KiB, 16),
            ("1 read of 4 KiB", read, 4 * KiB, 1),
            ("16 writes of 4 KiB", write, 4 * KiB, 16),
            ("1 write of 4 KiB", write, 4 * KiB, 1),
            ("4 reads of 64 KiB", read, 64 * KiB, 4),
            ("1 read of 1 MiB", read, MiB, 1),
        ):
            transport = FakeTransport()
            connection = Transmission(
                transport,
                RequestReader(BufferPool(), 32 * MiB, layout),
                Export("", node),
                Terms(style),
                Shared(BufferPool(), Poller(asyncio.get_running_loop(), 0)),
                ServerOptions(),
                lambda: None,
            )
            places = [offset // length * length for offset in offsets[:nb_requests]]
            arrived = requests(layout, command, places, length)
            head = _REPLY_HEADS[style] if command == read else _WRITE_REPLIES[style]
            wanted = nb_requests * (head + (length if command == read else 0))

            def serve(
                connection: Transmission = connection,
                transport: FakeTransport = transport,
                arrived: bytes = arrived,
                wanted: int = wanted,
            ) -> None:
                connection.get_buffer(-1)[: len(arrived)] = arrived
                transport.nb_bytes = 0
                connection.buffer_updated(len(arrived))
                if transport.nb_bytes != wanted:
                    raise NotInline

            label = f"inline, {style.name.lower()}: {name}, each"
            measure(label, nb_requests, serve)
            # Requests that went the slow way end before the image is closed.
            await asyncio.sleep(0.1)


async def run(image: Path) -> None:
    keep_freed_memory()  # as the server does
    source = random.Random(1)
    offsets = [source.randrange(0, _IMAGE_SIZE - MiB, 4096) for _ in range(64)]
    async with open_image(image, format="qcow2") as node:
        for offset in range(0, _IMAGE_SIZE, MiB):
            await node.pread(offset, MiB)
        measure_parser()
        measure_node(node, offsets)
        await measure_inline(node, offsets)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.micro", description="Time the parts of the hot path."
    )
    parser.add_argument("--dir", help="where to make the image (not a tmpfs)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        raw, image = Path(directory) / "data.raw", Path(directory) / "data.qcow2"
        raw.write_bytes(os.urandom(_IMAGE_SIZE))
        try:
            qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, image)
            asyncio.run(run(image))
        except BenchError as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

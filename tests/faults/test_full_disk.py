"""A file system that is full: ENOSPC, and all goes on once there is room.

The real one is a small tmpfs. Where mounting is not allowed, the limit on a
file's length takes its place (EFBIG, which clients are told as ENOSPC, too).
"""

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.crash.histories import pattern
from tests.nbd_client import CMD_WRITE, ENOSPC, NbdClient
from tests.serving import Server, check_image, nbdqcow_img, serving
from tests.small_disk import remount, small_disk

MiB = 1 << 20
SMALL, LARGE = 4 * MiB, 64 * MiB
PIECE = 64 << 10


@contextlib.contextmanager
def full_disk(
    directory: Path, kind: str
) -> Iterator[tuple[Path, Callable[[Server], None], Callable[[Server], None]]]:
    """Yield a directory, what makes its disk small for a server, and what makes
    it large again."""
    directory.mkdir()
    if kind == "tmpfs":
        with small_disk(directory, SMALL) as mounted:
            if mounted:
                yield (
                    directory,
                    lambda server: None,
                    lambda server: remount(directory, f"size={LARGE}"),
                )
                return

    def limit(server: Server, length: int) -> None:
        pid = server.process.pid
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (length, LARGE))

    yield (
        directory,
        lambda server: limit(server, SMALL),
        lambda server: limit(server, LARGE),
    )


def fill(path: Path) -> None:
    """Let a file take all the room that there is."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize(
    "options",
    ["qcow2 -o cluster_size=4096", "qcow2 -o cluster_size=65536", "qcow"],
    ids=["4096", "65536", "qcow"],
)
@pytest.mark.parametrize("kind", ["tmpfs", "limited"])
def test_a_full_disk(tmp_path, kind, options, figures):
    with full_disk(tmp_path / "mounted", kind) as (directory, shrink, grow):
        image = directory / "disk"
        format_ = {"image_format": options.split()[0]}
        nbdqcow_img("create", "-q", "-f", *options.split(), image, "32M")
        written = {}
        with serving(image, **format_) as server, NbdClient(server.socket) as client:
            shrink(server)
            nb_refused = 0
            for offset in range(0, 8 * MiB, PIECE):
                data = pattern(("full", offset), PIECE)
                reply = client.request(CMD_WRITE, offset, PIECE, data)
                if reply.error:
                    assert reply.error == ENOSPC
                    nb_refused += 1
                else:
                    written[offset] = data
                if reply.error and nb_refused > 4:
                    break
            assert nb_refused > 4
            # What is there can be read and overwritten, by others as well.
            with NbdClient(server.socket) as other:
                for offset, data in written.items():
                    assert other.read(offset, PIECE) == data
                other.write(0, b"again" * 1000)
                written[0] = b"again" * 1000 + written[0][5000:]
            # Each of these wants a table, too, where clusters are small. What is
            # refused leaves nothing that a flush could not bring to disk.
            for offset in range(16 * MiB, 32 * MiB, 2 * MiB):
                data = pattern(("apart", offset), PIECE)
                reply = client.request(CMD_WRITE, offset, PIECE, data)
                if not reply.error:
                    written[offset] = data
            client.flush()
            grow(server)
            client.flush()
            for offset in range(8 * MiB, 9 * MiB, PIECE):
                data = pattern(("room", offset), PIECE)
                client.write(offset, data)
                written[offset] = data
            client.flush()
        if options != "qcow":
            check_image(image, leaks_allowed=True)
        with serving(image, **format_) as server, NbdClient(server.socket) as client:
            for offset, data in written.items():
                assert client.read(offset, PIECE) == data
    figures(f"full disk, {kind}: {nb_refused} writes refused, {len(written)} kept")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A directory with room for 8 MiB."""
    directory = tmp_path / "mounted"
    directory.mkdir()
    with small_disk(directory, 8 * MiB) as mounted:
        if not mounted:
            pytest.skip("mounting is not allowed here")
        yield directory


def test_a_snapshot_can_be_deleted_when_the_disk_is_full(small):
    image = small / "disk"
    nbdqcow_img("create", "-q", "-f", "qcow2", image, "32M")
    for name in ("old", "new"):
        with serving(image) as server, NbdClient(server.socket) as client:
            client.write(0, pattern(name, 2 * MiB))
            client.flush()
        nbdqcow_img("snapshot", "-c", name, image)
    with serving(image) as server, NbdClient(server.socket) as client:
        client.write(MiB, pattern("now", MiB))
        client.flush()
    fill(small / "rest")
    used = image.stat().st_blocks * 512
    for words, what in (
        (("bitmap", "--add", image, "b"), "Failed to write bitmap 'b' to file"),
        (("snapshot", "-c", "third", image), "Could not create snapshot 'third'"),
    ):
        with pytest.raises(AssertionError, match=f"{what}: .*No space left on"):
            nbdqcow_img(*words)
        check_image(image)
    # The table of the one that stays would need room.
    with pytest.raises(AssertionError, match="No space left on device"):
        nbdqcow_img("snapshot", "-d", "old", image)
    check_image(image)
    nbdqcow_img("snapshot", "-d", "new", image)
    check_image(image)
    nbdqcow_img("snapshot", "-d", "old", image)
    check_image(image)
    assert image.stat().st_blocks * 512 <= used - 2 * MiB
    with serving(image) as server, NbdClient(server.socket) as client:
        assert client.read(0, MiB) == pattern("new", 2 * MiB)[:MiB]
        assert client.read(MiB, MiB) == pattern("now", MiB)


def test_what_an_amendment_has_no_room_for_is_said(small):
    image = small / "disk"
    nbdqcow_img("create", "-q", "-f", "qcow2", image, "1T")
    fill(small / "rest")
    with pytest.raises(AssertionError, match="refblock: No space left on device"):
        nbdqcow_img("amend", "-o", "refcount_bits=64", image)
    check_image(image)

"""SIGKILL at random moments under fio: what was flushed is there afterwards.

fio writes one half of the disk with checksums and flushes it. While it writes
the other half the server is killed. Then a new server must have the first half
as it was, by fio's own checksums, and the image may have leaks at the most. The
random client is killed under in `tests.differential.test_differential`.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import serving as serving_module
from tests.serving import check_image, nbdqcow_img, need, run, server_command, serving

MiB = 1 << 20
HALF = 24 * MiB
NB_KILLS = 3
NB_LONG_KILLS = int(os.environ.get("NBDQCOW_KILLS", "60"))

WRITE = (
    *("--ioengine=nbd", "--rw=randwrite", "--bsrange=4k-64k", "--iodepth=16"),
    *("--verify=crc32c", "--verify_interval=4k", "--verify_fatal=1"),
    *("--group_reporting", f"--size={HALF}", "--verify_state_save=0"),
)


def write_and_flush(uri: str, offset: int, seed: int) -> None:
    """Write half of the disk, checksums and all, and flush it."""
    run(
        *("fio", "--name=half", *WRITE, f"--uri={uri}", f"--offset={offset}"),
        *(f"--randseed={seed}", "--do_verify=0", "--end_fsync=1"),
    )


def verify(uri: str, offset: int, seed: int) -> None:
    run(
        *("fio", "--name=half", *WRITE, f"--uri={uri}", f"--offset={offset}"),
        *(f"--randseed={seed}", "--verify_only"),
    )


def kill_under_fio(directory: Path, seed: int, nb_kills: int) -> int:
    """Kill a server so often; return how many bytes fio has verified."""
    need("fio", "qemu-img")
    rnd = random.Random(seed)
    image = directory / "disk.qcow2"
    cluster_size = rnd.choice((512, 4096, 65536))
    options = f"cluster_size={cluster_size}"
    nbdqcow_img("create", "-q", "-f", "qcow2", "-o", options, image, 2 * HALF)
    kept = 0
    with serving(image) as server:
        write_and_flush(server.uri, kept, seed)
    nb_verified = 0
    for number in range(nb_kills):
        other = HALF - kept
        with serving(image) as server:
            command = ["fio", "--name=half", *WRITE, f"--uri={server.uri}"]
            command += [f"--offset={other}", f"--randseed={seed + number}"]
            command += ["--do_verify=0", "--fsync=32", "--time_based", "--runtime=60"]
            fio = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            # Not before it writes: the file grows then, or its blocks change.
            before = image.stat().st_mtime_ns
            while image.stat().st_mtime_ns == before and fio.poll() is None:
                time.sleep(0.01)
            time.sleep(rnd.uniform(0, 0.5))
            assert fio.poll() is None, "fio ended before the kill"
            server.kill()
            fio.kill()
            fio.wait()
        check_image(image, leaks_allowed=True)
        with serving(image) as server:
            verify(server.uri, kept, seed)
            nb_verified += HALF
            # Now the other half is the one to keep.
            if rnd.random() < 0.5:
                seed += 1000
                write_and_flush(server.uri, other, seed)
                kept = other
        check_image(image, leaks_allowed=True)
    return nb_verified


def test_kills_under_fio(tmp_path, seed, figures):
    nb_verified = kill_under_fio(tmp_path, seed, NB_KILLS)
    figures(f"kills under fio: {NB_KILLS}, {nb_verified >> 20} MiB verified")


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_kills_under_fio(tmp_path, seed, figures):
    nb_verified = nb_kills = 0
    for number in range(NB_LONG_KILLS // 10):
        directory = tmp_path / str(number)
        directory.mkdir()
        nb_verified += kill_under_fio(directory, seed + number, 10)
        nb_kills += 10
    figures(f"kills at length: {nb_kills}, {nb_verified >> 20} MiB verified")


_FORGETFUL = """
import sys
from nbdqcow.formats.qcow2.writeback import Writeback

async def flush(self):
    await self.flush_files()

Writeback.flush = flush
sys.argv[0] = "nbdqcow"
from nbdqcow.cli.main import main
sys.exit(main())
"""


def test_a_broken_server_is_caught(tmp_path, seed, monkeypatch):
    """A mutant: a flush brings no metadata to disk."""

    def broken(*arguments, **options):
        _, _, _, *rest = server_command(*arguments, **options)
        return [sys.executable, "-c", _FORGETFUL, *rest]

    monkeypatch.setattr(serving_module, "server_command", broken)
    # Only the kill must show it: what a server writes at its end is whole.
    with pytest.raises(AssertionError):
        for number in range(5):
            directory = tmp_path / str(number)
            directory.mkdir()
            kill_under_fio(directory, seed + number, 3)

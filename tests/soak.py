"""``python -m tests.soak [--seconds N] [--seed N]``: all kinds at once, for hours.

Rounds of interleavings with cancelled requests, of faults at random, of power
cuts, and of kills under fio take turns with new seeds until the time is over.
The first failure ends it, with the seed that repeats it; else it reports what
has been done.
"""

import argparse
import asyncio
import logging
import random
import sys
import tempfile
import time
from pathlib import Path

import nbdqcow.formats.qcow2.compress
from nbdqcow.pool import Pool
from tests.crash import states, test_histories
from tests.crash.histories import HISTORIES
from tests.faults.test_each_call_fails import fail_at_random, fail_each_call
from tests.interleavings import test_faults_between
from tests.interleavings.permuting import InlinePool
from tests.interleavings.test_cancelled import cancel_all
from tests.interleavings.test_interleavings import Figures, interleave
from tests.kills.test_kills import kill_under_fio


class Soak:
    """What has been done so far, and how to do more of it."""

    def __init__(self, seed: int) -> None:
        self.rnd = random.Random(seed)
        self.meetings = Figures()
        self.faulty_meetings = test_faults_between.Figures()
        self.cuts = states.Figures()
        self.nb_faults = 0
        self.nb_cancelled = 0
        self.nb_kills = 0
        self.nb_verified = 0

    def round(self, directory: Path) -> None:
        """Do a little of each kind."""
        seed = self.rnd.randrange(1 << 40)
        history = self.rnd.choice([h for h in HISTORIES if not h.costly])
        print(f"seed {seed}, {history}", file=sys.stderr, flush=True)
        compress = nbdqcow.formats.qcow2.compress
        compress.Pool = InlinePool  # type: ignore[attr-defined, misc]
        for number in range(200):
            interleave(seed + number, self.meetings)
        for number in range(50):
            test_faults_between.interleave(seed + number, self.faulty_meetings)
        self.nb_cancelled += cancel_all(history, seed)
        compress.Pool = Pool  # type: ignore[attr-defined]
        self.nb_faults += asyncio.run(fail_each_call(history, seed, 1))
        for number in range(20):
            self.nb_faults += asyncio.run(fail_at_random(history, seed + number))
        disk = directory / "disk"
        asyncio.run(test_histories.explore(history, seed, disk, self.cuts, 100))
        kills = directory / "kills"
        kills.mkdir()
        self.nb_verified += kill_under_fio(kills, seed, 2)
        self.nb_kills += 2

    def __str__(self) -> str:
        return "\n".join(
            [
                f"interleavings: {self.meetings}",
                f"interleavings with faults: {self.faulty_meetings}",
                f"steps cancelled: {self.nb_cancelled}",
                f"faults injected: {self.nb_faults}",
                f"power cuts: {self.cuts}",
                f"kills: {self.nb_kills}, {self.nb_verified >> 20} MiB verified",
            ]
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--seconds", type=float, default=7200)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    started = time.monotonic()
    soak, nb_rounds = Soak(arguments.seed), 0
    while not nb_rounds or time.monotonic() - started < arguments.seconds:
        with tempfile.TemporaryDirectory(prefix="nbdqcow-soak-") as directory:
            soak.round(Path(directory))
        nb_rounds += 1
    hours = (time.monotonic() - started) / 3600
    print(f"{nb_rounds} rounds in {hours:.2f} hours, seed {arguments.seed}\n{soak}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

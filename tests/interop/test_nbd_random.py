"""Command lines of qemu-nbd: nbdqcow-nbd answers alike, and serves alike.

`nbd_lines` has them; `python -m tests.interop.nbd_random` runs as many as one likes
(`make nbd-lines`), and makes those that differ shorter.
"""

import shlex
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from tests.interop.img_intended import Difference
from tests.interop.nbd_intended import unintended
from tests.interop.nbd_lines import LINES, PROGRAM, NbdLines, is_harmless, words_of
from tests.interop.nbd_random import Pair, describe
from tests.serving import need

SEED = 7
NB_LINES = 6
IN_EVERY_RUN = 24
"""Of so many lines of the table one is in every test run."""


@pytest.fixture
def pair() -> Iterator[Pair]:
    need("qemu-nbd", "qemu-img", "qemu-io", "nbdinfo", "nbdcopy")
    # Unix socket paths have 107 bytes: pytest's own directories are too deep.
    with (
        tempfile.TemporaryDirectory(prefix="nbd-") as scratch,
        Pair(Path(scratch)) as found,
    ):
        yield found


def assert_alike(pair: Pair, lines: Iterable[list[str]]) -> None:
    failures = []
    for line in lines:
        found = pair.unintended(line)
        if found:
            failures.append(f"{shlex.join(line)}\n{describe(found)}")
    assert not failures, "\n".join(failures)


def test_some_lines(pair: Pair) -> None:
    # That what differs is found:
    found = pair.differences([PROGRAM, "-k", "{dir}/used", "base.qcow2"])
    assert {"status", "err", "came up", "lost files"} <= {one.what for one in found}
    assert_alike(pair, map(words_of, LINES[::IN_EVERY_RUN]))
    assert_alike(pair, islice(NbdLines(SEED), NB_LINES))


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_the_whole_table(pair: Pair) -> None:
    assert_alike(pair, map(words_of, LINES))


def test_what_is_intended() -> None:
    assert not unintended([Difference("new files", ["s"], [])])
    assert unintended([Difference("new files", [], ["s"])])
    assert unintended([Difference("status", 0, 1)])
    assert not unintended([Difference("status", 1, 0)])
    assert unintended([Difference("status", 1, 0), Difference("came up", None, True)])
    left = b"qemu-nbd: option negotiation failed: Failed to read flags\n"
    assert not unintended([Difference("err", left + b"a", b"a")])
    assert unintended([Difference("err", left + b"a", b"b")])


def test_lines_are_harmless_and_repeated_by_their_seed() -> None:
    lines = list(islice(NbdLines(SEED), 500))
    assert lines == list(islice(NbdLines(SEED), 500))
    assert all(is_harmless(line) for line in lines)


def test_words_of_a_line() -> None:
    assert words_of("-x a~b '' c") == [PROGRAM, "-x", "a b", "", "c"]
    assert words_of("") == [PROGRAM]

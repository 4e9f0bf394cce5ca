"""Random command lines: qemu-img and nbdqcow-img answer alike, and leave alike.

`img_lines` makes them; `python -m tests.interop.img_random` runs as many as one
likes (`make img-lines`), and makes those that differ shorter.
"""

import random
import shlex
from itertools import islice
from pathlib import Path

import pytest

from tests.interop.img_intended import Difference, unintended
from tests.interop.img_lines import COMMANDS, CommandLines, is_harmless, shrink
from tests.interop.img_random import Pair, describe, load, prepare
from tests.serving import need

SEED = 7
NB_LINES = 8
"""Of each command."""


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    need("qemu-img")
    prepare(tmp_path / "pristine")
    load()
    return Pair(tmp_path / "pristine", tmp_path)


def test_lines_of_every_command(pair: Pair) -> None:
    # That what differs is found:
    found = pair.differences(["create", "-f", "vdi", "out", "1M"])
    assert {one.what for one in found} == {"status", "out", "err"}
    failures = []
    for command in COMMANDS:
        lines = CommandLines(SEED, oddness=0.05)
        for line in islice(lines.of(command), NB_LINES):
            found = unintended(pair.differences(line))
            if found:
                failures.append(f"{shlex.join(line)}\n{describe(found)}")
    assert not failures, "\n".join(failures)


def test_what_is_intended() -> None:
    steps = b"    (0.00/100%)\r"
    assert not unintended([Difference("out", steps, 3 * steps)])
    assert unintended([Difference("err", b"a", b"b")])
    assert unintended([Difference("status", 0, 1)])


def test_lines_are_harmless_and_repeated_by_their_seed() -> None:
    lines = list(islice(CommandLines(SEED), 500))
    assert lines == list(islice(CommandLines(SEED), 500))
    assert {line[0] for line in lines} == set(COMMANDS)
    assert all(is_harmless(line) for line in lines)


def test_shrinking() -> None:
    line = ["create", "-q", "-o", "a=1,b=2,c=3", "-f", "qcow2", "out", "1M"]
    words = random.Random(SEED).sample(line[1:], 3)
    short = shrink(
        line, lambda one: one[0] == "create" and all(w in one for w in words)
    )
    assert sorted(short) == sorted(["create", *words])
    short = shrink(line, lambda one: any("b=2" in word for word in one))
    assert short == ["create", "b=2"]

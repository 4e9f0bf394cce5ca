"""What every command does first."""

import sys

import pytest

from nbdqcow.cli.program import SWITCH_INTERVAL, run_program


def test_threads_do_not_wait_long_for_the_interpreter() -> None:
    before = sys.getswitchinterval()
    seen: list[float] = []
    try:
        assert run_program(lambda: seen.append(sys.getswitchinterval()) or 0) == 0
    finally:
        sys.setswitchinterval(before)
    assert seen == [pytest.approx(SWITCH_INTERVAL)]

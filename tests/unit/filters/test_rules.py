"""`nbdqcow.filters.rules`: what a configuration says, and which request fails."""

import errno

import pytest

from nbdqcow.errors import ImageError
from nbdqcow.filters.rules import (
    FLUSH,
    MAX_RULES,
    READ,
    STATUS,
    WRITE,
    Rules,
    parse_config,
    rules_of_pairs,
)

SECTOR = 512


def config(text: str) -> Rules:
    return Rules(parse_config(text.encode()))


def test_a_rule_waits_for_its_event():
    rules = config('[inject-error]\nevent = "l2_load"\nerrno = "28"\n')
    assert rules.error_for(READ, 0, 1) == 0
    rules.announce("l1_update")
    assert rules.error_for(READ, 0, 1) == 0
    rules.announce("l2_load")
    for kind in (READ, WRITE, FLUSH):
        assert rules.error_for(kind, 0, 1) == errno.ENOSPC
    # Only a rule that says so is about that.
    assert rules.error_for(STATUS, 0, 1) == 0


def test_what_fails_is_eio_by_default():
    rules = config('# a comment\n\n  [inject-error "name"]\n event="none"\n')
    rules.announce("none")
    assert rules.error_for(READ, 0, 1) == errno.EIO


@pytest.mark.parametrize("on", ["on", "yes", "true", "y"])
def test_once(on):
    rules = config(f'[inject-error]\nevent = "read_aio"\nonce = "{on}"\n')
    rules.announce("read_aio")
    assert rules.error_for(READ, 0, 1) == errno.EIO
    assert rules.error_for(READ, 0, 1) == 0
    rules.announce("read_aio")
    assert rules.error_for(READ, 0, 1) == 0


def test_the_next_event_takes_the_place_of_the_last():
    rules = config(
        '[inject-error]\nevent = "read_aio"\nerrno = "5"\n'
        '[inject-error]\nevent = "write_aio"\nerrno = "28"\n'
    )
    rules.announce("read_aio")
    rules.announce("l2_load")
    assert rules.error_for(WRITE, 0, 1) == 5
    rules.announce("write_aio")
    assert rules.error_for(READ, 0, 1) == 28


@pytest.mark.parametrize(
    ("offset", "length", "fails"),
    [
        (0, 3 * SECTOR, False),
        (0, 3 * SECTOR + 1, True),
        (4 * SECTOR - 1, 1, True),
        (4 * SECTOR, 9 * SECTOR, False),
        (3 * SECTOR, 0, False),
    ],
)
def test_a_sector(offset, length, fails):
    rules = Rules(
        rules_of_pairs({"inject-error.0.event": "none", "inject-error.0.sector": "3"})
    )
    rules.announce("none")
    assert bool(rules.error_for(READ, offset, length)) == fails


def test_kinds_of_requests():
    rules = config('[inject-error]\nevent = "none"\niotype = "block-status"\n')
    rules.announce("none")
    assert rules.error_for(READ, 0, 1) == 0
    assert rules.error_for(STATUS, 0, 1) == errno.EIO


def test_states():
    rules = config(
        '[set-state]\nevent = "write_aio"\nstate = "1"\nnew_state = "2"\n'
        '[inject-error]\nevent = "write_aio"\nstate = "2"\n'
    )
    assert rules.state == 1
    rules.announce("write_aio")
    assert (rules.state, rules.error_for(WRITE, 0, 1)) == (2, 0)
    rules.announce("write_aio")
    assert rules.error_for(WRITE, 0, 1) == errno.EIO


def test_where_the_first_failing_sector_is():
    rules = config(
        "".join(
            f'[inject-error]\nevent = "none"\nsector = "{sector}"\n'
            'iotype = "block-status"\n'
            for sector in (9, 4)
        )
    )
    rules.announce("none")
    assert rules.first_failing(STATUS, 0, 100 * SECTOR) == 4 * SECTOR
    assert rules.first_failing(STATUS, 5 * SECTOR, 100 * SECTOR) == 9 * SECTOR
    assert rules.first_failing(STATUS, 10 * SECTOR, 100 * SECTOR) is None
    assert rules.first_failing(READ, 0, 100 * SECTOR) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'event = "none"\n', "line 1: no group defined"),
        (b"junk\n", "line 1: no group defined"),
        (b"\n[other]\n", r"line 2: neither \[inject-error\] nor \[set-state\]"),
        (b"[inject-error\n", "line 1: neither"),
        (b"[inject-error]\nevent\n", 'line 2: not KEY = "VALUE"'),
        (b'[inject-error]\nfoo = "1"\n', "line 2: .inject-error. has no such option"),
        (b'[set-state]\nerrno = "1"\n', "line 2: .set-state. has no such option"),
        (b'[inject-error]\nerrno = "5"\n', "Missing event name for rule"),
        (b'[inject-error]\nevent = "x"\n', "invalid parameter value: x"),
        (b'[inject-error]\nevent = "none"\nerrno = "x"\n', "'errno' expects a number"),
        (b'[inject-error]\nevent = "none"\nerrno = "-1"\n', "'errno' expects"),
        (b'[inject-error]\nevent = "none"\nerrno = "99999"\n', "'errno' expects"),
        (b'[inject-error]\nevent = "none"\nsector = 1\n', "'sector' expects a number"),
        (b'[inject-error]\nevent = "none"\nsector = "1 "\n', "'sector' expects"),
        (b'[inject-error]\nevent = "none"\nsector = "1_0"\n', "'sector' expects"),
        (b'[inject-error]\nevent = "none"\nonce = "x"\n', "'once' expects 'on' or"),
        (b'[inject-error]\nevent = "none"\niotype = "x"\n', "value: x"),
        (
            b'[inject-error]\nevent = "none"\nsector = "' + b"9" * 5000 + b'"\n',
            "is too large for parameter 'sector'",
        ),
        (b"[inject-error]\n\xff\xfe\n", "no text"),
        (b"#" * (1 << 20), "more than 262144 bytes"),
        (b"[set-state]\n" * (MAX_RULES + 1), "more than 4096 rules"),
    ],
)
def test_a_wrong_config_is_refused(text, message):
    with pytest.raises(ImageError, match=message):
        parse_config(text)


def test_a_wrong_config_is_not_shown():
    with pytest.raises(ImageError) as info:
        parse_config(b"[inject-error]\nroot:secret:0:0\n")
    assert "secret" not in str(info.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("inject-error.event", "not inject-error.NUMBER.OPTION"),
        ("inject-error.x.event", "not inject-error.NUMBER.OPTION"),
        ("inject-error.0.foo", "doesn't support the option 'foo'"),
        ("set-state." + "1" * 5000 + ".event", "NUMBER"),
    ],
)
def test_wrong_options_are_refused(key, message):
    with pytest.raises(ImageError, match=message):
        rules_of_pairs({key: "none"})

"""The rules of `blkdebug`: which request fails, and when.

A rule waits for an event that a driver tells of (`StorageDriver.announce`).
Then it becomes active, and fails the requests that it is about; or it sets the
state, a number that other rules ask for. Source: QEMU's blkdebug documentation.
"""

import errno
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from nbdqcow.errors import ImageError
from nbdqcow.units import BOOLEANS, SECTOR_SIZE, boolean_expected

MAX_RULES: Final = 4096
MAX_CONFIG_LENGTH: Final = 256 << 10
_MAX_NUMBER: Final = 1 << 63
_MAX_ERRNO: Final = 4095

EVENTS: Final = frozenset(
    (
        *("l1_update", "l1_grow_alloc_table", "l1_grow_write_table"),
        *("l1_grow_activate_table", "l1_shrink_write_table"),
        *("l1_shrink_free_l2_clusters", "l2_load", "l2_update"),
        *("l2_update_compressed", "l2_alloc_cow_read", "l2_alloc_write"),
        *("read_aio", "read_backing_aio", "read_compressed"),
        *("write_aio", "write_compressed", "vmstate_load", "vmstate_save"),
        *("cow_read", "cow_write", "cor_write"),
        *("reftable_load", "reftable_grow", "reftable_update"),
        *("refblock_load", "refblock_update", "refblock_update_part"),
        *("refblock_alloc", "refblock_alloc_hookup", "refblock_alloc_write"),
        *("refblock_alloc_write_blocks", "refblock_alloc_write_table"),
        *("refblock_alloc_switch_table",),
        *("cluster_alloc", "cluster_alloc_bytes", "cluster_alloc_space"),
        *("cluster_free", "flush_to_os", "flush_to_disk"),
        *("empty_image_prepare", "none"),
        *("pwritev_rmw_head", "pwritev_rmw_after_head"),
        *("pwritev_rmw_tail", "pwritev_rmw_after_tail"),
        *("pwritev", "pwritev_zero", "pwritev_done"),
    )
)
"""What a rule can wait for. The drivers here don't tell of all."""

READ, WRITE, ZERO, DISCARD, FLUSH, STATUS = (
    *("read", "write", "write-zeroes", "discard", "flush", "block-status"),
)
_CHANGES: Final = (READ, WRITE, ZERO, DISCARD, FLUSH)

INJECT_ERROR: Final = "inject-error"
SET_STATE: Final = "set-state"
_KEYS: Final = {
    INJECT_ERROR: (
        *("event", "state", "errno", "sector", "once", "immediately", "iotype"),
    ),
    SET_STATE: ("event", "state", "new_state"),
}
_NUMBER: Final = re.compile(
    r"\s*([+-]?)(?:(0[xX])(?=[0-9a-fA-F]))?"
    r"((?(2)[0-9a-fA-F]+|(?:0[0-7]*|[1-9][0-9]*)))",
    re.ASCII,
)
"""As strtoull(3) has it, which is C's: 010 is eight."""
_LINE: Final = re.compile(r'([A-Za-z0-9_-]+)\s*=\s*(?:"([^"]*)"|([^"\s]+))')


@dataclass(slots=True, eq=False)
class Rule:
    """One rule.

    Attributes:
        event: what it waits for.
        state: the state that it asks for, 0 for any.
        new_state: the state that it sets; None for a rule that fails requests.
        error: the errno of these.
        first: byte of the file that they touch, -1 for any request.
        once: it is gone when it has failed one.
        kinds: of requests that it is about.
    """

    event: str
    state: int = 0
    new_state: int | None = None
    error: int = errno.EIO
    first: int = -1
    once: bool = False
    kinds: tuple[str, ...] = _CHANGES

    def fails(self, kind: str, offset: int, length: int) -> bool:
        """Whether it is about a request; a flush has no length."""
        touched = self.first < offset + length and offset < self.first + SECTOR_SIZE
        return kind in self.kinds and (self.first < 0 or (length > 0 and touched))


class Rules:
    """The rules of one file, and where they are.

    Attributes:
        state: the present state.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._rules: dict[str, list[Rule]] = {}
        for rule in rules:
            self._rules.setdefault(rule.event, []).append(rule)
        self._active: list[Rule] = []
        self.state = 1

    def announce(self, event: str) -> None:
        """Let the rules act that wait for ``event``: those that fail requests
        take the place of the ones before."""
        state = self.state
        matching = [
            rule for rule in self._rules.get(event, ()) if rule.state in (0, state)
        ]
        failing = [rule for rule in matching if rule.new_state is None]
        if failing:
            self._active = failing
        for rule in matching:
            if rule.new_state is not None:
                self.state = rule.new_state

    def error_for(self, kind: str, offset: int = 0, length: int = 0) -> int:
        """Return the errno that a request is to fail with, or 0."""
        for rule in self._active:
            if rule.fails(kind, offset, length):
                if rule.once and rule.error:
                    self._active.remove(rule)
                    self._rules[rule.event].remove(rule)
                return rule.error
        return 0

    def first_failing(self, kind: str, offset: int, length: int) -> int | None:
        """Return where the first sector in a range begins that a rule about
        sectors fails; None without any."""
        places = (
            max(rule.first, offset)
            for rule in self._active
            if rule.first >= 0 and rule.error and rule.fails(kind, offset, length)
        )
        return min(places, default=None)


def parse_config(data: bytes) -> list[Rule]:
    """Return the rules of a configuration file: sections of ``key = "value"``.

    Raises `ImageError`, with the number of the line.
    """
    if len(data) > MAX_CONFIG_LENGTH:
        raise ImageError(
            f"the blkdebug config file has more than {MAX_CONFIG_LENGTH} bytes"
        )
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError:
        raise ImageError("the blkdebug config file is no text") from None
    sections: list[tuple[str, dict[str, str]]] = []
    for number, line in enumerate(map(str.strip, lines), 1):
        # What is wrong is not shown: the file may be another one than meant.
        where = f"blkdebug config file, line {number}: "
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            if len(sections) == MAX_RULES:
                raise ImageError(f"{where}more than {MAX_RULES} rules")
            found = re.fullmatch(r'\[([a-z-]+)(?:\s+"[^"]*")?\]', line)
            if found is None or found[1] not in _KEYS:
                raise ImageError(f"{where}neither [{INJECT_ERROR}] nor [{SET_STATE}]")
            sections.append((found[1], {}))
        elif not sections:
            raise ImageError(f"{where}no group defined")
        elif (pair := _LINE.fullmatch(line)) is None:
            raise ImageError(f'{where}not KEY = "VALUE"')
        else:
            name, pairs = sections[-1]
            if pair[1] not in _KEYS[name]:
                raise ImageError(f"{where}[{name}] has no such option")
            # QEMU takes what is not quoted for nothing at all.
            pairs[pair[1]] = pair[2] or ""
    return [_rule(name, pairs) for name, pairs in sections]


def rules_of_pairs(pairs: Mapping[str, str]) -> list[Rule]:
    """Return the rules of keys such as ``inject-error.0.event``.

    Raises `ImageError`.
    """
    groups: dict[tuple[str, int], dict[str, str]] = {}
    for key, value in pairs.items():
        name, _, rest = key.partition(".")
        number, _, option = rest.partition(".")
        if not (number.isascii() and number.isdecimal() and len(number) < 10):
            raise ImageError(f"Parameter '{key}' is not {name}.NUMBER.OPTION")
        if option not in _KEYS[name]:
            raise ImageError(f"[{name}] section doesn't support the option '{option}'")
        groups.setdefault((name, int(number)), {})[option] = value
        if len(groups) > MAX_RULES:
            raise ImageError(f"more than {MAX_RULES} rules")
    return [_rule(name, groups[name, number]) for name, number in sorted(groups)]


def _rule(name: str, pairs: Mapping[str, str]) -> Rule:
    event = pairs.get("event")
    if event is None:
        raise ImageError("Missing event name for rule")
    if event not in EVENTS:
        raise ImageError(f"invalid parameter value: {event[:64]}")
    state = _number(pairs, "state", 0)
    if name == SET_STATE:
        return Rule(event, state, new_state=_number(pairs, "new_state", 0))
    kind = pairs.get("iotype")
    if kind is not None and kind not in (*_CHANGES, STATUS):
        raise ImageError(f"invalid parameter value: {kind[:64]}")
    error = _number(pairs, "errno", errno.EIO)
    if not 0 <= error <= _MAX_ERRNO:
        raise ImageError(f"Parameter 'errno' expects a number up to {_MAX_ERRNO}")
    sector = _number(pairs, "sector", -1)
    # Whether a request fails before or after it was given away is one here.
    _flag(pairs, "immediately")
    return Rule(
        event,
        state,
        error=error,
        first=sector * SECTOR_SIZE if sector >= 0 else -1,
        once=_flag(pairs, "once"),
        kinds=_CHANGES if kind is None else (kind,),
    )


def _number(pairs: Mapping[str, str], key: str, default: int) -> int:
    text = pairs.get(key)
    if text is None:
        return default
    found = _NUMBER.fullmatch(text)
    if found is None:
        raise ImageError(f"Parameter '{key}' expects a number")
    base = 16 if found[2] else 8 if found[3].startswith("0") else 10
    value = int(found[1] + found[3], base) if len(text) < 24 else _MAX_NUMBER
    if not -_MAX_NUMBER <= value < _MAX_NUMBER:
        raise ImageError(f"Value '{text[:64]}' is too large for parameter '{key}'")
    return value


def _flag(pairs: Mapping[str, str], key: str) -> bool:
    text = pairs.get(key, "off")
    if text not in BOOLEANS:
        raise ImageError(boolean_expected(key))
    return BOOLEANS[text]

"""Finding the zeroes in what was read."""

from functools import lru_cache

from nbdqcow.buffers import zero_bytes
from nbdqcow.types import Buffer

_zeroes = lru_cache(maxsize=4)(zero_bytes)


def is_zero(data: Buffer) -> bool:
    """Whether there is nothing but zeroes in ``data``."""
    if isinstance(data, memoryview):
        data = data.tobytes()
    return data.startswith(_zeroes(len(data)))


def data_runs(
    data: bytes | bytearray, unit: int, length: int = -1
) -> list[tuple[bool, int]]:
    """Return the runs of units that hold data, and of those that are zeroes:
    ``(has_data, length)``, neighbours differ. The last unit may be short.

    ``unit`` is bytes, a multiple of 8. Only the first ``length`` bytes of
    ``data`` count, if that is given. Mostly a unit that holds data begins
    with some, so one word of each is looked at first.
    """
    if length < 0:
        length = len(data)
    whole = length // unit * unit
    firsts = memoryview(data)[:whole].cast("Q")[:: unit // 8].tolist()
    if whole < length:
        firsts.append(0)
    if 0 not in firsts:
        return [(True, length)]
    zeroes = _zeroes(unit)
    runs: list[tuple[bool, int]] = []
    start = 0
    before: bool | None = None
    for index, first in enumerate(firsts):
        offset = index * unit
        has_data = bool(first) or not (
            data.startswith(zeroes, offset)
            if offset + unit <= length
            else is_zero(data[offset:length])
        )
        if has_data is not before:
            if before is not None:
                runs.append((before, offset - start))
            start, before = offset, has_data
    assert before is not None
    runs.append((before, length - start))
    return runs

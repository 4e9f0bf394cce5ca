"""What waits for what: epochs and ranges."""

import asyncio

import pytest

from nbdqcow.block.inflight import Epochs, InFlightRanges


def test_quiet_at_once_when_nothing_is_in_flight():
    epochs, calls = Epochs(), []
    epochs.when_quiet(lambda: calls.append(1))
    assert calls == [1]
    assert not epochs.busy


def test_only_what_came_before_is_waited_for():
    epochs, calls = Epochs(), []
    early = epochs.enter()
    epochs.when_quiet(lambda: calls.append("first"))
    late = epochs.enter()
    epochs.when_quiet(lambda: calls.append("second"))
    assert calls == []
    epochs.leave(early)
    assert calls == ["first"]
    assert epochs.busy
    epochs.leave(late)
    assert calls == ["first", "second"]
    assert not epochs.busy


def test_a_later_request_that_ends_first_releases_nothing():
    epochs, calls = Epochs(), []
    early = epochs.enter()
    epochs.when_quiet(lambda: calls.append("first"))
    late = epochs.enter()
    epochs.when_quiet(lambda: calls.append("second"))
    epochs.leave(late)
    assert calls == []
    epochs.leave(early)
    assert calls == ["first", "second"]


@pytest.mark.asyncio
async def test_quiet_as_a_coroutine():
    epochs = Epochs()
    token = epochs.enter()
    waiting = asyncio.create_task(epochs.quiet())
    await asyncio.sleep(0)
    assert not waiting.done()
    epochs.leave(token)
    await waiting


@pytest.mark.asyncio
async def test_ranges_wake_who_waits():
    ranges = InFlightRanges()
    assert not ranges
    first = ranges.add(0, 100)
    second = ranges.add(200, 300)
    assert ranges.find(100, 200) is None
    assert ranges.find(99, 100) is first
    assert ranges.first_overlap(50, 250) is first
    assert ranges.first_overlap(150, 250) is second
    waiting = asyncio.create_task(first.wait())
    await asyncio.sleep(0)
    ranges.remove(first)
    await waiting
    assert ranges.find(0, 100) is None

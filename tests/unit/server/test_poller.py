"""When the event loop looks for the next request without sleeping."""

import pytest

from nbdqcow.server import poller
from nbdqcow.server.poller import Poller


class Loop:
    """Holds what is to be called in the next turn."""

    def __init__(self):
        self.ready = []

    def call_soon(self, callback):
        self.ready.append(callback)

    def turn(self):
        ready, self.ready = self.ready, []
        for callback in ready:
            callback()


@pytest.fixture
def clock(monkeypatch):
    """The time in microseconds, as a list of one number."""
    now = [1_000_000]
    monkeypatch.setattr(poller.time, "perf_counter", lambda: now[0] / 1e6)
    monkeypatch.setattr(poller.os, "sched_getaffinity", lambda pid: {0, 1})
    return now


def test_close_requests_keep_the_loop_awake_for_a_while(clock):
    loop = Loop()
    polling = Poller(loop, 32)
    polling.served()
    assert loop.ready == [], "the first request says nothing of the next"
    clock[0] += 50
    polling.served()
    for _ in range(3):
        assert len(loop.ready) == 1
        clock[0] += 10
        loop.turn()
    clock[0] += 10
    loop.turn()
    assert loop.ready == []


def test_the_next_request_prolongs_it(clock):
    loop = Loop()
    polling = Poller(loop, 32)
    polling.served()
    for _ in range(5):
        clock[0] += 30
        polling.served()
        assert len(loop.ready) == 1, "one callback, however many requests"
        loop.turn()
    clock[0] += 33
    loop.turn()
    assert loop.ready == []


@pytest.mark.parametrize("gap", [65, 1_000_000])
def test_requests_apart_let_it_sleep(clock, gap):
    loop = Loop()
    polling = Poller(loop, 32)
    for _ in range(5):
        polling.served()
        clock[0] += gap
    assert loop.ready == []


def test_never_with_one_processor_or_switched_off(clock, monkeypatch):
    loop = Loop()
    off = Poller(loop, 0)
    monkeypatch.setattr(poller.os, "sched_getaffinity", lambda pid: {0})
    alone = Poller(loop, 32)
    for _ in range(3):
        off.served()
        alone.served()
    assert loop.ready == []

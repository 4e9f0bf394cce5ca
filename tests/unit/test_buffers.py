import mmap

import pytest

from nbdqcow.buffers import BufferPool

KiB, MiB = 1 << 10, 1 << 20


@pytest.mark.parametrize("length", [0, 1, 16 * KiB, 16 * KiB + 1, MiB - 1, MiB])
def test_a_released_buffer_comes_back(length):
    pool = BufferPool()
    first = pool.acquire(length)
    assert len(first) == length
    assert not first.readonly
    second = pool.acquire(length)
    assert first.obj is not second.obj
    pool.release(first)
    assert pool.acquire(length or 1).obj is first.obj
    assert pool.acquire(length).obj is not second.obj


def test_classes_do_not_mix():
    pool = BufferPool()
    small = pool.acquire(1000)
    pool.release(small)
    large = pool.acquire(100_000)
    assert len(large) == 100_000
    assert large.obj is not small.obj


def test_idle_memory_is_bounded():
    pool = BufferPool(max_idle=4 * MiB)
    views = [pool.acquire(MiB) for _ in range(10)]
    for view in views:
        pool.release(view)
    kept = {id(view.obj) for view in views}
    again = [pool.acquire(MiB) for _ in range(10)]
    assert sum(id(view.obj) in kept for view in again) == 4


def test_the_largest_are_not_kept():
    pool = BufferPool(max_idle=64 * MiB)
    view = pool.acquire(5 * MiB)
    assert len(view.obj) == 5 * MiB
    pool.release(view)
    assert pool.acquire(5 * MiB).obj is not view.obj


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def test_a_large_buffer_takes_memory_as_it_is_filled():
    before = _resident()
    view = BufferPool().acquire(256 * MiB)
    assert len(view) == 256 * MiB
    view[-1] = view[MiB] = 1
    assert _resident() - before < 128 * MiB


def test_too_large_a_buffer_is_a_memory_error():
    with pytest.raises(MemoryError):
        BufferPool().acquire(1 << 60)

"""A file against a bytearray: any operations, all cache modes."""

import asyncio
import shutil
import tempfile
from pathlib import Path

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdqcow.storage.file import FileStorage
from nbdqcow.storage.mapped import MIN_LENGTH
from nbdqcow.storage.opening import CACHE_MODES

MAX_LENGTH = 300_000

positions = st.one_of(
    st.integers(0, MAX_LENGTH),
    st.integers(0, MAX_LENGTH // 512).map(lambda n: n * 512),
    st.integers(0, MAX_LENGTH // 4096).map(lambda n: n * 4096),
)
lengths = st.one_of(
    st.integers(0, 1500),
    st.integers(0, 100_000),
    st.sampled_from([512, 4096, 65536, 131072]),
)
operations = st.one_of(
    st.tuples(st.just("write"), positions, lengths, st.booleans()),
    st.tuples(st.just("inline"), positions, lengths, st.booleans()),
    st.tuples(st.just("zero"), positions, lengths, st.booleans()),
    st.tuples(st.just("discard"), positions, lengths, st.booleans()),
    st.tuples(st.just("truncate"), positions, st.just(0), st.booleans()),
    st.tuples(st.just("read"), positions, lengths, st.booleans()),
    st.tuples(st.just("status"), positions, lengths, st.booleans()),
    st.tuples(st.just("flush"), st.just(0), st.just(0), st.booleans()),
    st.tuples(st.just("reopen"), st.just(0), st.just(0), st.booleans()),
)


def read_model(model: bytearray, offset: int, length: int) -> bytes:
    return bytes(model[offset : offset + length]).ljust(length, b"\0")


def write_model(model: bytearray, offset: int, data: bytes) -> None:
    if data:
        model.extend(bytes(max(0, offset + len(data) - len(model))))
        model[offset : offset + len(data)] = data


class Machine:
    """One file under test and its model."""

    def __init__(self, filename: str, cache: str) -> None:
        self.filename = filename
        self.cache = cache
        self.model = bytearray()
        self.nb_done = 0

    async def run(self, steps: list[tuple[str, int, int, bool]]) -> None:
        self.storage = await FileStorage.open(self.filename, cache=self.cache)
        for kind, offset, length, flag in steps:
            self.nb_done += 1
            await getattr(self, kind)(offset, length, flag)
            assert self.storage.length == len(self.model), (kind, offset, length)
        await self.check(0, len(self.model) + 100)
        await self.storage.close()
        assert Path(self.filename).read_bytes() == self.model

    def make_data(self, length: int) -> bytes:
        return bytes((self.nb_done * 7 + i) % 251 + 1 for i in range(251)) * (
            length // 251 + 1
        )

    async def write(self, offset: int, length: int, fua: bool) -> None:
        data = self.make_data(length)[:length]
        middle = length // 3
        await self.storage.pwritev(
            offset, [data[:middle], memoryview(data)[middle:]], fua=fua
        )
        write_model(self.model, offset, data)

    async def inline(self, offset: int, length: int, flag: bool) -> None:
        data = self.make_data(length)[:length]
        if self.storage.try_pwrite(offset, data):
            write_model(self.model, offset, data)

    async def zero(self, offset: int, length: int, may_unmap: bool) -> None:
        await self.storage.write_zeroes(offset, length, may_unmap=may_unmap)
        write_model(self.model, offset, bytes(length))

    async def discard(self, offset: int, length: int, flag: bool) -> None:
        await self.storage.discard(offset, length)
        # Here it happens to zero: all these file systems can punch holes.
        end = min(offset + length, len(self.model))
        if offset < end:
            self.model[offset:end] = bytes(end - offset)

    async def truncate(self, length: int, _: int, flag: bool) -> None:
        await self.storage.truncate(length)
        del self.model[length:]
        self.model.extend(bytes(length - len(self.model)))

    async def read(self, offset: int, length: int, flag: bool) -> None:
        await self.check(offset, length)

    async def check(self, offset: int, length: int) -> None:
        expected = read_model(self.model, offset, length)
        inline = self.storage.try_pread(offset, length)
        assert inline is None or inline == expected
        assert await self.storage.pread(offset, length) == expected
        view = self.storage.try_view(offset, length)
        if view is not None:
            assert length >= MIN_LENGTH
            assert offset + length <= len(self.model)
            assert view == expected

    async def status(self, offset: int, length: int, flag: bool) -> None:
        end = offset + length
        while offset < end:
            allocated, run = await self.storage.block_status(offset, end - offset)
            assert 1 <= run <= end - offset
            if not allocated:
                assert not any(read_model(self.model, offset, run))
            offset += run

    async def flush(self, _: int, __: int, flag: bool) -> None:
        await self.storage.flush()

    async def reopen(self, _: int, __: int, flag: bool) -> None:
        await self.storage.close()
        assert Path(self.filename).read_bytes() == self.model
        self.storage = await FileStorage.open(self.filename, cache=self.cache)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("base", [None, "/dev/shm"])
@pytest.mark.parametrize("cache", list(CACHE_MODES))
def test_behaves_as_a_bytearray(cache: str, base: str | None, loop: str) -> None:
    factory = uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop

    @settings(
        max_examples=25,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.lists(operations, min_size=5, max_size=30))
    def run(steps: list[tuple[str, int, int, bool]]) -> None:
        directory = tempfile.mkdtemp(prefix="nbdqcow-", dir=base)
        try:
            path = Path(directory) / "disk"
            path.write_bytes(b"")
            with asyncio.Runner(loop_factory=factory) as runner:
                runner.run(Machine(str(path), cache).run(steps))
        finally:
            shutil.rmtree(directory)

    run()

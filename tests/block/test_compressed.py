"""Compressed clusters, read and written: what we make is what QEMU finds right."""

import asyncio
import errno
import gc
import random
import subprocess
import threading

import pytest

from nbdqcow import open_image, pool
from nbdqcow.cli.img import main
from nbdqcow.errors import BlockError, NotSupported
from nbdqcow.formats import memory_share
from nbdqcow.formats.qcow2 import codec
from nbdqcow.formats.qcow2.compress import CompressedClusters
from nbdqcow.formats.qcow2.entries import compressed_range
from tests.block.qemu import check, create, qemu_img

MiB = 1 << 20


def content(rnd, length):
    """Return zeroes, noise, patterns and texts."""
    pieces = []
    while length > 0:
        n = min(length, rnd.randrange(1, 200_000))
        pieces.append(
            rnd.choice(
                (
                    lambda n: bytes(n),
                    rnd.randbytes,
                    lambda n: (b"pattern %d " % n * n)[:n],
                    lambda n: bytes(rnd.choices(b"abcdefgh \n", k=n)),
                )
            )(n)
        )
        length -= n
    return b"".join(pieces)


def compressible(rnd, length):
    blocks = (rnd.randbytes(1024) * 4 for _ in range(-(-length // 4096)))
    return b"".join(blocks)[:length]


GEOMETRIES = [
    {},
    {"compression_type": "zstd"},
    {"compat": "0.10"},
    {"cluster_size": 512},
    {"cluster_size": 4096, "refcount_bits": 1, "compression_type": "zstd"},
    {"refcount_bits": 2},
    {"cluster_size": 2 * MiB, "refcount_bits": 64},
    {"extended_l2": "on"},
    {"extended_l2": "on", "cluster_size": 16384, "compression_type": "zstd"},
]


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_written_and_read_back_by_both(tmp_path, seed, options):
    rnd = random.Random(seed)
    size = 3 * MiB + 1536
    data = content(rnd, size)
    raw, ours, theirs = (tmp_path / name for name in ("raw", "ours", "theirs"))
    raw.write_bytes(data)
    create(ours, size, **options)
    text = ",".join(f"{k}={v}" for k, v in options.items())
    words = ["-o", text] if text else []
    qemu_img("convert", "-cf", "raw", "-O", "qcow2", *words, raw, theirs)

    async def run():
        async with open_image(ours) as node:
            step = max(node.driver.cluster_size, 256 << 10)
            # Several at once, as convert does.
            await asyncio.gather(
                *(
                    node.pwrite_compressed(offset, data[offset : offset + step])
                    for offset in range(0, size, step)
                )
            )
            assert bytes(await node.pread(0, size)) == data
        for path in (ours, theirs):
            async with open_image(path, read_only=True) as node:
                assert bytes(await node.pread(0, size)) == data
                for _ in range(100):
                    offset = rnd.randrange(size)
                    length = rnd.randrange(min(200_000, size - offset) + 1)
                    got = node.try_pread(offset, length)
                    if got is None:
                        got = await node.pread(offset, length)
                    assert bytes(got) == data[offset : offset + length]

    asyncio.run(run())
    figures = check(ours)
    assert figures["compressed-clusters"]
    assert "identical" in qemu_img("compare", ours, raw)
    if options.get("refcount_bits", 16) == 16:
        # As densely packed as QEMU has it, give or take the compressor.
        assert ours.stat().st_size < theirs.stat().st_size * 1.2
    # QEMU goes on where we left.
    subprocess.run(
        ["qemu-io", "-c", "write -P 7 100000 1000000", "-c", "discard 0 500000", ours],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    check(ours)


@pytest.mark.parametrize("extended_l2", ["off", "on"])
def test_overwriting_frees_what_was_there(tmp_path, seed, extended_l2):
    path = create(tmp_path / "a", 4 * MiB, extended_l2=extended_l2)
    rnd = random.Random(seed)
    model = bytearray(4 * MiB)

    async def run():
        async with open_image(path) as node:
            for round_ in range(120):
                offset = rnd.randrange(64) << 16
                kind = rnd.randrange(5)
                if kind < 3:
                    data = compressible(rnd, rnd.choice((1, 2)) << 16)
                    data = data[: len(model) - offset]
                    await node.pwrite_compressed(offset, data)
                elif kind == 3:
                    offset += rnd.randrange(60_000)
                    data = rnd.randbytes(3000)
                    await node.pwrite(offset, data)
                else:
                    data = bytes(65536)
                    await node.discard(offset, 65536)
                model[offset : offset + len(data)] = data
                if round_ % 5 == 0:
                    await node.flush()
                if round_ % 20 == 0:
                    assert bytes(await node.pread(0, node.size)) == model
            assert bytes(await node.pread(0, node.size)) == model
            await node.driver.tasks.settle()

    asyncio.run(run())
    check(path)
    # What was freed was used again.
    assert path.stat().st_size < 5 * MiB


def test_a_place_that_is_used_again_is_read_anew(tmp_path, seed):
    """The same descriptor names other bytes after its space was given back."""
    path = create(tmp_path / "a", 4 * MiB)
    rnd = random.Random(seed)

    async def run():
        async with open_image(path) as node:
            seen = set()
            for _ in range(40):
                data = compressible(rnd, 65536)
                await node.pwrite_compressed(0, data)
                descriptor = node.driver.try_map(0, 65536)[1]
                seen.add(descriptor)
                assert bytes(await node.pread(0, 65536)) == data
                assert bytes(node.try_pread(100, 100)) == data[100:200]
                await node.discard(0, 65536)
                await node.flush()
                await node.driver.tasks.settle()
            return seen

    assert len(asyncio.run(run())) < 20
    check(path)


def test_snapshots_keep_compressed_clusters(tmp_path, seed):
    path = create(tmp_path / "a", MiB)
    rnd = random.Random(seed)
    first, second = compressible(rnd, MiB), compressible(rnd, MiB)

    async def run():
        async with open_image(path) as node:
            await node.pwrite_compressed(0, first)
            await node.driver.snapshot_create("one")
            await node.pwrite_compressed(0, second)
            await node.driver.snapshot_create("two")
            await node.driver.snapshot_apply("one")
            assert bytes(await node.pread(0, MiB)) == first
            await node.pwrite_compressed(65536, second[65536:131072])
            await node.driver.snapshot_delete("one")
            await node.pwrite_compressed(0, first)
            await node.driver.snapshot_apply("two")
            assert bytes(await node.pread(0, MiB)) == second

    asyncio.run(run())
    check(path)


@pytest.mark.parametrize("compression_type", ["zlib", "zstd"])
def test_a_cluster_is_decompressed_once(tmp_path, seed, monkeypatch, compression_type):
    data = compressible(random.Random(seed), MiB)
    raw, path = tmp_path / "raw", tmp_path / "a"
    raw.write_bytes(data)
    option = f"compression_type={compression_type}"
    qemu_img("convert", "-cf", "raw", "-O", "qcow2", "-o", option, raw, path)
    calls = []

    async def run():
        async with open_image(path, read_only=True) as node:
            clusters = node.driver.compressed
            decompress = clusters._decompress

            def counted(*arguments):
                calls.append(1)
                return decompress(*arguments)

            clusters._decompress = counted
            offsets = list(range(0, MiB, 4096))
            pieces = await asyncio.gather(*(node.pread(o, 4096) for o in offsets))
            assert b"".join(map(bytes, pieces)) == data
            assert len(calls) == 16
            views, token = node.try_pread_views(0, MiB)
            assert b"".join(map(bytes, views)) == data
            node.release(token)

    asyncio.run(run())
    assert len(calls) == 16


def test_the_cache_is_bounded_in_bytes(tmp_path, seed):
    data = compressible(random.Random(seed), 2 * MiB)
    raw, path = tmp_path / "raw", tmp_path / "a"
    raw.write_bytes(data)
    qemu_img("convert", "-cf", "raw", "-O", "qcow2", raw, path)

    async def run():
        async with open_image(path, read_only=True) as node:
            driver = node.driver
            driver.compressed = CompressedClusters(driver, cache_bytes=256 << 10)
            for length in (4096, 65536, 100_000, MiB):
                pieces = [
                    bytes(await node.pread(offset, min(length, node.size - offset)))
                    for offset in range(0, 2 * MiB, length)
                ]
                assert b"".join(pieces) == data
                kept = driver.compressed._cache
                assert sum(map(len, kept.values())) <= 256 << 10
                assert driver.compressed._nb_bytes == sum(map(len, kept.values()))
            # The last ones are there, the first ones are not.
            assert driver.try_map(0, 4096)[1] not in kept
            assert driver.try_map(2 * MiB - 4096, 4096)[1] in kept

    asyncio.run(run())


@pytest.mark.parametrize("format_", ["qcow", "qcow2"])
def test_images_share_the_memory_for_what_they_keep(
    tmp_path, seed, monkeypatch, format_
):
    monkeypatch.setattr(memory_share, "_LEAST_SHARE", 65536)
    monkeypatch.setattr(memory_share, "default_budget", lambda: MiB)
    data = compressible(random.Random(seed), 2 * MiB)
    raw = tmp_path / "raw"
    raw.write_bytes(data)
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        assert main(["convert", "-cf", "raw", "-O", format_, str(raw), str(path)]) == 0

    def kept(node):
        return sum(map(len, node.driver.compressed._cache.values()))

    async def run():
        async with open_image(paths[0], read_only=True) as first:
            assert bytes(await first.pread(0, 2 * MiB)) == data
            for offset in range(0, 2 * MiB, 4096):
                await first.pread(offset, 4096)
            assert MiB // 2 < kept(first) <= MiB
            async with open_image(paths[1], read_only=True) as second:
                for offset in range(0, 2 * MiB, 4096):
                    await first.pread(offset, 4096)
                    await second.pread(offset, 4096)
                assert 0 < kept(first) <= MiB // 2
                assert 0 < kept(second) <= MiB // 2
            options = {"compressed_cache_size": 200_000}
            async with open_image(
                paths[2], read_only=True, driver_options=options
            ) as third:
                for offset in range(0, 2 * MiB, 4096):
                    await first.pread(offset, 4096)
                    await third.pread(offset, 4096)
                assert MiB // 2 < kept(first) <= MiB
                assert 0 < kept(third) <= 200_000

    asyncio.run(run())


def test_cancelled_readers_leave_the_cluster_to_others(tmp_path, seed):
    data = compressible(random.Random(seed), MiB)
    raw, path = tmp_path / "raw", tmp_path / "a"
    raw.write_bytes(data)
    qemu_img("convert", "-cf", "raw", "-O", "qcow2", raw, path)

    async def run():
        async with open_image(path, read_only=True) as node:
            readers = [asyncio.create_task(node.pread(0, MiB)) for _ in range(4)]
            await asyncio.sleep(0)
            for reader in readers[:3]:
                reader.cancel()
            assert bytes(await readers[3]) == data
            await asyncio.gather(*readers[:3], return_exceptions=True)
            assert not node.driver.compressed._loading
            assert not node.driver.epochs.busy

    asyncio.run(run())


def test_space_that_changes_hands_while_a_thread_is_at_it(tmp_path, seed):
    """What was read of it before must not be kept as what is there now."""
    rnd = random.Random(seed)
    data = compressible(rnd, MiB)
    raw, path = tmp_path / "raw", tmp_path / "a"
    raw.write_bytes(data)
    qemu_img("convert", "-cf", "raw", "-O", "qcow2", raw, path)

    async def run():
        async with open_image(path) as node:
            clusters = node.driver.compressed
            await node.pread(15 << 16, 1)
            gate = threading.Event()
            decompress = clusters._decompress

            def waits(*arguments):
                assert threading.get_ident() == main or gate.wait(20)
                return decompress(*arguments)

            main = threading.get_ident()
            clusters._decompress = waits
            # The loop takes the first one, a thread the second.
            assert bytes(node.try_pread(0, 4096)) == data[:4096]
            assert node.try_pread(1 << 16, 4096) is None
            descriptor = node.driver.try_map(1 << 16, 1)[1]
            assert descriptor in clusters._loading
            reader = asyncio.create_task(node.pread(1 << 16, 4096))
            await asyncio.sleep(0)
            clusters.drop(descriptor)
            gate.set()
            assert bytes(await reader) == data[1 << 16 :][:4096]
            assert not clusters._loading
            gate.clear()
            clusters.drop(descriptor)
            assert bytes(node.try_pread(2 << 16, 4096)) == data[2 << 16 :][:4096]
            assert node.try_pread(1 << 16, 4096) is None
            clusters.drop(descriptor)
            gate.set()
            await clusters.threads.wait_idle()
            await asyncio.sleep(0)
            assert descriptor not in clusters._cache

    asyncio.run(run())


def test_a_damaged_cluster_is_an_error_of_its_own_read(tmp_path, seed):
    data = compressible(random.Random(seed), MiB)
    raw, path = tmp_path / "raw", tmp_path / "a"
    raw.write_bytes(data)
    qemu_img("convert", "-cf", "raw", "-O", "qcow2", raw, path)

    async def run():
        async with open_image(path) as node:
            host_offset = node.driver.try_map(5 << 16, 1)[1] & ((1 << 54) - 1)
            await node.driver.storage.pwritev(host_offset, [b"\xff" * 100])
            with pytest.raises(BlockError, match="damaged compressed cluster") as error:
                await node.pread(0, MiB)
            assert error.value.errno == 5
            assert bytes(await node.pread(0, 5 << 16)) == data[: 5 << 16]
            # It can be overwritten as a whole.
            await node.pwrite_compressed(5 << 16, data[5 << 16 : 6 << 16])
            assert bytes(await node.pread(0, MiB)) == data

    asyncio.run(run())
    check(path)


@pytest.mark.parametrize("cluster_size", [16384, 65536, 524288])
def test_parts_of_a_damaged_cluster_are_errors(tmp_path, seed, cluster_size):
    """Whoever decompresses it, and whoever waits for that."""
    # Its stream is short enough to be read at once.
    data = b"".join(i.to_bytes(4) * 256 for i in range(2 * MiB // 1024))
    raw, path = tmp_path / "raw", tmp_path / "a"
    raw.write_bytes(data)
    option = f"cluster_size={cluster_size}"
    qemu_img("convert", "-cf", "raw", "-O", "qcow2", "-o", option, raw, path)

    async def run():
        async with open_image(path) as node:
            driver = node.driver
            descriptor = driver.try_map(cluster_size, 1)[1]
            offset, length = compressed_range(descriptor, driver.cluster_bits)
            await driver.storage.pwritev(offset, [b"\xff" * length])
            for nb_readers in (1, 1, 5, 1):
                readers = [
                    node.pread(cluster_size + i * 512, 512) for i in range(nb_readers)
                ]
                async with asyncio.timeout(20):
                    found = await asyncio.gather(*readers, return_exceptions=True)
                assert [each.errno for each in found] == [errno.EIO] * nb_readers
            assert not driver.compressed._loading

    asyncio.run(run())


def test_a_read_without_a_thread_fails_alone(tmp_path, monkeypatch):
    """Nobody waits for what no thread has begun."""
    raw, path = tmp_path / "raw", tmp_path / "a"
    raw.write_bytes(bytes(range(256)) * (MiB // 256))
    qemu_img(*("convert", "-cf", "raw", "-O", "qcow2"), raw, path)

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    async def run():
        async with open_image(path) as node:
            await node.pread(0, 512)
            compressed = node.driver.compressed
            # The loop has done its share in this turn.
            compressed._inline_left = 0
            with monkeypatch.context() as patch:
                patch.setattr(pool._Workers, "submit", refuse)
                with pytest.raises(RuntimeError, match="can't start"):
                    node.try_pread(65536, 512)
            async with asyncio.timeout(20):
                assert await node.pread(65536, 4) == bytes(range(4))

    asyncio.run(run())


def test_a_failed_write_leaves_the_old_cluster(tmp_path, seed, monkeypatch):
    path = create(tmp_path / "a", MiB)
    rnd = random.Random(seed)
    old, new = compressible(rnd, 65536), compressible(rnd, 65536)

    async def run():
        async with open_image(path) as node:
            await node.pwrite_compressed(0, old)
            storage = node.driver.storage

            async def broken(*arguments, **options):
                raise OSError(28, "No space left on device")

            with monkeypatch.context() as patch:
                patch.setattr(storage, "try_pwritev", lambda *_: False)
                patch.setattr(storage, "pwritev", broken)
                with pytest.raises(OSError, match="No space"):
                    await node.pwrite_compressed(0, new)
            assert bytes(await node.pread(0, 65536)) == old
            await node.pwrite_compressed(65536, new)
            assert bytes(await node.pread(0, 131072)) == old + new

    asyncio.run(run())
    check(path)


def test_zero_clusters_take_no_space(tmp_path):
    path = create(tmp_path / "a", MiB)

    async def run():
        async with open_image(path) as node:
            await node.pwrite_compressed(0, bytes(MiB))
            assert await node.reads_zero(0, MiB)
            await node.pwrite_compressed(0, b"x" * 65536)
            await node.pwrite_compressed(0, bytes(65536))
            assert bytes(await node.pread(0, 65536)) == bytes(65536)

    asyncio.run(run())
    assert check(path).get("allocated-clusters", 0) == 0


def test_zeroes_hide_the_backing_file(tmp_path):
    base = create(tmp_path / "base", MiB)
    subprocess.run(
        ["qemu-io", "-c", "write -P 9 0 1M", base],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for compat in ("0.10", "1.1"):
        path = tmp_path / compat
        words = ("-F", "qcow2", "-b", base, "-o", f"compat={compat}")
        qemu_img("create", "-qf", "qcow2", *words, path)

        async def run(path=path):
            async with open_image(path) as node:
                await node.pwrite_compressed(65536, bytes(65536))
                expected = b"\x09" * 65536 + bytes(65536) + b"\x09" * 65536
                assert bytes(await node.pread(0, 3 * 65536)) == expected

        asyncio.run(run())
        check(path)


@pytest.mark.parametrize("extended_l2", ["off", "on"])
def test_noise_over_parts_of_clusters(tmp_path, seed, extended_l2):
    """What gets no shorter goes where any write would: around what is there."""
    path = create(tmp_path / "a", MiB, extended_l2=extended_l2)
    rnd = random.Random(seed)
    noise = rnd.randbytes(MiB)

    async def run():
        async with open_image(path) as node:
            for cluster in range(0, MiB, 65536):
                for _ in range(rnd.randrange(4)):
                    start = cluster + rnd.randrange(31) * 2048
                    await node.pwrite(start, rnd.randbytes(rnd.choice((512, 2048))))
            # Others write to the same clusters meanwhile.
            busy = [
                asyncio.create_task(node.pwrite(o + 4096, noise[o + 4096 : o + 6144]))
                for o in range(0, MiB, 65536)
            ]
            await asyncio.sleep(0)
            await node.pwrite_compressed(0, noise)
            await asyncio.gather(*busy)
            assert bytes(await node.pread(0, MiB)) == noise

    asyncio.run(run())
    check(path)
    (tmp_path / "raw").write_bytes(noise)
    assert "identical" in qemu_img("compare", "-F", "raw", path, tmp_path / "raw")


def test_only_whole_clusters_of_images_that_can(tmp_path):
    path = create(tmp_path / "a", MiB + 512)
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(65536))

    async def run():
        async with open_image(path) as node:
            for offset, length in ((512, 65536), (0, 512), (MiB, 100)):
                with pytest.raises(BlockError, match="only whole clusters"):
                    await node.pwrite_compressed(offset, b"x" * length)
            with pytest.raises(BlockError) as error:
                await node.pwrite_compressed(2 * MiB, b"x" * 65536)
            assert error.value.errno == errno.ENOSPC
            await node.pwrite_compressed(MiB, b"y" * 512)
            assert bytes(await node.pread(MiB, 512)) == b"y" * 512
        async with open_image(raw, format="raw") as node:
            with pytest.raises(NotSupported):
                await node.pwrite_compressed(0, b"x" * 65536)
        async with open_image(path, read_only=True) as node:
            with pytest.raises(BlockError, match="read-only"):
                await node.pwrite_compressed(0, b"x" * 65536)

    asyncio.run(run())
    check(path)


def test_encrypted_images_are_not_compressed(tmp_path):
    path = tmp_path / "a"
    qemu_img(
        *("create", "-qf", "qcow2", "--object", "secret,id=s,data=pass"),
        *("-o", "encrypt.format=aes,encrypt.key-secret=s", path, "1M"),
    )

    async def run():
        options = {"secret": b"pass"}
        async with open_image(path, driver_options=options) as node:
            with pytest.raises(NotSupported, match="at the same time"):
                await node.pwrite_compressed(0, b"x" * 65536)

    asyncio.run(run())


def test_streams_are_placed_in_the_order_of_the_calls(tmp_path, seed, monkeypatch):
    """However long the compressing of each takes."""
    path = create(tmp_path / "a", 4 * MiB)
    data = compressible(random.Random(seed), 4 * MiB)

    async def run():
        async with open_image(path) as node:
            await node.pwrite_compressed(0, data)
            places = []
            for offset in range(0, 4 * MiB, 65536):
                descriptor = node.driver.try_map(offset, 65536)[1]
                places.append(descriptor & ((1 << 54) - 1))
            assert places == sorted(places)

    asyncio.run(run())
    assert codec.deflate_blocking(data[:65536])
    check(path)


def test_a_failed_compression_that_nobody_waits_for(tmp_path, caplog):
    """asyncio says nothing of it, which would be a traceback."""
    path = create(tmp_path / "disk")

    async def cancelled():
        async with open_image(path) as node:
            clusters = node.driver.compressed

            def fail(data):
                raise MemoryError

            clusters.compress = fail
            async with clusters.placing:
                writing = asyncio.create_task(node.driver.write_compressed(0, b"x" * 9))
                await asyncio.sleep(0.2)
                writing.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await writing

    asyncio.run(cancelled())
    gc.collect()
    assert caplog.records == []

"""Internal snapshots of an open image: what QEMU sees of them, and a model."""

import asyncio
import errno
import json
import os
import random
import subprocess

import pytest

from nbdqcow import open_image
from nbdqcow.errors import BlockError
from nbdqcow.formats.qcow2 import snapshot
from nbdqcow.formats.qcow2.generation import Generation
from tests.block.qemu import check, create, qemu_img

MiB = 1 << 20
SEED = int(os.environ.get("NBDQCOW_SEED", random.randrange(1 << 32)))


def snapshots(path):
    return json.loads(qemu_img("info", "--output=json", path)).get("snapshots", [])


def content(path, *options):
    raw = path.with_suffix(".raw")
    qemu_img("convert", *options, "-O", "raw", path, raw)
    return raw.read_bytes()


def check_all(path, expected, names):
    """The disk and its snapshots, by name, are what they should be, says QEMU."""
    check(path)
    assert content(path) == expected
    for name, data in names.items():
        assert content(path, "-l", name) == data


@pytest.mark.parametrize("version", ["0.10", "1.1"])
def test_qemu_lists_applies_and_deletes_ours(tmp_path, version):
    path = create(tmp_path / "a", compat=version)

    async def run():
        async with open_image(path) as node:
            await node.pwrite(0, b"1" * MiB)
            first = await node.driver.snapshot_create(
                "first", date_nanoseconds=1_600_000_000_000_000_007
            )
            assert first.id == "1"
            await node.pwrite(100_000, b"2" * MiB)
            second = await node.driver.snapshot_create("second", icount=77)
            assert second.id == "2"
            await node.discard(0, 4 * MiB)
            await node.pwrite(70_000, b"3" * 1000)
            assert await node.driver.snapshot_list() == [first, second]

    asyncio.run(run())
    check(path)
    listed = snapshots(path)
    assert [(s["id"], s["name"]) for s in listed] == [("1", "first"), ("2", "second")]
    assert (listed[0]["date-sec"], listed[0]["date-nsec"]) == (1_600_000_000, 7)
    assert "icount" not in listed[0]
    assert listed[1]["icount"] == 77
    one = b"1" * MiB + bytes(3 * MiB)
    two = one[:100_000] + b"2" * MiB
    assert content(path, "-l", "first") == one
    assert content(path, "-l", "second") == two + bytes(4 * MiB - len(two))
    now = bytes(70_000) + b"3" * 1000
    assert content(path) == now + bytes(4 * MiB - len(now))
    qemu_img("snapshot", "-a", "first", path)
    check(path)
    assert content(path) == one
    qemu_img("snapshot", "-d", "first", path)
    check(path)
    qemu_img("snapshot", "-d", "second", path)
    check(path)
    assert content(path) == one


def test_new_tables_take_no_space_for_zeroes_at_their_end(tmp_path):
    """The disk may be nearly full. Where other things were, zeroes are written."""
    path = create(tmp_path / "a")

    async def run():
        async with open_image(path) as node:
            await node.pwrite(0, b"1" * MiB)
            await node.flush()
            before = path.stat().st_blocks * 512
            await node.driver.snapshot_create("first")
            assert path.stat().st_blocks * 512 - before < 32 << 10
            await node.pwrite(MiB, b"\xff" * 2 * MiB)
            await node.flush()
            await node.discard(MiB, 2 * MiB)
            await node.flush()
            await node.driver.tasks.settle()
            await node.driver.snapshot_create("second")
            await node.driver.snapshot_delete("first")
            await node.driver.snapshot_apply("second")

    asyncio.run(run())
    check(path)
    assert path.stat().st_size % 65536 == 0
    assert content(path) == b"1" * MiB + bytes(3 * MiB)


def test_we_apply_and_delete_those_of_qemu(tmp_path):
    path = create(tmp_path / "a")
    write = ("qemu-io", "-f", "qcow2", str(path), "-c")
    subprocess.run([*write, "write -P 1 0 2M"], check=True, stdout=-3)
    qemu_img("snapshot", "-c", "first", path)
    subprocess.run([*write, "write -P 2 1M 2M"], check=True, stdout=-3)
    qemu_img("snapshot", "-c", "second", path)
    subprocess.run([*write, "write -z 0 4M"], check=True, stdout=-3)

    async def run():
        async with open_image(path) as node:
            await node.driver.snapshot_apply("first")
            assert bytes(await node.pread(0, 4 * MiB)) == b"\1" * 2 * MiB + bytes(
                2 * MiB
            )
            await node.pwrite(0, b"4" * 65536)
            assert (await node.driver.snapshot_create("third")).id == "3"
            await node.driver.snapshot_delete("1")

    asyncio.run(run())
    check(path)
    assert [s["name"] for s in snapshots(path)] == ["second", "third"]
    assert content(path, "-l", "second") == (
        b"\1" * MiB + b"\2" * 2 * MiB + bytes(MiB)
    )  # fmt: skip
    assert content(path) == b"4" * 65536 + b"\1" * (2 * MiB - 65536) + bytes(2 * MiB)

    async def delete_all():
        async with open_image(path) as node:
            await node.driver.snapshot_delete("third")
            await node.driver.snapshot_delete("second")

    asyncio.run(delete_all())
    assert check(path)["allocated-clusters"] == 32


def test_a_snapshot_that_is_not_there(tmp_path):
    path = create(tmp_path / "a")

    async def run():
        async with open_image(path) as node:
            for operation in (
                node.driver.snapshot_apply,
                node.driver.snapshot_delete,
            ):
                with pytest.raises(BlockError, match="there is no snapshot 'x'"):
                    await operation("x")

    asyncio.run(run())
    check(path)


def test_counts_of_one_bit_leave_no_room_for_a_snapshot(tmp_path):
    path = create(tmp_path / "a", refcount_bits=1)

    async def run():
        async with open_image(path) as node:
            await node.pwrite(0, b"1" * MiB)
            with pytest.raises(BlockError, match="refcount would exceed 1"):
                await node.driver.snapshot_create("x")
            await node.pwrite(MiB, b"2" * MiB)

    asyncio.run(run())
    check(path)
    assert content(path)[: 2 * MiB] == b"1" * MiB + b"2" * MiB


def test_an_image_that_changed_its_size(tmp_path):
    path = create(tmp_path / "a", MiB, cluster_size=512)
    subprocess.run(["qemu-io", "-c", "write -P 7 0 1M", path], check=True, stdout=-3)
    qemu_img("snapshot", "-c", "small", path)
    qemu_img("resize", path, "40M")
    subprocess.run(["qemu-io", "-c", "write -P 8 39M 1M", path], check=True, stdout=-3)
    qemu_img("snapshot", "-c", "large", path)

    async def apply(name):
        async with open_image(path) as node:
            await node.driver.snapshot_apply(name)
            return node.driver.size

    assert asyncio.run(apply("small")) == MiB
    check(path)
    assert content(path) == b"\7" * MiB
    assert asyncio.run(apply("large")) == 40 * MiB
    check(path)
    assert content(path) == b"\7" * MiB + bytes(38 * MiB) + b"\10" * MiB


class Guest:
    """Writes at random, each byte by one client only, and knows the content."""

    def __init__(self, node, rnd):
        self.node, self.rnd = node, rnd
        self.model = bytearray(node.size)
        self.busy = []

    async def client(self, nb_requests):
        node, rnd = self.node, self.rnd
        for _ in range(nb_requests):
            length = rnd.choice((1, 512, 4096, 10_000, 70_000))
            offset = rnd.randrange(node.size - length)
            if rnd.random() < 0.4:
                offset, length = offset & ~0xFFF, max(length & ~0xFFF, 4096)
            if any(a < offset + length and offset < b for a, b in self.busy):
                continue
            self.busy.append((offset, offset + length))
            kind = rnd.choices(("write", "zero", "discard"), (6, 1, 1))[0]
            if kind == "write":
                data = rnd.randbytes(length)
                if not node.try_pwrite(offset, data):
                    await node.pwrite(offset, data)
                self.model[offset : offset + length] = data
            elif kind == "zero":
                await node.write_zeroes(offset, length)
                self.model[offset : offset + length] = bytes(length)
            else:
                size = node.driver.cluster_size
                start, end = -(-offset // size) * size, (offset + length) // size * size
                if start < end:
                    await node.discard(start, end - start)
                    self.model[start:end] = bytes(end - start)
            self.busy.remove((offset, offset + length))
            if rnd.random() < 0.1:
                await node.flush()


@pytest.mark.parametrize("extended_l2", [False, True])
@pytest.mark.parametrize("round_", range(6))
def test_random_operations_with_snapshots(tmp_path, round_, extended_l2):
    seed = SEED + round_
    print(f"NBDQCOW_SEED={seed}")
    rnd = random.Random(seed)
    options = {"cluster_size": rnd.choice((512, 4096, 65536))}
    if extended_l2:
        options = {"cluster_size": rnd.choice((16384, 65536)), "extended_l2": "on"}
    elif rnd.random() < 0.3:
        options["compat"] = "0.10"
    else:
        options["refcount_bits"] = rnd.choice((4, 8, 16, 16, 32, 64))
    path = create(tmp_path / "a", 2 * MiB, **options)
    names = {}

    async def run():
        for _ in range(3):
            async with open_image(path) as node:
                guest = Guest(node, rnd)
                guest.model[:] = await node.pread(0, node.size)
                for _ in range(rnd.randrange(1, 6)):
                    await asyncio.gather(*(guest.client(10) for _ in range(3)))
                    name = rnd.choice(list(names or "x"))
                    kind = rnd.choices(
                        ("create", "apply", "delete"), (5, 2, 2) if names else (1, 0, 0)
                    )[0]
                    if kind == "create":
                        name = f"s{rnd.randrange(1 << 64)}"
                        await node.driver.snapshot_create(name)
                        names[name] = bytes(guest.model)
                    elif kind == "apply":
                        await node.driver.snapshot_apply(name)
                        guest.model[:] = names[name]
                    else:
                        await node.driver.snapshot_delete(name)
                        del names[name]
                    assert bytes(await node.pread(0, node.size)) == guest.model
                await asyncio.gather(*(guest.client(10) for _ in range(3)))
                expected = bytes(guest.model)
            check_all(path, expected, names)

    asyncio.run(run())


async def refuse(*args, **kwargs):
    raise BlockError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_room(monkeypatch):
    monkeypatch.setattr(snapshot, "_delete_at_once", refuse)


@pytest.mark.parametrize("extended_l2", [False, True])
@pytest.mark.parametrize("round_", range(4))
def test_snapshots_deleted_where_there_is_no_room_for_new_tables(
    tmp_path, round_, extended_l2, monkeypatch
):
    no_room(monkeypatch)
    seed = SEED + round_
    print(f"NBDQCOW_SEED={seed}")
    rnd = random.Random(seed)
    if extended_l2:
        options = {"cluster_size": 16384, "extended_l2": "on"}
    else:
        options = {"cluster_size": rnd.choice((512, 4096, 65536))}
    path = create(tmp_path / "a", 2 * MiB, **options)
    if not extended_l2:
        # Compressed clusters, several of them in one host cluster.
        raw = tmp_path / "text"
        raw.write_bytes(b"".join(b"%7d\n" % i for i in range(2 * MiB // 8)))
        copied = [f"{name}={value}" for name, value in options.items()]
        qemu_img("convert", "-c", "-O", "qcow2", "-o", ",".join(copied), raw, path)
    names = {}

    async def run():
        async with open_image(path) as node:
            guest = Guest(node, rnd)
            guest.model[:] = await node.pread(0, node.size)
            for step in range(rnd.randrange(4, 8)):
                await asyncio.gather(*(guest.client(10) for _ in range(3)))
                if step < 2 or rnd.random() < 0.4:
                    name = f"s{step}"
                    await node.driver.snapshot_create(name)
                    names[name] = bytes(guest.model)
                elif names:
                    name = rnd.choice(list(names))
                    delete = node.driver.snapshot_delete(name)
                    await asyncio.gather(delete, guest.client(10))
                    del names[name]
                assert bytes(await node.pread(0, node.size)) == guest.model
            expected = bytes(guest.model)
        check_all(path, expected, names)

    asyncio.run(run())


def test_what_there_is_no_room_to_free_is_left_to_a_repair(
    tmp_path, monkeypatch, caplog
):
    path = create(tmp_path / "a", 2 * MiB)

    async def run():
        async with open_image(path) as node:
            await node.pwrite(0, b"\1" * MiB)
            await node.driver.snapshot_create("s")
            await node.pwrite(0, b"\2" * 65536)
            no_room(monkeypatch)
            with monkeypatch.context() as context:
                context.setattr(Generation, "reserve", refuse)
                await node.driver.snapshot_delete("s")
            await node.pwrite(MiB, b"\3" * 65536)

    asyncio.run(run())
    assert "'check -r all'" in caplog.text
    assert not snapshots(path)
    # Leaks, and nothing else.
    done = subprocess.run(["qemu-img", "check", path], capture_output=True, text=True)
    assert done.returncode == 3, done.stdout
    qemu_img("check", "-r", "all", path)
    check(path)
    now = b"\2" * 65536 + b"\1" * (MiB - 65536) + b"\3" * 65536
    assert content(path) == now.ljust(2 * MiB, b"\0")


def test_a_snapshot_under_load_has_what_was_answered_before_it(tmp_path):
    """Each client counts up in its own blocks; a snapshot must have, of each,
    a number between those answered before it began and those begun before it
    ended."""
    print(f"NBDQCOW_SEED={SEED}")
    rnd = random.Random(SEED)
    path = create(tmp_path / "a", 8 * MiB, cluster_size=4096)
    nb_blocks = 8 * MiB // 4096
    begun, answered = [0] * nb_blocks, [0] * nb_blocks
    bounds = {}

    async def client(node, number, stop):
        while not stop.is_set():
            block = rnd.randrange(number, nb_blocks, 4)
            begun[block] += 1
            data = begun[block].to_bytes(8, "big") * 512
            if rnd.random() < 0.5 or not node.try_pwrite(block * 4096, data):
                await node.pwrite(block * 4096, data)
            answered[block] = begun[block]
            await asyncio.sleep(0)

    async def run():
        async with open_image(path) as node:
            stop = asyncio.Event()
            clients = [asyncio.create_task(client(node, i, stop)) for i in range(4)]
            for number in range(5):
                await asyncio.sleep(0.05)
                low = answered[:]
                await node.driver.snapshot_create(f"s{number}")
                bounds[f"s{number}"] = low, begun[:]
            await node.driver.snapshot_delete("s2")
            del bounds["s2"]
            stop.set()
            await asyncio.gather(*clients)

    asyncio.run(run())
    check(path)
    for name, (low, high) in bounds.items():
        data = content(path, "-l", name)
        for block in range(nb_blocks):
            found = data[block * 4096 : block * 4096 + 4096]
            assert found == found[:8] * 512
            assert low[block] <= int.from_bytes(found[:8], "big") <= high[block]
    data = content(path)
    for block in range(nb_blocks):
        assert int.from_bytes(data[block * 4096 :][:8], "big") == answered[block]


def test_the_refcount_table_grows_while_a_snapshot_is_taken(tmp_path):
    path = create(tmp_path / "a", 8 * MiB, cluster_size=512, refcount_bits=64)

    async def run():
        async with open_image(path, cache="unsafe") as node:
            nb_grown = 0
            for number in range(40):
                # All L2 tables, of 32 KiB each, are copied by each snapshot.
                for offset in range(0, node.size, 32768):
                    await node.pwrite(offset, b"x" * 512)
                clusters = node.driver.header.refcount_table_clusters
                await node.driver.snapshot_create(str(number))
                nb_grown += node.driver.header.refcount_table_clusters > clusters
            assert nb_grown

    asyncio.run(run())
    check(path)

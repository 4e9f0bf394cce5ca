"""Encrypted guest data: sectors, parts of them, and images with either cipher."""

import asyncio
import random
import subprocess

import pytest

from nbdqcow import open_image
from nbdqcow.crypto.cipher import LEGACY_AES, CipherSpec, legacy_key
from nbdqcow.crypto.secrets import Secret
from nbdqcow.errors import ImageError, NotSupported
from nbdqcow.formats.encrypted import EncryptedStorage, tag_offset
from nbdqcow.storage.memory import MemoryStorage
from tests.differential.slow_storage import SlowStorage

MiB = 1 << 20
LENGTH = MiB // 2


def make_storage(rng, length=LENGTH):
    """Return an encrypted storage, what is below it, and its plain content."""
    cipher = CipherSpec().make(rng.randbytes(64))
    content = rng.randbytes(length)
    memory = MemoryStorage(bytes(cipher.encrypt_blocking(0, content)))
    return EncryptedStorage(SlowStorage(memory, rng), cipher), memory, content


@pytest.mark.asyncio
async def test_any_range_reads_and_writes(seed):
    rng = random.Random(seed)
    storage, memory, content = make_storage(rng, 2 * MiB)
    model = bytearray(content)
    for length in (1, 511, 512, 513, 4096, 65536, 65537, 200_000, MiB + 700):
        for offset in (0, 3, 512, rng.randrange(MiB - 1000)):
            data = rng.randbytes(length)
            if not storage.try_pwrite(offset, data):
                half = length // 2
                await storage.pwritev(offset, [data[:half], data[half:]])
            model[offset : offset + length] = data
            around = await storage.pread(max(0, offset - 5), length + 10)
            assert around == model[max(0, offset - 5) :][: length + 10]
            found = storage.try_pread(offset, length)
            assert found is None or found == data
    assert await storage.pread(0, 2 * MiB) == model
    assert await memory.pread(0, 2 * MiB) != model
    await storage.close()


@pytest.mark.asyncio
async def test_writes_that_share_sectors_do_not_undo_each_other(seed):
    rng = random.Random(seed)
    storage, _, content = make_storage(rng, 8192)
    model = bytearray(content)
    writes = []
    offset = 0
    while offset < 8192:
        length = min(rng.choice((7, 100, 512, 700)), 8192 - offset)
        data = rng.randbytes(length)
        model[offset : offset + length] = data
        writes.append((offset, data))
        offset += length
    rng.shuffle(writes)

    async def write(offset, data):
        if not storage.try_pwrite(offset, data):
            await storage.pwritev(offset, [data])

    await asyncio.gather(*(write(*item) for item in writes))
    assert await storage.pread(0, 8192) == model
    await storage.close()


class TornStorage(MemoryStorage):
    """A storage whose coroutines write one half, then let others run."""

    def try_pread(self, offset, length):
        return None

    def try_pwrite(self, offset, data):
        return False

    async def pread(self, offset, length):
        half = length // 2
        before = bytes(super().try_pread(offset, half))
        await asyncio.sleep(0)
        return before + bytes(super().try_pread(offset + half, length - half))

    async def pwritev(self, offset, buffers, *, fua=False):
        data = b"".join(buffers)
        half = len(data) // 2 + 3
        assert super().try_pwrite(offset, data[:half])
        await asyncio.sleep(0)
        assert super().try_pwrite(offset + half, data[half:])


@pytest.mark.asyncio
@pytest.mark.parametrize("mode", ["xts", "cbc"])
async def test_reads_beside_a_write_of_the_same_sector(mode, seed):
    """Bytes that nobody writes never read as anything else."""
    rng = random.Random(seed)
    spec = CipherSpec(mode=mode, key_length=32)
    cipher = spec.make(rng.randbytes(32))
    content = rng.randbytes(4096)
    memory = TornStorage(bytes(cipher.encrypt_blocking(0, content)))
    storage = EncryptedStorage(memory, cipher)
    failures = []

    async def write():
        for _ in range(20):
            await storage.pwritev(rng.randrange(100, 200), [rng.randbytes(100)])

    async def read(offset, length):
        for _ in range(20):
            found = await storage.pread(offset, length)
            if found != content[offset : offset + length]:
                failures.append(offset)

    await asyncio.gather(write(), write(), read(0, 100), read(300, 300), read(512, 9))
    assert failures == []
    await storage.close()


@pytest.mark.asyncio
async def test_an_inline_write_waits_for_a_read(seed):
    rng = random.Random(seed)
    cipher = CipherSpec().make(rng.randbytes(64))
    content = rng.randbytes(4096)
    memory = TornStorage(bytes(cipher.encrypt_blocking(0, content)))
    storage = EncryptedStorage(memory, cipher)
    reading = asyncio.create_task(storage.pread(0, 512))
    await asyncio.sleep(0)
    writing = asyncio.create_task(storage.pwritev(0, [bytes(1024)]))
    assert not storage.try_pwrite(0, bytes(512))
    assert storage.try_pread(0, 512) is None
    assert await reading == content[:512]
    await writing
    assert await storage.pread(0, 1024) == bytes(1024)
    await storage.close()


@pytest.mark.asyncio
async def test_a_cancelled_write_lets_others_go_on(seed):
    rng = random.Random(seed)
    storage, _, _ = make_storage(rng)
    task = asyncio.create_task(storage.pwritev(1, [bytes(100)]))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await storage.pwritev(0, [b"x" * 512])
    assert await storage.pread(0, 512) == b"x" * 512
    await storage.close()


@pytest.mark.asyncio
async def test_zeroes_are_written_out(seed):
    storage, memory, _ = make_storage(random.Random(seed))
    with pytest.raises(NotSupported):
        await storage.write_zeroes(0, 1024, may_unmap=True, no_fallback=True)
    await storage.write_zeroes(100, 3000, may_unmap=True)
    assert await storage.pread(100, 3000) == bytes(3000)
    assert await memory.pread(512, 2048) != bytes(2048)
    assert not storage.zero_beyond_end
    await storage.discard(0, 4096)
    assert await storage.pread(100, 3000) == bytes(3000)
    await storage.close()


@pytest.mark.asyncio
async def test_a_declined_inline_write_is_not_repeated_at_once(monkeypatch):
    memory = MemoryStorage(bytes(4096))
    storage = EncryptedStorage(memory, CipherSpec().make(bytes(range(64))))
    calls = []

    def decline(offset, data):
        calls.append(offset)
        return False

    monkeypatch.setattr(memory, "try_pwrite", decline)
    clock = [100.0]
    monkeypatch.setattr("nbdqcow.formats.encrypted.time.perf_counter", lambda: clock[0])
    for now in (100.0, 100.001, 100.019, 100.021):
        clock[0] = now
        assert not storage.try_pwrite(512, bytes(512))
    assert calls == [512, 512]
    await storage.close()


@pytest.mark.asyncio
async def test_sectors_numbered_by_the_guest():
    cipher = LEGACY_AES.make(legacy_key(b"pass"))
    memory = MemoryStorage(bytes(64 * 512))
    storage = EncryptedStorage(memory, cipher)
    data = bytes(range(256)) * 8
    for host_offset, guest_offset in ((0, 8192), (8192, 0), (16384, 1 << 62)):
        tagged = tag_offset(host_offset, guest_offset)
        assert tagged >= 0
        await storage.pwritev(tagged, [data])
        expected = cipher.encrypt_blocking(guest_offset // 512, data)
        assert await memory.pread(host_offset, 2048) == expected
        # What is added to a tagged offset moves both numbers.
        assert await storage.pread(tagged + 700, 900) == data[700:1600]
    await storage.close()


def create_aes(path, *, backing=None):
    """Make an image with QEMU's legacy encryption; the passphrase is ``one``."""
    options = "encrypt.format=aes,encrypt.key-secret=s"
    if backing is not None:
        options += f",backing_file={backing},backing_fmt=qcow2"
    done = subprocess.run(
        ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "--object",
         "secret,id=s,data=one", "-o", options, path, str(2 * MiB)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.asyncio
async def test_an_encrypted_overlay_of_an_encrypted_image(tmp_path, seed):
    """Copy-on-write between two images, in parts of sectors."""
    rng = random.Random(seed)
    base, top = create_aes(tmp_path / "base"), tmp_path / "top"
    create_aes(top, backing=base)
    secret = {"secret": Secret(b"one")}
    model = bytearray(rng.randbytes(2 * MiB))
    async with open_image(base, format="qcow2", driver_options=secret) as node:
        await node.pwrite(0, bytes(model))
    async with open_image(top, format="qcow2", driver_options=secret) as node:
        for _ in range(60):
            offset = rng.randrange(2 * MiB)
            data = rng.randbytes(rng.choice((1, 512, 5000, 70_000)))[: 2 * MiB - offset]
            model[offset : offset + len(data)] = data
            if not node.try_pwrite(offset, data):
                await node.pwrite(offset, data)
        await node.write_zeroes(100_000, 300_000)
        model[100_000:400_000] = bytes(300_000)
        assert await node.pread(0, 2 * MiB) == model
    async with open_image(top, format="qcow2", driver_options=secret) as node:
        assert await node.pread(0, 2 * MiB) == model


@pytest.mark.asyncio
async def test_snapshots_and_bitmaps_of_an_encrypted_image(tmp_path, seed):
    """They change how writes are mapped, which must not change the vectors."""
    rng = random.Random(seed)
    path = create_aes(tmp_path / "a")
    secret = {"secret": Secret(b"one")}
    model = bytearray(rng.randbytes(2 * MiB))
    first = bytes(model)
    async with open_image(path, format="qcow2", driver_options=secret) as node:
        await node.pwrite(0, first)
        await node.driver.snapshot_create("s")
        node.driver.bitmap_add("b")
        for _ in range(60):
            offset = rng.randrange(4096) * 512
            data = rng.randbytes(rng.choice((512, 4096, 4097)))[: 2 * MiB - offset]
            model[offset : offset + len(data)] = data
            if not node.try_pwrite(offset, data):
                await node.pwrite(offset, data)
        assert await node.pread(0, 2 * MiB) == model
        await node.driver.bitmap_remove("b")
        assert node.try_pwrite(0, bytes(512)) in (True, False)
        await node.pwrite(0, bytes(512))
        model[:512] = bytes(512)
    async with open_image(path, format="qcow2", driver_options=secret) as node:
        assert await node.pread(0, 2 * MiB) == model
        await node.driver.snapshot_apply("s")
        assert await node.pread(0, 2 * MiB) == first


async def attempt(path, **driver_options):
    async with open_image(path, format="qcow2", driver_options=driver_options):
        pass


@pytest.mark.asyncio
async def test_a_passphrase_is_required(tmp_path):
    path = create_aes(tmp_path / "a")
    with pytest.raises(ImageError, match="a passphrase is required"):
        await attempt(path)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("pointer", "text"),
    [
        (None, "Missing CRYPTO header for crypt method 2"),
        (b"x" * 8, "extension size 8, but expected size 16"),
        ((65536 + 512, 65536), "not a multiple of cluster size"),
        ((1 << 40, 65536), "beyond the end of the file"),
        ((0, (1 << 64) - 1), "is too long"),
        ((0, 10), "LUKS header is too short"),
        ((0, 65536), "not in LUKS format"),
    ],
)
async def test_hostile_pointers(tmp_path, pointer, text):
    path = create_aes(tmp_path / "a")
    data = bytearray(path.read_bytes())
    data[32:36] = (2).to_bytes(4, "big")
    extension = b""
    if isinstance(pointer, tuple):
        pointer = b"".join(n.to_bytes(8, "big") for n in pointer)
    if pointer is not None:
        extension = (0x0537BE77).to_bytes(4, "big")
        extension += len(pointer).to_bytes(4, "big") + pointer
    header_length = int.from_bytes(data[100:104], "big")
    extension += bytes(8)
    data[header_length : header_length + len(extension)] = extension
    path.write_bytes(data)
    with pytest.raises(ImageError, match=text):
        await attempt(path, secret=b"one")


@pytest.mark.asyncio
@pytest.mark.parametrize("preallocation", ["off", "metadata", "full"])
@pytest.mark.parametrize(
    "options",
    ["", ",cluster_size=512", ",data_file=@/data,data_file_raw=on", ",data_file=@/d"],
)
async def test_what_is_new_of_an_encrypted_disk_is_zero(
    tmp_path, preallocation, options
):
    path = tmp_path / "disk"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "--object",
         "secret,id=s,data=one", "-o", "encrypt.format=aes,encrypt.key-secret=s"
         + options.replace("@", str(tmp_path)), path, str(MiB + 512)],
        check=True,
    )  # fmt: skip
    secret = {"secret": Secret(b"one")}
    async with open_image(path, format="qcow2", driver_options=secret) as node:
        await node.pwrite(0, b"x" * (MiB + 512))
        await node.resize(2 * MiB, preallocation=preallocation)
        assert await node.pread(0, 2 * MiB) == b"x" * (MiB + 512) + bytes(MiB - 512)
        await node.resize(5120)
        await node.resize(MiB, preallocation=preallocation)
        assert await node.pread(0, MiB) == b"x" * 5120 + bytes(MiB - 5120)
    async with open_image(path, format="qcow2", driver_options=secret) as node:
        await node.pwrite(MiB - 700, b"y" * 3)
        assert await node.pread(MiB - 704, 704) == bytes(4) + b"yyy" + bytes(697)
        assert await node.pread(0, 8192) == b"x" * 5120 + bytes(3072)

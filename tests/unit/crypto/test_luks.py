"""LUKS headers: keys in and out, and headers that are not to be trusted."""

import hashlib
import random
import struct

import pytest

from nbdqcow.crypto import anti_forensic, luks
from nbdqcow.crypto.cipher import CipherSpec
from nbdqcow.crypto.luks import LuksHeader, WrongPassphrase
from nbdqcow.errors import ImageError, UnsupportedFeature

SLOTS = 208
"""Where the key slots begin; each has 48 bytes."""


@pytest.fixture(scope="module")
def created() -> tuple[bytes, bytes]:
    """Header with key slots, and volume key, of the passphrase ``one``."""
    _, key, area = luks.create_blocking(b"one", iteration_ms=1)
    return area, key


def apply(area: bytearray, edits: list[luks.Edit]) -> None:
    for offset, data in edits:
        area[offset : offset + len(data)] = data


@pytest.mark.parametrize("hash_name", ["md5", "sha1", "sha256", "sha512"])
@pytest.mark.parametrize("length", [16, 24, 32, 64])
def test_split_and_merge(length: int, hash_name: str, seed: int) -> None:
    key = random.Random(seed).randbytes(length)
    stripes = anti_forensic.split(key, 50, hash_name)
    assert len(stripes) == 50 * length
    assert anti_forensic.merge(stripes, 50, hash_name) == key
    damaged = bytes([stripes[0] ^ 1]) + stripes[1:]
    assert anti_forensic.merge(damaged, 50, hash_name) != key


def test_merge_by_hand() -> None:
    """Two stripes of 24 bytes: each 20 bytes of sha1, the rest cut off."""
    first, last = bytes(range(24)), bytes(range(100, 124))
    mixed = hashlib.sha1(bytes(4) + first[:20]).digest()
    mixed += hashlib.sha1(bytes([0, 0, 0, 1]) + first[20:]).digest()[:4]
    expected = bytes(a ^ b for a, b in zip(mixed, last, strict=True))
    assert anti_forensic.merge(first + last, 2, "sha1") == expected


def test_the_layout_is_as_qemu_has_it(created: tuple[bytes, bytes]) -> None:
    header = LuksHeader.parse(created[0])
    assert header.spec == CipherSpec("aes", "xts", "plain64", "", 64)
    assert header.hash_name == "sha256"
    assert [slot.material_sector for slot in header.slots] == [
        8 + 504 * index for index in range(8)
    ]
    assert header.payload_sector == 4040 == len(created[0]) // 512
    assert [slot.active for slot in header.slots] == [True] + [False] * 7
    assert header.slots[0].iterations >= luks.MIN_ITERATIONS
    assert header.digest_iterations >= luks.MIN_ITERATIONS
    assert header.pack() == created[0][: luks.HEADER_LENGTH]


def test_unlock(created: tuple[bytes, bytes]) -> None:
    area, key = created
    header = LuksHeader.parse(area)
    assert header.unlock_blocking(area[: header.area_length], b"one") == (key, 0)
    with pytest.raises(WrongPassphrase):
        header.unlock_blocking(area, b"two")
    with pytest.raises(ImageError, match="cut off"):
        header.unlock_blocking(area[:100_000], b"one")


def test_slots(created: tuple[bytes, bytes]) -> None:
    area, key = bytearray(created[0]), created[1]
    header = LuksHeader.parse(area)
    apply(area, header.add_key_blocking(key, b"two", 1, 1))
    apply(area, header.add_key_blocking(key, b"five", 5, 1))
    assert header.free_slot() == 2
    header = LuksHeader.parse(area)
    for passphrase, slot in ((b"one", 0), (b"two", 1), (b"five", 5)):
        assert header.unlock_blocking(area, passphrase) == (key, slot)
    apply(area, header.erase_key(0))
    header = LuksHeader.parse(area)
    with pytest.raises(WrongPassphrase):
        header.unlock_blocking(area, b"one")
    start = header.slots[0].material_sector * 512
    length = 64 * luks.NB_STRIPES
    assert area[start : start + length] != created[0][start : start + length]
    with pytest.raises(ImageError, match="slot 5 is in use"):
        header.add_key_blocking(key, b"x", 5, 1)
    with pytest.raises(ImageError, match="no LUKS key slot 8"):
        header.add_key_blocking(key, b"x", 8, 1)
    with pytest.raises(ImageError, match="not that of this disk"):
        header.add_key_blocking(bytes(64), b"x", 2, 1)
    assert header.opens_blocking(5, area, b"five")
    assert not header.opens_blocking(5, area, b"two")
    assert not header.opens_blocking(0, area, b"one")


def test_all_slots_in_use(created: tuple[bytes, bytes]) -> None:
    header = LuksHeader.parse(created[0])
    for slot in header.slots[1:]:
        slot.active, slot.iterations = True, luks.MIN_ITERATIONS
    assert header.free_slot() is None


@pytest.mark.parametrize(
    "spec",
    [
        CipherSpec(mode="xts", key_length=32),
        CipherSpec(mode="xts", key_length=48),
        CipherSpec(mode="cbc", key_length=24),
        CipherSpec(mode="cbc", ivgen="essiv", ivgen_hash="sha256", key_length=32),
        CipherSpec(mode="ecb", ivgen="plain", key_length=16),
    ],
    ids=lambda spec: f"{spec.bits}-{spec.mode_text}",
)
@pytest.mark.parametrize("hash_name", ["sha1", "sha512"])
def test_other_ciphers(spec: CipherSpec, hash_name: str) -> None:
    _, key, area = luks.create_blocking(
        b"pass", spec=spec, hash_name=hash_name, iteration_ms=1
    )
    header = LuksHeader.parse(area)
    assert (header.spec, header.hash_name) == (spec, hash_name)
    assert header.unlock_blocking(area, b"pass") == (key, 0)


def test_create_refuses() -> None:
    with pytest.raises(UnsupportedFeature, match="Hash 'sha3' is not supported"):
        luks.create_blocking(b"x", hash_name="sha3")
    with pytest.raises(UnsupportedFeature, match="'twofish' is not supported"):
        luks.create_blocking(b"x", spec=CipherSpec("twofish"))


def test_more_time_more_iterations() -> None:
    few = luks.count_iterations_blocking("sha256", 32, 0)
    many = luks.count_iterations_blocking("sha256", 32, 1000)
    assert luks.MIN_ITERATIONS == few < many
    most = luks.count_iterations_blocking("sha256", 32, 1 << 40)
    assert most == luks.MAX_ITERATIONS // luks.NB_SLOTS


@pytest.mark.parametrize(
    ("offset", "data", "text"),
    [
        (0, b"SULK", "not in LUKS format"),
        (6, struct.pack(">H", 2), "LUKS version 2 is not supported"),
        (8, b"serpent\0", "Cipher 'serpent' is not supported"),
        (8, b"a" * 32, "cipher name is not terminated"),
        (8, b"\xff\xff\0", "cipher name is not ASCII"),
        (40, b"xts\0", "Unexpected cipher mode"),
        (72, b"blake2b\0", "Hash 'blake2b' is not supported"),
        (104, struct.pack(">I", 8 + 504), "overlaps the payload"),
        (108, struct.pack(">I", 0xFFFFFFFF), "key of 4294967295 bytes"),
        (164, struct.pack(">I", 0), "digest has no iterations"),
        (164, struct.pack(">I", 0xFFFFFFFF), "iterations, more than the limit"),
        (SLOTS, struct.pack(">I", 5), "slot 0 has an invalid state"),
        (SLOTS + 4, struct.pack(">I", 0), "slot 0 has no iterations"),
        (SLOTS + 4, struct.pack(">I", 1 << 28), "more than the limit"),
        (SLOTS + 40, struct.pack(">I", 1), "key slot 0 overlaps the header"),
        (SLOTS + 88, struct.pack(">I", 9), "key slot 1 overlaps the key slot 0"),
        (SLOTS + 88, struct.pack(">I", 0xFFFFFFFF), "overlaps the payload"),
        (SLOTS + 44, struct.pack(">I", 0xFFFFFFFF), "4294967295 stripes, not 4000"),
        (SLOTS + 44, struct.pack(">I", 0), "0 stripes, not 4000"),
    ],
)
def test_hostile_fields(
    created: tuple[bytes, bytes], offset: int, data: bytes, text: str
) -> None:
    head = bytearray(created[0][: luks.HEADER_LENGTH])
    head[offset : offset + len(data)] = data
    with pytest.raises(ImageError, match=text):
        LuksHeader.parse(head)


def test_far_slots(created: tuple[bytes, bytes]) -> None:
    head = bytearray(created[0][: luks.HEADER_LENGTH])
    head[104:108] = b"\xff" * 4
    head[SLOTS + 40 : SLOTS + 44] = struct.pack(">I", 1 << 31)
    with pytest.raises(ImageError, match="too far"):
        LuksHeader.parse(head)


def test_mutations_end_in_documented_errors(
    created: tuple[bytes, bytes], seed: int
) -> None:
    rng = random.Random(seed)
    for _ in range(3000):
        head = bytearray(created[0][: luks.HEADER_LENGTH])
        for _ in range(rng.randrange(1, 4)):
            offset = rng.randrange(len(head))
            head[offset : offset + 4] = rng.choice(
                (rng.randbytes(1), rng.randbytes(4), b"\xff" * 4, bytes(4))
            )
        try:
            header = LuksHeader.parse(head[: luks.HEADER_LENGTH])
        except ImageError:
            continue
        assert header.area_length <= luks.MAX_AREA_LENGTH
    for length in range(luks.HEADER_LENGTH):
        with pytest.raises(ImageError, match="too short"):
            LuksHeader.parse(created[0][:length])

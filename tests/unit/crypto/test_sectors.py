"""The bulk ciphers against the library's own, sector by sector."""

import hashlib
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from nbdqcow.crypto.cipher import LEGACY_AES, CipherSpec, legacy_key
from nbdqcow.crypto.sectors import DecryptBatch
from nbdqcow.errors import ImageError, UnsupportedFeature
from nbdqcow.units import SECTOR_SIZE

SECTOR_COUNTS = (1, 2, 3, 4, 5, 8, 17, 18, 19, 20, 127, 128, 129, 300)
FIRST_SECTORS = (0, 1, 2**32 - 3, 2**40 + 7, 2**63 + 5)
SPECS = [
    CipherSpec(mode=mode, ivgen=ivgen, ivgen_hash=hash_name, key_length=key_length)
    for mode, key_lengths in (("xts", (32, 64)), ("cbc", (16, 24, 32)), ("ecb", (16,)))
    for key_length in key_lengths
    for ivgen, hash_name in (("plain64", ""), ("plain", ""), ("essiv", "sha256"))
]


def reference_iv(spec: CipherSpec, key: bytes, sector: int) -> bytes:
    number = sector.to_bytes(16, "little")
    if spec.ivgen == "plain":
        return number[:4] + bytes(12)
    if spec.ivgen == "essiv":
        salt = hashlib.sha256(key).digest()
        encryptor = Cipher(algorithms.AES(salt), modes.ECB()).encryptor()
        return encryptor.update(number)
    return number


def reference(spec: CipherSpec, key: bytes, first: int, data: bytes) -> bytes:
    encrypted = []
    for index in range(len(data) // SECTOR_SIZE):
        iv = reference_iv(spec, key, first + index)
        mode = {
            "xts": lambda iv=iv: modes.XTS(iv),
            "cbc": lambda iv=iv: modes.CBC(iv),
            "ecb": lambda: modes.ECB(),
        }[spec.mode]()
        encryptor = Cipher(algorithms.AES(key), mode).encryptor()
        start = index * SECTOR_SIZE
        encrypted.append(encryptor.update(data[start : start + SECTOR_SIZE]))
    return b"".join(encrypted)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.bits}-{s.mode_text}")
def test_agrees_with_the_library(spec: CipherSpec, seed: int) -> None:
    rng = random.Random(seed)
    key = rng.randbytes(spec.key_length)
    cipher = spec.make(key)
    for first in FIRST_SECTORS:
        for nb_sectors in SECTOR_COUNTS:
            data = rng.randbytes(nb_sectors * SECTOR_SIZE)
            expected = reference(spec, key, first, data)
            assert cipher.encrypt_blocking(first, data) == expected, (first, nb_sectors)
            assert cipher.decrypt_blocking(first, expected) == data, (first, nb_sectors)


def reference_xts_by_ecb(key: bytes, sector: int, data: bytes) -> bytes:
    """XTS as the standard writes it, for keys that the library refuses."""
    half = len(key) // 2
    encrypt = Cipher(algorithms.AES(key[:half]), modes.ECB()).encryptor().update
    tweaks = Cipher(algorithms.AES(key[half:]), modes.ECB()).encryptor()
    tweak = int.from_bytes(tweaks.update(sector.to_bytes(16, "little")), "little")
    encrypted = []
    for start in range(0, len(data), 16):
        mask = tweak.to_bytes(16, "little")
        block = bytes(
            a ^ b for a, b in zip(data[start : start + 16], mask, strict=True)
        )
        block = encrypt(block)
        encrypted.append(bytes(a ^ b for a, b in zip(block, mask, strict=True)))
        tweak = tweak << 1 ^ (tweak >> 127) * (1 << 128 | 0x87)
    return b"".join(encrypted)


@pytest.mark.parametrize("key_length", [48, 64])
def test_xts_keys_that_the_library_refuses(key_length: int, seed: int) -> None:
    rng = random.Random(seed)
    half = rng.randbytes(key_length // 2)
    key = half + half if key_length == 64 else rng.randbytes(key_length)
    cipher = CipherSpec(key_length=key_length).make(key)
    for nb_sectors in (1, 9):
        data = rng.randbytes(nb_sectors * SECTOR_SIZE)
        expected = b"".join(
            reference_xts_by_ecb(key, 77 + i, data[i * 512 : i * 512 + 512])
            for i in range(nb_sectors)
        )
        assert cipher.encrypt_blocking(77, data) == expected
        assert cipher.decrypt_blocking(77, expected) == data


def test_any_buffer_and_no_bytes() -> None:
    cipher = CipherSpec().make(bytes(range(64)))
    data = random.Random(1).randbytes(16 * SECTOR_SIZE)
    encrypted = bytes(cipher.encrypt_blocking(3, data))
    for buffer in (bytearray(encrypted), memoryview(b"x" + encrypted)[1:]):
        assert cipher.decrypt_blocking(3, buffer) == data
    assert cipher.encrypt_blocking(3, b"") == b""


def test_the_result_is_bytes_of_its_own() -> None:
    cipher = LEGACY_AES.make(legacy_key(b"pass"))
    one = cipher.encrypt_blocking(0, bytes(64 * SECTOR_SIZE))
    kept = bytes(one)
    cipher.encrypt_blocking(9, bytes(64 * SECTOR_SIZE))
    assert one == kept
    assert (one.format, one.ndim, one.contiguous) == ("B", 1, True)


def test_part_of_a_sector_is_refused() -> None:
    with pytest.raises(ValueError, match="whole sectors"):
        CipherSpec().make(bytes(range(64))).encrypt_blocking(0, bytes(100))


def test_threads_share_a_cipher(seed: int) -> None:
    rng = random.Random(seed)
    spec = CipherSpec(ivgen="essiv", ivgen_hash="sha256")
    key = rng.randbytes(64)
    cipher = spec.make(key)
    data = rng.randbytes(200 * SECTOR_SIZE)
    expected = {first: bytes(reference(spec, key, first, data)) for first in range(20)}
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            results = pool.map(lambda n: cipher.encrypt_blocking(n, data), range(20))
            assert [bytes(r) for r in results] == list(expected.values())


def test_legacy_key() -> None:
    assert legacy_key(b"short") == b"short" + bytes(11)
    assert legacy_key(b"a passphrase that is long") == b"a passphrase tha"


@pytest.mark.parametrize(
    ("cipher", "mode", "key_length", "text"),
    [
        ("serpent", "xts-plain64", 64, "Cipher 'serpent' is not supported"),
        ("aes", "ctr-plain64", 32, "Cipher mode 'ctr' is not supported"),
        ("aes", "xts-benbi", 64, "IV generator 'benbi' is not supported"),
        ("aes", "cbc-essiv:md9", 32, "Hash 'md9' is not supported"),
        ("aes", "cbc-essiv:sha1", 32, "key size 20 available"),
    ],
)
def test_unsupported(cipher: str, mode: str, key_length: int, text: str) -> None:
    with pytest.raises(UnsupportedFeature, match=text):
        CipherSpec.parse(cipher, mode, key_length)


@pytest.mark.parametrize(
    ("mode", "key_length", "text"),
    [
        ("xts", 64, "Unexpected cipher mode"),
        ("xts-plain64", 16, "key of 16 bytes"),
        ("cbc-plain64", 64, "key of 64 bytes"),
        ("cbc-plain64", 2**32 - 1, "key of 4294967295 bytes"),
        ("cbc-essiv", 32, "essiv needs a hash"),
    ],
)
def test_invalid(mode: str, key_length: int, text: str) -> None:
    with pytest.raises(ImageError, match=text):
        CipherSpec.parse("aes", mode, key_length)


def test_names_come_back() -> None:
    for spec in SPECS:
        assert CipherSpec.parse("aes", spec.mode_text, spec.key_length) == spec
    assert CipherSpec().bits == 256
    assert LEGACY_AES.bits == 128


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.bits}-{s.mode_text}")
def test_a_batch_of_reads(spec: CipherSpec, seed: int) -> None:
    """Sectors from anywhere, more of them than fit at once."""
    rng = random.Random(seed)
    key = rng.randbytes(spec.key_length)
    cipher = spec.make(key)
    batch = DecryptBatch(cipher)
    batch.finish()
    for _ in range(3):
        expected, found = [], []
        for nb_sectors in (1, 8, 8, 3, 100, 1, 128, 8):
            sector = rng.choice(FIRST_SECTORS) + rng.randrange(1000)
            data = rng.randbytes(nb_sectors * SECTOR_SIZE)
            expected.append(data)
            found.append(batch.add(sector, cipher.encrypt_blocking(sector, data)))
        batch.finish()
        assert found == expected

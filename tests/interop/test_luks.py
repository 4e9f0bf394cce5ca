"""Encrypted disks and QEMU, both directions: headers, key slots and sectors."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from nbdqcow.crypto import luks
from nbdqcow.crypto.cipher import CipherSpec
from nbdqcow.crypto.luks import LuksHeader
from nbdqcow.units import MiB
from tests.conftest import with_luks
from tests.nbd_client import NbdClient
from tests.serving import serving

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-img") is None, reason="qemu-img is not installed"
)

LENGTH = MiB

SPECS = [
    CipherSpec(),
    CipherSpec(mode="xts", key_length=32),
    CipherSpec(mode="xts", ivgen="essiv", ivgen_hash="sha256", key_length=64),
    CipherSpec(mode="cbc", ivgen="essiv", ivgen_hash="sha256", key_length=32),
    CipherSpec(mode="cbc", ivgen="plain", key_length=16),
    CipherSpec(mode="ecb", key_length=32),
]
by_spec = pytest.mark.parametrize(
    "spec", SPECS, ids=lambda spec: f"{spec.bits}-{spec.mode_text}"
)


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=60
    )


def secret(name: str, passphrase: str) -> tuple[str, str]:
    return "--object", f"secret,id={name},data={passphrase}"


def qemu_create(path: Path, options: str, passphrase: str = "one") -> None:
    """Make an image."""
    line = (
        "qemu-img", "create", "-q", *path_format(path), *secret("s", passphrase),
        "-o", f"{options},{prefix(path)}key-secret=s", path, LENGTH,
    )  # fmt: skip
    done = with_luks(lambda: run(*line))
    assert done.returncode == 0, done.stderr


def path_format(path: Path) -> tuple[str, str]:
    return "-f", path.suffix[1:]


def prefix(path: Path) -> str:
    return "encrypt." if path.suffix == ".qcow2" else ""


def qemu_convert(path: Path, output: Path, passphrase: str) -> None:
    done = run(
        "qemu-img", "convert", *secret("s", passphrase), "--image-opts",
        f"driver=luks,file.filename={path},key-secret=s", "-O", "raw", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def qemu_write(path: Path, source: Path) -> None:
    done = run(
        "qemu-img", "convert", "-n", *secret("s", "one"), "-f", "raw", source,
        "--target-image-opts", f"driver=luks,file.filename={path},key-secret=s",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@by_spec
@pytest.mark.parametrize("hash_name", ["sha256", "sha1"])
def test_we_open_what_qemu_makes(
    tmp_path: Path, spec: CipherSpec, hash_name: str, seed: int
) -> None:
    content = random.Random(seed).randbytes(LENGTH)
    (tmp_path / "content").write_bytes(content)
    path = tmp_path / "disk.luks"
    options = (
        f"cipher-alg=aes-{spec.bits},cipher-mode={spec.mode},"
        f"ivgen-alg={spec.ivgen},hash-alg={hash_name},iter-time=10"
    )
    if spec.ivgen_hash:
        options += f",ivgen-hash-alg={spec.ivgen_hash}"
    qemu_create(path, options)
    qemu_write(path, tmp_path / "content")

    image = path.read_bytes()
    header = LuksHeader.parse(image)
    assert (header.spec, header.hash_name) == (spec, hash_name)
    assert header.pack() == image[: luks.HEADER_LENGTH]
    key, slot = header.unlock_blocking(image[: header.area_length], b"one")
    assert slot == 0
    payload = image[header.payload_sector * 512 :]
    assert spec.make(key).decrypt_blocking(0, payload) == content


@by_spec
def test_qemu_opens_what_we_make(tmp_path: Path, spec: CipherSpec, seed: int) -> None:
    content = random.Random(seed).randbytes(LENGTH)
    path = tmp_path / "disk.luks"
    _, key, area = luks.create_blocking(b"one", spec=spec, iteration_ms=10)
    path.write_bytes(area + spec.make(key).encrypt_blocking(0, content))
    qemu_convert(path, tmp_path / "output", "one")
    assert (tmp_path / "output").read_bytes() == content


def test_key_slots(tmp_path: Path, seed: int) -> None:
    """We add and erase keys, QEMU opens; QEMU adds one, we open."""
    content = random.Random(seed).randbytes(LENGTH)
    (tmp_path / "content").write_bytes(content)
    path, output = tmp_path / "disk.luks", tmp_path / "output"
    qemu_create(path, "iter-time=10")
    qemu_write(path, tmp_path / "content")
    image = bytearray(path.read_bytes())
    header = LuksHeader.parse(image)
    key, _ = header.unlock_blocking(image, b"one")
    for edits in (
        header.add_key_blocking(key, b"two", 1, 10),
        header.add_key_blocking(key, b"three", 7, 10),
        header.erase_key(0),
    ):
        for offset, data in edits:
            image[offset : offset + len(data)] = data
    path.write_bytes(image)
    for passphrase in ("two", "three"):
        qemu_convert(path, output, passphrase)
        assert output.read_bytes() == content
    done = run(
        "qemu-img", "convert", *secret("s", "one"), "--image-opts",
        f"driver=luks,file.filename={path},key-secret=s", "-O", "raw", output,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Invalid password" in done.stderr

    amend = (
        "qemu-img", "amend", *secret("s", "two"), *secret("n", "four"),
        "--image-opts", f"driver=luks,file.filename={path},key-secret=s",
        "-o", "state=active,new-secret=n,iter-time=10",
    )  # fmt: skip
    done = with_luks(lambda: run(*amend))
    assert done.returncode == 0, done.stderr
    image = bytearray(path.read_bytes())
    header = LuksHeader.parse(image)
    assert header.unlock_blocking(image, b"four") == (key, 0)


# -- qcow2 -------------------------------------------------------------------

QCOW2_OPTIONS = [
    "encrypt.format=luks,encrypt.iter-time=10",
    "encrypt.format=luks,encrypt.iter-time=10,cluster_size=512",
    "encrypt.format=luks,encrypt.iter-time=10,encrypt.cipher-mode=cbc,"
    "encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256,cluster_size=4096",
    "encrypt.format=luks,encrypt.iter-time=10,cluster_size=16384,extended_l2=on",
    "encrypt.format=aes",
    "encrypt.format=aes,extended_l2=on",
    "encrypt.format=aes,compat=0.10",
]


def encrypted_opts(path: Path) -> str:
    return f"driver=qcow2,file.filename={path},encrypt.key-secret=s"


def compare(path: Path, content: Path) -> None:
    """QEMU checks the image, and finds ``content`` in it."""
    opened = (*secret("s", "one"), "--image-opts", encrypted_opts(path))
    done = run("qemu-img", "check", *opened)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run("qemu-img", "compare", *opened, f"driver=raw,file.filename={content}")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("options", QCOW2_OPTIONS)
def test_random_requests_to_a_served_image(
    tmp_path: Path, options: str, seed: int
) -> None:
    """QEMU makes and fills an image, a client changes it, QEMU reads it."""
    rng = random.Random(seed)
    path, content = tmp_path / "disk.qcow2", tmp_path / "content"
    model = bytearray(rng.randbytes(LENGTH // 2) + bytes(LENGTH // 2))
    content.write_bytes(model)
    qemu_create(path, options)
    done = run(
        "qemu-img", "convert", "-n", *secret("s", "one"), "-f", "raw", content,
        "--target-image-opts", encrypted_opts(path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    key = tmp_path / "key"
    key.write_text("one")
    with (
        serving(path, options=["--key-file", str(key)]) as server,
        NbdClient(server.socket) as client,
    ):
        for _ in range(300):
            unit = rng.choice((1, 512, 4096))
            offset = rng.randrange(LENGTH) // unit * unit
            length = min(unit * rng.randrange(1, 40), LENGTH - offset)
            action = rng.random()
            if action < 0.5:
                data = rng.randbytes(length)
                client.write(offset, data)
                model[offset : offset + length] = data
            elif action < 0.6:
                client.write_zeroes(offset, length)
                model[offset : offset + length] = bytes(length)
            else:
                assert client.read(offset, length) == model[offset : offset + length]
        assert client.read(0, LENGTH) == model
        client.flush()
    content.write_bytes(model)
    compare(path, content)


def test_serving_needs_the_right_passphrase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_create(path, QCOW2_OPTIONS[0])
    monkeypatch.setenv("DISK_KEY", "one")
    with serving(path, options=["--key-env", "DISK_KEY"]):
        pass
    monkeypatch.setenv("DISK_KEY", "a wrong one")
    for options, text in (
        (["--key-env", "DISK_KEY"], "Invalid password, cannot unlock any keyslot"),
        ([], "a passphrase is required"),
    ):
        with pytest.raises(AssertionError) as failure, serving(path, options=options):
            pass
        assert text in str(failure.value)
        assert "Traceback" not in str(failure.value)
        assert "a wrong one" not in str(failure.value)

"""Kernels as distributions pack them."""

import gzip
import lzma
import sys
from pathlib import Path

import pytest

from tests.guest.kernel import Kernel

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PACKED = {
    ".ko": bytes,
    ".ko.gz": gzip.compress,
    ".ko.xz": lzma.compress,
    ".ko.zst": zstd.compress,
}
"""Debian 12 does not compress its modules; Debian 13 has xz, Ubuntu zstd."""


@pytest.mark.parametrize("suffix", PACKED)
def test_modules_are_read(suffix: str, tmp_path: Path) -> None:
    modules = tmp_path / "usr" / "lib" / "modules" / "6.1"
    (tmp_path / "boot").mkdir()
    (tmp_path / "boot" / "vmlinuz-6.1").touch()
    (modules / "kernel").mkdir(parents=True)
    (modules / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    contents = {"nbd": b"1\0depends=virtio-net\0", "virtio_net": b"2\0depends=\0"}
    for name, content in contents.items():
        (modules / "kernel" / f"{name}{suffix}").write_bytes(PACKED[suffix](content))
    kernel = Kernel(tmp_path)
    order = kernel.load_order(["crc32c_generic", "ext4", "nbd"])
    assert order == [("virtio_net", contents["virtio_net"]), ("nbd", contents["nbd"])]
    with pytest.raises(FileNotFoundError, match="no module absent"):
        kernel.load_order(["absent"])

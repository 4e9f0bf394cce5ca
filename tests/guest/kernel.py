"""A Linux kernel for tests and the modules it needs, unpacked by
tools/setup-system.sh (nothing of it is installed)."""

import gzip
import lzma
import re
import sys
from pathlib import Path

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

KERNEL_DIRECTORY = Path(__file__).resolve().parents[2] / "var" / "kernel"

_NOT_IN_ALL = {"crc32c_generic"}
"""Modules that later kernels lack: from 6.15 on ext4 has its sums from a library."""


class Kernel:
    """One kernel image and its modules.

    Attributes:
        image: the bootable file.
    """

    def __init__(self, directory: Path = KERNEL_DIRECTORY) -> None:
        """Raises `FileNotFoundError` if there is no kernel in ``directory``."""
        images = sorted(directory.glob("boot/vmlinuz-*"))
        if not images:
            raise FileNotFoundError(f"no kernel under {directory}")
        self.image = images[-1]
        release = self.image.name.removeprefix("vmlinuz-")
        (modules,) = directory.glob(f"**/lib/modules/{release}")
        self._files = {
            _canonical(path.name.partition(".")[0]): path
            for path in modules.rglob("*.ko*")
        }
        builtin = (modules / "modules.builtin").read_text().split()
        self._builtin = {_canonical(Path(line).stem) for line in builtin}

    def load_order(self, names: list[str]) -> list[tuple[str, bytes]]:
        """Return ``(name, content)`` of modules, each after those it needs.

        What is built into the kernel is left out. The package's ``modules.dep``
        is only written when it is installed, so each module is asked itself.
        Raises `FileNotFoundError` for a module that this kernel lacks and needs.
        """
        order: dict[str, bytes] = {}

        def add(name: str) -> None:
            if name in order or name in self._builtin:
                return
            if name not in self._files:
                raise FileNotFoundError(f"{self.image.name} has no module {name}")
            content = _decompress(self._files[name])
            depends = re.search(rb"\0depends=([^\0]*)\0", content)
            assert depends is not None, f"{name} does not say what it depends on"
            for other in filter(None, depends[1].decode().split(",")):
                add(_canonical(other))
            order[name] = content

        for name in names:
            if _canonical(name) in self._files or name not in _NOT_IN_ALL:
                add(_canonical(name))
        return list(order.items())


def _canonical(name: str) -> str:
    return name.replace("-", "_")


def _decompress(path: Path) -> bytes:
    content = path.read_bytes()
    match path.suffix:
        case ".ko":
            return content
        case ".gz":
            return gzip.decompress(content)
        case ".xz":
            return lzma.decompress(content)
        case ".zst":
            return zstd.decompress(content)
        case _:
            raise FileNotFoundError(f"{path} is compressed in an unknown way")

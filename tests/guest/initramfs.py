"""Build an initramfs: a cpio archive in the kernel's "newc" form, gzipped.

The layout is that of the kernel's Documentation/driver-api/early-userspace/
buffer-format.rst.
"""

import gzip
import re
import stat
import subprocess
from pathlib import Path

_NEWC_MAGIC = b"070701"


class Initramfs:
    """Files of an initramfs, added one by one. Paths have no leading slash."""

    def __init__(self) -> None:
        self._archive = bytearray()
        self._paths: set[str] = set()
        for directory in ("proc", "sys", "dev", "tmp", "run", "mnt"):
            self._add_directory(directory)
        # The kernel opens it for init before devtmpfs can be mounted.
        self._add_entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))

    def add_file(self, path: str, content: bytes, *, mode: int = 0o644) -> None:
        """Add a regular file and the directories above it."""
        for parent in reversed(Path(path).parents):
            if str(parent) != ".":
                self._add_directory(str(parent))
        if path not in self._paths:
            self._add_entry(path, stat.S_IFREG | mode, content)

    def add_program(self, path: str, source: Path) -> None:
        """Add a program and the shared libraries that it needs."""
        self.add_file(path, source.read_bytes(), mode=0o755)
        listing = subprocess.run(["ldd", source], capture_output=True, text=True)
        # "libc.so.6 => /lib/x/libc.so.6 (0x7f..)", "/lib64/ld-linux.so.2 (0x7f..)"
        for library in re.findall(r"(/\S+) \(0x", listing.stdout):
            self.add_file(library.lstrip("/"), Path(library).read_bytes(), mode=0o755)

    def pack(self) -> bytes:
        """Return the archive, compressed."""
        trailer = _newc_entry("TRAILER!!!", 0)
        return gzip.compress(bytes(self._archive) + trailer, compresslevel=1)

    def _add_directory(self, path: str) -> None:
        if path not in self._paths:
            self._add_entry(path, stat.S_IFDIR | 0o755)

    def _add_entry(
        self,
        path: str,
        mode: int,
        content: bytes = b"",
        device: tuple[int, int] = (0, 0),
    ) -> None:
        self._paths.add(path)
        inode = len(self._paths)
        self._archive += _newc_entry(path, mode, content, inode, device)


def _newc_entry(
    path: str,
    mode: int,
    content: bytes = b"",
    inode: int = 0,
    device: tuple[int, int] = (0, 0),
) -> bytes:
    name = path.encode() + b"\0"
    # ino mode uid gid nlink mtime filesize, device of the file system (major,
    # minor), device of the node (major, minor), namesize, check.
    fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name), 0)
    header = _NEWC_MAGIC + b"".join(b"%08X" % field for field in fields)
    return _pad(header + name) + _pad(content)


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)

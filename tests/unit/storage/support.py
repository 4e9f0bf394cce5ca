"""What the tests of files share."""

import os
from pathlib import Path

from nbdqcow.storage import mapped
from nbdqcow.storage.linux import PAGE_SIZE
from nbdqcow.storage.opening import CACHE_MODES

MODES = list(CACHE_MODES)
BUFFERED = ["writeback", "writethrough", "unsafe"]


def make_file(directory: Path, data: bytes = b"") -> str:
    path = directory / "disk"
    path.write_bytes(data)
    return str(path)


def drop_page_cache(filename: str) -> None:
    fd = os.open(filename, os.O_RDONLY)
    mapped_file = mapped.MappedFile(fd)
    os.fsync(fd)
    # It is only advice: pages that a processor has just put aside to move
    # between the kernel's lists stay. Others push them out of there.
    places = range(0, os.stat(filename).st_size, 16 * PAGE_SIZE)
    cpus = os.sched_getaffinity(0)
    for _ in range(100):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if not any(mapped_file.is_resident(place, 1) for place in places):
            break
        for cpu in cpus:
            os.sched_setaffinity(0, {cpu})
            for index in range(40):
                Path(f"{filename}.{index}").write_bytes(b"x")
    os.sched_setaffinity(0, cpus)
    mapped_file.close()
    os.close(fd)


def allocated_bytes(filename: str) -> int:
    return os.stat(filename).st_blocks * 512

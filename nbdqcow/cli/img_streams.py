"""``-`` in the place of a file name: standard input, and standard output.

An image is read here and there, and standard input only once: what comes from
a pipe is put into a file without a name first. A raw disk is written from its
beginning to its end, so that it needs no file on its way out.
"""

import asyncio
import contextlib
import os
import stat
from collections.abc import AsyncIterator
from typing import Final

from nbdqcow.cli.messages import is_our_name
from nbdqcow.errors import ImageError
from nbdqcow.jobs.zeroes import is_zero
from nbdqcow.pool import Pool
from nbdqcow.types import Buffer
from nbdqcow.units import MiB

_INPUT: Final = 0
_OUTPUT: Final = 1


def is_stream(name: str) -> bool:
    """Whether a name means a stream: to qemu-img it is a file's."""
    return name == "-" and is_our_name()


def room_beside(target: str) -> str:
    """Return the directory for what is as large as the image to be made."""
    directory = os.path.dirname(target) or "."
    if is_stream(target) or not os.path.isdir(directory):
        import tempfile

        return tempfile.gettempdir()
    return directory


@contextlib.asynccontextmanager
async def standard_input(directory: str) -> AsyncIterator[str]:
    """Yield the name of a file with what comes from standard input.

    If that is no file itself, one is made in ``directory`` and is gone
    afterwards. Raises `ImageError`.
    """
    status = os.fstat(_INPUT)
    if stat.S_ISBLK(status.st_mode) or (
        stat.S_ISREG(status.st_mode) and not os.lseek(_INPUT, 0, os.SEEK_CUR)
    ):
        yield _name(_INPUT)
        return
    if os.isatty(_INPUT):
        raise ImageError("Standard input is a terminal, not an image")
    try:
        import tempfile

        file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
    except OSError as exc:
        raise ImageError(
            f"Could not create a file in '{directory}': {exc.strerror}"
        ) from None
    with file:
        await _fill(file.fileno())
        yield _name(file.fileno())


def _name(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


async def _fill(fd: int) -> None:
    """Copy standard input to a file; what is zero there stays a hole."""
    pool = Pool()
    length = 0
    waits = not stat.S_ISREG(os.fstat(_INPUT).st_mode)
    try:
        while True:
            if waits:
                # A thread that reads could not be interrupted.
                await _when_ready(_INPUT, for_writing=False)
            data = await pool.run(os.read, _INPUT, MiB)
            if not data:
                break
            if not is_zero(data):
                await pool.run(_write_all, fd, data, length)
            length += len(data)
        await pool.run(os.ftruncate, fd, length)
    finally:
        await pool.close()


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        nb_written = os.pwrite(fd, view, offset)
        view, offset = view[nb_written:], offset + nb_written


async def _when_ready(fd: int, *, for_writing: bool) -> None:
    """Wait until a pipe can be read or written."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    if for_writing:
        loop.add_writer(fd, wake)
    else:
        loop.add_reader(fd, wake)
    try:
        await ready
    finally:
        if for_writing:
            loop.remove_writer(fd)
        else:
            loop.remove_reader(fd)


class StandardOutput:
    """Writes bytes to standard output, one after the other."""

    def __init__(self) -> None:
        """Raises `ImageError` if that is a terminal."""
        if os.isatty(_OUTPUT):
            raise ImageError("Standard output is a terminal, not a place for an image")
        self._fd = _OUTPUT
        self._is_pipe = stat.S_ISFIFO(os.fstat(_OUTPUT).st_mode)
        if self._is_pipe:
            # Opened once more, so that not waiting is our own affair: others
            # have the same pipe, and a thread in it could not be interrupted.
            self._fd = os.open(_name(_OUTPUT), os.O_WRONLY | os.O_NONBLOCK)
        self._pool = Pool()

    async def write(self, data: Buffer) -> None:
        """Write all of ``data``. Raises `OSError`."""
        view = memoryview(data)
        while view:
            try:
                if self._is_pipe:
                    nb_written = os.write(self._fd, view)
                else:
                    nb_written = await self._pool.run(os.write, self._fd, view)
                view = view[nb_written:]
            except BlockingIOError:
                await _when_ready(self._fd, for_writing=True)

    async def close(self) -> None:
        """Let go of it."""
        if self._is_pipe:
            os.close(self._fd)
        await self._pool.close()

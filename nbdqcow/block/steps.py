"""Work on a file told as steps, so that a tool and a server can both do it.

A function that must look at a file, decide and perhaps write, yields what it
wants done and is sent what it asked to read. A command line tool runs the
steps with blocking calls and no event loop (`run_blocking`), a driver runs the
same steps on its storage (`run_steps`).

Every command loads this: named tuples, because a dataclass takes a millisecond
to make.
"""

from collections.abc import Generator
from typing import Final, NamedTuple, Protocol, TypeAlias, TypeVar

from nbdqcow.block.storage import StorageDriver
from nbdqcow.types import Buffer

T = TypeVar("T")


class Read(NamedTuple):
    """Send me ``length`` bytes, at least 1, from ``offset``; past the end of the
    file they are zero."""

    offset: int
    length: int


class Write(NamedTuple):
    """Write ``data`` at ``offset``, growing the file if need be."""

    offset: int
    data: Buffer


class Flush(NamedTuple):
    """Make all writes so far durable before the next step."""


Step: TypeAlias = Read | Write | Flush
Steps: TypeAlias = Generator[Step, Buffer, T]
"""Yields steps, is sent the bytes of a `Read` (``b""`` otherwise), returns T.

An `OSError` of a step is raised where it was yielded."""


_OFFSET_LIMIT: Final = 1 << 63
"""Where all files end: system calls can't say more."""


class BlockingFile(Protocol):
    """A file of bytes for programs without an event loop.

    Reading past the end gives zeroes, writing there grows the file. ``length``
    is the file's length in bytes, kept up to date by our own writes. Errors
    are `OSError`s.
    """

    filename: str
    length: int

    @property
    def is_device(self) -> bool:
        """Whether the length is fixed and old content may be anywhere."""

    def pread(self, offset: int, length: int) -> Buffer:
        """Return exactly ``length`` bytes."""

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Write all of ``data``."""

    def truncate(self, length: int) -> None:
        """Set the length; what is new reads as zeroes."""

    def allocate(self, offset: int, length: int) -> None:
        """Take space for a range that reads as zeroes."""

    def write_zeroes(self, offset: int, length: int) -> None:
        """Write zeroes out, byte for byte."""

    def flush(self) -> None:
        """Make all writes so far durable."""

    def allocated_length(self) -> int:
        """Return the bytes that the file takes of its file system, -1 if that
        is not known."""

    def close(self) -> None:
        """Release the file and its locks."""


def _resume(steps: Steps[T], answer: Buffer, error: OSError | None) -> Step:
    """Go on with the next step; what failed is raised where it was asked for."""
    if error is not None:
        return steps.throw(error)
    return steps.send(answer) if answer else next(steps)


def run_blocking(steps: Steps[T], file: BlockingFile) -> T:
    """Do all ``steps`` on ``file`` and return their result."""
    answer: Buffer = b""
    error: OSError | None = None
    try:
        while True:
            step = _resume(steps, answer, error)
            answer, error = b"", None
            try:
                if isinstance(step, Read):
                    if step.offset + step.length >= _OFFSET_LIMIT:
                        answer = bytes(step.length)
                    else:
                        answer = file.pread(step.offset, step.length)
                elif isinstance(step, Write):
                    file.pwrite(step.offset, step.data)
                else:
                    file.flush()
            except OSError as failed:
                error = failed
    except StopIteration as stop:
        result: T = stop.value
        return result


async def run_steps(steps: Steps[T], storage: StorageDriver) -> T:
    """Do all ``steps`` on ``storage`` and return their result."""
    answer: Buffer = b""
    error: OSError | None = None
    try:
        while True:
            step = _resume(steps, answer, error)
            answer, error = b"", None
            try:
                if isinstance(step, Read):
                    if step.offset + step.length >= _OFFSET_LIMIT:
                        answer = bytes(step.length)
                    else:
                        answer = await storage.pread(step.offset, step.length)
                elif isinstance(step, Write):
                    await storage.pwritev(step.offset, [step.data])
                else:
                    await storage.flush()
            except OSError as failed:
                error = failed
    except StopIteration as stop:
        result: T = stop.value
        return result

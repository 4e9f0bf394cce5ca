"""What jobs say when they fail."""

from collections.abc import Iterator
from contextlib import contextmanager

from nbdqcow.errors import BlockError, NbdQcowError


class CopyError(NbdQcowError):
    """A piece could not be copied; ``action`` is ``reading``, ``reading block
    status`` or ``writing``, ``reason`` what was said of it."""

    def __init__(self, action: str, offset: int, reason: str) -> None:
        # QEMU's words.
        unit = "offset" if action == "reading block status" else "byte"
        super().__init__(f"error while {action} at {unit} {offset}: {reason}")
        self.action = action
        self.reason = reason
        self.offset = offset


def reason_of(error: OSError) -> str:
    """Return what an error says, without its number."""
    return str(error) if isinstance(error, BlockError) else error.strerror or str(error)


@contextmanager
def copying(action: str, offset: int) -> Iterator[None]:
    """What fails within is a `CopyError` of this action, at this place."""
    try:
        yield
    except OSError as error:
        raise CopyError(action, offset, reason_of(error)) from error

"""Modules of Python's own that are loaded when something in them is wanted.

`asyncio` imports `ssl` and, as `dataclasses` does, `inspect` with all that is below
them, for what a command on a file never does. That is a sixth of what such a command
takes to start.
"""

import sys
from importlib import import_module
from threading import RLock
from types import ModuleType
from typing import Any, Final

_LATE: Final = (
    "inspect",
    "linecache",
    "locale",
    "textwrap",
    "ssl",
    "asyncio.sslproto",
)
"""The last one is in its place, or it would want something of `ssl` at once."""

_lock: Final = RLock()


class _LateModule(ModuleType):
    """Stands for a module until one of its names is asked for, and for whoever has
    it by then for ever."""

    def __getattr__(self, name: str) -> Any:
        # `importlib.util.LazyLoader` does not do: ``import`` itself asks a module
        # that is there for its ``__spec__``, and would load it.
        with _lock:
            if sys.modules.get(self.__name__) is self:
                del sys.modules[self.__name__]
            module = import_module(self.__name__)
        return getattr(module, name)


def load_late() -> None:
    """Have these modules loaded late, unless it is too late for that."""
    if "asyncio" in sys.modules:
        return
    for name in _LATE:
        sys.modules.setdefault(name, _LateModule(name))

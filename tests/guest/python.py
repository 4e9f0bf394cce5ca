"""A Python interpreter and this package in a guest."""

import json
import py_compile
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.guest.initramfs import Initramfs

_PACKAGES = Path(__file__).resolve().parents[2]

ENVIRONMENT = "PYTHONHOME=/ PYTHONPATH=/packages"

# What all of our modules bring with them, and where it is.
_LIST_MODULES = """
import importlib, importlib.machinery, importlib.util, json, pkgutil, runpy, sys
import concurrent.futures.thread
import encodings.ascii, encodings.idna, encodings.latin_1
import nbdqcow
for module in pkgutil.walk_packages(nbdqcow.__path__, "nbdqcow."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
specs = [getattr(module, "__spec__", None) for module in sys.modules.values()]
for name in list(sys.modules):
    # Some put another module in their place: collections.abc since Python 3.13.
    package = sys.modules.get(name.rpartition(".")[0])
    if hasattr(package, "__path__"):
        specs.append(importlib.machinery.PathFinder.find_spec(name, package.__path__))
specs.append(importlib.util.find_spec("nbdqcow.__main__"))
print(json.dumps([spec.origin for spec in specs if spec is not None]))
"""


def add_python(files: Initramfs, scratch: Path) -> None:
    """Add /bin/python3, the package, and of the standard library what that
    needs; no other packages: it runs on asyncio's own event loop.

    All is compiled, for an emulated processor takes half a minute to do that;
    ``scratch`` is an empty directory for it.
    """
    files.add_program("bin/python3", Path(sys.executable).resolve())
    library = Path(sysconfig.get_path("stdlib"))
    listed = subprocess.run(
        [sys.executable, "-c", _LIST_MODULES],
        cwd=_PACKAGES,
        check=True,
        capture_output=True,
        text=True,
    )
    origins = {Path(o) for o in json.loads(listed.stdout) if o is not None}
    for path in sorted(origins):
        if path.is_relative_to(_PACKAGES / "nbdqcow"):
            place = Path("packages") / path.relative_to(_PACKAGES)
        elif path.is_relative_to(library) and "site-packages" not in path.parts:
            place = Path("lib", library.name) / path.relative_to(library)
        else:
            continue
        if path.suffix == ".py":
            compiled = scratch / "compiled.pyc"
            py_compile.compile(
                str(path),
                str(compiled),
                doraise=True,
                invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
            )
            name = str(place.with_suffix(".pyc"))
            files.add_file(name, compiled.read_bytes())
        elif path.suffix == ".so":
            files.add_program(str(place), path)

"""The import rules of docs/architecture.md, "Rooms"."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "nbdqcow"
MAX_LINES = 700

CONTRACTS = {
    "block.storage",
    "block.driver",
    "block.inflight",
    "block.status",
    "block.steps",
    "block.tools",
}

# What each room may import besides itself and the base modules; a name stands
# for the module and all below it.
MAY_IMPORT = {
    "nbd": set(),
    "block": set(),
    "crypto": set(),
    "formats": CONTRACTS | {"crypto"},
    "storage": CONTRACTS,
    "filters": CONTRACTS,
    "storage.nbd": CONTRACTS | {"nbd"},
    "jobs": {"nbd", "block"},
    "server": {"nbd", "block"},
    "cli": {"server", "jobs", "nbd", "block", "crypto.secrets"},
}

# Modules that decide without input or output, so that they can be tested, fuzzed
# and reasoned about without a clock or a socket.
WITHOUT_IO = {
    "nbd",
    "formats.qcow1.header",
    "formats.qcow2.header",
    "formats.qcow2.entries",
}
IO_MODULES = {"asyncio", "os", "socket", "threading"}

# 100 ms of imports that `nbdqcow-img --version` need not pay.
HEAVY = {"asyncio", "numpy", "cryptography", "click", "uvloop", "OpenSSL"}


def module_name(path: Path) -> str:
    """Return ``formats.qcow2.header`` for that file; a package is its folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an interpreter that has loaded nothing yet."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=PACKAGE.parent,
    )


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_within(name: str, place: str) -> bool:
    return name == place or name.startswith(place + ".")


def room_of(name: str) -> str:
    """Return the longest key of MAY_IMPORT that holds the module, or ``""``
    for a base module."""
    rooms = [room for room in MAY_IMPORT if is_within(name, room)]
    return max(rooms, key=len, default="")


def imports_of(name: str) -> Iterator[tuple[int, str]]:
    """Yield ``(line, module)`` of every import, at top level or inside a function.

    ``from a import b`` counts as ``a.b`` where that is a module.
    """
    path = MODULES[name]
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                inside = full.removeprefix("nbdqcow.")
                yield node.lineno, full if inside in MODULES else node.module


def project_imports_of(name: str) -> Iterator[tuple[int, str]]:
    """Yield ``(line, module)`` of imports from this project, without its name."""
    for line, module in imports_of(name):
        if module != "nbdqcow" and is_within(module, "nbdqcow"):
            yield line, module.removeprefix("nbdqcow.")


def complaints() -> Iterator[str]:
    """Yield a line for every import that goes the wrong way."""
    for name, path in MODULES.items():
        # The package's face and its command load what they need by themselves.
        if name in ("", "__main__"):
            continue
        room = room_of(name)
        for line, target in project_imports_of(name):
            target_room = room_of(target)
            if target_room in ("", room) or is_within(room, target_room):
                continue
            if any(is_within(target, allowed) for allowed in MAY_IMPORT.get(room, ())):
                continue
            yield f"{path}:{line}: {room or 'a base module'} imports {target}"


def test_imports_go_one_way() -> None:
    assert list(complaints()) == []


def test_every_package_has_a_rule() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages == {room for room in MAY_IMPORT if "." not in room}


def test_modules_without_io_import_none() -> None:
    found = [
        f"{MODULES[name]}:{line}: imports {module}"
        for name in MODULES
        if any(is_within(name, place) for place in WITHOUT_IO)
        for line, module in imports_of(name)
        if module.partition(".")[0] in IO_MODULES
    ]
    assert found == []


def test_only_the_registry_imports_by_name() -> None:
    found = [
        f"{MODULES[name]}:{line}"
        for name in MODULES
        if room_of(name) in ("block", "formats", "storage") and name != "block.registry"
        for line, module in imports_of(name)
        if is_within(module, "importlib")
    ]
    assert found == []


def test_modules_are_short() -> None:
    lengths = {
        str(path): len(path.read_bytes().splitlines()) for path in MODULES.values()
    }
    assert {p: n for p, n in lengths.items() if n > MAX_LINES} == {}


@pytest.mark.parametrize("room", ["formats.qcow2", "storage", "cli"])
def test_what_a_room_says_of_its_modules(room: str) -> None:
    text = ast.get_docstring(ast.parse(MODULES[room].read_bytes())) or ""
    # Beginnings and ends of names, and programs, have another form.
    named = set(re.findall(r"``([a-z]\w*)``", text)) - {"nbdqcow"}
    prefix = f"{room}."
    there = {name[len(prefix) :] for name in MODULES if name.startswith(prefix)}
    assert named - there == set()
    if room == "formats.qcow2":
        assert {name for name in there - named if "_extended" not in name} == set()


@pytest.mark.parametrize("module", ["nbdqcow", "nbdqcow.cli.img", "nbdqcow.cli.nbd"])
def test_import_is_light(module: str) -> None:
    done = run_python("-X", "importtime", "-c", f"import {module}")
    assert done.returncode == 0, done.stderr
    # "import time:   self [us] | cumulative | name"
    loaded = {
        line.rpartition("|")[2].strip().partition(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert loaded & HEAVY == set()


def test_what_a_command_on_a_file_never_needs_is_loaded_late(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(512))
    script = (
        "import sys\n"
        "from nbdqcow.cli import img\n"
        "img.main(['convert', '-f', 'raw', '-O', 'qcow2', *sys.argv[1:]])\n"
        "print([type(sys.modules[name]).__name__ for name in ('inspect', 'ssl')])\n"
        "import inspect, ssl\n"
        "from asyncio import sslproto\n"
        "print(inspect.isclass(ssl.SSLContext), ssl.SSLContext.__module__)\n"
        "print(sslproto.SSLProtocol.__name__)\n"
        "print([type(sys.modules[name]).__name__ for name in ('inspect', 'ssl')])\n"
    )
    done = run_python("-c", script, str(disk), str(tmp_path / "image"))
    # From 3.12 on `dataclasses` ask `inspect` for the annotations of each class.
    late = "module" if sys.version_info >= (3, 12) else "_LateModule"
    assert (done.stdout.splitlines(), done.stderr) == (
        [
            f"['{late}', '_LateModule']",
            "True ssl",
            "SSLProtocol",
            "['module', 'module']",
        ],
        "",
    )


def test_filters_are_loaded_for_whoever_names_one(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(512))
    script = (
        "import asyncio, sys, nbdqcow\n"
        "async def main(name):\n"
        "    async with nbdqcow.open_image(name, format='raw') as disk:\n"
        "        await disk.pread(0, 512)\n"
        "    return 'nbdqcow.filters.blkdebug' in sys.modules\n"
        "for name in sys.argv[1:]:\n"
        "    print(asyncio.run(main(name)))\n"
    )
    done = run_python("-c", script, str(disk), f"blkdebug::{disk}")
    assert (done.stdout, done.stderr) == ("False\nTrue\n", "")

"""The programs under the recorder, and QEMU's look at what a cut leaves."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import own_environment, with_luks

SOURCE = Path(__file__).with_name("recorder.c")
NB_ROUNDS = int(os.environ.get("NBDQCOW_PLUGS", "20"))
SECRET = ["--object", "secret,id=s,data=sesame"]


def rounds(directory: Path) -> Iterator[tuple[int, Path]]:
    """Yield the number of each round of a long test, and a directory for it."""
    for number in range(NB_ROUNDS):
        own = directory / str(number)
        own.mkdir()
        yield number, own


def build_recorder(directory: Path) -> Path:
    library = directory / "recorder.so"
    command = ["gcc", "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"]
    subprocess.run(command, check=True)
    return library


def recorded(
    library: Path, directory: Path, log: Path, *, fail: str = ""
) -> dict[str, str]:
    """Return the environment of a program whose work on the files in ``directory``
    is recorded. ``fail``: see recorder.c."""
    environment = {
        **own_environment(),
        "LD_PRELOAD": str(library),
        "PLUG_DIR": str(directory.resolve()),
        "PLUG_LOG": str(log),
    }
    return {**environment, "PLUG_FAIL": fail} if fail else environment


def run(*words: str | Path | int, check: bool = True) -> tuple[int, str]:
    """Run a program; return its exit status and what it said."""
    done = with_luks(
        lambda: subprocess.run(
            [str(word) for word in words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=100,
        )
    )
    assert not check or done.returncode == 0, f"{words}: {done.stdout}"
    return done.returncode, done.stdout


def image_words(image: Path, image_format: str, *, luks: bool = False) -> list[str]:
    """Return how an image is named for qemu-img."""
    if not luks:
        return ["-f", image_format, str(image)]
    name = f"driver={image_format},file.filename={image},encrypt.key-secret=s"
    return [*SECRET, "--image-opts", name]


def content(image: Path, image_format: str, *, luks: bool = False) -> bytes:
    """Return the disk that QEMU sees."""
    if image_format == "raw":
        return image.read_bytes()
    out = image.parent.with_name("content")
    words = image_words(image, image_format, luks=luks)
    run("qemu-img", "convert", "-O", "raw", *words[:-1], words[-1], out)
    try:
        return out.read_bytes()
    finally:
        out.unlink()


def check(image: Path, image_format: str, *, luks: bool = False) -> None:
    """Let ``qemu-img check`` find leaks at the most, after the repair that an image
    with postponed refcounts wants."""
    if image_format != "qcow2":
        return
    words = image_words(image, image_format, luks=luks)
    header = image.read_bytes()[:80]
    if header[7] == 3 and header[79] & 1:
        status, text = run("qemu-img", "check", "-r", "all", *words, check=False)
        assert status in (0, 3), text
    status, text = run("qemu-img", "check", *words, check=False)
    assert status in (0, 3), text


def write_all(files: dict[Path, bytes]) -> None:
    for path, data in files.items():
        # Not a new file: links and modes stay.
        with open(os.open(path, os.O_WRONLY | os.O_TRUNC), "wb") as file:
            file.write(data)

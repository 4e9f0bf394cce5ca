import errno

import pytest

from nbdqcow.cli.messages import describe, error, program_name, warning
from nbdqcow.errors import BlockError, ImageError


@pytest.mark.parametrize(
    ("argv0", "name"),
    [
        ("/usr/bin/qemu-nbd", "qemu-nbd"),
        ("nbdqcow", "nbdqcow"),
        ("/x/nbdqcow/__main__.py", "nbdqcow"),
        ("-c", "nbdqcow"),
        ("", "nbdqcow"),
    ],
)
def test_program_name(monkeypatch, argv0, name):
    monkeypatch.setattr("sys.argv", [argv0])
    assert program_name() == name


def test_what_cannot_be_printed_is_escaped(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x"])
    error("no '\udcff' é\x1b[2J\n\tmore")
    warning("no '\udcfe'")
    assert (
        capsys.readouterr().err
        == "x: no '\\xff' é\\x1b[2J\n\tmore\nWARNING: no '\\xfe'\n"
    )


@pytest.mark.parametrize(
    ("exc", "text"),
    [
        (OSError(errno.ENOENT, "No such file"), "No such file"),
        (OSError(errno.ENOENT, "No such file", "/x"), "/x: No such file"),
        (OSError(errno.ENOENT, "No such file", b"/x"), "/x: No such file"),
        (OSError("odd"), "odd"),
        (TimeoutError(), "TimeoutError"),
        (BlockError(errno.EIO, "why"), "why"),
        (ImageError("what"), "what"),
    ],
)
def test_describe(exc, text):
    assert describe(exc) == text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qemu-img", "x: use [disk]?\nIs another process using the image [disk]?\n"),
        (
            "nbdqcow-img",
            "x: use [disk]?\n"
            "Is another process using the image [disk]? Held by qemu-nbd (pid 7).\n",
        ),
    ],
)
def test_who_has_an_image_is_not_in_qemus_words(monkeypatch, capsys, name, said):
    monkeypatch.setattr("sys.argv", [f"/usr/bin/{name}"])
    error(
        "x: use [disk]?\n"
        "Is another process using the image [disk]? Held by qemu-nbd (pid 7)."
    )
    assert capsys.readouterr().err == f"{name}: {said}"

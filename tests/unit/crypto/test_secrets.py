"""Passphrases from files and the environment."""

from pathlib import Path

import pytest

from nbdqcow.crypto import secrets
from nbdqcow.crypto.secrets import Secret
from nbdqcow.errors import UsageError


def test_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"p\xffss\n")
    assert secrets.from_file(str(path)).reveal() == b"p\xffss\n"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        secrets.from_file(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="null"):
        secrets.from_file("a\0b")
    with pytest.raises(UsageError, match="too long"):
        secrets.from_file("/dev/zero")


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISK_KEY", "hunter2")
    assert secrets.from_environment("DISK_KEY").reveal() == b"hunter2"
    with pytest.raises(UsageError, match="no environment variable OTHER_KEY"):
        secrets.from_environment("OTHER_KEY")


def test_a_secret_does_not_show() -> None:
    secret = Secret(b"hunter2")
    assert "hunter2" not in f"{secret} {secret!r} {[secret]}"

"""New images that other commands fill: complete under their name, or absent."""

import contextlib
import errno
import os
import stat
from collections.abc import Mapping
from typing import Self

from nbdqcow.block.directories import sync_directory_blocking
from nbdqcow.block.registry import blocking_file, is_remote
from nbdqcow.block.tools import FormatTool, OptionValue, Secrets, no_secrets
from nbdqcow.cli.img_create import (
    check_file_options,
    create_data_file,
    option_specs,
    write_image,
)
from nbdqcow.cli.img_open import local_path
from nbdqcow.cli.img_options import convert_option, split_options
from nbdqcow.errors import ImageError


def parse_create_options(tool: FormatTool, text: str) -> dict[str, OptionValue]:
    """Return the values of ``-o`` for a new image. Raises `ImageError`."""
    kinds = {spec.name: spec.kind for spec in option_specs(tool)}
    return {
        name: convert_option(name, kinds[name], value)
        for name, value in split_options(kinds, text)
    }


class NewImage:
    """A new image that is made under another name beside its own.

    What had the name before stays until `commit`, and stays locked. A device,
    or a file in a directory that we may not write to, is written in place.

    Attributes:
        path: where it is being written.
        holds_old_data: it is no new file: what is not written may be anything.
    """

    def __init__(self, filename: str) -> None:
        """Take the place of ``filename``. Raises `ImageError`."""
        self._remote = bool(filename) and is_remote(filename)
        if filename and not self._remote:
            filename = local_path(filename)
        self.filename = filename
        self.path = filename
        self.holds_old_data = self._remote
        self._final: str | None = None
        self._old = None
        if self._remote:
            return
        try:
            self._take_place()
        except OSError as exc:
            self.discard()
            raise ImageError(f"Could not create '{filename}': {exc.strerror}") from None
        if self._final is None and self._old is not None:
            self._old.close()
            self._old = None

    def _take_place(self) -> None:
        """Find out what has the name, and where the new image is to be written.
        Raises `OSError`."""
        filename = self.filename
        if not filename:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if filename.endswith("/"):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        try:
            status = os.stat(filename)
        except FileNotFoundError:
            # A link that leads nowhere: the file that it names is made there.
            if not os.path.islink(filename):
                self._set_aside(filename, None)
            return
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        self._old = blocking_file().open(filename, read_only=False)
        self.holds_old_data = not stat.S_ISREG(status.st_mode)
        if not self.holds_old_data and status.st_nlink == 1:
            final = os.path.realpath(filename) if os.path.islink(filename) else filename
            with contextlib.suppress(OSError):
                self._set_aside(final, status)

    def _set_aside(self, final: str, old: os.stat_result | None) -> None:
        """Let the new image be made beside ``final``, with the rights of what had the
        name before (``old``)."""
        directory, name = os.path.split(final)
        # A name has 255 bytes at most, and what a character has of them varies.
        short = os.fsdecode(os.fsencode(name)[:100])
        # tempfile takes 3 ms to import.
        path = os.path.join(directory, f".{short}.{os.urandom(6).hex()}.part")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if old is None:
                mask = os.umask(0)
                os.umask(mask)
                os.fchmod(fd, 0o644 & ~mask)
            else:
                new = os.fstat(fd)
                if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
                    os.fchown(fd, old.st_uid, old.st_gid)
                os.fchmod(fd, stat.S_IMODE(old.st_mode))
                for attribute in os.listxattr(final):
                    os.setxattr(fd, attribute, os.getxattr(final, attribute))
        except OSError:
            os.unlink(path)
            raise
        finally:
            os.close(fd)
        self.path = path
        self._final = final

    @classmethod
    def created(
        cls,
        filename: str,
        tool: FormatTool,
        values: Mapping[str, OptionValue],
        secrets: Secrets = no_secrets,
    ) -> Self:
        """Take the place of ``filename``, and write an empty image there.

        Leave the block of it, ``with`` it, and what has not been committed is given
        up. Raises `ImageError`; nothing is left then.
        """
        new = cls(filename)
        try:
            new._create(tool, values, secrets)
        except ImageError as exc:
            new.discard()
            raise ImageError(new.rename_in(str(exc))) from None
        except BaseException:
            new.discard()
            raise
        return new

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.discard()

    def _create(
        self, tool: FormatTool, values: Mapping[str, OptionValue], secrets: Secrets
    ) -> None:
        check_file_options(values)
        plan = tool.prepare(values, secrets=secrets)
        preallocation = values.get("preallocation")
        create_data_file(tool, plan, self._final or self.path, preallocation)
        write_image(tool, plan, self.path, self.filename, preallocation)

    def rename_in(self, text: str) -> str:
        """Return a message with the name that people know."""
        return text.replace(self.path, self.filename)

    def commit(self, *, durable: bool) -> None:
        """The image is complete: let it have its name, ``durable`` if the image is.
        Raises `OSError`."""
        if self._final is not None:
            os.replace(self.path, self._final)
            if durable:
                sync_directory_blocking(os.path.dirname(self._final) or ".")
            self._final = None
        self.discard()

    def discard(self) -> None:
        """Give up: leave what was there before."""
        if self._final is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
            self._final = None
        if self._old is not None:
            self._old.close()
            self._old = None

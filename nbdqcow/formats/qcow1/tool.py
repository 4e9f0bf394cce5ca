"""What commands do with qcow images: describe and create.

The format has no checks.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from nbdqcow.block.steps import BlockingFile, run_blocking
from nbdqcow.block.tools import (
    BACKING_FORMATS,
    FormatTool,
    ImageInfo,
    OptionSpec,
    OptionValue,
    Secrets,
    no_secrets,
)
from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow1 import header as h
from nbdqcow.formats.qcow1.header import read_header

if TYPE_CHECKING:
    from nbdqcow.formats.qcow1.create import CreatePlan


class Qcow1Tool(FormatTool):
    """The qcow format, version 1, for commands."""

    name: ClassVar[str] = "qcow"
    # In the order in which qemu-img shows them when it creates an image.
    create_options: ClassVar[Sequence[OptionSpec]] = (
        OptionSpec("size", "size", "Virtual disk size"),
        OptionSpec("backing_file", "str", "File name of a base image"),
        OptionSpec("backing_fmt", "str", "Format of the backing image"),
        OptionSpec(
            "encryption",
            "bool",
            "Encrypt the image with format 'aes'. (Deprecated in favor of "
            "encrypt.format=aes)",
        ),
        OptionSpec("encrypt.format", "str", "Encrypt the image, format choices: 'aes'"),
        OptionSpec(
            "encrypt.key-secret",
            "str",
            "ID of the secret that provides the AES encryption key",
        ),
    )
    supports_backing: ClassVar[bool] = True

    def describe(self, file: BlockingFile) -> ImageInfo:
        """Describe an image by its header alone."""
        header = run_blocking(read_header(file.length), file)
        return ImageInfo(
            format="qcow",
            virtual_size=header.disk_size,
            cluster_size=header.cluster_size,
            encrypted=header.crypt_method != h.CRYPT_NONE,
            backing_filename=header.backing_filename,
        )

    def prepare(
        self, values: Mapping[str, OptionValue], *, secrets: Secrets = no_secrets
    ) -> "CreatePlan":
        """Plan a new image. Raises `ImageError`."""
        from nbdqcow.formats.qcow1.create import CreateOptions, plan_create

        backing_format = values.get("backing_fmt", "raw")
        if backing_format not in BACKING_FORMATS:
            raise ImageError(f"unrecognized backing format '{backing_format}'")
        encrypt_format = values.get("encrypt.format")
        if encrypt_format is not None and "encryption" in values:
            raise ImageError(
                "'encrypt.format' and its alias 'encryption' can't be used at the same "
                "time"
            )
        if encrypt_format not in (None, "aes", "qcow"):
            raise ImageError("Unsupported encryption format")
        encrypted = encrypt_format is not None or bool(values.get("encryption"))
        if encrypted and "encrypt.key-secret" not in values:
            raise ImageError("Parameter 'encrypt.key-secret' is required for cipher")
        if encrypted:
            # The image does not hold the key; but it must be there to be used.
            secrets(str(values["encrypt.key-secret"]))
        backing_file = values.get("backing_file")
        return plan_create(
            CreateOptions(
                size=int(values.get("size", 0)),
                backing_file=None if backing_file is None else str(backing_file),
                encrypted=encrypted,
            )
        )

    def create(self, file: BlockingFile, plan: Any) -> None:
        """Write the planned image, the file's old content gone."""
        from nbdqcow.formats.qcow1.create import CreatePlan

        assert isinstance(plan, CreatePlan)
        file.truncate(0)
        file.truncate(plan.file_length)
        if file.is_device:
            file.write_zeroes(0, plan.file_length)
        for offset, data in (plan.first_write, plan.last_write):
            file.pwrite(offset, data)
            file.flush()

"""What commands do with LUKS containers: describe, measure and create."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from nbdqcow.block.steps import BlockingFile, run_blocking
from nbdqcow.block.tools import (
    PREALLOCATIONS,
    FormatTool,
    ImageInfo,
    Measure,
    OptionSpec,
    OptionValue,
    Secrets,
    no_secrets,
)
from nbdqcow.errors import ImageError
from nbdqcow.formats.luks_specs import cipher_options, key_options
from nbdqcow.units import SECTOR_SIZE, round_up

_NO_SECRET: Final = "Parameter 'key-secret' is required for cipher"
_FIRST: Final = 4096
"""Bytes in front of the key slots."""


@dataclass(frozen=True, slots=True)
class LuksPlan:
    """A new container of ``length`` bytes that begins with ``area``."""

    area: bytes
    length: int
    preallocation: str


class LuksTool(FormatTool):
    """The luks format for commands."""

    name: ClassVar[str] = "luks"
    create_options: ClassVar[Sequence[OptionSpec]] = (
        OptionSpec("size", "size", "Virtual disk size"),
        OptionSpec(
            "key-secret",
            "str",
            "ID of the secret that provides the keyslot passphrase",
        ),
        *cipher_options(""),
    )
    key_options: ClassVar[Sequence[OptionSpec]] = key_options("")

    def describe(self, file: BlockingFile) -> ImageInfo:
        """Describe a container."""
        from nbdqcow.formats.luks_file import read_luks
        from nbdqcow.formats.luks_options import describe

        header, _ = run_blocking(read_luks(0, file.length), file)
        length = max(0, file.length - header.payload_sector * SECTOR_SIZE)
        return ImageInfo(
            format="luks",
            virtual_size=round_up(length, SECTOR_SIZE),
            encrypted=True,
            specific=describe(header, {}),
        )

    def prepare(
        self, values: Mapping[str, OptionValue], *, secrets: Secrets = no_secrets
    ) -> LuksPlan:
        """Plan a new container; takes seconds. Raises `ImageError`."""
        preallocation = str(values.get("preallocation", "off"))
        if preallocation not in PREALLOCATIONS:
            raise ImageError(f"invalid parameter value: {preallocation}")
        key_secret = values.get("key-secret")

        def passphrase() -> bytes:
            if key_secret is None:
                raise ImageError(_NO_SECRET)
            return secrets(str(key_secret))

        from nbdqcow.formats.luks_options import create_area_blocking

        _, area = create_area_blocking(values, "", passphrase)
        size = round_up(int(values.get("size", 0)), SECTOR_SIZE)
        return LuksPlan(area, len(area) + size, preallocation)

    def measure(
        self,
        values: Mapping[str, OptionValue],
        data_length: int = 0,
        bitmaps: Sequence[tuple[str, int]] | None = None,
    ) -> Measure:
        """Say how long the file would be: the key slots and the whole disk. Raises
        `ImageError`."""
        from nbdqcow.crypto.luks import new_area_length
        from nbdqcow.formats.luks_options import parse_cipher

        if values.get("key-secret") is None:
            raise ImageError(_NO_SECRET)
        spec, _ = parse_cipher(values, "")
        length = new_area_length(spec.key_length) + int(values.get("size", 0))
        return Measure(length, length)

    def create(self, file: BlockingFile, plan: Any) -> None:
        """Write the planned container, the header last."""
        assert isinstance(plan, LuksPlan)
        file.truncate(0)
        file.truncate(plan.length)
        if plan.preallocation == "falloc":
            file.allocate(0, plan.length)
        elif plan.preallocation == "full":
            file.write_zeroes(0, plan.length)
        # The slots that are not in use are zero, as is a file that is new.
        area = plan.area if file.is_device else plan.area.rstrip(b"\0")
        file.pwrite(_FIRST, area[_FIRST:])
        file.flush()
        file.pwrite(0, plan.area[:_FIRST])
        file.flush()

    def check_secret(self, file: BlockingFile, passphrase: bytes) -> None:
        """Try the key slots."""
        from nbdqcow.formats.luks_file import unlock_blocking

        run_blocking(unlock_blocking(0, file.length, passphrase), file)

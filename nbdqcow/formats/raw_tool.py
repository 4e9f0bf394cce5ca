"""What commands do with raw images: describe, measure and create."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, NamedTuple

from nbdqcow.block.steps import BlockingFile
from nbdqcow.block.tools import (
    FormatTool,
    ImageInfo,
    Measure,
    OptionSpec,
    OptionValue,
    Secrets,
    no_secrets,
)
from nbdqcow.errors import ImageError
from nbdqcow.units import SECTOR_SIZE, round_up

_FIRST_BLOCK: Final = 4096
PREALLOCATIONS: Final = ("off", "falloc", "full")
_MAX_LENGTH: Final = (1 << 63) - 1


class RawPlan(NamedTuple):
    """A new raw image of ``length`` bytes."""

    length: int
    preallocation: str


class RawTool(FormatTool):
    """The raw format for commands."""

    name: ClassVar[str] = "raw"
    create_options: ClassVar[Sequence[OptionSpec]] = (
        OptionSpec("size", "size", "Virtual disk size"),
    )

    def describe(self, file: BlockingFile) -> ImageInfo:
        """Describe an image: its length, in whole sectors, is all there is."""
        return ImageInfo("raw", round_up(file.length, SECTOR_SIZE))

    def prepare(
        self, values: Mapping[str, OptionValue], *, secrets: Secrets = no_secrets
    ) -> RawPlan:
        """Plan a new image. Raises `ImageError`."""
        preallocation = str(values.get("preallocation", "off"))
        if preallocation == "metadata":
            raise ImageError("Unsupported preallocation mode: metadata")
        if preallocation not in PREALLOCATIONS:
            raise ImageError(f"invalid parameter value: {preallocation}")
        length = round_up(int(values.get("size", 0)), SECTOR_SIZE)
        if length > _MAX_LENGTH:
            raise ImageError("Could not resize file: Invalid argument")
        return RawPlan(length, preallocation)

    def measure(
        self,
        values: Mapping[str, OptionValue],
        data_length: int = 0,
        bitmaps: Sequence[tuple[str, int]] | None = None,
    ) -> Measure:
        """Say how long the file would be: as long as the disk."""
        length = round_up(int(values.get("size", 0)), SECTOR_SIZE)
        return Measure(length, length)

    def create(self, file: BlockingFile, plan: Any) -> None:
        """Write the planned image, the file's old content gone."""
        assert isinstance(plan, RawPlan)
        if file.is_device:
            # It has its space. What is wrong is found before anything is written.
            if plan.preallocation != "off":
                raise ImageError(
                    f"Unsupported preallocation mode '{plan.preallocation}'"
                )
            file.truncate(plan.length)
            # The header of what was there would say what the disk is.
            file.write_zeroes(0, min(plan.length, SECTOR_SIZE))
        file.truncate(0)
        if plan.preallocation == "falloc":
            file.allocate(0, plan.length)
        elif plan.preallocation == "full":
            file.write_zeroes(0, plan.length)
        elif plan.length and not file.is_device:
            # Who opens the file past the page cache finds out with its first
            # block what a block is. QEMU does, and writes one, too, if it can.
            with contextlib.suppress(OSError):
                file.write_zeroes(0, min(plan.length, _FIRST_BLOCK))
        file.truncate(plan.length)
        if plan.preallocation == "full":
            # What is asked for is blocks of the disk, not of page cache.
            file.flush()

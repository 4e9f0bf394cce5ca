"""What commands do with qcow2 images: describe, measure, create, check."""

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

from nbdqcow.block.steps import BlockingFile, Read, Step, run_blocking
from nbdqcow.block.tools import (
    CheckResult,
    FormatTool,
    ImageInfo,
    Measure,
    OptionSpec,
    OptionValue,
    Report,
    Secrets,
    no_secrets,
)
from nbdqcow.errors import ImageError
from nbdqcow.formats.luks_specs import cipher_options, key_options
from nbdqcow.formats.qcow2 import header as h
from nbdqcow.formats.qcow2.bitmap_directory import (
    FLAG_AUTO,
    FLAG_IN_USE,
    read_bitmap_directory,
)
from nbdqcow.formats.qcow2.encryption_header import luks_range
from nbdqcow.formats.qcow2.header import Header, read_header
from nbdqcow.formats.qcow2.snapshot_table import read_snapshots
from nbdqcow.types import Buffer
from nbdqcow.units import SECTOR_SIZE

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.create import CreatePlan

# In the order in which qemu-img shows them when it creates an image.
_CREATE_OPTIONS: Final = (
    OptionSpec(
        "encryption",
        "bool",
        "Encrypt the image with format 'aes'. (Deprecated in favor of "
        "encrypt.format=aes)",
    ),
    OptionSpec(
        "encrypt.format", "str", "Encrypt the image, format choices: 'aes', 'luks'"
    ),
    OptionSpec(
        "encrypt.key-secret",
        "str",
        "ID of secret providing qcow AES key or LUKS passphrase",
    ),
    *cipher_options("encrypt."),
    OptionSpec("cluster_size", "size", "qcow2 cluster size", "65536"),
    OptionSpec("extended_l2", "bool", "Extended L2 tables", "off"),
    OptionSpec(
        "preallocation",
        "str",
        "Preallocation mode (allowed values: off, metadata, falloc, full)",
    ),
    OptionSpec(
        "compression_type",
        "str",
        "Compression method used for image cluster compression",
        "zlib",
    ),
    OptionSpec("size", "size", "Virtual disk size"),
    OptionSpec("compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])"),
    OptionSpec("backing_file", "str", "File name of a base image"),
    OptionSpec("backing_fmt", "str", "Image format of the base image"),
    OptionSpec("data_file", "str", "File name of an external data file"),
    OptionSpec(
        "data_file_raw",
        "bool",
        "The external data file must stay valid as a raw image",
    ),
    OptionSpec("lazy_refcounts", "bool", "Postpone refcount updates", "off"),
    OptionSpec(
        "refcount_bits", "num", "Width of a reference count entry in bits", "16"
    ),
)


class Qcow2Tool(FormatTool):
    """The qcow2 format for commands."""

    name: ClassVar[str] = "qcow2"
    create_options: ClassVar[Sequence[OptionSpec]] = _CREATE_OPTIONS
    key_options: ClassVar[Sequence[OptionSpec]] = key_options("encrypt.")
    supports_backing: ClassVar[bool] = True
    supports_check: ClassVar[bool] = True

    def describe(self, file: BlockingFile) -> ImageInfo:
        """Describe an image."""
        return run_blocking(_describe(), file)

    def describe_for_check(self, file: BlockingFile) -> ImageInfo:
        """Describe an image by its header alone."""
        header = run_blocking(read_header(for_check=True), file)
        return ImageInfo(
            format="qcow2",
            virtual_size=header.size,
            backing_filename=header.backing_filename,
            backing_format=header.backing_format,
            data_filename=_data_filename(header),
            warnings=bitmap_warnings(header),
        )

    def prepare(
        self, values: Mapping[str, OptionValue], *, secrets: Secrets = no_secrets
    ) -> "CreatePlan":
        """Plan a new image. Raises `ImageError`."""
        from nbdqcow.formats.qcow2.create_values import plan_image

        return plan_image(values, secrets)

    def measure(
        self,
        values: Mapping[str, OptionValue],
        data_length: int = 0,
        bitmaps: Sequence[tuple[str, int]] | None = None,
    ) -> Measure:
        """See `FormatTool.measure`."""
        from nbdqcow.formats.qcow2.create_values import measure_image

        return measure_image(values, data_length, bitmaps)

    def create(self, file: BlockingFile, plan: Any) -> None:
        """Write the planned image, the file's old content gone."""
        plan = _plan(plan)
        file.truncate(0)
        try:
            file.truncate(plan.file_length)
        except ImageError as exc:
            raise ImageError(f"Could not resize image: {exc}") from None
        if file.is_device:
            file.write_zeroes(0, plan.file_length)
            # The header of what was there must not outlive its tables.
            file.flush()
        if plan.data_file is None:
            data_length = plan.file_length - plan.data_start
            _preallocate(file, plan.data_start, data_length, plan.preallocation)
        for offset, data in plan.writes():
            file.pwrite(offset, data)
        file.flush()
        file.pwrite(*plan.magic_write)
        file.flush()

    def check_secret(self, file: BlockingFile, passphrase: bytes) -> None:
        """Try the key slots of an image with LUKS."""
        place = luks_range(run_blocking(read_header(for_check=True), file))
        if place is not None:
            from nbdqcow.formats.luks_file import unlock_blocking

            run_blocking(unlock_blocking(*place, passphrase), file)

    def data_file_name(self, plan: Any) -> str | None:
        """Return the planned image's name for its external data file."""
        return _plan(plan).data_file

    def create_data_file(self, file: BlockingFile, plan: Any) -> None:
        """Make a file the planned image's data file, its old content gone."""
        plan = _plan(plan)
        size = plan.header.size
        file.truncate(0)
        file.truncate(size)
        if file.is_device:
            file.write_zeroes(0, size)
        _preallocate(file, 0, size, plan.preallocation)
        file.flush()

    def check(self, file: BlockingFile, repair: int, report: Report) -> CheckResult:
        """Check the image, and repair it."""
        # It needs numpy, which takes longer to load than all the rest.
        from nbdqcow.formats.qcow2.check import check_image

        steps = check_image(file.length, repair, report, can_grow=not file.is_device)
        return run_blocking(steps, file)


def _preallocate(
    file: BlockingFile, offset: int, length: int, preallocation: str
) -> None:
    if preallocation == "falloc":
        file.allocate(offset, length)
    elif preallocation == "full":
        file.write_zeroes(offset, length)


def _describe() -> Generator[Step, Buffer, ImageInfo]:
    header = yield from read_header()
    snapshots, _ = yield from read_snapshots(header)
    bitmaps = yield from read_bitmap_directory(header)
    specific: dict[str, Any] = {
        "compat": "1.1" if header.version >= 3 else "0.10",
        "compression-type": h.COMPRESSION_TYPES[header.compression_type],
    }
    if header.version >= 3:
        specific["lazy-refcounts"] = header.lazy_refcounts
    if bitmaps:
        specific["bitmaps"] = [
            {
                "flags": [
                    name
                    for flag, name in ((FLAG_IN_USE, "in-use"), (FLAG_AUTO, "auto"))
                    if bitmap.flags & flag
                ],
                "name": bitmap.name,
                "granularity": 1 << bitmap.granularity_bits,
            }
            for bitmap in bitmaps
        ]
    specific["refcount-bits"] = header.refcount_bits
    if header.crypt_method == h.CRYPT_LUKS:
        specific["encrypt"] = yield from _describe_luks(header)
    elif header.crypt_method == h.CRYPT_AES:
        specific["encrypt"] = {"format": "aes"}
    if header.data_file_name is not None:
        specific["data-file"] = header.data_file_name
    if header.has_data_file:
        specific["data-file-raw"] = bool(
            header.autoclear_features & h.AUTOCLEAR_RAW_DATA_FILE
        )
    if header.version >= 3:
        specific["corrupt"] = header.corrupt
        specific["extended-l2"] = header.extended_l2
    return ImageInfo(
        format="qcow2",
        virtual_size=header.size // SECTOR_SIZE * SECTOR_SIZE,
        cluster_size=header.cluster_size,
        encrypted=header.crypt_method != h.CRYPT_NONE,
        dirty=header.dirty,
        backing_filename=header.backing_filename,
        backing_format=header.backing_format,
        data_filename=_data_filename(header),
        snapshots=[snapshot.info for snapshot in snapshots],
        specific=specific,
        warnings=bitmap_warnings(header),
    )


def _describe_luks(header: Header) -> Generator[Step, Buffer, dict[str, Any]]:
    place = luks_range(header)
    assert place is not None
    from nbdqcow.crypto.luks import HEADER_LENGTH, LuksHeader
    from nbdqcow.formats.luks_options import describe

    luks = LuksHeader.parse((yield Read(place[0], HEADER_LENGTH)))
    return describe(luks, {"format": "luks"})


def bitmap_warnings(header: Header) -> list[str]:
    """Return the lines about bitmaps that another program made stale."""
    if header.extension(h.EXT_BITMAPS) is None or header.bitmaps_consistent:
        return []
    return [
        "a program lacking bitmap support modified this file, so all bitmaps are now "
        "considered inconsistent\n"
        "Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix."
    ]


def _data_filename(header: Header) -> str | None:
    """See `ImageInfo.data_filename`."""
    return (header.data_file_name or "") if header.has_data_file else None


def _plan(plan: object) -> "CreatePlan":
    # Only what creates images loads this.
    from nbdqcow.formats.qcow2.create import CreatePlan

    assert isinstance(plan, CreatePlan)
    return plan

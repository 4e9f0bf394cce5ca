"""Changing what kind of image an open image is.

Each part is done under `alone` and is valid with one write to the header; in
between others may use the image. Options and refusals are those of qemu-img's
``amend``.

Source: qcow2.txt, "Header", "Feature name table".
"""

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from nbdqcow.block.tools import OptionValue, Progress
from nbdqcow.errors import BlockError, ImageError, NotSupported, explained
from nbdqcow.formats.qcow2 import header as h
from nbdqcow.formats.qcow2 import resize
from nbdqcow.formats.qcow2.create import feature_names
from nbdqcow.formats.qcow2.expand_zeroes import (
    expand_zero_clusters,
    has_compressed_clusters,
)
from nbdqcow.formats.qcow2.generation import Generation, alone
from nbdqcow.formats.qcow2.header import Header
from nbdqcow.formats.qcow2.header_update import update_header
from nbdqcow.formats.qcow2.refcount_width import change_refcount_width
from nbdqcow.formats.qcow2.snapshot import read
from nbdqcow.formats.qcow2.snapshot_table import pack_snapshots

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.driver import Qcow2Driver

_NAMES: Final = frozenset(
    {
        *("compat", "size", "refcount_bits", "lazy_refcounts"),
        *("backing_file", "backing_fmt", "data_file", "data_file_raw"),
    }
)


@dataclass(frozen=True, slots=True)
class _Wishes:
    """What the options say; None for what is to stay."""

    version: int
    size: int | None
    refcount_bits: int | None
    lazy_refcounts: bool | None
    backing_file: str | None
    backing_format: str | None
    data_file: str | None
    data_file_raw: bool | None

    @classmethod
    def parse(cls, options: Mapping[str, OptionValue], header: Header) -> Self:
        """Raises `BlockError` for an option that there is not."""
        for name in options:
            if name not in _NAMES:
                raise BlockError(errno.EINVAL, f"Invalid parameter '{name}'")
        compat = options.get("compat")
        if compat is not None and compat not in h.COMPAT_VERSIONS:
            raise BlockError(errno.EINVAL, f"Unknown compatibility level {compat}")
        bits = _integer(options, "refcount_bits")
        if bits is not None and (not 1 <= bits <= 64 or bits & (bits - 1)):
            raise BlockError(
                errno.EINVAL,
                "Refcount width must be a power of two and may not exceed 64 bits",
            )
        version = header.version
        if compat is not None:
            version = h.COMPAT_VERSIONS[str(compat)]
        return cls(
            version=version,
            size=_integer(options, "size") or None,
            refcount_bits=bits,
            lazy_refcounts=_flag(options, "lazy_refcounts"),
            backing_file=_text(options, "backing_file"),
            backing_format=_text(options, "backing_fmt"),
            data_file=_text(options, "data_file"),
            data_file_raw=_flag(options, "data_file_raw"),
        )

    def check(self, header: Header) -> None:
        """Refuse what the image can't become. Raises `BlockError`."""
        if self.data_file is not None and not header.has_data_file:
            raise BlockError(
                errno.EINVAL,
                "data-file can only be set for images that use an external data file",
            )
        is_raw = bool(header.autoclear_features & h.AUTOCLEAR_RAW_DATA_FILE)
        if self.data_file_raw and not is_raw:
            raise BlockError(
                errno.EINVAL, "data-file-raw cannot be set on existing images"
            )
        bits = self.refcount_bits
        if self.version < 3 and bits not in (None, 16, header.refcount_bits):
            raise BlockError(
                errno.EINVAL,
                "Refcount widths other than 16 bits require compatibility level 1.1 or"
                " above (use compat=1.1 or greater)",
            )
        if self.backing_file is not None or self.backing_format is not None:
            names = header.backing_filename, header.backing_format
            if (self.backing_file, self.backing_format) != names:
                raise BlockError(errno.EINVAL, "Cannot amend the backing file")
        if self.lazy_refcounts and self.version < 3:
            raise BlockError(
                errno.EINVAL,
                "Lazy refcounts only supported with compatibility level 1.1 and above"
                " (use compat=1.1 or greater)",
            )
        if self.version < header.version:
            self._check_downgrade(header)

    def _check_downgrade(self, header: Header) -> None:
        if header.has_data_file:
            raise NotSupported("Cannot downgrade an image with a data file")
        if (self.refcount_bits or header.refcount_bits) != 16:
            raise NotSupported("compat=0.10 requires refcount_bits=16")
        passing = h.INCOMPAT_DIRTY | h.INCOMPAT_COMPRESSION
        features = header.incompatible_features & ~passing
        if features:
            raise NotSupported(
                f"Cannot downgrade an image with incompatible features"
                f" {features:#x} set"
            )


def _integer(options: Mapping[str, OptionValue], name: str) -> int | None:
    value = options.get(name)
    return None if value is None else int(value)


def _flag(options: Mapping[str, OptionValue], name: str) -> bool | None:
    value = options.get(name)
    return None if value is None else bool(value)


def _text(options: Mapping[str, OptionValue], name: str) -> str | None:
    value = options.get(name)
    return None if value is None else str(value)


async def amend(
    image: "Qcow2Driver", options: Mapping[str, OptionValue], progress: Progress
) -> None:
    """See `FormatDriver.amend`."""
    header = image.header
    wishes = _Wishes.parse(options, header)
    wishes.check(header)
    # Some of what is wanted may need the newer version.
    if wishes.version > header.version:
        await _upgrade(image)
    if wishes.refcount_bits not in (None, header.refcount_bits):
        assert wishes.refcount_bits is not None
        order = wishes.refcount_bits.bit_length() - 1
        with explained("Failed to write refblock"):
            async with alone(image):
                await change_refcount_width(image, order, progress)
    await _change_data_file(image, wishes)
    await _change_lazy_refcounts(image, wishes.lazy_refcounts)
    if wishes.size is not None:
        await resize.resize(image, wishes.size, "off")
    if wishes.version < header.version:
        await _downgrade(image, progress)


async def change_backing_file(
    image: "Qcow2Driver", filename: str | None, format_name: str | None
) -> None:
    """See `FormatDriver.change_backing_file`."""
    header = image.header
    if header.autoclear_features & h.AUTOCLEAR_RAW_DATA_FILE and filename is not None:
        raise BlockError(
            errno.EINVAL, "Cannot set backing file with a raw external data file"
        )
    raw_format = None
    if format_name is not None and filename is not None:
        raw_format = format_name.encode("utf-8", "surrogateescape")
        if len(raw_format) > h.MAX_BACKING_FORMAT_BYTES:
            raise BlockError(errno.EINVAL, "Backing format name too long")

    def change(new: Header) -> None:
        new.backing_filename = filename
        new.set_extension(h.EXT_BACKING_FORMAT, raw_format)

    async with image.lock:
        await update_header(image, change)
        image.backing_filename = header.backing_filename
        image.backing_format = header.backing_format


async def _change_data_file(image: "Qcow2Driver", wishes: _Wishes) -> None:
    name = wishes.data_file
    if name is None and wishes.data_file_raw is None:
        return

    def change(new: Header) -> None:
        if name is not None:
            raw = name.encode("utf-8", "surrogateescape") or None
            new.set_extension(h.EXT_DATA_FILE, raw)
        if wishes.data_file_raw is False:
            new.autoclear_features &= ~h.AUTOCLEAR_RAW_DATA_FILE

    async with image.lock:
        await update_header(image, change)


async def _change_lazy_refcounts(image: "Qcow2Driver", wanted: bool | None) -> None:
    if wanted is None or wanted == image.header.lazy_refcounts:
        return
    async with alone(image):
        if not wanted:
            await image.mark_clean()

        def change(new: Header) -> None:
            new.compatible_features &= ~h.COMPAT_LAZY_REFCOUNTS
            if wanted:
                new.compatible_features |= h.COMPAT_LAZY_REFCOUNTS

        await update_header(image, change)
        image.lazy_refcounts = wanted


# -- versions --------------------------------------------------------------


async def _upgrade(image: "Qcow2Driver") -> None:
    async with alone(image):
        await _complete_snapshots(image)

        def change(new: Header) -> None:
            new.version, new.header_length = 3, h.V3_HEADER_LENGTH
            new.set_extension(h.EXT_FEATURE_NAMES, feature_names(new.cluster_size))

        await update_header(image, change)
        image.rebind()


async def _complete_snapshots(image: "Qcow2Driver") -> None:
    """Give each snapshot the fields that version 3 wants."""
    snapshots, old_length = await read(image)
    if all(one.complete for one in snapshots):
        return
    completed = [one.completed(image.size) for one in snapshots]
    generation = Generation(image)
    old_l1_length = len(image.tables.l1) * 8
    try:
        table = pack_snapshots(completed)
        await generation.reserve(
            nb_l2_tables=0,
            nb_l1_entries=len(image.tables.l1),
            snapshots_length=len(table),
        )
        await generation.write_snapshot_table(table, len(completed))
    except ImageError as error:
        raise BlockError(errno.EFBIG, str(error)) from None
    except BaseException:
        await generation.abandon()
        raise
    generation.replaces(image.header.l1_table_offset, old_l1_length)
    generation.replaces(image.header.snapshots_offset, old_length)
    await generation.switch()


async def _check_snapshots(image: "Qcow2Driver") -> None:
    """Refuse a downgrade that version 2 can't tell snapshots for: all have the
    size of the image."""
    snapshots, _ = await read(image)
    for one in snapshots:
        if (
            one.disk_size not in (None, image.size)
            or one.info.vm_state_length >= 1 << 32
        ):
            raise NotSupported("Internal snapshots prevent downgrade of image")


async def _return_to_zlib(image: "Qcow2Driver") -> None:
    """Let an image without compressed clusters have them by zlib, which is all
    that version 2 knows. Raises `NotSupported` if it has some."""
    if image.header.compression_type == h.COMPRESSION_ZLIB:
        return
    # Nobody links a new one meanwhile.
    async with image.compressed.placing, alone(image):
        if await has_compressed_clusters(image):
            raise NotSupported(
                "Cannot downgrade an image with zstd compression type and existing"
                " compressed clusters"
            )

        def change(new: Header) -> None:
            new.compression_type = h.COMPRESSION_ZLIB
            new.incompatible_features &= ~h.INCOMPAT_COMPRESSION

        await update_header(image, change)
        image.compressed.choose_codec()


async def _downgrade(image: "Qcow2Driver", progress: Progress) -> None:
    await _check_snapshots(image)
    await _return_to_zlib(image)
    # They go with the last write: whatever fails before that, they are there.
    async with image.bitmaps.going() as forget_bitmaps, alone(image):
        image.lazy_refcounts = False
        await image.mark_clean()
        await expand_zero_clusters(image, progress)

        def change(new: Header) -> None:
            new.version, new.header_length = 2, h.V2_HEADER_LENGTH
            new.compatible_features = new.autoclear_features = 0
            new.extra = b""
            new.set_extension(h.EXT_FEATURE_NAMES, None)
            new.set_extension(h.EXT_BITMAPS, None)

        await update_header(image, change)
        forget_bitmaps()
        image.rebind()

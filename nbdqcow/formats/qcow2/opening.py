"""Opening a qcow2 image: its header, its tables, and what only writers need."""

from array import array
from collections.abc import Mapping as Options
from typing import TYPE_CHECKING, Any, Final, TypeVar

from nbdqcow.block.steps import run_steps
from nbdqcow.block.storage import StorageDriver
from nbdqcow.crypto.secrets import check_method
from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow2 import encryption, overlap
from nbdqcow.formats.qcow2 import header as qcow2_header
from nbdqcow.formats.qcow2.encryption_header import luks_range
from nbdqcow.formats.qcow2.entries import OFFSET_MASK
from nbdqcow.formats.qcow2.header import Header
from nbdqcow.formats.qcow2.repair import repair_dirty
from nbdqcow.formats.qcow2.settings import Settings
from nbdqcow.formats.qcow2.snapshot_table import read_snapshots, select_snapshot
from nbdqcow.formats.words import load_be64

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.driver import Qcow2Driver

D = TypeVar("D", bound="Qcow2Driver")
_METHODS: Final = {
    qcow2_header.CRYPT_NONE: None,
    qcow2_header.CRYPT_AES: "aes",
    qcow2_header.CRYPT_LUKS: "luks",
}


async def open_driver(
    driver_class: type[D],
    storage: StorageDriver,
    read_only: bool,
    options: Options[str, Any],
) -> D:
    """See `Qcow2Driver.open`."""
    header = await run_steps(qcow2_header.read_header(), storage)
    header.check_supported(read_only=read_only)
    settings = Settings.parse(options, header)
    if header.dirty and not read_only:
        # As in `prepare_for_writing`.
        await storage.flush()
        header = await repair_dirty(storage, header)
    check_method(_METHODS[header.crypt_method], options.get("encrypt_format"))
    wanted_snapshot = options.get("snapshot")
    if wanted_snapshot is not None:
        if not read_only:
            raise ImageError("A snapshot can only be opened read-only")
        await _show_snapshot(storage, header, wanted_snapshot)
    l1 = await _read_table(storage, header.l1_table_offset, header.l1_size, "L1")
    # Nothing below the size needs the entries behind it (VM state does),
    # but they are references all the same and stay in the file.
    data_file = None
    if header.has_data_file:
        if "open_data_file" not in options:
            raise ImageError("the image's external data file is not to be opened")
        data_file = await options["open_data_file"](header.data_file_name)
    try:
        image = driver_class(
            storage,
            header,
            l1,
            read_only=read_only,
            settings=settings,
            data=await encryption.open_data(
                storage, header, options.get("secret"), data_file
            ),
            data_file=data_file,
        )
        image.secret = options.get("secret")
        image.shows_old_disk = wanted_snapshot is not None
        if not read_only:
            await image.prepare_for_writing()
        if wanted_snapshot is None and header.bitmaps_consistent:
            await image.bitmaps.load()
        # Until it is closed, so not before it is open.
        if settings.clean_interval:
            image.tasks.spawn_until_close(image.drop_unused(settings.clean_interval))
    except BaseException:
        if data_file is not None:
            await data_file.close()
        raise
    return image


async def prepare_for_writing(image: "Qcow2Driver") -> None:
    """Load what only writers need. Raises `ImageError`."""
    header, bits, size = image.header, image.cluster_bits, image.cluster_size
    # What is built upon must be durable: clusters that whoever was killed has freed
    # get new data, and after a power cut the old tables must not name them.
    await image.storage.flush()
    if not image.refcounts.table:
        image.storage.announce("reftable_load")
        image.refcounts.table = await _read_table(
            image.storage,
            header.refcount_table_offset,
            header.refcount_table_clusters * size // 8,
            "refcount",
        )
    metadata = image.metadata
    metadata.add(0)
    ranges = [
        (header.l1_table_offset, header.l1_size * 8),
        (header.refcount_table_offset, header.refcount_table_clusters * size),
    ]
    if (luks := luks_range(header)) is not None:
        ranges.append(luks)
    for offset, length in ranges:
        metadata.update(range(offset >> bits, (offset + length + size - 1) >> bits))
    for table in (image.refcounts.table, image.tables.l1):
        metadata.update((entry & OFFSET_MASK) >> bits for entry in table if entry)
    await overlap.note_snapshots(image)
    unknown = header.autoclear_features & ~qcow2_header.AUTOCLEAR_KNOWN_MASK
    if unknown:
        # "An implementation may only write to an image with unknown
        # auto-clear features if it clears the respective bits first."
        known = header.autoclear_features & ~unknown
        value = known.to_bytes(8, "big")
        await image.storage.pwritev(qcow2_header.AUTOCLEAR_FEATURES_OFFSET, [value])
        await image.storage.flush()
        header.autoclear_features = known


async def _read_table(
    storage: StorageDriver, offset: int, nb_entries: int, what: str
) -> "array[int]":
    """Read a table of the header's; the header has bounded its length."""
    # A sparse tail is legal (the table reads as zeroes there), a table that
    # lies wholly behind the end is not.
    if nb_entries and offset >= storage.length:
        raise ImageError(f"Could not read {what} table: it is past the file's end")
    return load_be64(await storage.pread(offset, nb_entries * 8))


async def _show_snapshot(
    storage: StorageDriver, header: Header, wanted: str | tuple[str | None, str | None]
) -> None:
    """Let a header that is in memory only describe a snapshot's disk.

    Raises `ImageError` if there is no such snapshot, or it can't be right.
    """
    snapshots, _ = await run_steps(read_snapshots(header), storage)
    chosen = select_snapshot(snapshots, wanted)
    if chosen.disk_size is not None:
        header.size = chosen.disk_size
    header.l1_size, header.l1_table_offset = chosen.l1_size, chosen.l1_table_offset
    chosen.check_l1_table(header.cluster_size)
    if header.l1_size < header.l1_entries_needed:
        raise ImageError("Snapshot L1 table is too small")

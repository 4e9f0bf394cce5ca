"""New images: the header, the backing file's name, and an empty L1 table."""

from dataclasses import dataclass
from typing import Final

from nbdqcow.block.storage import StorageDriver
from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow1 import header as h
from nbdqcow.formats.qcow1.header import Header
from nbdqcow.units import SECTOR_SIZE, MiB, round_up

_ZEROES_CHUNK: Final = MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateOptions:
    """What a new image is to be like.

    Attributes:
        size: the virtual size in bytes; rounded up to whole sectors.
        backing_file: stored as given; None for none. Its format has no place.
        encrypted: data will be encrypted, with a passphrase that only those
            who open the image know.
    """

    size: int
    backing_file: str | None = None
    encrypted: bool = False


@dataclass(frozen=True, slots=True)
class CreatePlan:
    """The layout of a new image.

    Attributes:
        header: as `Header.parse` will find it.
        head: all that comes before the L1 table.
        file_length: bytes, of which those behind the head are zero.
    """

    header: Header
    head: bytes
    file_length: int

    @property
    def first_write(self) -> tuple[int, bytes]:
        """Offset and bytes of what must be durable before `last_write`."""
        return SECTOR_SIZE, self.head[SECTOR_SIZE:]

    @property
    def last_write(self) -> tuple[int, bytes]:
        """Offset and bytes of what makes the file an image: one sector."""
        return 0, self.head[:SECTOR_SIZE]


def plan_create(options: CreateOptions) -> CreatePlan:
    """Compute the layout of a new image. Raises `ImageError`."""
    name = b""
    # With a backing file clusters are of one sector, so that a write has
    # nothing to copy around it.
    cluster_bits, l2_bits = 12, 9
    if options.backing_file is not None:
        name = options.backing_file.encode("utf-8", "surrogateescape")
        cluster_bits, l2_bits = 9, 12
        if len(name) > h.MAX_BACKING_NAME_BYTES:
            raise ImageError("Backing file name too long")
    size = round_up(options.size, SECTOR_SIZE)
    if not size:
        raise ImageError("Image size is too small, cannot be zero length")
    header = Header(
        size=size,
        cluster_bits=cluster_bits,
        l2_bits=l2_bits,
        l1_table_offset=round_up(h.HEADER_LENGTH + len(name), 8),
        crypt_method=h.CRYPT_AES if options.encrypted else h.CRYPT_NONE,
        backing_file_offset=h.HEADER_LENGTH if name else 0,
        backing_file_size=len(name),
        backing_filename=options.backing_file,
    )
    if size > (1 << 63) - 1 or header.l1_bytes > h.MAX_L1_BYTES:
        raise ImageError("The image size is too large for file format 'qcow'")
    return CreatePlan(
        header,
        (header.pack() + name).ljust(header.l1_table_offset, b"\0"),
        # Whole sectors of L1 table, as QEMU writes them.
        header.l1_table_offset + round_up(header.l1_bytes, SECTOR_SIZE),
    )


async def create(storage: StorageDriver, options: CreateOptions) -> None:
    """Write a new image into ``storage``, whatever was there before.

    Raises `ImageError` before anything is touched, `OSError` later.
    """
    plan = plan_create(options)
    await storage.truncate(0)
    await storage.truncate(plan.file_length)
    if not storage.zero_beyond_end:
        await storage.write_zeroes(0, plan.file_length, may_unmap=True)
    for offset, data in (plan.first_write, plan.last_write):
        await storage.pwritev(offset, [data])
        await storage.flush()

"""Internal snapshots of an image that is in use.

Each operation builds a new generation of the metadata and switches to it, see
`nbdqcow.formats.qcow2.generation`. A snapshot is of the moment of the switch:
it has every write that was answered before, and none that began after.

Source: qcow2.txt, "Snapshots".
"""

import errno
import re
import time
from array import array
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from nbdqcow.block.steps import run_steps
from nbdqcow.block.tools import SnapshotInfo
from nbdqcow.errors import BlockError, ImageError
from nbdqcow.formats.qcow2.entries import MAX_L1_BYTES
from nbdqcow.formats.qcow2.generation import Generation, alone
from nbdqcow.formats.qcow2.snapshot_release import NO_ROOM, Release
from nbdqcow.formats.qcow2.snapshot_table import (
    Snapshot,
    find_snapshot,
    pack_extra,
    pack_snapshots,
    read_snapshots,
)
from nbdqcow.formats.words import load_be64

if TYPE_CHECKING:
    from nbdqcow.formats.qcow2.driver import Qcow2Driver

_MAX_NAME_BYTES: Final = 255
"""What QEMU keeps of a name."""

_ID_NUMBER: Final = re.compile("[0-9]{1,19}")


async def read(image: "Qcow2Driver") -> tuple[list[Snapshot], int]:
    """Return the image's snapshots and the bytes of their table.

    Raises `BlockError` if the table can't be right.
    """
    try:
        return await run_steps(read_snapshots(image.header), image.storage)
    except ImageError as error:
        raise BlockError(errno.EINVAL, str(error)) from None


async def create(
    image: "Qcow2Driver",
    name: str,
    *,
    vm_state_length: int,
    vm_clock_nanoseconds: int,
    icount: int | None,
    date_nanoseconds: int | None,
) -> SnapshotInfo:
    """See `Qcow2Driver.snapshot_create`."""
    if len(name.encode("utf-8", "surrogateescape")) > _MAX_NAME_BYTES:
        raise BlockError(
            errno.EINVAL, f"a snapshot's name has at most {_MAX_NAME_BYTES} bytes"
        )
    date = time.time_ns() if date_nanoseconds is None else date_nanoseconds
    seconds, nanoseconds = divmod(date, 1_000_000_000)
    async with alone(image):
        header, old_l1 = image.header, image.tables.l1
        snapshots, old_length = await read(image)
        info = SnapshotInfo(
            id=_new_id(snapshots),
            name=name,
            vm_state_length=vm_state_length,
            date_seconds=seconds & 0xFFFF_FFFF,
            date_nanoseconds=nanoseconds,
            vm_clock_nanoseconds=vm_clock_nanoseconds,
            icount=icount,
        )
        extra = pack_extra(vm_state_length, image.size, icount)
        taken = Snapshot(
            info, header.l1_table_offset, header.l1_size, image.size, extra
        )
        # The VM's state goes with the snapshot: it is not the disk's content.
        kept = header.l1_entries_needed if vm_state_length else len(old_l1)
        generation = Generation(image)
        try:
            table = _pack(image, [*snapshots, taken])
            await generation.reserve(
                nb_l2_tables=_nb_tables(old_l1),
                nb_l1_entries=len(old_l1),
                snapshots_length=len(table),
            )
            # The old tables become the snapshot's.
            generation.l1 = await generation.share(old_l1, kept)
            await generation.write_snapshot_table(table, len(snapshots) + 1)
        except BaseException:
            await generation.abandon()
            raise
        generation.replaces(header.snapshots_offset, old_length)
        await generation.switch()
    return info


async def apply(image: "Qcow2Driver", id_or_name: str) -> None:
    """See `Qcow2Driver.snapshot_apply`."""
    if image.bitmaps.infos:
        raise BlockError(errno.EBUSY, "Device has active dirty bitmaps")
    async with alone(image):
        header, old_l1 = image.header, image.tables.l1
        snapshots, old_length = await read(image)
        chosen = snapshots[find_snapshot(snapshots, id_or_name)]
        size = image.size if chosen.disk_size is None else chosen.disk_size
        generation = Generation(image)
        try:
            l1 = await read_l1(image, chosen)
            # An L1 table never gets shorter: the VM's state is at its end.
            nb_entries = max(len(l1), len(old_l1))
            needed = replace(header, size=size).l1_entries_needed
            if max(nb_entries, needed) * 8 > MAX_L1_BYTES:
                raise BlockError(errno.EFBIG, "the snapshot's L1 table is too large")
            nb_entries = max(nb_entries, needed)
            l1.extend([0] * (nb_entries - len(l1)))
            table = _pack(image, snapshots)
            await generation.reserve(
                nb_l2_tables=_nb_tables(l1),
                nb_l1_entries=nb_entries,
                snapshots_length=len(table),
            )
            generation.size = size
            generation.l1 = await generation.share(l1, len(l1))
            await generation.drop(old_l1)
            await generation.write_snapshot_table(table, len(snapshots))
        except BaseException:
            await generation.abandon()
            raise
        generation.replaces(header.l1_table_offset, len(old_l1) * 8)
        generation.replaces(header.snapshots_offset, old_length)
        await generation.switch()


async def delete(image: "Qcow2Driver", id_or_name: str) -> None:
    """See `Qcow2Driver.snapshot_delete`."""
    async with alone(image):
        snapshots, table_length = await read(image)
        index = find_snapshot(snapshots, id_or_name)
        chosen = snapshots.pop(index)
        l1 = await read_l1(image, chosen)
        table = _pack(image, snapshots)
        try:
            await _delete_at_once(
                image, chosen, l1, table, len(snapshots), table_length
            )
            return
        except OSError as error:
            if error.errno not in NO_ROOM or image.failed:
                raise
        release = Release(image, chosen, l1)
        await release.read()
        # What is behind the last one in a table is no part of it.
        kept = table if index < len(snapshots) or not snapshots else None
        await release.forget(kept, len(snapshots), table_length)
    await release.finish()


async def _delete_at_once(
    image: "Qcow2Driver",
    chosen: Snapshot,
    l1: "array[int]",
    table: bytes,
    nb_snapshots: int,
    old_table_length: int,
) -> None:
    """Delete a snapshot whose L1 table is ``l1``; ``table`` is of the others."""
    header, old_l1 = image.header, image.tables.l1
    generation = Generation(image)
    try:
        await generation.reserve(
            nb_l2_tables=_nb_tables(old_l1),
            nb_l1_entries=len(old_l1),
            snapshots_length=len(table),
        )
        await generation.drop(l1)
        await generation.set_flags()
        await generation.write_snapshot_table(table, nb_snapshots)
    except BaseException:
        await generation.abandon()
        raise
    generation.replaces(header.l1_table_offset, len(old_l1) * 8)
    generation.replaces(chosen.l1_table_offset, chosen.l1_size * 8)
    generation.replaces(header.snapshots_offset, old_table_length)
    await generation.switch()


async def read_l1(image: "Qcow2Driver", snapshot: Snapshot) -> "array[int]":
    """Return a snapshot's L1 table. Raises `BlockError` if it can't be one."""
    offset, length = snapshot.l1_table_offset, snapshot.l1_size * 8
    try:
        snapshot.check_l1_table(image.cluster_size)
    except ImageError as error:
        raise BlockError(errno.EINVAL, str(error)) from None
    if not length:
        return array("Q")
    if offset >= image.storage.length:
        raise BlockError(errno.EINVAL, "Snapshot L1 table is past the file's end")
    return load_be64(await image.storage.pread(offset, length))


def _pack(image: "Qcow2Driver", snapshots: list[Snapshot]) -> bytes:
    try:
        return pack_snapshots([one.completed(image.size) for one in snapshots])
    except ImageError as error:
        raise BlockError(errno.EFBIG, str(error)) from None


def _new_id(snapshots: list[Snapshot]) -> str:
    """Return the number after the largest, as QEMU does."""
    numbers = [_ID_NUMBER.match(one.info.id) for one in snapshots]
    return str(max((int(n[0]) for n in numbers if n), default=0) + 1)


def _nb_tables(l1: "array[int]") -> int:
    return len(l1) - l1.count(0)

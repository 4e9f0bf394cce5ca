"""Entries of the snapshot table, old and new: what is read is written back."""

from nbdqcow.block.steps import run_blocking
from nbdqcow.block.tools import SnapshotInfo
from nbdqcow.formats.qcow2.header import Header
from nbdqcow.formats.qcow2.snapshot_table import (
    Snapshot,
    pack_extra,
    pack_snapshots,
    read_snapshots,
)
from tests.builder import BytesFile

OFFSET = 4096


def snapshot(extra: bytes, vm_state_length: int = 0, icount: int | None = None):
    info = SnapshotInfo(
        id="7",
        name="seven",
        vm_state_length=vm_state_length,
        date_seconds=1_700_000_000,
        date_nanoseconds=8,
        vm_clock_nanoseconds=9,
        icount=icount,
    )
    size = int.from_bytes(extra[8:16], "big") if len(extra) >= 16 else None
    return Snapshot(info, 0x10000, 3, size, extra)


def read_back(snapshots: list[Snapshot]) -> list[Snapshot]:
    table = pack_snapshots(snapshots)
    header = Header(1 << 20, nb_snapshots=len(snapshots), snapshots_offset=OFFSET)
    read, length = run_blocking(
        read_snapshots(header), BytesFile(bytes(OFFSET) + table)
    )
    assert length == len(table)
    return read


def test_every_length_of_extra_data_is_kept():
    known = pack_extra(1 << 40, 5 << 20, 11)
    snapshots = [
        # Of version 2, when there was no more than 32 bits for the VM's state.
        snapshot(b"", vm_state_length=123456),
        snapshot(known[:8], vm_state_length=1 << 40),
        snapshot(known[:16], vm_state_length=1 << 40),
        snapshot(known, vm_state_length=1 << 40, icount=11),
        snapshot(pack_extra(0, 1, None) + b"fields of the future"),
    ]
    assert read_back(snapshots) == snapshots
    assert [one.complete for one in snapshots] == [False, False, True, True, True]


def test_a_long_vm_state_is_no_short_one():
    (read,) = read_back([snapshot(b"", vm_state_length=1 << 32)])
    assert read.info.vm_state_length == 0

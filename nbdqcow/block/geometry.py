"""Cylinders, heads and sectors of a disk that has only a size.

Nothing in qcow, qcow2 or raw images stores a geometry; a virtual machine that
wants one computes it from the size, and this is what it computes.
"""

from dataclasses import dataclass
from typing import Final

from nbdqcow.units import SECTOR_SIZE

SECTORS_PER_TRACK: Final = 63
_ATA_HEADS: Final = 16
_ATA_MAX_CYLINDERS: Final = 16383
_BIOS_MAX_CYLINDERS: Final = 1024
_BIOS_HEADS: Final = (16, 32, 64, 128, 255)


@dataclass(frozen=True, slots=True)
class Geometry:
    """How an old program addresses sectors; larger disks are cut short."""

    cylinders: int
    heads: int
    sectors: int = SECTORS_PER_TRACK


def physical_geometry(size: int) -> Geometry:
    """Return what an ATA disk of ``size`` bytes says of itself (PCHS): 16 heads,
    and at most 16383 cylinders."""
    cylinders = size // (SECTOR_SIZE * SECTORS_PER_TRACK * _ATA_HEADS)
    return Geometry(min(max(cylinders, 1), _ATA_MAX_CYLINDERS), _ATA_HEADS)


def logical_geometry(size: int) -> Geometry:
    """Return what a BIOS makes of a disk of ``size`` bytes (LCHS): as few heads
    as give at most 1024 cylinders, by "LBA-assisted translation"."""
    tracks = size // (SECTOR_SIZE * SECTORS_PER_TRACK)
    heads = next(
        (n for n in _BIOS_HEADS if tracks <= n * _BIOS_MAX_CYLINDERS), _BIOS_HEADS[-1]
    )
    return Geometry(min(max(tracks // heads, 1), _BIOS_MAX_CYLINDERS), heads)

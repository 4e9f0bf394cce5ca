"""Reads where the clusters of a qcow2 image are and how often each is referenced.

On purpose nothing of the package is used: it is to be checked by this. The image
must be sound and small, all of it is read at once (qcow2.txt, all sections).
"""

import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

_OFFSET = 0x00FF_FFFF_FFFF_FE00
_COPIED, _COMPRESSED, _ZERO = 1 << 63, 1 << 62, 1
_DATA_FILE, _EXTENDED_L2 = 1 << 2, 1 << 4
_STORED = (1 << 32) - 1
_BITMAPS, _LUKS = 0x23852875, 0x0537BE77


@dataclass(frozen=True, slots=True)
class Place:
    """Where one guest cluster of one table is.

    Attributes:
        kind: "data", "zero" (with or without a cluster), "compressed", or "empty":
            an extended entry without a subcluster that has data.
        host_offset: bytes; 0 without a cluster.
        subclusters: the bitmap of an extended entry, else 0.
        is_copied: the entry says that nothing else refers to its cluster.
        refcounts: of the host clusters that hold it, sorted.
    """

    kind: str
    host_offset: int
    subclusters: int
    is_copied: bool
    refcounts: tuple[int, ...]


@dataclass(slots=True)
class Disk:
    """The active disk or a snapshot: its guest clusters and L2 tables by index.

    An L2 table is there with its refcount and its entry's COPIED flag.
    """

    places: dict[int, Place]
    l2_tables: dict[int, tuple[int, bool]]


class Layout:
    """All of one image.

    Attributes:
        disks: by the snapshots' names; the active disk is "".
        refcounts: what the image says of each host cluster in use, by index.
        references: how often each host cluster is really referred to.
        nb_bitmap_clusters: what the stored bitmaps take, tables and directory
            not counted.
    """

    def __init__(self, path: Path) -> None:
        self._image = path.read_bytes()
        version, self._bits, size = *self._unpack("I", 4), *self._unpack("IQ", 20)
        self._size: int = size
        self._has_zeroes = version >= 3
        features, order = 0, 4
        if self._has_zeroes:
            (features,), (order,) = self._unpack("Q", 72), self._unpack("I", 96)
        self._has_data_file = bool(features & _DATA_FILE)
        self._entry_length = 16 if features & _EXTENDED_L2 else 8
        self.references: Counter[int] = Counter()
        self.nb_bitmap_clusters = 0
        self._refer(0, 1)
        self.refcounts = self._read_refcounts(1 << order)
        self.disks = {"": self._disk(*reversed(self._unpack("IQ", 36)))}
        self._read_snapshots(*self._unpack("IQ", 60))
        self._read_extensions(self._unpack("I", 100)[0] if version >= 3 else 72)

    def _unpack(self, format_: str, offset: int) -> tuple[int, ...]:
        return struct.unpack_from(f">{format_}", self._image, offset)

    def _entries(self, offset: int, nb: int) -> tuple[int, ...]:
        self._refer(offset, nb * 8)
        return self._unpack(f"{nb}Q", offset)

    def _refer(self, offset: int, length: int) -> range:
        """Count a reference to each cluster of a range; return their indexes."""
        indexes = range(offset >> self._bits, (offset + length - 1 >> self._bits) + 1)
        self.references.update(indexes)
        return indexes

    def _read_refcounts(self, width: int) -> dict[int, int]:
        cluster = 1 << self._bits
        table, nb_clusters = self._unpack("QI", 48)
        found: dict[int, int] = {}
        per_block = cluster * 8 // width
        blocks = self._entries(table, nb_clusters * cluster // 8)
        for number, block in enumerate(blocks):
            if not block:
                continue
            self._refer(block, cluster)
            raw = self._image[block : block + cluster].ljust(cluster, b"\0")
            for i in range(per_block):
                if width >= 8:
                    value = int.from_bytes(raw[i * width // 8 : (i + 1) * width // 8])
                else:
                    value = raw[i * width // 8] >> i * width % 8 & (1 << width) - 1
                if value:
                    found[number * per_block + i] = value
        return found

    def _read_snapshots(self, nb_snapshots: int, offset: int) -> None:
        start = offset
        for _ in range(nb_snapshots):
            l1_offset, nb_l1, id_length, name_length = self._unpack("QIHH", offset)
            (extra_length,) = self._unpack("I", offset + 36)
            name_offset = offset + 40 + extra_length + id_length
            name = self._image[name_offset : name_offset + name_length].decode()
            self.disks[name] = self._disk(l1_offset, nb_l1)
            offset = name_offset + name_length + 7 & ~7
        if nb_snapshots:
            self._refer(start, offset - start)

    def _read_extensions(self, offset: int) -> None:
        while (kind := self._unpack("I", offset)[0]) != 0:
            (length,) = self._unpack("I", offset + 4)
            if kind == _BITMAPS:
                self._read_bitmaps(*self._unpack("I4xQQ", offset + 8))
            elif kind == _LUKS:
                self._refer(*self._unpack("QQ", offset + 8))
            offset += 8 + (length + 7 & ~7)

    def _read_bitmaps(self, nb_bitmaps: int, length: int, offset: int) -> None:
        self._refer(offset, length)
        for _ in range(nb_bitmaps):
            table, nb_entries = self._unpack("QI", offset)
            name_length, extra_length = self._unpack("HI", offset + 18)
            for entry in self._entries(table, nb_entries):
                if entry & _OFFSET:
                    self._refer(entry & _OFFSET, 1)
                    self.nb_bitmap_clusters += 1
            offset += 24 + extra_length + name_length + 7 & ~7

    def _disk(self, l1_offset: int, nb_l1: int) -> Disk:
        disk = Disk({}, {})
        nb_l2 = (1 << self._bits) // self._entry_length
        for l1_index, l1_entry in enumerate(self._entries(l1_offset, nb_l1)):
            table = l1_entry & _OFFSET
            if not table:
                continue
            self._refer(table, 1)
            refcount = self.refcounts.get(table >> self._bits, 0)
            disk.l2_tables[l1_index] = refcount, bool(l1_entry & _COPIED)
            for l2_index in range(nb_l2):
                place = self._place(table + l2_index * self._entry_length)
                if place:
                    disk.places[l1_index * nb_l2 + l2_index] = place
        return disk

    def _place(self, entry_offset: int) -> Place | None:
        (entry,) = self._unpack("Q", entry_offset)
        subclusters = 0
        if self._entry_length == 16:
            (subclusters,) = self._unpack("Q", entry_offset + 8)
        if not entry and not subclusters:
            return None
        length = 1 << self._bits
        if entry & _COMPRESSED:
            kind, shift = "compressed", 62 - (self._bits - 8)
            offset = entry & (1 << shift) - 1
            nb_sectors = (entry >> shift & (1 << 62 - shift) - 1) + 1
            length = nb_sectors * 512 - offset % 512
        else:
            offset = entry & _OFFSET
            kind = "zero" if self._has_zeroes and entry & _ZERO else "data"
            if self._entry_length == 16:
                kind = "data" if subclusters & _STORED else "empty"
        refcounts: tuple[int, ...] = ()
        if offset and not self._has_data_file:
            indexes = self._refer(offset, length)
            refcounts = tuple(sorted(self.refcounts.get(i, 0) for i in indexes))
        return Place(kind, offset, subclusters, bool(entry & _COPIED), refcounts)

    @property
    def has_subclusters(self) -> bool:
        """Whether entries tell of subclusters."""
        return self._entry_length == 16

    @property
    def guest_clusters(self) -> set[int]:
        """Those with an entry in a disk's tables, by index."""
        return {index for disk in self.disks.values() for index in disk.places}

    # -- what must hold of one image, and of two -----------------------------

    def assert_sound(self) -> None:
        """Each cluster counts its references, and COPIED tells sole ownership."""
        assert self.refcounts == dict(self.references)
        active = self.disks[""]
        for index, (refcount, is_copied) in active.l2_tables.items():
            assert is_copied == (refcount == 1), f"L2 table {index}"
        for index, place in active.places.items():
            if place.kind != "compressed" and place.refcounts:
                assert place.is_copied == (place.refcounts == (1,)), (index, place)

    def shown(self, index: int, *, has_backing: bool) -> dict[str, tuple[object, ...]]:
        """Return of each disk that has something in a guest cluster what it is.

        That is the kind, the subclusters and, of data, how many disks have the
        same one: what does not depend on the program. Not in it are the place in
        the file, marks for zeroes where nothing would show through, and clusters
        kept under zeroes.
        """
        places = {name: disk.places.get(index) for name, disk in self.disks.items()}
        held = Counter(one.host_offset for one in places.values() if has_data(one))
        seen: dict[str, tuple[object, ...]] = {}
        for name, place in places.items():
            if has_data(place):
                mask = -1 if has_backing else _STORED
                nb_disks = held[place.host_offset]
                seen[name] = (place.kind, place.subclusters & mask, nb_disks)
            elif place and has_backing and (place.kind == "zero" or place.subclusters):
                seen[name] = (place.kind, place.subclusters)
        return seen


def has_data(place: Place | None) -> TypeGuard[Place]:
    """Whether data is stored for a guest cluster, or part of it."""
    return place is not None and place.kind in ("data", "compressed")


def assert_alike(
    ours: Layout,
    theirs: Layout,
    compressed: set[int],
    ends: set[int],
    *,
    has_backing: bool,
) -> None:
    """Find the same shared by the same disks in two images.

    Together with `Layout.assert_sound` this is about all refcounts of guest
    clusters, and what is stored of them (`_is_like`). Of those that were
    ``compressed`` by one of them it is asked whether what both store is shared
    alike. Where the disk ended once (``ends``) we zero
    what is behind that when it grows, so nothing is asked. L2 tables are not compared:
    QEMU shares one between the disk and a snapshot until the next write, we do
    so only if no flag in it has to change.
    """
    assert list(ours.disks) == list(theirs.disks)
    for index in sorted((ours.guest_clusters | theirs.guest_clusters) - ends):
        mine = ours.shown(index, has_backing=has_backing)
        its = theirs.shown(index, has_backing=has_backing)
        if index in compressed and ours.has_subclusters:
            # Zeroes over a part go into the entry, and leave the cluster shared,
            # only where it is not compressed.
            continue
        if index in compressed:
            both = {n for n in mine.keys() & its if len(mine[n]) == len(its[n]) == 3}
            mine, its = ({n: seen[n][2:] for n in both} for seen in (mine, its))
        assert mine.keys() == its.keys(), f"cluster {index}: {mine}, {its}"
        for name, seen in mine.items():
            assert _is_like(seen, its[name]), f"cluster {index}: {mine}, {its}"


def _is_like(mine: tuple[object, ...], its: tuple[object, ...]) -> bool:
    """Whether two are the same but for subclusters: in a cluster that is copied
    because another disk has it, too, QEMU stores all from the first to the last
    one that there were, and we those that there were."""
    if mine == its:
        return True
    if mine[0] != "data" or (mine[0], mine[2:]) != (its[0], its[2:]):
        return False
    assert isinstance(mine[1], int)
    assert isinstance(its[1], int)
    return not mine[1] & _STORED & ~its[1]

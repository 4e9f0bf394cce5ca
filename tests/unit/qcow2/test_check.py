"""The consistency check: what it counts, what it repairs, what it survives."""

import errno
import os
import random
import struct

import numpy as np
import pytest

from nbdqcow.block.tools import REPAIR_ALL, REPAIR_LEAKS, REPAIR_NONE
from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow2.entries import OFFSET_MASK, OFLAG_COPIED, OFLAG_ZERO
from nbdqcow.formats.qcow2.header import Header
from nbdqcow.formats.qcow2.rebuild import choose_clusters
from nbdqcow.formats.qcow2.tool import Qcow2Tool
from tests.builder import BytesFile, ImageBuilder, patched
from tests.builder import builder_of_all_kinds as build


def check(image: bytes | BytesFile, repair: int = REPAIR_NONE):
    """Return the result, the lines reported, and the image afterwards."""
    file = BytesFile(image) if isinstance(image, bytes) else image
    lines: list[str] = []
    result = Qcow2Tool().check(file, repair, lines.append)
    return result, lines, bytes(file.data)


def assert_clean(image: bytes) -> None:
    result, lines, _ = check(image)
    assert lines == []
    assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0)


@pytest.mark.parametrize("order", range(7))
def test_a_sound_image_of_every_refcount_width(order):
    image = build(refcount_order=order).build()
    assert_clean(image)
    result, _, _ = check(image)
    assert result.total_clusters == 2048
    assert result.allocated_clusters == 9
    # One data cluster behind the L2 table, and the compressed ones.
    assert result.fragmented_clusters == 3
    assert result.compressed_clusters == 2
    assert result.image_end_offset == len(image)


@pytest.mark.parametrize("bits", [9, 10, 16, 21])
@pytest.mark.parametrize("version", [2, 3])
def test_every_cluster_size(bits, version):
    builder = build(cluster_bits=bits, version=version)
    builder.add_snapshot()
    builder.add_snapshot("two", vm_state=1000)
    assert_clean(builder.build())


@pytest.mark.parametrize("repair", [REPAIR_LEAKS, REPAIR_ALL])
def test_leaks(repair):
    builder = build()
    builder.allocate()
    builder.refcounts[5] = 3
    image = builder.build()
    result, lines, _ = check(image)
    assert (result.leaks, result.corruptions) == (2, 1)
    assert "Leaked cluster 5 refcount=3 reference=1" in lines
    result, lines, fixed = check(image, repair)
    assert (result.leaks, result.leaks_fixed) == (0, 2)
    assert "Repairing cluster 12 refcount=1 reference=0" in lines
    assert_clean(fixed)


def test_a_refcount_too_low():
    builder = build()
    builder.l2[0][1] = builder.l2[0][0]
    image = builder.build()
    result, lines, _ = check(image)
    assert result.corruptions == 1
    assert lines == ["ERROR cluster 2 refcount=1 reference=2"]
    result, _, unfixed = check(image, REPAIR_LEAKS)
    assert result.corruptions == 1
    assert unfixed == image
    result, lines, fixed = check(image, REPAIR_ALL)
    assert (result.corruptions, result.corruptions_fixed) == (0, 3)
    assert_clean(fixed)


@pytest.mark.parametrize("order", range(7))
def test_rebuild(order):
    builder = build(refcount_order=order)
    builder.refcounts[5] = 0
    image = builder.build()
    result, lines, _ = check(image)
    assert result.corruptions == 2
    with pytest.raises(ImageError, match="Check failed"):
        check(image, REPAIR_LEAKS)
    result, lines, fixed = check(image, REPAIR_ALL)
    first = Header.parse(image).refcount_table_offset >> 12
    assert lines[-3:] == [
        "Rebuilding refcount structure",
        f"Repairing cluster {first} refcount=1 reference=0",
        f"Repairing cluster {first + 1} refcount=1 reference=0",
    ]
    assert (result.corruptions, result.corruptions_fixed) == (0, 1)
    assert_clean(fixed)
    # The new structures lie behind the old: till the header names them,
    # nothing has changed.
    offset = Header.parse(fixed).refcount_table_offset
    assert offset >= len(image)
    assert fixed[64 : len(image)] == image[64:]


@pytest.mark.parametrize("bits", [9, 12])
@pytest.mark.parametrize("order", [0, 4, 6])
def test_rebuild_on_a_device(order, bits):
    builder = build(refcount_order=order, cluster_bits=bits)
    builder.refcounts[5] = 0
    image = builder.build() + b"x" * (300 << bits)
    file = BytesFile(image)
    file.is_device = True
    result = Qcow2Tool().check(file, REPAIR_ALL, print)
    assert (result.corruptions, result.corruptions_fixed) == (0, 1)
    assert len(file.data) == len(image)
    assert_clean(bytes(file.data))
    # What was in use is as it was.
    end = builder.end
    assert file.data[1 << bits : end] == image[1 << bits : end]


class FullFile(BytesFile):
    """A file that can't grow: what can't be known before it is tried."""

    def __init__(self, data, nb_more=0):
        super().__init__(data)
        self.end = len(data) + nb_more

    def pwrite(self, offset, data):
        if offset + len(data) > self.end:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().pwrite(offset, data)


@pytest.mark.parametrize("nb_more", [0, 4096, 8192])
def test_rebuild_in_a_file_that_cannot_grow(nb_more):
    builder = build()
    builder.refcounts[5] = 0
    image = builder.build() + bytes(20 * 4096)
    file = FullFile(image, nb_more)
    result = Qcow2Tool().check(file, REPAIR_ALL, print)
    assert (result.corruptions, result.corruptions_fixed) == (0, 1)
    assert_clean(bytes(file.data))
    assert file.data[4096 : builder.end] == image[4096 : builder.end]
    # Where there is room behind the end, that is taken.
    at = Header.parse(bytes(file.data)).refcount_table_offset
    assert (at >= len(image)) == (nb_more == 8192)


def test_rebuild_on_a_full_device():
    builder = build()
    builder.refcounts[5] = 0
    file = BytesFile(builder.build())
    file.is_device = True
    before = bytes(file.data)
    with pytest.raises(ImageError, match="no room"):
        Qcow2Tool().check(file, REPAIR_ALL, print)
    assert file.data == before


def test_places_for_new_structures():
    free = np.array([3, 5, 6, 7, 9])
    assert choose_clusters(free, 2, 3) == (5, [3, 7, 9])
    assert choose_clusters(free, 3, 1) == (5, [3])
    for table_clusters, nb_blocks in ((4, 0), (2, 4), (8, 1)):
        with pytest.raises(ImageError, match="no room"):
            choose_clusters(free, table_clusters, nb_blocks)


def test_rebuild_without_a_refcount_table():
    image = patched(build().build(), (56, "I", 0))
    _, _, fixed = check(image, REPAIR_ALL)
    assert_clean(fixed)


@pytest.mark.parametrize("lost", ["data", "compressed", "L2 table"])
def test_rebuild_keeps_off_what_a_file_has_lost(lost):
    """New structures where its tables name something would be shown to the guest,
    and be freed when it writes there."""
    builder = build()
    # Behind the refcount structures, of two clusters, the first one is missing.
    place = builder.end + 0x3000
    if lost == "L2 table":
        builder.l1[3] = place
    elif lost == "data":
        builder.l2[0][4] = place
    else:
        builder.l2[0][4] = builder.compressed_entry(place, 700)
    image = builder.build()
    table_offset = Header.parse(image).refcount_table_offset
    _, lines, after = check(patched(image, (table_offset, "Q", 1)), REPAIR_ALL)
    assert "Rebuilding refcount structure" in lines
    assert len(image) < place < Header.parse(after).refcount_table_offset
    assert not any(after[place : place + 0x1000])


def test_a_refcount_that_does_not_fit():
    builder = build(refcount_order=0)
    builder.l2[0][1] = builder.l2[0][0]
    offset = builder.l2[0][0] & OFFSET_MASK
    image = builder.build()
    for repair in (REPAIR_NONE, REPAIR_ALL):
        result, lines, after = check(image, repair)
        assert (result.corruptions, result.leaks) == (1, 0)
        assert after == image
        # As QEMU says it, and not as a difference too: nothing can be set right.
        (line,) = lines
        assert line.startswith(f"ERROR: overflow cluster offset={offset:#x}\nUse ")
        assert "amend" in line


def test_a_refcount_is_raised_as_far_as_it_goes():
    builder = build(refcount_order=1)
    for index in range(1, 5):
        builder.l2[0][index] = builder.l2[0][0] = builder.l2[0][0] & ~OFLAG_COPIED
    cluster = (builder.l2[0][0] & OFFSET_MASK) // builder.cluster_size
    result, _, after = check(builder.build(), REPAIR_ALL)
    assert result.corruptions == 2, "five references, of which three are counted"
    assert result.corruptions_fixed == 1
    _, lines, _ = check(after)
    assert len(lines) == 1
    assert lines[0].startswith(
        f"ERROR: overflow cluster offset={cluster * builder.cluster_size:#x}"
    )


def test_copied_flags():
    builder = build()
    builder.l2[0][0] &= ~OFLAG_COPIED
    builder.l1[0] &= ~OFLAG_COPIED
    image = builder.build()
    result, lines, _ = check(image)
    assert result.corruptions == 2
    assert lines[0].startswith("ERROR OFLAG_COPIED L2 cluster: l1_index=0")
    _, _, fixed = check(image, REPAIR_LEAKS)
    assert_clean(fixed)


def test_a_wrong_copied_flag_on_a_shared_cluster():
    builder = build()
    builder.add_snapshot()
    builder.l2[0][0] |= OFLAG_COPIED
    result, _, fixed = check(builder.build(), REPAIR_LEAKS)
    assert result.corruptions_fixed == 1
    assert_clean(fixed)


def test_an_l2_table_named_twice_is_repaired_once():
    builder = build()
    builder.l1[1] = builder.l1[0]
    _, _, fixed = check(builder.build(), REPAIR_ALL)
    assert_clean(fixed)


def test_a_misaligned_zero_cluster_is_made_plain():
    builder = build()
    builder.l2[0][1] = 0x3200 | OFLAG_ZERO
    _, lines, fixed = check(builder.build(), REPAIR_ALL)
    assert any(line.startswith("Repairing offset=3200") for line in lines)
    assert_clean(fixed)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (0x12345678000 | OFLAG_COPIED, "exceeding the end of the file"),
        (0x3200 | OFLAG_COPIED, "Data cluster is not properly aligned"),
        (0x3000 | 1 << 58 | OFLAG_COPIED, "l2 entry with reserved bits set"),
    ],
)
def test_bad_l2_entries(entry, text):
    builder = build()
    builder.l2[0][1] = entry
    result, lines, _ = check(builder.build(), REPAIR_ALL)
    assert text in lines[0]
    # Nobody knows what the entry should have been.
    assert result.corruptions == 1


@pytest.mark.parametrize("repair", [REPAIR_LEAKS, REPAIR_ALL])
def test_data_that_an_l1_entry_names_is_not_repaired(repair):
    """It looks like a table with flags and zero clusters to be set right."""
    builder = build()
    words = [0x3A3A3A3A3A3A3A3B] * 500 + [0x3000, 0x4000, 0x3200 | OFLAG_ZERO]
    data = struct.pack(f">{len(words)}Q", *words).ljust(4096, b"\0")
    place = builder.add_data(2, data)
    builder.l1[3] = place | OFLAG_COPIED
    result, _, after = check(builder.build(), repair)
    assert result.corruptions > 500
    assert after[place : place + 4096] == data


def test_data_across_two_clusters_that_an_l1_entry_names_is_not_repaired():
    builder = build()
    data = struct.pack(">Q", 0x3200 | OFLAG_ZERO) * 512
    place = builder.add_data(2, data)
    assert builder.add_data(3, data) == place + 4096
    builder.l1[3] = place + 512 | OFLAG_COPIED
    _, _, after = check(builder.build(), REPAIR_ALL)
    assert after[place : place + 8192] == data * 2


@pytest.mark.parametrize("repair", [REPAIR_LEAKS, REPAIR_ALL])
def test_data_behind_a_table_is_not_repaired(repair):
    """By one bit of an L1 entry a table ends with the data of the next cluster."""
    builder = build()
    place = builder.l1[0] & OFFSET_MASK
    assert builder.l2[0][3] & OFFSET_MASK == place + 4096
    words = [0x3200 | OFLAG_ZERO, builder.l2[0][3] & OFFSET_MASK] * 256
    data = builder.clusters[place + 4096] = struct.pack(">512Q", *words)
    for index in range(64, 512):
        builder.add_data(index)
    entry = (builder.header.l1_table_offset, "Q", place + 512 | OFLAG_COPIED)
    _, lines, after = check(patched(builder.build(), entry), repair)
    assert any("is not cluster aligned" in line for line in lines)
    assert after[place + 4096 : place + 8192] == data


@pytest.mark.parametrize("entry", [0x7000000000, OFLAG_COPIED])
def test_nothing_is_freed_if_a_table_is_damaged(entry):
    builder = build()
    builder.add_data(1000)
    lost = builder.l1[1] & ~OFLAG_COPIED
    builder.l1[1] = entry
    del builder.l2[1]
    builder.clusters[lost] = b"the table of guest cluster 1000"
    image = builder.build()
    for repair in (REPAIR_LEAKS, REPAIR_ALL):
        result, lines, after = check(image, repair)
        assert result.leaks == 2
        assert any("kept, as a damaged table may use it" in line for line in lines)
        assert Header.parse(after).refcount_table_offset
        again, _, _ = check(after)
        assert again.leaks == 2


@pytest.mark.parametrize("what", ["header", "L1 table", "refcount table"])
def test_a_table_of_the_headers_is_no_l2_table(what):
    """Its entry lost another name: what that one maps is not free."""
    image = build().build()
    header = Header.parse(image)
    place = {
        "header": 512,
        "L1 table": header.l1_table_offset,
        "refcount table": header.refcount_table_offset,
    }[what]
    image = patched(image, (header.l1_table_offset, "Q", place))
    result, lines, after = check(image, REPAIR_ALL)
    assert any("overlaps with one that the header names" in line for line in lines)
    assert result.corruptions
    again, _, _ = check(after)
    assert again.corruptions
    assert again.leaks == result.leaks == 10


@pytest.mark.parametrize("bit", [1, 2])
def test_marks_are_cleared_by_a_repair(bit):
    image = patched(build().build(), (72, "Q", bit), (88, "Q", 1 << 40))
    _, _, same = check(image)
    assert same == image
    _, _, fixed = check(image, REPAIR_LEAKS)
    header = Header.parse(fixed)
    assert header.incompatible_features == 0
    assert header.autoclear_features == 0


def test_a_file_too_large_to_check():
    image = build().build()

    class Huge(BytesFile):
        length = 1 << 62

    with pytest.raises(ImageError, match="too many clusters"):
        check(Huge(image))


def test_references_are_bounded():
    builder = ImageBuilder(1 << 40, cluster_bits=16)
    builder.add_data(0)
    table = builder.l2_table(0)
    table[:] = [table[0]] * len(table)
    builder.l1[:] = [builder.l1[0]] * len(builder.l1)
    builder.header.l1_size = len(builder.l1)
    result, _, _ = check(builder.build())
    assert result.corruptions > 0


def test_damaged_images_end_in_a_result_or_an_image_error(seed):
    rng = random.Random(seed)
    builder = build(cluster_bits=9)
    builder.add_snapshot()
    builder.add_data(100)
    sound = builder.build()
    header = Header.parse(sound)
    tables = [
        header.l1_table_offset,
        header.refcount_table_offset,
        header.snapshots_offset,
        builder.l1[0] & ~OFLAG_COPIED,
    ]
    for _ in range(300):
        fields = []
        for _ in range(rng.randint(1, 4)):
            start = rng.choice([*tables, 0, rng.randrange(len(sound) - 600)])
            value = rng.choice(
                [
                    rng.getrandbits(64),
                    rng.randrange(len(sound)),
                    rng.randrange(len(sound)) // 512 * 512 | OFLAG_COPIED,
                    rng.getrandbits(8) << 56,
                    0,
                    (1 << 64) - 1,
                ]
            )
            fields.append((start + rng.randrange(64) * 8, "Q", value))
        image = patched(sound, *fields)
        if rng.random() < 0.3:
            image = image[: rng.randrange(len(image))]
        for repair in (REPAIR_NONE, REPAIR_LEAKS, REPAIR_ALL):
            try:
                result, lines, after = check(image, repair)
            except ImageError:
                continue
            found = result.corruptions or result.leaks
            assert bool(lines) >= bool(found or result.corruptions_fixed)
            if repair == REPAIR_NONE:
                assert after == image
            elif result.corruptions == result.leaks == 0:
                assert_clean(after)

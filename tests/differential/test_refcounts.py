"""The reader of refcounts finds what is wrong."""

import pytest

from nbdqcow.formats.qcow2.entries import OFLAG_COPIED
from tests.builder import ImageBuilder
from tests.differential.refcounts import Layout, assert_alike


def shared_image(order: int = 4) -> ImageBuilder:
    """Two disks: one shares a cluster of data, compressed and zero ones."""
    builder = ImageBuilder(refcount_order=order)
    builder.add_data(0)
    builder.add_compressed(1, b"some text")
    builder.add_zero(2, allocated=True)
    builder.add_snapshot()
    builder.add_data(70)
    return builder


def layout(builder: ImageBuilder, path) -> Layout:
    path.write_bytes(builder.build())
    return Layout(path)


@pytest.mark.parametrize("order", [1, 4, 6])
def test_a_sound_image(order, tmp_path):
    one = layout(shared_image(order), tmp_path / "a")
    one.assert_sound()
    assert one.shown(0, has_backing=False) == {
        "": ("data", 0, 2),
        "one": ("data", 0, 2),
    }
    assert one.shown(2, has_backing=False) == {}
    assert one.shown(70, has_backing=False) == {"": ("data", 0, 1)}
    assert_alike(one, one, set(), set(), has_backing=False)


@pytest.mark.parametrize("delta", [1, -1])
def test_a_wrong_refcount(delta, tmp_path):
    builder = shared_image()
    builder.refcounts[max(builder.refcounts)] += delta
    with pytest.raises(AssertionError):
        layout(builder, tmp_path / "a").assert_sound()


def test_a_wrong_flag(tmp_path):
    builder = shared_image()
    builder.l2[0][0] |= OFLAG_COPIED
    with pytest.raises(AssertionError):
        layout(builder, tmp_path / "a").assert_sound()


def test_data_in_one_image_only(tmp_path):
    one = layout(shared_image(), tmp_path / "a")
    builder = shared_image()
    builder.add_data(3)
    other = layout(builder, tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_alike(one, other, set(), set(), has_backing=False)

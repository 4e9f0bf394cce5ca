"""What VirtualBox's backend does with an image beside reading and writing it."""

import asyncio
import errno
import os

import pytest

from nbdqcow import open_image
from nbdqcow.block.geometry import Geometry, logical_geometry, physical_geometry
from nbdqcow.block.registry import blocking_file
from nbdqcow.block.rename import rename_image
from nbdqcow.errors import BlockError, ImageError, ImageInUse, NotSupported
from nbdqcow.formats.qcow1.tool import Qcow1Tool
from tests.qcow1_image import Image, Packed, Plain, check
from tests.serving import run

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30


def make(path, backing=b"", *, gap=0, name_at_end=False):
    clusters = {0: Plain(b"plain" * 800), 3: Packed(b"packed" * 600)}
    image = Image(
        MiB, clusters=clusters, backing=backing, gap=gap, name_at_end=name_at_end
    )
    path.write_bytes(image.build())
    return path


def below(path, letter=b"b"):
    path.write_bytes(letter * MiB)
    return path


async def byte_at(path, offset=MiB // 2):
    """Return a byte that the backing file has, opening the chain anew."""
    async with open_image(path, format="qcow", read_only=True) as node:
        return bytes(await node.pread(offset, 1))


# -- the backing file's name -----------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("name_at_end", [False, True])
@pytest.mark.parametrize("old", ["", "base", "a-name-that-is-longer"])
@pytest.mark.parametrize("new", ["b", "a-name-of-some-length", "n" * 200, None])
async def test_the_backing_file_is_renamed_in_place(tmp_path, old, new, name_at_end):
    for name in (old, new):
        if name:
            below(tmp_path / name, name[:1].encode())
    path = make(tmp_path / "a", old.encode(), name_at_end=name_at_end)
    async with open_image(path, format="qcow") as node:
        assert node.driver.backing_filename == (old or None)
        # Data all over the file, to find out what a name overwrites.
        await node.pwrite(64 * KiB, b"new" * 10000)
        before = bytes(await node.pread(0, MiB // 2))
        await node.change_backing_file(new, "raw")
        assert node.driver.backing_filename == new
        await node.pwrite(100 * KiB, b"more" * 1000)
        # Until the chain is opened again, what was open is what shows.
        shown = bytes(await node.pread(MiB // 2, 1))
        assert shown == (old[:1].encode() or b"\0")
    check(path)
    assert await byte_at(path) == (new[:1].encode() if new else b"\0")
    info = run("qemu-img", "info", "-f", "qcow", path).stdout
    assert (f"backing file: {new}" in info) == (new is not None)
    async with open_image(path, format="qcow") as node:
        after = bytearray(await node.pread(0, MiB // 2))
        unset = b"\0" if not old else old[:1].encode()
        reset = b"\0" if not new else new[:1].encode()
        expected = bytearray(before)
        expected[100 * KiB : 100 * KiB + 4000] = b"more" * 1000
        # What is not allocated shows the other backing file.
        for index in range(MiB // 2 // 4096):
            cluster = slice(index * 4096, index * 4096 + 4096)
            if expected[cluster] == unset * 4096:
                expected[cluster] = reset * 4096
        assert after == expected


@pytest.mark.asyncio
async def test_names_that_cannot_be(tmp_path):
    path = make(tmp_path / "a")
    async with open_image(path, format="qcow") as node:
        for name in ("n" * 1024, "a\0b"):
            with pytest.raises(BlockError) as error:
                await node.change_backing_file(name, None)
            assert error.value.errno == errno.EINVAL
    check(path)
    async with open_image(path, format="qcow", read_only=True) as node:
        with pytest.raises(BlockError) as error:
            await node.change_backing_file("b", None)
        assert error.value.errno == errno.EPERM


@pytest.mark.asyncio
async def test_zeroes_are_written_once_a_backing_file_may_show(tmp_path):
    path = make(tmp_path / "a")
    below(tmp_path / "base")
    async with open_image(path, format="qcow") as node:
        await node.change_backing_file("base", None)
        await node.write_zeroes(MiB // 2, 4096)
    assert await byte_at(path, MiB // 2) == b"\0"
    assert await byte_at(path, MiB // 2 + 4096) == b"b"


# -- another file name -------------------------------------------------------------


@pytest.mark.asyncio
async def test_an_image_is_renamed_while_it_serves(tmp_path):
    (tmp_path / "other" / "deeper").mkdir(parents=True)
    below(tmp_path / "base")
    path = make(tmp_path / "a", b"base")
    places = ["b", "other/c", "other/deeper/d", "e"]
    async with open_image(path, format="qcow") as node:
        for number, place in enumerate(places):
            new = tmp_path / place
            await asyncio.gather(
                rename_image(node, str(new)),
                node.pwrite(200 * KiB + number, b"%d" % number),
            )
            assert not path.exists()
            path = new
            assert node.filename == str(path)
            assert node.driver.backing_filename == os.path.relpath(
                tmp_path / "base", path.parent
            )
            assert bytes(await node.pread(MiB // 2, 1)) == b"b"
    assert bytes(await await_read(path, 200 * KiB, 4)) == b"0123"
    check(path)


async def await_read(path, offset, length):
    async with open_image(path, format="qcow", read_only=True) as node:
        return await node.pread(offset, length)


@pytest.mark.asyncio
async def test_names_with_links_and_absolute_names(tmp_path):
    for name in ("real/inner", "far"):
        (tmp_path / name).mkdir(parents=True)
    below(tmp_path / "real" / "base")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "inner")
    path = make(tmp_path / "real" / "inner" / "a", b"../base")
    through_link = tmp_path / "link" / "a"
    async with open_image(through_link, format="qcow") as node:
        await rename_image(node, str(tmp_path / "far" / "a"))
    assert not path.exists()
    path = tmp_path / "far" / "a"
    assert await byte_at(path) == b"b"
    absolute = str(tmp_path / "real" / "base")
    path = make(tmp_path / "far" / "b", absolute.encode())
    async with open_image(path, format="qcow", read_only=True) as node:
        # Nothing has to be changed in it.
        await rename_image(node, str(tmp_path / "b"))
        assert node.driver.backing_filename == absolute
    assert await byte_at(tmp_path / "b") == b"b"


@pytest.mark.asyncio
async def test_a_name_that_is_taken_or_nowhere(tmp_path):
    (tmp_path / "other").mkdir()
    below(tmp_path / "base")
    path = make(tmp_path / "a", b"base")
    taken = below(tmp_path / "other" / "taken")
    async with open_image(path, format="qcow") as node:
        for target, code in (
            (taken, errno.EEXIST),
            (tmp_path / "nowhere" / "b", errno.ENOENT),
        ):
            with pytest.raises(BlockError) as error:
                await rename_image(node, str(target))
            assert error.value.errno == code
            assert str(target) in str(error.value)
        with pytest.raises(ImageError):
            await rename_image(node, "nbd://localhost/a")
        assert node.driver.backing_filename == "base"
        assert node.filename == str(path)
    assert taken.read_bytes() == b"b" * MiB
    assert await byte_at(path) == b"b"
    # Too long for its place, the absolute name went elsewhere meanwhile.
    check(path)


@pytest.mark.asyncio
async def test_a_format_that_cannot_keep_the_link_is_not_moved(tmp_path):
    (tmp_path / "other").mkdir()
    below(tmp_path / "base")
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(4096))
    async with open_image(path, format="raw") as node:
        await rename_image(node, str(tmp_path / "other" / "a.raw"))
        with pytest.raises(NotSupported):
            await node.change_backing_file("base", "raw")


# -- other flags -------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("cache", ["writeback", "none", "unsafe"])
async def test_an_image_is_made_read_only_and_back_while_it_serves(tmp_path, cache):
    path = make(tmp_path / "a")
    async with open_image(path, format="qcow", cache=cache) as node:
        writes = [
            asyncio.ensure_future(node.pwrite(i * 4096, b"%03d" % i))
            for i in range(100, 200)
        ]
        await asyncio.sleep(0)
        await node.reopen(read_only=True)
        results = await asyncio.gather(*writes, return_exceptions=True)
        # All that was answered is durable, the rest failed as it should.
        refused = [r for r in results if r is not None]
        assert all(isinstance(r, BlockError) for r in refused)
        assert node.read_only
        check(path)
        assert not node.try_pwrite(0, b"x" * 512)
        for change in (node.pwrite(0, b"x"), node.write_zeroes(0, 1)):
            with pytest.raises(BlockError) as error:
                await change
            assert error.value.errno == errno.EPERM
        async with open_image(path, format="qcow", read_only=True) as other:
            for i, result in zip(range(100, 200), results, strict=True):
                text = bytes(await other.pread(i * 4096, 3))
                assert text == (b"%03d" % i if result is None else bytes(3))
        await node.reopen(read_only=False)
        await node.pwrite(300 * 512, b"again")
        assert bytes(await node.pread(300 * 512, 5)) == b"again"
        await node.reopen(read_only=True)
        await node.reopen(read_only=True)
    check(path)
    assert bytes(await await_read(path, 300 * 512, 5)) == b"again"


@pytest.mark.asyncio
async def test_opened_read_only_and_allowed_to_write_later(tmp_path):
    path = make(tmp_path / "a")
    async with open_image(path, format="qcow", read_only=True) as node:
        await node.reopen(read_only=False)
        await node.pwrite(4096, b"written")
    assert bytes(await await_read(path, 4096, 7)) == b"written"
    async with open_image(path, read_only=True, force_share=True) as node:
        with pytest.raises(ImageError, match="shared"):
            await node.reopen(read_only=False)
        assert node.read_only


@pytest.mark.asyncio
async def test_a_reader_beside_a_writer(tmp_path):
    """VirtualBox's "shareable"."""
    path = make(tmp_path / "a")
    async with open_image(path, format="qcow") as writer:
        with pytest.raises(ImageInUse):
            await open_image(path, format="qcow", read_only=True)
        await writer.pwrite(0, b"seen")
        await writer.flush()
        async with open_image(path, read_only=True, force_share=True) as reader:
            assert bytes(await reader.pread(0, 4)) == b"seen"


@pytest.mark.asyncio
async def test_sequential_reading_is_a_hint(tmp_path, monkeypatch):
    below(tmp_path / "base")
    path = make(tmp_path / "a", b"base")
    advice = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *words: advice.append(words[1:]))
    async with open_image(path, format="qcow", read_only=True) as node:
        node.expect_sequential(True)
        assert bytes(await node.pread(0, 5)) == b"plain"
        node.expect_sequential(False)
    sequential, normal = os.POSIX_FADV_SEQUENTIAL, os.POSIX_FADV_NORMAL
    assert advice == [(0, 0, sequential)] * 2 + [(0, 0, normal)] * 2


# -- what an image says of itself ----------------------------------------------------


def test_information_needs_neither_key_nor_backing_file_nor_tables(tmp_path):
    path = tmp_path / "a"
    image = Image(
        64 * GiB, clusters={0: Plain(b"x")}, backing=b"missing", key=b"unknown"
    )
    path.write_bytes(image.build()[:100])
    file = blocking_file().open(str(path))
    reads = []
    sound = file.pread

    def pread(offset, length):
        reads.append((offset, length))
        return sound(offset, length)

    file.pread = pread
    info = Qcow1Tool().describe(file)
    file.close()
    assert (info.virtual_size, info.cluster_size) == (64 * GiB, 4096)
    assert (info.backing_filename, info.encrypted) == ("missing", True)
    assert reads == [(0, 48), (48, 7)]


@pytest.mark.asyncio
async def test_version_length_and_geometry(tmp_path):
    path = make(tmp_path / "a")
    async with open_image(path) as node:
        assert node.format_name == "qcow"
        assert node.driver.version == 1
        assert node.driver.storage.length == path.stat().st_size
        assert physical_geometry(node.size) == Geometry(2, 16, 63)


@pytest.mark.parametrize(
    ("size", "physical", "logical"),
    [
        (512, (1, 16), (1, 16)),
        (100 * MiB, (203, 16), (203, 16)),
        (504 * MiB, (1024, 16), (1024, 16)),
        (504 * MiB + 16 * 63 * 512, (1025, 16), (512, 32)),
        (2 * GiB, (4161, 16), (520, 128)),
        (8 * GiB, (16383, 16), (1024, 255)),
        (1 << 50, (16383, 16), (1024, 255)),
    ],
)
def test_geometries(size, physical, logical):
    assert physical_geometry(size) == Geometry(*physical)
    assert logical_geometry(size) == Geometry(*logical)


@pytest.mark.asyncio
async def test_a_qcow2_image_is_renamed_as_well(tmp_path):
    (tmp_path / "other").mkdir()
    below(tmp_path / "base")
    path, moved = tmp_path / "a", tmp_path / "other" / "a"
    link = ("-b", "base", "-F", "raw")
    run("qemu-img", "create", "-qf", "qcow2", *link, path, "1M")
    async with open_image(path, format="qcow2") as node:
        await rename_image(node, str(moved))
        assert node.driver.backing_filename == "../base"
        await node.pwrite(0, b"new")
    run("qemu-img", "check", "-q", moved)
    async with open_image(moved, format="qcow2", read_only=True) as node:
        assert bytes(await node.pread(0, 6)) == b"newbbb"

"""Opening images: probing, chains, and what is refused."""

import asyncio

import pytest

from nbdqcow import open_image
from nbdqcow.errors import BlockError, ImageError
from tests.block.qemu import qemu_img


async def attempt(path, **options):
    async with open_image(path, **options) as node:
        return node.format_name


def test_a_guessed_raw_image_stays_raw(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(bytes(8192))
    header = b"QFI\xfb\x00\x00\x00\x03"

    async def run():
        async with open_image(path) as node:
            assert node.format_name == "raw"
            assert not node.try_pwrite(0, header)
            with pytest.raises(BlockError, match="guessed as raw"):
                await node.pwrite(0, header + bytes(100))
            await node.pwrite(4, header[4:])
            with pytest.raises(BlockError, match="guessed as raw"):
                await node.pwrite(0, header[:4])
            await node.pwrite(512, header)
            assert node.try_pwrite(4096, header) in (True, False)
        async with open_image(path, format="raw") as node:
            await node.pwrite(0, header)
        assert path.read_bytes()[:8] == header

    asyncio.run(run())


@pytest.mark.parametrize("request_name", ["write_zeroes", "discard", "pwrite"])
def test_nor_do_zeroes_make_it_another_format(tmp_path, request_name):
    """A LUKS container of version 257 is none yet."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(8192))

    async def run():
        async with open_image(path, detect_zeroes="on") as node:
            await node.pwrite(0, b"LUKS\xba\xbe\1\1" + b"\1" * 100)
            with pytest.raises(BlockError, match="guessed as raw"):
                if request_name == "pwrite":
                    await node.pwrite(6, b"\0")
                else:
                    await getattr(node, request_name)(6, 1)
            await node.write_zeroes(0, 8192)

    asyncio.run(run())
    assert path.read_bytes() == bytes(8192)


def test_backing_files_are_relative_to_the_image(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    base, top = tmp_path / "sub" / "base.raw", tmp_path / "sub" / "top.qcow2"
    base.write_bytes(b"base" * 1024)
    qemu_img("create", "-qf", "qcow2", "-b", "base.raw", "-F", "raw", str(top))
    monkeypatch.chdir(tmp_path)

    async def run():
        async with open_image("sub/top.qcow2", read_only=True) as node:
            assert bytes(await node.pread(0, 8)) == b"basebase"
            assert node.backing.format_name == "raw"

    asyncio.run(run())


def test_a_backing_loop_is_refused(tmp_path):
    a, b = tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    qemu_img("create", "-qf", "qcow2", str(a), "1M")
    qemu_img("create", "-qf", "qcow2", "-b", str(a), "-F", "qcow2", str(b))
    qemu_img("rebase", "-u", "-b", str(b), "-F", "qcow2", str(a))
    with pytest.raises(ImageError, match="loops"):
        asyncio.run(attempt(b))


def test_a_backing_file_outside_the_allowed_paths_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    secret, top = tmp_path / "secret", tmp_path / "in" / "top.qcow2"
    secret.write_bytes(bytes(4096))
    qemu_img("create", "-qf", "qcow2", "-b", str(secret), "-F", "raw", str(top))
    with pytest.raises(ImageError, match="outside the allowed paths"):
        asyncio.run(attempt(top, allowed_paths=[tmp_path / "in"]))
    (tmp_path / "in" / "link").symlink_to(secret)
    qemu_img("rebase", "-u", "-b", "link", "-F", "raw", str(top))
    with pytest.raises(ImageError, match="outside the allowed paths"):
        asyncio.run(attempt(top, allowed_paths=[tmp_path / "in"]))
    assert asyncio.run(attempt(top, allowed_paths=[tmp_path])) == "qcow2"


@pytest.mark.parametrize(
    ("name", "text"),
    [("nothing", "No such file"), ("nope:x", "Unknown protocol 'nope'")],
)
def test_what_can_not_be_opened_is_named(tmp_path, name, text):
    path = name if ":" in name else tmp_path / name
    with pytest.raises(ImageError, match=text) as caught:
        asyncio.run(attempt(path))
    assert "\n" not in str(caught.value)


def test_a_missing_backing_file_is_named(tmp_path):
    top = tmp_path / "top.qcow2"
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(512))
    qemu_img("create", "-qf", "qcow2", "-b", str(base), "-F", "raw", str(top))
    base.unlink()
    with pytest.raises(ImageError, match=r"Could not open backing file.*base.raw"):
        asyncio.run(attempt(top))
    # The lock went with the failure.
    base.write_bytes(bytes(512))
    assert asyncio.run(attempt(top)) == "qcow2"

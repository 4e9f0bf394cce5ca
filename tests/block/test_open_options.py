"""Images opened by ``json:`` names, with other backing files, in long chains."""

import asyncio
import json

import pytest

from nbdqcow import open_image
from nbdqcow.block.image_options import BackingOverride
from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow2.header import Header
from tests.block.qemu import qemu_img

MiB = 1 << 20


def named(**given):
    return "json:" + json.dumps(given)


def file(path):
    return {"driver": "file", "filename": str(path)}


async def first_byte(name, **options):
    async with open_image(name, **options) as node:
        return bytes(await node.pread(0, 1))


def read(name, **options):
    return asyncio.run(first_byte(name, **options))


@pytest.fixture
def overlay(tmp_path):
    for name in ("base", "other"):
        (tmp_path / name).write_bytes(name[:1].encode() * MiB)
    path = tmp_path / "overlay"
    qemu_img("create", "-qf", "qcow2", "-b", "base", "-F", "raw", path)
    return path


def test_json_names(overlay):
    assert read(named(driver="qcow2", file=file(overlay))) == b"b"
    assert read(named(**{"file.filename": str(overlay)})) == b"b"
    assert read(named(driver="raw", file=file(overlay))) == b"Q"
    name = named(driver="raw", offset=1, size=512, file=file(overlay))
    assert read(name) == b"F"
    assert read(named(driver="file", filename=str(overlay))) == b"Q"


def test_another_backing_file(overlay, tmp_path):
    other = {"driver": "raw", "file": file(tmp_path / "other")}
    name = named(driver="qcow2", file=file(overlay), backing=other)
    assert read(name) == b"o"
    assert read(named(driver="qcow2", file=file(overlay), backing=None)) == b"\0"
    assert read(overlay, backing=BackingOverride(none=True)) == b"\0"
    given = BackingOverride(str(tmp_path / "other"), options={"format": "raw"})
    assert read(overlay, backing=given) == b"o"
    name = named(driver="qcow2", file=file(overlay), backing={"driver": "qcow2"})
    with pytest.raises(ImageError, match="Could not open backing file"):
        read(name)


def test_what_is_discarded_does_not_show_a_given_backing_file(tmp_path):
    (tmp_path / "other").write_bytes(b"o" * MiB)
    path = tmp_path / "alone"
    qemu_img("create", "-qf", "qcow2", path, MiB)
    given = BackingOverride(str(tmp_path / "other"), options={"format": "raw"})

    async def run():
        async with open_image(path, backing=given) as node:
            assert bytes(await node.pread(0, 1)) == b"o"
            await node.pwrite(0, b"x" * 65536)
            await node.discard(0, 2 * 65536)
            assert bytes(await node.pread(0, 2 * 65536)) == bytes(2 * 65536)
            assert bytes(await node.pread(2 * 65536, 1)) == b"o"

    asyncio.run(run())


def set_backing_name(path, name):
    data = bytearray(path.read_bytes())
    header = Header.parse(bytes(data))
    header.backing_filename = name
    packed = header.pack()
    data[: len(packed)] = packed
    path.write_bytes(data)


def test_a_json_name_in_a_header(overlay, tmp_path):
    name = named(driver="raw", file=file(tmp_path / "other"))
    set_backing_name(overlay, name)
    assert read(overlay) == b"o"
    raw = tmp_path / "raw"
    qemu_img("convert", "-O", "raw", overlay, raw)
    assert raw.read_bytes() == b"o" * MiB
    assert read(overlay, allowed_paths=[str(tmp_path)]) == b"o"
    with pytest.raises(ImageError, match="outside the allowed paths"):
        read(overlay, allowed_paths=[str(tmp_path / "base")])
    set_backing_name(overlay, 'json:{"driver": "raw", "file": "x"}')
    with pytest.raises(ImageError, match="node-name"):
        read(overlay)
    set_backing_name(overlay, "json:{")
    with pytest.raises(ImageError, match="Could not parse the JSON options"):
        read(overlay)


def test_what_a_json_name_in_a_header_names_is_looked_at(overlay, tmp_path):
    middle = tmp_path / "middle"
    qemu_img("create", "-qf", "qcow2", middle, MiB)
    allowed = [str(overlay), str(middle)]
    for inner in (
        {"backing": {"driver": "raw", "file": file(tmp_path / "other")}},
        {"backing": {"file": file(middle), "backing": {
            "driver": "raw", "file": file(tmp_path / "other")}}},
        {"data-file": file(tmp_path / "other")},
        {"backing": {"driver": "nbd", "host": "localhost"}},
    ):  # fmt: skip
        name = named(driver="qcow2", file=file(middle), **inner)
        set_backing_name(overlay, name)
        with pytest.raises(ImageError, match="outside the allowed paths"):
            read(overlay, allowed_paths=allowed)


def test_a_chain_of_200_images(tmp_path):
    (tmp_path / "0").write_bytes(b"b" * 65536)
    qemu_img("create", "-qf", "qcow2", "-b", "0", "-F", "raw", tmp_path / "1")
    template = (tmp_path / "1").read_bytes()
    for number in range(2, 201):
        path = tmp_path / str(number)
        path.write_bytes(template)
        data = bytearray(template)
        header = Header.parse(template)
        header.backing_filename = str(number - 1)
        header.set_extension(0xE2792ACA, b"qcow2")
        packed = header.pack()
        data[: len(packed)] = packed
        path.write_bytes(data)

    async def run():
        async with open_image(tmp_path / "200") as node:
            assert bytes(await node.pread(0, 65536)) == b"b" * 65536
            assert node.try_pread(5, 10) in (None, b"b" * 10)
            status = await node.block_status(0, 65536)
            assert status.depths.tolist() == [201]
            await node.pwrite(100, b"x")
            assert bytes(await node.pread(99, 3)) == b"bxb"

    asyncio.run(run())
    qemu_img("check", tmp_path / "200")

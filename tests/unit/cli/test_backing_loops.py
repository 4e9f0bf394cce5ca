"""A chain of backing files that comes back to one of its images is told, by
whatever name it comes back: commands neither follow it for ever nor recurse."""

import os
from pathlib import Path

import pytest

from nbdqcow.cli.img_names import image_name
from nbdqcow.cli.img_open import check_backing_chain, describe_chain, open_image_file
from nbdqcow.errors import ImageError
from tests.crash.histories import created


def overlay(path: Path, backing: str | None) -> Path:
    options = {} if backing is None else {"backing_file": backing}
    path.write_bytes(created(**options))
    return path


def by_symbolic_link(directory: Path) -> Path:
    (directory / "link").symlink_to("image")
    return overlay(directory / "image", "./link")


def by_link_to_its_directory(directory: Path) -> Path:
    (directory / "there").symlink_to(".")
    return overlay(directory / "image", "there/image")


def by_hard_link(directory: Path) -> Path:
    path = overlay(directory / "image", "other")
    os.link(path, directory / "other")
    return path


def by_dots(directory: Path) -> Path:
    (directory / "below").mkdir()
    return overlay(directory / "image", "below/.././image")


def by_protocol(directory: Path) -> Path:
    return overlay(directory / "image", f"file:{directory}/image")


def by_json(directory: Path) -> Path:
    name = f'json:{{"driver":"qcow2","file.filename":"{directory}/./image"}}'
    return overlay(directory / "image", name)


def in_the_middle(directory: Path) -> Path:
    overlay(directory / "middle", "low")
    overlay(directory / "low", "again")
    (directory / "again").symlink_to("middle")
    return overlay(directory / "image", "middle")


LOOPS = [
    by_symbolic_link,
    by_link_to_its_directory,
    by_hard_link,
    by_dots,
    by_protocol,
    by_json,
    in_the_middle,
]


@pytest.mark.parametrize("build", LOOPS)
def test_info_sees_a_loop(build, tmp_path):
    name = image_name(str(build(tmp_path)), None, image_opts=False)
    with pytest.raises(ImageError, match="creates an infinite loop"):
        for number, _ in enumerate(describe_chain(name)):
            assert number < 4


@pytest.mark.parametrize("build", LOOPS)
@pytest.mark.parametrize("read_only", [True, False])
def test_a_chain_that_is_checked_is_seen_to_loop(build, read_only, tmp_path):
    with open_image_file(str(build(tmp_path)), None, read_only=read_only) as image:
        info = image.tool.describe(image.file)
        with pytest.raises(ImageError, match="creates an infinite loop") as caught:
            check_backing_chain(image, info)
    # As many words as there are images, not as there are names for them.
    assert str(caught.value).count("Could not open backing file") <= 3


def test_one_name_in_two_directories_is_no_loop(tmp_path):
    (tmp_path / "below").mkdir()
    overlay(tmp_path / "below" / "image", None)
    path = overlay(tmp_path / "image", "below/image")
    name = image_name(str(path), None, image_opts=False)
    assert len(list(describe_chain(name))) == 2
    with open_image_file(str(path), None) as image:
        check_backing_chain(image, image.tool.describe(image.file))

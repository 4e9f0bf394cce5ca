"""`nbdqcow.block.filter_names`: names of files with filters over them."""

import pytest

from nbdqcow.block.filter_names import (
    filtered_name,
    innermost,
    is_filtered,
    parse_filtered_name,
    shown_name,
)
from nbdqcow.block.image_options import parse_json_name, parse_pairs
from nbdqcow.errors import ImageError


@pytest.mark.parametrize(
    ("name", "config", "file"),
    [
        ("blkdebug:a.conf:disk", "a.conf", "disk"),
        ("blkdebug::disk", None, "disk"),
        ("blkdebug:/x/a.conf:nbd://host/e", "/x/a.conf", "nbd://host/e"),
        ("blkdebug::blkdebug:c:disk", None, "blkdebug:c:disk"),
    ],
)
def test_plain_names(name, config, file):
    named = parse_filtered_name(name)
    assert is_filtered(name)
    assert (named.config, named.children["image"]) == (config, {"filename": file})


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("disk", "disk"),
        ("./blkdebug:c:disk", "./blkdebug:c:disk"),
        ("blkdebug:c:disk", "disk"),
        ("blkdebug:c:blkdebug::disk", "disk"),
        ("blkverify:raw:disk", "disk"),
        ('blkdebug:json:{"image.filename": "disk", "align": "512"}', "disk"),
        (
            'blkdebug:json:{"image.driver": "qcow2", "image.file.filename": "disk"}',
            "disk",
        ),
    ],
)
def test_the_file_below_all_filters(name, file):
    assert innermost(name) == file


@pytest.mark.parametrize(
    "name",
    [
        "blkdebug:", "blkdebug:c", "blkverify:a", "blkverify::a", "blkdebug:json:",
        "blkdebug:json:[]", 'blkdebug:json:{"image.filename": 1}', "blkdebug:json:{}",
        'blkdebug:json:{"image": "node"}', "blkdebug:json:" + "[" * 100_000,
        "blkdebug::" * 50 + "disk",
    ],
)  # fmt: skip
def test_wrong_names_are_refused(name):
    with pytest.raises(ImageError):
        innermost(name)


def test_options_become_a_name_and_are_shown_again():
    text = (
        'json:{"driver": "qcow2", "file": {"driver": "blkdebug", "image": {"driver":'
        ' "file", "filename": "disk"}, "inject-error.0.event": "l2_load",'
        ' "inject-error.0.once": true, "inject-error.0.errno": 7}}'
    )
    name, options = parse_json_name(text)
    assert options == {"format": "qcow2"}
    assert is_filtered(name)
    assert shown_name(name, "qcow2") == text


def test_options_without_rules_are_a_plain_name():
    pairs = {"driver": "blkdebug", "image.filename": "disk", "config": "c"}
    assert parse_pairs(pairs) == ("blkdebug:c:disk", {"format": "raw"})
    assert shown_name("blkdebug:c:disk", "qcow2") == "blkdebug:c:disk"
    null = {"driver": "blkdebug", "image.driver": "null-co", "config": "c"}
    assert parse_pairs(null) == ("blkdebug:c:null-co://", {"format": "raw"})
    both = {"driver": "blkverify", "raw.filename": "r", "test.driver": "null-co"}
    assert parse_pairs(both)[0] == "blkverify:r:null-co://"
    # These would read otherwise.
    both = {"driver": "blkverify", "raw.driver": "null-co", "test.filename": "t"}
    assert parse_pairs(both)[0].startswith("blkverify:json:")
    pairs["image.filename"] = "./a:b"
    assert parse_pairs(pairs)[0].startswith("blkdebug:json:")
    assert innermost(parse_pairs(pairs)[0]) == "./a:b"


@pytest.mark.parametrize("key", ["take-child-perms.0", "unshare-child-perms.0"])
def test_permissions_are_refused(key):
    with pytest.raises(ImageError, match="child-perms' of blkdebug is not supported"):
        filtered_name("blkdebug", {"image.filename": "disk", key: "write"})

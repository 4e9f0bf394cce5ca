"""Options and output of nbdqcow-img."""

import json

import pytest

from nbdqcow.cli.img_options import (
    check_option_list,
    convert_option,
    format_json,
    parse_arguments,
    print_tree,
    split_options,
    wants_help,
    wants_json,
)
from nbdqcow.errors import ImageError, UsageError

LONG = {"help": "-h", "format=": "-f", "force-share": "-U", "output=": "--output"}


def test_options_anywhere():
    options, operands = parse_arguments(
        ["a", "-Uf", "raw", "b", "--out=json", "--form", "x", "--", "-c"],
        ":hf:U",
        LONG,
    )
    assert list(options) == [
        ("-U", ""),
        ("-f", "raw"),
        ("--output", "json"),
        ("-f", "x"),
    ]
    assert operands == ["a", "b", "-c"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-x"], "unrecognized option '-x'"),
        (["--foo=3"], "unrecognized option '--foo=3'"),
        (["--fo", "raw"], "unrecognized option '--fo'"),
        (["--force-share=1"], "unrecognized option '--force-share=1'"),
        (["-f"], "missing argument for option '-f'"),
        (["--outp"], "missing argument for option '--outp'"),
        (["--fo=raw", "-x"], "unrecognized option '--fo=raw'"),
        (["-Ux"], "unrecognized option '-x'"),
        (["-Uf"], "missing argument for option '-Uf'"),
        (["-:"], "unrecognized option '-:'"),
    ],
)
def test_wrong_options(arguments, text):
    options, _ = parse_arguments(arguments, ":hf:U", LONG)
    with pytest.raises(UsageError) as refusal:
        list(options)
    assert str(refusal.value) == text


def test_what_is_in_front_of_a_wrong_option():
    options, _ = parse_arguments(["a", "-fraw", "-f=", "-x", "-U"], ":hf:U", LONG)
    assert [next(options), next(options)] == [("-f", "raw"), ("-f", "=")]
    with pytest.raises(UsageError):
        next(options)


def test_names_of_one_option_are_not_ambiguous():
    long = {"size=": "-s", "sizes=": "-s", "silent": "-q"}
    options, _ = parse_arguments(["--siz=3", "--size=4"], ":", long)
    assert list(options) == [("-s", "3"), ("-s", "4")]
    with pytest.raises(UsageError):
        list(parse_arguments(["--si=3"], ":", long)[0])


def test_operands_end_the_options_with_posixly_correct(monkeypatch):
    monkeypatch.setenv("POSIXLY_CORRECT", "1")
    options, operands = parse_arguments(["-U", "a", "-U", "--"], ":hf:U", LONG)
    assert (list(options), operands) == ([("-U", "")], ["a", "-U", "--"])


def test_option_lists():
    for text in ("a=1,,b,c", "a=1,,"):
        assert check_option_list(text) == text
    for text in ("", ",a=1", "a=1,"):
        with pytest.raises(ImageError, match="Invalid option list"):
            check_option_list(text)
    assert wants_help("a=1,help")
    assert wants_help("?")
    assert not wants_help("a=help")
    known = {"a", "b", "nob"}
    assert list(split_options(known, "a=1,,2,b,nob,noa,a=")) == [
        ("a", "1,2"),
        ("b", "on"),
        ("nob", "on"),
        ("a", "off"),
        ("a", ""),
    ]
    with pytest.raises(ImageError, match="Invalid parameter 'c'"):
        list(split_options(known, "c=1"))


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("bool", "on", True),
        ("bool", "n", False),
        ("size", "64k", 65536),
        ("size", "15E", 15 << 60),
        ("num", "-1", -1),
        ("num", "0x10", 16),
        ("str", "x,y", "x,y"),
    ],
)
def test_convert_option(kind, text, value):
    assert convert_option("name", kind, text) == value


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("bool", "2", "expects 'on' or 'off'"),
        ("size", "x", "expects a non-negative number"),
        ("size", "16E", "is out of range"),
        ("num", "x", "expects a number"),
        ("num", str(1 << 64), "is out of range"),
    ],
)
def test_bad_values(kind, text, message):
    with pytest.raises(ImageError, match=message):
        convert_option("name", kind, text)


def test_output_kind():
    assert wants_json("json")
    assert not wants_json("human")
    with pytest.raises(ImageError, match="human or json"):
        wants_json("xml")


def test_json_is_json():
    value = {
        'a\t"\\\x01\x7f\n': ["\u00e9", "\U0001f600", 1, True, False, {}, []],
        "b": {"c": {"d": -1}},
    }
    assert json.loads(format_json(value)) == value
    assert format_json("\udcff\u00e9") == '"\\uFFFD\\u00E9"'
    assert format_json({"flags": []}) == '{\n    "flags": [\n    ]\n}'


def test_tree(capsys):
    print_tree({"a-b": True, "list": [{"x": 1}, "y"], "none": []}, 1)
    assert capsys.readouterr().out == (
        "    a b: true\n"
        "    list:\n"
        "        [0]:\n"
        "            x: 1\n"
        "        [1]: y\n"
        "    none:\n"
    )

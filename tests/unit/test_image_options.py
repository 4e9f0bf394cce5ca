"""What options and ``json:`` names mean."""

import json

import pytest

from nbdqcow.block.image_options import (
    BackingOverride,
    parse_json_name,
    parse_pairs,
)
from nbdqcow.block.json_options import NO_TEXT, flatten
from nbdqcow.errors import ImageError


def test_json_is_flattened():
    given = {"a": {"b": 1, "c": {"d": True}}, "e": None, "f.g": "x", "h": False}
    assert flatten(given) == {
        "a.b": "1", "a.c.d": "on", "e": None, "f.g": "x", "h": "off",
    }  # fmt: skip
    assert flatten({"a": ["x", {"b": 2}], "c": []}) == {
        "a.0": "x", "a.1.b": "2", "c": None,
    }  # fmt: skip
    assert flatten({"backing": 1, "a.backing": {}, "b": {"backing": None}}) == {
        "backing": NO_TEXT, "a.backing": NO_TEXT, "b.backing": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "filename", "options"),
    [
        ({"file": {"filename": "/a"}}, "/a", {}),
        ({"file.filename": "a:b"}, "./a:b", {}),
        (
            {"driver": "qcow2", "file": {"driver": "file", "filename": "/a:b"}},
            "/a:b",
            {"format": "qcow2"},
        ),
        ({"driver": "raw", "file.filename": "a", "offset": 512},
         "a", {"format": "raw", "driver_options": {"offset": "512"}}),
        ({"driver": "file", "filename": "a"}, "a", {"format": "raw"}),
        ({"driver": 1, "file": {"driver": True, "filename": "a"}}, "a", {}),
        ({"file.filename": "a", "data-file": 1}, "a", {}),
        (
            {"file.driver": "nbd", "file.host": "::1", "file.export": "a b"},
            "nbd://[::1]:10809/a%20b",
            {},
        ),
        (
            {"file": {"driver": "nbd", "server": {"type": "unix", "path": "/s k"}}},
            "nbd+unix://?socket=/s%20k",
            {},
        ),
        (
            {"driver": "nbd", "server.type": "inet", "server.host": "h",
             "server.port": "7"},
            "nbd://h:7",
            {"format": "raw"},
        ),
        (
            {"driver": "nbd", "path": "/s", "reconnect-delay": 3, "open-timeout": 4},
            "nbd+unix://?socket=/s&x-reconnect-delay=3&x-open-timeout=4",
            {"format": "raw"},
        ),
        ({"driver": "null-co"}, "null-co://", {"format": "raw"}),
        (
            {"driver": "raw", "file": {"driver": "null-aio", "read-zeroes": True,
                                       "size": "64k", "latency-ns": 5}},
            "null-aio://?size=65536&latency-ns=5",
            {"format": "raw"},
        ),
        (
            {"file.filename": "a", "backing": None},
            "a",
            {"backing": BackingOverride(none=True)},
        ),
        (
            {"file.filename": "a", "backing": {"driver": "raw"}},
            "a",
            {"backing": BackingOverride(options={"format": "raw"})},
        ),
        (
            {"file.filename": "a", "backing": {"file": {"filename": "b"},
             "backing": {"driver": "qcow2", "file.filename": "c"}}},
            "a",
            {"backing": BackingOverride("b", options={
                "backing": BackingOverride("c", options={"format": "qcow2"})})},
        ),
        (
            {"file.filename": "a", "lazy-refcounts": True, "cache-size": "1M",
             "refcount-cache-size": 4096, "pass-discard-other": True,
             "discard-no-unref": False, "cache-clean-interval": 60,
             "l2-cache-size": 65536},
            "a",
            {"l2_cache_size": 65536, "driver_options": {
                "lazy_refcounts": True, "cache_size": 1 << 20,
                "refcount_cache_size": 4096, "pass_discard_other": True,
                "discard_no_unref": False, "cache_clean_interval": 60}},
        ),
        (
            {"file.filename": "a", "overlap-check": "none"},
            "a",
            {"driver_options": {"overlap_check": ("none", {})}},
        ),
        (
            {"file.filename": "a",
             "overlap-check": {"template": "all", "inactive-l2": False}},
            "a",
            {"driver_options": {"overlap_check": ("all", {"inactive-l2": False})}},
        ),
        ({"file.filename": "a", "cache": {"direct": True, "writeback": False}},
         "a", {"cache": "directsync"}),
        ({"driver": "raw", "file": {"filename": "a", "locking": None}, "offset": None,
          "size": 1e3, "read-only": "true"},
         "a", {"format": "raw", "read_only": True, "driver_options": {"size": "1000"}}),
        ({"read-only": False, "file": {"filename": "a", "read-only": True,
          "auto-read-only": True, "detect-zeroes": "on", "force-share": False}},
         "a", {"read_only": True}),
        ({"force-share": False, "file": {"driver": "nbd", "path": "s",
          "force-share": True, "read-only": False, "cache": {"direct": True}}},
         "nbd+unix://?socket=s", {"force_share": True}),
        ({"file": {"driver": "null-co", "discard": "unmap", "node-name": "n"}},
         "null-co://", {}),
        ({"file.filename": "a", "data-file": {"driver": "file", "filename": "d"}},
         "a", {"driver_options": {"data_file": "d"}}),
    ],
)  # fmt: skip
def test_meaning(given, filename, options):
    assert parse_json_name("json:" + json.dumps(given)) == (filename, options)
    assert parse_pairs(flatten(given)) == (filename, options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Could not parse"),
        ("{", "Could not parse"),
        ("[" * 100_000, "Could not parse"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "Could not parse|too deep"),
        ("[]", "Invalid JSON object"),
        ("{}", "either driver or file"),
        ('{"file": "node"}', "node-name='node'"),
        ('{"backing": "node", "file.filename": "a"}', "node-name='node'"),
        ('{"backing": 1, "file.filename": "a"}', "'raw' does not support .*'backing'"),
        (
            '{"driver": "qcow2", "backing": {"backing": []}, "file.filename": "a"}',
            "Could not open backing file: .* does not support the option 'backing'",
        ),
        ('{"file": {"driver": "ssh", "filename": "a"}}', "Unknown driver 'ssh'"),
        ('{"file": {"driver": "nbd"}}', "address missing"),
        ('{"file": {"driver": "nbd", "host": "a", "path": "b"}}', "at the same time"),
        ('{"driver": "nbd", "server": {"host": "a"}}', "'port' is missing"),
        ('{"driver": "nbd", "server": {"type": "x"}}', "not accept value 'x'"),
        ('{"driver": "nbd", "path": "a", "open-timeout": "x"}', "expects a number"),
        ('{"driver": "nbd", "path": "a", "reconnect-delay": -1}', "expects a number"),
        ('{"file": {"driver": "nbd", "host": "a", "x": "b"}}', "'file.x' is not"),
        (
            '{"file.filename": "a", "file.x": 1}',
            "'file' doesn't support the option 'x'",
        ),
        ('{"file.filename": "a", "x": 1}', "'raw' does not support the option 'x'"),
        (
            '{"driver": "nbd", "host": "a", "key-secret": "s"}',
            "'nbd' does not support the option 'key-secret'",
        ),
        ('{"file.filename": "a", "x": [1]}', "does not support the option 'x.0'"),
        ('{"driver": "raw", "file": null}', 'must be specified for "file"'),
        ('{"driver": "raw", "file": 1}', 'must be specified for "file"'),
        ('{"driver": 1}', "either driver or file"),
        ('{"file": null}', "either driver or file"),
        ('{"file": {"locking": "on"}}', "either driver or file"),
        ('{"file": {"driver": "file", "filename": 1}}', "requires a file name"),
        ('{"driver": "raw", "file.filename": "a", "node-name": 1}', "node-name: '1'"),
        ('{"file": {"filename": "a", "node-name": ""}}', "Invalid node-name: ''"),
        ('{"file.filename": "a", "data-file": "n"}', "node-name='n'"),
        (
            '{"driver": "compress", "file.filename": "a", "key-secret": null}',
            "'compress' does not support the option 'key-secret'",
        ),
        ('{"file.filename": "a", "x": null}', "does not support the option 'x'"),
        ('{"file.filename": "a", "discard": "x"}', "Invalid discard option"),
        ('{"file": {"filename": "a", "locking": "x"}}', "invalid parameter value: x"),
        ('{"file": {"filename": "a", "aio": "x"}}', "invalid parameter value: x"),
        ('{"file": {"filename": "a", "discard": "x"}}', "Invalid discard option"),
        ('{"file": {"filename": "a", "read-only": 1}}', "expects 'on' or 'off'"),
        ('{"file": {"filename": "a", "detect-zeroes": 1}}', "parameter value: 1"),
        ('{"file.filename": "a", "cache-clean-interval": "1k"}', "expects a number"),
        ('{"file.filename": "a", "cache-clean-interval": -1}', "interval too big"),
        ('{"file.filename": "a", "lazy-refcounts": 3}', "expects 'on' or 'off'"),
        ('{"file.filename": "a", "cache-size": "x"}', "non-negative number below"),
        ('{"file.filename": "a", "overlap-check": "x"}', "Unsupported value 'x'"),
        ('{"file.filename": "a", "overlap-check.x": "on"}', "check.x' is not"),
        (
            '{"file.filename": "a", "overlap-check": "all",'
            ' "overlap-check.template": "none"}',
            "Conflicting values",
        ),
        ('{"file.filename": "a", "data-file": {"driver": "qcow2"}}', "'data-file'"),
    ],
)
def test_refusals(text, message):
    with pytest.raises(ImageError, match=message):
        parse_json_name("json:" + text)


@pytest.mark.parametrize(
    "text",
    [
        """{'file.filename': 'a"b'}""",
        """{"file.filename": 'a\\"b'}""",
        """{'file': {'filename': "a\\"b"}}""",
    ],
)
def test_json_strings_may_have_single_quotes(text):
    assert parse_json_name(f"json:{text}") == ('a"b', {})


def test_a_single_quote_in_single_quotes():
    assert parse_json_name(r"json:{'file.filename': 'it\'s \\'}") == ("it's \\", {})


@pytest.mark.parametrize("text", ["{'a: 1}", "{'a': 'b\"}", '{"a": \'}', "{'\\'}"])
def test_quotes_that_do_not_match(text):
    with pytest.raises(ImageError, match="Could not parse the JSON options"):
        parse_json_name(f"json:{text}")


def test_a_format_takes_the_place_of_the_names():
    name = 'json:{"driver": "qcow2", "file.filename": "a"}'
    assert parse_json_name(name, "raw") == ("a", {"format": "raw"})
    assert parse_json_name('json:{"driver": "file", "filename": "a"}', "qcow2") == (
        "a",
        {"format": "qcow2"},
    )
    with pytest.raises(ImageError, match="'qcow2' does not support the option"):
        parse_json_name(
            'json:{"driver":"luks","key-secret":"s","file.filename":"a"}', "qcow2"
        )

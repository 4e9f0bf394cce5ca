import pytest

from nbdqcow.block.image_options import parse_pairs
from nbdqcow.cli.option_text import parse_keyval, parse_properties, parse_snapshot
from nbdqcow.errors import ImageError, UsageError


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("", {}),
        ("a=b", {"a": "b"}),
        ("a=b,c.d=e", {"a": "b", "c.d": "e"}),
        ("a=b,,c,d=e", {"a": "b,c", "d": "e"}),
        ("a=b=c", {"a": "b=c"}),
        ("a", {"file": "a"}),
        ("x=1,a", {"x": "1", "a": "on"}),
        ("x=1,nodelay", {"x": "1", "delay": "off"}),
        ("a,,b,x=1", {"file": "a,b", "x": "1"}),
        (",,a=b,x=1", {"file": ",a=b", "x": "1"}),
        ("a=b,,,c=d", {"a": "b,", "c": "d"}),
        ("a=b,,,,c", {"a": "b,,c"}),
        ("a=b,c,,d=e", {"a": "b", "c": "on", "": "on", "d": "e"}),
        ("=b", {"": "b"}),
        ("a=1,a=2,", {"a": "2"}),
        ("a=", {"a": ""}),
    ],
)
def test_keyval(text, pairs):
    assert parse_keyval(text) == pairs


@pytest.mark.parametrize(
    ("text", "filename", "options"),
    [
        ("file.filename=/a", "/a", {}),
        (
            "driver=qcow2,file.driver=file,file.filename=/a,,b",
            "/a,b",
            {"format": "qcow2"},
        ),
        ("driver=file,filename=x", "x", {"format": "raw"}),
        (
            "filename=x,read-only=on,discard=unmap,detect-zeroes=on,"
            "l2-cache-size=2M,file.locking=off",
            "x",
            {
                "read_only": True,
                "discard": "unmap",
                "detect_zeroes": "on",
                "l2_cache_size": 2 << 20,
                "lock": False,
            },
        ),
        ("filename=x,file.locking=auto", "x", {"lock": True}),
        ("filename=x,discard=on", "x", {"discard": "unmap"}),
        ("filename=x,discard=off", "x", {"discard": "ignore"}),
        ("filename=x,cache.direct=on", "x", {"cache": "none"}),
        ("filename=x,cache.no-flush=on", "x", {"cache": "unsafe"}),
        ("filename=x,cache.direct=on,cache.no-flush=on", "x", {"cache": "none"}),
        ("filename=x,cache.direct=off", "x", {"cache": "writeback"}),
    ],
)
def test_image_opts(text, filename, options):
    assert parse_pairs(parse_keyval(text)) == (filename, options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Must specify either driver or file"),
        ("driver=qcow2", 'A block device must be specified for "file"'),
        ("=x", "Must specify either driver or file"),
        ("disk.qcow2", "Cannot find device='disk.qcow2' nor node-name='disk.qcow2'"),
        ("disk,file.filename=x", "Cannot reference an existing block device"),
        ("driver=qcow2,file=node0", "node-name='node0'"),
        ("filename=x,file.driver=nbd", "'file.filename' is not supported"),
        ("filename=x,backing.some=raw", "does not support the option 'some'"),
        ("filename=x,read-only=maybe", "'read-only' expects"),
        ("filename=x,discard=x", "Invalid discard option"),
        ("filename=x,detect-zeroes=x", "invalid parameter value: x"),
        ("filename=x,l2-cache-size=lots", "l2-cache-size"),
    ],
)
def test_image_opts_refused(text, message):
    with pytest.raises((ImageError, UsageError), match=message):
        parse_pairs(parse_keyval(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id=s,=x", "Invalid parameter ''"),
        (",id=s", "Invalid parameter ''"),
        ("id=s,flag", "Expected '=' after parameter 'flag'"),
    ],
)
def test_properties_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_properties(text)


def test_a_comma_in_a_snapshots_name():
    assert parse_snapshot("a,b") == "a,b"
    assert parse_snapshot("snapshot.name=a,,b") == (None, "a,b")
    assert parse_snapshot("snapshot.name=a,snapshot.id=1") == ("1", "a")
    with pytest.raises(UsageError, match="Invalid parameter 'b'"):
        parse_snapshot("snapshot.name=a,b")

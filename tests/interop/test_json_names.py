"""``json:`` names on command lines and in headers, beside qemu-img."""

import shlex
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, find_tool
from tests.interop.img_versions import as_7_2_says

OURS = (
    f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); sys.argv[0] = 'qemu-img';"
    "from nbdqcow.cli.img import main; sys.exit(main())"
)
INNER = '{"driver":"qcow2","file":{"driver":"file","filename":"base"}}'


@pytest.fixture
def directory(tmp_path):
    img = find_tool("qemu-img")
    for words in (
        ["base", "1M"],
        ["-b", f"json:{INNER}", "-F", "qcow2", "overlay"],
    ):
        subprocess.run(
            [img, "create", "-qf", "qcow2", *words], cwd=tmp_path, check=True
        )
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        "info overlay",
        "info --backing-chain overlay",
        "info --output=json overlay",
        'info \'json:{"driver":"qcow2","file.filename":"overlay"}\'',
        'check \'json:{"driver":"qcow2","file.filename":"overlay"}\'',
        'info \'json:{"driver":"raw","driver":"qcow2","file.filename":"base"}\'',
        'info \'json:{"driver":"raw","file":{"filename":"base","filename":"base"}}\'',
        # What is in an object counts, not the key with a dot.
        'info \'json:{"driver":"qcow2","file":{"filename":"base"},'
        '"file.filename":"overlay"}\'',
        'info --object \'{"qom-type":"secret","id":"s","data":"a","data":"b"}\' base',
        'map \'json:{"driver":"qcow2","file.filename":"overlay"}\'',
        'compare overlay \'json:{"driver":"qcow2","file.filename":"base"}\'',
        'resize \'json:{"driver":"qcow2","file.filename":"overlay"}\' 2M',
        "info \"json:{'driver':'qcow2','file.filename':'overlay'}\"",
        "info --image-opts driver=qcow2,file.filename=overlay,foo=1",
        # Values of other kinds, and no values.
        *(
            f'info \'json:{{"driver":"{driver}",{option},"file.filename":"base"}}\''
            for driver, option in (
                ("raw", '"size":1.5'),
                ("raw", '"size":true'),
                ("raw", '"size":1024e0'),
                ("raw", '"offset":"1k"'),
                ("raw", '"size":18446744073709551615'),
                ("qcow2", '"l2-cache-size":-1'),
                ("qcow2", '"l2-cache-size":"x"'),
                ("qcow2", '"l2-cache-size":null'),
                ("qcow2", '"cache-clean-interval":"1k"'),
                ("qcow2", '"cache-clean-interval":5000000000'),
                ("qcow2", '"read-only":"true"'),
                ("qcow2", '"read-only":null'),
                ("qcow2", '"overlap-check":1e3'),
                ("qcow2", '"detect-zeroes":false'),
                ("qcow2", '"detect-zeroes":1.5'),
                ("qcow2", '"discard":1.5'),
                ("qcow2", '"foo":null'),
                ("qcow2", '"file.locking":1.5'),
                ("qcow2", '"file.locking":null'),
                ("qcow2", '"file.discard":"x"'),
                ("qcow2", '"file.cache.direct":"x"'),
                ("qcow2", '"file.read-only":false,"read-only":true'),
                ("qcow2", '"file.read-only":"x"'),
                ("qcow2", '"file.force-share":true'),
                ("qcow2", '"file.auto-read-only":true'),
                ("qcow2", '"file.detect-zeroes":"unmap"'),
                ("qcow2", '"file.detect-zeroes":true'),
            )
        ),
        # Where QEMU wants a string, what is none is as good as not there.
        *(
            f"info 'json:{{{options}}}'"
            for options in (
                '"driver":1,"file":{"driver":"file","filename":"base"}',
                '"driver":true,"file":{"driver":1.5,"filename":"base"}',
                '"driver":7',
                '"driver":"qcow2","file":1',
                '"driver":"qcow2","file":{"filename":1}',
                '"driver":"qcow2","file":{"driver":"file","filename":1}',
                '"driver":"qcow2","file":{"locking":"on"}',
                '"driver":"qcow2","file":{"driver":"raw","file":1}',
                '"driver":"file","filename":1',
                '"driver":"compress","file":1',
                '"driver":"qcow2","file.filename":"base","data-file":1',
                '"driver":"raw","file":{"driver":"blkdebug","image":true}',
                *(
                    '"driver":"raw","file":{"driver":"blkdebug",'
                    f'"image":{{"driver":"file","filename":"base"}},{option}}}'
                    for option in (
                        '"inject-error":[]',
                        '"inject-error":null',
                        '"set-state":{}',
                        '"foo":null',
                        '"foo":[]',
                    )
                ),
                '"driver":"raw","file":{"driver":"blkverify","test":1,"raw":"x"}',
                '"file":1',
                '"filename":1',
            )
        ),
        *(
            f'info \'json:{{"driver":"qcow2",{option},"file.filename":"base"}}\''
            for option in (
                '"node-name":1',
                '"node-name":"a.b-c_1"',
                f'"node-name":"{"a" * 32}"',
                f'"node-name":"{"a" * 31}"',
                '"file.node-name":"_"',
                '"file.node-name":null',
            )
        ),
        # A backing file is null, a node's name, or options.
        *(
            f'{command} \'json:{{"driver":"qcow2","backing":{value},'
            '"file.filename":"overlay"}\''
            for command, value in (
                ("info", "1"),
                ("info", "[]"),
                ("info", '""'),
                ("map", "null"),
                ("map", '""'),
                ("map", '"x"'),
                ("check", '""'),
                ("measure -O raw", '""'),
            )
        ),
        'map \'json:{"driver":"qcow2","backing":true,"file.filename":"base"}\'',
        "map --image-opts driver=qcow2,backing=x,backing.driver=raw,"
        "file.filename=overlay",
        # An option of no format: the format is guessed first.
        'info \'json:{"driver":["x"],"file.filename":"overlay"}\'',
        'map \'json:{"driver":{"x":1},"file.filename":"overlay"}\'',
        "check --image-opts foo=1,file.filename=overlay",
        "map --image-opts foo=1,file.filename=absent",
        'map \'json:{"driver":"qcow2","cache":{},"file.filename":"overlay"}\'',
        'map \'json:{"driver":"qcow2","data-file":["x"],"file.filename":"base"}\'',
        # Nodes have names of their own, in the whole command line.
        "info --image-opts driver=qcow2,node-name=a,file.filename=base,"
        "file.node-name=a",
        "check --image-opts driver=qcow2,node-name=a,file.filename=base,"
        "file.node-name=a",
        "map --image-opts driver=qcow2,node-name=a,file.filename=overlay,"
        "backing.node-name=a",
        "compare --image-opts driver=qcow2,node-name=a,file.filename=base "
        "driver=qcow2,node-name=a,file.filename=overlay",
        "compare --image-opts driver=qcow2,node-name=a,file.filename=base "
        "driver=qcow2,node-name=b,file.filename=overlay",
        "map --image-opts driver=raw,file.driver=foo,file.filename=overlay",
        "info null-co://",
        # What is of no format is shown as what it is.
        "info -f file base",
        "info --output=json -f file overlay",
        "info --image-opts driver=file,filename=base",
        "info --image-opts driver=null-co",
        "info --output=json --image-opts driver=null-aio,size=64k,read-zeroes=on",
        "info --image-opts driver=null-co,read-zeroes=off,latency-ns=5,node-name=a",
        "info --image-opts driver=raw,size=512k,file.driver=null-co,file.size=1M",
        "info --image-opts driver=raw,offset=512,file.driver=null-co",
        "info --image-opts file.driver=null-co,file.size=5M",
        'info \'json:{"driver":"null-co","size":1048576,"read-zeroes":true}\'',
        'info \'json:{"driver":"raw","file":{"driver":"null-co","size":"1M"}}\'',
        "info --output=json null-aio:x",
        'map --output=json \'json:{"driver":"null-co","read-zeroes":true}\'',
        "map --output=json --image-opts driver=null-co,read-zeroes=on,size=1M",
        "compare -f raw -F qcow2 null-co:// overlay",
        "measure -O qcow2 null-co://",
        "convert -O qcow2 null-co:// out",
        'convert -O raw \'json:{"driver":"qcow2","file.filename":"overlay"}\' out',
    ],
)
def test_as_qemu_img(directory, line):
    compare(directory, line)


def compare(directory, line):
    words = shlex.split(line)
    outcomes = [
        subprocess.run(command, cwd=directory, capture_output=True)
        for command in (
            [find_tool("qemu-img"), *words],
            [sys.executable, "-c", OURS, *words],
        )
    ]
    theirs, ours = ((o.returncode, o.stdout, o.stderr) for o in outcomes)
    assert ours == as_7_2_says(words, theirs)


@pytest.mark.parametrize("line", ["info", "info --output=json --backing-chain"])
def test_a_snapshot_of_an_overlay_in_qemus_order(directory, line):
    snapshot = [find_tool("qemu-img"), "snapshot", "-c", "one", "overlay"]
    subprocess.run(snapshot, cwd=directory, check=True)
    compare(directory, f"{line} overlay")

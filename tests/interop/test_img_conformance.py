"""The same command line given to qemu-img and to nbdqcow-img.

Each case is a command line of `create`, `info` or `check`, and runs in two copies
of one directory. Standard output, standard error and exit status must be equal, and
so must what qemu-img then says of the images.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.builder import ImageBuilder, builder_of_all_kinds
from tests.conftest import REPOSITORY, find_tool, own_environment
from tests.interop.img_programs import (
    IN_A_PROCESS,
    files_of,
    look_at,
    run_ours,
    run_theirs,
)
from tests.interop.img_versions import FOLLOWED, qemu_version


def prepare(directory: Path) -> None:
    """Fill a directory with images that cases can use."""
    directory.mkdir()

    def img(*arguments: str) -> None:
        subprocess.run(
            ["qemu-img", *arguments], cwd=directory, check=True, capture_output=True
        )

    def create(*arguments: str) -> None:
        img("create", "-q", "-f", "qcow2", *arguments)

    create("base.qcow2", "8M")
    create("-b", "base.qcow2", "-F", "qcow2", "overlay.qcow2")
    create("-b", "overlay.qcow2", "-F", "qcow2", "top.qcow2", "16M")
    (directory / "sub").mkdir()
    create("-u", "-b", "../base.qcow2", "-F", "qcow2", "sub/overlay.qcow2", "8M")
    create("-u", "-b", "absent", "-F", "qcow2", "orphan.qcow2", "8M")
    create("-u", "-b", "orphan.qcow2", "-F", "qcow2", "orphan2.qcow2", "8M")
    create("-u", "-b", "loop2.qcow2", "-F", "qcow2", "loop1.qcow2", "8M")
    create("-u", "-b", "loop1.qcow2", "-F", "qcow2", "loop2.qcow2", "8M")
    create("-u", "-b", "x.raw", "-F", "qcow2", "wrong.qcow2", "8M")
    create("-o", "compat=0.10", "v2.qcow2", "8M")
    create("-o", "lazy_refcounts=on,refcount_bits=64", "lazy.qcow2", "8M")
    create("-o", "extended_l2=on,compression_type=zstd", "new.qcow2", "8M")
    create("-o", "data_file=data.raw,data_file_raw=on", "external.qcow2", "8M")
    create("-o", "preallocation=metadata", "full.qcow2", "1M")
    create("-o", "preallocation=metadata,cluster_size=512", "tiny.qcow2", "200k")
    create("snapshots.qcow2", "8M")
    img("snapshot", "-c", "one", "snapshots.qcow2")
    img("snapshot", "-c", "a rather long name of one", "snapshots.qcow2")
    create("bitmaps.qcow2", "8M")
    img("bitmap", "--add", "bitmaps.qcow2", "b0")
    img("bitmap", "--add", "-g", "1M", "--disable", "bitmaps.qcow2", 'b"1')
    create("\u00e9 \t.qcow2", "8M")
    img("create", "-q", "-f", "raw", "x.raw", "10000")
    (directory / "empty").touch()
    (directory / "text").write_text("no image")
    small = ImageBuilder(cluster_bits=16).build()
    (directory / "short.qcow2").write_bytes(small[:60])
    (directory / "truncated.qcow2").write_bytes(small[: len(small) // 2])
    (directory / "kinds.qcow2").write_bytes(builder_of_all_kinds().build())


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    find_tool("qemu-img")
    directory = tmp_path_factory.mktemp("conformance") / "pristine"
    prepare(directory)
    return directory


def compare(line: str, pristine: Path, tmp_path: Path) -> None:
    if not line.startswith("create") and "-r" not in line:
        assert run_ours(line, pristine) == run_theirs(line, pristine)
        return
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    shutil.copytree(pristine, theirs)
    shutil.copytree(pristine, ours)
    expected = run_theirs(line, theirs)
    assert run_ours(line, ours) == expected
    if expected[0] == 1:
        # What is left of an image that could not be made is no one's concern.
        return
    names = files_of(theirs)
    assert names == files_of(ours)
    for name in names:
        before = pristine / name
        after = (theirs / name).read_bytes()
        if (ours / name).read_bytes() != after:
            assert look_at(ours, name) == look_at(theirs, name), name
        elif before.exists() and before.read_bytes() == after:
            continue
        assert (ours / name).stat().st_size == (theirs / name).stat().st_size


QCOW2_OPTIONS = [
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=2M",
    "cluster_size=1000",
    "cluster_size=4M",
    "cluster_size=0",
    "cluster_size=512.5",
    "cluster_size=0x1000",
    "cluster_size=foo",
    "cluster_size=",
    "cluster_size",
    "cluster_size=4k,cluster_size=8k",
    "cluster_size=64k,,x=3",
    ",cluster_size=4k",
    "cluster_size=4k,",
    "=4k",
    "compat=0.10",
    "compat=1.1",
    "compat=v2",
    "compat=v3",
    "compat=0.11",
    "lazy_refcounts=on",
    "lazy_refcounts=off",
    "lazy_refcounts=yes",
    "lazy_refcounts=2",
    "lazy_refcounts",
    "nolazy_refcounts",
    "lazy_refcounts=on,compat=0.10",
    *(f"refcount_bits={1 << order}" for order in range(7)),
    "refcount_bits=3",
    "refcount_bits=128",
    "refcount_bits=-1",
    "refcount_bits=foo",
    "refcount_bits=8,compat=0.10",
    *(f"preallocation={mode}" for mode in ("off", "metadata", "falloc", "full")),
    "preallocation=metadata,cluster_size=4k,refcount_bits=64",
    "preallocation=foo",
    "compression_type=zlib",
    "compression_type=zstd",
    "compression_type=foo",
    "extended_l2=off",
    "extended_l2=on,cluster_size=8k",
    "extended_l2=on,compat=0.10",
    "compression_type=zstd,compat=0.10",
    "data_file_raw=on",
    "data_file=new.raw",
    "data_file=new.raw,data_file_raw=on,extended_l2=on",
    "data_file=new.raw,compat=0.10",
    "data_file=absent/new.raw",
    "data_file=",
    "encryption=off",
    "nocow=on,extent_size_hint=1M",
    "nonsense=1",
    "nononsense",
    "size=2M",
    "backing_fmt=raw",
    "help",
    "cluster_size=4k,help",
    "?",
]

SIZES = [
    *("0", "1", "511", "513", "1M", "1.5G", "5.G", "1k", "5K", "5b", "5t", "0x100"),
    *("1.5", "1e3", "5x", "5kB", ".5G", "5,5", "nan", "8E", "16E", "5p", "+5", "' 5'"),
    *("''", "9223372036854775808", "99999999999999999999999", "-- -5"),
]

CREATE = [
    *(f"create -f qcow2 -o '{options}' new.img 3M" for options in QCOW2_OPTIONS),
    *(f"create -f qcow2 new.img {size}" for size in SIZES),
    "create",
    "create new.img",
    "create new.img 1M",
    "create new.img 1M 2M",
    "create new.img 1 2 3",
    "create -q new.img 1000",
    "create -f raw new.img 1025",
    "create -fraw -o preallocation=falloc new.img 10k",
    "create -fraw -o preallocation=full new.img 10k",
    "create -fraw -o preallocation=off new.img 10k",
    "create -fraw -o preallocation=metadata new.img 10k",
    "create -fraw -o cluster_size=4k new.img 10k",
    "create -f raw -b base.qcow2 new.img 1M",
    "create -f raw -F raw new.img 1M",
    "create -f raw -o help",
    "create -f raw -o help new.img",
    "create -f qcow2 -o help",
    "create -f foo new.img 1M",
    "create -f foo -o help",
    "create -qf qcow2 new.img 1G",
    "create new.img 1G -fqcow2 -q",
    "create -f raw -f qcow2 new.img 1G",
    "create -f qcow2 -- new.img 1G",
    "create -f qcow2 -- -new.img 1G",
    "create -f qcow2 new.img 129G -o cluster_size=512",
    "create -f qcow2 new.img 1T -o cluster_size=2M",
    "create -f qcow2 -o size=1G new.img",
    "create -f qcow2 -o size=1G new.img 2G",
    "create -f qcow2 -o size=99999999999999999999 new.img",
    "create -f qcow2 -o size=16E new.img",
    "create -f qcow2 -o size=-1 new.img",
    "create -f qcow2 -o cluster_size=4k -o compat=v2 new.img 1G",
    "create -f qcow2 -o '' new.img 1G",
    "create -f qcow2 'new,a\"b.img' 1G",
    "create -f qcow2 file:new.img 1G",
    "create -f qcow2 file:new:x.img 1G",
    "create -f qcow2 ./new:a.img 1G",
    "create -f qcow2 new:a.img 1G",
    "create -f qcow2 '' 1G",
    "create -f qcow2 base.qcow2 1G",
    "create -f raw base.qcow2 1M",
    "create -f qcow2 absent/new.img 1G",
    "create -f raw absent/new.img 1G",
    "create -f qcow2 -b base.qcow2 -F qcow2 new.img",
    "create -f qcow2 -b base.qcow2 -F qcow2 new.img 1G",
    "create -f qcow2 -b base.qcow2 -F qcow2 new.img 1M",
    "create -f qcow2 -b top.qcow2 -F qcow2 -o cluster_size=4k new.img",
    "create -f qcow2 -b x.raw -F raw new.img",
    "create -f qcow2 -b x.raw -F qcow2 new.img",
    "create -f qcow2 -b base.qcow2 new.img",
    "create -f qcow2 -b base.qcow2 new.img 1G",
    "create -f qcow2 -b x.raw new.img",
    "create -f qcow2 -b absent -F raw new.img",
    "create -f qcow2 -b absent -F raw new.img 1G",
    "create -f qcow2 -u -b absent -F raw new.img 1G",
    "create -f qcow2 -u -b absent -F raw new.img",
    "create -f qcow2 -u -b absent new.img 1G",
    "create -f qcow2 -u new.img",
    "create -f qcow2 -u -b absent -F foo new.img 1G",
    "create -f qcow2 -u -b absent -F host_device new.img 1G",
    "create -f qcow2 -u -b absent -F quorum new.img 1G",
    "create -f qcow -u -b absent -F foo new.img 1G",
    "create -f qcow -u -b absent -F vmdk new.img 1G",
    "create -f qcow2 -b base.qcow2 -F foo new.img",
    "create -f qcow2 -b base.qcow2 -F '' new.img",
    "create -f qcow2 -F '' new.img 1G",
    "create -f qcow2 -b '' new.img 1G",
    "create -f qcow2 -b orphan.qcow2 -F qcow2 new.img",
    "create -f qcow2 -b new.img -F qcow2 new.img 1G",
    "create -f qcow2 -b base.qcow2 -F qcow2 sub/new.img 1G",
    "create -f qcow2 -b ../base.qcow2 -F qcow2 sub/new.img",
    "create -f qcow2 -F qcow2 -b base.qcow2 -o preallocation=metadata new.img",
    "create -f qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 new.img",
    "create -f qcow2 -o backing_file=absent -b base.qcow2 -F qcow2 new.img",
    "create -f qcow2 -o backing_fmt=raw -b base.qcow2 -F qcow2 new.img",
    f"create -f qcow2 -u -b {'a' * 1023} -F qcow2 new.img 1G",
    "create -x new.img 1G",
    "create --foo new.img 1G",
    "create --foo=3 new.img 1G",
    "create -f",
    "create new.img 1G -o",
    "create --object",
]

INFO = [
    *(
        f"info {options} {name}"
        for options in ("", "--output=json", "--backing-chain", "--back --out json")
        for name in (
            *("base.qcow2", "overlay.qcow2", "top.qcow2", "sub/overlay.qcow2"),
            *("orphan.qcow2", "orphan2.qcow2", "loop1.qcow2", "wrong.qcow2"),
            *("v2.qcow2", "lazy.qcow2", "new.qcow2", "external.qcow2", "full.qcow2"),
            *("snapshots.qcow2", "bitmaps.qcow2", "'\u00e9 \t.qcow2'", "kinds.qcow2"),
            *("x.raw", "empty", "text", "short.qcow2", "truncated.qcow2", "absent"),
        )
    ),
    "info",
    "info a b",
    "info ''",
    "info file:base.qcow2",
    "info file:",
    "map file:",
    "info ./base.qcow2",
    "info foo:bar",
    "info -f raw base.qcow2",
    "info sub",
    "info --image-opts base.qcow2",
    "info --image-opts ''",
    "info --image-opts driver=qcow2",
    "info --image-opts file=base.qcow2",
    "info --image-opts x,file.filename=base.qcow2",
    "info --image-opts driver=qcow2,file.filename=base.qcow2,file.foo=1",
    "info --image-opts driver=qcow2,backing.driver=raw,file.filename=overlay.qcow2",
    'info -f raw \'json:{"driver": "qcow2", "file.filename": "base.qcow2"}\'',
    'info \'json:{"driver": "raw", "offset": 512, "size": 1024, '
    '"file": {"driver": "file", "filename": "base.qcow2"}}\'',
    "info 'json:{}'",
    "info -fqcow2 base.qcow2",
    "info base.qcow2 -f qcow2",
    "info -f qcow2 x.raw",
    "info -f foo base.qcow2",
    "info -f '' base.qcow2",
    "info -f qcow2 --backing-chain top.qcow2",
    "info -U base.qcow2",
    "info --image-opts lazy-refcounts=on,overlap-check=all,file.filename=base.qcow2",
    "info --image-opts driver=raw,size=512,file.filename=base.qcow2",
    "info --image-opts driver=raw,offset=64k,file.filename=base.qcow2",
    "info --image-opts read-only=on,force-share=on,file.filename=base.qcow2",
    "info --force-share --format qcow2 --output human base.qcow2",
    "info --output=xml base.qcow2",
    "info --output base.qcow2",
    "info --f qcow2 base.qcow2",
    "info --backing-chain=yes base.qcow2",
    "info -q base.qcow2",
    "info -f",
    "info --output",
    "info -- base.qcow2",
]

CHECK = [
    *(
        f"check {options} {name}"
        for options in ("", "--output=json", "-q")
        for name in (
            *("base.qcow2", "overlay.qcow2", "top.qcow2", "sub/overlay.qcow2"),
            *("v2.qcow2", "lazy.qcow2", "new.qcow2", "full.qcow2", "tiny.qcow2"),
            *("snapshots.qcow2", "bitmaps.qcow2", "kinds.qcow2", "truncated.qcow2"),
            *("x.raw", "empty", "text", "short.qcow2", "absent", "external.qcow2"),
            *("orphan.qcow2", "orphan2.qcow2", "wrong.qcow2"),
        )
    ),
    *(f"check -r {mode} {name}" for mode in ("leaks", "all")
      for name in ("base.qcow2", "kinds.qcow2", "snapshots.qcow2", "new.qcow2")),
    "check",
    "check a b",
    "check --output=json --image-opts file.filename=base.qcow2",
    "check --output=json file:base.qcow2",
    "check -r foo base.qcow2",
    "check -r all -U base.qcow2",
    "check -U base.qcow2",
    "check -f qcow2 base.qcow2",
    "check -f qcow2 x.raw",
    "check -f raw base.qcow2",
    "check --output=xml base.qcow2",
    "check --repair=all base.qcow2",
    "check --repair base.qcow2",
    "check -T writeback base.qcow2",
    "check -T foo base.qcow2",
    "check -T '' x.raw",
    "check -r leaks text",
    "check -r foo --bar",
    "check --object secret,id=s,data=x,foo=1 -r foo",
    "check -x base.qcow2",
    "check -r",
]  # fmt: skip

OTHER = [
    *("foo", "", "--foo", "-x"),
    # An empty disk. Other programs' tests look with it whether there is a qemu-img.
    *("info /dev/null", "info --output=json /dev/null", "info -f qcow2 /dev/null"),
    *("check /dev/null", "map /dev/null", "measure -O qcow2 /dev/null"),
    *("compare /dev/null /dev/null", "compare /dev/null x.raw"),
    *("create -f raw /dev/null 1M", "resize -f raw /dev/null 1M"),
    "create -f qcow2 -b /dev/null -F raw new.img",
]

# Where qemu-img 7.2 crashes, hangs or needs the network, or where its text names
# what only it has. Not compared: `check loop1.qcow2` never ends in QEMU.


@pytest.mark.parametrize("line", [*CREATE, *INFO, *CHECK, *OTHER])
def test_same_as_qemu_img(line, pristine, tmp_path):
    compare(line, pristine, tmp_path)


def test_commit_leaves_a_guessed_raw_image_raw(tmp_path):
    for line in (
        "qemu-img create -q -f raw base 1M",
        "qemu-img create -q -f qcow -F raw -b base top",
        "qemu-img create -q -f qcow2 guests 1M",
        "truncate -s 1M guests",
        # qcow has no room for the backing file's format: it will be guessed.
        "qemu-img convert -n -f raw -O qcow guests top",
    ):
        subprocess.run(shlex.split(line), cwd=tmp_path, check=True)
    status, out, err = run_ours("commit -f qcow top", tmp_path)
    assert (status, out) == (1, b"")
    assert err.startswith(b"qemu-img: Block job failed: base: its format was guessed")
    assert (tmp_path / "base").read_bytes() == bytes(1 << 20)


def test_growing_within_a_cluster_of_version_2(tmp_path):
    """Nothing that a longer backing file has is to be hidden."""
    for line in (
        "qemu-img create -q -f qcow2 base 1M",
        "qemu-img create -q -f qcow2 -o compat=0.10 -F qcow2 -b base top 520k",
    ):
        subprocess.run(shlex.split(line), cwd=tmp_path, check=True)
    assert run_ours("resize -q top 567k", tmp_path) == (0, b"", b"")
    assert run_ours("resize -q top 577k", tmp_path)[0] == 1


def test_a_locked_image(pristine, tmp_path):
    shutil.copy(pristine / "base.qcow2", tmp_path)
    shutil.copy(pristine / "overlay.qcow2", tmp_path)
    lines = [
        "info base.qcow2",
        "info -U base.qcow2",
        "info --backing-chain overlay.qcow2",
        "info overlay.qcow2",
        "check base.qcow2",
        "check -r all base.qcow2",
        "check overlay.qcow2",
        "create -f qcow2 base.qcow2 1G",
        "create -f raw base.qcow2 1G",
        "create -f qcow2 -b base.qcow2 -F qcow2 new.img",
        "check -U overlay.qcow2",
        "info -U --backing-chain overlay.qcow2",
        "map --image-opts file.filename=base.qcow2,force-share=on,"
        "data-file.filename=overlay.qcow2",
        *(
            f"{command} {name}"
            for command in ("info", "info -U", "check", "check -U", "map", "map -U")
            for name in (
                "--image-opts file.filename=base.qcow2,force-share=on",
                "--image-opts file.filename=base.qcow2,force-share=off",
                '\'json:{"file.filename": "base.qcow2", "force-share": true}\'',
                '\'json:{"file.filename": "base.qcow2", "force-share": false}\'',
            )
        ),
    ]
    holder = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", "base.qcow2"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdin is not None
        assert holder.stdout is not None
        # Flushed: or the file may grow between the two that tell its length. Of
        # several lines at once it takes one, and waits for more to come.
        for line in (b"write 0 64k\n", b"flush\n", b""):
            said = b""
            while not said.endswith(b"qemu-io> "):
                more = os.read(holder.stdout.fileno(), 65536)
                assert more, said
                said += more
            holder.stdin.write(line)
            holder.stdin.flush()
        for line in lines:
            assert run_ours(line, tmp_path) == run_theirs(line, tmp_path), line
    finally:
        holder.communicate()


COMMANDS = (
    "amend bench bitmap check commit compare convert create dd info map measure "
    "rebase rename resize snapshot"
)


def test_version_and_help(tmp_path):
    for option in ("--version", "-V", "--vers"):
        status, out, _ = run_ours(option, REPOSITORY)
        # Scripts that look for what they may use read the number.
        ours = re.match(rb"qemu-img version (\d+\.\d+)\.\d+ \(nbdqcow ", out)
        theirs = min(qemu_version(), FOLLOWED)
        assert (status, tuple(map(int, ours[1].split(b".")))) == (0, theirs)
    for line in ("--help", "-h", "info --help", "create -h", "check -h"):
        status, out, _ = run_ours(line, REPOSITORY)
        assert status == 0
        assert b"usage: qemu-img" in out
        for name in COMMANDS.split():
            assert re.search(rf"^  {name} .*\n      [a-z]", out.decode(), re.M)
        formats = re.search(rb"^Supported formats: (.*)$", out, re.M)[1].split()
        listed = run_theirs("--help", tmp_path)[1]
        assert b"qcow2" in formats
        # Since 10.0 on lines of their own.
        known = re.search(rb"^Supported (?:image )?formats:((?:\s+\S+)*)", listed, re.M)
        assert set(formats) <= set(known[1].split())


@pytest.mark.parametrize("end", [">&-", "> /dev/full", ">&- 2>&- <&-", "| true"])
def test_work_is_done_though_nobody_reads_of_it(end, pristine, tmp_path):
    """As with qemu-img; and nothing is printed into an image that got the number
    of a closed descriptor."""
    subprocess.run(["cp", pristine / "kinds.qcow2", tmp_path], check=True)
    for line in ("create -f qcow2 new 1M", "convert -p kinds.qcow2 new.raw"):
        done = subprocess.run(
            ["sh", "-c", f'"$@" {line} {end}', "sh", *IN_A_PROCESS],
            cwd=tmp_path,
            capture_output=True,
            env=own_environment(),
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b"")
    assert run_theirs("check new", tmp_path)[0] == 0
    assert run_theirs("compare kinds.qcow2 new.raw", tmp_path)[0] == 0


def test_a_closed_pipe_is_no_traceback(pristine):
    done = subprocess.run(
        ["sh", "-c", '"$@" info base.qcow2 | true', "sh", *IN_A_PROCESS],
        cwd=pristine,
        capture_output=True,
        env=own_environment(),
        check=False,
    )
    assert done.stderr == b""

"""Command lines with `blkdebug` and `blkverify`, given to qemu-img and to us."""

import shutil
import subprocess

import pytest

from tests.conftest import find_tool
from tests.interop.img_programs import run_ours, run_theirs

CONFIGS = {
    "none": "",
    "probe": '[inject-error]\nevent = "none"\n',
    "event": '[inject-error]\nevent = "foo"\n',
    "nameless": '[inject-error]\nerrno = "5"\n',
    "number": '[inject-error]\nevent = "none"\nerrno = "x"\n',
    "once": '# once\n\n[inject-error]\n  event = "none"\nonce = "maybe"\n',
    "iotype": '[inject-error]\nevent = "none"\niotype = "foo"\n',
    "state": '[set-state]\nevent = "none"\nnew_state = "7"\n',
    "read_aio": '[inject-error]\nevent = "read_aio"\nerrno = "28"\n',
    "write_aio": '[inject-error]\nevent = "write_aio"\nerrno = "28"\n',
    "full": '[inject-error]\nevent = "pwritev"\nerrno = "28"\nonce = "off"\n',
    "bare": '[inject-error]\nevent = "none"\nsector = 1\n',
    "bare-event": "[inject-error]\nevent = none\n",
    "huge": f'[inject-error]\nevent = "none"\nsector = "{10**20}"\n',
    "octal": '[inject-error]\nevent = "none"\nsector = "08"\n',
    "space": '[inject-error]\nevent = "none"\nsector = "1 "\n',
    "l2_load": '[inject-error]\nevent = "l2_load"\n',
    "second": (
        '[set-state]\nevent = "read_aio"\nstate = "1"\nnew_state = "2"\n'
        '[inject-error]\nevent = "read_aio"\nstate = "2"\n'
    ),
}


@pytest.fixture
def directory(tmp_path):
    img = find_tool("qemu-img")
    for text, size in (("base.qcow2", "1M"), ("other.qcow2", "1M")):
        subprocess.run(
            [img, "create", "-qf", "qcow2", text, size], cwd=tmp_path, check=True
        )
    subprocess.run(
        [find_tool("qemu-io"), "-c", "write -P 7 0 128k", "base.qcow2"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    over = ["-b", "other.qcow2", "-F", "qcow2", "top.qcow2"]
    subprocess.run([img, "create", "-qf", "qcow2", *over], cwd=tmp_path, check=True)
    (tmp_path / "raw").write_bytes(b"\7" * 131072 + bytes(917504))
    for name, text in CONFIGS.items():
        (tmp_path / name).write_text(text)
    return tmp_path


FILTERED = "driver=qcow2,file.driver=blkdebug"
OVER = f"{FILTERED},file.image.filename=base.qcow2"


@pytest.mark.parametrize(
    "line",
    [
        *(f"info blkdebug:{name}:base.qcow2" for name in CONFIGS),
        *(
            f"compare blkdebug:{name}:base.qcow2 {other}"
            for name in ("none", "read_aio", "write_aio")
            for other in ("base.qcow2", "other.qcow2")
        ),
        "info blkdebug::base.qcow2",
        "info --output=json blkdebug::base.qcow2",
        "info --backing-chain blkdebug::top.qcow2",
        "info blkdebug:",
        "info blkdebug:none",
        "info blkdebug:absent:base.qcow2",
        "info blkdebug::absent",
        "check blkdebug::base.qcow2",
        "map blkdebug::raw",
        "map blkdebug::base.qcow2",
        "measure -O qcow2 blkdebug::base.qcow2",
        "create -f qcow2 blkdebug::new 1M",
        f"info --image-opts {FILTERED}",
        f"info --image-opts {OVER},file.align=3",
        f"info --image-opts {OVER},file.align=512,file.max-transfer=3",
        f"info --image-opts {OVER},file.opt-write-zero=1k,file.max-write-zero=3",
        f"info --image-opts {OVER},file.config=absent",
        f"info --image-opts {OVER},file.foo=1",
        f"info --image-opts {OVER},file.inject-error.0.event=foo",
        f"info --image-opts {OVER},file.inject-error.0.errno=5",
        f"info --image-opts {OVER},file.inject-error.0.event=none,"
        "file.inject-error.0.foo=5",
        f"compare --image-opts {OVER},file.align=4k,file.max-transfer=64k "
        "driver=qcow2,file.filename=base.qcow2",
        "map --image-opts driver=blkdebug,image.driver=qcow2,"
        "image.file.driver=file,image.file.filename=base.qcow2",
        "compare -f raw -F raw blkverify:raw:base.qcow2 raw",
        "info blkverify:raw:base.qcow2",
        "info blkverify:raw",
        "info --image-opts driver=raw,file.driver=blkdebug,file.image.driver=null-co",
        "info --image-opts driver=raw,file.driver=blkverify,file.raw.filename=raw,"
        "file.test.driver=null-co",
        'info \'json:{"driver":"qcow2","file":{"driver":"blkdebug","image":"a"}}\'',
    ],
)
def test_as_qemu_img(directory, line):
    assert run_ours(line, directory) == run_theirs(line, directory)


@pytest.mark.parametrize("command", ["commit", "convert -O qcow2 -n raw"])
def test_writes_fail_as_with_qemu_img(directory, command):
    subprocess.run(
        ["qemu-io", "-c", "write -P 9 0 64k", "top.qcow2"],
        cwd=directory, check=True, capture_output=True,
    )  # fmt: skip
    name = (
        "json:{'driver':'qcow2','file':{'driver':'blkdebug','image':{'driver':'file',"
        "'filename':'other.qcow2'},'inject-error':[{'event':'write_aio','errno':28,"
        "'once':true}]}}"
    )
    subprocess.run(
        ["qemu-img", "rebase", "-u", "-F", "qcow2", "-b", name, "top.qcow2"],
        cwd=directory, check=True,
    )  # fmt: skip
    line = f"{command} top.qcow2" if command == "commit" else f'{command} "{name}"'
    copy = directory.with_name(f"{directory.name}-ours")
    shutil.copytree(directory, copy)
    ours, theirs = run_ours(line, copy), run_theirs(line, directory)
    if command == "commit":
        assert ours == theirs
    else:
        # Which byte it is depends on how the disk is cut.
        assert ours[0] == theirs[0] == 1
        assert ours[2].endswith(b": No space left on device")
    for place in (directory, copy):
        check = ["qemu-img", "check", "other.qcow2"]
        assert subprocess.run(check, cwd=place, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    "line",
    [
        "bench -w -c 3 -f qcow2 blkdebug:full:other.qcow2",
        "convert -n -O qcow2 base.qcow2 blkdebug:full:other.qcow2",
    ],
)
def test_a_disk_that_is_full_when_it_is_closed_too(line, directory):
    """What failed first is said."""
    theirs = run_theirs(line, directory)
    status, _, err = run_ours(line, directory)
    assert status == theirs[0] == 1
    assert err.splitlines()[0] == theirs[2].splitlines()[0]

"""Encrypted images of nbdqcow-img beside those of qemu-img: same command line,
same answers; and each opens and changes what the other has made."""

import random
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.conftest import with_luks
from tests.interop.img_programs import Outcome, run_ours, run_theirs
from tests.interop.test_luks import run

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-img") is None, reason="qemu-img is not installed"
)

ONE = "--object secret,id=s,data=one"
TWO = "--object secret,id=t,data=two"
QUICK = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
AES = "encrypt.format=aes,encrypt.key-secret=s"


def theirs(line: str, directory: Path) -> Outcome:
    """Run qemu-img, again where it could not tell what its time is worth."""
    return with_luks(lambda: run_theirs(line, directory))


def without_chance(outcome: Outcome) -> Outcome:
    """Leave out what differs from one image to the next."""
    status, out, err = outcome
    for word in (rb"uuid", rb"iters", rb"actual-size", rb"disk size"):
        out = re.sub(word + rb'("?): .*', word + rb"\1", out)
    return status, out, err


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with encrypted images that QEMU has made."""
    path = tmp_path_factory.mktemp("encrypted")
    (path / "secret").write_bytes(b"one")
    (path / "plain.raw").write_bytes(bytes(1 << 20))
    for options, name in (
        (QUICK, "luks.qcow2"),
        (f"{QUICK},encrypt.ivgen-alg=essiv,encrypt.cipher-mode=cbc", "essiv.qcow2"),
        (AES, "aes.qcow2"),
    ):
        outcome = theirs(f"create -q -f qcow2 {ONE} -o {options} {name} 1M", path)
        assert outcome == (0, b"", b"")
    return path


CREATE = [
    QUICK,
    f"{QUICK},cluster_size=512",
    f"{QUICK},cluster_size=2M",
    f"{QUICK},compat=0.10",
    f"{QUICK},preallocation=metadata",
    f"{QUICK},refcount_bits=64,lazy_refcounts=on",
    f"{QUICK},encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc",
    f"{QUICK},encrypt.ivgen-alg=essiv",
    f"{QUICK},encrypt.ivgen-alg=plain,encrypt.ivgen-hash-alg=sha1",
    f"{QUICK},encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha1",
    f"{QUICK},encrypt.ivgen-alg=plain64,encrypt.ivgen-hash-alg=md5",
    f"{QUICK},encrypt.hash-alg=sha512",
    "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=0",
    AES,
    f"{AES},compat=0.10",
    f"{AES},encrypt.cipher-alg=aes-256",
    f"{AES},encryption=off",
    f"{AES},encryption=on",
    "encryption=on",
    "encryption=on,encrypt.key-secret=s",
    "encrypt.format=luks",
    "encrypt.format=aes",
    "encrypt.format=foo",
    "encrypt.format=luks,encrypt.key-secret=x",
    "encrypt.key-secret=s",
    "encrypt.foo=1",
    *(
        f"encrypt.format=luks,encrypt.key-secret=s,encrypt.{name}=foo"
        for name in ("cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg")
    ),
    "encrypt.format=luks,encrypt.key-secret=s,encrypt.hash-alg=foo",
    "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=foo",
    "encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg=des",
]


@pytest.mark.parametrize("options", CREATE)
def test_create(options: str, tmp_path: Path) -> None:
    """Both answer alike, and QEMU finds the same in both images."""
    line = f"create -f qcow2 {ONE} -o {options} new.qcow2 3M"
    outcomes = []
    for name, run_one in (("theirs", theirs), ("ours", run_ours)):
        path = tmp_path / name
        path.mkdir()
        found = [run_one(line, path)]
        if found[0][0] == 0:
            opts = "driver=qcow2,file.filename=new.qcow2,encrypt.key-secret=s"
            checked = theirs(f"check -q {ONE} --image-opts {opts}", path)
            found += [without_chance(theirs("info new.qcow2", path)), checked]
        outcomes.append(found)
    assert outcomes[0] == outcomes[1]


QUICK_LUKS = "key-secret=s,iter-time=10"
CONTAINERS = [
    QUICK_LUKS,
    f"{QUICK_LUKS},preallocation=full,cipher-mode=cbc,ivgen-alg=essiv",
    f"{QUICK_LUKS},preallocation=foo",
    "cipher-alg=aes-256",
    "key-secret=x",
    f"{QUICK_LUKS},hash-alg=foo",
    "foo=1",
    "help",
]


@pytest.mark.parametrize("options", CONTAINERS)
def test_create_a_container(options: str, tmp_path: Path) -> None:
    line = f"create -f luks {ONE} -o {options} new.luks 1000000"
    outcomes = []
    for name, run_one in (("theirs", theirs), ("ours", run_ours)):
        path = tmp_path / name
        path.mkdir()
        found = [run_one(line, path)]
        if (path / "new.luks").exists():
            opts = f"{ONE} --image-opts driver=luks,file.filename=new.luks,key-secret=s"
            for look in (f"info {opts}", "info new.luks", f"map --output=json {opts}"):
                found.append(without_chance(theirs(look, path)))
                assert without_chance(run_ours(look, path)) == found[-1]
            # QEMU writes to it.
            target = f"{ONE} --image-opts --target-image-opts -n"
            (path / "content").write_bytes(bytes(range(256)) * 3908)
            source = "driver=raw,file.filename=content"
            container = "driver=luks,file.filename=new.luks,key-secret=s"
            done = theirs(f"convert {target} {source} {container}", path)
            assert done == (0, b"", b"")
            done = run_ours(f"compare {ONE} --image-opts {source} {container}", path)
            assert done[:2] == (0, b"Images are identical.\n")
        outcomes.append(found)
    assert outcomes[0] == outcomes[1]


SLOTS = [
    "state=active,new-secret=t,iter-time=10",
    "state=active,new-secret=t,keyslot=5,iter-time=10",
    "--force state=active,new-secret=t,keyslot=0,iter-time=10",
    "state=active,new-secret=t,keyslot=0",
    "state=active,new-secret=t,keyslot=8",
    "state=active,new-secret=x",
    "state=active",
    "state=foo",
    "new-secret=t",
    "state=inactive",
    "state=inactive,keyslot=0",
    "state=inactive,keyslot=3",
    "state=inactive,old-secret=s",
    "state=inactive,old-secret=t",
    "state=inactive,keyslot=0,old-secret=t",
    "--force state=inactive,keyslot=0",
    "state=inactive,keyslot=0,iter-time=3",
    "format=luks",
]


@pytest.mark.parametrize("change", SLOTS)
def test_amend_key_slots(change: str, directory: Path, tmp_path: Path) -> None:
    force, _, names = change.rpartition(" ")
    options = ",".join(f"encrypt.{name}" for name in names.split(","))
    opened = "--image-opts driver=qcow2,file.filename=luks.qcow2,encrypt.key-secret"
    line = f"amend {ONE} {TWO} {force} -o {options} {opened}=s"
    outcomes = []
    for name, run_one in (("theirs", theirs), ("ours", run_ours)):
        path = tmp_path / name
        path.mkdir()
        shutil.copy(directory / "luks.qcow2", path)
        found = [run_one(line, path)]
        if found[0][0]:
            before = (directory / "luks.qcow2").read_bytes()
            assert (path / "luks.qcow2").read_bytes() == before
        else:
            found.append(without_chance(theirs("info luks.qcow2", path)))
            check = f"check -q {ONE} {TWO} {opened}"
            found += [theirs(f"{check}={key}", path) for key in "st"]
        outcomes.append(found)
    assert outcomes[0] == outcomes[1]


OBJECTS = [
    "secret",
    "secret,id=x",
    "secret,id=x,data=a,file=b",
    "secret,id=x,data=a,format=foo",
    "secret,id=x,data=a,foo=1",
    "secret,id=x,data=!!!!,format=base64",
    "foo,id=x",
    '\'{"qom-type": "secret", "id": "s", "data": "x"}\'',
]


@pytest.mark.parametrize("text", OBJECTS)
def test_objects(text: str, tmp_path: Path) -> None:
    line = f"create -f qcow2 --object {text} new.qcow2 1M"
    assert run_ours(line, tmp_path) == theirs(line, tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "info --object secret,id=x,file=noise plain.raw",
        "create -f luks --object secret,id=x,file=noise -o key-secret=x new 1M",
        "create -f luks --object secret,id=x,data=Ov//,format=base64 "
        "-o key-secret=x new 1M",
        "create -f qcow2 --object secret,id=x,file=noise "
        "-o encrypt.format=luks,encrypt.key-secret=x new 1M",
    ],
)
def test_a_secret_that_is_no_text(line: str, tmp_path: Path) -> None:
    """It is an error of those who use it as a passphrase, and of no others."""
    (tmp_path / "noise").write_bytes(b":<;\xff")
    (tmp_path / "plain.raw").write_bytes(bytes(1 << 20))
    assert run_ours(line, tmp_path) == theirs(line, tmp_path)
    assert not (tmp_path / "new").exists()


def test_a_secret_with_a_surrogate(tmp_path: Path) -> None:
    text = '\'{"qom-type": "secret", "id": "x", "data": "\\ud800"}\''
    line = f"create -q -f luks --object {text} -o key-secret=x new 1M"
    status, _, err = run_ours(line, tmp_path)
    assert status == 1
    assert err == b"qemu-img: new: Data from secret x is not valid UTF-8"


OPTS = "--image-opts driver=qcow2,file.filename="
LOOK = [
    *(
        f"{command} {name}"
        for command in ("info", "info --output=json")
        for name in ("luks.qcow2", "essiv.qcow2", "aes.qcow2")
    ),
    *(
        f"info {output} {ONE} {OPTS}luks.qcow2,encrypt.key-secret=s"
        for output in ("", "--output=json")
    ),
    f"info {OPTS}luks.qcow2,encrypt.key-secret=x",
    f"info {OPTS}luks.qcow2",
    "info -f qcow2 --image-opts driver=qcow2,file.filename=luks.qcow2",
    "info --object secret,id=x luks.qcow2",
    f"check {ONE} {OPTS}luks.qcow2,encrypt.key-secret=s",
    f"check --object secret,id=s,file=secret {OPTS}luks.qcow2,encrypt.key-secret=s",
    "check --object secret,id=s,data=b25l,format=base64 "
    f"{OPTS}luks.qcow2,encrypt.key-secret=s",
    f"check {TWO} {OPTS}luks.qcow2,encrypt.key-secret=t",
    f"check {ONE} {OPTS}luks.qcow2,encrypt.key-secret=t",
    f"check {ONE} {OPTS}aes.qcow2,encrypt.key-secret=s",
]


@pytest.mark.parametrize("line", LOOK)
def test_info_and_check(line: str, directory: Path) -> None:
    assert run_ours(line, directory) == theirs(line, directory)


def test_a_check_needs_no_passphrase(directory: Path) -> None:
    """We look at the tables alone; QEMU refuses."""
    assert run_ours("check luks.qcow2", directory)[0] == 0
    assert theirs("check luks.qcow2", directory)[0] == 1


@pytest.mark.parametrize(
    "options",
    [
        QUICK,
        f"{QUICK},cluster_size=512,encrypt.ivgen-alg=essiv",
        f"{QUICK},preallocation=metadata,encrypt.cipher-mode=cbc",
        AES,
    ],
)
def test_qemu_writes_what_we_make(options: str, tmp_path: Path, seed: int) -> None:
    line = f"create -q -f qcow2 {ONE} -o {options} disk.qcow2 1M"
    assert run_ours(line, tmp_path) == (0, b"", b"")
    content = random.Random(seed).randbytes(1 << 20)
    (tmp_path / "content").write_bytes(content)
    secret = shlex.split(ONE)
    disk = f"driver=qcow2,file.filename={tmp_path}/disk.qcow2,encrypt.key-secret=s"
    for words in (
        ("convert", "-n", "-f", "raw", tmp_path / "content",
         "--target-image-opts", disk),
        ("check", "--image-opts", disk),
        ("compare", "--image-opts", disk,
         f"driver=raw,file.filename={tmp_path}/content"),
    ):  # fmt: skip
        done = run("qemu-img", words[0], *secret, *words[1:])
        assert done.returncode == 0, done.stdout + done.stderr
    ours = f"check {ONE} {OPTS}disk.qcow2,encrypt.key-secret=s"
    assert run_ours(ours, tmp_path)[0] == 0


def test_a_chain_with_two_passphrases(tmp_path: Path) -> None:
    base, top = f"{QUICK} base.qcow2", f"{AES.replace('=s', '=t')} top.qcow2"
    for line in (
        f"create -q -f qcow2 {ONE} -o {base} 1M",
        f"create -q -u -f qcow2 {TWO} -b base.qcow2 -F qcow2 -o {top} 1M",
    ):
        assert run_ours(line, tmp_path) == (0, b"", b"")
    (tmp_path / "content").write_bytes(b"content " * 1000)
    base = "driver=qcow2,file.filename=base.qcow2,encrypt.key-secret=s"
    line = f"convert -n {ONE} -f raw content --target-image-opts {base}"
    assert theirs(line, tmp_path) == (0, b"", b"")
    top = "driver=qcow2,file.filename=top.qcow2,encrypt.key-secret=t"
    top += ",backing.encrypt.key-secret=s"
    for run_one, output in ((theirs, "theirs.raw"), (run_ours, "ours.raw")):
        line = f"convert {ONE} {TWO} --image-opts {top} -O raw {output}"
        assert run_one(line, tmp_path) == (0, b"", b"")
    content = (tmp_path / "ours.raw").read_bytes()
    assert content.startswith(b"content " * 1000)
    assert content == (tmp_path / "theirs.raw").read_bytes()
    # Of one that is not there, nothing but the name is told.
    line = f"convert {TWO} --image-opts {top} -O raw none.raw"
    status, _, err = run_ours(line, tmp_path)
    assert status == 1
    assert b"No secret with id 's'" in err


@pytest.mark.parametrize(
    "target",
    ["-O luks -o key-secret=s,iter-time=10", f"-O qcow2 -o {AES},preallocation=full"],
)
def test_convert_writes_zeroes_where_there_is_noise(
    target: str, tmp_path: Path
) -> None:
    (tmp_path / "source").write_bytes(bytes(200_000) + b"x" * 1000 + bytes(99_000))
    line = f"convert {ONE} -f raw {target} source output"
    assert run_ours(line, tmp_path) == (0, b"", b"")
    opts = "driver=luks,file.filename=output,key-secret=s"
    if "qcow2" in target:
        opts = "driver=qcow2,file.filename=output,encrypt.key-secret=s"
    raw = "driver=raw,file.filename=source"
    done = theirs(f"compare {ONE} --image-opts {opts} {raw}", tmp_path)
    assert done[:2] == (0, b"Images are identical.\n")

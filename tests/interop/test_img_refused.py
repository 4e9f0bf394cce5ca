"""Names and options that qemu-img refuses, or answers without doing anything."""

import subprocess
from pathlib import Path

import pytest

from tests.conftest import find_tool
from tests.interop.img_beside_qemu import prepare, settle
from tests.interop.img_programs import run_ours, run_theirs

ONE = "--object secret,id=s,data=one"
LUKS = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    find_tool("qemu-img")
    directory = tmp_path_factory.mktemp("refused") / "disks"
    prepare(directory)
    run_theirs("create -f qcow old.qcow 1M", directory)
    run_theirs(f"create {ONE} -f qcow2 -o {LUKS} encrypted.qcow2 1M", directory)
    return directory


@pytest.mark.parametrize(
    "line",
    [
        # A directory.
        "create -f raw sub 1M",
        "create -f qcow2 sub 1M",
        "create -f qcow2 -b sub -F raw new 1M",
        "info sub",
        "check -f qcow2 sub",
        "map sub",
        "convert sub new",
        "convert base.raw sub",
        "convert -O qcow2 base.raw sub",
        "convert -n -O raw base.raw sub",
        "compare base.raw sub",
        "resize -f raw sub 1M",
        "snapshot -c a sub",
        "commit sub",
        "rebase -b '' sub",
        "amend -o compat=1.1 sub",
        "dd if=base.raw of=sub",
        "bench -w sub",
        "bitmap --add sub x",
        # Formats that nobody creates.
        "create -f bochs nbd://example.com 1M",
        "create -f dmg -o help",
        "convert -O bochs base.raw new",
        "convert -O bochs -o help",
        "dd -O throttle if=base.raw of=new",
        "measure -O cloop --size 1M",
        "amend -f bochs -o help",
        # Of several wrong things the one that QEMU sees first.
        "amend -f qcow2 --image-opts -t x -o compat=1.1 file.filename=base.qcow2",
        "amend -p -f qcow2 --image-opts -o compat=1.1 file.filename=base.qcow2",
        "amend -p -o compat=1.1",
        "amend -f file -o compat=1.1 base.raw",
        "amend -o compat=1.1 --image-opts driver=file,filename=base.raw",
        "rebase -f qcow2 --image-opts -t x -b base.raw file.filename=top.qcow2",
        "rebase -p -f qcow2 --image-opts -b base.raw file.filename=top.qcow2",
        "commit -p -f qcow2 --image-opts -t x file.filename=top.qcow2",
        "compare -p -f qcow2 --image-opts -T x file.filename=top.qcow2 base.raw",
        "convert -p -f qcow2 --image-opts -T x file.filename=top.qcow2 new",
        "convert -p -f qcow2 --image-opts file.filename=top.qcow2 new",
        "convert -p -T x top.qcow2 new",
        "resize -f qcow2 --image-opts file.filename=top.qcow2 x",
        "snapshot -l --object secret -a x snap.qcow2",
        "snapshot --object secret",
        # A new file that is called as a directory.
        "convert base.raw new/",
        "convert -O qcow2 base.raw new/",
        "dd if=base.raw of=new/",
        # Commas in a list of options.
        "create -f qcow2 -o lazy_refcounts,,compat=1.1 new 1M",
        "create -f qcow2 -o lazy,,refcounts=1 new 1M",
        "create -f qcow2 -o help,,x new 1M",
        "amend -o lazy_refcounts,,compat=1.1 base.qcow2",
        *(
            f"info --image-opts {options}"
            for options in (
                "driver=qcow2,nolazy-refcounts,file.filename=base.qcow2",
                "driver=qcow2,lazy-refcounts,,file.filename=base.qcow2",
                ",driver=qcow2,file.filename=base.qcow2",
                ",,driver=qcow2,file.filename=base.qcow2",
                "driver=qcow2,=1,file.filename=base.qcow2",
                "driver=qcow2,node-name,file.filename=base.qcow2",
                ",",
            )
        ),
        "info --object secret,id=s,=a base.qcow2",
        "info --object ,id=s base.qcow2",
        *(
            f"convert -l snapshot.name={name} snap.qcow2 new"
            for name in ("x,,y", "x,,", "x,,,foo", "x,nofoo")
        ),
        # The file's own options.
        "create -f raw -o preallocation=foo new 1M",
        "convert -o preallocation=foo base.raw new",
        *(
            f"{line} extent_size_hint={hint}"
            for line in ("create -f qcow2 new 1M -o", "convert base.raw new -o")
            for hint in ("4G", "5000M", "16E")
        ),
        # Encryption that an image does not have.
        *(
            f"{command} {ONE} --image-opts {options}"
            for command in ("map", "compare base.raw")
            for options in (
                "driver=qcow2,encrypt.key-secret=s,file.filename=base.qcow2",
                f"driver=qcow2,{LUKS[:41]},file.filename=base.qcow2",
                "driver=qcow2,encrypt.format=aes,file.filename=base.qcow2",
                "driver=qcow,encrypt.format=luks,file.filename=old.qcow",
                "driver=qcow2,encrypt.format=aes,encrypt.key-secret=s,"
                "file.filename=encrypted.qcow2",
                "driver=qcow2,encrypt.format=nosuch,encrypt.key-secret=s,"
                "file.filename=encrypted.qcow2",
                "driver=raw,encrypt.key-secret=s,file.filename=base.raw",
                "driver=raw,key-secret=s,file.filename=base.raw",
            )
        ),
        # Images that their options make read-only.
        *(
            f"{command} --image-opts file.filename=base.qcow2,{option}{end}"
            for option in (
                "driver=qcow2,read-only=on",
                "driver=qcow2,file.read-only=on",
            )
            for command, end in (
                ("amend -o compat=0.10", ""),
                ("bench -w", ""),
                ("bitmap --add", " x"),
                ("check -r all", ""),
                ("check", ""),
                ("commit", ""),
                ("rebase -b ''", ""),
                ("resize", " 16M"),
                ("snapshot -c a", ""),
                ("snapshot -l", ""),
                ("map", ""),
            )
        ),
        "convert -n --target-image-opts base.raw"
        " driver=qcow2,file.filename=base.qcow2,read-only=on",
        'resize \'json:{"file.filename": "base.qcow2", "read-only": true}\' 16M',
        'check -r all \'json:{"file.filename": "absent", "read-only": true}\'',
        "resize --image-opts file.filename=base.qcow2,file.force-share=on 9M",
        # Disks that are what they are.
        *(
            f"resize {option} 'json:{{{name}}}' {size}"
            for option in ("", "--preallocation=full", "--preallocation=falloc")
            for name in (
                '"driver": "null-co", "size": 1048576',
                '"driver": "raw", "file": {"driver": "null-co", "size": 1048576}',
            )
            for size in ("2M", "+1M")
        ),
        'resize --shrink \'json:{"driver":"null-co","size":1048576}\' 1k',
        # Questions, and what -p says of an end.
        "amend -p -o help -f qcow2 base.qcow2",
        "amend -p -o help -f luks",
        "amend -p -o help base.qcow2",
        "amend -pq -o help -f qcow2",
        "amend -p -o help -f raw base.raw",
        "amend -p -o compat=9 base.qcow2",
        "amend -p -o size=1k base.qcow2",
        "amend -p -o nosuch=1 base.qcow2",
        "amend -p -o compat=1.1 absent",
        "info --object secret,help absent",
        "create --object secret,id=s,help",
        "map --object tls-creds-psk,help absent",
        "convert --object tls-creds-x509,?",
        "check --object authz-list,help absent",
        "check --object qom-type=authz-simple,help absent",
        "check --object authz-list-file,help absent",
        "info --object tls-creds-x509,id=a,nosuch=b base.raw",
        "info --object secret,id=a,data=b,nosuch=c base.raw",
        "info --object secret,id=a,data=b,iv=c base.raw",
        "info --object secret,id=a,data=b,keyid=c base.raw",
        # Bitmaps of what can have none.
        "convert --bitmaps base.raw new",
        "convert --bitmaps -O qcow2 base.raw new",
        "convert --bitmaps -O qcow2 v2.qcow2 new",
        "convert --bitmaps -O raw bitmaps.qcow2 new",
        # Of two things that are wrong, the one that is seen first.
        "convert -C --salvage -c base.raw new",
        "convert -C -S 4k -c base.raw new",
        "convert -C -S 4k --salvage base.raw new",
        "convert -n -o a=1 -C -c base.raw new",
        "convert -n -o a=1 --skip-broken-bitmaps base.raw new",
        "convert --skip-broken-bitmaps -C -c base.raw new",
        "convert -C --target-image-opts -c base.raw new",
        # A promise that can't be kept.
        "convert -n --target-is-zero -B base.qcow2 -O qcow2 base.raw overlay.qcow2",
        # More than there is of a file.
        *(
            f"{command} --image-opts driver=raw,file.filename=base.raw,{window}"
            for command in ("info", "map")
            for window in ("offset=100M", "size=100M", "offset=512,size=8M")
        ),
        # No server, or none that can be.
        *(
            f"info --image-opts driver=nbd,{options}"
            for options in (
                "path=/absent,host=x",
                "server.type=inet,server.host=127.0.0.1",
                "server.type=nosuch,server.host=127.0.0.1",
                "path=/absent,reconnect-delay=1",
                "server.type=unix,server.path=/absent,open-timeout=1",
            )
        ),
        "create -f raw nbd://127.0.0.1:1/x 1M",
        "create -f qcow2 nbd://127.0.0.1:1/x 1M",
        "convert -O raw base.raw nbd://127.0.0.1:1/x",
        "convert -n -O raw base.raw nbd://127.0.0.1:1/x",
        "dd if=base.raw of=nbd://127.0.0.1:1/x",
        # A configuration of nothing.
        "map blkdebug:/dev/null:base.raw",
        "map --image-opts driver=raw,file.driver=blkdebug,file.config=/dev/null,"
        "file.image.filename=base.raw",
    ],
)
def test_refused(line: str, disks: Path, tmp_path: Path) -> None:
    for name in ("theirs", "ours"):
        subprocess.run(["cp", "-a", "--", disks, tmp_path / name], check=True)
    expected = settle(run_theirs(line, tmp_path / "theirs"))
    if "--target-is-zero" in line:
        # QEMU 7.2 says so, does nothing, and exits with 0.
        expected = 1, *expected[1:]
    assert settle(run_ours(line, tmp_path / "ours")) == expected


@pytest.mark.parametrize(
    "line",
    [
        "convert -O host_device base.qcow2 new",
        "convert -O host_device base.qcow2 base.raw",
        "convert -n -O host_device base.qcow2 base.raw",
        "convert -n --target-image-opts base.qcow2 "
        "driver=host_device,filename=base.raw",
        "convert -n --target-image-opts base.qcow2 "
        "driver=raw,file.driver=host_device,file.filename=base.raw",
        "create -f host_device new 1M",
        "create -f host_device base.raw 1M",
        "create -f qcow2 -b base.raw -F host_device new",
        "dd -O host_device if=base.qcow2 of=new",
        "info -f host_device base.raw",
        "resize -f host_device base.raw 1G",
        "bench -w -f host_device base.raw",
        "convert -O nbd base.qcow2 new",
        "convert -n -O nbd base.qcow2 base.raw",
        "create -f nbd new 1M",
        "dd -O nbd if=base.qcow2 of=new",
        "info -f nbd base.raw",
    ],
)
def test_a_file_in_the_place_of_another_disk(
    line: str, disks: Path, tmp_path: Path
) -> None:
    """A disk that is gone must not become a file in /dev that nobody looks at."""
    for name in ("theirs", "ours"):
        subprocess.run(["cp", "-a", "--", disks, tmp_path / name], check=True)
    expected = settle(run_theirs(line, tmp_path / "theirs"))
    assert expected[0] == 1
    assert settle(run_ours(line, tmp_path / "ours")) == expected
    left = {path.name: path.read_bytes() for path in (tmp_path / "ours").glob("*.raw")}
    assert left == {path.name: path.read_bytes() for path in disks.glob("*.raw")}
    assert not (tmp_path / "ours" / "new").exists()


def test_bitmaps_of_a_snapshot(disks: Path, tmp_path: Path) -> None:
    """They are the disk's: QEMU copies them all the same."""
    subprocess.run(["cp", "-a", "--", disks, tmp_path / "ours"], check=True)
    directory = tmp_path / "ours"
    assert run_theirs("snapshot -c s bitmaps.qcow2", directory)[0] == 0
    status, out, err = run_ours(
        "convert -l s --bitmaps -O qcow2 bitmaps.qcow2 new", directory
    )
    assert (status, out) == (1, b"")
    assert err == b"qemu-img: --bitmaps: a snapshot has no bitmaps"
    assert not (directory / "new").exists()


def test_list_of_objects(disks: Path) -> None:
    """Ours is shorter, and nothing is done."""
    status, out, err = run_ours("create --object help new 1M", disks)
    assert (status, err) == (0, b"")
    listed = run_theirs("info --object help absent", disks)[1].splitlines()
    assert set(out.splitlines()) <= set(listed)
    assert b"  secret" in out.splitlines()
    assert not (disks / "new").exists()


@pytest.mark.parametrize("format_", ["qed", "vdi", "vmdk", "vhdx", "vpc", "parallels"])
def test_images_of_other_formats_are_not_taken_for_raw_ones(tmp_path, format_):
    """The disk would be what is in the file."""
    assert run_theirs(f"create -q -f {format_} disk 1M", tmp_path)[0] == 0
    before = (tmp_path / "disk").read_bytes()
    for line in ("convert -O qcow2 disk new", "info disk", "resize disk 16M"):
        text = f"qemu-img: Could not open 'disk': Unknown driver '{format_}'"
        assert run_ours(line, tmp_path) == (1, b"", text.encode())
    assert (tmp_path / "disk").read_bytes() == before
    assert run_ours("convert -f raw -O qcow2 disk new", tmp_path) == (0, b"", b"")
